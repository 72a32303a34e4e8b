"""The storyboard on the page: how its rows become shots, what is refused, its strips, and how a record's shots become rows again."""

# ruff: noqa: F811 - arguments are fixtures

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from kling_programs.sample.studio import studio, views
from kling_programs.sample.studio.events import Events
from kling_programs.sample.studio.form import FIELDS, missing, request_of
from kling_programs.sample.studio.mistakes import told_to
from kling_programs.sample.studio.remote import body_of
from kling_programs.sample.studio.restore import fields_of
from kling_programs.sample.studio.shelf import Result, Shelf
from kling_programs.sample.studio.studio import Studio, Weights
from kling_programs.sample.studio.uploads import Uploads
from test_demo import pipe  # noqa: F401 - a fixture

from kling import KlingPipeline, Request, Shot
from kling.cameras.axes import axes_trajectory
from kling.cameras.files import save_trajectory
from kling.data.video import write_video
from kling.errors import UserError
from kling.sampling.record import write_record

SHOTS = [Shot("a ball", 1.5, "pan=5"), Shot("一个球", 1.0)]
ROWS = [{"prompt": "a ball", "seconds": 1.5, "camera": "pan=5"}, {"prompt": "一个球", "seconds": 1, "camera": ""}]


@pytest.fixture
def uploads(tmp_path: Path) -> Uploads:
    (tmp_path / "arrivals").mkdir()
    return Uploads(tmp_path / "arrivals", tmp_path / "store")


def test_rows_are_shots_and_take_the_place_of_the_length(uploads: Uploads) -> None:
    request = request_of({"shots": ROWS, "duration": 5, "prompt": ""}, uploads)
    assert request.shots == SHOTS and request.duration is None
    assert request_of({"shots": ROWS, "camera_scale": 2}, uploads).camera_scale == 2
    assert request_of({"prompt": "a ball", "shots": [], "duration": 5}, uploads).shots is None


@pytest.mark.parametrize(
    ("fields", "refused"),
    [
        ({"shots": "x"}, "give a list"),
        ({"shots": [1]}, "give a list"),
        ({"shots": ROWS * 4}, "at most 6"),
        ({"shots": [{"seconds": 2}]}, "shot 1 has no words"),
        ({"shots": [ROWS[0], ROWS[1] | {"prompt": " "}]}, "shot 2 has no words"),
        ({"shots": [ROWS[0] | {"seconds": "2"}]}, "not a number"),
        ({"shots": [ROWS[0] | {"seconds": 1000}]}, "number from 0.1"),
        ({"shots": [ROWS[0] | {"camera": "/etc/passwd"}]}, "unknown camera move"),
        ({"shots": [ROWS[0] | {"camera": "pan=50"}]}, "outside"),
        ({"shots": ROWS, "prompt": "a cube"}, "both prompt and shots"),
        ({"shots": ROWS, "pan": 3}, "both camera and shots"),
        ({"shots": ROWS, "loop": True}, "both loop and shots"),
    ],
)
def test_what_is_no_storyboard_is_refused(uploads: Uploads, fields: dict, refused: str) -> None:
    with pytest.raises(UserError, match=refused) as error:
        request_of(fields, uploads)
    assert "\n" not in str(error.value) and told_to(1, error.value)


def test_shots_of_a_record_are_rows_again(uploads: Uploads) -> None:
    studio = SimpleNamespace(uploads=uploads, pipe=SimpleNamespace(config=SimpleNamespace(fps=8.0)), weights_from=lambda record: None)
    asked = {"prompt": "", "keyframes": [], "shots": [{"prompt": "a ball", "seconds": 1.5, "camera": "pan=5"}]}
    fields, _ = fields_of({"request": asked, "inputs": {}}, studio)
    assert fields["shots"] == ROWS[:1] and request_of({k: v for k, v in fields.items() if k in FIELDS}, uploads).shots
    _, remarks = fields_of({"request": asked | {"shots": "/x/story.yaml"}, "inputs": {}}, studio)
    assert ("elsewhere", {"names": "shots"}) in remarks, "a file of another machine"


def test_a_storyboard_is_sent_to_a_server_as_axes(tmp_path: Path) -> None:
    sent = body_of(Request(shots=[Shot("a ball", 1.0, "pan=5"), Shot("b", 1.0, "static"), Shot("c", 1.0)]))["request"]["shots"]
    assert sent == [
        {"prompt": "a ball", "seconds": 1.0, "camera": {"pan": 5.0}},
        {"prompt": "b", "seconds": 1.0, "camera": {}},
        {"prompt": "c", "seconds": 1.0},
    ]
    save_trajectory(tmp_path / "c.json", axes_trajectory({"pan": 3}, 8, 64, 112), 8.0, (64, 112))
    with pytest.raises(UserError, match="cannot be sent"):
        body_of(Request(shots=[Shot("a ball", 1.0, str(tmp_path / "c.json"))]))


