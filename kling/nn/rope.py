"""Rotary position embedding over time, height and width, with real-valued positions in time."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def rotary_split(head_dim: int) -> tuple[int, int, int]:
    """Channels of each head given to time, height and width. Wan's split: width and height get 2·(d // 6), time the rest."""
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


def rotary_angles(positions: Tensor, dim: int, theta: float) -> Tensor:
    """(..., dim / 2) angles p · theta^(-2i / dim), in fp64 (fp32 where the device has none)."""
    dtype = torch.float32 if positions.device.type == "mps" else torch.float64
    frequencies = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=dtype, device=positions.device) / dim)
    return positions.to(dtype)[..., None] * frequencies


class RotaryPosEmbed(nn.Module):
    """The rotation of every token of a (G, h, w) grid, as one table of cosines and sines. Has no parameters.

    Integer positions give Wan's table exactly; negative and fractional ones continue it.
    """

    def __init__(self, head_dim: int, theta: float = 10000.0) -> None:
        super().__init__()
        self.dims = rotary_split(head_dim)
        self.theta = theta

    def forward(self, frames: Tensor, height: int, width: int) -> Tensor:
        """Positions in time (b | 1, G) and a token grid of height x width -> rotations (b | 1, n, 1, head_dim / 2, 2), fp32."""
        b, G = frames.shape
        rows = torch.arange(height, device=frames.device)
        columns = torch.arange(width, device=frames.device)
        t, h, w = (rotary_angles(p, d, self.theta) for p, d in zip((frames, rows, columns), self.dims, strict=True))
        t, h, w = (torch.stack([a.cos(), a.sin()], dim=-1).float() for a in (t, h, w))  # small: one entry for each place on an axis
        table = torch.cat(
            [
                t[:, :, None, None].expand(b, G, height, width, -1, -1),
                h[:, None].expand(b, G, height, width, -1, -1),
                w.expand(b, G, height, width, -1, -1),
            ],
            dim=-2,
        )
        return table.flatten(1, 3)[:, :, None]


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotate each interleaved pair of channels of x (b, n, heads, head_dim) by its angle, given rotations (b | 1, n, 1, head_dim / 2, 2).

    A complex product is one pass over memory where the usual (x₁cos - x₂sin, x₁sin + x₂cos) takes a dozen: 20 times faster on the CPU.
    `torch.compile` fuses the usual form into one pass, and does not compile complex numbers.
    """
    pairs = x.float().unflatten(-1, (-1, 2))  # (b, n, heads, head_dim / 2, 2)
    if torch.compiler.is_compiling():
        (x1, x2), (cos, sin) = pairs.unbind(-1), rotation.unbind(-1)
        turned = torch.stack([x1 * cos - x2 * sin, x1 * sin + x2 * cos], dim=-1)
    else:
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rotation))
    return turned.flatten(-2).to(x.dtype)
