"""`kling-serve`: the three wires on a tiny random model, keys, the store, callbacks, what is fetched, and kills."""

from __future__ import annotations

import base64
import hashlib
import hmac
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import asynccontextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("jwt")
pytest.importorskip("prometheus_client")

import jwt
import uvicorn
from kling_programs.sample import serve
from kling_programs.sample.server import callbacks, fetch
from kling_programs.sample.server.app import Figures, Server, build
from kling_programs.sample.server.desk import Desk, Rules
from kling_programs.sample.server.fetch import Reach
from kling_programs.sample.server.keys import Keys, read_keys
from kling_programs.sample.server.pool import Pool, ProcessWorker
from kling_programs.sample.server.store import DONE, FAILED, RUNNING, WAITING, Limits, New, Refused, Store, located
from kling_programs.sample.server.wire import WireError
from kling_programs.sample.server.worker import Maker, Setup, outcome
from PIL import Image
from test_generate import save_tiny

from kling.data.video import read_video
from kling.errors import UserError
from kling.sampling.record import read_record

KEYS = {"anna": "a" * 32, "ben": "b" * 32}
HERE = Path(__file__).parent


# ------------------------------------------------------------------------------------------------------------- a running server


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny(folder, ["text", "image", "last", "first_last", "continuation", "camera"])
    return folder


@pytest.fixture(scope="session")
def maker(tiny: Path) -> Maker:
    return Maker(Setup(str(tiny), "cpu"))


class Here:
    """A worker in a thread of this process. `held`: while it is set, nothing is made."""

    def __init__(self, store: Store, maker: Any, held: threading.Event | None = None) -> None:
        self.store, self.maker, self.held = store, maker, held

    def ready(self) -> str:
        return "cpu"

    def make(self, task: Any) -> Iterator[dict]:
        while self.held is not None and self.held.is_set():
            time.sleep(0.01)
            yield {"step": 0, "of": 1}
        folder = self.store.folder
        job = {"request": located(folder, task.request), "output": str(folder / "made" / task.claim)}
        yield outcome(self.maker, job, lambda step, of: None)

    def stop(self, task: Any) -> None: ...

    def alive(self) -> bool:
        return True

    def close(self) -> None: ...


class Client:
    """Requests to a server, as one of its keys."""

    def __init__(self, url: str, key: str | None = "anna") -> None:
        self.url, self.key = url, key

    def __call__(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        import httpx

        if self.key is not None and "Authorization" not in headers:
            headers["Authorization"] = f"Bearer {KEYS[self.key]}"
        reply = httpx.request(method, self.url + path if path.startswith("/") else path, json=body, headers=headers, timeout=60)
        kind = reply.headers.get("content-type", "")
        return reply.status_code, reply.json() if kind.startswith("application/json") else reply.content

    def make(self, kind: str, body: dict, **headers: str) -> dict:
        """The data of a new task."""
        status, said = self("POST", f"/v1/videos/{kind}", body, **headers)
        assert (status, said["code"]) == (200, 0), said
        return said["data"]

    def wait(self, kind: str, name: str) -> dict:
        """The data of a task that has ended."""
        for _ in range(1200):
            status, said = self("GET", f"/v1/videos/{kind}/{name}")
            assert status == 200, said
            if said["data"]["task_status"] in (DONE, FAILED):
                return said["data"]
            time.sleep(0.05)
        raise AssertionError(f"{name} does not end: {said}")


@pytest.fixture
def start(tiny: Path, maker: Maker, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """start(keys, rules, limits, workers, held) -> a running server's `Client`, with its parts as attributes."""
    running = []

    def run(
        keys: dict | None = None, rules: Rules | None = None, limits: Limits | None = None, workers: int = 1, held: Any = None
    ) -> Client:
        folder = tmp_path / f"store{len(running)}"
        store = Store(folder, limits)
        desk = Desk(store, str(tiny), rules or Rules(private=True))
        figures, who = Figures(store), Keys(KEYS if keys is None else keys)
        crew = Pool(store, workers, lambda: Here(store, maker, held), figures.told)
        server = Server(store, desk, who, crew, figures)
        sender = callbacks.Sender(store, server.callback, lambda key: who.secrets.get(key, "x" * 32), Reach(True), figures.sent)

        @asynccontextmanager
        async def lifespan():
            crew.start()
            sender.start()
            yield
            sender.stop()

        port = serve.open_port("127.0.0.1", 0)
        app = build(server, None if who.secrets else {"localhost"}, lifespan)
        host = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=host.run, args=([port],), daemon=True)
        thread.start()
        client = Client(f"http://127.0.0.1:{port.getsockname()[1]}", None if keys == {} else "anna")
        client.store, client.server, client.pool = store, server, crew
        running.append((host, thread, crew))
        while not crew.ready or not host.started:
            time.sleep(0.01)
        return client

    yield run
    for host, thread, crew in running:
        if hasattr(crew, "held"):
            crew.held.clear()
        host.should_exit = True
        thread.join(10)
        crew._stopping.set()


def png(width: int = 320, height: int = 320, seed: int = 0) -> str:
    """A picture as base64."""
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).resize((width, height)).save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()


SHORT = {"prompt": "a red ball", "duration": "2", "seed": 5}


