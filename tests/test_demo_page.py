"""The studio's page and its API, with a tiny model: over HTTP as a client, and in a real browser as a person."""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("gradio")

import httpx
from kling_programs.sample import demo
from kling_programs.sample.studio import views
from kling_programs.sample.studio.form import request_of
from kling_programs.sample.studio.page import build
from kling_programs.sample.studio.shelf import Shelf
from kling_programs.sample.studio.studio import Studio
from kling_programs.sample.studio.uploads import Uploads
from test_demo import Gate, png
from test_generate import save_tiny

from kling import KlingPipeline, Request
from kling.condition.tasks import TASKS
from kling.data.video import probe
from kling.sampling.record import record_path

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SHORT = {"duration": 0.5, "num_inference_steps": 2}


class Site:
    """A running page and what is behind it."""

    def __init__(self, folder: Path, run: Path | None = None, unable: tuple[str, ...] = ("text_to_image",)) -> None:
        self.arrivals, self.out = folder / "arrivals", folder / "out"
        self.arrivals.mkdir()
        os.environ["GRADIO_TEMP_DIR"] = str(self.arrivals)
        model = folder / "model"
        save_tiny(model, [task for task in (*TASKS, "camera") if task not in unable])
        args = argparse.Namespace(model=str(model), device="cpu", out=str(self.out), keep=50, run=None if run is None else str(run))
        self.studio, page, settings = demo.prepare(args, self.arrivals)
        _, self.url, _ = page.launch(server_name="127.0.0.1", server_port=None, prevent_thread_lock=True, max_file_size="1mb", **settings)
        self.page, self.http = page, httpx.Client(timeout=600)

    def close(self) -> None:
        self.http.close()
        self.page.close()

    def upload(self, path: Path) -> httpx.Response:
        return self.http.post(f"{self.url}gradio_api/upload", files={"files": (path.name, path.read_bytes())})

    def ask(self, *values: object, raw: str | None = None) -> list[tuple[str, object]]:
        """Call /generate by position and return its events: [(name, data)]."""
        body = raw or json.dumps({"data": list(values)})
        posted = self.http.post(f"{self.url}gradio_api/call/generate", content=body, headers={"content-type": "application/json"})
        if posted.status_code != 200:
            return [(str(posted.status_code), posted.text)]
        text = self.http.get(f"{self.url}gradio_api/call/generate/{posted.json()['event_id']}").text
        return [(e, json.loads(d)) for e, d in re.findall(r"event: (\w+)\ndata: (.*)", text)]

    def fields(self, **values: object) -> list[object]:
        """Positional values of /generate."""
        names = [p["parameter_name"] for p in self.info()["parameters"]]
        defaults = {p["parameter_name"]: p.get("parameter_default") for p in self.info()["parameters"]}
        assert set(values) <= set(names)
        return [{**defaults, **SHORT, **values}[name] for name in names]

    def info(self) -> dict:
        if not hasattr(self, "_info"):
            self._info = self.http.get(f"{self.url}gradio_api/info").json()["named_endpoints"]["/generate"]
        return self._info


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Iterator[Site]:
    before = os.environ.get("GRADIO_TEMP_DIR")
    site = Site(tmp_path_factory.mktemp("site"))
    yield site
    site.close()
    os.environ.pop("GRADIO_TEMP_DIR") if before is None else os.environ.update(GRADIO_TEMP_DIR=before)


def test_weights_go_to_the_asked_device(tmp_path):
    save_tiny(tmp_path / "model", ["text"])
    args = argparse.Namespace(model=str(tmp_path / "model"), device="meta", out=str(tmp_path / "out"), keep=5, run=None)
    studio, page, _ = demo.prepare(args, tmp_path)
    assert studio.pipe.transformer.device.type == studio.pipe.vae.device.type == "meta"
    assert any("<span>meta</span>" in str(getattr(block, "value", "")) for block in page.blocks.values())


