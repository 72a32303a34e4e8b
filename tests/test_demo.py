"""The studio without its page: the queue, uploads, the fields, the shelf, the command line."""

from __future__ import annotations

import base64
import gc
import io
import json
import math
import os
import resource
import threading
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("gradio")

from kling_programs.sample import demo
from kling_programs.sample.studio import jobs, studio
from kling_programs.sample.studio.form import apart, request_of
from kling_programs.sample.studio.jobs import Busy, ModelQueue, Stopped, Waiting
from kling_programs.sample.studio.shelf import Shelf
from kling_programs.sample.studio.studio import Step, Studio, sample
from kling_programs.sample.studio.uploads import Uploads
from test_generate import save_tiny
from test_pipeline import tiny_pipeline
from test_video import make

from kling import KlingPipeline, KlingTransformer3DModel, Request
from kling.cameras.axes import axes_trajectory
from kling.cameras.files import save_trajectory
from kling.condition.tasks import TASKS
from kling.data.video import VideoWriter, probe, read_video, write_gif, write_video
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
    """A job that occupies the model until it is opened."""

    def __init__(self, queue: ModelQueue, visitor: str = "gate") -> None:
        self.open, entered = threading.Event(), threading.Event()

        def work(tell):
            entered.set()
            self.open.wait(300)

        self.thread = threading.Thread(target=lambda: drain(queue.run(visitor, work)))
        self.thread.start()
        assert entered.wait(10)


def test_a_job_reports_its_events_and_returns_its_result():
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
def test_a_running_job_stops_at_its_next_event_and_a_waiting_one_never_starts(end):
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


def test_an_error_in_a_job_reaches_its_listener():
    queue = ModelQueue()
    with pytest.raises(ZeroDivisionError):
        drain(queue.run("a", lambda tell: 1 / 0))
    with pytest.raises(UserError, match="no room"):
        drain(queue.run("a", lambda tell: (_ for _ in ()).throw(torch.OutOfMemoryError())))


def following(queue: ModelQueue, owner: str) -> tuple[list, list]:
    """Follow a job in the background: what it reported, and how it ended."""
    seen, end = [], []

    def draw() -> None:
        try:
            found = drain(queue.follow(owner))
            seen.extend(found[0])
            end.append(found[1])
        except BaseException as error:
            end.append(error)

    thread = threading.Thread(target=draw)
    thread.start()
    thread.join(20)
    return seen, end


def test_a_job_of_a_page_continues_while_its_tab_is_reloaded_and_no_longer(monkeypatch):
    monkeypatch.setattr(jobs, "ALONE", 1.5)
    queue, go = ModelQueue(), threading.Event()

    def work(tell):
        tell("first")
        while not go.wait(0.02):
            tell(7)
        return "done"

    events = queue.run("a", work, "tab", keep=True)
    assert next(events) == "first"
    events.close()  # the tab is left
    time.sleep(0.3)
    again = queue.follow("tab")
    assert "first" in (next(again), next(again)) and queue.running  # what was told last is told again
    late = queue.follow("tab")  # a second listener takes over
    next(late)
    assert drain(again)[1] is None
    late.close()
    go.set()
    seen, end = following(queue, "tab")
    assert end == ["done"]
    assert following(queue, "tab")[1] == ["done"]  # until the tab has seen it
    queue.forget("tab")
    assert queue.job("tab") is None and following(queue, "tab")[1] == [None]

    go.clear()
    left = queue.run("a", work, "tab", keep=True)
    next(left)
    left.close()
    deadline = time.time() + 10
    while queue.running and time.time() < deadline:
        time.sleep(0.05)
    assert not queue.running and isinstance(following(queue, "tab")[1][0], Stopped)


def test_a_job_without_a_listener_ends_although_its_generator_is_read(monkeypatch):
    monkeypatch.setattr(jobs, "UNHEARD", 0.5)
    queue = ModelQueue()

    def work(tell):
        while True:
            tell(1)
            time.sleep(0.02)

    with pytest.raises(Stopped):
        drain(queue.run("a", work, listening=lambda: False))
    gate = Gate(queue)
    with pytest.raises(Stopped):  # one that waits, likewise
        drain(queue.run("b", work, listening=lambda: False))
    assert queue.waiting == 0
    gate.open.set()


