"""Every input is used or refused by name: all pairs of inputs, positions of keyframes, and the parts that a mask keeps."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from kling import KlingPipeline, Request, Track
from kling.condition.tasks import TASKS
from kling.errors import UserError
from kling.sampling.inputs import paste
from kling.sampling.shots import Shot
from tests.test_pipeline import picture, tiny_pipeline

SIZES = {"16:9": (32, 64), "9:16": (64, 32), "1:1": (32, 32)}
H, W = SIZES["16:9"]
HOLE = np.zeros((H, W), np.float32)
HOLE[6:23, 18:50] = 1  # not aligned with latents


def movie(frames: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, H, W, 3), dtype=np.uint8)


# The possible inputs apart from the prompt: all pairs of these are tested.
INPUTS = {
    "image": {"image": picture(1)},
    "last_image": {"last_image": picture(2)},
    "keyframes": {"keyframes": [(picture(3), 10, 1.0)]},
    "video": {"video": movie(9, 4)},
    "mask": {"mask": HOLE},
    "outpaint": {"outpaint": "1:1"},
    "strength": {"strength": 0.5},
    "loop": {"loop": True},
    "camera": {"camera": {"dolly": 8.0}},
    "tracks": {"tracks": [Track(None, [(20, 16), (50, 16)])]},
    "references": {"references": [picture(6), picture(7, 50, 50)]},
    "extend_to": {"extend_to": 2.5},
    "duration": {"duration": 1.5},
    "shots": {"shots": [Shot("a ball", 0.7), Shot("a cube", 0.9)]},
}
EARLY = [(picture(3), 6, 1.0)]  # a keyframe within the video
EDITS = ("mask", "outpaint", "strength")
NEEDS = dict.fromkeys(EDITS, "video")  # what each of them changes

# The pairs that cannot be combined, and the words of the error. All others work.
REFUSED = {
    ("image", "video"): "leave image out",
    ("image", "mask"): "mask was given without a video to fill",
    ("image", "outpaint"): "outpaint was given without a video to fill",
    ("image", "strength"): "strength was given without a video",
    ("last_image", "loop"): "both loop and last_image",
    ("video", "loop"): "both loop and video",
    ("mask", "outpaint"): "both mask and outpaint",
    ("mask", "loop"): "both loop and video",
    ("outpaint", "loop"): "both loop and video",
    ("strength", "loop"): "both loop and video",
    ("mask", "tracks"): "both mask and tracks",
    ("outpaint", "tracks"): "both outpaint and tracks",
    ("strength", "tracks"): "both strength and tracks",
    ("mask", "extend_to"): "both mask and extend_to",
    ("outpaint", "extend_to"): "both outpaint and extend_to",
    ("strength", "extend_to"): "both strength and extend_to",
    ("mask", "duration"): "mask of 13 frames was asked for, but the video has 9",
    ("outpaint", "duration"): "outpaint of 13 frames was asked for, but the video has 9",
    ("strength", "duration"): "strength of 13 frames was asked for, but the video has 9",
    **{(name, "shots"): f"both {name} and shots" for name in ("video", "loop", "camera", "tracks", "extend_to", "duration")},
    **{(name, "shots"): "both video and shots" for name in EDITS},
    ("video with duration", "extend_to"): "both duration and extend_to",
}


@pytest.fixture(scope="module")
def pipe() -> KlingPipeline:
    return tiny_pipeline(sizes=SIZES, capabilities=[*TASKS, "camera", "brush", "reference", "shots", "text_to_image"])


def fields(*names: str) -> dict:
    """These inputs, and a video if one of them changes it; 13 frames if none sets the number (a clip of 9 is continued)."""
    given: dict = {}
    for name in names:
        given |= INPUTS[name]
    if any(name in NEEDS for name in names) and "image" not in names:
        given |= INPUTS["video"]
        if "keyframes" in names:
            given["keyframes"] = EARLY
    if not {"duration", "shots", *EDITS} & set(names) and not {"extend_to", "video"} <= set(names):
        given["num_frames"] = 13
    return given


def make(pipe: KlingPipeline, given: dict) -> np.ndarray:
    words = {} if "shots" in given else {"prompt": "a ball"}
    return pipe(Request(num_inference_steps=1, seed=1, **words, **given)).frames[0]


@pytest.fixture(scope="module")
def made(pipe):
    """made(given) -> frames, each only once."""
    known: dict = {}

    def made(given: dict) -> np.ndarray:
        key = repr(sorted((name, id(value) if name in INPUTS else value) for name, value in given.items()))
        if key not in known:
            known[key] = make(pipe, given)
        return known[key]

    return made


@pytest.mark.parametrize(("one", "other"), itertools.combinations(INPUTS, 2))
def test_every_pair_of_inputs_works_or_is_refused_by_name(made, one, other):
    """Works: leaving out either of the two changes the frames."""
    both = fields(one, other)
    refused = REFUSED.get((one, other)) or REFUSED.get((other, one))
    if refused is None and {one, other} == {"video", "duration"}:
        assert len(made(both)) == 9 + 12
        return
    if refused is None:
        together = made(both)
        for left_out in (one, other):
            rest = {key: value for key, value in both.items() if key not in INPUTS[left_out]}
            if left_out == "duration":
                rest["num_frames"] = 17
            if left_out == "shots":
                rest["num_frames"] = 13
            if left_out in EDITS and "keyframes" in rest:  # the video is continued then
                rest |= INPUTS["keyframes"]
            if left_out == "video" and NEEDS.keys() & set(rest):
                continue  # the other one requires it
            without = made(rest)
            assert without.shape != together.shape or not np.array_equal(without, together), left_out
        return
    with pytest.raises(UserError, match=refused) as error:
        made(both)
    assert "\n" not in str(error.value)


def test_the_table_in_the_docs_says_which_pairs_work() -> None:
    lines = (
        (Path(__file__).parents[1] / "docs" / "controls.md")
        .read_text(encoding="utf-8")
        .split("## Every pair")[1]
        .split("\n## ")[0]
        .splitlines()
    )
    head, _, *rows = ([cell.strip(" *") for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|"))
    names = dict(zip([rows[0][0], *head[1:]], INPUTS, strict=True))  # as a user calls them, in the order of this file
    assert names["brush"] == "tracks" and names["extend to"] == "extend_to" and names["last image"] == "last_image"
    said = {(names[row[0]], names[column]): cell for row in rows for column, cell in zip(head[1:], row[1:], strict=True) if cell}
    assert set(said) == set(itertools.combinations(INPUTS, 2))
    for pair, cell in said.items():
        assert (cell == "yes") == (pair not in REFUSED and pair[::-1] not in REFUSED), pair
    reasons = [line.split(".")[0] for line in lines if line[:1].isdigit()]
    assert {cell for cell in said.values() if cell != "yes"} == set(reasons)


def test_a_continuation_takes_either_an_added_or_a_total_length():
    with pytest.raises(UserError, match=REFUSED["video with duration", "extend_to"]):
        Request(**INPUTS["video"], **INPUTS["extend_to"], **INPUTS["duration"])


@pytest.mark.parametrize(
    ("given", "refused"),
    [
        ({"image": picture(), "keyframes": [(picture(1), 0, 1.0)]}, "image and keyframe both fall on frame 0"),
        ({"last_image": picture(), "keyframes": [(picture(1), 4, 1.0)]}, "keyframe and last_image both fall on frame 4"),
        ({"loop": True, "keyframes": [(picture(1), 4, 1.0)]}, "keyframe and loop both fall on frame 4"),
        ({"keyframes": [(picture(1), 3, 1.0), (picture(2), 3, 1.0)]}, "keyframe and keyframe both fall on frame 3"),
        ({"image": picture(), "last_image": picture(), "num_frames": 1}, "image and last_image both fall on frame 0"),
        ({"loop": True, "num_frames": 1}, "loop .* single picture"),
        ({"camera": "pan=5", "num_frames": 1}, "camera .* single picture"),
        ({"video": movie(9), "num_frames": 1}, "1 frame adds nothing"),
        ({"video": movie(9), "keyframes": [(picture(), 8, 1.0)]}, "frame 8 lies in the given video: the first generated frame is 9"),
        ({"outpaint": "1:1", "aspect": "1:1", "video": movie(5)}, "both outpaint and aspect"),
        ({"outpaint": "16:9", "video": movie(5)}, "has that aspect already"),
        ({"mask": 0 * HOLE, "video": movie(5)}, "no white area"),
        ({"mask": HOLE[None], "video": movie(5)}, r"mask of shape \(1, 32, 64\)"),
        ({"extend_to": 1.0, "duration": 2.0}, "extend_to 1 s is shorter"),
        ({"camera_scale": 2.0}, "without a camera"),
        ({"strength": 0.5, "video": movie(41), "num_frames": 41}, "this model changes 17 at once: ask for 17"),
    ],
)
def test_contradictory_requests_are_refused_by_field_name(pipe, given, refused):
    with pytest.raises(UserError, match=refused) as error:
        pipe.plan(Request(**({} if given.keys() & {"video", "duration", "extend_to"} else {"num_frames": 5}) | given))
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------------- where keyframes go


def test_the_last_hop_gets_the_last_frame(pipe):
    """`first` and `last` of a clip that is made in hops, and a loop. The model generates 17 frames at once."""
    for end in ({"last_image": picture(2)}, {"loop": True}):
        plan = pipe.plan(Request(image=picture(1), num_frames=41, **end))
        *before, last = plan.hops
        assert plan.task == "first_last" and [hop.given.keyframes for hop in before] == [()] * len(before)
        assert last.given.keyframes == ((40 - last.start, 1.0),) and last.end == 41
    assert plan.title == "first + last frame to video, then 3 continuations"


def test_a_keyframe_goes_to_the_hop_that_makes_its_frame(pipe):
    frames = (3, 16, 17, 30)
    plan = pipe.plan(Request(num_frames=33, keyframes=[(picture(t), t, 0.5) for t in reversed(frames)]))
    found = {hop.start + t: i for hop in plan.hops for (t, _), i in zip(hop.given.keyframes, hop.pictures, strict=True)}
    assert found == {t: 3 - k for k, t in enumerate(frames)}
    assert all(hop.overlap <= t < hop.frames for hop in plan.hops for t, _ in hop.given.keyframes)


def test_a_continuation_ends_with_the_given_last_frame(pipe):
    """Frames count from the start of the result; existing frames stay, and new ones lead to the picture."""
    given = {"video": movie(9), "num_frames": 9}
    plan = pipe.plan(Request(last_image=picture(2), keyframes=[(picture(3), 12, 0.5)], **given))
    assert plan.task == "continuation" and plan.title == "continuation of a video with 2 keyframes"
    assert plan.hops[0].given.keyframes == ((12 - plan.hops[0].start, 0.5), (16 - plan.hops[0].start, 1.0))
    plain, ended, other = (make(pipe, given | end) for end in ({}, {"last_image": picture(2)}, {"last_image": picture(5)}))
    assert all(np.array_equal(made[:9], given["video"]) for made in (plain, ended, other))
    assert not np.array_equal(plain[9:], ended[9:]) and not np.array_equal(other[9:], ended[9:])


def test_a_model_without_last_frames_refuses_them_in_continuations_too():
    pipe = tiny_pipeline(capabilities=["text", "continuation", "restyle"])
    for given in ({"num_frames": 9}, {"strength": 0.5}):
        with pytest.raises(UserError, match="not trained for 'last'"):
            pipe.plan(Request(video=movie(9), last_image=picture(), **given))


# ---------------------------------------------------------------------------------------------------------- what is kept


@pytest.mark.parametrize("strength", [None, 0.4])
def test_kept_pixels_of_a_masked_video_are_unchanged(pipe, strength):
    video = movie(9)
    made = make(pipe, {"video": video, "mask": HOLE, "strength": strength})
    kept = HOLE == 0
    assert np.array_equal(made[:, kept], video[:, kept])
    deep = np.zeros_like(kept)
    deep[9:20, 21:47] = True
    assert (made[:, deep] != video[:, deep]).mean() > 0.5


def test_outpainting_leaves_the_picture_s_pixels_unchanged(pipe):
    video = movie(5)[:, :, 16:48]  # square
    made = make(pipe, {"video": video, "outpaint": "16:9"})
    assert np.array_equal(made[:, :, 16:48], video)


def test_a_still_picture_is_filled_and_outpainted(pipe):
    square = picture(1, 32, 32)
    assert np.array_equal(make(pipe, {"image": square, "outpaint": "16:9", "num_frames": 1})[0, :, 16:48], square)
    image = picture(1, H, W)
    filled = make(pipe, {"image": image, "mask": HOLE, "num_frames": 1})[0]
    assert np.array_equal(filled[HOLE == 0], image[HOLE == 0]) and not np.array_equal(filled, image)


def test_the_seam_fades_in_inside_the_hole():
    """Along a line across the border: kept, then a linear ramp, then generated."""
    made, video = torch.full((2, 32, 32, 3), 200, dtype=torch.uint8), torch.zeros(2, 32, 32, 3, dtype=torch.uint8)
    mask = torch.zeros(32, 32)
    mask[:, 16:] = 1
    got = paste(made, video, mask, feather=3)
    assert got[0, 5, 14:21, 0].tolist() == [0, 0, 50, 100, 150, 200, 200]
    assert torch.equal(paste(made, video, torch.ones(32, 32), 3), made)


def test_a_long_video_is_changed_up_to_the_model_s_length_with_a_note(pipe):
    plan = pipe.plan(Request(video=movie(30), strength=0.5))
    assert plan.frames == 17 and "the first 17 of the video's 30 frames" in plan.notes[0]
    assert pipe.plan(Request(video=movie(17), strength=0.5)).notes == ()
    short = pipe.plan(Request(video=movie(17), strength=0.5, num_frames=5))
    assert short.frames == 5 and short.notes == ()
    assert pipe.plan(Request(video=movie(16), strength=0.5, duration=2.0)).frames == 13  # 2 s, of which 13 frames are whole latents