def test_a_folder_of_wan_weights_opens_with_its_own_settings(tmp_path):
    from tiny_wan import saved

    pipe = KlingPipeline.from_pretrained(saved("t2v", tmp_path / "wan"), checkpoint="wan2.1-t2v-1.3b")
    shelf = Shelf(tmp_path / "out", {"path": "wan", "sha256": {}})
    studio = Studio(pipe, shelf.model, shelf, Uploads(tmp_path, shelf.inputs))
    page = build(studio)
    labels = [str(getattr(block, "info", "")) for block in page.blocks.values()]
    assert any("(50)" in label for label in labels)  # steps
    request = request_of({"prompt": "a ball", "aspect": "9:16", "num_inference_steps": 0}, studio.uploads)
    line = views.understood(0, pipe.plan(request), request)
    assert f"{studio.sizes['9:16'][1]}×{studio.sizes['9:16'][0]} · 16 fps · 50 steps" in line
    assert request.negative_prompt is None and request.guidance_scale is None


# --------------------------------------------------------------------------------------------------------------- as a client


def test_the_client_example(site, tmp_path):
    """The example of docs/studio.md, run as it stands there."""
    text = (Path(__file__).parents[1] / "docs" / "studio.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", text, re.S)[1].replace("http://127.0.0.1:7860", site.url)
    code = code.replace("first.png", str(png(tmp_path / "first.png", (112, 64)))).replace("duration=5", "duration=0.5")
    scope: dict = {}
    exec(compile(code, "docs/studio.md", "exec"), scope)  # noqa: S102 - our own text
    made, steps = scope["result"], scope["steps"]
    record = json.loads(Path(made["record"]).read_text(encoding="utf-8"))
    assert probe(made["video"]).frames == 5 and record["request"]["camera"] == "pan=5"
    assert steps[-1]["step"] == steps[-1]["of"]
    again = KlingPipeline.from_pretrained(site.studio.model["path"])
    frames = again(Request(**record["request"])).frames[0]
    assert hashlib.sha256(np.ascontiguousarray(frames)).hexdigest() == record["frames"]["sha256"]


def refused(events: list[tuple[str, object]]) -> str:
    """The message of a refusal, which names no path and shows no trace."""
    name, data = events[-1]
    assert name != "complete", events
    text = json.dumps(data)
    assert not re.search(r"/(root|tmp|home|etc|usr|work)/|Traceback|File \\", text), text
    return text


def test_what_must_not_pass_is_refused_without_a_trace_or_a_path(site, tmp_path):
    secret = png(tmp_path / "secret.png")
    stored = site.upload(png(tmp_path / "mine.png")).json()[0]
    for path in (
        "/etc/passwd",
        str(secret),
        f"{Path(stored).parent}/../../secret.png",
        "http://127.0.0.1:1/x.png",
        "../../etc/passwd",
        f"{stored}\0",
    ):
        for image in (path, {"path": path}, {"path": path, "url": path, "meta": {"_type": "gradio.FileData"}}):
            refused(site.ask(*site.fields(image=image)))
    assert secret.exists()
    mine = {"path": stored}
    bad_fields = [
        ({"prompt": "x" * 10_000}, "10000 characters"),
        ({"seed": "7"}, "seed"),
        ({"duration": "5; rm -rf"}, "duration"),
        ({"camera": {"pan": "x"}}, "pan"),
        ({"camera": {"pam": 1}}, "pam"),
        ({"camera": [1]}, "camera"),
        ({"still": True}, "not trained"),
        ({"keyframes": [{"file": mine, "frame": 99}]}, "frame 99"),
        ({"mode": "../x"}, "mode"),
        ({"loop": 3}, "loop"),
        ({"video": mine}, "not a video"),
    ]
    for bad, message in bad_fields:
        assert message in refused(site.ask(*site.fields(**bad)))
    for value in ("NaN", "Infinity", "-1e999"):
        raw = json.dumps({"data": site.fields(shift=123456.5)}).replace("123456.5", value)
        refused(site.ask(raw=raw))
    for url in (
        "file=/etc/passwd",
        "file=../../etc/passwd",
        f"file={secret}",
        f"file={site.out}/../model/model_index.json",
        "file=http://127.0.0.1:1/",
    ):
        reply = site.http.get(f"{site.url}gradio_api/{url}")
        assert reply.status_code in (403, 404) and "root:" not in reply.text, url
    large = tmp_path / "large.mp4"
    large.write_bytes(os.urandom(1_200_000))
    assert site.upload(large).status_code == 413
    assert not [p for p in site.arrivals.rglob("large*") if p.stat().st_size > 1_000_000]


