"""Pictures too large for memory: overlapping square tiles, each with a stream state of its own, blended where they overlap.

Blending hides the seams; the result is not exact, because attention and the edge of a tile see less than the whole picture.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kling.nn.conv import StreamState


@dataclass(frozen=True)
class Tiles:
    """Side of a tile and width of the overlap of two, in points of the tensor that is split."""

    size: int
    overlap: int

    def over(self, factor: int) -> Tiles:
        """The same tiles on a grid that is coarser by `factor`."""
        return Tiles(self.size // factor, self.overlap // factor)

    def starts(self, length: int) -> list[int]:
        """First points of the tiles that cover `length` points; the last tile ends with them."""
        return [min(i, max(0, length - self.size)) for i in range(0, max(1, length - self.overlap), self.size - self.overlap)]


def in_tiles(half: Callable[[Tensor, StreamState | None], Tensor], x: Tensor, state: StreamState | None, tiles: Tiles | None) -> Tensor:
    """Run one half of the VAE on each tile of x (b, c, T, H, W) and blend: (b, c', T', H·r, W·r), r is the ratio of output to input size.

    Each output point is the mean over the tiles that contain it, weighted by its distance from their edges, up to the overlap.
    """
    H, W = x.shape[-2:]
    if tiles is None or max(H, W) <= tiles.size:
        return half(x, state)
    total = weight = None
    for top in tiles.starts(H):
        for left in tiles.starts(W):
            tile = x[..., top : top + tiles.size, left : left + tiles.size]
            y = half(tile, state.part((top, left)) if state is not None else None)  # (b, c', T', h, w)
            h, w = y.shape[-2:]
            r = w / tile.shape[-1]  # below 1 for the encoder
            if total is None:
                total = y.new_zeros(*y.shape[:3], round(H * r), round(W * r))
                weight = y.new_zeros(total.shape[-2:])
            at = (..., slice(round(top * r), round(top * r) + h), slice(round(left * r), round(left * r) + w))
            ramp = min_edge(h, tiles.overlap * r, y)[:, None] * min_edge(w, tiles.overlap * r, y)  # (h, w)
            total[at] += y * ramp
            weight[at] += ramp
    return total / weight


def min_edge(n: int, limit: float, like: Tensor) -> Tensor:
    """Distance of each of n points from the nearer end, counted from 1, at most `limit` (at least 1): (n,)."""
    i = torch.arange(1, n + 1, device=like.device, dtype=like.dtype)
    return torch.minimum(i, i.flip(0)).clamp(max=max(1.0, limit))
