"""The studio without its page: the queue, what is handed in, the fields, the shelf, the command line."""

from __future__ import annotations

import base64
import gc
import io
import json
import math
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("gradio")

from kling_programs.sample import demo
from kling_programs.sample.studio.form import request_of
from kling_programs.sample.studio.jobs import Busy, ModelQueue, Stopped, Waiting
from kling_programs.sample.studio.shelf import Shelf
from kling_programs.sample.studio.studio import Step, sample
from kling_programs.sample.studio.uploads import Uploads
from test_generate import save_tiny

from kling import KlingPipeline, Request
from kling.cameras.axes import axes_trajectory
from kling.cameras.files import save_trajectory
from kling.condition.tasks import TASKS
from kling.data.video import write_video
from kling.errors import UserError

H, W = 64, 112


@pytest.fixture(scope="session")
def pipe(tmp_path_factory) -> KlingPipeline:
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny(folder, [*(task for task in TASKS if task != "text_to_image"), "camera"])
    pipe = KlingPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# ----------------------------------------------------------------------------------------------------------------- the queue


def drain(events) -> tuple[list, object]:
    seen = []
    try:
        while True:
            seen.append(next(events))
    except StopIteration as end:
        return seen, end.value


class Gate:
    """A job that holds the model until it is opened."""

    def __init__(self, queue: ModelQueue, visitor: str = "gate") -> None:
        self.open, entered = threading.Event(), threading.Event()

        def work(tell):
            entered.set()
            self.open.wait(300)

        self.thread = threading.Thread(target=lambda: drain(queue.run(visitor, work)))
        self.thread.start()
        assert entered.wait(10)


def test_a_job_tells_its_events_and_returns_its_result():
    events, result = drain(ModelQueue().run("a", lambda tell: [tell(1), tell(2)] and "done"))
    assert [e for e in events if not isinstance(e, Waiting)] == [1, 2] and result == "done"


def test_visitors_take_turns_and_no_more_than_the_bound_wait():
    queue, order, threads = ModelQueue(size=4), [], []
    gate = Gate(queue, "a")
    for visitor in "aaab":  # a has had a turn: b comes first, though last
        threads.append(threading.Thread(target=lambda v=visitor: drain(queue.run(v, lambda tell, v=v: order.append(v)))))
        threads[-1].start()
        while queue.waiting < len(threads):
            time.sleep(0.005)
    with pytest.raises(Busy, match="4 are waiting"):
        next(queue.run("c", lambda tell: None))
    gate.open.set()
    for thread in threads:
        thread.join(10)
    assert order == ["b", "a", "a", "a"] and queue.waiting == 0


@pytest.mark.parametrize("end", ["stop", "close"])
def test_a_job_stops_at_its_next_event_and_one_that_waits_never_starts(end):
    queue, told, started = ModelQueue(), [], []
    stopped = threading.Event()

    def work(tell):
        try:
            while True:
                tell(len(told))
                told.append(1)
                time.sleep(0.01)
        except Stopped:
            stopped.set()
            raise

    events = queue.run("a", work)
    next(events)
    behind = queue.run("b", lambda tell: started.append(1))
    assert isinstance(next(behind), Waiting)
    if end == "stop":
        queue.stop("b")
        queue.stop("a")
        with pytest.raises(Stopped):
            drain(behind)
        with pytest.raises(Stopped):
            drain(events)
    else:  # a closed tab
        behind.close()
        events.close()
    assert stopped.wait(5)
    count = len(told)
    time.sleep(0.05)
    assert len(told) == count and not started
    assert drain(queue.run("c", lambda tell: 7))[1] == 7  # the model's thread lives on


def test_a_mistake_in_a_job_reaches_who_waits_for_it():
    queue = ModelQueue()
    with pytest.raises(ZeroDivisionError):
        drain(queue.run("a", lambda tell: 1 / 0))
    with pytest.raises(UserError, match="no room"):
        drain(queue.run("a", lambda tell: (_ for _ in ()).throw(torch.OutOfMemoryError())))


