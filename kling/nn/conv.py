"""Causal 3-D convolution, and resampling of time and space, with one code path for whole clips and for streams.

Every temporal module is called as `module(x, state)`. With state None, x starts a stream and nothing is kept for later. With a
`StreamState`, each convolution reads from it the last few frames of the previous chunk, and stores those that the next chunk will need:
the outputs of the chunks, joined in time, equal the output of the whole clip.

A convolution reads one window [history | new] in one tensor. Norm and activation write straight into it, so nothing is padded or joined.

Activations are contiguous channels-last tensors (b, t, h, w, c): norms, attention and 1x1 convolutions read the channels of a point
side by side, time and space fold into the batch without a copy, and oneDNN and cuDNN have their fastest kernels for it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kling.errors import UserError
from kling.nn.channel_norm import NormSilu


class StreamState:
    """What a stream keeps between chunks: for each causal convolution the last few frames that it saw.

    A state belongs to one stream of one model, so any number of streams may run on a model at once. The encoder and the decoder of a model
    are different modules, so one state may serve both. With gradients on, the stored frames carry them across chunks.
    """

    def __init__(self) -> None:
        self.tails: dict[nn.Module, Tensor] = {}  # (b, k, h, w, c) each; k = kernel - stride, at most 2
        self.parts: dict[object, StreamState] = {}  # a tiled picture has one stream per tile

    def part(self, key: object) -> StreamState:
        """The state of one part of the picture."""
        return self.parts.setdefault(key, StreamState())

    def started(self, module: nn.Module) -> bool:
        """True once `module` has seen a chunk of this stream."""
        return module in self.tails or any(part.started(module) for part in self.parts.values())

    def history(self, module: nn.Module, x: Tensor) -> Tensor:
        """The frames before x (b, t, h, w, c). Raises `UserError` if x differs from this stream in batch or frame size."""
        tail = self.tails[module]
        if tail[:, 0].shape != x[:, 0].shape:
            was, now = (f"batch {y.shape[0]} of {y.shape[3]}x{y.shape[2]}" for y in (tail, x))
            raise UserError(f"a stream that began with {was} cannot go on with {now}: give each stream a StreamState of its own")
        return tail


def started(state: StreamState | None, module: nn.Module) -> bool:
    """True if `module` continues an earlier chunk; no state means the start."""
    return state is not None and state.started(module)


def conv(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    """2-D or 3-D convolution of channels-last x (b, [t,] h, w, c) -> (b, [t',] h', w', c').

    Uses oneDNN for every fp32 batch on CPU: for batch 1, torch picks its own `slow_conv3d` when c·t·h <= 20480, which is the case in every
    layer of a small streaming decoder, and 5 times slower.
    """
    x = x.movedim(-1, 1)
    fp32 = x.dtype == torch.float32 and not torch.is_autocast_enabled(x.device.type)
    if fp32 and x.device.type == "cpu" and torch.backends.mkldnn.is_available():
        y = torch.ops.aten.mkldnn_convolution(x, weight, bias, padding, stride, [1] * len(stride), 1)
    else:
        y = (F.conv3d if weight.ndim == 5 else F.conv2d)(x, weight, bias, tuple(stride), tuple(padding))
    return y.movedim(1, -1).contiguous()  # a kernel without channels-last support returns another layout


class CausalConv3d(nn.Conv3d):
    """3-D convolution whose output frame t sees input frames <= t only. x (b, T, H, W, c) -> (b, T', H', W', c').

    `padding` (t, h, w) as in `nn.Conv3d`, but all 2t frames of time padding go before the first frame. With `norm`, the convolution sees
    silu(norm(x)). A chunk too short for one output gives zero frames.
    """

    def forward(self, x: Tensor, state: StreamState | None = None, norm: NormSilu | None = None) -> Tensor:
        (kt, kh, kw), (st, sh, sw), (pt, ph, pw) = self.kernel_size, self.stride, self.padding
        if self.kernel_size == (1, 1, 1):
            return F.linear(x, self.weight.flatten(1), self.bias)
        b, T, H, W, _ = x.shape
        clip = state is None and (kt, pt) == (3, 1) and T > 0
        history = state.history(self, x) if started(state, self) else zeros(x, min(1, T - 1) if clip else 2 * pt)
        frames = torch.cat([history, x], dim=1) if norm is None else norm(x, history)  # (b, k + T, H, W, c)
        if clip:
            # only zeros come before frame 0, so its own tap is the whole sum (with 3 frames, a third of the products would be with zeros)
            first = conv(frames[:, -T], self.weight[:, :, -1], self.bias, (sh, sw), (ph, pw))[:, None]  # (b, 1, H', W', c')
            return first if T == 1 else torch.cat([first, conv(frames, self.weight, self.bias, self.stride, (0, ph, pw))], dim=1)
        if state is not None:
            state.tails[self] = frames[:, st - kt :].clone()  # a copy: a view would keep the whole window in memory
        if frames.shape[1] < kt:
            return x.new_empty(b, 0, (H + 2 * ph - kh) // sh + 1, (W + 2 * pw - kw) // sw + 1, self.out_channels)
        return conv(frames, self.weight, self.bias, self.stride, (0, ph, pw))


def zeros(x: Tensor, k: int) -> Tensor:
    """k empty frames before x (b, t, h, w, c): (b, k, h, w, c)."""
    return x.new_zeros(()).expand(x.shape[0], k, *x.shape[2:])


class PointConv2d(nn.Conv2d):
    """1x1 convolution: (..., c) -> (..., c')."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.flatten(1), self.bias)


class HalvingConv2d(nn.Conv2d):
    """3x3 convolution with stride 2, zeros after the last row and column: (n, h, w, c) -> (n, h/2, w/2, c')."""

    def forward(self, x: Tensor) -> Tensor:
        return conv(F.pad(x, (0, 0, 0, 1, 0, 1)), self.weight, self.bias, self.stride, self.padding)


class DoublingConv2d(nn.Conv2d):
    """Each point repeated 2x2, then a 3x3 convolution with padding 1: (n, h, w, c) -> (n, 2h, 2w, c').

    Two of the three taps of a row always meet copies of one point. So both steps together are one transposed convolution, whose four taps
    a row are w₀, w₀ + w₁, w₁ + w₂, w₂ in reversed order: 4/9 of the products, and the repeated points are never stored.
    """

    def forward(self, x: Tensor) -> Tensor:
        w = F.pad(self.weight, (1, 0)) + F.pad(self.weight, (0, 1))  # (c', c, 3, 4)
        w = F.pad(w, (0, 0, 1, 0)) + F.pad(w, (0, 0, 0, 1))  # (c', c, 4, 4)
        y = F.conv_transpose2d(x.movedim(-1, 1), w.flip(-2, -1).transpose(0, 1), self.bias, stride=2, padding=1)
        return y.movedim(1, -1).contiguous()


class Downsample(nn.Module):
    """Halve height and width; with `time`, also join later frames in pairs: 1 + 2k frames -> 1 + k, the first frame on its own."""

    def __init__(self, channels: int, time: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.Identity(), HalvingConv2d(channels, channels, 3, stride=2))  # names as published
        self.time_conv = CausalConv3d(channels, channels, (3, 1, 1), stride=(2, 1, 1)) if time else None

    def forward(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        x = per_frame(self.resample, x)  # (b, t, h/2, w/2, c)
        if self.time_conv is None:
            return x
        start = not started(state, self.time_conv)
        y = self.time_conv(x, state)  # (b, t/2, h/2, w/2, c)
        return torch.cat([x[:, :1], y], dim=1) if start else y

    def start_frame_by_frame(self) -> None:
        """Initialise the time convolution to the mean of a pair."""
        kernel = self.time_conv.weight  # (c, c, 3, 1, 1)
        torch.nn.init.zeros_(kernel)
        kernel[:, :, 1:, 0, 0] = 0.5 * torch.eye(len(kernel))[:, :, None]


class Upsample(nn.Module):
    """Double height and width; with `time`, also split later frames in two: 1 + k frames -> 1 + 2k, the first frame on its own.

    The first frame stays outside the time convolution: the second one sees zeros before it.
    """

    def __init__(self, channels: int, out_channels: int, time: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.Identity(), DoublingConv2d(channels, out_channels, 3, padding=1))
        self.time_conv = CausalConv3d(channels, 2 * channels, (3, 1, 1), padding=(1, 0, 0)) if time else None

    def forward(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        if self.time_conv is not None:
            n = 0 if started(state, self.time_conv) else 1
            y = self.time_conv(x[:, n:], state)  # (b, t, h, w, 2c)
            y = y.unflatten(-1, (2, -1)).movedim(-2, 2).flatten(1, 2)  # (b, 2t, h, w, c)
            x = torch.cat([x[:, :n], y], dim=1) if n else y
        return per_frame(self.resample, x)

    def start_frame_by_frame(self) -> None:
        """Initialise the time convolution to repeat a frame."""
        kernel = self.time_conv.weight  # (2c, c, 3, 1, 1)
        torch.nn.init.zeros_(kernel)
        kernel[:, :, -1, 0, 0] = torch.eye(kernel.shape[1]).repeat(2, 1)


def per_frame(module: nn.Module, x: Tensor) -> Tensor:
    """Apply a module for pictures (n, h, w, c) to each frame: (b, t, h, w, c) -> (b, t, h', w', c')."""
    return module(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def fold(x: Tensor, channels: int, time: int, space: int) -> Tensor:
    """Shortcut of `Downsample` without weights: fold time and space into channels, then average groups of them down to `channels`.

    (b, T, H, W, c) -> (b, ceil(T/time), H/space, W/space, channels). An odd T is a stream's start: zeros go before the first frame.
    """
    x = F.pad(x, (0, 0, 0, 0, 0, 0, -x.shape[1] % time, 0))
    b, T, H, W, c = x.shape
    x = x.reshape(b, T // time, time, H // space, space, W // space, space, c).permute(0, 1, 3, 5, 7, 2, 4, 6)
    return x.reshape(*x.shape[:4], channels, -1).mean(dim=-1)


def unfold(x: Tensor, channels: int, time: int, space: int, start: bool) -> Tensor:
    """Shortcut of `Upsample` without weights: repeat channels, then unfold them into time and space.

    (b, T, H, W, c) -> (b, T·time, H·space, W·space, channels); at the start of a stream the first time - 1 frames are dropped.
    """
    b, T, H, W, c = x.shape
    x = x.repeat_interleave(channels * time * space * space // c, dim=-1)
    x = x.reshape(b, T, H, W, channels, time, space, space).permute(0, 1, 5, 2, 6, 3, 7, 4)
    x = x.reshape(b, T * time, H * space, W * space, channels)
    return x[:, time - 1 :] if start else x
