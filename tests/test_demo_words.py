"""The words of the page: all in both languages, the library's messages in Chinese, and the description of the task."""

# ruff: noqa: F811 - arguments are fixtures

from __future__ import annotations

import math
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
import torch
from kling_programs.sample.studio import look, runs, views
from kling_programs.sample.studio.events import Events
from kling_programs.sample.studio.form import FIELDS, check_used, request_of
from kling_programs.sample.studio.jobs import ModelQueue
from kling_programs.sample.studio.mistakes import LINES, told_to, without_folders
from kling_programs.sample.studio.research import Research
from kling_programs.sample.studio.restore import record_at
from kling_programs.sample.studio.shelf import Shelf
from kling_programs.sample.studio.words import CHINESE_TASKS, WORDS
from PIL import Image
from test_demo import H, W, clip, drain, pipe, png, sparse, uploads  # noqa: F401 - pipe and uploads are fixtures

from kling import KlingPipeline, Request, Track
from kling.cameras.axes import axes_trajectory
from kling.cameras.files import save_trajectory
from kling.data.video import write_video
from kling.errors import UserError
from kling.sampling.enhance import Enhancer
from kling.sampling.plan import TASK_TITLES as PLANNED
from kling.sampling.plan import check_flow_map


def test_common_errors_are_translated_to_chinese(pipe, uploads, tmp_path, monkeypatch):
    """Every line of the table translates a real error: none is unused, and each keeps its values."""
    image, movie = str(png(uploads.store / "a.png")), str(clip(uploads.store / "v.mp4"))
    wide = str(uploads.store / "wide.mp4")
    write_video(wide, np.zeros((5, 64, 112, 3), np.uint8), 8)
    page, no_model = SimpleNamespace(studio=SimpleNamespace(uploads=uploads)), lambda tell: (_ for _ in ()).throw(torch.OutOfMemoryError())

    def handed_in(data: bytes | Image.Image, kind: str, name: str = "x.png", **saving: Any) -> str | None:
        path = uploads.arrivals / name
        path.write_bytes(data) if isinstance(data, bytes) else data.save(path, **saving)
        return uploads.accept({"path": str(path)}, kind)

    def limited(limit: str) -> str | None:
        with monkeypatch.context() as patch:
            patch.setattr(f"kling_programs.sample.studio.uploads.{limit}", 8)
            return handed_in(Path(movie).read_bytes(), "video", "v.mp4")

    def full(visitor: str = "a", **limits: Any) -> None:
        queue = ModelQueue(**limits)
        if limits.get("seconds"):
            drain(queue.run(visitor, lambda tell: time.sleep(0.01)))
        next(queue.run(visitor, no_model))

    def too_long() -> None:
        with monkeypatch.context() as patch:
            patch.setattr("kling.sampling.inputs.MAX_SECONDS", 0.5)
            pipe.plan(Request(video=movie))

    def without_sound() -> str | None:
        with av.open(str(tmp_path / "s.mp4"), "w") as out:
            stream = out.add_stream("aac", rate=8000)
            sound = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), format="fltp", layout="stereo")
            sound.sample_rate = 8000
            out.mux([*stream.encode(sound), *stream.encode()])
        return handed_in((tmp_path / "s.mp4").read_bytes(), "video", "s.mp4")

    def in_mode_fast() -> None:
        able = [*pipe.config.capabilities, "shots"]
        parts = pipe.vae, pipe.transformer, pipe.text_encoder, pipe.scheduler, able
        KlingPipeline(*parts, transformer_fast=pipe.transformer, max_frames=17).plan(Request(shots=[("x", 1), ("y", 1)], mode="fast"))

    class Chat(dict):
        """A chat model that writes nothing."""

        device = pad_token_id = folder = "cpu"
        apply_chat_template = to = lambda self, *_, **__: self
        generate = lambda self, **_: torch.zeros(1, 1)  # noqa: E731
        decode = lambda self, *_, **__: ""  # noqa: E731

    def enhanced() -> None:
        chat = Chat(input_ids=torch.zeros(1, 1))
        Enhancer.__call__(SimpleNamespace(tokenizer=chat, model=chat, folder="chat"), "x", pipe)

    point = Track(None, ((1.0, 1.0),))
    noise = png(tmp_path / "n.png", (200, 200)).read_bytes()
    mistakes = [
        *(lambda f=f: request_of(f, uploads) for f in ({"prompt": "x" * 9999}, {"seed": 1.5}, {"seed": math.nan}, {"pan": 11})),
        *(lambda f=f: request_of(f, uploads) for f in ({"prompt": 5}, {"prompt": "\ud800"}, {"loop": 3}, {"mode": "x"}, {"shots": 5})),
        *(lambda rows=rows: request_of({"shots": rows}, uploads) for rows in ([_row(60), _row(1)], [_row(1, camera="y")])),
        lambda: request_of({"tracks": [{}]}, uploads),
        lambda: check_used({"strength": 0.5, "use": "continue"}),
        lambda: pipe.plan(Request("x" * 300)),
        lambda: Request(video=movie, image=image),
        lambda: Request(video=movie, strength=0.5, tracks=[point]),
        lambda: pipe.plan(Request(tracks=[Track(None, ((500.0, 1.0),))])),
        lambda: pipe.plan(Request(tracks=[Track(image, ((1.0, 1.0),))])),
        lambda: pipe.plan(Request(num_frames=1, camera="pan=3")),
        lambda: pipe.plan(Request(duration=2, extend_to=0.5)),
        lambda: pipe.plan(Request(mode="fast")),
        lambda: check_flow_map(Request(guidance_scale=3)),
        lambda: check_flow_map(Request(num_inference_steps=1000)),
        lambda: request_of({"brush_guidance_scale": 3}, uploads),
        in_mode_fast,
        enhanced,
        lambda: pipe.plan(Request(shots=[("x", 0.1)])),
        without_sound,
        lambda: handed_in(sparse(tmp_path / "j.mp4", 3, 700).read_bytes(), "video", "j.mp4"),
        lambda: handed_in(Image.new("F", (9, 9)), "image", "x.tif"),
        lambda: request_of({"camera_file": _poses(uploads.store), "pan": 3}, uploads),
        lambda: request_of({"video": movie, "use": "fill"}, uploads),
        lambda: request_of({"keyframes": [{}] * 9}, uploads),
        lambda: request_of({"tracks": [{}] * 17}, uploads),
        *(lambda rows=rows: request_of({"shots": rows}, uploads) for rows in ([{}] * 7, [{"prompt": " "}])),
        lambda: request_of({"shots": [{"prompt": "x", "seconds": 1}], "loop": True}, uploads),
        lambda: pipe.plan(Request(shots=[("x", 1), ("y", 0.1)])),
        lambda: Request(references=[image] * 5),
        lambda: pipe.plan(Request(num_frames=1)),
        lambda: Request(image=image, last_image=image, loop=True),
        lambda: uploads.accept_drawing("data:image/png;base64,!!!"),
        lambda: next(Events.add_keyframe.__wrapped__(page, None, None, 0, 1, [], 5)),
        lambda: pipe.plan(Request(keyframes=[(image, 50, 1.0)], num_frames=9)),
        lambda: pipe.plan(Request(video=movie, keyframes=[(image, 2, 1.0)])),
        lambda: pipe.plan(Request(keyframes=[(image, 3, 1.0), (image, 3, 0.5)], duration=20)),
        lambda: pipe.plan(Request(video=movie, extend_to=0.5)),
        lambda: pipe.plan(Request(video=wide, outpaint="16:9")),
        lambda: look.read_scales("a"),
        lambda: runs.choice([]),
        lambda: next(Research.reconstruct.__wrapped__(page, None, None)),
        lambda: uploads.accept("/etc/passwd", "image"),
        *(lambda name=name: limited(name) for name in ("MAX_BYTES", "MAX_FRAME", "MAX_FRAMES")),
        lambda: handed_in(Image.new("1", (6000, 6000)), "image"),
        lambda: handed_in(b"", "image"),
        lambda: handed_in(noise, "video", "n.mp4"),
        lambda: handed_in(Path(movie).read_bytes()[:40], "video", "v.mp4"),
        lambda: handed_in(_cut_short(tmp_path), "video", "v.mp4"),
        lambda: handed_in(Path(movie).read_bytes()[:900], "video", "v.mp4"),
        lambda: handed_in(b"words", "image"),
        lambda: handed_in(noise[: len(noise) // 2], "image"),
        lambda: handed_in(Image.new("RGB", (9, 9)), "image", "x.webp", save_all=True, append_images=[Image.new("RGB", (9, 9), "red")]),
        lambda: handed_in(b"1 2 3", "camera", "p.txt"),
        *(lambda limits=limits: full(**limits) for limits in ({"size": 0}, {"places": 0}, {"seconds": 1e-3})),
        too_long,
        lambda: drain(ModelQueue(seconds=1e-9).run("a", lambda tell: tell(time.sleep(0.01)))),
        lambda: record_at(Path(movie), "v.mp4", Shelf(tmp_path / "empty", {})),
        lambda: drain(ModelQueue().run("a", no_model)),
        lambda: Shelf(tmp_path / "out", {}).get("x"),
    ]
    met = set()
    for mistake in mistakes:
        with pytest.raises(UserError) as error:
            mistake()
        assert error.value.code in LINES, error.value
        met.add(error.value.code)
        english, chinese = (told_to(lang, error.value) for lang in (0, 1))
        assert re.search("[\u4e00-\u9fff]", chinese) and not re.search(r"[{}]|\bgive\b", re.sub("（.*）", "", chinese)), chinese
        assert english and not re.search("[\u4e00-\u9fff{}]", english) and str(tmp_path) not in english + chinese
    assert met == set(LINES)


def test_a_translation_goes_by_the_code_and_uses_the_labels_of_the_page():
    error = UserError("whatever the library calls it", code="out_of_range", field="duration", value="1e+09", low="0.1", high="60")
    assert told_to(0, error) == "Seconds 1e+09: give a number from 0.1 to 60"
    assert told_to(1, error) == "时长（秒） 1e+09：请填 0.1 到 60 之间的数"
    assert told_to(0, UserError("x", code="not_trained", task="text", able="image, camera")).endswith("it can do image to video, camera")
    for lang in (0, 1):
        assert told_to(lang, UserError("/a/b.png is odd")) == "b.png is odd"  # without a code
        assert told_to(lang, UserError("/a/b.png is odd", code="not_an_image")).endswith("b.png is odd")  # without its values
        assert told_to(lang, UserError("odd", code="new_since")) == "odd"


def _row(seconds: float, **more: Any) -> dict[str, Any]:
    return {"prompt": "x", "seconds": seconds, **more}


def _poses(folder: Path, frames: int = 9) -> str:
    save_trajectory(folder / "p.json", axes_trajectory({"pan": 3}, frames, H, W), 8)
    return str(folder / "p.json")


def _cut_short(folder: Path) -> bytes:
    """An mp4 whose header promises more frames than the file has."""
    write_video(folder / "long.mp4", np.random.default_rng(0).integers(0, 256, (41, H, W, 3), dtype=np.uint8), 8)
    data = (folder / "long.mp4").read_bytes()
    return data[: len(data) * 2 // 3]


def test_the_recognised_task_is_described_in_both_languages(pipe, tmp_path):
    assert set(CHINESE_TASKS) == set(PLANNED)
    request = Request("a ball", image=str(png(tmp_path / "a.png", (30, 30))), loop=True, camera="pan=6,dolly=4", num_frames=41)
    english, chinese = (views.understood(lang, pipe.plan(request), request) for lang in (0, 1))
    assert "<b>first + last frame to video · loop · camera pan=6 dolly=4</b> 41 frames · 5.1 s · 80×80" in english
    assert "<b>首尾帧生视频 · 循环 · 镜头 pan=6 dolly=4</b> 41 帧 · 5.1 秒 · 80×80" in chinese
    long = Request(duration=15, camera=_poses(tmp_path, 121), seed=3)
    assert "text to video · then 3 more · camera from a file" in views.understood(0, pipe.plan(long), long) and str(tmp_path) not in english


def test_every_word_is_there_in_both_languages():
    assert all(english and chinese for english, chinese in WORDS.values())
    assert set(FIELDS) >= {"prompt", "image", "video", "pan", "dolly", "seed"}
    assert without_folders("/a/b/c.mp4 is bad: use '/d/e.png' or 16:9, 1/2") == "c.mp4 is bad: use e.png' or 16:9, 1/2"
