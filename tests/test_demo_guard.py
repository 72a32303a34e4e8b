"""The guard of the page: bodies, uploads, names, passwords, and listeners. Over real sockets, with a real server."""

# ruff: noqa: F811 - arguments are fixtures

from __future__ import annotations

import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

pytest.importorskip("gradio")

from kling_programs.sample.studio import guard, jobs
from kling_programs.sample.studio.form import FIELDS
from kling_programs.sample.studio.guard import Door, Limits, own_names, read_accounts
from test_demo import png
from test_demo_page import Site, site  # noqa: F401 - a fixture
from test_generate import save_tiny

from kling.errors import UserError


def raw(site: Site, head: str, *pieces: bytes, pause: float = 0.0) -> int:
    """The status of a hand-written request; 0 if the connection was closed without one."""
    host, port = site.url.split("//")[1].strip("/").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(head.replace("\n", "\r\n").encode() + b"\r\n\r\n")
        try:
            for piece in pieces:
                connection.sendall(piece)
                time.sleep(pause)
        except OSError:
            pass
        try:
            line = connection.recv(4096)
        except OSError:
            return 0
    return int(line.split()[1]) if line else 0


# ----------------------------------------------------------------------------------------------------- what may be brought


def test_a_body_is_refused_by_its_stated_and_by_its_real_length(site):
    join = "POST /gradio_api/queue/join HTTP/1.1\nHost: 127.0.0.1\nContent-Type: application/json\n"
    assert raw(site, join + f"Content-Length: {400 * 2**20}") == 413  # before a byte of it
    megabyte = b"100000\r\n" + b" " * 2**20 + b"\r\n"
    assert raw(site, join + "Transfer-Encoding: chunked", *[megabyte] * 4) == 413  # of no stated length
    assert "100000 characters" in str(site.ask(*site.fields(prompt="x" * 100_000)))  # what comes through, the form refuses


def test_a_too_large_or_too_slow_upload_is_cut_off(site, monkeypatch):
    door = site.studio.door
    monkeypatch.setattr(door, "limits", Limits(file=2**20, seconds=1.0))
    upload = "POST /gradio_api/upload HTTP/1.1\nHost: 127.0.0.1\nContent-Type: multipart/form-data; boundary=b\n"
    first = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    assert raw(site, upload + "Content-Length: 4000000") == 413
    chunk = lambda data: f"{len(data):x}\r\n".encode() + data + b"\r\n"  # noqa: E731
    assert raw(site, upload + "Transfer-Encoding: chunked", chunk(first), *[chunk(b"x" * 2**19)] * 6) == 413
    began = time.perf_counter()
    assert raw(site, upload + "Content-Length: 50000", first, *[b"x"] * 6, pause=0.3) == 408
    assert time.perf_counter() - began < 10
    assert not door._bringing  # none is left under way


