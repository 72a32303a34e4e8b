"""The studio's page and its API with a tiny model, over HTTP as a client."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import numpy as np
import pytest
import torch

pytest.importorskip("gradio")

import httpx
from kling_programs.sample import demo
from kling_programs.sample.studio import views
from kling_programs.sample.studio.form import request_of
from kling_programs.sample.studio.page import build
from kling_programs.sample.studio.restore import fields_of, record_at
from kling_programs.sample.studio.shelf import Shelf
from kling_programs.sample.studio.studio import Studio
from kling_programs.sample.studio.uploads import Uploads
from safetensors.torch import save_file
from test_demo import Gate, drain, png
from test_generate import save_tiny

from kling import KlingPipeline, Request
from kling.condition.tasks import TASKS
from kling.data.video import probe
from kling.data.world.captions import vocabulary_summary
from kling.errors import UserError

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SHORT = {"duration": 0.5, "num_inference_steps": 2}


class Site:
    """A running page and its server. unable: what the model cannot do. more: options of kling-demo. save: writes the model."""

    def __init__(
        self,
        folder: Path,
        run: Path | None = None,
        unable: tuple[str, ...] = ("text_to_image",),
        more: tuple = (),
        save: Callable[[Path, list[str]], None] = save_tiny,
    ) -> None:
        self.arrivals, self.out = folder / "arrivals", folder / "out"
        self.arrivals.mkdir()
        os.environ["GRADIO_TEMP_DIR"] = str(self.arrivals)
        model = folder / "model"
        save(model, [task for task in (*TASKS, "camera") if task not in unable])
        args = demo.parse(["--model", str(model), "--device", "cpu", "--out", str(self.out), "--keep", "50", *more])
        args.run = None if run is None else str(run)
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


def test_weights_go_to_the_asked_device(tmp_path, monkeypatch):
    monkeypatch.setattr("kling.sampling.machine.pick_device", torch.device)  # the real one refuses a device without memory
    save_tiny(tmp_path / "model", ["text"])
    args = demo.parse(["--model", str(tmp_path / "model"), "--device", "meta", "--out", str(tmp_path / "out")])
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


@pytest.mark.parametrize("vocabulary", [None, "world"])
def test_what_a_small_model_understands_is_on_its_page_alone(tmp_path, vocabulary):
    save_tiny(tmp_path / "model", ["text"])
    pipe = KlingPipeline.from_pretrained(tmp_path / "model")
    pipe.register_to_config(vocabulary=vocabulary)
    shelf = Shelf(tmp_path / "out", {"path": "model", "sha256": {}})
    page = build(Studio(pipe, shelf.model, shelf, Uploads(tmp_path, shelf.inputs)))
    shown = [block for block in page.blocks.values() if getattr(block, "value", None) == vocabulary_summary()]
    assert len(shown) == (vocabulary == "world")


def test_visitors_choose_among_the_operator_s_models_and_loras(tmp_path):
    """Each choice gives the same frames as in the library, and its record names it; the form restores it."""
    folders, loras = tmp_path / "models", tmp_path / "loras"
    loras.mkdir()
    save_tiny(tmp_path / "own", ["text"])
    save_tiny(folders / "other", ["text"])
    other = KlingPipeline.from_pretrained(folders / "other")
    with torch.no_grad():
        other.transformer.proj_out.weight.mul_(2)
    other.save_pretrained(folders / "other")
    layers = {}
    for place in ("attn1.to_q", "attn1.to_out.0"):
        layers[f"transformer.blocks.0.{place}.lora_A.weight"] = torch.randn(2, 32)
        layers[f"transformer.blocks.0.{place}.lora_B.weight"] = torch.randn(32, 2)
    save_file(layers, loras / "style.safetensors")
    args = demo.parse(["--model", str(tmp_path / "own"), "--models", str(folders), "--loras", str(loras), "--out", str(tmp_path / "out")])
    studio, _, _ = demo.prepare(args, tmp_path / "arrivals")
    assert list(studio.models) == ["other"] and list(studio.loras) == ["style"]
    request, seen = Request("a ball", num_frames=5, num_inference_steps=2, seed=3), {}
    for fields in ({}, {"model": "other"}, {"lora": "style", "lora_scale": 0.5}, {"model": "other", "lora": "style", "lora_scale": -1}):
        made = drain(studio.make("a", request, weights=studio.weights_of(fields)))[1][0]
        lora = [(str(loras / "style.safetensors"), fields["lora_scale"])] if "lora" in fields else ()
        alone = KlingPipeline.from_pretrained(folders / "other" if "model" in fields else tmp_path / "own", lora=lora)
        expected = hashlib.sha256(np.ascontiguousarray(alone(request).frames[0])).hexdigest()
        assert made.record["frames"]["sha256"] == expected
        assert any("style.safetensors" in name for name in made.record["model"]["sha256"]) == ("lora" in fields)
        weights = studio.weights_from(made.record)
        assert weights == studio.weights_of(fields) and weights not in seen.values()
        restored, remarks = fields_of(made.record, studio)
        assert (restored["model"], restored["lora"], restored["seed"], remarks) == (weights.model, weights.lora, 3, [])
        seen[expected] = weights
    assert len(seen) == 4
    for bad in ({"model": "../own"}, {"lora": "x"}, {"lora": "style", "lora_scale": 9}):
        with pytest.raises(UserError):
            studio.weights_of(bad)
    assert studio._other[0] == weights  # one choice is kept loaded


def test_the_estimated_time_and_memory_grow_with_a_request(tmp_path):
    save_tiny(tmp_path / "own", ["text", "continuation"])
    studio, _, _ = demo.prepare(demo.parse(["--model", str(tmp_path / "own"), "--out", str(tmp_path / "out")]), tmp_path / "arrivals")
    requests = [Request(num_frames=5), Request(num_frames=41), Request(num_frames=41, num_inference_steps=50), Request(duration=15)]
    plans = [studio.pipe.plan(request) for request in requests]
    assert all(
        studio.needs(studio.pipe, plan, request)[0] is None for plan, request in zip(plans, requests, strict=True)
    )  # not measured yet
    drain(studio.make("a", requests[1]))
    seconds, memory = zip(*(studio.needs(studio.pipe, plan, request) for plan, request in zip(plans, requests, strict=True)), strict=True)
    assert seconds[0] < seconds[1] < seconds[2] and seconds[1] < seconds[3] and memory[0] <= memory[1] <= memory[3]
    assert seconds[2] / seconds[1] == pytest.approx(25)  # two steps are its own
    line = views.understood(0, plans[1], requests[1].replace(num_videos=3), None, (90.0, 3 * 2**30))
    assert "3 × 41 frames" in line and "about 1m30s, 3.0 GiB of memory" in line


def test_a_foreign_record_fills_the_form_as_far_as_possible_and_names_the_rest(site, tmp_path):
    """A record of the command line with missing files, settings that the page lacks, and another model."""
    record = json.loads(Path(site.ask(*site.fields(seed=5))[-1][1][0]["record"]["path"]).read_text())
    record["request"] |= {"image": "/home/me/a.png", "guidance_every": 3, "num_frames": 9, "duration": None, "camera": {"pan": 2.0}}
    record["inputs"] = {"/home/me/a.png": "0" * 64}
    record["model"]["sha256"] = {"transformer/config.json": "0" * 64}
    fields, remarks = fields_of(record, site.studio)
    assert fields["duration"] == 1.0 and fields["pan"] == 2.0 and fields["image"] is None and not fields["still"]
    assert dict(remarks) == {"again": {"names": "a.png"}, "elsewhere": {"names": "guidance_every"}, "other_model": {}}
    kept = png(site.studio.uploads.store / ("0" * 24 + ".png"))
    assert fields_of(record, site.studio)[0]["image"] == str(kept)  # known by its contents
    for digest in ("*", "../*", 5, None):
        record["inputs"] = {"/home/me/a.png": digest}
        assert fields_of(record, site.studio)[0]["image"] is None


def test_the_record_of_a_video_is_found_beside_it_inside_it_and_on_the_shelf(site, tmp_path):
    one = site.studio.shelf.get(Path(site.ask(*site.fields(seed=6))[-1][1][0]["video"]["path"]).stem)
    record, shelf = one.record, site.studio.shelf
    for name in ("a.json", "a.mp4.json"):
        (tmp_path / name).write_text(json.dumps(record))
        assert record_at(tmp_path / name, name, shelf) == record
    (tmp_path / "b.mp4").write_bytes(one.path.read_bytes())
    assert record_at(tmp_path / "b.mp4", "b.mp4", shelf) == record
    empty = Shelf(tmp_path / "empty", {})
    with pytest.raises(UserError) as error:
        record_at(tmp_path / "b.mp4", "b.mp4", empty)
    assert error.value.code == "not_a_record"
    with av.open(str(tmp_path / "b.mp4")) as old, av.open(str(tmp_path / "c.mp4"), "w", options={"movflags": "use_metadata_tags"}) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        new.metadata["comment"] = json.dumps(record)
        for packet in old.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                new.mux(packet)
    assert record_at(tmp_path / "c.mp4", "c.mp4", empty) == record
    for text in ("{}", "[" * 100_000, '{"request": 5}', "words"):
        (tmp_path / "d.json").write_text(text)
        with pytest.raises(UserError, match="says nothing"):
            record_at(tmp_path / "d.json", "d.json", shelf)


# --------------------------------------------------------------------------------------------------------------- as a client


def test_the_client_example(site, tmp_path):
    """The example of docs/studio.md, run unchanged."""
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
    """The message of a refusal, which contains no path and no trace."""
    name, data = events[-1]
    assert name != "complete", events
    text = json.dumps(data)
    assert not re.search(r"/(root|tmp|home|etc|usr|work)/|Traceback|File \\", text), text
    return text


def test_invalid_requests_are_refused_without_a_trace_or_a_path(site, tmp_path):
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
        ({"seed": "7"}, "Seed"),
        ({"duration": "5; rm -rf"}, "Seconds"),
        ({"camera": {"pan": "x"}}, "Pan"),
        ({"camera": {"prompt": "x"}}, "prompt"),
        ({"camera": {"video": "x"}}, "video"),
        ({"camera": {"pam": 1}}, "pam"),
        ({"camera": [1]}, "camera"),
        ({"still": True}, "not trained"),
        ({"keyframes": [{"file": mine, "frame": 99}]}, "frame 99"),
        ({"mode": "../x"}, "is unknown: choose from std, pro, fast"),
        ({"loop": 3}, "loop: give true or false"),
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


def test_twenty_requests_at_once_on_a_queue_of_eight(site, monkeypatch):
    """Eight wait, twelve are refused, and everybody gets their own video."""
    monkeypatch.setattr("kling_programs.sample.studio.jobs.UNHEARD", 300.0)  # on a busy machine a client is late to listen
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
    assert all("queue is full (8 are waiting)" in refused(events) for events in told)
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


def test_a_result_is_served_and_no_other_file_of_its_folder(site):
    made = site.ask(*site.fields(seed=5))[-1][1][0]
    for kind in ("video", "record"):
        path = Path(made[kind]["path"])
        assert path.parent == site.out and not list(site.arrivals.rglob(path.name))
        assert site.http.get(made[kind]["url"]).content == path.read_bytes()
    for beside in (f"{site.out}-2/x.mp4", f"{site.out}/../model/vae/config.json", str(site.studio.model["path"]) + "/model_index.json"):
        assert site.http.get(f"{site.url}gradio_api/file={beside}").status_code in (403, 404)
    path = Path(made["video"]["path"])
    for name in (path, Path(made["record"]["path"])):  # as when the shelf is tidied
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
