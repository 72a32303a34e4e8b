"""The straight path from data to noise: x_sigma = (1 - sigma) x0 + sigma eps, v = eps - x0 (Liu et al. 2022, arXiv 2209.03003)."""

from __future__ import annotations

import torch
from torch import Tensor


def velocity(x0: Tensor, noise: Tensor) -> Tensor:
    """v = dx/dsigma = eps - x0, the same at every sigma."""
    return noise - x0


def to_x0(z: Tensor, v: Tensor, sigma: Tensor) -> Tensor:
    """x0 = z - sigma v."""
    return torch.addcmul(z, sigma, v, value=-1)


def where_made(mask: Tensor | None, made: Tensor, given: Tensor) -> Tensor:
    """`made` where m > 0 and `given` elsewhere. Without a mask everything is generated: returns `made` itself, at no cost."""
    return made if mask is None else torch.where(mask > 0, made, given)
