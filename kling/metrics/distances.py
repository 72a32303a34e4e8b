"""Distances between two sets of features: Fréchet (FID, FVD) and maximum mean discrepancy (JEDi). Features are (n, d)."""

from __future__ import annotations

import torch
from torch import Tensor

from kling.errors import UserError


def frechet(a: Tensor, b: Tensor) -> float:
    """|μ₁ - μ₂|² + tr(Σ₁ + Σ₂ - 2 (Σ₁Σ₂)^½), the squared Fréchet distance of the Gaussians fitted to two sets.

    Heusel et al., "GANs trained by a two time-scale update rule converge to a local Nash equilibrium", 2017, equation 6. In float64;
    the trace of the root is computed from (Σ₁^½ Σ₂ Σ₁^½)^½, which is symmetric. Raises `UserError` if a set has no more samples than
    features: its covariance is singular, and the result would depend mainly on n.
    """
    for features in (a, b):
        n, d = features.shape
        if n <= d:
            raise UserError(f"{n} samples of {d} features each: a Fréchet distance needs more samples than features, at least {d + 1}")
    a, b = a.double(), b.double()
    return frechet_gaussians(a.mean(0), torch.cov(a.T).view(a.shape[1], -1), b.mean(0), torch.cov(b.T).view(b.shape[1], -1))


def frechet_gaussians(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """The same for two known Gaussians: means (d,), covariances (d, d)."""
    values, vectors = torch.linalg.eigh(cov_a.double())
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T  # Σ₁^½
    cross = torch.linalg.eigvalsh(root @ cov_b.double() @ root).clamp(min=0).sqrt().sum()
    return float((mean_a - mean_b).double().square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)


def mmd_polynomial(a: Tensor, b: Tensor, degree: int = 2, gamma: float | None = None, offset: float = 0.0) -> float:
    """Squared maximum mean discrepancy with k(x, y) = (γ x·y + offset)^degree, γ = 1/d by default; pairs (x, x) are included.

    JEDi (Luo et al., "Beyond FVD", 2024) is 100 times this on V-JEPA features, with degree 2 and no offset.
    """
    a, b = a.double(), b.double()
    gamma = 1 / a.shape[1] if gamma is None else gamma

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (gamma * x @ y.T + offset).pow(degree).mean()

    return float(kernel(a, a) + kernel(b, b) - 2 * kernel(a, b))
