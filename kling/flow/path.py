"""The straight path from data to noise: x_sigma = (1 - sigma) x0 + sigma eps, v = eps - x0 (Liu et al. 2022, arXiv 2209.03003)."""

from __future__ import annotations

from torch import Tensor


def velocity(x0: Tensor, noise: Tensor) -> Tensor:
    """v = dx/dsigma = eps - x0, the same at every sigma."""
    return noise - x0


def to_x0(z: Tensor, v: Tensor, sigma: Tensor) -> Tensor:
    """x0 = z - sigma v."""
    return z - sigma * v


def to_noise(z: Tensor, v: Tensor, sigma: Tensor) -> Tensor:
    """eps = z + (1 - sigma) v."""
    return z + (1 - sigma) * v
