"""The paths of a clip through the VAE: whole, streamed in chunks of one latent frame, or in blended tiles. Training on all of them teaches
the decoder to hide the seams of tiles, and puts the stream, which is exact, under the loss."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn

from kling.vae.model import AutoencoderKLKling
from kling.vae.stream import StreamState, in_chunks, split_latents, split_video
from kling.vae.tiling import Tiles, in_tiles

PATHS = ("whole", "streamed", "tiled")


class Autoencoding(nn.Module):
    """Encode and decode video (b, 3, T, H, W) along one of `PATHS`. Returns the reconstruction, not clamped, the posterior, and the decoded
    latents of half height and width (None unless `halved`).

    The last is for scale equivariance (Skorokhodov et al., "Improving the diffusability of autoencoders", 2025): if halved latents must
    decode to the halved video, the encoder cannot encode fine patterns of its own, which a transformer learns late and badly.
    draw: a generator, to decode a sample of the posterior instead of its mean, so that its width is trained too.
    """

    def __init__(self, vae: AutoencoderKLKling) -> None:
        super().__init__()
        self.vae = vae

    def forward(
        self, video: Tensor, path: str = "whole", draw: torch.Generator | None = None, halved: bool = False
    ) -> tuple[Tensor, DiagonalGaussianDistribution, Tensor | None]:
        vae, s = self.vae, self.vae.spatial_factor
        tiles = half_tiles(max(video.shape[-2:]) // s, s)
        if path == "whole":
            moments = vae._encode(video)  # (b, 2c, f, h, w)
        elif path == "streamed":
            moments = in_chunks(vae._encode, split_video(video, 1), StreamState())
        else:
            moments = in_tiles(vae._encode, video, None, tiles)
        posterior = DiagonalGaussianDistribution(moments)
        latents = posterior.mode() if draw is None else posterior.sample(draw)  # (b, c, f, h, w)
        if path == "whole":
            made = vae._decode(latents)
        elif path == "streamed":
            made = in_chunks(vae._decode, split_latents(latents, 1), StreamState())
        else:
            made = in_tiles(vae._decode, latents, None, tiles.over(s))
        return made, posterior, vae._decode(half(latents)) if halved else None


def half(x: Tensor) -> Tensor:
    """(b, c, T, H, W) at half its height and width; every point is the mean of four."""
    return F.avg_pool3d(x, (1, 2, 2))


def half_tiles(cells: int, factor: int) -> Tiles:
    """Tiles slightly larger than half of the longer side of `cells` latent cells, so that two of them cover it with an overlap."""
    size = min(cells, math.ceil(cells / 2) + 1)
    return Tiles(size * factor, factor * min(2, size - 1))
