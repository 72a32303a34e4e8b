"""The causal 3-D VAE: video (b, 3, 1+4k, H, W) in [-1, 1] <-> latents (b, z, 1+k, H/s, W/s).

A superset of diffusers' `AutoencoderKLWan`: the same config keys and parameter names, so Wan 2.1 and 2.2 weights load and give the same
output. One code path serves whole clips, streams and training; see `kling.nn.conv` for how.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Self

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor

from kling.errors import UserError, unknown
from kling.nn.conv import CausalConv3d, Downsample, StreamState, Upsample, started
from kling.nn.patch import patchify, unpatchify
from kling.runtime.device import upload
from kling.shapes import TEMPORAL, latent_size
from kling.vae.blocks import AttentionBlock, Decoder, Encoder, ResidualBlock
from kling.vae.stream import in_chunks, split_latents, split_video
from kling.vae.tiling import Tiles, in_tiles

# Without gradients a whole clip is processed in chunks of at most this many pixels (b·T·H·W), or one latent frame: memory is constant in T.
PIXELS_PER_PASS = 2**20
# A key of the published Wan 2.2 configs that diffusers has never used.
LEGACY_KEYS = {"clip_output"}

PIXELS = "ctwh"  # channel order of folded pixels, as in the published Wan 2.2 weights: (colour, column, row)


@dataclass
class Reconstruction(BaseOutput):
    """`sample` (b, 3, T, H, W), and the posterior `latent_dist` that the loss needs."""

    sample: Tensor
    latent_dist: DiagonalGaussianDistribution


class AutoencoderKLKling(ModelMixin, ConfigMixin):
    """Causal 3-D VAE. Config keys as in diffusers' `AutoencoderKLWan`; `latents_mean` and `latents_std` default to 0 and 1.

    `is_residual` and `patch_size` make the Wan 2.2 type. Raises `UserError` for a config that contradicts itself.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["ResidualBlock", "ResidualDownBlock", "ResidualUpBlock", "UpBlock", "MidBlock"]
    _group_offload_block_modules = ["quant_conv", "post_quant_conv", "encoder", "decoder"]
    _skip_keys = ["state"]  # a StreamState is modified in place: hooks must not copy it

    @register_to_config
    def __init__(
        self,
        base_dim: int = 96,
        decoder_base_dim: int | None = None,
        z_dim: int = 16,
        dim_mult: Sequence[int] = (1, 2, 4, 4),
        num_res_blocks: int = 2,
        attn_scales: Sequence[float] = (),
        temperal_downsample: Sequence[bool] = (False, True, True),
        dropout: float = 0.0,
        latents_mean: Sequence[float] | None = None,
        latents_std: Sequence[float] | None = None,
        is_residual: bool = False,
        in_channels: int = 3,
        out_channels: int = 3,
        patch_size: int | None = None,
        scale_factor_temporal: int = TEMPORAL,
        scale_factor_spatial: int = 8,
    ) -> None:
        super().__init__()
        mean, std = list(latents_mean or [0.0] * z_dim), list(latents_std or [1.0] * z_dim)
        # No key counts as "left at its default": `from_config` would drop such keys, even after a training has measured the statistics.
        self.register_to_config(latents_mean=mean, latents_std=std, _use_default_values=[])
        self._check_config()
        self.tiles: Tiles | None = None
        dim_mult, time = list(dim_mult), list(temperal_downsample)
        common = {"dim_mult": dim_mult, "depth": num_res_blocks, "dropout": dropout, "is_residual": is_residual}
        self.encoder = Encoder(in_channels, base_dim, 2 * z_dim, attn_scales=attn_scales, time=time, **common)
        self.quant_conv = CausalConv3d(2 * z_dim, 2 * z_dim, 1)
        self.post_quant_conv = CausalConv3d(z_dim, z_dim, 1)
        self.decoder = Decoder(z_dim, decoder_base_dim or base_dim, out_channels, time=time[::-1], **common)
        self.initialize_weights()

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """For training from scratch: every residual branch starts at 0, and frames are independent of each other.

        Kernels over time start with only their last tap; halving time averages two frames, doubling repeats one. So a VAE trained on single
        frames works on videos from the first step.
        """
        for module in self.modules():
            if isinstance(module, torch.nn.Conv2d | torch.nn.Conv3d):
                torch.nn.init.kaiming_normal_(module.weight if module.weight.ndim == 4 else module.weight[:, :, -1], nonlinearity="linear")
                torch.nn.init.zeros_(module.bias)
            if isinstance(module, CausalConv3d):
                module.weight[:, :, :-1] = 0
        for module in self.modules():
            if isinstance(module, ResidualBlock):
                torch.nn.init.zeros_(module.conv2.weight)
            elif isinstance(module, AttentionBlock):
                torch.nn.init.zeros_(module.proj.weight)
            elif isinstance(module, Downsample | Upsample) and module.time_conv is not None:
                module.start_frame_by_frame()

    def _check_config(self) -> None:
        c = self.config
        time, steps = list(c.temperal_downsample), len(c.dim_mult) - 1
        if len(time) != steps or 2 ** sum(time) != TEMPORAL:
            raise UserError(f"temperal_downsample {time}: give {steps} flags, one for each step of dim_mult, two of them true")
        for key, factor in {"scale_factor_temporal": TEMPORAL, "scale_factor_spatial": self.spatial_factor}.items():
            if c[key] != factor:
                raise UserError(f"{key} {c[key]} does not fit dim_mult, temperal_downsample and patch_size: use {factor}")
        for key in ("latents_mean", "latents_std"):
            if len(c[key]) != c.z_dim:
                raise UserError(f"{key} has {len(c[key])} values: give z_dim = {c.z_dim}")

    @property
    def spatial_factor(self) -> int:
        """Pixels along one side of a latent element."""
        return 2 ** (len(self.config.dim_mult) - 1) * (self.config.patch_size or 1)

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        """After any move to CUDA, store kernels channels-last, as clips are here; otherwise cuDNN would convert them in every call."""
        super()._apply(*args, **kwargs)
        for p in self.parameters():
            if p.device.type == "cuda" and p.ndim in (4, 5):
                p.data = p.data.contiguous(memory_format=torch.channels_last if p.ndim == 4 else torch.channels_last_3d)
        return self

    # ---- whole clips, or chunks of a stream ----

    @apply_forward_hook
    def encode(self, video: Tensor, state: StreamState | None = None, return_dict: bool = True) -> AutoencoderKLOutput | tuple:
        """video (b, 3, T, H, W) -> posterior over latents (b, z, f, H/s, W/s).

        T = 1 + 4k; with a `state` that has started, T = 4k. Raises `UserError` for other counts and for sizes that do not divide.
        """
        latent_size(*video.shape[-2:], self.spatial_factor)
        going = started(state, self.encoder.conv_in)

        def moments(video: Tensor, state: StreamState | None) -> Tensor:
            return in_chunks(self._encode, split_video(video, self._hop(video, TEMPORAL), going), state)

        posterior = DiagonalGaussianDistribution(in_tiles(moments, video, state, self.tiles))
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    @apply_forward_hook
    def decode(self, latents: Tensor, state: StreamState | None = None, return_dict: bool = True) -> DecoderOutput | tuple:
        """latents (b, z, f, h, w), not normalised -> video (b, 3, 1 + 4(f-1), H, W) in [-1, 1]; 4f frames if `state` has started."""
        s = self.spatial_factor

        def pixels(latents: Tensor, state: StreamState | None) -> Tensor:
            return in_chunks(self._decode, split_latents(latents, self._hop(latents, TEMPORAL * s * s)), state)

        video = in_tiles(pixels, latents, state, self.tiles and self.tiles.over(s)).clamp(-1, 1)
        return DecoderOutput(sample=video) if return_dict else (video,)

    def forward(
        self, sample: Tensor, sample_posterior: bool = False, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> Reconstruction | tuple:
        """Encode and decode video (b, 3, T, H, W). The result is not clamped, so that the loss sees values outside [-1, 1]."""
        posterior = self.encode(sample).latent_dist
        latents = posterior.sample(generator) if sample_posterior else posterior.mode()
        video = self._decode(latents)
        return Reconstruction(sample=video, latent_dist=posterior) if return_dict else (video, posterior)

    # ---- streams ----

    def encode_stream(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Posterior means of one stream, chunk by chunk: (b, 3, 1+4j, H, W), then (b, 3, 4j, H, W) each -> (b, z, f, h, w) each."""
        state = StreamState()
        for chunk in chunks:
            yield self.encode(chunk, state).latent_dist.mode()

    def decode_stream(self, latents: Tensor, hop: int = 1, cuts: Sequence[int] = ()) -> Iterator[Tensor]:
        """Frames in [-1, 1], yielded as they are decoded, `hop` latent frames at a time: (b, z, f, h, w) -> (b, 3, t, H, W) each.

        cuts: latent frames, rising, at which another shot begins. There the decoder forgets the frames before, and remembers the shot's
        first latent in their place: with two pictures in its memory it mixes them in the first frames after a cut.
        """
        for start, end in pairwise([0, *cuts, latents.shape[2]]):
            shot, state = latents[:, :, start:end], StreamState()
            if start:
                self.decode(shot[:, :, :1], state)  # a stream begins with a latent of one frame: that frame is not shown
            for chunk in split_latents(shot, hop):
                yield self.decode(chunk, state).sample

    # ---- large pictures ----

    def enable_tiling(self, size: int = 256, overlap: int = 64) -> None:
        """Encode and decode pictures larger than `size` pixels in square tiles whose seams blend over `overlap` pixels.

        Raises `UserError` if either does not divide into latents or the tiles would not advance.
        """
        s = self.spatial_factor
        if size % s or overlap % s or not 0 <= overlap < size:
            raise UserError(f"tiles of {size} with overlap {overlap}: give multiples of {s} pixels, the overlap smaller than the tile")
        self.tiles = Tiles(size, overlap)

    def disable_tiling(self) -> None:
        """Process whole pictures again."""
        self.tiles = None

    # ---- scale of the latents ----

    def normalize(self, latents: Tensor) -> Tensor:
        """To the scale of the DiT: (z - latents_mean) / latents_std for each channel."""
        mean, std = self._statistics(latents)
        return (latents - mean) / std

    def denormalize(self, latents: Tensor) -> Tensor:
        """Inverse of `normalize`."""
        mean, std = self._statistics(latents)
        return latents * std + mean

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        both = (torch.tensor(self.config[key], dtype=like.dtype).view(1, -1, 1, 1, 1) for key in ("latents_mean", "latents_std"))
        return tuple(upload(t, like.device) for t in both)

    # ---- the two halves ----

    def _encode(self, video: Tensor, state: StreamState | None = None) -> Tensor:
        p = self.config.patch_size or 1
        x = self.encoder(patchify(video, (1, p, p), PIXELS).contiguous(), state)  # (b, f, h, w, 2z)
        return self.quant_conv(x).movedim(-1, 1)

    def _decode(self, latents: Tensor, state: StreamState | None = None) -> Tensor:
        x = self.post_quant_conv(latents.movedim(1, -1).contiguous())  # (b, f, h, w, z)
        p = self.config.patch_size or 1
        return unpatchify(self.decoder(x, state), (1, p, p), PIXELS)

    def _hop(self, x: Tensor, pixels: int) -> int:
        """Latent frames per pass over x (b, _, n, h, w), of whose points each is `pixels` pixels: all of them if gradients are needed."""
        b, _, n, h, w = x.shape
        return n if torch.is_grad_enabled() else max(1, PIXELS_PER_PASS // (b * h * w * pixels))

    # ---- loading ----

    @classmethod
    def from_config(cls, config: dict[str, Any] | None = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As in diffusers, but an unknown key is a `UserError`, not a warning."""
        known = cls._get_init_keys(cls) - {"self"}
        for key in config or {}:
            if not key.startswith("_") and key not in known | LEGACY_KEYS:
                raise unknown("VAE config key", key, sorted(known))
        return super().from_config(config, return_unused_kwargs, **kwargs)
