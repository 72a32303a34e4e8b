"""Latents to tokens and back."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional as F


class PatchEmbed(nn.Conv3d):
    """A convolution whose stride is its kernel, computed as one matrix product: latents (b, c, G, h, w) -> tokens (b, n, d)."""

    def __init__(self, in_channels: int, dim: int, patch_size: tuple[int, int, int]) -> None:
        super().__init__(in_channels, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(patchify(x, self.kernel_size), self.weight.flatten(1), self.bias)


def patchify(x: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """(b, c, G, h, w) -> (b, n, c·pt·ph·pw): tokens in (frame, row, column) order, channels in (c, pt, ph, pw) order."""
    b, c, G, h, w = x.shape
    pt, ph, pw = patch
    x = x.reshape(b, c, G // pt, pt, h // ph, ph, w // pw, pw)
    return x.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(b, -1, c * math.prod(patch))


def unpatchify(x: Tensor, grid: tuple[int, int, int], patch: tuple[int, int, int]) -> Tensor:
    """(b, n, pt·ph·pw·c) -> (b, c, G, h, w): Wan's output order, in which the channel is the fastest axis of a token."""
    (f, h, w), (pt, ph, pw) = grid, patch
    x = x.reshape(x.shape[0], f, h, w, pt, ph, pw, -1)
    return x.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)
