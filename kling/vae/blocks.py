"""The VAE's encoder and decoder and their parts, all on channels-last activations (b, t, h, w, c).

Parameter names are those of diffusers' `AutoencoderKLWan`: published weights load.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kling.nn.channel_norm import ChannelNorm, NormSilu
from kling.nn.conv import CausalConv3d, Downsample, PointConv2d, StreamState, Upsample, fold, started, unfold


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x))))): (b, T, H, W, c) -> (b, T, H, W, c')."""

    def __init__(self, channels: int, out_channels: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = NormSilu(channels)
        self.conv1 = CausalConv3d(channels, out_channels, 3, padding=1)
        self.norm2 = NormSilu(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = CausalConv3d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = CausalConv3d(channels, out_channels, 1) if channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        y = self.conv1(x, state, self.norm1)  # (b, T, H, W, c')
        if self.training and self.dropout.p:
            y = self.conv2(self.dropout(self.norm2(y, y[:, :0])), state)
        else:
            y = self.conv2(y, state, self.norm2)
        shortcut = self.conv_shortcut(x)
        return y + shortcut if torch.is_grad_enabled() else y.add_(shortcut)


class AttentionBlock(nn.Module):
    """Single-head self-attention over the points of each frame, residual: (b, T, H, W, c) -> the same. Keeps no state."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels, axes=2)
        self.to_qkv = PointConv2d(channels, 3 * channels, 1)
        self.proj = PointConv2d(channels, channels, 1)

    def forward(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        y = self.norm(x).flatten(2, 3).flatten(0, 1).unsqueeze(1)  # (b·T, 1, H·W, c)
        q, k, v = self.to_qkv(y).chunk(3, dim=-1)
        return x + self.proj(F.scaled_dot_product_attention(q, k, v)).view_as(x)


class MidBlock(nn.Module):
    """Residual, attention, residual at the coarsest size."""

    def __init__(self, channels: int, dropout: float) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([AttentionBlock(channels)])
        self.resnets = nn.ModuleList([ResidualBlock(channels, channels, dropout) for _ in range(2)])

    def forward(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        x = self.resnets[0](x, state)
        x = self.attentions[0](x)
        return self.resnets[1](x, state)


class ResidualDownBlock(nn.Module):
    """Wan 2.2: residual blocks and a downsampler, with a shortcut without weights around them."""

    def __init__(self, channels: int, out_channels: int, dropout: float, depth: int, space: bool, time: bool) -> None:
        super().__init__()
        widths = [channels] + [out_channels] * depth
        self.resnets = nn.ModuleList([ResidualBlock(c, d, dropout) for c, d in itertools.pairwise(widths)])
        self.downsampler = Downsample(out_channels, time) if space else None
        self.shortcut = {"channels": out_channels, "time": 1 + time, "space": 1 + space}

    def forward(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        shortcut = fold(x, **self.shortcut)
        for block in self.resnets:
            x = block(x, state)
        if self.downsampler is not None:
            x = self.downsampler(x, state)
        return x + shortcut


class UpBlock(nn.Module):
    """Wan 2.1: depth + 1 residual blocks, then an upsampler that halves the channels."""

    def __init__(self, channels: int, out_channels: int, dropout: float, depth: int, space: bool, time: bool) -> None:
        super().__init__()
        widths = [channels] + [out_channels] * (depth + 1)
        self.resnets = nn.ModuleList([ResidualBlock(c, d, dropout) for c, d in itertools.pairwise(widths)])
        self.upsamplers = nn.ModuleList([Upsample(out_channels, out_channels // 2, time)]) if space else None

    def forward(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        for block in self.resnets:
            x = block(x, state)
        return x if self.upsamplers is None else self.upsamplers[0](x, state)


class ResidualUpBlock(nn.Module):
    """Wan 2.2: depth + 1 residual blocks and an upsampler that keeps the channels, with a shortcut without weights around them."""

    def __init__(self, channels: int, out_channels: int, dropout: float, depth: int, space: bool, time: bool) -> None:
        super().__init__()
        widths = [channels] + [out_channels] * (depth + 1)
        self.resnets = nn.ModuleList([ResidualBlock(c, d, dropout) for c, d in itertools.pairwise(widths)])
        self.upsampler = Upsample(out_channels, out_channels, time) if space else None
        self.shortcut = {"channels": out_channels, "time": 1 + time, "space": 2}

    def forward(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        start = not started(state, self.resnets[0].conv1)  # checked before the blocks run: afterwards the stream has started
        y = x
        for block in self.resnets:
            y = block(y, state)
        if self.upsampler is None:
            return y
        return self.upsampler(y, state) + unfold(x, **self.shortcut, start=start)


class Encoder(nn.Module):
    """Pixels (or patches of them) to moments: (b, 1+4k, H, W, c) -> (b, 1+k, h, w, 2z)."""

    def __init__(
        self, channels: int, width: int, out_channels: int, dim_mult: list[int], depth: int, attn_scales: list[float],
        time: list[bool], dropout: float, is_residual: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        widths = [width * m for m in [1, *dim_mult]]
        last = len(dim_mult) - 1
        self.conv_in = CausalConv3d(channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for i, (c, d) in enumerate(itertools.pairwise(widths)):
            if is_residual:
                self.down_blocks.append(ResidualDownBlock(c, d, dropout, depth, space=i < last, time=i < last and time[i]))
                continue
            for j in range(depth):
                self.down_blocks.append(ResidualBlock(d if j else c, d, dropout))
                if 0.5**i in attn_scales:
                    self.down_blocks.append(AttentionBlock(d))
            if i < last:
                self.down_blocks.append(Downsample(d, time[i]))
        self.mid_block = MidBlock(widths[-1], dropout)
        self.norm_out = NormSilu(widths[-1])
        self.conv_out = CausalConv3d(widths[-1], out_channels, 3, padding=1)
        self.gradient_checkpointing = False

    def forward(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        x = self.conv_in(x, state)
        for block in [*self.down_blocks, self.mid_block]:
            x = self._gradient_checkpointing_func(block, x) if self.gradient_checkpointing and state is None else block(x, state)
        return self.conv_out(x, state, self.norm_out)


class Decoder(nn.Module):
    """Latents to pixels (or patches of them): (b, 1+k, h, w, z) -> (b, 1+4k, H, W, c)."""

    def __init__(
        self, channels: int, width: int, out_channels: int, dim_mult: list[int], depth: int,
        time: list[bool], dropout: float, is_residual: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        widths = [width * m for m in [dim_mult[-1], *reversed(dim_mult)]]
        last = len(dim_mult) - 1
        self.conv_in = CausalConv3d(channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], dropout)
        self.up_blocks = nn.ModuleList()
        for i, (c, d) in enumerate(itertools.pairwise(widths)):
            flags = {"space": i < last, "time": i < last and time[i]}
            if is_residual:
                self.up_blocks.append(ResidualUpBlock(c, d, dropout, depth, **flags))
            else:
                self.up_blocks.append(UpBlock(c // 2 if i else c, d, dropout, depth, **flags))  # the previous upsampler has halved c
        self.norm_out = NormSilu(widths[-1])
        self.conv_out = CausalConv3d(widths[-1], out_channels, 3, padding=1)
        self.gradient_checkpointing = False

    def forward(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        x = self.conv_in(x, state)
        for block in [self.mid_block, *self.up_blocks]:
            x = self._gradient_checkpointing_func(block, x) if self.gradient_checkpointing and state is None else block(x, state)
        return self.conv_out(x, state, self.norm_out)