def test_a_result_shows_a_strip_of_every_shot_with_its_words(tmp_path: Path) -> None:
    frames = np.zeros((17, 64, 112, 3), np.uint8)
    frames[9:] = 200
    write_video(tmp_path / "a.mp4", frames, 8)
    asked = {
        "prompt": "",
        "seed": 1,
        "shots": [{"prompt": "<b>", "seconds": 1, "camera": None}, {"prompt": "two", "seconds": 1, "camera": None}],
    }
    record = {"request": asked, "settings": {}, "output": {"seconds": 1.0, "fps": 8.0}}
    write_record(tmp_path / "a.mp4.json", record)
    one = SimpleNamespace(path=tmp_path / "a.mp4", record=record, id="a", record_path=tmp_path / "a.mp4.json")
    told = views.result(0, one)
    assert told.count("<li><img") == 2 and "&lt;b&gt;" in told and "<b>" not in told
    assert "&lt;b&gt; / two" in views.cards(0, [one], None)
    record["request"] = asked | {"shots": None, "prompt": "x"}
    assert "strips" not in views.result(0, one)
    assert json.loads(Result(tmp_path / "a.mp4").record_path.read_text())["request"]["shots"]


def test_the_page_says_what_a_model_without_shots_lacks() -> None:
    pipe = SimpleNamespace(config=SimpleNamespace(capabilities=["text"]))
    assert missing(pipe, "shots") == "shots"
    pipe.config.capabilities.append("shots")
    assert missing(pipe, "shots") is None
    assert 'data-most="6"' in views.storyboard(0) and "添加镜头" in views.storyboard(1)


VISITOR = SimpleNamespace(headers={}, username="me", session_hash="tab")


@pytest.mark.parametrize(
    ("fields", "shown"), [({"shots": ROWS}, True), ({"prompt": "a ball"}, True), ({"shots": [{}]}, False), ({}, False)]
)
def test_a_storyboard_has_a_live_preview(uploads: Uploads, monkeypatch: pytest.MonkeyPatch, fields: dict, shown: bool) -> None:
    asked: list[Request] = []
    monkeypatch.setattr(views, "moving", lambda frames, fps: "a clip")
    behind = SimpleNamespace(
        uploads=uploads,
        pipe=SimpleNamespace(config=SimpleNamespace(fps=8.0)),
        weights_of=lambda fields: Weights(),
        rough=lambda *a: asked.append(a[1]) or 1,
    )
    seen = Events.draft(SimpleNamespace(studio=behind), VISITOR, *(fields.get(name) for name in FIELDS), True)
    assert (seen == "a clip") == shown == bool(asked) and all(one.shots == (fields.get("shots") and SHOTS) for one in asked)


@pytest.mark.parametrize(
    "more",
    [{"shots": [Shot("a", 1.5, "pan=5"), Shot("b", 1.0), Shot("c", 3.0)]}, {"shots": [Shot("a", 9.0), Shot("b", 1.0)]},
     {"shots": SHOTS}, {"prompt": "a", "extend_to": 20.0}, {"prompt": "a", "duration": 9.0}],
)  # fmt: skip
def test_a_rough_clip_is_the_first_that_the_model_makes_at_once(pipe, uploads: Uploads, tmp_path: Path, monkeypatch, more: dict) -> None:
    """In one hop, of the shots that begin in it, with the cuts where they will be."""
    able = [*pipe.config["capabilities"], "shots"]
    parts = pipe.vae, pipe.transformer, pipe.text_encoder, pipe.scheduler, able
    quick = KlingPipeline(*parts, transformer_fast=pipe.transformer, fast={"num_inference_steps": 4, "shots": True}, max_frames=25)
    monkeypatch.setattr(studio, "sample", lambda pipe, request, tell, **_: (pipe.plan(request), None))
    asked = Request(**more, camera_guidance_scale=2.0)
    plan = Studio(quick, {"path": "", "sha256": {}}, Shelf(tmp_path / "out", {}), uploads).rough("a", asked)
    (hop,), (first, *_) = plan.hops, quick.plan(asked).hops
    assert plan.fast and (hop.frames, hop.shots) == (first.frames, first.shots)


@pytest.mark.skipif(shutil.which("node") is None, reason="no node on this machine")
def test_rows_are_written_moved_dragged_and_removed() -> None:
    """page.js with a pretended page: what a visitor does, and what the form then sends."""
    done = subprocess.run(["node", str(Path(__file__).parent / "data" / "story.js")], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
