"""The motion brush of Kling's HTTP interface, to and from our tracks.

    {"static_mask": "<base64>", "dynamic_masks": [{"mask": "<base64>", "trajectories": [{"x": 279, "y": 219}, {"x": 417, "y": 65}]}]}

Its points count pixels of the first frame from the bottom left, ours from the top left. It takes up to 6 masks of 2 to 77 points each, and
refuses them with a camera or a last frame; here they go with both.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from kling.errors import UserError
from kling.sampling.brush import Track, as_track

MASKS, POINTS = 6, (2, 77)


def tracks_from_wire(body: dict[str, Any], height: int) -> list[Track]:
    """The tracks of a request's `dynamic_masks` and `static_mask`; other keys are not looked at. height: of the first frame, in pixels.

    Raises `UserError` for more masks or points than the format has, a mask that is no picture in base64, or a point that is no x and y.
    """
    dynamic = body.get("dynamic_masks") or []
    if not isinstance(dynamic, list) or not all(isinstance(row, dict) for row in dynamic):
        raise UserError("dynamic_masks: give a list of {mask, trajectories}")
    if len(dynamic) > MASKS:
        raise UserError(f"dynamic_masks has {len(dynamic)} masks: give at most {MASKS}")
    tracks = []
    for i, row in enumerate(dynamic):
        where, path = f"dynamic_masks[{i}]", row.get("trajectories")
        if not isinstance(path, list) or not POINTS[0] <= len(path) <= POINTS[1]:
            found = len(path) if isinstance(path, list) else "no"
            raise UserError(f"{where} has {found} trajectories points: give {POINTS[0]} to {POINTS[1]}")
        points = [(point.get("x"), point.get("y")) if isinstance(point, dict) else point for point in path]
        track = as_track((_picture(row.get("mask"), f"{where}.mask"), points), where)
        tracks.append(Track(track.mask, tuple((x, height - 1 - y) for x, y in track.points)))
    if body.get("static_mask"):
        tracks.append(Track(_picture(body["static_mask"], "static_mask")))
    return tracks


def tracks_to_wire(tracks: Sequence[Track], height: int) -> dict[str, Any]:
    """The `dynamic_masks` and `static_mask` of tracks. Raises `UserError` for what the format lacks: tracks without a mask, several static
    masks, more than 6 others, and paths of fewer than 2 or more than 77 points."""
    dynamic, static = [t for t in tracks if t.points], [t for t in tracks if not t.points]
    if any(track.mask is None for track in tracks):
        raise UserError("a track without a mask: dynamic_masks needs one, white where the thing is")
    if len(dynamic) > MASKS or len(static) > 1:
        raise UserError(f"{len(dynamic)} moving and {len(static)} static tracks: the format carries {MASKS} and 1")
    if odd := next((track for track in dynamic if not POINTS[0] <= len(track.points) <= POINTS[1]), None):
        raise UserError(f"a path of {len(odd.points)} points: the format carries {POINTS[0]} to {POINTS[1]}")
    body: dict[str, Any] = {"dynamic_masks": [{"mask": _base64(t.mask), "trajectories": _wire_path(t, height)} for t in dynamic]}
    return body | ({"static_mask": _base64(static[0].mask)} if static else {})


def _wire_path(track: Track, height: int) -> list[dict[str, int]]:
    return [{"x": round(x), "y": round(height - 1 - y)} for x, y in track.points]


def _picture(text: Any, where: str) -> np.ndarray:
    """A mask (H, W) uint8 from base64."""
    if isinstance(text, str) and text.startswith(("http://", "https://")):
        raise UserError(f"{where} is an address: download the picture and give it in base64")
    try:
        data = base64.b64decode(str(text).rpartition(",")[2], validate=True)
        return np.array(Image.open(BytesIO(data), formats=("PNG", "JPEG")).convert("L"))
    except (binascii.Error, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise UserError(f"{where} is no picture in base64: give a PNG or JPEG, white where the thing is") from None


def _base64(mask: Any) -> str:
    """PNG in base64 of a mask: a file, or (H, W) from 0 to 1 or uint8."""
    if isinstance(mask, str | Path):
        picture = Image.open(mask).convert("L")
    else:
        pixels = np.asarray(mask)
        white = pixels > 0.5 if pixels.dtype != np.uint8 or pixels.max() <= 1 else pixels > 127
        picture = Image.fromarray(np.where(white, 255, 0).astype(np.uint8))
    out = BytesIO()
    picture.save(out, format="PNG")
    return base64.b64encode(out.getvalue()).decode()