def test_a_visitor_has_a_share_of_places_and_of_time():
    queue = ModelQueue(places=2, seconds=0.2)
    gate = Gate(queue, "a")
    second = queue.run("a", lambda tell: 1)
    next(second)
    with pytest.raises(Busy, match="2 videos") as error:
        next(queue.run("a", lambda tell: 1))
    assert error.value.code == "no_place"
    assert isinstance(next(queue.run("b", lambda tell: 1)), Waiting)  # others have theirs
    time.sleep(0.3)
    gate.open.set()
    gate.thread.join(10)
    second.close()
    while queue.running:
        time.sleep(0.01)
    with pytest.raises(Busy, match="try again in 60 minutes") as error:
        next(queue.run("a", lambda tell: 1))
    assert error.value.code == "no_time" and drain(queue.run("c", lambda tell: 1))[1] == 1


def test_one_job_ends_when_it_has_used_a_whole_share():
    """Else eight videos of a minute would hold the model for hours, whatever a visitor's share is; what was told before is kept."""
    queue, told = ModelQueue(seconds=0.3), []
    events = queue.run("a", lambda tell: [(tell(i), time.sleep(0.05)) for i in range(1000)])
    with pytest.raises(Busy, match="ask for fewer or shorter") as error:
        while True:
            told.append(next(events))
    assert error.value.code == "too_long" and 2 < len(told) < 100
    assert drain(ModelQueue().run("a", lambda tell: [tell(i) for i in range(1000)] and "done"))[1] == "done"


def follows(queue: ModelQueue, visitor: str, work, **settings) -> tuple[list, threading.Thread]:
    """A thread that reads a job to its end: ["done", result] or ["stopped"]."""
    seen: list = []

    def read() -> None:
        try:
            seen.extend(["done", drain(queue.run(visitor, work, **settings))[1]])
        except Stopped:
            seen.append("stopped")

    thread = threading.Thread(target=read)
    thread.start()
    return seen, thread


def until(condition) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_preview_waits_for_all_other_jobs_and_makes_way_for_the_next():
    queue, order = ModelQueue(places=2), []
    gate = Gate(queue, "a")
    rough, first = follows(queue, "b", lambda tell: order.append("rough"), rough=True)
    until(lambda: len(queue._waiting) == 1)
    second = queue.run("a", lambda tell: order.append("real"))  # comes later, and from a visitor who was just served
    place = next(second).place
    assert (place, queue.waiting) == (1, 1)
    gate.open.set()
    drain(second)
    first.join(10)
    assert order == ["real", "rough"] and rough == ["done", None]

    started = threading.Event()

    def steps(tell) -> None:
        while True:
            started.set()
            tell(0)
            time.sleep(0.01)

    running, third = follows(queue, "b", steps, rough=True)
    assert started.wait(10)
    assert drain(queue.run("c", lambda tell: 7))[1] == 7
    third.join(10)
    assert running == ["stopped"]


def test_a_visitor_has_one_preview_which_uses_no_place():
    queue = ModelQueue(size=1, places=1)
    gate = Gate(queue, "a")
    old, first = follows(queue, "a", lambda tell: "old", rough=True)
    until(lambda: len(queue._waiting) == 1)
    new, second = follows(queue, "a", lambda tell: "new", rough=True)
    first.join(10)
    assert old == ["stopped"]
    waiting = queue.run("b", lambda tell: 1)
    assert isinstance(next(waiting), Waiting)  # the preview does not fill the queue
    gate.open.set()
    assert drain(waiting)[1] == 1
    second.join(10)
    assert new == ["done", "new"]


def test_a_rough_clip_is_overtaken_by_the_next(pipe, uploads, tmp_path):
    """Of three, the first stops within a step and the second is never begun: one clip, of the last words, in two steps of one pass of the
    few-step weights; none on the shelf."""
    fast = KlingTransformer3DModel(**{k: v for k, v in pipe.transformer.config.items() if not k.startswith("_")} | {"gate_value": 0.25})
    quick = KlingPipeline(
        pipe.vae, pipe.transformer, pipe.text_encoder, pipe.scheduler, pipe.config["capabilities"], transformer_fast=fast, max_frames=17
    )
    quick.set_progress_bar_config(disable=True)
    studio = Studio(quick, {"path": "", "sha256": {}}, Shelf(tmp_path / "out", {}), uploads)
    passes, answers, release = [], {}, threading.Event()

    def hold(*_: object) -> None:
        passes.append("fast")
        assert release.wait(60)

    fast.register_forward_pre_hook(hold)
    quick.transformer.register_forward_hook(lambda *_: passes.append("std"))

    def ask(words: str) -> None:
        answers[words] = studio.rough("a", Request(words, duration=9.0, guidance_scale=4.0, negative_prompt="dark", num_videos=3))

    threads = {words: threading.Thread(target=ask, args=(words,)) for words in ("a", "a red", "a red ball")}
    threads["a"].start()
    until(lambda: passes)
    threads["a red"].start()
    until(lambda: studio.queue._running.stopped.is_set() and studio.queue._waiting)
    threads["a red ball"].start()
    threads["a red"].join(60)  # while the first still computes
    release.set()
    for thread in threads.values():
        thread.join(60)
    assert answers["a"] is None and answers["a red"] is None
    assert answers["a red ball"].shape == (17, H, W, 3) and passes == ["fast"] * 3
    assert not list((tmp_path / "out").rglob("*.mp4"))


