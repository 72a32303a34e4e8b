"""A camera that only the words of a prompt say: read for weights of the small world, by every way to the pipeline, and shown."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from kling_programs.sample import generate
from kling_programs.sample.studio import views
from kling_programs.sample.studio.form import Fields
from test_old_files import RECORD
from test_pipeline import tiny_pipeline

from kling import Request
from kling.condition.tasks import TASKS
from kling.errors import UserError
from kling.sampling.record import read_record, request_of
from kling.sampling.said import spelled_out

PANS = "a red ball rolls left on grass, the camera pans left"


def test_a_camera_that_only_the_prompt_says_is_given_to_weights_of_the_small_world() -> None:
    told, silent = tiny_pipeline(vocabulary="world"), tiny_pipeline()
    made = told(PANS, num_frames=9, seed=1).frames
    assert np.array_equal(made, silent(PANS, num_frames=9, seed=1, camera="pan=-6.5").frames)
    alone = silent(PANS, num_frames=9, seed=1).frames
    assert np.array_equal(told(PANS, num_frames=9, seed=1, camera="words").frames, alone) and not np.array_equal(made, alone)
    given = {"num_frames": 9, "seed": 1, "camera": "pan=3"}
    assert np.array_equal(told(PANS, **given).frames, silent(PANS, **given).frames)


def test_every_way_to_the_pipeline_reads_it() -> None:
    pipe = tiny_pipeline(vocabulary="world", capabilities=[*TASKS, "camera", "shots", "text_to_image"])
    asked = Request(PANS, num_frames=9, seed=1)
    assert pipe.ask(asked).signals.camera is not None and pipe.plan(asked).has_camera
    assert (pipe.together([asked])[0].int() - torch.from_numpy(pipe(asked).frames[0]).int()).abs().max() <= 1
    story = Request(shots=[(PANS, 0.6), ("a red ball on snow", 0.6), (PANS, 0.6, "words")])
    assert [note[:12] for note in pipe.plan(story).notes if "as the prompt" in note] == ["shot 1: came"]
    assert [shot.camera for shot in spelled_out(story, read=True)[0].storyboard] == ["pan=-6.5", None, None]


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "a red ball rolls left on grass"},
        {"prompt": PANS, "num_frames": 1},
        {"prompt": PANS + ", the camera pans right"},
        {"prompt": PANS, "strength": 0.5, "video": np.zeros((9, 64, 112, 3), np.uint8)},
    ],
    ids=["no camera", "a picture", "both ways", "a given video"],
)
def test_where_the_prompt_says_no_camera_that_can_move_none_is_given(fields: dict) -> None:
    plan = tiny_pipeline(vocabulary="world").plan(Request(**{"num_frames": None if "video" in fields else 9} | fields))
    assert not plan.has_camera and not plan.notes


def test_a_record_of_before_leaves_its_camera_to_the_words() -> None:
    record = read_record(RECORD)
    fields = record["request"] | {"prompt": PANS, "camera": None, "image": None}
    assert request_of(record | {"recipe": 3, "request": fields, "inputs": {}}, "x").camera == "words"
    assert request_of(record | {"recipe": 3, "request": fields | {"camera": {}}, "inputs": {}}, "x").camera == {}, "stands still"
    assert request_of(record | {"recipe": 4, "request": fields, "inputs": {}}, "x").camera is None


def test_the_command_line_says_what_it_read(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    generate.main([PANS, "--dry-run", "--seed", "1"])
    assert "note: camera pan=-6.5, as the prompt says" in capsys.readouterr().out
    for camera in ("words", "pan=3"):
        generate.main([PANS, "--camera", camera, "--dry-run", "--seed", "1"])
        assert "as the prompt says" not in capsys.readouterr().out


def test_nothing_else_is_called_words() -> None:
    with pytest.raises(UserError, match="camera_scale 2 was given without a camera"):
        Request(PANS, camera="words", camera_scale=2.0)


def test_the_page_says_what_it_read() -> None:
    pipe = tiny_pipeline(vocabulary="world")
    for camera, says in ((None, "camera pan=-6.5, as the prompt says"), ("pan=3", "camera pan=3<")):
        asked = Request(PANS, num_frames=9, camera=camera)
        assert says in views.understood(0, pipe.plan(asked), asked)
    asked = Request(PANS, num_frames=9, camera="words")
    assert "as the prompt says" not in views.understood(0, pipe.plan(asked), asked)


def test_a_row_of_the_page_s_storyboard_may_leave_it_to_the_words() -> None:
    rows = [{"prompt": PANS, "seconds": 1, "camera": camera} for camera in ("words", "")]
    assert [shot.camera for shot in Fields({"shots": rows}).shots()] == ["words", None]
