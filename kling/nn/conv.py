"""Causal 3-D convolution, and resampling of time and space, for whole clips and for streams in one code path.

Every temporal module is called as `module(x, state)`. A `state` of None means: x starts a stream and nothing is kept of it. With a
`StreamState`, each module finds there the few frames it still needs of the chunk before, and leaves those that the next one will need:
the outputs of the chunks, joined in time, are the output of the whole.

Activations are kept in `channels_last_3d`: norms and attention read contiguous channels, and folding frames into the batch is a view.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kling.errors import UserError


class StreamState:
    """What a stream remembers between chunks: for each temporal module, the last frames of its input.

    Belongs to one stream of one model, so any number of streams may run on a model at once. The encoder and the decoder of a model
    keep different modules, so one state may serve both. With gradients on, the tails carry them across chunks.
    """

    def __init__(self) -> None:
        self.tails: dict[nn.Module, Tensor] = {}  # (b, c, k, h, w) each; k = kernel - stride, at most 2
        self.parts: dict[object, StreamState] = {}  # a tiled picture is one stream for each tile

    def part(self, key: object) -> StreamState:
        """The state of one part of the picture."""
        return self.parts.setdefault(key, StreamState())

    def started(self, module: nn.Module) -> bool:
        """True once `module` has seen a chunk of this stream."""
        return module in self.tails or any(part.started(module) for part in self.parts.values())

    def after_tail(self, module: nn.Module, x: Tensor) -> Tensor:
        """x (b, c, T, h, w) with the frames before it put in front. Raises `UserError` if x is not of this stream's batch and size."""
        tail = self.tails[module]
        if tail[:, :, 0].shape != x[:, :, 0].shape:
            was, now = (f"batch {y.shape[0]} of {y.shape[4]}x{y.shape[3]}" for y in (tail, x))
            raise UserError(f"a stream that began with {was} cannot go on with {now}: give each stream a StreamState of its own")
        return torch.cat([tail, x], dim=2)


def started(state: StreamState | None, module: nn.Module) -> bool:
    """True if `module` goes on from an earlier chunk; no state means the start."""
    return state is not None and state.started(module)


def conv3d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, ...], padding: tuple[int, ...]) -> Tensor:
    """`F.conv3d` that takes oneDNN for every fp32 batch on CPU: for batch 1, torch picks its own `slow_conv3d` when c·T·H <= 20480,
    which is every layer of a small streaming decoder, and 5 times slower."""
    fp32 = x.dtype == torch.float32 and not torch.is_autocast_enabled(x.device.type)
    if fp32 and x.device.type == "cpu" and torch.backends.mkldnn.is_available():
        return torch.ops.aten.mkldnn_convolution(x, weight, bias, padding, stride, (1, 1, 1), 1)
    return F.conv3d(x, weight, bias, stride, padding)