def test_sampling_stops_within_a_step(pipe):
    steps = []

    def tell(event):
        steps.append(event)
        if event.step == 3:
            raise Stopped

    with pytest.raises(Stopped):
        sample(pipe, Request("a ball", num_frames=5, num_inference_steps=20), tell)
    assert max(e.step for e in steps) == 3 and any(e.preview is not None and e.preview.shape == (5, H, W, 3) for e in steps)


def test_a_stopped_job_leaves_no_tensor_behind(pipe):
    def held() -> int:
        return sum(o.numel() * o.element_size() for o in gc.get_objects() if torch.is_tensor(o))

    queue = ModelQueue()
    drain(queue.run("a", lambda tell: sample(pipe, Request("a ball", num_frames=41, num_inference_steps=3), tell)))
    gc.collect()
    before = held()
    events = queue.run("a", lambda tell: sample(pipe, Request("a ball", num_frames=41, num_inference_steps=50), tell))
    while not (isinstance(event := next(events), Step) and event.step == 2):
        pass
    working = held()
    queue.stop("a")
    with pytest.raises(Stopped):
        drain(events)
    deadline = time.time() + 10
    while held() - before >= 1024 and time.time() < deadline:  # the model's thread tidies up by itself
        time.sleep(0.05)
    assert held() - before < 1024 < working - before  # a longer schedule of levels is a few hundred bytes


# -------------------------------------------------------------------------------------------------------- what is handed in


@pytest.fixture
def uploads(tmp_path) -> Uploads:
    (tmp_path / "arrivals").mkdir()
    return Uploads(tmp_path / "arrivals", tmp_path / "store")


def png(path: Path, size=(40, 30)) -> Path:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(path)
    return path


def clip(path: Path, frames: int = 9) -> Path:
    write_video(path, np.random.default_rng(0).integers(0, 256, (frames, H, W, 3), dtype=np.uint8), 8)
    return path


def test_good_files_are_kept_by_their_contents(uploads):
    image, video = png(uploads.arrivals / "a b.png"), clip(uploads.arrivals / "c.mp4")
    poses = uploads.arrivals / "p.txt"
    save_trajectory(poses, axes_trajectory({"pan": 3}, 9, H, W))
    for file, kind in ((image, "image"), (video, "video"), (poses, "camera")):
        kept = uploads.accept({"path": str(file), "url": "http://evil.example/x"}, kind)
        assert Path(kept).parent == uploads.store and Path(kept).read_bytes() == file.read_bytes()
        assert uploads.accept(kept, kind) == kept  # a kept one may be named again
    assert uploads.accept(None, "image") is None and len(list(uploads.store.iterdir())) == 3


def test_one_upload_named_by_many_requests_at_once_is_kept_once(uploads):
    """A page checks a file, draws it and explains it in parallel."""
    image = png(uploads.arrivals / "a.png", (300, 300))
    kept, threads = [], []
    for _ in range(8):
        threads.append(threading.Thread(target=lambda: kept.append(uploads.accept({"path": str(image)}, "image"))))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(kept) == 8 and [str(path) for path in uploads.store.iterdir()] == [kept[0]]


def test_bad_files_are_refused_without_their_folder_and_deleted(uploads):
    wide, text, cut, words = (uploads.arrivals / name for name in ("wide.png", "t.mp4", "cut.mp4", "poses.txt"))
    Image.new("1", (6000, 6000)).save(wide)
    text.write_text("#EXTM3U\nfile:///etc/passwd")
    cut.write_bytes(clip(uploads.arrivals / "whole.mp4").read_bytes()[:900])
    words.write_text("1 2 3")
    bad = [
        (wide, "image", "megapixels"),
        (text, "video", "not a video"),
        (cut, "video", "cut.mp4 holds no whole frame"),
        (words, "camera", "3 columns"),
    ]
    for file, kind, message in bad:
        with pytest.raises(UserError, match=message) as error:
            uploads.accept({"path": str(file)}, kind)
        assert str(uploads.arrivals) not in str(error.value) and not file.exists()
    assert not list(uploads.store.iterdir())


