"""The request for a video: one dataclass behind the command line, the page, the evaluation and the samples drawn during training."""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict, TypeVar

import numpy as np

from kling.cameras.axes import WORDS, check_axes, parse_axes
from kling.cameras.trajectory import Trajectory
from kling.condition.state import MOST_REFERENCES
from kling.errors import UserError, unknown
from kling.sampling.brush import Track, as_tracks
from kling.sampling.shots import Shot, as_shots, read_shots, whole_characters
from kling.shapes import ASPECTS, latent_frames, parse_size

Picture = str | Path | np.ndarray | None  # a file, or uint8 (H, W, 3)
Movie = str | Path | np.ndarray | None  # a file, or uint8 (T, H, W, 3) at the model's fps
T = TypeVar("T")
NAMED_IN_A_SHOT = {"prompt": "prompt", "duration": "seconds", "num_frames": "seconds", "camera": "camera"}
MODES = ("std", "pro", "fast")
MAX_SECONDS = 180.0
SHIFTS = (1e-3, 1e3)


class Fields(TypedDict, total=False):
    """The fields of a `Request` except the prompt, for editors: the keyword arguments of `pipe(...)`."""

    negative_prompt: str | None
    image: Picture
    last_image: Picture
    keyframes: list[tuple[Any, int, float]]
    video: Movie
    mask: Picture
    outpaint: str | None
    strength: float | None
    loop: bool
    camera: str | dict[str, float] | Trajectory | None
    camera_scale: float
    tracks: str | list[Track] | None
    references: list[Picture]
    control: Movie
    shots: str | list[Shot] | None
    aspect: str | None
    size: str | None
    duration: float | None
    num_frames: int | None
    extend_to: float | None
    mode: str
    solver: str | None
    num_inference_steps: int | None
    guidance_scale: float | None
    camera_guidance_scale: float | None
    brush_guidance_scale: float | None
    reference_guidance_scale: float | None
    guidance_interval: tuple[float, float] | None
    guidance_every: int
    guidance_reach: float | None
    shift: float | None
    sigma_c: float
    frame_delay: int
    seed: int
    num_videos: int


# Type name in the annotations -> accepted types, conversion, and what an error message calls it.
KINDS = {
    "int": (numbers.Integral, int, "a whole number"),
    "float": (numbers.Real, float, "a number"),
    "bool": ((bool, np.bool_), bool, "True or False"),
    "str": (str, str, "text"),
}


def named(cls: type[T]) -> type[T]:
    """A dataclass whose constructor reports an unknown field in one line."""
    plain, names = cls.__init__, [field.name for field in dataclasses.fields(cls)]

    @functools.wraps(plain)
    def __init__(self: Any, *args: Any, **fields: Any) -> None:
        for name in fields:
            if name not in names:
                raise unknown("field", name, names)
        plain(self, *args, **fields)

    cls.__init__ = __init__
    return cls


