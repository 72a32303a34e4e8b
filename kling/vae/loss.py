"""What the VAE is trained for: pixels, edges and motion that agree, and latents that are not far from a unit Gaussian.

All terms are means, over pixels or over latent values, so that size, length and batch do not change their balance.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor


@dataclass
class LossWeights:
    """Weights of the terms of `vae_loss`, and the width of Charbonnier's rounded corner."""

    pixel: float = 1.0  # weight of the distance between pixels
    edge: float = 0.5  # differences between neighbours in height and width: an L1 on pixels alone blurs
    motion: float = 0.5  # differences between neighbouring frames
    kl: float = 1e-4  # weight of the posterior's divergence from a normal one, nats
    halved: float = 0.0  # the same three terms of what halved latents decode to, against the halved video; a quarter is usual
    corner: float = 1e-3  # in units of [-1, 1]


def vae_loss(
    video: Tensor,
    reconstruction: Tensor,
    posterior: DiagonalGaussianDistribution,
    weights: LossWeights,
    halved: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of reconstructing video (b, 3, T, H, W), and its terms before weighting, detached, by name.

    halved: the halved video (b, 3, T, H/2, W/2) and what the halved latents decode to.
    """
    terms = distance(video, reconstruction, weights) | {"kl": kl(posterior)}
    if halved is not None:
        terms["halved"] = weighted(distance(*halved, weights), weights)
    return weighted(terms, weights), {name: term.detach() for name, term in terms.items()}


def distance(video: Tensor, reconstruction: Tensor, weights: LossWeights) -> dict[str, Tensor]:
    """How far a reconstruction (b, 3, T, H, W) is from a video in pixels, edges and motion (0 for a lone frame)."""
    error = (reconstruction - video).float()
    return {
        "pixel": charbonnier(error, weights.corner),
        "edge": (charbonnier(error.diff(dim=-1), weights.corner) + charbonnier(error.diff(dim=-2), weights.corner)) / 2,
        "motion": charbonnier(error.diff(dim=2), weights.corner) if error.shape[2] > 1 else error.new_zeros(()),
    }


def weighted(terms: dict[str, Tensor], weights: LossWeights) -> Tensor:
    """The sum of terms, each times its weight."""
    return sum(getattr(weights, name) * term for name, term in terms.items())


def charbonnier(x: Tensor, corner: float) -> Tensor:
    """mean √(x² + ε²) - ε: |x| with a rounded corner of width ε, zero at zero."""
    return (x * x + corner**2).sqrt().mean() - corner


def kl(posterior: DiagonalGaussianDistribution) -> Tensor:
    """KL(posterior ‖ N(0, 1)) = ½ (μ² + σ² - 1 - log σ²), mean over latent values. diffusers' own sums, and over images' axes only."""
    return 0.5 * torch.mean(posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float())