def test_a_video_is_measured_before_it_is_decoded(uploads, monkeypatch):
    decoded = []
    monkeypatch.setattr("kling_programs.sample.studio.uploads.probe", decoded.append)
    for limit, value, message in (("MAX_FRAMES", 8, "9 frames"), ("MAX_FRAME", 100, "112x64"), ("MAX_BYTES", 50, "MiB")):
        with monkeypatch.context() as patch:
            patch.setattr(f"kling_programs.sample.studio.uploads.{limit}", value)
            file = clip(uploads.arrivals / "v.mp4")
            with pytest.raises(UserError, match=message):
                uploads.accept({"path": str(file)}, "video")
            assert not decoded and not file.exists()
    uploads.accept({"path": str(clip(uploads.arrivals / "v.mp4"))}, "video")
    assert decoded


def test_only_what_was_uploaded_can_be_named(uploads, tmp_path):
    outside = png(tmp_path / "secret.png")
    link = uploads.arrivals / "link.png"
    os.symlink(outside, link)
    named = [
        "/etc/passwd",
        str(outside),
        f"{uploads.arrivals}/../secret.png",
        str(link),
        "http://127.0.0.1/x.png",
        "a\0b",
        5,
        ["x"],
        {"url": "http://x"},
    ]
    for name in named:
        for payload in (name, {"path": name}, {"video": {"path": name}}):
            if payload == {"path": {"url": "http://x"}}:
                continue
            with pytest.raises(UserError, match="not uploaded here") as error:
                if uploads.accept(payload, "image") is None:
                    raise UserError("not uploaded here")  # names nothing
            assert str(tmp_path) not in str(error.value)
    assert outside.exists()


def test_a_drawing_is_a_png_and_nothing_else(uploads):
    data = io.BytesIO()
    Image.new("L", (W, H), 255).save(data, "PNG")
    url = "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
    assert Path(uploads.accept_drawing(url)).is_file() and uploads.accept_drawing(None) is None
    for bad in ("data:text/html;base64,AAAA", url[:60], "data:image/png;base64,!!!", 5, "file:///etc/passwd", url + "A" * 2_000_000):
        with pytest.raises(UserError, match="mask"):
            uploads.accept_drawing(bad)
    assert len(list(uploads.store.iterdir())) == 1


# ---------------------------------------------------------------------------------------------------------------- the fields


def test_fields_become_the_request(uploads):
    image = png(uploads.arrivals / "a.png")
    fields = {
        "prompt": "a ball",
        "image": {"path": str(image)},
        "pan": 5,
        "zoom": 0,
        "mode": "pro",
        "seed": 3,
        "aspect": "auto",
        "duration": 2,
    }
    request = request_of(fields | {"keyframes": [{"file": {"path": str(image)}, "frame": 8, "strength": 0.5}]}, uploads)
    assert request.camera == "pan=5" and request.mode == "pro" and request.seed == 3 and request.aspect is None
    assert Path(request.image).parent == uploads.store and request.keyframes[0][1:] == (8, 0.5)
    video = {"video": {"path": str(clip(uploads.arrivals / "v.mp4"))}, "strength": 0.4, "outpaint": "9:16"}
    assert request_of({**video, "use": "restyle"}, uploads).strength == 0.4
    assert request_of({**video, "use": "outpaint"}, uploads).outpaint == "9:16"
    plain = request_of(video, uploads)
    assert plain.camera_guidance_scale is None and request_of({"camera_guidance_scale": 1.0}, uploads).camera_guidance_scale == 1
    assert plain.video and plain.strength is None and plain.outpaint is None and plain.mask is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": "x" * 10_000}, "10000 characters"),
        ({"prompt": 5}, "prompt"),
        ({"seed": math.nan}, "seed"),
        ({"seed": "7"}, "seed"),
        ({"seed": 1.5}, "whole"),
        ({"seed": True}, "seed"),
        ({"pan": math.inf}, "pan"),
        ({"pan": 11}, "pan 11"),
        ({"duration": 1e9}, "duration"),
        ({"num_inference_steps": 10**6}, "num_inference_steps"),
        ({"mode": "hq"}, "mode"),
        ({"use": {"a": 1}}, "use"),
        ({"loop": "yes"}, "loop"),
        ({"keyframes": "x"}, "keyframes"),
        ({"keyframes": [{"frame": 3}]}, "keyframes"),
        ({"output": "/etc"}, "unknown field"),
    ],
)
def test_bad_fields_are_refused_by_name(uploads, fields, message):
    with pytest.raises(UserError, match=message) as error:
        request_of(fields, uploads)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


