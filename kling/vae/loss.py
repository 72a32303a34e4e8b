"""The VAE's loss: distances in pixels, edges and motion, and the latents' divergence from a unit Gaussian.

All terms are means over pixels or latent values, so that size, length and batch do not change their balance.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor


@dataclass
class LossWeights:
    """Weights of the terms of `vae_loss`, and the width of the Charbonnier loss's rounded corner."""

    pixel: float = 1.0  # weight of the distance between pixels
    edge: float = 0.5  # differences between neighbours in height and width: L1 on pixels alone gives blur
    motion: float = 0.5  # differences between consecutive frames
    kl: float = 1e-4  # weight of the posterior's divergence from a standard normal, nats
    halved: float = 0.0  # the same three terms between the decoded halved latents and the halved video; a quarter is usual
    corner: float = 1e-3  # where the loss of a pixel turns from squared to absolute, in units of the pixel range [-1, 1]


def vae_loss(
    video: Tensor,
    reconstruction: Tensor,
    posterior: DiagonalGaussianDistribution,
    weights: LossWeights,
    halved: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of reconstructing video (b, 3, T, H, W), and its terms before weighting, detached, by name.

    halved: the halved video (b, 3, T, H/2, W/2) and the decoded halved latents.
    """
    terms = distance(video, reconstruction, weights) | {"kl": kl(posterior)}
    if halved is not None:
        terms["halved"] = weighted(distance(*halved, weights), weights)
    return weighted(terms, weights), {name: term.detach() for name, term in terms.items()}


def distance(video: Tensor, reconstruction: Tensor, weights: LossWeights) -> dict[str, Tensor]:
    """The distances between a reconstruction (b, 3, T, H, W) and a video in pixels, edges and motion (0 for a single frame)."""
    error = (reconstruction - video).float()
    return {
        "pixel": charbonnier(error, weights.corner),
        "edge": (charbonnier(error.diff(dim=-1), weights.corner) + charbonnier(error.diff(dim=-2), weights.corner)) / 2,
        "motion": charbonnier(error.diff(dim=2), weights.corner) if error.shape[2] > 1 else error.new_zeros(()),
    }


def weighted(terms: dict[str, Tensor], weights: LossWeights) -> Tensor:
    """The weighted sum of the terms."""
    return sum(getattr(weights, name) * term for name, term in terms.items())


def charbonnier(x: Tensor, corner: float) -> Tensor:
    """mean √(x² + ε²) - ε: |x| with a rounded corner of width ε, zero at zero."""
    return (x * x + corner**2).sqrt().mean() - corner


def kl(posterior: DiagonalGaussianDistribution) -> Tensor:
    """KL(posterior ‖ N(0, 1)) = ½ (μ² + σ² - 1 - log σ²), mean over latent values. diffusers' own sums, and supports images only."""
    return 0.5 * torch.mean(posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float())