@named
@dataclass
class Request:
    """The arguments of one call of the pipeline. The task follows from which of them are given.

    prompt, negative_prompt: English or Chinese. Without a negative prompt the checkpoint's own is used, which may be empty.
    image, last_image: first and last frame. keyframes: (picture, pixel frame, strength in (0, 1]) anywhere between.
    video: a clip to continue; with `mask` (white = generate) or `outpaint` to fill; with `strength` to restyle: 1 keeps it, 0 ignores it
    (diffusers' and ComfyUI's denoise is 1 - ours).
    loop: the last frame leads back to the first.
    camera: axes ("pan=5,zoom=2" or a dict), a master shot, a trajectory file or a `Trajectory`. camera_scale multiplies its translation.
    None takes the camera that the prompt says, if the model knows only the words of the small world; "words" leaves it to the words.
    tracks: what moves where (motion brush): a JSON file or a list of `Track(mask, points)`; see `kling.sampling.brush`.
    references: one to four pictures of things, to which the prompt points: "the first thing rolls left on snow".
    control: a video (edges, depth, pose …) whose frames the result follows.
    shots: a storyboard instead of a prompt, a length and a camera: a yaml file or a list of `Shot(prompt, seconds, camera)`; see
    `kling.sampling.shots`.
    size: "WIDTHxHEIGHT" instead of an aspect.
    aspect, duration (seconds) or num_frames (1 + 4k): defaults follow from the pictures and the model.
    extend_to: seconds; the clip is continued in hops until it is that long.
    solver: "euler", "adams" or "renoise" instead of the checkpoint's own.
    mode: "std", "pro" or "fast" (few-step weights, where the checkpoint has some). Steps, guidance and shift default to the checkpoint's
    settings for the mode.
    guidance_interval: noise levels (low, high) between which guidance is used; guidance_every: number of steps that share one computation
    of it; guidance_reach: distance in latent frames from a given frame at which guidance is full (0: everywhere).
    sigma_c: conditioning noise of given frames. frame_delay: steps by which each latent frame is behind the previous (diffusion forcing).
    seed: of the first video; video i of `num_videos` has seed + i, and is the same alone or among others.
    """

    prompt: str = ""
    negative_prompt: str | None = None
    image: Picture = None
    last_image: Picture = None
    keyframes: list[tuple[Any, int, float]] = field(default_factory=list)
    video: Movie = None
    mask: Picture = None
    outpaint: str | None = None
    strength: float | None = None
    loop: bool = False
    camera: str | dict[str, float] | Trajectory | None = None
    camera_scale: float = 1.0
    tracks: str | list[Track] | None = None
    references: list[Picture] = field(default_factory=list)
    control: Movie = None
    shots: str | list[Shot] | None = None
    aspect: str | None = None
    size: str | None = None
    duration: float | None = None
    num_frames: int | None = None
    extend_to: float | None = None
    mode: str = "std"
    solver: str | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    camera_guidance_scale: float | None = None
    brush_guidance_scale: float | None = None
    reference_guidance_scale: float | None = None
    guidance_interval: tuple[float, float] | None = None
    guidance_every: int = 1
    guidance_reach: float | None = None
    shift: float | None = None
    sigma_c: float = 0.0
    frame_delay: int = 0
    seed: int = 0
    num_videos: int = 1

    def __post_init__(self) -> None:
        self._check_types()
        if self.mode not in MODES:
            raise unknown("mode", self.mode, MODES)
        for name in ("aspect", "outpaint"):
            if (value := getattr(self, name)) is not None and value not in ASPECTS:
                raise unknown(name, value, ASPECTS)
        if self.size is not None:
            parse_size(self.size)
            if self.aspect is not None or self.outpaint is not None:
                raise UserError(f"both size {self.size} and an aspect were given: give one of them")
        if self.num_frames is not None:
            latent_frames(self.num_frames)
            if self.duration is not None:
                raise UserError(f"both duration {self.duration:g} and num_frames {self.num_frames} were given: give one of them")
        for name, low, high in (("duration", 0.0, MAX_SECONDS), ("extend_to", 0.0, MAX_SECONDS)):
            value = getattr(self, name)
            if value is not None and not low < value <= high:
                raise UserError(f"{name} {value:g} s: give more than {low:g} and at most {high:g} seconds")
        if self.strength is not None and not 0 <= self.strength <= 1:
            raise UserError(f"strength {self.strength:g}: give a number from 0 (forget the video) to 1 (keep it)")
        if not 0 <= self.sigma_c < 1:
            raise UserError(f"sigma_c {self.sigma_c:g}: give a noise level from 0 to less than 1")
        if self.shift is not None and not SHIFTS[0] <= self.shift <= SHIFTS[1]:  # near 0 no step has noise, and 0 / 0 is NaN
            raise UserError(f"shift {self.shift:g}: give a number from {SHIFTS[0]:g} to {SHIFTS[1]:g}")
        for name in (
            "guidance_scale",
            "camera_guidance_scale",
            "brush_guidance_scale",
            "reference_guidance_scale",
            "guidance_reach",
            "camera_scale",
        ):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise UserError(f"{name} {value}: give a number of 0 or more")
        if self.guidance_interval is not None:
            low, high = self.guidance_interval = tuple(self.guidance_interval)
            if not 0 <= low < high <= 1:
                raise UserError(f"guidance_interval {low:g} to {high:g}: give two noise levels, the lower first, from 0 to 1")
        for name in ("num_videos", "num_inference_steps", "guidance_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} {value}: give at least 1")
        if self.frame_delay < 0:
            raise UserError(f"frame_delay {self.frame_delay}: give a number of steps, 0 or more")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed {self.seed}: give a whole number from 0 to {2**32 - 1}")
        for _, frame, strength in self.keyframes:
            if frame < 0:
                raise UserError(f"keyframe at frame {frame}: frames count from 0")
            if not 0 < strength <= 1:
                raise UserError(f"keyframe at frame {frame} has strength {strength:g}: give a number above 0 and at most 1")
        self._check_together()
        if isinstance(self.camera, dict):
            check_axes(self.camera)
        elif isinstance(self.camera, str) and self.camera != WORDS and not os.path.isfile(self.camera):
            parse_axes(self.camera)

    def _check_types(self) -> None:
        """Check and convert types: numbers of NumPy become Python's, keyframes tuples of three."""
        for field_ in dataclasses.fields(self):
            value = getattr(self, field_.name)
            kind, optional = field_.type.removesuffix(" | None"), field_.type.endswith(" | None")
            if kind not in KINDS or (optional and value is None):
                continue
            takes, plain, said = KINDS[kind]
            if not isinstance(value, takes) or (kind in ("int", "float") and isinstance(value, bool)):
                several = "; num_videos makes several of one prompt" if field_.name == "prompt" and isinstance(value, list | tuple) else ""
                raise UserError(f"{field_.name} {_short(value)} is of type {type(value).__name__}: give {said}{several}")
            try:
                setattr(self, field_.name, plain(value))
            except OverflowError:  # an int with hundreds of digits; the range checks refuse it
                setattr(self, field_.name, math.inf)
        for name in ("prompt", "negative_prompt"):
            whole_characters(getattr(self, name) or "", name)
        pair = self.guidance_interval
        whole = isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(value, numbers.Real) for value in pair)
        if pair is not None and not (whole and all(abs(value) < 2 for value in pair)):
            raise UserError(f"guidance_interval {_short(pair)}: give two noise levels, such as (0.2, 0.9)")
        if not isinstance(self.camera, str | Path | dict | Trajectory | None):
            raise UserError(f"camera {_short(self.camera)}: give axes as in 'pan=5,zoom=2' or a dict, a file, or a Trajectory")
        if isinstance(self.camera, dict) and (
            bad := [k for k, v in self.camera.items() if isinstance(v, bool) or not isinstance(v, numbers.Real)]
        ):
            raise UserError(f"camera axis {bad[0]} is {_short(self.camera[bad[0]])}: give a number from -10 to 10")
        self.camera = str(self.camera) if isinstance(self.camera, Path) else self.camera
        self.tracks = as_tracks(self.tracks)
        self.shots = as_shots(self.shots)
        self.references = _pictures(self.references, "references")
        if len(self.references) > MOST_REFERENCES:
            line = f"{len(self.references)} references were given: give at most {MOST_REFERENCES}"
            raise UserError(line, code="too_many_references", most=MOST_REFERENCES)
        if not isinstance(self.keyframes, list | tuple):
            raise UserError(f"keyframes {_short(self.keyframes)}: give a list of (picture, frame) or (picture, frame, strength)")
        self.keyframes = [_keyframe(given) for given in self.keyframes]

    def _check_together(self) -> None:
        """Check fields that require or exclude each other."""
        needs_video = {"mask": self.mask, "outpaint": self.outpaint, "strength": self.strength}
        for name, value in needs_video.items():
            if value is not None and self.video is None and not (name != "strength" and self.image is not None):
                raise UserError(f"{name} was given without a video to apply it to: give video too")
        if self.video is not None and self.image is not None:
            line = "both image and video were given: the video's own frames start the clip; leave image out"
            raise UserError(line, code="beside_video", field="image")
        if self.loop and self.last_image is not None:
            raise UserError("both loop and last_image were given: a loop ends where it starts; leave one out", code="loop_and_last")
        if self.video is not None and self.loop:
            line = "both loop and video were given: loop makes a clip of its own; leave one out"
            raise UserError(line, code="beside_video", field="loop")
        if self.mask is not None and self.outpaint is not None:
            raise UserError("both mask and outpaint were given: give one of them")
        if self.outpaint is not None and self.aspect is not None:
            raise UserError("both outpaint and aspect were given: outpaint names the aspect; leave aspect out")
        if self.edited and self.extend_to is not None:
            raise UserError(f"both {self.edited} and extend_to were given: one changes a video, the other makes it longer; do them in turn")
        if self.video is not None and self.extend_to is not None and (self.duration or self.num_frames):
            length = "duration" if self.duration else "num_frames"
            raise UserError(f"both {length} and extend_to were given: one is what is added, the other the length of the whole; give one")
        if self.edited and self.tracks is not None:
            line = f"both {self.edited} and tracks were given: a given video moves as it does; leave one out"
            raise UserError(line, code="tracks_on_edit")
        if self.tracks is None and self.brush_guidance_scale not in (None, 1):
            line = f"brush_guidance_scale {self.brush_guidance_scale:g} was given without tracks to follow: give tracks too"
            raise UserError(line, code="nothing_to_guide", field="brush_guidance_scale", other="tracks")
        if not self.references and self.reference_guidance_scale not in (None, 1):
            line = f"reference_guidance_scale {self.reference_guidance_scale:g} was given without references: give pictures too"
            raise UserError(line, code="nothing_to_guide", field="reference_guidance_scale", other="references")
        cameras = (self.camera, *(shot.camera for shot in self.storyboard))
        if self.camera_scale != 1 and all(camera is None or camera == WORDS for camera in cameras):
            raise UserError(f"camera_scale {self.camera_scale:g} was given without a camera to scale: give camera too")
        if self.shots is not None:
            self._check_beside_shots()

    def _check_beside_shots(self) -> None:
        """Check what is given beside shots: each has its words, length and camera, and they are made anew, from a first frame at most."""
        of_each = {"prompt": self.prompt or None, "duration": self.duration, "num_frames": self.num_frames, "camera": self.camera}
        of_one = {"video": self.video, "loop": self.loop or None, "tracks": self.tracks, "control": self.control}
        of_one |= {"extend_to": self.extend_to}
        for name, value in of_each.items():
            if value is not None:
                line = f"both {name} and shots were given: every shot has its own {NAMED_IN_A_SHOT[name]}; leave {name} out"
                raise UserError(line, code="beside_shots", field=name)
        for name, value in of_one.items():
            if value is not None:
                line = f"both {name} and shots were given: {name} is of one shot; leave one of them out"
                raise UserError(line, code="beside_shots", field=name)

    @functools.cached_property
    def storyboard(self) -> list[Shot]:
        """The shots, read once from the file that `shots` may name; [] of a request without shots. Raises `UserError`."""
        return read_shots(self.shots) if isinstance(self.shots, str) else list(self.shots or ())

    @property
    def prompts(self) -> list[str]:
        """The prompt of every shot; of a request without shots its only one."""
        return [self.prompt] if self.shots is None else [shot.prompt for shot in self.storyboard]

    @property
    def edited(self) -> str | None:
        """The name of the field that changes given frames: mask, outpaint or strength; None if they are kept."""
        return next((name for name in ("mask", "outpaint", "strength") if getattr(self, name) is not None), None)

    def replace(self, **changes: Any) -> Request:
        """A copy with some fields changed, checked again."""
        return dataclasses.replace(self, **changes)