# ----------------------------------------------------------------------------------------------------------------- the shelf


def test_the_shelf_keeps_the_newest_and_what_they_were_made_from(pipe, tmp_path):
    shelf = Shelf(tmp_path / "out", {"path": "m", "sha256": {}}, keep=2)
    names, inputs = [], []
    for i in range(4):
        picture = png(shelf.inputs / f"{i}.png", (10 + i, 10))
        os.utime(picture, (1, 1))
        request = Request("a", image=str(picture), seed=i, num_frames=5)
        result = shelf.put(np.full((5, H, W, 3), 60 * i, np.uint8), request, pipe.plan(request), pipe, 1.0)
        os.utime(result.record_path, (i + 10, i + 10))
        names.append(result.id)
        inputs.append(picture)
    shelf._tidy()
    assert shelf.get(names[3]).record["request"]["seed"] == 3 and shelf.get(names[2]).path.is_file()
    assert [p.exists() for p in inputs] == [False, False, True, True]
    assert len(list(shelf.folder.glob("*.mp4"))) == len(list(shelf.folder.glob("*.mp4.json"))) == 2
    for bad in (names[0], "../x", "", None, "a" * 16, 5):
        with pytest.raises(UserError, match="no longer here"):
            shelf.get(bad)
    old = shelf.get(names[3]).record_path  # as earlier versions named it
    old.rename(shelf.folder / f"{names[3]}.json")
    assert shelf.get(names[3]).record["request"]["seed"] == 3 and shelf.get(names[3]).record_path.name == f"{names[3]}.json"
    os.utime(shelf.folder / f"{names[3]}.json", (1, 1))
    shelf.keep = 1
    shelf._tidy()
    assert sorted(p.name for p in shelf.folder.iterdir()) == [f"{names[2]}.mp4", f"{names[2]}.mp4.json", "inputs"]


# --------------------------------------------------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--listen"], "--auth USER:PASSWORD"),
        (["--listen", "--auth", "me"], "USER:PASSWORD"),
        (["--port", "99999"], "99999"),
        (["--run", "nowhere"], "nowhere"),
        (["--keep", "0"], "--keep 0"),
        (["--modle", "x"], "--modle"),
    ],
)
def test_mistakes_are_one_line(argv, message, capsys):
    with pytest.raises(SystemExit) as exit:
        demo.main(argv)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and message in error and error.count("\n") == 1 and error.startswith("error: ")


def test_a_record_of_the_page_replays(pipe, tmp_path):
    """The JSON of a result holds everything: the same frames come out of its request."""
    from kling.sampling.record import request_of as recorded

    shelf = Shelf(tmp_path, {"path": "m", "sha256": {}})
    request = Request("a ball", num_frames=5, seed=9, camera={"pan": 3.0})
    frames, plan = sample(pipe, request, lambda event: None)
    record = json.loads(shelf.put(frames, request, plan, pipe, 0.1).record_path.read_text())
    assert np.array_equal(pipe(recorded(record, "x")).frames[0], frames)
