"""A request from Python: fields that editors and `help` show, and every mistake in one line instead of a traceback."""

from __future__ import annotations

import dataclasses
import inspect
import typing

import numpy as np
import pytest
import torch
from PIL import Image

from kling import KlingPipeline, Request
from kling.errors import UserError
from kling.sampling.request import Fields
from tests.test_inputs import SIZES, H, W, movie
from tests.test_pipeline import picture, tiny_pipeline


@pytest.fixture(scope="module")
def pipe() -> KlingPipeline:
    return tiny_pipeline(sizes=SIZES)


def test_editors_and_help_name_every_field() -> None:
    fields = {field.name: field.type for field in dataclasses.fields(Request)}
    del fields["prompt"]
    assert {name: hint.__forward_arg__ for name, hint in Fields.__annotations__.items()} == fields
    shown = inspect.signature(KlingPipeline.__call__).parameters
    assert fields.keys() <= shown.keys() and shown["num_videos"].default == 1 and shown["seed"].kind is inspect.Parameter.KEYWORD_ONLY
    assert "fields" not in shown and "output_type" in shown
    assert list(inspect.signature(Request).parameters) == ["prompt", *fields]
    assert typing.get_type_hints(Request)["seed"] is int


BAD = {
    "an unknown keyword": (dict(generator=torch.Generator()), "unknown field 'generator'"),
    "a misspelt one": (dict(imge=picture()), "did you mean 'image'"),
    "several prompts": (dict(prompt=["a ball", "a cube"]), "prompt .*'a ball'.* is of type list: give text; num_videos makes several"),
    "no prompt": (dict(prompt=None), "prompt None"),
    "a number as text": (dict(duration="5"), "duration '5' is of type str: give a number"),
    "half a frame": (dict(num_frames=5.5), "num_frames 5.5 .* a whole number"),
    "a truth as a number": (dict(num_videos=True), "num_videos True"),
    "a number as a truth": (dict(loop="yes"), "loop 'yes' .* True or False"),
    "a number as negative prompt": (dict(negative_prompt=3), "negative_prompt 3 .* text"),
    "a keyframe's picture alone": (dict(keyframes=["mid.png"]), "keyframe 'mid.png': give .picture, frame"),
    "one keyframe without its list": (dict(keyframes=("mid.png", 20)), "keyframe 'mid.png': give .picture, frame"),
    "a keyframe turned round": (dict(keyframes=[(20, "mid.png")]), "keyframe .20, 'mid.png'.: give"),
    "a keyframe of four": (dict(keyframes=[("mid.png", 20, 1.0, 1)]), "keyframe .'mid.png', 20, 1.0, 1.: give"),
    "a keyframe by name": (dict(keyframes={"mid.png": 20}), "keyframes {'mid.png': 20}: give a list"),
    "a keyframe's frame in words": (dict(keyframes=[(picture(), "20")]), r"keyframe .ndarray \(90, 160, 3\), '20'.: give"),
    "a camera as a number": (dict(camera=5), "camera 5: give axes"),
    "a camera axis in words": (dict(camera={"pan": "left"}), "camera axis pan is 'left': give a number"),
    "an interval of one": (dict(guidance_interval=0.5), "guidance_interval 0.5: give two"),
    "a seed of 400 digits": (dict(seed=10**400), "seed 1.*: give a whole number"),
    "steps of 400 digits": (dict(shift=10**400), "shift"),
    "an object as picture": (dict(image=object()), "image of type object holds no pixels"),
    "numbers as picture": (dict(image=np.zeros((H, W, 3))), "image of type torch.float64 .* give uint8"),
    "a flat movie": (dict(video=picture()), r"video of type torch.uint8 and shape \(90, 160, 3\)"),
    "a batch of masks": (dict(video=movie(5), mask=np.ones((5, H, W))), r"mask of shape \(5, 32, 64\)"),
    "noise of another shape": (
        dict(num_frames=5, latents=torch.zeros(1, 4, 2, 8, 8)),
        r"latents of shape .* starts from \(1, 4, 2, 4, 8\)",
    ),
    "noise for several hops": (dict(num_frames=41, latents=torch.zeros(1, 4, 2, 8, 14)), "use seed"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_is_one_line(pipe: KlingPipeline, case: str) -> None:
    fields, says = BAD[case]
    with pytest.raises(UserError, match=says) as error:
        pipe(**fields)
    assert "\n" not in str(error.value) and len(str(error.value)) < 900


def test_numpy_numbers_and_short_keyframes_are_accepted() -> None:
    request = Request("a", num_frames=np.int64(5), strength=None, camera_scale=1, seed=np.uint32(7), keyframes=[(picture(), np.int32(3))])
    assert type(request.num_frames) is int and type(request.camera_scale) is float and request.keyframes[0][1:] == (3, 1.0)
    assert type(request.seed) is int and request.seed == 7


def test_keyword_fields_replace_those_of_a_request(pipe: KlingPipeline) -> None:
    request = Request("a ball", num_frames=5, num_inference_steps=1, seed=3)
    assert np.array_equal(pipe(request, seed=4).frames, pipe(request.replace(seed=4)).frames)
    assert not np.array_equal(pipe(request, seed=4).frames, pipe(request).frames)


def test_pil_pictures_and_lists_of_them_are_accepted(pipe: KlingPipeline) -> None:
    """As returned by diffusers' `load_image` and `load_video`."""
    frames = movie(9)
    given = dict(num_frames=5, num_inference_steps=1)
    assert np.array_equal(pipe(image=Image.fromarray(frames[0]), **given).frames, pipe(image=frames[0], **given).frames)
    assert np.array_equal(pipe(video=[Image.fromarray(frame) for frame in frames], **given).frames, pipe(video=frames, **given).frames)