def _keyframe(given: Any) -> tuple[Any, int, float]:
    """A given keyframe as (picture, frame, strength)."""
    row = (*given, 1.0)[:3] if isinstance(given, list | tuple) and 2 <= len(given) <= 3 else None
    if row is not None:
        picture, frame, strength = row
        numeric = isinstance(frame, numbers.Integral) and isinstance(strength, numbers.Real)
        if numeric and not isinstance(picture, int | float | None) and not isinstance(frame, bool):
            return picture, int(frame), float(min(max(strength, -1e9), 1e9))  # an int of hundreds of digits is no float
    raise UserError(f"keyframe {_short(given)}: give (picture, frame) or (picture, frame, strength), such as ('mid.png', 20, 0.8)")


def _pictures(given: Any, name: str) -> list[Picture]:
    """A list of pictures from a list, or from one picture."""
    if isinstance(given, str | Path) or getattr(given, "ndim", 0) == 3:
        given = [given]
    if not isinstance(given, list | tuple) or any(isinstance(one, int | float | None) or isinstance(one, str) and not one for one in given):
        raise UserError(f"{name} {_short(given)}: give a list of pictures, such as ['thing.png']")
    return list(given)


def _short(value: Any) -> str:
    """A value shortened for a line of text."""
    if isinstance(value, list | tuple):
        inside = ", ".join(map(_short, value[:4])) + (", …" if len(value) > 4 else "")
        return f"({inside})" if isinstance(value, tuple) else f"[{inside}]"
    shape = getattr(value, "shape", None)
    text = repr(value) if shape is None else f"{type(value).__name__} {tuple(shape)}"
    return " ".join((text if len(text) <= 60 else text[:57] + "…").split())
