"""What clients, disks and operators get wrong: `kling-serve` answers in one line that names it, and goes on."""

from __future__ import annotations

import base64
import hashlib
import hmac
import io
import json
import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("jwt")
pytest.importorskip("prometheus_client")

import jwt
from kling_programs.sample.server import callbacks, classic, fetch, newer, openai, own
from kling_programs.sample.server.app import Figures, Server, build
from kling_programs.sample.server.desk import Desk, Rules
from kling_programs.sample.server.fetch import Reach
from kling_programs.sample.server.keys import Keys
from kling_programs.sample.server.pool import Pool
from kling_programs.sample.server.store import DONE, RUNNING, WAITING, Limits, Store
from PIL import Image
from serving import KEYS, new, png
from starlette.testclient import TestClient
from test_pipeline import tiny_pipeline

from kling.errors import UserError

pytest_plugins = ["serving"]

WAYS = ("/v1/videos/text2video", "/v1/videos/image2video", "/text-to-video/kling-v3", "/v1/videos", "/v1/requests")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained for everything, so that no field is refused for that alone."""
    folder = tmp_path_factory.mktemp("mistakes") / "model"
    tiny_pipeline(max_frames=41).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ask(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., tuple[int, Any]]]:
    """ask(method, path, body, **headers) -> (status, JSON) of a server without workers; `ask.store` is its store."""
    client = server_of(model, tmp_path_factory.mktemp("asked"))

    def run(method: str, path: str, body: Any = None, **headers: Any) -> tuple[int, Any]:
        data = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
        head = {"Authorization": f"Bearer {KEYS['anna']}", "Content-Type": "application/json"} | headers
        reply = client.request(method, path, content=data, headers=head)
        return reply.status_code, reply.json() if "json" in reply.headers.get("content-type", "") else reply.text

    run.store = client.store
    yield run


def server_of(model: Path, folder: Path, keys: dict[str, str] = KEYS) -> TestClient:
    store = Store(folder, Limits(places=100_000, rate=100_000))
    figures = Figures(store)
    server = Server(store, Desk(store, str(model), Rules()), Keys(keys), Pool(store, 0, lambda slot: None, figures.told), figures)

    @asynccontextmanager
    async def lifespan():
        yield

    app = build(server, None if keys else {"localhost"}, lifespan)
    client = TestClient(app, raise_server_exceptions=False, base_url="http://127.0.0.1")
    client.store = store
    return client


def body_of(path: str, **fields: Any) -> dict[str, Any]:
    """A right body of a wire, with some fields of it changed."""
    if path == "/v1/requests":
        return {"request": {"prompt": "x", "num_frames": 5} | fields}
    if path == "/v1/videos/image2video":
        return {"image": png(64, 48), "duration": "2"} | fields
    return {"prompt": "x"} | ({"settings": fields} if path.startswith("/text-to-video") and fields else fields)


def refused(answer: tuple[int, Any], *words: str, status: int = 400) -> None:
    """One line, with these words."""
    got, said = answer
    assert got == status and isinstance(said, dict) and said["code"] and said["request_id"], (got, str(said)[:300])
    assert "\n" not in said["message"] and len(said["message"]) <= 1001
    assert all(word in said["message"] for word in words), said["message"]


# -------------------------------------------------------------------------------------------------------------------------------- bodies


@pytest.mark.parametrize("path", WAYS)
def test_half_a_character_is_refused(ask, path: str) -> None:
    half = body_of(path, prompt="\ud800") if path == "/v1/requests" else body_of(path) | {"prompt": "\ud800"}
    refused(ask("POST", path, half), "half a character" if path in WAYS[3:] else "prompt")
    refused(ask("POST", path, body_of(path, solver="\ud800")), "half a character")
    refused(ask("POST", path, body_of(path) | {"\ud800": 1}), "\\ud800")


@pytest.mark.parametrize("path", WAYS)
def test_numbers_without_end_are_refused(ask, path: str) -> None:
    length = "seconds" if path == "/v1/videos" else "duration"
    huge = 10**400
    for name in (length, "seed", "num_frames", "shift", "guidance_scale", "num_inference_steps"):
        body = body_of(path, **{name: huge}) if path != WAYS[4] or name != "duration" else {"request": {"prompt": "x", name: huge}}
        refused(ask("POST", path, body), name.removeprefix("num_"))
        text = json.dumps(body).replace(str(huge), "Infinity").encode()
        status, said = ask("POST", path, text)
        assert status == 400 and name.removeprefix("num_") in said["message"], said


def test_null_says_nothing(ask) -> None:
    """Some clients send null for what they leave out."""
    for path, shape in (("/v1/videos/text2video", classic.Text2Video), ("/v1/videos/image2video", classic.Image2Video)):
        nulls = dict.fromkeys(shape.model_fields)
        status, said = ask("POST", path, nulls | body_of(path) | {"camera_control": {"type": "simple", "config": {"pan": 5, "roll": None}}})
        assert status == 200, said
        assert ask.store.get("anna", said["data"]["task_id"]).request["camera"] == {"pan": 5.0}
    status, said = ask("POST", "/text-to-video/kling-v3", {"prompt": "x", "settings": dict.fromkeys(newer.Settings.model_fields)})
    assert status == 200, said
    refused(ask("POST", "/v1/videos/text2video", {"prompt": "x", "seeed": None}), "seeed", "seed")
    refused(ask("POST", "/v1/videos/text2video", {"prompt": "x", "camera_control": {"type": "simple", "config": {"spin": None}}}), "spin")


def test_a_number_without_end_inside_of_a_field_is_refused(ask) -> None:
    for value in (10**400, -(10**400)):
        camera = {"type": "simple", "config": {"pan": value}}
        refused(ask("POST", "/v1/videos/text2video", {"prompt": "x", "camera_control": camera}))
        refused(ask("POST", "/v1/requests", {"request": {"prompt": "x", "camera": {"pan": value}}}))
        refused(ask("POST", "/v1/requests", {"request": {"prompt": "x", "keyframes": [["a", 4, value]]}, "files": {"a": png()}}))
        refused(ask("POST", "/v1/requests", {"request": {"image": "a", "tracks": [{"points": [[value, 1]]}]}, "files": {"a": png()}}))


def test_a_fraction_is_no_whole_number(ask) -> None:
    for name in openai.WHOLE:
        refused(ask("POST", "/v1/videos", {"prompt": "x", name: 5.5}), name, "5.5", "whole number")


def test_work_without_end_is_refused(ask) -> None:
    refused(ask("POST", "/v1/videos/text2video", {"prompt": "x", "num_inference_steps": 10**9}), "num_inference_steps", "steps")


def test_what_is_echoed_is_one_line_with_an_end(ask) -> None:
    refused(ask("POST", "/v1/videos/text2video", {"prompt": "x", "aspect_ratio": "a\nb\r\u2028c"}), "'a b")
    refused(ask("POST", "/v1/videos/text2video", {"prompt": "x", "size": "9" * 100_000}), "999…9", "WIDTHxHEIGHT")


WRONG = (None, True, -1, 1.5, 1e308, "", "x", "\x00", [], [[1]], {}, {"a": 1}, [None], ["x"])


def places(value: Any, at: tuple = ()) -> Iterator[tuple]:
    """The ways to everything inside of a JSON value."""
    for name, part in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*at, name)
        yield from places(part, (*at, name))


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_no_type_of_any_field_breaks_the_server(ask) -> None:
    """Every field of every wire, and everything inside of one, with values of every type: taken, or refused in one line."""
    picture = png(64, 48)
    drawn = {"dynamic_masks": [{"mask": picture, "trajectories": [{"x": 1, "y": 1}, {"x": 9, "y": 9}]}], "static_mask": picture}
    told = {"multi_shot": True, "multi_prompt": [{"index": 1, "prompt": "x", "duration": "3"}]}
    moved = {"prompt": "x", "camera_control": {"type": "simple", "config": {"pan": 1}}, "watermark_info": {"enabled": False}}
    strokes = {"image": "a.png", "tracks": [{"mask": "a.png", "points": [[1, 1], [9, 9]]}]}
    keys = {"prompt": "x", "keyframes": [["a.png", 4, 1.0]], "guidance_interval": [0.1, 0.9], "references": ["a.png"]}
    shots = {"shots": [{"prompt": "x", "seconds": 2, "camera": {"pan": 1}}]}
    bodies: list[tuple[str, dict, tuple]] = [  # the body, and names of fields beside those in it
        *((f"/v1/videos/{kind}", body_of(f"/v1/videos/{kind}"), tuple(shape.model_fields)) for kind, shape in classic.BODIES.items()),
        ("/v1/videos/image2video", body_of("/v1/videos/image2video") | drawn, ()),
        ("/v1/videos/text2video", told, ()),
        ("/v1/videos/text2video", moved, ()),
        ("/v1/videos/multi-image2video", {"prompt": "x", "image_list": [{"image": picture}]}, ()),
        ("/text-to-video/kling-v3", {"settings": dict.fromkeys(newer.Settings.model_fields)}, tuple(newer.Body.model_fields)),
        ("/image-to-video/kling-v3", {"contents": [{"type": "first_frame", "url": picture, "text": ""}], "options": {}}, ()),
        ("/v1/videos", {"prompt": "x", "input_reference": {"image_url": picture}}, openai.OWN),
        ("/v1/requests", {"request": {"prompt": "x"} | dict.fromkeys(own.FIELDS)}, tuple(own.Body.model_fields)),
        *(("/v1/requests", {"request": fields, "files": {"a.png": picture}}, ()) for fields in (strokes, keys)),
        ("/v1/requests", {"request": shots}, ()),
    ]
    for path, body, names in bodies:
        for place in (*places(body), *((name,) for name in names)):
            for value in WRONG:
                changed = json.loads(json.dumps(body))
                inside = changed
                for part in place[:-1]:
                    inside = inside[part]
                inside[place[-1]] = value
                status, said = ask("POST", path, changed)
                assert status == 200 or (status in (400, 404) and "\n" not in said["message"]), (path, place, value, said)


def test_methods_lists_and_addresses(ask) -> None:
    for query in ("pageNum=-1", "pageNum=1000000000", "pageNum=x", "pageSize=0", "pageSize=99999999999999999999999"):
        refused(ask("GET", f"/v1/videos/text2video?{query}"), query.partition("=")[0])
    for query in ("limit=0", "limit=101", "limit=1e3", "order=asc"):
        refused(ask("GET", f"/v1/videos?{query}"), query.partition("=")[0])
    for path in (
        "v1/videos?after=x",
        "v1/videos/text2video/%00",
        "v1/videos/%ff%fe",
        "files/..%2f..%2fetc%2fpasswd",
        "files/x.mp4",
        "v1/x?%ff",
    ):
        assert ask("GET", f"/{path}")[0] == 404, path
    refused(ask("GET", "/tasks"), "0 ids")
    refused(ask("GET", f"/tasks?task_ids={','.join('x' * 101)}"), "101 ids")
    assert ask("POST", "/v1/videos/text2video", b'{"prompt": "x"}', **{"Content-Type": "text/plain"})[0] == 400
    assert ask("POST", "/v1/videos", b"x", **{"Content-Type": "multipart/form-data"})[0] == 400
    body = form({"prompt": b"x", "solver": b"\x89PNG"}, "solver")
    refused(ask("POST", "/v1/videos", body, **{"Content-Type": "multipart/form-data; boundary=B"}), "solver", "give text")


def form(fields: dict[str, bytes], *files: str) -> bytes:
    """A form, in which some fields are files."""
    named = ((name, f'; filename="{name}.png"' if name in files else "", data) for name, data in fields.items())
    parts = [b'--B\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n' % (n.encode(), f.encode(), d) for n, f, d in named]
    return b"".join(parts) + b"--B--\r\n"


# ------------------------------------------------------------------------------------------------------------------------------ pictures


def as_file(kind: str, size: tuple[int, int] = (320, 320), mode: str = "RGB", **more: Any) -> bytes:
    out = io.BytesIO()
    Image.new(mode, size, 0).save(out, kind, **more)
    return out.getvalue()


def test_pictures_of_every_kind(ask) -> None:
    """PNG and JPEG of any colours, plain or as a data URL, also a phone's JPEG with a second picture in it; nothing else, no half ones."""
    two = as_file("MPO", save_all=True, append_images=[Image.new("RGB", (320, 320))])
    assert Image.open(io.BytesIO(two)).format == "MPO"
    good = [two, as_file("JPEG", mode="CMYK"), as_file("PNG", mode="I;16"), as_file("PNG", mode="LA"), as_file("PNG", mode="1")]
    for data in good:
        text = base64.b64encode(data).decode()
        for given in (text, f"data:image/png;base64,{text}", text[:80] + "\n" + text[80:]):
            status, said = ask("POST", "/v1/videos/image2video", {"image": given, "duration": "2"})
            assert status == 200, said
    several = as_file("PNG", save_all=True, append_images=[Image.new("RGB", (320, 320), 9)])
    bad = [as_file(kind) for kind in ("GIF", "WEBP", "BMP", "TIFF")]
    for data in (*bad, several, good[1][:300], b"<svg/>", b"", b"ffconcat version 1.0\nfile /etc/passwd"):
        refused(ask("POST", "/v1/videos/image2video", {"image": base64.b64encode(data).decode() or "data:,", "duration": "2"}), "image")
    for given in ("data:image/png;base64", "data:", "====", "é", "http:/x", "file:///etc/passwd", "/etc/passwd", "HTTP://127.0.0.1/x.png"):
        refused(ask("POST", "/v1/videos/image2video", {"image": given, "duration": "2"}), "image")
    refused(ask("POST", "/v1/videos/image2video", {"image": "HTTP://127.0.0.1/x.png"}), "private network")


