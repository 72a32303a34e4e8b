"""What conditions the transformer: noise level, text, kind of frame, tracks, and the image tokens of the older Wan I2V weights."""

from __future__ import annotations

import torch
from diffusers.models.attention import FeedForward
from diffusers.models.embeddings import PixArtAlphaTextProjection, TimestepEmbedding, Timesteps
from torch import Tensor, nn
from torch.nn import functional as F

from kling.nn.norm import LayerNorm
from kling.nn.patch import patchify


class ImageEmbedding(nn.Module):
    """Image-encoder tokens (b, i, image_dim) -> (b, i, d). With positions, the 2b rows of first and last frames join in pairs."""

    def __init__(self, image_dim: int, dim: int, pos_embed_seq_len: int | None = None) -> None:
        super().__init__()
        self.norm1 = LayerNorm(image_dim)
        self.ff = FeedForward(image_dim, dim, mult=1, activation_fn="gelu")
        self.norm2 = LayerNorm(dim)
        self.pos_embed = None if pos_embed_seq_len is None else nn.Parameter(torch.zeros(1, pos_embed_seq_len, image_dim))

    def forward(self, x: Tensor) -> Tensor:
        if self.pos_embed is not None:
            x = x.reshape(-1, 2 * x.shape[1], x.shape[2]) + self.pos_embed
        return self.norm2(self.ff(self.norm1(x)))


class KindEmbedding(nn.Embedding):
    """What a frame is to the clip (target, keyframe, history ...), added to its tokens; 0 until trained."""

    def zero_init(self) -> None:
        nn.init.zeros_(self.weight)


class TrackEmbedding(nn.Conv3d):
    """Maps of tracks (b, c, G, h, w) -> what they add to the tokens (b, n, d): one linear map of each patch, 0 until trained.

    Without a bias, so that a clip without tracks, whose map is 0, is computed to the bit as by a model that has none.
    """

    def __init__(self, channels: int, dim: int, patch_size: tuple[int, int, int]) -> None:
        super().__init__(channels, dim, kernel_size=patch_size, stride=patch_size, bias=False)

    def zero_init(self) -> None:
        nn.init.zeros_(self.weight)

    def forward(self, maps: Tensor) -> Tensor:
        return F.linear(patchify(maps, self.kernel_size, "cthw").flatten(1, 3), self.weight.flatten(1))  # (b, n, d)


class ConditionEmbedder(nn.Module):
    """Noise levels (u,) -> embedding (u, d) and the six vectors of each block (u, 6, d); text (b, l, e) -> (b, l, d). Names are Wan's.

    gate_value: for a flow map, the share that a second level, where the step ends, has in the embedding (AnyFlow, arXiv 2605.13724).
    deltatime_type: whether it is given as that level ("r") or as the length of the step ("t-r").
    """

    def __init__(
        self,
        dim: int,
        freq_dim: int,
        text_dim: int,
        timestep_scale: float,
        image_dim: int | None = None,
        pos_embed_seq_len: int | None = None,
        gate_value: float | None = None,
        deltatime_type: str = "r",
    ) -> None:
        super().__init__()
        self.timestep_scale, self.gate_value, self.deltatime_type = timestep_scale, gate_value, deltatime_type
        self.timesteps_proj = Timesteps(freq_dim, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedder = TimestepEmbedding(freq_dim, dim)
        self.delta_embedder = None if gate_value is None else TimestepEmbedding(freq_dim, dim)
        self.act_fn = nn.SiLU()
        self.time_proj = nn.Linear(dim, 6 * dim)
        self.text_embedder = PixArtAlphaTextProjection(text_dim, dim, act_fn="gelu_tanh")
        self.image_embedder = None if image_dim is None else ImageEmbedding(image_dim, dim, pos_embed_seq_len)

    def forward(
        self, sigma: Tensor, text: Tensor, image: Tensor | None = None, end: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        temb = self._embed(self.time_embedder, sigma)  # (u, d)
        if self.delta_embedder is not None:
            end = sigma if end is None else end
            delta = self._embed(self.delta_embedder, end if self.deltatime_type == "r" else sigma - end)
            temb = torch.lerp(temb, delta, self.gate_value)
        temb = temb.type_as(text)
        vectors = self.time_proj(self.act_fn(temb)).unflatten(1, (6, -1))  # (u, 6, d)
        return temb, vectors, self.text_embedder(text), None if image is None else self.image_embedder(image)

    def _embed(self, embedder: TimestepEmbedding, level: Tensor) -> Tensor:
        """Levels (u,) -> (u, d)."""
        # a float64 level keeps 1000σ exact to the last bit of a published timestep; bf16 would destroy it
        timestep = level.to(torch.promote_types(level.dtype, torch.float32)) * self.timestep_scale
        frequencies = self.timesteps_proj(timestep).to(embedder.linear_1.weight.dtype)  # (u, freq_dim)
        with torch.autocast(level.device.type, enabled=False):  # bf16 would round levels together, and sampling does not autocast
            return embedder(frequencies)