def test_sampling_stops_within_a_step(pipe):
    steps = []

    def tell(event):
        steps.append(event)
        if event.step == 3:
            raise Stopped

    with pytest.raises(Stopped):
        sample(pipe, Request("a ball", num_frames=5, num_inference_steps=20), tell)
    assert max(e.step for e in steps) == 3 and any(e.preview is not None and e.preview.shape == (5, H, W, 3) for e in steps)


def test_previews_have_the_length_of_their_clip(monkeypatch: pytest.MonkeyPatch):
    """Each frame a step behind the one before: the first clip takes 2 + 4 steps, its continuation, which is shorter, 2 + 3."""
    monkeypatch.setattr(studio, "PREVIEW_SHARE", math.inf)
    pipe, steps = tiny_pipeline(capabilities=["text", "continuation", "diffusion_forcing"]), []
    sample(pipe, Request("a ball", num_frames=17, extend_to=2.5, num_inference_steps=2, frame_delay=1), steps.append)
    assert [len(e.preview) for e in steps if e.preview is not None] == [17] * 6 + [13] * 4


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


def test_an_upload_named_by_several_requests_at_once_is_kept_once(uploads):
    """A page checks, draws and explains a file in parallel requests."""
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
    monkeypatch.setattr("kling_programs.sample.studio.uploads.probe", lambda path: decoded.append(path) or probe(path))
    for limit, value, message in (("MAX_FRAMES", 8, "8 frames"), ("MAX_FRAME", 100, "112x64"), ("MAX_BYTES", 50, "MiB")):
        with monkeypatch.context() as patch:
            patch.setattr(f"kling_programs.sample.studio.uploads.{limit}", value)
            file = clip(uploads.arrivals / "v.mp4")
            with pytest.raises(UserError, match=message):
                uploads.accept({"path": str(file)}, "video")
            assert not decoded and not file.exists()
    uploads.accept({"path": str(clip(uploads.arrivals / "v.mp4"))}, "video")
    assert decoded