def test_a_task_of_the_classic_wire_from_creation_to_file(start) -> None:
    client = start()
    data = client.make("text2video", SHORT | {"external_task_id": "mine", "aspect_ratio": "1:1"})
    assert data["task_status"] == "submitted" and data["task_info"] == {"external_task_id": "mine"}
    assert abs(data["created_at"] / 1000 - time.time()) < 60
    done = client.wait("text2video", "mine")
    assert done["task_id"] == data["task_id"] and done["task_status"] == "succeed"
    (video,) = done["task_result"]["videos"]
    assert video["seed"] == 5 and float(video["duration"]) == 17 / 8
    assert video["url"].startswith(client.url + "/files/") and len(video["url"].rsplit("/", 1)[1]) > 40
    anybody = Client(client.url, None)
    status, file = anybody("GET", video["url"])
    assert status == 200 and file[4:8] == b"ftyp"
    _, part = anybody("GET", video["url"], Range="bytes=0-9")
    assert part == file[:10]
    status, record = anybody("GET", video["record"])
    assert record["request"]["prompt"] == "a red ball" and record["request"]["seed"] == 5
    path = client.store.folder / client.store.get("anna", "mine").file
    assert read_video(path).frames.shape == (17, 80, 80, 3) and read_record(f"{path}.json")["frames"]["shape"] == [17, 80, 80, 3]
    # the same under the prefix, in the list, and to nobody else
    assert client("GET", "/kling/v1/videos/text2video/mine")[1]["data"]["task_id"] == data["task_id"]
    assert [task["task_id"] for task in client("GET", "/v1/videos/text2video?pageSize=500")[1]["data"]] == [data["task_id"]]
    assert client("GET", "/v1/videos/text2video?pageNum=2")[1]["data"] == []
    assert client("GET", "/v1/videos/image2video/mine")[0] == 404
    ben = Client(client.url, "ben")
    assert ben("GET", "/v1/videos/text2video/mine")[1]["code"] == 1203
    assert ben("GET", "/v1/videos/text2video")[1]["data"] == []


def test_pictures_cameras_and_extension(start) -> None:
    client = start()
    picture = {"image": png(seed=1), "image_tail": png(seed=2), "camera_control": {"type": "simple", "config": {"pan": 5, "zoom": 2}}}
    made = client.wait("image2video", client.make("image2video", SHORT | picture)["task_id"])
    assert made["task_status"] == "succeed", made
    task = client.store.get("anna", made["task_id"])
    assert task.request["camera"] == {"pan": 5.0, "zoom": 2.0} and task.made["task"] == "first_last"
    assert (client.store.folder / task.request["image"]).read_bytes() == base64.b64decode(picture["image"])
    tail = client.wait("image2video", client.make("image2video", SHORT | {"image_tail": png()})["task_id"])
    assert client.store.get("anna", tail["task_id"]).made["task"] == "last"
    video = made["task_result"]["videos"][0]
    longer = client.make("video-extend", {"video_id": video["id"], "duration": "2"})
    assert longer["task_info"]["parent_video"] == video
    longer = client.wait("video-extend", longer["task_id"])
    assert float(longer["task_result"]["videos"][0]["duration"]) == (17 + 16) / 8
    again = client.store.get("anna", longer["task_id"])
    assert again.request["prompt"] == SHORT["prompt"]
    assert Client(client.url, "ben")("POST", "/v1/videos/video-extend", {"video_id": video["id"]})[1]["code"] == 1203


def test_one_seed_is_one_video_and_a_drawn_seed_is_told(start) -> None:
    client = start(workers=2)
    tasks = [client.make("text2video", SHORT | {"external_task_id": str(i)}) for i in range(2)]
    free = client.make("text2video", {"prompt": "a red ball", "duration": "2"})
    urls = [client.wait("text2video", task["task_id"])["task_result"]["videos"][0]["url"] for task in tasks]
    drawn = client.wait("text2video", free["task_id"])["task_result"]["videos"][0]
    first, second, other = (client("GET", url)[1] for url in (*urls, drawn["url"]))
    assert first == second != other and 0 <= drawn["seed"] < 2**31
    again = client.make("text2video", {"prompt": "a red ball", "duration": "2", "seed": drawn["seed"]})
    assert client("GET", client.wait("text2video", again["task_id"])["task_result"]["videos"][0]["url"])[1] == other


