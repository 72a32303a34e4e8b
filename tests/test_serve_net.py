"""What `kling-serve` sends and fetches: signed callbacks, pictures by URL, and never a private address."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("jwt")
pytest.importorskip("prometheus_client")

from kling_programs.sample.server import callbacks, fetch
from kling_programs.sample.server.fetch import Reach
from kling_programs.sample.server.store import Store
from serving import KEYS, SHORT, new, png

from kling.errors import UserError

pytest_plugins = ["serving"]


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1", "255.255.255.255",
        "::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "ff02::1", "::ffff:10.0.0.1", "::ffff:169.254.169.254", "64:ff9b::a00:1",
        "2002:a00:1::", "::127.0.0.1",
    ],
)  # fmt: skip
def test_private_addresses(address: str) -> None:
    assert not fetch.is_public(address)


def test_public_addresses() -> None:
    assert all(map(fetch.is_public, ("93.184.216.34", "8.8.8.8", "2606:2800:220:1:248:1893:25c8:1946", "::ffff:8.8.8.8")))


@pytest.fixture
def site() -> Iterator[Any]:
    """A web server: `site.pages[path] = (status, headers, body or an iterator of bytes)`; `site.posts` is what was posted."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # noqa: N802 - the library's names
            status, headers, body = self.server.pages[self.path]
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            try:
                for chunk in [body] if isinstance(body, bytes) else body():
                    self.wfile.write(chunk)
                    self.wfile.flush()
            except OSError:
                pass

        def do_POST(self) -> None:  # noqa: N802
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            self.server.posts.append((dict(self.headers), body))
            self.send_response(self.server.replies.pop(0) if self.server.replies else 200)
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Page)
    server.pages, server.posts, server.replies = {}, [], []
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def test_pictures_by_url(site, start) -> None:
    client = start()
    data = base64.b64decode(png())
    site.pages["/a.png"] = (200, {"Content-Length": str(len(data))}, data)
    site.pages["/to"] = (302, {"Location": "/a.png"}, b"")
    for path in ("/a.png", "/to"):
        made = client.wait("image2video", client.make("image2video", SHORT | {"image": site.url + path})["task_id"])
        assert made["task_status"] == "succeed"
        assert (client.store.folder / client.store.get("anna", made["task_id"]).request["image"]).read_bytes() == data


def test_what_is_not_fetched(site, monkeypatch: pytest.MonkeyPatch) -> None:
    reach = Reach(private=True, most=1000, seconds=0.5, redirects=2)

    def drip() -> Iterator[bytes]:
        for _ in range(100):
            yield b"x"
            time.sleep(0.1)

    site.pages |= {
        "/large": (200, {"Content-Length": "2000"}, b"x" * 2000),
        "/larger": (200, {}, b"x" * 2000),
        "/slow": (200, {"Content-Length": "100"}, drip),
        "/round": (302, {"Location": "/round"}, b""),
        "/file": (302, {"Location": "file:///etc/passwd"}, b""),
    }
    for path, words in (("large", "MiB"), ("larger", "MiB"), ("slow", "0.5 s"), ("round", "more than 2 times"), ("file", "cannot be used")):
        began = time.monotonic()
        with pytest.raises(UserError, match=words):
            fetch.fetch(f"{site.url}/{path}", reach, "image")
        assert time.monotonic() - began < 5
    for url in ("file:///etc/passwd", "http://", "http://a:b@c/", "gopher://x", "http://x/\n", f"http://x/{'y' * 3000}", "http://[::1"):
        with pytest.raises(UserError, match="cannot be used"):
            fetch.fetch(url, reach, "image")
    with pytest.raises(UserError, match="private network"):
        fetch.fetch(f"{site.url}/larger", Reach(), "image")
    for number in ("2130706433", "0x7f.1", "0177.0.0.1"):  # other spellings of 127.0.0.1
        with pytest.raises(UserError, match="private network|unknown"):
            fetch.fetch(f"http://{number}:{site.server_port}/larger", Reach(), "image")


