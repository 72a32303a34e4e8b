"""Which pixels belong to a coloured object: closeness to a palette colour in any shade that the world's lighting gives."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

Palette = Mapping[str, tuple[float, float, float]]

SHADES = (0.45, 1.05)  # brightness of a surface, from facing away from the sun to facing it
TOLERANCE = 0.13  # distance in RGB within which a pixel has a colour; the grounds and the sky are farther away


def segment(video: Tensor, palette: Palette) -> tuple[Tensor, Tensor]:
    """(T, H, W, 3) uint8 -> each pixel's nearest palette colour (T, H, W) long, and how near it is: 1 for exactly, 0 for the background."""
    rgb, colours = video.float() / 255, torch.tensor(list(palette.values()))  # (T, H, W, 3), (n, 3)
    along, length = rgb @ colours.T, colours.square().sum(dim=1)  # (T, H, W, n), (n,)
    shade = (along / length).clamp(*SHADES)
    distance2 = rgb.square().sum(dim=-1, keepdim=True) + shade * (shade * length - 2 * along)  # |rgb - shade * colour|²
    nearest, index = distance2.min(dim=-1)
    return index, (1 - nearest / TOLERANCE**2).clamp(0, 1)


def grown(mask: Tensor, pixels: int) -> Tensor:
    """A mask (T, H, W) bool, extended by `pixels` on every side."""
    k = 2 * pixels + 1
    return F.max_pool2d(mask[:, None].float(), k, stride=1, padding=pixels)[:, 0] > 0
