"""A storyboard as a user gives it: shots of one clip, each with words, seconds and a camera of its own.

    [Shot("a red ball rolls left on grass", 2.5), Shot("a red ball jumps up and down on grass", 2.5, "pan=5")]

    shots:                                                                              the same in a yaml file
      - {prompt: a red ball rolls left on grass, seconds: 2.5}
      - {prompt: a red ball jumps up and down on grass, seconds: 2.5, camera: pan=5}

A camera is given as for a clip, and begins anew with its shot; a camera file lies beside the yaml file. A shot without one leaves the
camera to its words. A latent frame holds four pixel frames and shows one shot, so a cut is moved to where the nearest one begins.
"""

from __future__ import annotations

import dataclasses
import numbers
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from kling.cameras.axes import WORDS, check_axes, parse_axes
from kling.cameras.trajectory import Trajectory
from kling.config import read_yaml
from kling.errors import UserError, unknown
from kling.runtime.files import head
from kling.shapes import TEMPORAL, clip_frames, first_frame, latent_frames

MOST = 6  # shots of one clip
LONGEST = 3600  # seconds of a shot; a request allows fewer for the whole
KEYS = ("prompt", "seconds", "camera")


@dataclass(frozen=True)
class Shot:
    """prompt: its words. seconds: how long. camera: as in `Request`, from the shot's own first frame; None leaves it to the words."""

    prompt: str
    seconds: float
    camera: str | dict[str, float] | Trajectory | None = None


@dataclass(frozen=True)
class Timeline:
    """Where the shots of a clip of `frames` pixel frames begin: latent frames, the first is 0."""

    starts: tuple[int, ...]
    frames: int

    @property
    def cuts(self) -> tuple[int, ...]:
        """Pixel frames at which a shot begins, without the first."""
        return tuple(first_frame(j) for j in self.starts[1:])

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """(first, end) pixel frames of every shot."""
        return list(pairwise([0, *self.cuts, self.frames]))

    def within(self, start: int, frames: int) -> list[tuple[int, int]]:
        """The shots of a part of the clip from pixel frame `start`, a multiple of 4: (number, latent frame of the part where it begins)."""
        origin, f = start // TEMPORAL, latent_frames(frames)
        first = max(k for k, j in enumerate(self.starts) if j <= origin)
        return [(first, 0), *((k, j - origin) for k, j in enumerate(self.starts) if origin < j < origin + f)]


def timeline(shots: Sequence[Shot], fps: float) -> Timeline:
    """Cuts at the latent frames that begin nearest to the asked times, so that roundings do not add up. Raises `UserError` for a shot that
    is too short to get a latent frame."""
    whole = sum(shot.seconds for shot in shots)
    if clip_frames(whole, fps) == 1:
        least = f"{TEMPORAL / fps:g}"
        line = f"shots of {whole:g} s in all are a single picture: give at least {least} s, or a prompt and num_frames 1"
        raise UserError(line, code="shots_too_short", seconds=f"{whole:g}", least=least)
    until = [sum(shot.seconds for shot in shots[: k + 1]) for k in range(len(shots) - 1)]
    bounds = [0, *(round((t * fps + TEMPORAL - 1) / TEMPORAL) for t in until), latent_frames(clip_frames(whole, fps))]
    for k, (start, end) in enumerate(pairwise(bounds)):
        if end <= start:
            least = f"{TEMPORAL / fps:g}"
            line = f"shot {k + 1} of {shots[k].seconds:g} s is shorter than a latent frame: give at least {least} s"
            raise UserError(line, code="short_shot", number=k + 1, seconds=f"{shots[k].seconds:g}", least=least)
    return Timeline(tuple(bounds[:-1]), clip_frames(whole, fps))


def rounding_note(shots: Sequence[Shot], times: Timeline, fps: float) -> str:
    """One line: the lengths that shots get, and those that were asked for."""
    got = " + ".join(f"{(end - start) / fps:.3g}" for start, end in times.ranges)
    asked = " + ".join(f"{shot.seconds:.3g}" for shot in shots)
    frames = f"cut{'s' * (len(times.cuts) > 1)} at frame {', '.join(map(str, times.cuts))} of {times.frames}"
    return f"shots of {got} s ({asked} asked), {frames}: a cut lies where a latent frame begins, every {TEMPORAL} frames"