@pytest.mark.parametrize(
    ("kind", "body", "words"),
    [
        ("text2video", {"prompt": ""}, ["prompt"]),
        ("text2video", {"prompt": "x" * 2501}, ["prompt", "2500"]),
        ("text2video", {"prompt": "x", "aspect_ratio": "4:3"}, ["aspect_ratio", "4:3", "16:9"]),
        ("text2video", {"prompt": "x", "mode": "best"}, ["mode", "best", "std"]),
        ("text2video", {"prompt": "x", "mode": "fast"}, ["mode fast", "std"]),
        ("text2video", {"prompt": "x", "duration": "long"}, ["duration", "long"]),
        ("text2video", {"prompt": "x", "duration": "500"}, ["duration", "500", "180"]),
        ("text2video", {"prompt": "x", "duration": True}, ["duration"]),
        ("text2video", {"prompt": "x", "cfg_scale": 2}, ["cfg_scale", "2", "1"]),
        ("text2video", {"prompt": "x", "seed": -1}, ["seed", "-1"]),
        ("text2video", {"prompt": "x", "seeed": 1}, ["seeed", "seed"]),
        ("text2video", {"prompt": "x", "static_mask": "x"}, ["unknown field 'static_mask'", "prompt"]),
        ("text2video", {"prompt": "x", "model_name": "gpt"}, ["model_name", "gpt", "kling-v1"]),
        ("text2video", {"prompt": "x", "sound": "on"}, ["sound", "not trained"]),
        ("text2video", {"prompt": "x", "multi_shot": True}, ["multi_shot", "not trained"]),
        ("text2video", {"prompt": "x", "watermark_info": {"enabled": True}}, ["watermark"]),
        ("text2video", {"prompt": "x", "callback_url": "ftp://x"}, ["callback_url", "ftp"]),
        ("text2video", {"prompt": "x", "camera_control": {"type": "spin"}}, ["camera_control", "spin", "forward_up"]),
        ("text2video", {"prompt": "x", "camera_control": {"type": "simple", "config": {"pan": 11}}}, ["pan", "11", "10"]),
        ("text2video", {"prompt": "x", "loop": True, "num_frames": 6}, ["6 frames", "5 or 9"]),
        ("image2video", {"prompt": "x"}, ["image", "image_tail"]),
        ("image2video", {"image": "???"}, ["image", "base64"]),
        ("image2video", {"image": base64.b64encode(b"x" * 100).decode()}, ["image", "PNG"]),
        ("image2video", {"image_tail": "http://127.0.0.1:1/x.png"}, ["image_tail", "127.0.0.1"]),
        ("image2video", {"image": png(), "static_mask": "x"}, ["static_mask", "brush"]),
        ("multi-image2video", {"prompt": "x", "image_list": [{"image": "x"}]}, ["image_list", "reference", "not trained"]),
        ("video-extend", {}, ["video_id"]),
    ],
)  # fmt: skip
def test_what_the_model_cannot_do_is_refused_before_it_is_queued(refusing, kind: str, body: dict, words: list[str]) -> None:
    status, said = refusing("POST", f"/v1/videos/{kind}", body)
    assert (status, said["code"]) == (400, 1201) and "data" not in said and said["request_id"]
    assert all(word in said["message"] for word in words) and "\n" not in said["message"], said["message"]
    assert refusing.store.counts()[WAITING] == 0


@pytest.fixture(scope="module")
def refusing(tiny: Path, tmp_path_factory) -> Iterator[Client]:
    """A server that refuses everything needs no workers."""
    store = Store(tmp_path_factory.mktemp("refusing"))
    figures = Figures(store)
    crew = Pool(store, 0, lambda: None, figures.told)
    server = Server(store, Desk(store, str(tiny), Rules(private=True)), Keys(KEYS), crew, figures)

    @asynccontextmanager
    async def lifespan():
        yield

    port = serve.open_port("127.0.0.1", 0)
    host = uvicorn.Server(uvicorn.Config(build(server, None, lifespan), log_level="warning"))
    threading.Thread(target=host.run, args=([port],), daemon=True).start()
    client = Client(f"http://127.0.0.1:{port.getsockname()[1]}")
    client.store = store
    while not host.started:
        time.sleep(0.01)
    yield client
    host.should_exit = True


def test_methods_bodies_and_sizes_are_refused_in_one_line(refusing: Client) -> None:
    import httpx

    assert refusing("GET", "/v1/nothing")[1]["code"] == 1202
    assert refusing("PUT", "/v1/videos/text2video")[1]["code"] == 1202
    assert refusing("GET", "/v1/videos/text2video?pageNum=0")[1]["message"] == "pageNum 0: give 1 to 1000"
    assert refusing("GET", "/v1/videos/text2video?pageSize=501")[1]["code"] == 1201
    head = {"Authorization": f"Bearer {KEYS['anna']}", "Content-Type": "application/json"}
    for body in (b"{", b"[" * 100_000, b"[]", b"null", b'{"prompt": "x", "shift": NaN}'):
        reply = httpx.post(refusing.url + "/v1/videos/text2video", content=body, headers=head)
        assert reply.status_code == 400 and reply.json()["code"] in (1200, 1201), (body[:10], reply.text)
    large = json.dumps({"prompt": "x", "image": "A" * (33 * 2**20)}).encode()
    assert httpx.post(refusing.url + "/v1/videos/image2video", content=large, headers=head).status_code == 413
    assert httpx.post(refusing.url + "/v1/videos/image2video", content=iter([large]), headers=head).status_code == 413


def test_strict_mode_refuses_what_kling_refuses(tiny: Path, tmp_path: Path) -> None:
    from kling_programs.sample.server import classic

    desk = Desk(Store(tmp_path), str(tiny), Rules(strict=True))
    camera = {"type": "simple", "config": {"pan": 1, "zoom": 2}}
    for kind, body, words in (
        ("text2video", {"prompt": "x", "duration": "2"}, "'3' to '15'"),
        ("text2video", {"prompt": "x", "duration": 5}, "as text"),
        ("text2video", {"prompt": "x", "camera_control": camera}, "exactly one"),
        ("text2video", {"prompt": "x", "mode": "fast"}, "std, pro"),
        ("image2video", {"image_tail": png(), "camera_control": {"type": "forward_up"}}, "leave one of them out"),
        ("image2video", {"image": png(200, 400)}, "300 pixels"),
        ("image2video", {"image": png(300, 900)}, "2.5"),
        ("image2video", {"image": "data:image/png;base64," + png()}, "base64 alone"),
    ):
        with pytest.raises((UserError, WireError), match=words):
            desk.take("anna", classic.read(desk, kind, classic.BODIES[kind](**body), ""))
    task, _ = desk.take("anna", classic.read(desk, "image2video", classic.Image2Video(image=png(), duration="5"), ""))
    assert task.status == WAITING


