"""How closely a thing of a small-world clip follows the path that was asked of it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kling.metrics.report import Row
from kling.metrics.segment import Palette, segment
from kling.metrics.things import find_things

NEAR = 0.5  # of the thing's size: as far as it may be from the end of its path
LOST = 2.0  # sizes from its path, for a frame that does not show the thing


def thing_places(video: Tensor, palette: Palette, colour: str) -> Tensor:
    """The place of the thing of a colour in each frame of a clip (T, H, W, 3) uint8: the middle of its silhouette's box, (T, 2) x and y in
    pixels; NaN where it is not seen."""
    (thing,) = find_things(*(x.numpy() for x in segment(video, palette)), [list(palette).index(colour)])
    middle = (thing.box[:, :2] + thing.box[:, 2:]) / 2
    middle[thing.parts == 0] = np.nan
    return torch.from_numpy(middle).float()


def follows(video: Tensor, palette: Palette, colour: str, asked: Tensor, size: Tensor) -> Row:
    """Scores of a clip whose thing of a colour was asked to be at `asked` (T, 2) in pixels. size: (T,) its height there, in pixels.

    Returns "near": whether it ends within `NEAR` sizes of the path's end. "distance": its mean distance from the path, in sizes; frames
    that do not show it count as `LOST`. A place outside the picture is not asked for.
    """
    H, W = video.shape[1:3]
    off = ((thing_places(video, palette, colour) - asked).norm(dim=1) / size).nan_to_num(LOST).clamp(max=LOST)  # (T,)
    inside = ((asked >= 0) & (asked <= torch.tensor([W, H]))).all(1)
    distance = float(off[inside].mean()) if inside.any() else None
    return {"near": bool(off[-1] <= NEAR), "distance": distance}
