"""Which pixels belong to a coloured object: nearness to a palette colour under any of the world's shades."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

Palette = Mapping[str, tuple[float, float, float]]

SHADES = (0.45, 1.05)  # brightness of a surface, from turned away from the sun to facing it
TOLERANCE = 0.13  # distance in RGB within which a pixel is of a colour; the grounds and the sky stay further off


def segment(video: Tensor, palette: Palette) -> Tensor:
    """(T, H, W, 3) uint8 -> (T, H, W) long: the index of each pixel's palette colour, -1 for the background."""
    rgb = video.float() / 255
    distances = []
    for colour in palette.values():
        c = torch.tensor(colour)
        shade = ((rgb @ c) / (c @ c)).clamp(*SHADES)
        distances.append((rgb - shade[..., None] * c).norm(dim=-1))
    distance, index = torch.stack(distances).min(dim=0)
    return torch.where(distance < TOLERANCE, index, -1)


def grown(mask: Tensor, pixels: int) -> Tensor:
    """A mask (T, H, W) bool, wider by `pixels` on every side."""
    k = 2 * pixels + 1
    return F.max_pool2d(mask[:, None].float(), k, stride=1, padding=pixels)[:, 0] > 0