def test_pan_and_tilt_follow_the_convention(tiny: Path, tmp_path: Path) -> None:
    from kling_programs.sample.server import classic

    body = classic.Text2Video(prompt="x", camera_control={"type": "simple", "config": {"pan": 5}})
    for year, axes in (("2024", {"pan": 5.0}), ("2025", {"tilt": 5.0})):
        desk = Desk(Store(tmp_path / year), str(tiny), Rules(convention=year))
        assert classic.read(desk, "text2video", body, "").fields["camera"] == axes
        assert desk.capabilities()["camera_control"]["convention"] == year


def test_cfg_scale_has_the_checkpoint_s_guidance_in_its_middle(tiny: Path, tmp_path: Path) -> None:
    desk = Desk(Store(tmp_path), str(tiny), Rules())
    own = desk.pipe.setting("guidance_scale")[0]
    assert desk.guidance(0.5) is None and desk.guidance(0.0) == 1.0 and desk.guidance(1.0) == pytest.approx(2 * own - 1)


def test_the_same_external_name_is_the_same_task(start) -> None:
    held = threading.Event()
    held.set()
    client = start(held=held)
    body = SHORT | {"external_task_id": "once"}
    first = client.make("text2video", body)
    status, again = client("POST", "/v1/videos/text2video", dict(reversed(body.items())))
    assert status == 200 and again["data"]["task_id"] == first["task_id"] and "already" in again["message"]
    status, other = client("POST", "/v1/videos/text2video", body | {"prompt": "a blue cube"})
    assert status == 400 and "once" in other["message"] and first["task_id"] in other["message"]
    assert Client(client.url, "ben").make("text2video", body)["task_id"] != first["task_id"]
    held.clear()


def test_cancel_ends_a_task_and_delete_a_result(start) -> None:
    held = threading.Event()
    held.set()
    client = start(held=held)
    running, waiting = (client.make("text2video", SHORT | {"seed": i})["task_id"] for i in (1, 2))
    while client.store.get("anna", running).status != RUNNING:
        time.sleep(0.01)
    for name in (running, waiting):
        status, said = client("DELETE", f"/v1/videos/text2video/{name}")
        assert status == 200 and said["data"]["task_status"] == "failed" and "cancelled" in said["data"]["task_status_msg"]
    held.clear()
    third = client.make("text2video", SHORT)["task_id"]
    video = client.wait("text2video", third)["task_result"]["videos"][0]
    assert client.wait("text2video", running)["task_status"] == "failed"
    assert client("DELETE", f"/v1/videos/text2video/{third}")[0] == 200
    status, said = client("GET", f"/v1/videos/text2video/{third}")
    assert (status, said["code"]) == (404, 1203) and "deleted by the client" in said["message"]
    status, said = client("GET", video["url"])
    assert status == 404 and "deleted by the client" in said["message"]
    assert client("POST", "/v1/videos/video-extend", {"video_id": video["id"]})[1]["code"] == 1203
    assert [path.name for path in client.store.made.iterdir()] == []


# -------------------------------------------------------------------------------------------------------------- the other wires


def test_the_newer_wire_tells_the_same_task(start) -> None:
    client = start()
    body = {
        "contents": [{"type": "prompt", "text": "a red ball"}, {"type": "first_frame", "url": png()}],
        "settings": {"duration": 2, "resolution": "720p", "audio": "off", "seed": 3},
        "options": {"external_task_id": "new"},
    }
    status, said = client("POST", "/image-to-video/kling-3.0", body)
    assert status == 200 and said["data"]["status"] == "submitted", said
    client.wait("image2video", "new")
    for query in (f"task_ids={said['data']['id']}", "external_task_ids=new"):
        (task,) = client("GET", f"/tasks?{query}")[1]["data"]
        assert task["status"] == "succeeded" and task["external_id"] == "new"
        assert task["outputs"][0]["type"] == "video" and client("GET", task["outputs"][0]["url"])[0] == 200
    for path, wrong, words in (
        ("/text-to-video/kling-3.0", body, "image-to-video"),
        ("/image-to-video/kling-3.0", {"prompt": "x"}, "first_frame"),
        ("/text-to-video/kling-3.0", {"prompt": "x", "settings": {"audio": "native"}}, "settings.audio"),
        ("/text-to-video/kling-3.0", {"prompt": "x", "settings": {"aspect_ratio": "5:4"}}, "settings.aspect_ratio"),
        ("/text-to-video/other", {"prompt": "x"}, "model 'other'"),
        ("/text-to-video/kling-3.0", {"prompt": "x", "settings": {"durations": 5}}, "did you mean 'duration'?"),
    ):
        status, said = client("POST", path, wrong)
        assert (status, said["code"]) == (400, 1201) and words in said["message"], said


def test_openai_s_own_client(start) -> None:
    openai = pytest.importorskip("openai")
    server = start()
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEYS["anna"], max_retries=0)
    video = client.videos.create(
        model="sora-2", prompt="a red ball", size="720x1280", seconds="4", extra_body={"seed": "7", "num_inference_steps": 1}
    )
    assert video.status in ("queued", "in_progress") and video.object == "video"
    video = client.videos.poll(video.id, poll_interval_ms=50)
    assert video.status == "completed" and video.size == "64x112" and video.progress == 100
    content = client.videos.download_content(video.id).read()
    assert content[4:8] == b"ftyp"
    picture = ("first.png", base64.b64decode(png(640, 360)), "image/png")
    second = client.videos.create_and_poll(prompt="a red ball", input_reference=picture, size="112x64", poll_interval_ms=50)
    assert server.store.get("anna", second.id).made["task"] == "image"
    assert [one.id for one in client.videos.list(limit=1).data] == [second.id]
    assert [one.id for one in client.videos.list()] == [second.id, video.id]
    assert client.videos.delete(video.id).deleted
    with pytest.raises(openai.NotFoundError, match="deleted by the client"):
        client.videos.retrieve(video.id)
    with pytest.raises(openai.BadRequestError, match="111x64"):
        client.videos.create(prompt="x", size="111x64")
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0).videos.list()


