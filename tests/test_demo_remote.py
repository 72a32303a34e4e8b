"""kling-demo --server: what answers there may be something else, of another version, locked, slow, or gone in the middle of a video."""

from __future__ import annotations

import json
import shutil
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from kling_programs.sample.studio import remote
from kling_programs.sample.studio.remote import Remote

from kling import Request
from kling.errors import UserError

PIPE = SimpleNamespace(config={"capabilities": ["text"], "fps": 8})
GOOD = {"data": {"capabilities": ["text"], "fps": 8}}
TASK = {"data": {"task_id": "1", "task_status": "processing", "step": 1, "steps": 4}}
Answer = tuple[int, dict[str, str], Any]  # status, headers, and a body: text, or what becomes JSON


@pytest.fixture
def serve() -> Iterator[Callable[..., ThreadingHTTPServer]]:
    """Starts servers that give these answers one after the other, and the last of them for ever; None closes the connection."""
    servers = []

    def start(*answers: Answer | None) -> ThreadingHTTPServer:
        left = list(answers)

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                self.rfile.read(int(self.headers.get("content-length", 0)))
                given = left.pop(0) if len(left) > 1 else left[0]
                if given is None:
                    self.close_connection = True
                    return
                status, headers, body = given
                data = (body if isinstance(body, str) else json.dumps(body)).encode()
                self.send_response(status)
                for name, value in ({"content-type": "text/html" if isinstance(body, str) else "application/json"} | headers).items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_DELETE = answer  # noqa: N815

            def log_message(self, *_: object) -> None:
                pass

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, args=(0.02,), daemon=True).start()
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def url(server: ThreadingHTTPServer) -> str:
    return f"http://127.0.0.1:{server.server_port}"


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((200, {}, "<html>hello</html>"), "status 200, as no kling-serve does"),
        ((200, {}, [1, 2]), "as no kling-serve does"),
        ((200, {}, {"data": None}), "answers otherwise than kling-serve of this version"),
        ((200, {}, {"data": {"fps": 8}}), "'capabilities'.*update it"),
        ((200, {}, {"data": {"capabilities": ["text", "image"], "fps": 8}}), r"capabilities \['text', 'image'\], this one has \['text'\]"),
        ((200, {}, {"data": {"capabilities": ["text"], "fps": 24}}), "fps 24, this one has 8: give the same --model"),
        ((401, {}, {"message": "Authorization is empty"}), "Authorization is empty .*KLING_SERVER_KEY"),
        ((404, {}, "nothing here"), "status 404, as no kling-serve does: check the address"),
        ((308, {"location": "https://elsewhere/"}, ""), "leads to https://elsewhere/: give that address"),
        ((502, {}, "bad gateway"), r"does not answer \(status 502\)"),
        ((503, {}, {"message": "the disk is full"}), "the disk is full"),
        (None, "does not answer"),
    ],
)
def test_what_is_no_server_of_ours_is_told(answer: Answer | None, said: str, serve: Callable) -> None:
    with pytest.raises(UserError, match=said):
        Remote(url(serve(answer))).check(PIPE)


def test_a_server_that_never_answers_is_given_up(serve: Callable) -> None:
    server = serve((200, {"content-length": "1000"}, ""))  # promises more than it sends
    there = Remote(url(server))
    there.http.timeout = httpx.Timeout(0.2)
    with pytest.raises(UserError, match="does not answer"):
        there.check(PIPE)


def test_a_server_that_dies_in_the_middle_is_waited_for_and_then_given_up(serve: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "LOOK", 0.01)
    monkeypatch.setattr(remote, "SILENT", 0.1)
    told: list[tuple[int, int]] = []
    with pytest.raises(UserError, match="does not answer"):
        Remote(url(serve((200, {}, TASK), None))).make(Request("x"), told.append)
    assert len(told) > 1 and set(told) == {(1, 4)}
    done = {
        "data": {"task_id": "1", "task_status": "succeed", "task_result": {"videos": [{"url": "/files/a.mp4", "record": "/files/a.json"}]}}
    }
    starts_again = serve((200, {}, TASK), None, (502, {}, "bad gateway"), (200, {}, done), (200, {}, "video"), (200, {}, {"seed": 1}))
    assert Remote(url(starts_again)).make(Request("x"), told.append) == ("mp4", b"video", {"seed": 1})


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        (({"data": {"id": 1}},), "answers otherwise"),
        (({"data": {"task_id": "1", "task_status": "failed"}},), "answers otherwise"),
        (({"data": {"task_id": "1", "task_status": "failed", "task_status_msg": "no memory"}},), "no memory"),
        (({"data": {"task_id": "1", "task_status": "succeed", "task_result": {"videos": []}}},), "answers otherwise"),
    ],
)
def test_odd_answers_about_a_video_are_one_line(answers: tuple[Any, ...], said: str, serve: Callable) -> None:
    with pytest.raises(UserError, match=said):
        Remote(url(serve(*((200, {}, body) for body in answers)))).make(Request("x"), lambda at: None)


def test_a_video_that_is_gone_is_told(serve: Callable) -> None:
    done = {"data": {"task_id": "1", "task_status": "succeed", "task_result": {"videos": [{"url": "/files/a.mp4", "record": "r"}]}}}
    with pytest.raises(UserError, match="does not give the video that it made .status 404."):
        Remote(url(serve((200, {}, done), (404, {}, "gone")))).make(Request("x"), lambda at: None)


def test_a_key_that_no_header_holds_is_told() -> None:
    with pytest.raises(UserError, match="KLING_SERVER_KEY"):
        Remote("http://127.0.0.1:1", "schlüssel")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl")
def test_a_certificate_of_its_own_is_told_and_can_be_trusted(serve: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=kling"]
    made += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(made, check=True, capture_output=True)
    server = serve((200, {}, GOOD))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    address = url(server).replace("http:", "https:")
    with pytest.raises(UserError, match="a certificate that is not trusted here: set SSL_CERT_FILE to it"):
        Remote(address).check(PIPE)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    Remote(address).check(PIPE)
