"""Pixel metrics: tensors in, numbers out. Videos are (b, 3, T, H, W) in [-1, 1]."""

from __future__ import annotations

from torch import Tensor


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of every frame, (b, T)."""
    error = (a.float() - b.float()).square().mean(dim=(1, 3, 4))  # (b, T)
    return 10 * (4 / error.clamp(min=1e-10)).log10()