def test_health_metrics_capabilities_and_the_page(start) -> None:
    client = start()
    anybody = Client(client.url, None)
    assert anybody("GET", "/healthz") == (200, {"status": "ok", "workers": 1})
    status, said = client("GET", "/v1/capabilities")
    able = said["data"]
    assert able["endpoints"] == {"text2video": True, "image2video": True, "multi-image2video": False, "video-extend": True}
    assert able["fps"] == 8 and able["sizes"]["16:9"] == "112x64" and able["fields"]["camera_control"]
    client.wait("text2video", client.make("text2video", SHORT)["task_id"])
    text = client("GET", "/metrics")[1].decode()
    assert 'kling_tasks{status="succeed"} 1.0' in text and "kling_workers_ready 1.0" in text and "kling_made_seconds_count 1.0" in text
    assert anybody("GET", "/metrics")[1]["code"] == 1001 and anybody("GET", "/docs")[0] == 200
    paths = anybody("GET", "/openapi.json")[1]["paths"]
    assert {"/v1/videos/text2video", "/v1/videos", "/text-to-video/{model}", "/tasks"} <= set(paths)
    client.pool.ready.clear()
    assert anybody("GET", "/healthz")[0] == 503


# ------------------------------------------------------------------------------------------------------------------------ keys


def signed(name: str = "anna", secret: str = KEYS["anna"], algorithm: str = "HS256", **claims: Any) -> str:
    now = int(time.time())
    return "Bearer " + jwt.encode({"iss": name, "exp": now + 1800, "nbf": now - 5} | claims, secret, algorithm=algorithm)


@pytest.mark.parametrize(
    ("header", "code"),
    [
        (None, 1001),
        ("", 1001),
        ("Basic x", 1002),
        ("Bearer ", 1002),
        ("Bearer nothing", 1000),
        ("Bearer a.b.c", 1000),
        (signed(secret="c" * 32), 1000),
        (signed("eve"), 1000),
        (signed("ben"), 1000),
        (signed(exp=int(time.time()) - 60), 1004),
        (signed(nbf=int(time.time()) + 600), 1003),
        (signed(secret="", algorithm="none"), 1000),
    ],
)
def test_who_may_not_come_in(header: str | None, code: int) -> None:
    with pytest.raises(WireError) as refused:
        Keys(KEYS).who(header)
    assert (refused.value.code, refused.value.status) == (code, 401)


def test_who_may_come_in() -> None:
    keys = Keys(KEYS)
    for header in (signed(), f"Bearer {KEYS['anna']}", f"bearer anna:{KEYS['anna']}"):
        assert keys.who(header) == "anna"
    assert Keys({}).who(None) == "local"
    # Kling's own way of signing, by hand
    part = lambda data: base64.urlsafe_b64encode(json.dumps(data).encode()).rstrip(b"=")  # noqa: E731
    text = part({"alg": "HS256", "typ": "JWT"}) + b"." + part({"iss": "ben", "exp": int(time.time()) + 1800, "nbf": int(time.time()) - 5})
    mark = base64.urlsafe_b64encode(hmac.new(KEYS["ben"].encode(), text, hashlib.sha256).digest()).rstrip(b"=")
    assert keys.who("Bearer " + (text + b"." + mark).decode()) == "ben"


@pytest.mark.parametrize(
    ("text", "mode", "words"),
    [
        (json.dumps(KEYS), 0o644, "chmod 600"),
        (json.dumps(KEYS), 0o640, "chmod 600"),
        ("{", 0o600, "no JSON"),
        ("[]", 0o600, "not an object"),
        ("{}", 0o600, "not an object"),
        ('{"a": 1}', 0o600, "not an object"),
        ('{"a": "short"}', 0o600, "5 characters"),
        (json.dumps({"a": "x" * 20, "b": "x" * 20}), 0o600, "same secret"),
        (None, 0, "cannot be read"),
    ],
)
def test_files_of_keys_that_are_refused(tmp_path: Path, text: str | None, mode: int, words: str) -> None:
    file = tmp_path / "keys.json"
    if text is not None:
        file.write_text(text)
        file.chmod(mode)
    with pytest.raises(UserError, match=words):
        read_keys(str(file))


def test_a_server_without_keys_answers_to_this_machine_only(start) -> None:
    client = start(keys={})
    assert client("GET", "/v1/videos/text2video")[0] == 200
    assert client("GET", "/v1/videos/text2video", Host="evil.example")[1]["code"] == 1103
    assert client("GET", "/v1/videos/text2video", Origin="https://evil.example")[1]["code"] == 1103
    assert client("GET", "/v1/videos/text2video", Host="localhost:80")[0] == 200


# ------------------------------------------------------------------------------------------------------------------- the store


def new(key: str = "anna", external: str | None = None, callback: str | None = None, **more: Any) -> New:
    return New(key, "text2video", {}, {"prompt": "x", "seed": 1}, "digest", "http://h", external, None, callback, **more)