def test_a_message_names_no_path_of_the_server(ask) -> None:
    for data in (b"ffconcat version 1.0\nfile /etc/passwd", b"#EXTM3U\n/etc/passwd", as_file("PNG"), b""):
        body = {"request": {"prompt": "x", "video": "a.mp4"}, "files": {"a.mp4": base64.b64encode(data).decode()}}
        status, said = ask("POST", "/v1/requests", body)
        assert status == 400 and "video" in said["message"] and str(ask.store.folder) not in said["message"], said


# --------------------------------------------------------------------------------------------------------------------------- who it may be


def token(payload: bytes | dict[str, Any], header: dict[str, Any] | None = None, secret: str = KEYS["anna"]) -> str:
    """A JWT signed by hand: a library would refuse to write most of these."""
    part = lambda data: base64.urlsafe_b64encode(data if isinstance(data, bytes) else json.dumps(data).encode()).rstrip(b"=")  # noqa: E731
    text = part(header or {"alg": "HS256", "typ": "JWT"}) + b"." + part(payload)
    return (text + b"." + part(hmac.new(secret.encode(), text, hashlib.sha256).digest())).decode()


def test_tokens_with_odd_claims(ask) -> None:
    now = int(time.time())
    right = {"iss": "anna", "exp": now + 1800, "nbf": now - 5}
    assert ask("GET", "/v1/videos", Authorization=f"Bearer {token(right)}")[0] == 200
    wrong: list[str] = [token(right | {"exp": value}) for value in (None, "soon", [], {}, True, 1e400, -(10**400), float("nan"))]
    wrong += [token(right | {"nbf": value}) for value in (now + 10**9, None, "x", [], 1e400)]
    wrong += [token(right | {"iss": value}) for value in (None, [], {}, 5, ["anna"], "", "ANNA", "anna\x00")]
    wrong += [token(right | {"aud": value}) for value in (["kling"], "kling", [5])]
    wrong += [token({"exp": now + 60}), token({"iss": "anna"}), token(b"[]"), token(b"{"), token(b"\xff"), token(b'{"a":' + b"[" * 20_000)]
    wrong += [token(right, {"alg": alg, "typ": "JWT"}) for alg in ("none", "None", "HS512", "RS256", "", None, [], 5)]
    wrong += [token(right, {"alg": "HS256", "crit": ["x"], "x": 1}), token(right, {"alg": "HS256", "b64": False, "crit": ["b64"]})]
    wrong += ["..", "a.b.", "é.é.é", jwt.encode(right, KEYS["anna"], "HS512"), token(right).rpartition(".")[0] + "."]
    for one in wrong:
        status, said = ask("GET", "/v1/videos", Authorization=f"Bearer {one}".encode())
        assert status == 401 and 1000 <= said["code"] <= 1004 and "\n" not in said["message"], (one[:200], said)


