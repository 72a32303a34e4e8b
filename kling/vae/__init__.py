"""Video <-> latents: the causal 3-D VAE, its streams, tiles and losses."""

from kling.vae.loss import LossWeights, vae_loss
from kling.vae.model import AutoencoderKLKling, Reconstruction
from kling.vae.stream import StreamState, split_latents, split_video

__all__ = ["AutoencoderKLKling", "LossWeights", "Reconstruction", "StreamState", "split_latents", "split_video", "vae_loss"]
