"""The ways a clip goes through the VAE: whole, streamed in chunks of one latent frame, or in blended tiles. A training that takes them all
teaches the decoder to hide the seams of tiles, and keeps the stream, which is exact, on the path of the loss."""

from __future__ import annotations

import math

from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn

from kling.vae.model import AutoencoderKLKling
from kling.vae.stream import StreamState, in_chunks, split_latents, split_video
from kling.vae.tiling import Tiles, in_tiles

PATHS = ("whole", "streamed", "tiled")


class Autoencoding(nn.Module):
    """Encode and decode video (b, 3, T, H, W) along one of `PATHS`: the reconstruction, not clamped, and the posterior."""

    def __init__(self, vae: AutoencoderKLKling) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, video: Tensor, path: str = "whole") -> tuple[Tensor, DiagonalGaussianDistribution]:
        vae, s = self.vae, self.vae.spatial_factor
        if path == "whole":
            return vae(video, return_dict=False)
        if path == "streamed":
            posterior = DiagonalGaussianDistribution(in_chunks(vae._encode, split_video(video, 1), StreamState()))  # (b, c, f, h, w)
            return in_chunks(vae._decode, split_latents(posterior.mode(), 1), StreamState()), posterior
        tiles = half_tiles(max(video.shape[-2:]) // s, s)
        posterior = DiagonalGaussianDistribution(in_tiles(vae._encode, video, None, tiles))
        return in_tiles(vae._decode, posterior.mode(), None, tiles.over(s)), posterior


def half_tiles(cells: int, factor: int) -> Tiles:
    """Tiles a little larger than half of the longer side of `cells` latent cells, so that two of them cover it and overlap."""
    size = min(cells, math.ceil(cells / 2) + 1)
    return Tiles(size * factor, factor * min(2, size - 1))
