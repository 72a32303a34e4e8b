"""The motion brush as a user gives it: what is under a mask, or under a point, of the first frame moves along a path.

    Track("ball.png", [(120, 300), (400, 260)])      what is white in ball.png moves by (280, -40) pixels during the clip
    Track(None, [(120, 300), (400, 260)])            what is at (120, 300) moves to (400, 260)
    Track("house.png")                               what is white in house.png stays where it is

    {"tracks": [{"mask": "ball.png", "points": [[120, 300], [400, 260]]}, …]}        the same in a file; masks lie beside it

Points are pixels of the first frame as it was given, from the top left, pixel centres at whole numbers; they are scaled and cropped as
that picture is. Without a first frame they are pixels of the clip, and the k-th track is that of the k-th thing that the prompt names; but
a loop makes its first frame before, as a still picture, and then a track is of what lies under it there. The points of a path are spread
evenly over the clip.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kling.condition.tracks import BACKGROUND, Tracks, joined
from kling.data.image import read_image, read_mask
from kling.data.transforms import cover_size, fit
from kling.errors import UserError
from kling.runtime.files import head, parse_json

THING_POINTS = 8  # points under a mask that are followed: training has as many of a thing
STILL_POINTS = 48  # of what stays
MOST = 16  # tracks of one clip
RATIO = 1.03  # of a mask's aspect ratio to its picture's, at most


@dataclass(frozen=True)
class Track:
    """mask: a file, or (H, W) from 0 to 1 (uint8: to 255), white or 1 where the thing is; None: what is under the first point. points: its
    path, (x, y) each; none: it stays."""

    mask: Any = None
    points: Sequence[tuple[float, float]] = ()


@dataclass(frozen=True)
class Stroke:
    """A `Track` on the frame of a clip, whose width and height are both 1: the points that are followed (n, 2), and how far they have
    moved at evenly spaced times (k, 2)."""

    start: Tensor
    moved: Tensor
    thing: bool  # not the background


def as_track(given: Any, where: str = "tracks") -> Track:
    """A checked `Track` from one, from (mask, points), or from a dict with these keys. Raises `UserError`."""
    if isinstance(given, dict):
        if odd := sorted(set(given) - {"mask", "points"}, key=str):
            raise UserError(f"{where}: a track has '{odd[0]}': its keys are mask and points")
        given = (given.get("mask"), given.get("points", ()))
    if isinstance(given, Track):
        given = (given.mask, given.points)
    if not isinstance(given, list | tuple) or len(given) != 2:
        raise UserError(f"{where}: a track is of type {type(given).__name__}: give Track(mask, points), or a list of them")
    mask, points = given
    mask = str(mask) if isinstance(mask, Path) else mask
    if isinstance(mask, str) and not mask:
        raise UserError(f"{where}: a mask is empty: give a picture, or None for what is under the first point")
    if not isinstance(points, list | tuple | np.ndarray | Tensor):
        raise UserError(f"{where}: points {points!r:.40}: give a list of (x, y)")
    path = [_point(point, where) for point in points]
    if mask is None and not path:
        raise UserError(f"{where}: a track has neither a mask nor points: give one of them, or both")
    return Track(mask, tuple(path))


def _point(given: Any, where: str) -> tuple[float, float]:
    try:
        x, y = (float(value) for value in given if not isinstance(value, str | bool))
        if math.isfinite(x) and math.isfinite(y):
            return x, y
    except (TypeError, ValueError, OverflowError):
        pass
    raise UserError(f"{where}: point {given!r:.40}: give (x, y) in pixels of the first frame")


def as_tracks(given: Any) -> str | list[Track] | None:
    """The `tracks` of a request: a file, or checked tracks; None for none."""
    if isinstance(given, str | Path):
        return str(given)
    if given is None:
        return None
    if isinstance(given, Track | dict):
        given = [given]
    if not isinstance(given, list | tuple):
        raise UserError(f"tracks of type {type(given).__name__}: give a JSON file, or a list of Track(mask, points)")
    tracks = [as_track(track) for track in given]
    if len(tracks) > MOST:
        raise UserError(f"{len(tracks)} tracks were given: give at most {MOST}")
    return tracks or None


def parse_brush(text: str) -> Track:
    """`MASK.png:x,y;x,y;…`, or `x,y;x,y;…` without a mask.

    >>> parse_brush("ball.png:10,20;30,20.5")
    Track(mask='ball.png', points=((10.0, 20.0), (30.0, 20.5)))
    """
    mask, colon, path = text.rpartition(":")
    try:
        points = tuple(tuple(float(number) for number in point.split(",")) for point in path.split(";") if point.strip())
    except ValueError:
        points = ()
    if not points or any(len(point) != 2 for point in points) or (colon and not mask):  # a mask as of a shell's variable that is not set
        raise UserError(f"brush '{text}': write it as MASK.png:x,y;x,y, such as ball.png:120,300;400,260, or leave the mask out")
    return as_track((mask or None, points), "brush")


def read_tracks(path: str | Path) -> list[Track]:
    """The tracks of a JSON file; masks that are named without a folder lie beside it. Raises `UserError`."""
    path = Path(path)
    head(path)
    try:
        rows = parse_json(path.read_text(encoding="utf-8-sig"), once=True)["tracks"]
        if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
            raise TypeError
    except (ValueError, KeyError, TypeError):
        raise UserError(f'tracks file {path}: give {{"tracks": [{{"mask": "a.png", "points": [[x, y], …]}}, …]}}') from None
    tracks = [as_track(row, f"tracks file {path}") for row in rows]
    if odd := next((track for track in tracks if track.mask is not None and not isinstance(track.mask, str)), None):
        raise UserError(f"tracks file {path}: mask {odd.mask!r:.40}: give the name of a picture, or null")
    return as_tracks([Track(None if t.mask is None else str(path.parent / t.mask), t.points) for t in tracks])


def tracks_of(given: str | list[Track] | None) -> list[Track]:
    """The tracks of a request, read from its file if it names one."""
    return read_tracks(given) if isinstance(given, str) else list(given or ())


def read_strokes(tracks: Sequence[Track], size: tuple[int, int], picture: tuple[int, int] | None, cell: int) -> list[Stroke]:
    """Tracks on a clip of `size` (H, W). picture: (H, W) of the first frame as it was given; None without one. cell: pixels of a latent.

    Raises `UserError` for a mask without a white area, or of another shape than the picture, and for a start outside the picture.
    """
    return [_stroke(track, size, picture or size, cell) for track in tracks]


def stroke_tracks(strokes: Sequence[Stroke], T: int) -> Tracks:
    """The tracks of strokes over T frames. The k-th thing has code k."""
    parts, things = [], 0
    for stroke in strokes:
        things += stroke.thing
        when = torch.linspace(0, len(stroke.moved) - 1, T)  # (T,)
        i = when.floor().long().clamp(max=max(0, len(stroke.moved) - 2))
        after = (i + 1).clamp(max=len(stroke.moved) - 1)
        moved = torch.lerp(stroke.moved[i], stroke.moved[after], (when - i)[:, None])  # (T, 2)
        points = stroke.start[:, None] + moved  # (n, T, 2)
        n = len(points)
        parts.append(Tracks(points, torch.ones(n, T, dtype=torch.bool), torch.full((n,), things if stroke.thing else BACKGROUND)))
    return joined(parts)


def _stroke(track: Track, size: tuple[int, int], picture: tuple[int, int], cell: int) -> Stroke:
    (H, W), (h, w) = size, picture
    high, wide = cover_size(h, w, H, W)
    scale, corner = torch.tensor([wide / w, high / h]), torch.tensor([(wide - W) // 2, (high - H) // 2])
    path = (torch.tensor(track.points).view(-1, 2) + 0.5) * scale - corner  # (k, 2) in pixels of the clip
    if track.mask is None:
        x, y = path[0].tolist()
        if not (0 <= x <= W and 0 <= y <= H):
            where = "" if (h, w) == (H, W) else " (after its crop to the clip's aspect)"
            px, py = track.points[0]
            line = f"a track starts at {px:g},{py:g}, outside the first frame of {w}x{h}{where}: start where the thing is"
            raise UserError(line, code="track_outside")
        start = path[:1]
    else:
        start = _points_under(_mask_on(track.mask, size, picture), cell, THING_POINTS if track.points else STILL_POINTS)
    moved = path - path[:1] if len(path) else torch.zeros(1, 2)
    return Stroke(start / torch.tensor([W, H]), moved / torch.tensor([W, H]), thing=bool(track.points))


def _mask_on(mask: Any, size: tuple[int, int], picture: tuple[int, int]) -> Tensor:
    """A mask on the clip's frame, (H, W) bool."""
    name = f"mask {mask}" if isinstance(mask, str) else "a track's mask"
    if isinstance(mask, str):
        h, w = read_image(mask).shape[:2]
        pixels = read_mask(mask, *size)
    else:
        try:
            given = torch.as_tensor(np.asarray(mask))
        except (TypeError, ValueError, RuntimeError):
            given = torch.empty(0)
        if given.ndim != 2 or not given.numel():
            raise UserError(f"{name} of type {type(mask).__name__} and shape {tuple(np.shape(mask))}: give (H, W), or a picture's file")
        h, w = given.shape
        pixels = fit(given.float() / (255 if given.dtype == torch.uint8 and given.max() > 1 else 1), *size)
    if not 1 / RATIO < (w / h) / (picture[1] / picture[0]) < RATIO:
        line = f"{name} is {w}x{h} and the first frame {picture[1]}x{picture[0]}: paint it on that frame, so that they match"
        raise UserError(line, code="mask_shape", size=f"{w}x{h}", other=f"{picture[1]}x{picture[0]}")
    if not (white := pixels > 0.5).any():
        raise UserError(f"{name} has no white area in the clip's frame: paint white what the track is of", code="nothing_marked")
    return white


def _points_under(mask: Tensor, cell: int, most: int) -> Tensor:
    """Up to `most` points (n, 2) of a mask (H, W) bool, in pixels: the one nearest to its middle, then one of each cell, evenly chosen."""
    places = mask.nonzero().flip(1).float() + 0.5  # (m, 2)
    middle = places[(places - places.mean(0)).square().sum(1).argmin()]
    H, W = mask.shape
    rim = cell // 4  # pixels; what is nearer to the border may show what is beside it
    deep = -F.max_pool2d(-mask[None].float(), 2 * rim + 1, stride=1, padding=rim)[0] > 0  # (H, W)
    grid = torch.cartesian_prod(torch.arange(cell // 2, H, cell), torch.arange(cell // 2, W, cell))  # (g, 2) rows and columns
    inside = grid[deep[grid[:, 0], grid[:, 1]]].flip(1) + 0.5  # (g', 2)
    if len(inside) >= most:
        inside = inside[torch.linspace(0, len(inside) - 1, most - 1).round().long()]
    return torch.cat([middle[None], inside])
