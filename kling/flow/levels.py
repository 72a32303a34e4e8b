"""Noise levels: how training draws them and the grid that sampling descends. sigma is in [0, 1] everywhere, and 1 is noise."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from kling.errors import UserError, unknown

DENSITIES = ("logit_normal", "uniform")


def shift_sigma(sigma: Tensor, shift: float) -> Tensor:
    """sigma' = s sigma / (1 + (s - 1) sigma): more steps at high noise for s > 1 (Esser et al. 2024, arXiv 2403.03206, eq. 23)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def draw_sigma(
    shape: tuple[int, ...],
    generator: Generator,
    density: str = "logit_normal",
    shift: float = 1.0,
    within: tuple[float, float] = (0.0, 1.0),
) -> Tensor:
    """Training levels in (0, 1), or between the two levels `within` for one of two experts. `logit_normal` is sigmoid(N(0, 1))."""
    if density == "logit_normal":
        sigma = torch.randn(shape, generator=generator).sigmoid()
    elif density == "uniform":
        sigma = torch.rand(shape, generator=generator)
    else:
        raise unknown("density", density, DENSITIES)
    return truncate_density(shift_sigma(sigma, shift).clamp(1e-4, 1 - 1e-4), within, density, shift)


def truncate_density(sigma: Tensor, within: tuple[float, float], density: str, shift: float) -> Tensor:
    """Draws of a density -> draws of the same density truncated to `within`; the order of quantiles is kept."""
    if within == (0.0, 1.0):
        return sigma
    low, high = density_cdf(torch.tensor(within, dtype=torch.float64, device=sigma.device), density, shift)
    return density_ppf(low + (high - low) * density_cdf(sigma.double(), density, shift), density, shift).to(sigma.dtype)


def density_ppf(quantile: Tensor, density: str, shift: float) -> Tensor:
    """The level below which the fraction `quantile` of the training density lies."""
    return shift_sigma(torch.special.ndtri(quantile).sigmoid() if density == "logit_normal" else quantile, shift)


def density_cdf(sigma: Tensor, density: str, shift: float) -> Tensor:
    """Inverse of `density_ppf`."""
    plain = shift_sigma(sigma, 1 / shift).clamp(0, 1)  # rounding can return slightly more than 1
    return torch.special.ndtr(plain.logit()) if density == "logit_normal" else plain


def sigma_grid(steps: int, shift: float = 1.0) -> Tensor:
    """(steps + 1,) levels from 1 down to exactly 0."""
    if steps < 1:
        raise UserError(f"num_inference_steps {steps}: give at least 1")
    if shift <= 0:
        raise UserError(f"shift {shift}: give a positive number")
    return shift_sigma(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift).float()


def frame_grid(sigmas: Tensor, delays: Tensor) -> Tensor:
    """Levels (steps', *delays.shape) where a frame starts `delays` steps after the first: diffusion forcing (Chen et al. 2024, arXiv
    2407.01392).

    With all delays 0 every column is the plain grid.
    """
    last = len(sigmas) - 1
    time = torch.arange(len(sigmas) + int(delays.max()), device=sigmas.device)  # (steps',)
    step = time.view(-1, *[1] * delays.ndim) - delays
    return sigmas[step.clamp(0, last)]
