"""Files written by earlier versions stay readable, whatever moves inside the library. tests/data/record.json is from commit ff373bd."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import numpy as np
import pytest

from kling import KlingPipeline
from kling.data.video import write_video
from kling.sampling.pipeline import ASSETS
from kling.sampling.record import check_same_settings, read_record, request_of

RECORD = Path(__file__).parent / "data" / "record.json"


def test_an_old_record_gives_the_same_request() -> None:
    record = read_record(RECORD)
    pipe = KlingPipeline.from_pretrained(weights=False)
    pipe.scheduler.register_to_config(guidance_scale=5.0, camera_guidance_scale=4.0)  # settings of the weights at that time
    check_same_settings(record, pipe.plan(request_of(record, str(RECORD))), str(RECORD))


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        ({"strength": 0.5, "duration": 5.0, "extend_to": 9.0, "last_image": "a.png"}, {"strength": 0.5}),
        ({"extend_to": 9.0, "duration": 5.0, "keyframes": [["a.png", 3, 1.0]]}, {"extend_to": 9.0}),
        ({"outpaint": "1:1", "aspect": "9:16", "camera_scale": 2.0}, {"outpaint": "1:1"}),
    ],
)
def test_fields_ignored_by_recipe_1_are_dropped_from_its_requests(tmp_path, given, asked) -> None:
    """The first versions ignored some of their inputs, but recorded them."""
    write_video(tmp_path / "in.mp4", np.zeros((9, 64, 112, 3), np.uint8), 8)
    video, record = str(tmp_path / "in.mp4"), read_record(RECORD)
    fields = {**record["request"], "prompt": "a", "num_frames": None, "image": None, "keyframes": [], "camera": None, "aspect": None}
    assert request_of(record | {"request": fields | given | {"video": video}}, "x") == request_of(
        record | {"recipe": 2, "request": fields | asked | {"video": video}}, "x"
    )


def test_class_paths_in_model_folders_exist() -> None:
    """model_index.json names a library, or a module of ours, and a class in it."""
    for library, name in filter(
        lambda value: isinstance(value, list) and len(value) == 2, json.loads((ASSETS / "model_index.json").read_text()).values()
    ):
        if library:
            assert getattr(importlib.import_module(library), name)
