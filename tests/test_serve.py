"""`kling-serve`: its wires, keys and command line, on a tiny random model."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("jwt")
pytest.importorskip("prometheus_client")

import jwt
import uvicorn
from kling_programs.sample import serve
from kling_programs.sample.server.app import Figures, Server, build
from kling_programs.sample.server.desk import Desk, Rules
from kling_programs.sample.server.keys import Keys, read_keys
from kling_programs.sample.server.pool import Pool
from kling_programs.sample.server.store import DONE, FAILED, RUNNING, WAITING, Limits, Store
from kling_programs.sample.server.wire import WireError
from kling_programs.sample.server.worker import Maker, Setup
from serving import KEYS, SHORT, Client, new, png

from kling.data.video import read_video
from kling.errors import UserError
from kling.sampling.record import read_record

pytest_plugins = ["serving"]


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
    crew = Pool(store, 0, lambda slot: None, figures.told)
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
    for path in ("/v1/videos/image2video", "/v1/videos"):
        assert httpx.post(refusing.url + path, content=iter([large]), headers=head).status_code == 413


def test_a_client_that_goes_away_is_no_fault(refusing: Client, capfd: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture) -> None:
    """In the middle of a file, or of its own request."""
    task, _ = refusing.store.add(new())
    while (claimed := refusing.store.claim(60)).id != task.id:
        pass
    file = refusing.store.made / f"{claimed.claim}.mp4"
    file.write_bytes(bytes(30 * 2**20))
    refusing.store.finish(claimed, f"made/{file.name}", {"kind": "mp4", "seconds": 1})
    host, port = refusing.url.removeprefix("http://").split(":")
    head = f"Host: x\r\nAuthorization: Bearer {KEYS['anna']}\r\n"
    post = f"{head}Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n{{"
    for text in (
        f"GET /files/{refusing.store.get('anna', task.id).token}.mp4 HTTP/1.1\r\n{head}\r\n",
        f"POST /v1/videos/text2video HTTP/1.1\r\n{post}",
        f"POST /v1/videos HTTP/1.1\r\n{post}",
    ):
        with socket.create_connection((host, int(port))) as client:
            client.sendall(text.encode())
            client.settimeout(0.5)
            with suppress(TimeoutError):
                client.recv(10)
    time.sleep(1)
    said = capfd.readouterr().err + caplog.text
    assert "Traceback" not in said and "ERROR" not in said, said
    assert Client(refusing.url, None)("GET", "/docs")[0] == 200


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


def test_multi_prompt_is_a_storyboard(tmp_path: Path) -> None:
    from kling_programs.sample.server import classic, newer, own
    from test_pipeline import tiny_pipeline

    tiny_pipeline(max_frames=41, capabilities=["text", "image", "camera", "shots"]).save_pretrained(tmp_path / "model")
    desk = Desk(Store(tmp_path / "store"), str(tmp_path / "model"), Rules())
    rows = [{"index": 2, "prompt": "it jumps", "duration": "2"}, {"index": 1, "prompt": "a ball rolls", "duration": "3"}]
    ask = {"multi_shot": True, "shot_type": "customize", "multi_prompt": rows, "duration": "5"}

    def take(**more: Any) -> Any:
        return desk.take("anna", classic.read(desk, "text2video", classic.Text2Video(**ask | more), ""))[0]

    assert take().request["shots"] == [{"prompt": "a ball rolls", "seconds": 3.0}, {"prompt": "it jumps", "seconds": 2.0}]
    assert desk.capabilities()["fields"]["multi_shot"]
    for more, words in (
        ({"duration": "10"}, "lasts 5 s and duration is 10"),
        ({"prompt": "x"}, "both prompt and multi_prompt"),
        ({"multi_prompt": None, "prompt": "x"}, "give shot_type customize, and multi_prompt"),
        ({"shot_type": "intelligence"}, "shot_type intelligence"),
        ({"multi_shot": False}, "set multi_shot to true"),
        ({"multi_prompt": [{"index": 1, "prompt": "x"}]}, "give index"),
        ({"multi_prompt": [rows[0] | {"duration": None}]}, "is no number"),
        ({"multi_prompt": [rows[0] | {"prompt": ""}], "duration": None}, "say in words"),
        ({"camera_control": {"type": "forward_up"}}, "both camera and shots"),
    ):
        with pytest.raises((UserError, WireError), match=words):
            take(**more)
    rows = [{"prompt": "x", "seconds": 1, "camera": {"pan": 5}}]
    assert desk.take("anna", own.read(own.Body(request={"shots": rows}), ""))[0].request["shots"] == rows
    for wrong in ("story.yaml", [rows[0] | {"camera": "/etc/passwd"}]):  # never a file of the server
        with pytest.raises(UserError, match="shots: give a list"):
            own.read(own.Body(request={"shots": wrong}), "")
    with pytest.raises(UserError, match="use multi_prompt of"):
        newer.read(desk, "text-to-video", desk.name, newer.Body(prompt="x", settings={"multi_shot": True}), "")


def test_the_brush_counts_y_from_the_bottom_and_its_masks_are_kept(tmp_path: Path) -> None:
    from kling_programs.sample.server import classic
    from kling_programs.sample.server.store import names_of
    from test_pipeline import tiny_pipeline

    tiny_pipeline(max_frames=41).save_pretrained(tmp_path / "model")
    desk = Desk(Store(tmp_path / "store"), str(tmp_path / "model"), Rules())
    path = [{"x": 10, "y": 0}, {"x": 100, "y": 50}]
    brush = {"dynamic_masks": [{"mask": png(320, 200, seed=1), "trajectories": path}], "static_mask": png(320, 200, seed=2)}
    ask = {"image": png(320, 200), "duration": "2"}

    def take(**more: Any) -> Any:
        return desk.take("anna", classic.read(desk, "image2video", classic.Image2Video(**ask | brush | more), ""))[0]

    task = take(camera_control={"type": "forward_up"})
    moving, still = task.request["tracks"]
    assert moving["points"] == [[10.0, 199.0], [100.0, 149.0]] and still["points"] == []
    assert len(set(names_of(task.request))) == 3 and all((desk.store.folder / name).is_file() for name in names_of(task.request))
    for more, words in (
        ({"static_mask": png(300, 200)}, "300x200 pixels, the image 320x200"),
        ({"image": None, "image_tail": png()}, "without an image"),
        ({"dynamic_masks": [{"trajectories": path}]}, "mask is missing"),
        ({"dynamic_masks": [{"mask": png(320, 200), "trajectories": path[:1]}]}, "give 2 to 77"),
    ):
        with pytest.raises(WireError, match=words):
            take(**more)
    desk.rules = Rules(strict=True)
    with pytest.raises(UserError, match="camera_control and static_mask were given|camera_control and dynamic_masks were given"):
        take(duration="5", camera_control={"type": "forward_up"}, image=png(320, 320))


def test_a_worker_says_its_precision_first(tiny: Path, capsys: pytest.CaptureFixture) -> None:
    Maker(Setup(str(tiny), "cpu"))
    said = capsys.readouterr()
    assert not said.out and said.err.startswith("precision fp32 (") and said.err.endswith(" GFLOP/s)\n")


def test_zero_is_a_value(tiny: Path, tmp_path: Path) -> None:
    """A seed of 0 was drawn anew, because 0 == False."""
    from kling_programs.sample.server import classic, newer, openai, own

    desk, given = Desk(Store(tmp_path), str(tiny), Rules()), {"seed": 0, "sigma_c": 0.0}
    asks = [
        classic.read(desk, "text2video", classic.Text2Video(prompt="x", **given), ""),
        newer.read(desk, "text-to-video", "kling-3.0", newer.Body(prompt="x", settings=given), ""),
        openai.read(desk, {"prompt": "x"} | given, ""),
        openai.read(desk, {"prompt": "x"} | {name: str(value) for name, value in given.items()}, ""),
        own.read(own.Body(request={"prompt": "x"} | given), ""),
    ]
    assert [{name: ask.fields.get(name) for name in given} for ask in asks] == [given] * 5
    assert desk.take("anna", asks[0])[0].seed == 0


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


# ---------------------------------------------------------------------------------------------------------------------- the other wires


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
    assert 'kling_requests_total{route="/v1/videos/text2video",status="200"} 1.0' in text
    assert 'kling_tasks{status="succeed"} 1.0' in text and "kling_workers_ready 1.0" in text and "kling_made_seconds_count 1.0" in text
    assert anybody("GET", "/metrics")[1]["code"] == 1001 and anybody("GET", "/docs")[0] == 200
    paths = anybody("GET", "/openapi.json")[1]["paths"]
    assert {"/v1/videos/text2video", "/v1/videos", "/text-to-video/{model}", "/tasks"} <= set(paths)
    client.pool.ready.clear()
    assert anybody("GET", "/healthz")[0] == 503


# --------------------------------------------------------------------------------------------------------------------------------- keys


def signed(name: str = "anna", secret: str = KEYS["anna"], algorithm: str = "HS256", **claims: Any) -> str:
    now = int(time.time())
    return "Bearer " + jwt.encode({"iss": name, "exp": now + 1800, "nbf": now - 5} | claims, secret, algorithm=algorithm)


@pytest.mark.parametrize(
    ("header", "code"),
    [
        (lambda: None, 1001),
        (lambda: "", 1001),
        (lambda: "Basic x", 1002),
        (lambda: "Bearer ", 1002),
        (lambda: "Bearer nothing", 1000),
        (lambda: "Bearer a.b.c", 1000),
        (lambda: signed(secret="c" * 32), 1000),
        (lambda: signed("eve"), 1000),
        (lambda: signed("ben"), 1000),
        (lambda: signed(exp=int(time.time()) - 60), 1004),
        (lambda: signed(nbf=int(time.time()) + 600), 1003),
        (lambda: signed(secret="", algorithm="none"), 1000),
    ],
    ids=[
        "none",
        "empty",
        "basic",
        "no-token",
        "nothing",
        "no-jwt",
        "other-secret",
        "unknown-key",
        "key-of-another",
        "expired",
        "not-yet",
        "unsigned",
    ],
)
def test_who_may_not_come_in(header: Callable[[], str | None], code: int) -> None:
    """A header is signed when its test runs: times in a token are of that moment, not of the collection."""
    with pytest.raises(WireError) as refused:
        Keys(KEYS).who(header())
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


# --------------------------------------------------------------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--listen"], "--keys"),
        (["--port", "0"], "port 0"),
        (["--workers", "0"], "--workers 0"),
        (["--convention", "2023"], "2023"),
        (["--url", "video.example.org"], "https://"),
        (["--url", "https://"], "https://HOST"),
        (["--url", "https://a b"], "https://HOST"),
        (["--keys", "/nowhere"], "/nowhere"),
        (["--key", "x"], "--keys"),
        (["--days", "nan"], "--days"),
        (["--days", "1e300"], "--days 1e+300"),
        (["--drain", "inf"], "--drain inf"),
        (["--places", "100000000000000000000000"], "--places"),
        (["--device", "meta"], "cannot be used"),
        (["--keys", "/dev/null"], "/dev/null"),
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
    shutil.copy(Path(__file__).parent / "data" / "kling_api.mjs", script)
    words = ["node", str(script), client.server.url, "anna", KEYS["anna"], png(), str(tmp_path)]
    env = os.environ | {"NODE_EXTRA_CA_CERTS": str(tmp_path / "cert.pem")}
    said = subprocess.run(words, capture_output=True, text=True, timeout=250, cwd=folder, env=env)
    assert said.returncode == 0, said.stdout + said.stderr
    told = json.loads(said.stdout.splitlines()[-1])
    assert told["done"]["data"]["task_status"] == told["moved"]["data"]["task_status"] == "succeed"
    assert told["done"]["data"]["task_info"]["external_task_id"] == "npm" and told["longer"]["data"]["task_status"] == "submitted"
    assert told["refused"]["code"] == 1201 and "reference" in told["refused"]["message"]
    assert read_video(told["saved"][0]).frames.shape == (41, 80, 80, 3)


@pytest.mark.slow
def test_a_client_from_pypi(start, monkeypatch: pytest.MonkeyPatch) -> None:
    """`klingai-api` of PyPI. It asks for Python 3.14 and runs on ours: KLING_PYTHON_CLIENT names the folder of
    `pip install --ignore-requires-python --target FOLDER klingai-api`."""
    if (folder := os.environ.get("KLING_PYTHON_CLIENT")) is None:
        pytest.skip("KLING_PYTHON_CLIENT names no folder with klingai-api")
    monkeypatch.syspath_prepend(folder)
    import api as theirs
    from exceptions import BadCredentials

    server = start()
    monkeypatch.setattr(theirs.KlingAiAPI, "base", server.url)

    def ended(query: Callable[[str], dict], made: dict) -> dict:
        while (said := query(made["data"]["task_id"]))["data"]["task_status"] not in (DONE, FAILED):
            time.sleep(0.05)
        return said["data"]

    with theirs.KlingAiAPI("anna", KEYS["anna"]) as client:
        camera = {"type": "simple", "config": {"pan": 5, "tilt": 0}}
        made = client.text2video("a red ball", cfg_scale=0.5, camera_control=camera, external_task_id="pypi")
        text = ended(client.get_text2video, made)
        assert client.get_text2video("pypi")["data"] == text and [text] == client.list_text2video(page_size=5)["data"]
        image = ended(client.get_image2video, client.image2video(png(), prompt="it rolls", aspect_ratio=theirs.AspectRatio.square))
        assert [image] == client.list_image2video()["data"]
    for told in (text, image):
        assert told["task_status"] == "succeed", told
        assert server("GET", told["task_result"]["videos"][0]["url"])[1][4:8] == b"ftyp"
    with pytest.raises(BadCredentials), theirs.KlingAiAPI("anna", "c" * 32):
        pass


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


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_fifty_clients_get_what_is_theirs(start) -> None:
    """No mix-up, nobody starves, and the server's memory stays."""
    import psutil

    class Says:
        """The "video" is the prompt."""

        def make(self, fields: dict, output: Path, tell: Callable) -> dict:
            output.with_name(f"{output.name}.mp4").write_text(fields["prompt"])
            output.with_name(f"{output.name}.mp4.json").write_text("{}")
            return {"kind": "mp4", "seconds": 1, "seed": fields["seed"], "width": 1, "height": 1}

    client = start(workers=4, by=Says(), limits=Limits(places=1000, rate=100_000))
    wrong: list[str] = []
    slowest: dict[str, float] = {}

    def one(number: int) -> None:
        mine = Client(client.url, ("anna", "ben")[number % 2])
        for i in range(4):
            began, prompt = time.monotonic(), f"client {number} task {i}"
            made = mine.wait("text2video", mine.make("text2video", {"prompt": prompt, "duration": "2"})["task_id"], every=1.0)
            slowest[mine.key] = max(slowest.get(mine.key, 0), time.monotonic() - began)
            if mine("GET", made["task_result"]["videos"][0]["url"])[1].decode() != prompt:
                wrong.append(prompt)

    def crowd() -> int:
        threads = [threading.Thread(target=one, args=(number,)) for number in range(50)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return psutil.Process().memory_info().rss

    before, after = crowd(), crowd()
    waits = ", ".join(f"{key} {seconds:.1f} s" for key, seconds in sorted(slowest.items()))
    print(f"400 tasks; memory {before / 2**20:.0f} -> {after / 2**20:.0f} MiB; the longest wait of a key: {waits}")
    assert not wrong and client.store.counts()[DONE] == 400
    assert max(slowest.values()) < 3 * min(slowest.values())
    assert after < 1.05 * before, f"{before / 2**20:.0f} -> {after / 2**20:.0f} MiB"


def test_a_page_whose_videos_a_server_makes(start, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gradio")
    from kling_programs.sample import demo
    from kling_programs.sample.studio.studio import Step

    from kling import Request

    client = start()
    monkeypatch.setenv("KLING_SERVER_KEY", KEYS["anna"])
    args = demo.parse(["--server", client.url, "--model", str(tiny), "--out", str(tmp_path / "out")])
    (tmp_path / "arrivals").mkdir()
    studio, *_ = demo.prepare(args, tmp_path / "arrivals")
    assert studio.pipe.transformer.device.type == "meta", "no weights here"
    told, work = [], studio.make("me", [Request("a red ball", num_frames=5, seed=i, num_inference_steps=1) for i in (1, 2)])
    try:
        while True:
            told.append(next(work))
    except StopIteration as done:
        results = done.value
    assert any(isinstance(event, Step) and event.total == 2 for event in told)
    assert [result.record["request"]["seed"] for result in results] == [1, 2]
    assert read_video(results[0].path).frames.shape == (5, 64, 112, 3) and results[0].path.parent == tmp_path / "out"
    with pytest.raises(UserError, match="--loras needs the weights here"):
        demo.parse(["--server", client.url, "--loras", str(tmp_path)])


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