def test_a_name_is_resolved_once_and_every_address_of_it_counts(site, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def answers(*addresses: list[str]) -> Callable:
        turns = iter(addresses)

        def look_up(host: str, port: int, **_: Any) -> list:
            asked.append(host)
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in next(turns)]

        return look_up

    site.pages["/x"] = (200, {}, b"right")
    real = socket.getaddrinfo
    patched: list[Any] = [None]
    monkeypatch.setattr(
        fetch.socket,
        "getaddrinfo",
        lambda host, port, *a, **k: patched[0](host, port, **k) if host.endswith(".test") else real(host, port, *a, **k),
    )
    patched[0] = answers(["8.8.8.8", "127.0.0.1"])
    with pytest.raises(UserError, match="private network"):
        fetch.fetch(f"http://mixed.test:{site.server_port}/x", Reach(), "image")
    patched[0] = answers(["127.0.0.1"], ["8.8.8.8"])
    assert fetch.fetch(f"http://rebound.test:{site.server_port}/x", Reach(True), "image").data == b"right"
    assert asked.count("rebound.test") == 1, "the connection went to the address that was checked"
    site.pages["/on"] = (302, {"Location": f"http://inside.test:{site.server_port}/x"}, b"")
    patched[0] = answers(["10.0.0.1"])
    monkeypatch.setattr(fetch, "is_public", lambda address: address == "127.0.0.1")
    with pytest.raises(UserError, match="inside.test' is in a private network"):
        fetch.fetch(f"{site.url}/on", Reach(), "image")


def test_callbacks_are_signed_repeated_and_in_order(site, start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callbacks, "FIRST_WAIT", 0.05)
    site.replies[:] = [500, 500]
    client = start()
    name = client.make("text2video", SHORT | {"callback_url": f"{site.url}/hook"})["task_id"]
    made = client.wait("text2video", name)
    while len(site.posts) < 5:
        time.sleep(0.02)
    bodies = [json.loads(body) for _, body in site.posts]
    assert [body["task_status"] for body in bodies] == ["submitted", "submitted", "submitted", "processing", "succeed"]
    assert bodies[-1] == made | {"updated_at": bodies[-1]["updated_at"]} and "task_result" not in bodies[0]
    ids = [headers["webhook-id"] for headers, _ in site.posts]
    assert len(set(ids[:3])) == 1 and len(set(ids)) == 3, "the same id at every try"
    for headers, body in site.posts:
        text = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.{body}".encode()
        right = base64.b64encode(hmac.new(KEYS["anna"].encode(), text, hashlib.sha256).digest()).decode()
        assert headers["webhook-signature"] == f"v1,{right}"
    seen: set[str] = set()
    headers, body = site.posts[-1]
    callbacks.verify(KEYS["anna"], headers, body, seen)
    old = callbacks.sign(KEYS["anna"], "x", int(time.time()) - 1000, body)
    for secret, head, text, known, words in (
        (KEYS["anna"], headers, body, seen, "before"),
        (KEYS["anna"], old, body, set(), "old"),
        (KEYS["ben"], headers, body, set(), "wrong"),
        (KEYS["anna"], headers, body + " ", set(), "wrong"),
    ):
        with pytest.raises(ValueError, match=words):
            callbacks.verify(secret, head, text, known)


def test_callbacks_never_reach_private_addresses(site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callbacks, "TRIES", 2)
    monkeypatch.setattr(callbacks, "FIRST_WAIT", 0.01)
    store, told = Store(tmp_path), []
    store.add(new(callback=f"{site.url}/hook"))
    sender = callbacks.Sender(store, lambda task, status: "{}", lambda key: "x", Reach(), told.append)
    sender.start()
    while told != ["failed", "given up"]:
        time.sleep(0.01)
    sender.stop()
    assert site.posts == [] and store.owed(set())[0] is None


def test_what_is_owed_outlives_a_kill(site, tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.add(new(callback=f"{site.url}/hook"))
    store.finish(store.claim(60), "made/none", {})
    store._db.close()
    sender = callbacks.Sender(Store(tmp_path), lambda task, status: status, lambda key: "x", Reach(True), lambda outcome: None)
    sender.start()
    while len(site.posts) < 3:
        time.sleep(0.01)
    sender.stop()
    assert [body for _, body in site.posts] == ["submitted", "processing", "succeed"]