def sparse(path: Path, frames: int = 10, apart: float = 590.0) -> Path:
    """A few kilobytes of video whose frames are minutes apart."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "40"})
        stream.width, stream.height, stream.pix_fmt = W, H, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(np.full((H, W, 3), 20 * i, np.uint8), format="rgb24")
            frame.pts, frame.time_base = int(1000 * apart * i), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def test_a_few_frames_far_apart_are_counted_after_resampling(pipe, uploads, tmp_path, monkeypatch):
    """Ten frames 590 s apart are 42 000 frames at 8 fps: the library refuses to read them, and the page uses the first minute."""
    file = sparse(tmp_path / "s.mp4")
    assert file.stat().st_size < 8000 and probe(file).count(8) > 42_000
    monkeypatch.setattr("kling.data.video.read_video", None)  # nothing is decoded
    with pytest.raises(UserError, match="lasts 5[0-9]{3} s: give at most 180 s") as error:
        pipe.plan(Request(video=str(file)))
    assert error.value.code == "video_too_long"
    monkeypatch.undo()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.process_time()
    kept = uploads.accept({"path": str(sparse(uploads.arrivals / "s.mp4"))}, "video")
    info = probe(kept)
    assert info.frames == 480 and abs(info.duration - 60) < 0.2 and time.process_time() - began < 20
    assert pipe.plan(Request(video=kept, strength=0.5)).frames == pipe.config.max_frames  # a part of it is read
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 150_000  # KiB


def test_a_restyled_video_is_read_only_as_far_as_the_model_uses(pipe, tmp_path, monkeypatch):
    """And it is scaled while reading: no frame is held at full size, unless that is smaller."""
    write_video(tmp_path / "v.mp4", np.random.default_rng(0).integers(0, 256, (60, 256, 448, 3), dtype=np.uint8), 8)
    read, asked = [], {"video": str(tmp_path / "v.mp4")}
    monkeypatch.setattr("kling.data.video.read_video", lambda *a, **k: read.append(read_video(*a, **k)) or read[-1])
    pipe.plan(Request(strength=0.5, **asked))
    pipe.plan(Request(outpaint="9:16", **asked))
    pipe.plan(Request(**asked))
    assert [tuple(clip.frames.shape) for clip in read] == [(41, H, W, 3), (41, 37, H, 3), (60, H, W, 3)]


def test_a_large_video_is_reduced_and_the_page_says_so(uploads):
    file = uploads.arrivals / "IMG_1.mp4"
    with VideoWriter(file, 30, crf=40) as out:  # 2 s of 1080p30
        for i in range(60):
            out.write(np.full((1080, 1920, 3), 4 * i, np.uint8))
    os.utime(file, (5, 5))
    kept = uploads.accept({"path": str(file)}, "video")
    info = probe(kept)
    assert (info.width, info.height, info.frames, info.fps) == (200, 112, 16, 8.0)  # covers 112x64, 64x112 and 80x80
    assert uploads.note({"path": str(file)}) == {"name": "IMG_1.mp4", "size": "200x112", "seconds": 2.0, "of": 2.0}
    assert np.allclose(read_video(kept).frames.float().mean((1, 2, 3)), [4 * round(i * 30 / 8 - 0.01) for i in range(16)], atol=3)
    small = clip(uploads.arrivals / "own.mp4")
    assert uploads.note({"path": str(small)}) is None and Path(uploads.accept(str(small), "video")).read_bytes() == small.read_bytes()


def test_what_no_browser_plays_is_shown_as_a_copy(uploads):
    frames = np.stack([np.full((64, 112, 3), 20 * i, np.uint8) for i in range(9)])
    write_gif(uploads.arrivals / "a.gif", frames, 8)
    make(uploads.arrivals / "a.avi", codec="mpeg4")
    make(uploads.arrivals / "h264.mkv")
    for name in ("a.gif", "a.avi", "h264.mkv"):
        path = str(uploads.arrivals / name)
        kept = uploads.accept({"path": path}, "video")
        info = probe(kept)
        assert kept.endswith(".mp4") and info.codec == "h264" and info.pix_fmt == "yuv420p" and uploads.note({"path": path})
    make(uploads.arrivals / "a.webm", codec="libvpx-vp9", deadline="realtime")
    path = str(uploads.arrivals / "a.webm")
    assert uploads.note({"path": path}) is None and uploads.accept({"path": path}, "video").endswith(".webm")


def test_a_refused_file_keeps_its_reason_for_every_request_of_the_page(uploads):
    """The page checks, draws and explains the file; every request after the first finds it deleted."""
    bad = uploads.arrivals / "a.png"
    for _ in range(2):  # and if it is uploaded again
        bad.write_bytes(b"words")
        told, threads = [], []

        def ask() -> None:
            try:
                uploads.accept({"path": str(bad)}, "image")
            except UserError as error:
                told.append((error.code, str(error)))  # noqa: B023 - each round waits for its threads

        for _ in range(8):
            threads.append(threading.Thread(target=ask))
            threads[-1].start()
        for thread in threads:
            thread.join(20)
        assert len(told) == 8 and {code for code, _ in told} == {"not_an_image"} and len({line for _, line in told}) == 1
        assert not bad.exists()
    with pytest.raises(UserError) as error:
        uploads.accept({"path": str(uploads.arrivals / "never.png")}, "image")
    assert error.value.code == "not_uploaded"


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
    assert plain.brush_guidance_scale is None and plain.reference_guidance_scale is None
    guided = {"tracks": [{"points": [[0.5, 0.5]]}], "references": [{"path": str(png(uploads.arrivals / "r.png"))}], "prompt": "a"}
    guided = request_of(guided | {"brush_guidance_scale": 4, "reference_guidance_scale": 2.5}, uploads)
    assert (guided.brush_guidance_scale, guided.reference_guidance_scale) == (4, 2.5)
    assert plain.video and plain.strength is None and plain.outpaint is None and plain.mask is None


def test_a_seed_of_minus_one_is_drawn_and_several_videos_have_their_own(uploads):
    drawn = {request_of({"seed": -1}, uploads).seed for _ in range(4)}
    assert len(drawn) == 4 and all(0 <= seed < 2**32 for seed in drawn)
    three = apart(request_of({"seed": 2**32 - 1, "num_videos": 3, "prompt": "a"}, uploads))
    assert [(one.seed, one.num_videos, one.prompt) for one in three] == [(2**32 - 1, 1, "a"), (0, 1, "a"), (1, 1, "a")]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": "x" * 10_000}, "10000 characters"),
        ({"prompt": 5}, "prompt"),
        ({"seed": math.nan}, "seed"),
        ({"seed": 10**400}, "seed"),
        ({"seed": -2}, "seed"),
        ({"duration": -(10**400)}, "duration"),
        ({"num_videos": 1000}, "num_videos"),
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


def test_no_visitor_displaces_the_results_of_others(pipe, tmp_path):
    shelf, made = Shelf(tmp_path / "out", {"path": "m", "sha256": {}}, keep=4), []
    for i, visitor in enumerate("baaaaaa"):
        request = Request("a", seed=i, num_frames=5)
        made.append(shelf.put(np.zeros((5, H, W, 3), np.uint8), request, pipe.plan(request), pipe, 1.0, visitor))
        os.utime(made[-1].record_path, (i + 10, i + 10))
    assert [one.path.exists() for one in made] == [True, False, False, False, True, True, True]


def test_a_result_is_available_as_gif_and_webm(pipe, tmp_path):
    shelf = Shelf(tmp_path / "out", {"path": "m", "sha256": {}})
    request = Request("a", num_frames=5)
    frames = np.stack([np.full((H, W, 3), 50 * i, np.uint8) for i in range(5)])
    one = shelf.put(frames, request, pipe.plan(request), pipe, 1.0)
    for kind in ("gif", "webm"):
        shelf.convert(f"{one.id}.{kind}")
        clip = read_video(one.path.with_suffix(f".{kind}"))
        assert len(clip.frames) == 5 and abs(clip.fps - 8) < 0.5  # a GIF ticks 100 times a second
        assert np.allclose(clip.frames.float().mean((1, 2, 3)), frames.mean((1, 2, 3)), atol=3)
    for bad in ("x.gif", f"{one.id}.exe", "../a.gif", f"{'0' * 16}.gif"):
        shelf.convert(bad)
    assert len(list(shelf.folder.iterdir())) == 5  # video, record, inputs, gif, webm
    assert len(shelf.results()) == 1


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
    old = shelf.get(names[3]).record_path.rename(shelf.folder / f"{names[3]}.json")  # as earlier versions named it
    assert shelf.get(names[3]).record_path == old and shelf.results()[0].id == names[3]
    for bad in (names[0], "../x", "", None, "a" * 16, 5):
        with pytest.raises(UserError, match="no longer here"):
            shelf.get(bad)
    os.utime(old, (1, 1))
    shelf.keep = 1
    shelf._tidy()
    assert sorted(p.name for p in shelf.folder.iterdir()) == [f"{names[2]}.mp4", f"{names[2]}.mp4.json", "inputs"]


# --------------------------------------------------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--listen"], "--auth FILE"),
        (["--listen", "--auth", "me"], "no such file"),
        (["--auth", "me:secret"], "everybody on this machine can read"),
        (["--tls-cert", "x.pem"], "--tls-key is missing"),
        (["--places", "0"], "--places 0"),
        (["--minutes", "nan"], "--minutes nan"),
        (["--server", "cluster:8000"], "give http://HOST/"),
        (["--server", "http://x y"], "give http://HOST/"),
        (["--server", "http://x:99999"], "give http://HOST/"),
        (["--host", "https://video.example.org"], "give a name alone"),
        (["--host", "a b"], "give a name alone"),
        (["--models", "/nowhere"], "model_index.json"),
        (["--loras", "/nowhere"], ".safetensors"),
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
    """The JSON of a result is complete: its request gives the same frames."""
    from kling.sampling.record import request_of as recorded

    shelf = Shelf(tmp_path, {"path": "m", "sha256": {}})
    request = Request("a ball", num_frames=5, seed=9, camera={"pan": 3.0})
    frames, plan = sample(pipe, request, lambda event: None)
    record = json.loads(shelf.put(frames, request, plan, pipe, 0.1).record_path.read_text())
    assert np.array_equal(pipe(recorded(record, "x")).frames[0], frames)