class CausalConv3d(nn.Conv3d):
    """3-D convolution whose output frame t sees input frames <= t only.

    `padding` (t, h, w) as in `nn.Conv3d`, but all 2t frames of time padding go before the first frame. x (b, c, T, H, W).
    A chunk too short for one output gives zero frames.
    """

    def forward(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        (kt, kh, kw), (st, sh, sw), (pt, ph, pw) = self.kernel_size, self.stride, self.padding
        if state is None and x.shape[2] == 1 and kt == 2 * pt + 1:  # before a lone frame there are only zeros: its own tap is the whole sum
            return F.conv2d(x[:, :, 0], self.weight[:, :, -1], self.bias, (sh, sw), (ph, pw))[:, :, None]
        if started(state, self):
            x = state.after_tail(self, x)
        elif pt:
            x = F.pad(x, (0, 0, 0, 0, 2 * pt, 0))
        if state is not None and kt > st:
            state.tails[self] = x[:, :, -(kt - st) :].clone()  # a copy: a view would keep the whole chunk alive
        if x.shape[2] < kt:
            b, _, _, H, W = x.shape
            return x.new_empty(b, self.out_channels, 0, (H + 2 * ph - kh) // sh + 1, (W + 2 * pw - kw) // sw + 1)
        return conv3d(x, self.weight, self.bias, self.stride, (0, ph, pw))


def per_frame(module: nn.Module, x: Tensor) -> Tensor:
    """Apply a 2-D module to each frame: (b, c, t, h, w) -> (b, c', t, h', w')."""
    b, c, t, h, w = x.shape
    y = module(x.transpose(1, 2).reshape(b * t, c, h, w))  # (b·t, c', h', w')
    return y.unflatten(0, (b, t)).transpose(1, 2)


class Downsample(nn.Module):
    """Halve height and width; with `time`, also join later frames in pairs: 1 + 2k frames -> 1 + k, the first frame on its own."""

    def __init__(self, channels: int, time: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, channels, 3, stride=2))
        self.time_conv = CausalConv3d(channels, channels, (3, 1, 1), stride=(2, 1, 1)) if time else None

    def forward(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        x = per_frame(self.resample, x)  # (b, c, t, h/2, w/2)
        if self.time_conv is None:
            return x
        first = x[:, :, :0] if started(state, self.time_conv) else x[:, :, :1]
        return torch.cat([first, self.time_conv(x, state)], dim=2)

    def start_frame_by_frame(self) -> None:
        """Make the time convolution the mean of a pair."""
        kernel = self.time_conv.weight  # (c, c, 3, 1, 1)
        torch.nn.init.zeros_(kernel)
        kernel[:, :, 1:, 0, 0] = 0.5 * torch.eye(len(kernel))[:, :, None]


class Upsample(nn.Module):
    """Double height and width; with `time`, also split later frames in two: 1 + k frames -> 1 + 2k, the first frame on its own.

    The first frame stays outside the time convolution: the second one sees zeros before it.
    """

    def __init__(self, channels: int, out_channels: int, time: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest-exact"), nn.Conv2d(channels, out_channels, 3, padding=1))
        self.time_conv = CausalConv3d(channels, 2 * channels, (3, 1, 1), padding=(1, 0, 0)) if time else None

    def forward(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        if self.time_conv is not None:
            n = 0 if started(state, self.time_conv) else 1
            first, rest = x[:, :, :n], x[:, :, n:]
            y = self.time_conv(rest, state).movedim(1, -1).unflatten(-1, (2, -1))  # (b, t, h, w, 2, c)
            y = y.movedim(-2, 2).flatten(1, 2).movedim(-1, 1)  # (b, c, 2t, h, w)
            x = torch.cat([first, y], dim=2)
        return per_frame(self.resample, x)

    def start_frame_by_frame(self) -> None:
        """Make the time convolution repeat a frame."""
        kernel = self.time_conv.weight  # (2c, c, 3, 1, 1)
        torch.nn.init.zeros_(kernel)
        kernel[:, :, -1, 0, 0] = torch.eye(kernel.shape[1]).repeat(2, 1)


def fold(x: Tensor, channels: int, time: int, space: int) -> Tensor:
    """Shortcut of `Downsample` without weights: fold time and space into channels, then average groups of them down to `channels`.

    (b, c, T, H, W) -> (b, channels, ceil(T/time), H/space, W/space). An odd T is a stream's start: zeros go before the first frame.
    """
    x = F.pad(x, (0, 0, 0, 0, -x.shape[2] % time, 0))
    b, c, T, H, W = x.shape
    x = x.reshape(b, c, T // time, time, H // space, space, W // space, space).permute(0, 1, 3, 5, 7, 2, 4, 6)
    return x.reshape(b, channels, -1, T // time, H // space, W // space).mean(dim=2)


def unfold(x: Tensor, channels: int, time: int, space: int, start: bool) -> Tensor:
    """Shortcut of `Upsample` without weights: repeat channels, then unfold them into time and space.

    (b, c, T, H, W) -> (b, channels, T·time, H·space, W·space); at the start of a stream the first time - 1 frames are dropped.
    """
    b, c, T, H, W = x.shape
    x = x.repeat_interleave(channels * time * space * space // c, dim=1)
    x = x.reshape(b, channels, time, space, space, T, H, W).permute(0, 1, 5, 2, 6, 3, 7, 4)
    x = x.reshape(b, channels, T * time, H * space, W * space)
    return x[:, :, time - 1 :] if start else x


def patchify(x: Tensor, p: int) -> Tensor:
    """(b, c, T, H, W) -> (b, c·p·p, T, H/p, W/p); channel order (c, column, row), as in the published Wan 2.2 weights."""
    b, c, T, H, W = x.shape
    x = x.reshape(b, c, T, H // p, p, W // p, p).permute(0, 1, 6, 4, 2, 3, 5)
    return x.reshape(b, c * p * p, T, H // p, W // p)


def unpatchify(x: Tensor, p: int) -> Tensor:
    """Inverse of `patchify`: (b, c·p·p, T, h, w) -> (b, c, T, h·p, w·p)."""
    b, c, T, h, w = x.shape
    x = x.reshape(b, c // (p * p), p, p, T, h, w).permute(0, 1, 4, 5, 3, 6, 2)
    return x.reshape(b, c // (p * p), T, h * p, w * p)