def test_twenty_at_once_on_a_queue_of_eight(site):
    """Eight wait, twelve are told so, and everybody gets their own video."""
    queue, replies, most = site.studio.queue, {}, []
    gate = Gate(queue)
    ask = lambda seed: replies.__setitem__(seed, site.ask(*site.fields(prompt=f"ball {seed}", seed=seed)))  # noqa: E731
    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(20)]
    for thread in threads:
        thread.start()
    deadline = time.time() + 280
    while sum("queue is full" in json.dumps(events) for events in replies.copy().values()) < 12 and time.time() < deadline:
        most.append(queue.waiting)
        time.sleep(0.01)
    most.append(queue.waiting)
    gate.open.set()
    for thread in threads:
        thread.join(300)
    told = [events for events in replies.values() if events[-1][0] != "complete"]
    made = {
        seed: json.loads(Path(events[-1][1][0]["record"]["path"]).read_text())
        for seed, events in replies.items()
        if events[-1][0] == "complete"
    }
    assert max(most) == 8 and len(made) == 8 and len(told) == 12
    assert all("the queue is full (8 are waiting)" in refused(events) for events in told)
    for seed, record in made.items():
        assert record["request"]["seed"] == seed and record["request"]["prompt"] == f"ball {seed}"
    assert len({record["frames"]["sha256"] for record in made.values()}) == 8
    alone = site.studio.pipe(Request(prompt=f"ball {min(made)}", duration=0.5, num_inference_steps=2, seed=min(made))).frames[0]
    assert hashlib.sha256(np.ascontiguousarray(alone)).hexdigest() == made[min(made)]["frames"]["sha256"]


def test_a_closed_connection_stops_its_job(site):
    asked = {"data": site.fields(num_inference_steps=100, duration=20.0)}
    posted = site.http.post(f"{site.url}gradio_api/call/generate", json=asked)
    with httpx.stream("GET", f"{site.url}gradio_api/call/generate/{posted.json()['event_id']}", timeout=60) as stream:
        for line in stream.iter_lines():
            if '"step": 2' in line:
                break
    deadline = time.time() + 20
    while site.studio.queue.running and time.time() < deadline:
        time.sleep(0.05)
    assert not site.studio.queue.running


def test_a_result_is_served_where_it_lies_and_nothing_beside_it_is(site):
    made = site.ask(*site.fields(seed=5))[-1][1][0]
    for kind in ("video", "record"):
        path = Path(made[kind]["path"])
        assert path.parent == site.out and not list(site.arrivals.rglob(path.name))
        assert site.http.get(made[kind]["url"]).content == path.read_bytes()
    for beside in (f"{site.out}-2/x.mp4", f"{site.out}/../model/vae/config.json", str(site.studio.model["path"]) + "/model_index.json"):
        assert site.http.get(f"{site.url}gradio_api/file={beside}").status_code in (403, 404)
    path = Path(made["video"]["path"])
    for name in (path, record_path(path)):  # as when the shelf is tidied
        name.unlink()
    assert site.http.get(made["video"]["url"]).status_code in (403, 404)
    refused(site.ask(*site.fields(video={"path": str(path)})))


@pytest.mark.slow
@pytest.mark.timeout(1500)  # half a minute on an idle core
def test_two_hundred_requests_leave_nothing_behind(site):
    def resident() -> int:
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = None
    for i in range(220):
        assert site.ask(*site.fields(prompt=f"ball {i}", seed=i, num_inference_steps=1))[-1][0] == "complete"
        if i == 19:
            before = resident()
    grown = resident() / before - 1
    files = [p for folder in (site.arrivals, site.out) for p in folder.rglob("*") if p.is_file()]
    print(f"resident memory {before / 2**20:.0f} MiB, grown by {100 * grown:.1f} %; {len(files)} files")
    assert grown < 0.05
    assert len(list(site.out.glob("*.mp4"))) <= 50 and len(files) < 150