def test_hosts_that_are_no_hosts(model: Path, tmp_path: Path) -> None:
    client = server_of(model, tmp_path, {})
    for host in ("[::1", "", "a b", "127.0.0.1@evil.example", "evil.example:80", "[::ffff:8.8.8.8]", "127.0.0.1.evil.example"):
        reply = client.get("/v1/videos", headers={"Host": host})
        assert reply.status_code == 403 and reply.json()["code"] == 1103, (host, reply.text)
    for origin in ("null", "http://[::1", "https://evil.example", "x", ""):
        assert client.get("/v1/videos", headers={"Origin": origin}).status_code == 403, origin
    for host in ("127.0.0.1:8000", "localhost.", "[::1]:80", "LOCALHOST"):
        assert client.get("/v1/videos", headers={"Host": host, "Origin": f"http://{host}"}).status_code == 200, host


def test_a_callback_to_a_private_address_is_refused_at_once(ask) -> None:
    hosts = "127.0.0.1 2130706433 0x7f000001 0177.0.0.1 127.1 0 169.254.169.254 [::1] [::ffff:127.0.0.1] [::ffff:7f00:1] [64:ff9b::7f00:1]"
    for host in hosts.split():
        body = {"prompt": "x", "callback_url": f"http://{host}:8080/"}
        refused(ask("POST", "/v1/videos/text2video", body), "callback_url", "private network")


