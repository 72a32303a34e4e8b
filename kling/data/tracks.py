"""Files of tracks beside a manifest: points of a video, followed through a part of it.

safetensors   points (n, T, 2) x and y divided by width and height; there (n, T) 0 or 1; and as text fps, start (seconds), ratio (W / H)
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kling.condition.tracks import Tracks
from kling.errors import UserError
from kling.runtime.files import written


def save_tracks(path: Path, tracks: Tracks, fps: float, start: float, ratio: float) -> None:
    """Write tracks at `fps` frames a second from `start` seconds into a video whose picture has the aspect ratio W / H."""
    tensors = {"points": tracks.points.float().contiguous(), "there": tracks.there.to(torch.uint8).contiguous(), "code": tracks.code}
    with written(path) as temporary:
        save_file(tensors, temporary, {"fps": repr(fps), "start": repr(start), "ratio": repr(ratio)})


def load_tracks(path: Path, when: Tensor, size: tuple[int, int]) -> Tracks:
    """The tracks at times `when` (T,), in seconds into the video, on the crop of its picture that fills (H, W); those that are there at
    none of them are left out. Between two frames that show a point its place is interpolated. Raises `UserError` for a damaged file."""
    try:
        with safe_open(path, "pt") as file:
            told = file.metadata()
            points, there, code = (file.get_tensor(name) for name in ("points", "there", "code"))
            fps, start, ratio = (float(told[name]) for name in ("fps", "start", "ratio"))
        if points.ndim != 3 or points.shape[1] < 1 or points.shape[2] != 2 or there.shape != points.shape[:2] or len(code) != len(points):
            raise ValueError(f"points of shape {tuple(points.shape)} that are there in {tuple(there.shape)}")
        if not (points.isfinite().all() and fps > 0 and ratio > 0 and math.isfinite(fps * ratio) and math.isfinite(start)):
            raise ValueError("a number that is none")
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"tracks {path} cannot be read ({error}): run kling-data tracks again") from None
    place = (when.double() - start) * fps  # (T,) in frames of the file
    last = points.shape[1] - 1
    before = place.floor().long().clamp(0, max(0, last - 1))
    after = (before + 1).clamp(max=last)
    between = (place - before).clamp(0, 1).float()[:, None]  # (T, 1)
    covered = (place > -0.5) & (place < last + 0.5)  # (T,)
    shown = (there[:, before] > 0) & ((there[:, after] > 0) | (between[:, 0] < 0.25)) & covered  # (n, T)
    wider = ratio / (size[1] / size[0])
    zoom = torch.tensor([max(1.0, wider), max(1.0, 1 / wider)])
    moved = 0.5 + (torch.lerp(points[:, before], points[:, after], between) - 0.5) * zoom  # (n, T, 2)
    kept = shown.any(1)
    return Tracks(moved[kept], shown[kept], code[kept])