def as_shot(given: Any, where: str = "shots") -> Shot:
    """A checked `Shot` from one, from a dict with its keys, or from (prompt, seconds[, camera]). Raises `UserError`."""
    if isinstance(given, dict):
        for key in given:
            if key not in KEYS:
                raise UserError(f"{where}: {unknown('key of a shot', str(key), KEYS)}")
        given = (given.get("prompt", ""), given.get("seconds"), given.get("camera"))
    if isinstance(given, Shot):
        given = (given.prompt, given.seconds, given.camera)
    if not isinstance(given, list | tuple) or len(given) not in (2, 3):
        raise UserError(f"{where}: a shot is of type {type(given).__name__}: give Shot(prompt, seconds, camera), or a list of them")
    prompt, seconds, camera = (*given, None)[:3]
    if not isinstance(prompt, str) or not prompt.strip():
        raise UserError(f"{where}: a shot has the prompt {prompt!r:.40}: say in words what it shows", code="wordless_shot")
    whole_characters(prompt, f"{where}: prompt")
    if isinstance(seconds, bool) or not isinstance(seconds, numbers.Real) or not 0 < seconds <= LONGEST:
        raise UserError(f"{where}: the shot '{prompt:.40}' lasts {seconds!r:.20} seconds: give a number above 0, and at most {LONGEST}")
    camera = str(camera) if isinstance(camera, Path) else camera
    if not isinstance(camera, str | dict | Trajectory | None):
        raise UserError(f"{where}: camera {camera!r:.40}: give axes as in 'pan=5,zoom=2' or a dict, a file, or a Trajectory")
    if isinstance(camera, dict):
        if bad := [k for k, v in camera.items() if isinstance(v, bool) or not isinstance(v, numbers.Real)]:
            raise UserError(f"{where}: camera axis {bad[0]} is {camera[bad[0]]!r:.40}: give a number from -10 to 10")
        check_axes(camera)
    elif isinstance(camera, str) and camera != WORDS and not os.path.isfile(camera):
        parse_axes(camera)
    return Shot(prompt, float(seconds), camera)


def whole_characters(text: str, where: str) -> None:
    """Raises `UserError` for half of a character, which no encoder and no record takes."""
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise UserError(f"{where} {text!r:.60} holds half a character (a lone surrogate): write it again")


def as_shots(given: Any) -> str | list[Shot] | None:
    """The `shots` of a request: a file, or checked shots; None for none."""
    if isinstance(given, str | Path):
        return str(given)
    if given is None:
        return None
    if not isinstance(given, list | tuple):
        raise UserError(f"shots of type {type(given).__name__}: give a yaml file, or a list of Shot(prompt, seconds, camera)")
    shots = [as_shot(shot) for shot in given]
    if len(shots) > MOST:
        raise UserError(f"{len(shots)} shots were given: give at most {MOST}", code="too_many_shots", most=MOST)
    return shots or None


def read_shots(path: str | Path) -> list[Shot]:
    """The shots of a yaml file; camera files that are named without a folder lie beside it. Raises `UserError`."""
    path = Path(path)
    head(path)
    try:
        fields = read_yaml(path)
    except UserError as error:
        raise UserError(str(error).replace("config", "shots file", 1)) from None
    rows = fields.get("shots")
    if set(fields) != {"shots"} or not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"shots file {path}: give shots: and below it a line '- {{prompt: …, seconds: …, camera: …}}' for each")
    beside = [
        row | {"camera": str(path.parent / row["camera"])}
        if isinstance(row.get("camera"), str) and os.path.isfile(path.parent / row["camera"])
        else row
        for row in rows
    ]
    return as_shots([as_shot(row, f"shots file {path}") for row in beside])


def joined_cameras(paths: Sequence[Trajectory | None], ranges: Sequence[tuple[int, int]]) -> Trajectory | None:
    """The cameras of all shots, one after another, each relative to its own first frame; those without one stand still, and are masked
    where they are used. None if no shot has one."""
    if not any(paths):
        return None
    lens = next(path.intrinsics[:1] for path in paths if path is not None)
    still = [Trajectory(torch.eye(3, 4).expand(end - start, 3, 4), lens.expand(end - start, 4)) for start, end in ranges]
    parts = [still if path is None else path for path, still in zip(paths, still, strict=True)]
    return Trajectory(*(torch.cat([getattr(part, field.name) for part in parts]) for field in dataclasses.fields(Trajectory)))