def test_a_callback_whose_name_leads_home_is_never_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callbacks, "TRIES", 1)
    real = fetch.socket.getaddrinfo
    monkeypatch.setattr(fetch.socket, "getaddrinfo", lambda host, *a, **k: real("127.0.0.1" if host == "home.test" else host, *a, **k))
    store, told = Store(tmp_path), []
    store.add(new(callback="http://home.test:1/hook"))
    monkeypatch.setattr(fetch._Pinned, "connect", lambda self: told.append("connected"))
    sender = callbacks.Sender(store, lambda task, status: "{}", lambda key: "x", Reach(), told.append)
    sender.start()
    while not told:
        time.sleep(0.01)
    sender.stop()
    assert told == ["given up"]


# --------------------------------------------------------------------------------------------------------------------- tasks and the disk


def test_one_external_name_asked_for_at_once_is_one_task(ask) -> None:
    found: list[Any] = []
    body = {"prompt": "x", "external_task_id": "at once"}
    threads = [threading.Thread(target=lambda: found.append(ask("POST", "/v1/videos/text2video", body))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {status for status, _ in found} == {200} and len({said["data"]["task_id"] for _, said in found}) == 1
    assert sum("already" in said["message"] for _, said in found) == 7


def test_a_task_that_ends_while_it_is_deleted_leaves_no_file(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.add(new())
    task = store.claim(60)
    (tmp_path / f"made/{task.claim}.mp4").write_bytes(b"video")
    assert store.finish(task, f"made/{task.claim}.mp4", {"kind": "mp4"})
    assert not store.cancel(task, "too late")
    store.remove(task, "deleted")  # as it was before its end
    assert list(store.made.iterdir()) == [] and store.get("anna", task.id).gone == "deleted"


def test_a_lease_that_nobody_renews_ends(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.add(new())
    lost = store.claim(-1)
    again = store.claim(60)
    assert store.claim(60) is None
    assert (again.id, again.lease) == (lost.id, 2) and not store.finish(lost, "made/none", {}) and store.finish(again, "made/none", {})


def test_a_full_disk_breaks_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path, Limits(places=10_000, rate=10_000))
    first, _ = store.add(new(external="first"))
    pages = store._db.execute("PRAGMA page_count").fetchone()[0]
    store._db.execute(f"PRAGMA max_page_count={pages + 1}")  # what SQLite says then is what it says on a full disk
    with pytest.raises(sqlite3.OperationalError, match="full"):
        for _ in range(1000):
            store.add(new())
    there = sum(store.counts().values())
    assert store.get("anna", "first").status == WAITING and store.claim(60).id == first.id and store.get("anna", first.id).status == RUNNING
    store._db.execute("PRAGMA max_page_count=100000")
    store.add(new())
    assert sum(store.counts().values()) == there + 1


def test_a_full_disk_is_no_client_s_mistake(ask, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def full(self: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with caplog.at_level(logging.CRITICAL):
        refused(ask("POST", "/v1/videos/image2video", {"image": png(64, 48, seed=77), "duration": "2"}), "server failed", status=500)
    monkeypatch.undo()
    assert not list(ask.store.inputs.glob("*.part"))


def test_a_callback_is_not_posted_in_a_loop_while_the_store_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, posted = Store(tmp_path), []
    store.add(new(callback="http://example.org/hook"))
    monkeypatch.setattr(callbacks, "fetch", lambda *_: posted.append(1) or fetch.Answer(200, "", b""))
    monkeypatch.setattr(store, "settle", lambda *_: (_ for _ in ()).throw(sqlite3.OperationalError("database or disk is full")))
    sender = callbacks.Sender(store, lambda task, status: "{}", lambda key: "x", Reach(), lambda outcome: None)
    sender.start()
    time.sleep(0.5)
    sender.stop()
    assert len(posted) == 1


def test_a_result_whose_file_was_deleted_is_told(ask) -> None:
    task, _ = ask.store.add(new())
    while (claimed := ask.store.claim(60)).id != task.id:
        pass
    ask.store.finish(claimed, f"made/{claimed.claim}.mp4", {"kind": "mp4", "seconds": 1})
    done = ask.store.get("anna", task.id)
    assert done.status == DONE
    for path in (f"/files/{done.token}.mp4", f"/files/{done.token}.json", f"/v1/videos/{task.id}/content"):
        refused(ask("GET", path), "deleted on the server", status=404)
    (ask.store.folder / done.file).write_bytes(b"0123456789")
    assert ask("HEAD", f"/files/{done.token}.mp4")[0] == 200


def test_stores_that_cannot_be_used(tmp_path: Path) -> None:
    """A folder or text in the place of the tables, tables with a damaged middle, a file where the folder should be: one line each."""
    (tmp_path / "a" / "tasks.sqlite").mkdir(parents=True)
    store = Store(tmp_path / "b", Limits(places=10_000, rate=10_000))
    for i in range(200):
        store.add(new(external=str(i) * 50))
    store.close()
    file = tmp_path / "b" / "tasks.sqlite"
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 3] + b"\xa5" * (len(data) // 3) + data[2 * len(data) // 3 :])
    (tmp_path / "c").write_text("a file")
    for name, words in (("a", "cannot be used"), ("b", "cannot be used"), ("c", "cannot be written")):
        with pytest.raises(UserError, match=words) as told:
            Store(tmp_path / name)
        assert "\n" not in str(told.value)
