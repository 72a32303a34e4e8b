"""Patches to channels and back: latents to tokens, pixels to a VAE's channels."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional as F


class PatchEmbed(nn.Conv3d):
    """A convolution whose stride is its kernel, computed as one matrix product: latents (b, c, G, h, w) -> tokens (b, n, d)."""

    def __init__(self, in_channels: int, dim: int, patch_size: tuple[int, int, int]) -> None:
        super().__init__(in_channels, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(patchify(x, self.kernel_size, "cthw").flatten(1, 3), self.weight.flatten(1), self.bias)


def patchify(x: Tensor, patch: tuple[int, int, int], order: str) -> Tensor:
    """(b, c, T, H, W) -> (b, T/pt, H/ph, W/pw, c·pt·ph·pw). order: of the axes inside a patch, "cthw" for example, the fastest last."""
    b, c, T, H, W = x.shape
    pt, ph, pw = patch
    x = x.reshape(b, c, T // pt, pt, H // ph, ph, W // pw, pw)
    return x.permute(0, 2, 4, 6, *({"c": 1, "t": 3, "h": 5, "w": 7}[axis] for axis in order)).flatten(4)


def unpatchify(x: Tensor, patch: tuple[int, int, int], order: str) -> Tensor:
    """Inverse of `patchify`: (b, f, h, w, c·pt·ph·pw) -> (b, c, f·pt, h·ph, w·pw)."""
    sizes = dict(zip("thw", patch, strict=True)) | {"c": x.shape[-1] // math.prod(patch)}
    x = x.unflatten(4, [sizes[axis] for axis in order])
    c, t, h, w = (4 + order.index(axis) for axis in "cthw")
    return x.permute(0, c, 1, t, 2, h, 3, w).flatten(6, 7).flatten(4, 5).flatten(2, 3)