def test_a_late_result_of_an_old_lease_is_dropped(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.add(new())
    first = store.claim(60)
    assert store.claim(60) is None
    store.release(first, died=True)
    second = store.claim(60)
    assert (second.id, second.lease) == (first.id, first.lease + 1)
    names = [f"made/{task.id}-{task.lease}.mp4" for task in (first, second)]
    for name in names:
        (tmp_path / name).write_bytes(b"video")
    assert not store.extend(first, 1, 2, 60) and store.extend(second, 1, 2, 60)
    assert not store.finish(first, names[0], {"seconds": 1}) and not (tmp_path / names[0]).exists()
    assert not store.fail(first, "late")
    assert store.finish(second, names[1], {"seconds": 1}) and (tmp_path / names[1]).exists()
    assert not store.finish(second, names[1], {"seconds": 1})
    assert store.get("anna", first.id).file == names[1]


def test_a_task_that_kills_its_workers_is_given_up(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.add(new())
    for _ in range(3):
        store.release(store.claim(60), died=True)
    (task,) = store.list("anna", ["text2video"], 0, 10)
    assert task.status == FAILED and "died 3 times" in task.message and store.claim(60) is None


def test_a_restart_finds_everything(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for i in range(3):
        store.add(new(external=str(i)))
    done, lost = store.claim(60), store.claim(60)
    for task in (done, lost):
        (tmp_path / f"made/{task.id}-1.mp4").write_bytes(b"video")
    store.finish(done, f"made/{done.id}-1.mp4", {"seconds": 1})
    store._db.close()  # as a kill does
    again = Store(tmp_path)
    assert again.recover() == 1
    assert [path.name for path in again.made.iterdir()] == [f"{done.id}-1.mp4"]
    assert again.counts() == {WAITING: 2, RUNNING: 0, DONE: 1, FAILED: 0}
    assert again.claim(60).id == lost.id and again.get("anna", "0").token == again.by_token(again.get("anna", "0").token).token
    assert not again.finish(lost, f"made/{lost.id}-1.mp4", {}), "the lease of before"


def test_keys_take_turns(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for key, count in (("anna", 50), ("ben", 3), ("cleo", 1)):
        for _ in range(count):
            store.add(new(key))
    order = []
    for _ in range(10):
        task = store.claim(60)
        order.append(task.key)
        store.finish(task, "made/none", {})
    assert order[:3] == ["anna", "ben", "cleo"] and Counter(order[:7]) == {"anna": 3, "ben": 3, "cleo": 1}
    busy = [store.claim(60) for _ in range(2)]
    store.add(new("ben"))
    assert {task.key for task in busy} == {"anna"} and store.claim(60).key == "ben", "whoever has least running comes first"


def test_a_key_has_its_share(tmp_path: Path) -> None:
    store = Store(tmp_path, Limits(places=2, rate=5))
    for _ in range(2):
        store.add(new())
    with pytest.raises(Refused, match="2 tasks of this key are unfinished") as full:
        store.add(new())
    assert full.value.code == "too_many"
    store.add(new("ben"))
    for _ in range(3):
        assert store.cancel(store.list("anna", ["text2video"], 0, 10)[0], "")
        store.add(new())
    with pytest.raises(Refused, match="5 tasks were added") as fast:
        store.add(new())
    assert fast.value.code == "too_fast"


def test_shares_over_the_wire(start) -> None:
    held = threading.Event()
    held.set()
    client = start(held=held, limits=Limits(places=1, rate=2))
    name = client.make("text2video", SHORT)["task_id"]
    assert client("POST", "/v1/videos/text2video", SHORT)[1]["code"] == 1303
    client("DELETE", f"/v1/videos/text2video/{name}")
    held.clear()
    client.make("text2video", SHORT)
    status, said = client("POST", "/v1/videos/text2video", SHORT)
    assert (status, said["code"]) == (429, 1302) and "try again in" in said["message"]


def test_results_go_when_their_time_is_over(start) -> None:
    client = start(limits=Limits(days=1))
    made = client.wait("image2video", client.make("image2video", SHORT | {"image": png()})["task_id"])
    client.store._db.execute("UPDATE tasks SET finished = finished - 90000")
    assert client.store.expire() == 1 and client.store.expire() == 0
    status, said = client("GET", f"/v1/videos/image2video/{made['task_id']}")
    assert (status, said["code"]) == (404, 1203) and "kept for 1 days" in said["message"]
    assert list(client.store.made.iterdir()) == []
    (picture,) = client.store.inputs.iterdir()
    os.utime(picture)
    client.store.tidy()
    assert picture.exists(), "new ones may belong to a task that is being added"


def test_a_store_of_another_version_or_a_broken_one_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path / "a")
    store._db.execute("PRAGMA user_version=9")
    store.close()
    with pytest.raises(UserError, match="version 9"):
        Store(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "tasks.sqlite").write_bytes(b"no database" * 1000)
    with pytest.raises(UserError, match="cannot be used"):
        Store(tmp_path / "b")


# ----------------------------------------------------------------------------------------------------------------- the network


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
    for secret, text, age, known, words in (
        (KEYS["anna"], body, 0, seen, "before"),
        (KEYS["anna"], body, 1000, set(), "old"),
        (KEYS["ben"], body, 0, set(), "wrong"),
        (KEYS["anna"], body + " ", 0, set(), "wrong"),
    ):
        with pytest.raises(ValueError, match=words):
            callbacks.verify(secret, headers, text, known, now=time.time() + age)


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


# ----------------------------------------------------------------------------------------------------------------------- kills


def run_killed(folder: Path, tasks: int, kills: int, program: list[str], gap: float) -> Path:
    """Make `tasks` tasks in a store, whose server is killed `kills` times on the way."""
    store = Store(folder)
    for i in range(tasks):
        store.add(New("anna", "text2video", {}, {"prompt": "x", "seed": i}, str(i), external=str(i)))
    store.close()
    random = np.random.default_rng(tasks)
    for _ in range(kills):
        process = subprocess.Popen(program + [str(folder)], stdout=subprocess.PIPE)
        process.stdout.readline()  # it has begun
        time.sleep(gap * (0.2 + random.random()))
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(program + [str(folder)], check=True, timeout=200, stdout=subprocess.DEVNULL)
    return folder


def test_no_kill_loses_a_task_or_makes_one_twice(tmp_path: Path) -> None:
    program = [sys.executable, str(HERE / "serve_stub.py")]
    killed = Store(run_killed(tmp_path / "killed", 12, 3, program, 0.4))
    alone = Store(run_killed(tmp_path / "alone", 12, 0, program, 0))
    leases = 0
    for i in range(12):
        task, same = killed.get("anna", str(i)), alone.get("anna", str(i))
        assert task.status == same.status == DONE
        assert (killed.folder / task.file).read_bytes() == (alone.folder / same.file).read_bytes()
        leases += task.lease
    files = {path.name for path in killed.made.iterdir()}
    assert len(files) == 24 and leases > 12, "every video and its record once, and some were begun twice"


def test_a_worker_ends_with_its_server(tmp_path: Path) -> None:
    program = [sys.executable, str(HERE / "serve_stub.py"), str(tmp_path)]
    store = Store(tmp_path)
    for i in range(50):
        store.add(New("anna", "text2video", {}, {"prompt": "x", "seed": i}, str(i)))
    store.close()
    process = subprocess.Popen(program, stdout=subprocess.PIPE, text=True)
    workers = [int(pid) for pid in process.stdout.readline().split()]
    assert all(Path(f"/proc/{pid}").exists() for pid in workers)
    process.kill()
    process.wait()
    end = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2] for pid in workers):
        assert time.monotonic() < end, "a worker outlives its server"
        time.sleep(0.05)


def test_a_worker_that_dies_is_replaced(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.add(New("anna", "text2video", {}, {"prompt": "kill", "seed": 1}, "a", external="a"))
    store.add(New("anna", "text2video", {}, {"prompt": "error", "seed": 1}, "b", external="b"))
    store.add(New("anna", "text2video", {}, {"prompt": "x", "seed": 2}, "c", external="c"))
    program = (sys.executable, str(HERE / "serve_stub.py"), "worker")
    crew = Pool(store, 1, lambda: ProcessWorker(store, Setup(), program=program), lambda what, seconds: None)
    crew.start()
    end = time.monotonic() + 60
    while store.counts()[WAITING] + store.counts()[RUNNING] and time.monotonic() < end:
        time.sleep(0.05)
    crew.stop(5)
    told = {name: store.get("anna", name) for name in "abc"}
    assert told["a"].status == FAILED and "died 3 times" in told["a"].message
    assert told["b"].status == FAILED and "no balls" in told["b"].message
    assert told["c"].status == DONE


def test_a_cancelled_task_stops_and_the_next_does_not(tmp_path: Path) -> None:
    store = Store(tmp_path)
    first, _ = store.add(New("anna", "text2video", {}, {"prompt": "long", "seed": 1}, "a", external="a"))
    program = (sys.executable, str(HERE / "serve_stub.py"), "worker")
    crew = Pool(store, 1, lambda: ProcessWorker(store, Setup(), program=program), lambda what, seconds: None)
    crew.start()
    while not store.get("anna", "a").step:
        time.sleep(0.01)
    began = time.monotonic()
    assert store.cancel(first, "cancelled by the client")
    store.add(New("anna", "text2video", {}, {"prompt": "x", "seed": 2}, "b", external="b"))
    while store.counts()[DONE] == 0:
        assert time.monotonic() - began < 20, "a long task goes on after it was cancelled"
        time.sleep(0.01)
    crew.stop(5)
    assert store.get("anna", "a").message == "cancelled by the client" and len(list(store.made.glob("*.mp4"))) == 2
    assert store.recover() == 0 and [path.stem for path in store.made.glob("*.mp4")] == [store.get("anna", "b").claim]


@pytest.mark.slow
def test_twenty_kills_of_the_real_program(tiny: Path, tmp_path: Path) -> None:
    """200 tasks on the tiny model at 17 frames: 200 videos, each once, and bit-equal to a run left alone."""
    import httpx

    def program(folder: Path, port: int) -> subprocess.Popen:
        words = ["kling-serve", "--model", str(tiny), "--store", str(folder), "--port", str(port), "--device", "cpu", "--threads", "1"]
        return subprocess.Popen([str(Path(sys.executable).parent / words[0]), *words[1:], "--places", "1000", "--rate", "10000"])

    def ask(url: str, method: str, path: str, **more: Any) -> Any:
        for _ in range(3000):
            try:
                return httpx.request(method, url + path, timeout=10, **more).json()
            except httpx.TransportError:
                time.sleep(0.1)
        raise AssertionError("no server")

    def run(folder: Path, kills: int) -> dict[str, bytes]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        url = f"http://127.0.0.1:{port}"
        process = program(folder, port)
        try:
            for i in range(200):  # a client that repeats what was not answered
                ask(url, "POST", "/v1/videos/text2video", json=SHORT | {"seed": i, "external_task_id": str(i)})
                if kills and i % 10 == 5:
                    process.kill()
                    process.wait()
                    process, kills = program(folder, port), kills - 1
            while True:
                tasks = ask(url, "GET", "/v1/videos/text2video?pageSize=500")["data"]
                if len(tasks) == 200 and all(task["task_status"] == "succeed" for task in tasks):
                    break
                time.sleep(0.5)
            return {t["task_info"]["external_task_id"]: httpx.get(t["task_result"]["videos"][0]["url"]).content for t in tasks}
        finally:
            process.terminate()
            process.wait()

    killed, alone = run(tmp_path / "killed", 20), run(tmp_path / "alone", 0)
    assert killed == alone and len(killed) == 200
    assert len(list((tmp_path / "killed" / "made").glob("*.mp4"))) == 200


# ------------------------------------------------------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--listen"], "--keys"),
        (["--port", "0"], "port 0"),
        (["--workers", "0"], "--workers 0"),
        (["--convention", "2023"], "2023"),
        (["--url", "video.example.org"], "https://"),
        (["--keys", "/nowhere"], "/nowhere"),
        (["--key", "x"], "--keys"),
        (["--days", "nan"], "--days"),
    ],
)
def test_mistakes_on_the_command_line(argv: list[str], words: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        serve.main(argv)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1 and words in said


@pytest.mark.slow
def test_a_client_from_npm(start, tmp_path: Path) -> None:
    """`kling-api` of the npm registry, through TLS, on which it insists. KLING_NODE_CLIENT names the folder of `npm i kling-api`."""
    folder = os.environ.get("KLING_NODE_CLIENT")
    if shutil.which("node") is None or shutil.which("openssl") is None or folder is None:
        pytest.skip("no node, no openssl, or KLING_NODE_CLIENT names no folder with kling-api")
    client = start()
    port = tls_before(int(client.url.rsplit(":", 1)[1]), tmp_path)
    client.server.url = f"https://localhost:{port}"
    script = Path(folder) / "kling-serve-test.mjs"
    shutil.copy(HERE / "data" / "kling_api.mjs", script)
    words = ["node", str(script), client.server.url, "anna", KEYS["anna"], png(), str(tmp_path)]
    env = os.environ | {"NODE_EXTRA_CA_CERTS": str(tmp_path / "cert.pem")}
    said = subprocess.run(words, capture_output=True, text=True, timeout=250, cwd=folder, env=env)
    assert said.returncode == 0, said.stdout + said.stderr
    told = json.loads(said.stdout.splitlines()[-1])
    assert told["done"]["data"]["task_status"] == told["moved"]["data"]["task_status"] == "succeed"
    assert told["done"]["data"]["task_info"]["external_task_id"] == "npm" and told["longer"]["data"]["task_status"] == "submitted"
    assert told["refused"]["code"] == 1201 and "reference" in told["refused"]["message"]
    assert read_video(told["saved"][0]).frames.shape == (41, 80, 80, 3)


def tls_before(port: int, folder: Path) -> int:
    """The port of a TLS end before a server on `port`, with the certificate folder/cert.pem."""
    import ssl

    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    files = ["-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")]
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *names, *files], check=True, capture_output=True
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    outside = context.wrap_socket(socket.create_server(("127.0.0.1", 0)), server_side=True)

    def pump(source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def serve_all() -> None:
        while True:
            try:
                one = outside.accept()[0]
            except OSError:
                continue
            other = socket.create_connection(("127.0.0.1", port))
            for pair in ((one, other), (other, one)):
                threading.Thread(target=pump, args=pair, daemon=True).start()

    threading.Thread(target=serve_all, daemon=True).start()
    return outside.getsockname()[1]


def test_our_own_wire_takes_every_field_and_the_studio_speaks_it(start, tmp_path: Path) -> None:
    pytest.importorskip("gradio")
    from kling_programs.sample.studio.remote import Remote, body_of
    from kling_programs.sample.studio.shelf import Shelf

    from kling import Request

    client = start()
    remote = Remote(client.url, KEYS["anna"])
    remote.check(client.server.desk.pipe)
    first = tmp_path / "first.png"
    first.write_bytes(base64.b64decode(png()))
    request = Request("a red ball", image=str(first), camera="pan=5", num_frames=5, seed=3, num_inference_steps=1)
    told: list[tuple[int, int]] = []
    kind, video, record = remote.make(request, told.append)
    assert kind == "mp4" and told and record["request"]["image"] != str(first)
    shelf = Shelf(tmp_path / "shelf", {})
    result = shelf.keep_made(kind, video, record, request)
    assert result.record["inputs"].keys() == {str(first)} and result.record["frames"]["shape"] == [5, 80, 80, 3]
    with pytest.raises(UserError, match="not trained for 'restyle'"):
        remote.make(Request("x", video=str(result.path), strength=0.5), told.append)
    with pytest.raises(UserError, match="unknown"):
        Remote(client.url, "wrong").check(client.server.desk.pipe)
    with pytest.raises(UserError, match="does not answer"):
        Remote("http://127.0.0.1:1").check(client.server.desk.pipe)
    status, said = client("POST", "/v1/requests", {"request": {"prompt": "x", "image": "/etc/passwd"}})
    assert status == 400 and "/etc/passwd" in said["message"] and "not in files" in said["message"]
    status, said = client("POST", "/v1/requests", {"request": {"prompt": "x", "camera": "/etc/passwd"}})
    assert status == 400 and "camera" in said["message"]
    body = body_of(request)
    status, said = client("POST", "/v1/requests", body | {"files": body["files"] | {"more.png": png()}})
    assert status == 400 and "more.png" in said["message"]