def test_uploads_are_limited_per_address_and_in_total(site, tmp_path, monkeypatch):
    door, picture = site.studio.door, png(tmp_path / "a.png", (300, 300))
    size = picture.stat().st_size
    monkeypatch.setattr(door, "_brought", {})
    monkeypatch.setattr(door, "limits", Limits(hourly=int(2.5 * size)))
    assert [site.upload(picture).status_code for _ in range(3)] == [200, 200, 429]
    tidied: list[int] = []
    monkeypatch.setattr(door, "limits", Limits(stored=size // 2))
    monkeypatch.setattr(door, "tidy", lambda: tidied.append(1))
    assert site.upload(picture).status_code == 507 and tidied
    monkeypatch.setattr(door, "limits", Limits(uploads=0))
    assert site.upload(picture).status_code == 429
    monkeypatch.setattr(door, "limits", Limits())
    assert site.upload(picture).status_code == 200


def test_an_address_in_a_payload_is_never_fetched(site):
    """For every event of the page and the API, with a URL wherever a file may be named."""
    asked: list[str] = []

    class Trap(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    trap = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Trap)
    threading.Thread(target=trap.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{trap.server_port}/x.png"
    try:
        for number, fn in site.page.fns.items():
            for payload in (url, {"path": url, "url": url, "orig_name": "x.png", "meta": {"_type": "gradio.FileData"}}):
                session = os.urandom(8).hex()
                body = {"data": [payload] * len(fn.inputs), "fn_index": number, "session_hash": session, "trigger_id": None}
                if site.http.post(f"{site.url}gradio_api/queue/join", json=body).status_code != 200:
                    continue
                text = site.http.get(f"{site.url}gradio_api/queue/data", params={"session_hash": session}).text
                assert "Traceback" not in text
    finally:
        trap.shutdown()
    assert not asked


@pytest.mark.slow
@pytest.mark.timeout(1800)  # a minute on an idle core
def test_numbers_out_of_range_never_fail_on_the_server(site, caplog, capfd):
    """Any input to any field of any event gives one line or nothing, never an error in the log."""
    odd = [1e300, 10**400, -1, 0.5, True, "7", [], {}, "\ud800"]
    for number, fn in site.page.fns.items():
        if fn.api_name == "generate" or not fn.inputs or fn.fn is None or fn.fn.__name__ in ("generate", "vary", "look", "sweep"):
            continue
        for value in odd:
            session = os.urandom(8).hex()
            body = {"data": [value] * len(fn.inputs), "fn_index": number, "session_hash": session}
            content = json.dumps(body, ensure_ascii=True)
            posted = site.http.post(f"{site.url}gradio_api/queue/join", content=content, headers={"content-type": "application/json"})
            assert posted.status_code < 500, (fn.fn.__name__, value)
            if posted.status_code == 200:
                site.http.get(f"{site.url}gradio_api/queue/data", params={"session_hash": session})
            said = capfd.readouterr().err
            if "Traceback" in said or any(record.levelname == "ERROR" for record in caplog.records):
                pytest.fail(f"{fn.fn.__name__} of {value!r}: {said[-1500:]} {caplog.text[-1500:]}")


def test_a_body_that_names_no_function_or_argument_of_the_page_is_refused_without_a_trace(site, capfd):
    """What Gradio itself would answer with status 500 and a traceback in the log."""
    odd = [
        ("queue/join", {"data": [], "session_hash": "a", "fn_index": 99_999}),
        ("queue/join", {"data": [], "session_hash": "a", "fn_index": -1}),
        ("run/predict", {"data": []}),
        ("run/nothing", {"data": []}),
        ("call/nothing", {"data": []}),
        ("call/v2/nothing", {}),
        ("call/v2/generate", {"promt": "a ball"}),
        ("call/v2/generate", []),
        ("call/generate", {"data": {}}),
        ("cancel", {"session_hash": [], "fn_index": {}, "event_id": 5}),
    ]
    for path, body in odd:
        reply = site.http.post(f"{site.url}gradio_api/{path}", json=body)
        assert 400 <= reply.status_code < 500 and "Traceback" not in reply.text, (path, body, reply.text)
    for text in (b"", b"{", b"\xff", b"[" * 100_000, b'{"data":' * 10_000):
        for path in ("queue/join", "call/generate", "run/predict"):
            reply = site.http.post(f"{site.url}gradio_api/{path}", content=text, headers={"content-type": "application/json"})
            assert 400 <= reply.status_code < 500, (path, text[:20])
    assert "Traceback" not in capfd.readouterr().err


def test_what_the_page_does_not_use_of_gradio_does_not_exist(site):
    part = {"video": ("a.mp4", b"x")}
    for path in ("process_recording", "component_server", "vibe-edit", "run-history/connect", "stream/x", "stream/x/close"):
        assert site.http.post(f"{site.url}gradio_api/{path}", files=part).status_code == 404, path
    for path in ("deep_link?session_hash=a", "proxy=http://127.0.0.1:1/x", "runs", "run-history/buckets", "vibe-code", "monitoring"):
        assert site.http.get(f"{site.url}gradio_api/{path}").status_code == 404, path
    assert site.http.get(f"{site.url}monitoring").status_code == 404 and site.http.get(f"{site.url}config").status_code == 200
    assert (
        site.http.get(f"{site.url}gradio_api/file=/srv/runs/monitoring/x.mp4").status_code == 403
    )  # a folder of such a name is another thing


def test_a_tab_of_an_earlier_start_is_told_so_and_leaves_no_trace(site, capfd):
    for path in ("queue/data?session_hash=gone", "call/generate/0123456789abcdef"):
        reply = site.http.get(f"{site.url}gradio_api/{path}")
        assert reply.status_code == 200 and "404: Not Found" in reply.text
    time.sleep(0.5)
    assert "Traceback" not in capfd.readouterr().err and not site.studio.door.listening


def test_drawings_count_as_uploads(site, monkeypatch):
    """They are stored, and come with any event of the page."""
    door = site.studio.door
    monkeypatch.setattr(door, "_brought", {})
    monkeypatch.setattr(door, "limits", Limits(hourly=200_000))
    body = {"data": ["x" * 80_000], "session_hash": "a", "fn_index": 99_999}
    assert [site.http.post(f"{site.url}gradio_api/queue/join", json=body).status_code for _ in range(3)] == [400, 400, 429]
    assert [len(sent) for sent in door._brought.values()] == [1]  # what comes soon after another is added to it


# --------------------------------------------------------------------------------------------------------------- who listens


def test_what_looks_inside_is_stopped_too_when_nobody_listens(site, monkeypatch):
    monkeypatch.setattr(jobs, "UNHEARD", 1.0)
    number, fn = next((number, fn) for number, fn in site.page.fns.items() if fn.fn is not None and fn.fn.__name__ == "look")
    values = {name: None for name in FIELDS} | {"prompt": "a ball", "num_inference_steps": 100, "duration": 20.0}
    body = {"data": [values[name] for name in FIELDS], "fn_index": number, "session_hash": "nobody"}
    assert site.http.post(f"{site.url}gradio_api/queue/join", json=body).status_code == 200  # and no GET
    deadline, ran = time.time() + 60, False
    while time.time() < deadline and not (ran and not site.studio.queue.running):
        ran = ran or site.studio.queue.running
        time.sleep(0.05)
    assert ran and not site.studio.queue.running


def test_a_request_that_nobody_listens_to_is_stopped(site, monkeypatch):
    monkeypatch.setattr(jobs, "UNHEARD", 1.0)
    asked = {"data": site.fields(num_inference_steps=100, duration=20.0)}
    for _ in range(2):
        site.http.post(f"{site.url}gradio_api/call/generate", json=asked)  # and no GET
    deadline, ran = time.time() + 20, False
    while time.time() < deadline and not (ran and not site.studio.queue.running and not site.studio.queue.waiting):
        ran = ran or site.studio.queue.running
        time.sleep(0.05)
    assert ran and not site.studio.queue.running and not site.studio.queue.waiting


def test_a_late_listener_learns_that_its_job_was_stopped(site, monkeypatch):
    monkeypatch.setattr(jobs, "UNHEARD", 0.5)
    posted = site.http.post(f"{site.url}gradio_api/call/generate", json={"data": site.fields(num_inference_steps=100, duration=20.0)})
    time.sleep(3)
    text = site.http.get(f"{site.url}gradio_api/call/generate/{posted.json()['event_id']}").text
    assert "event: error" in text and '"title": "stopped"' in text


def test_a_mistake_has_a_code(site):
    for bad, code in (
        ({"seed": "7"}, "not_a_number"),
        ({"duration": 1e9}, "out_of_range"),
        ({"image": {"path": "/etc/passwd"}}, "not_uploaded"),
    ):
        name, data = site.ask(*site.fields(**bad))[-1]
        assert name == "error" and data["title"] == code


def test_several_videos_come_from_one_request(site):
    name, (last,) = site.ask(*site.fields(seed=7, num_videos=3))[-1]
    assert name == "complete" and len(last["videos"]) == 3 and last["video"] == last["videos"][0]["video"]
    seeds = [json.loads(Path(one["record"]["path"]).read_text())["request"]["seed"] for one in last["videos"]]
    assert seeds == [7, 8, 9]
    alone = site.ask(*site.fields(seed=8))[-1][1][0]
    digest = lambda one: json.loads(Path(one["record"]["path"]).read_text())["frames"]["sha256"]  # noqa: E731
    assert digest(alone) == digest(last["videos"][1])


def test_a_video_is_served_in_other_formats(site):
    made = site.ask(*site.fields(seed=3))[-1][1][0]["video"]["url"]
    for kind, magic in (("gif", b"GIF8"), ("webm", b"\x1aE\xdf\xa3")):
        reply = site.http.get(made.replace(".mp4", f".{kind}"))
        assert reply.status_code == 200 and reply.content.startswith(magic)
    assert site.http.get(made.replace(".mp4", ".exe")).status_code in (403, 404)


# --------------------------------------------------------------------------------------------------------------------- names


def test_only_our_own_host_names_are_answered(site):
    def status(host: str, **headers: str) -> int:
        return site.http.get(site.url, headers={"host": host, **headers}).status_code

    for host in ("127.0.0.1:7860", "localhost:7860", "[::1]:7860", "10.1.2.3", socket.gethostname(), "LOCALHOST"):
        assert status(host) == 200, host
    for host in ("evil.example", "127.0.0.1.evil.example:7860", "localhost.evil.example", "evil.example:7860", "", "a@b"):
        assert status(host) == 403, host
    assert status("127.0.0.1", origin="http://127.0.0.1:9") == 200
    for origin in ("https://evil.example", "null", "x", "http://[", "https://evil.example/127.0.0.1"):
        assert status("127.0.0.1", origin=origin) == 403, origin
    for host in ("[", "[::1", "a]b", "@", "127.0.0.1@evil.example"):  # no name at all
        assert raw(site, f"GET / HTTP/1.1\nHost: {host}\nConnection: close") == 403, host
    assert "kling.example" in own_names(["Kling.Example"]) and Door(site.arrivals, own_names(["kling.example"])).knows("kling.example:443")


# ----------------------------------------------------------------------------------------------------------------- passwords


def test_accounts_come_from_a_file_or_the_environment_and_not_from_the_command_line(tmp_path, monkeypatch):
    file = tmp_path / "accounts"
    file.write_text("# who\nme:se:cret\n\nyou:other\n")
    assert read_accounts(str(file)) == [("me", "se:cret"), ("you", "other")]
    monkeypatch.setenv("KLING_DEMO_AUTH", "a:b")
    assert read_accounts(None) == [("a", "b")] and read_accounts(str(file))[0][0] == "me"
    monkeypatch.delenv("KLING_DEMO_AUTH")
    assert read_accounts(None) is None
    for text in ("", "me", "me:", ":secret", "me:x\nyou"):
        file.write_text(text)
        with pytest.raises(UserError, match="USER:PASSWORD"):
            read_accounts(str(file))
    with pytest.raises(UserError, match="everybody on this machine") as error:
        read_accounts("me:secret")
    assert "secret" not in str(error.value)


def test_wrong_passwords_are_delayed_and_then_locked_out(tmp_path, monkeypatch):
    monkeypatch.setattr(guard, "DELAY", 0.1)
    door = Door(tmp_path)
    delays = [door.tried(False, "x") for _ in range(5)]
    assert delays == [0.1, 0.2, 0.4, 0.8, 1.6]
    assert 290 < door.closed("x") <= 300 and door.closed("y") <= 0
    for _ in range(5):
        door.tried(False, "x")
    assert 590 < door.closed("x") <= 600
    door.tried(True, "x")
    assert door.closed("x") <= 0


@pytest.mark.slow
def test_the_program_with_accounts_and_tls(tmp_path):
    """kling-demo as a process: no password on its command line, https, a delay and a lock after wrong passwords."""
    save_tiny(tmp_path / "model", ["text"])
    (tmp_path / "accounts").write_text("me:secret\n")
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
    subprocess.run([*made, "-keyout", tmp_path / "key.pem", "-out", tmp_path / "cert.pem"], check=True, capture_output=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "kling_programs.sample.demo",
        "--model",
        str(tmp_path / "model"),
        "--device",
        "cpu",
        "--port",
        str(port),
    ]
    command += ["--auth", str(tmp_path / "accounts"), "--tls-cert", str(tmp_path / "cert.pem"), "--tls-key", str(tmp_path / "key.pem")]
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path / "out")], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path
    )
    try:
        told = []
        for line in process.stdout:
            told.append(line)
            if f"https://127.0.0.1:{port}" in line:
                break
        assert f"https://127.0.0.1:{port}" in told[-1], told
        assert b"secret" not in Path(f"/proc/{process.pid}/cmdline").read_bytes()
        url = f"https://127.0.0.1:{port}"
        with httpx.Client(verify=False, timeout=60) as client:  # noqa: S501 - our own certificate
            assert client.get(f"{url}/gradio_api/info").status_code == 401
            login = lambda word: client.post(f"{url}/login", data={"username": "me", "password": word})  # noqa: E731
            began = time.perf_counter()
            assert login("wrong").status_code == 400 and time.perf_counter() - began >= 0.5
            assert login("secret").status_code == 200 and client.get(f"{url}/gradio_api/info").status_code == 200
            client.cookies.clear()
            statuses: list[int] = []
            threads = [threading.Thread(target=lambda: statuses.append(login("wrong").status_code)) for _ in range(12)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
            assert statuses.count(400) == 5 and statuses.count(429) == 7  # at once, too
            assert login("secret").status_code == 429
    finally:
        process.terminate()
        process.wait(20)
        process.stdout.close()
