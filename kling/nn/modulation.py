"""Adaptive layer norm (adaLN) when each sample, frame or token has its own noise level.

Modulation vectors are computed once per distinct level, never once per token: a clip with a given first frame has two levels,
not n. Blocks read them through a `Modulation`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kling.errors import UserError


class Modulation(NamedTuple):
    """k vectors of width d for every distinct noise level, and which level each run of tokens has.

    `table` (u, k, d). `index` (b, g): each sample's n tokens are g runs of n/g equal levels (g = 1, the frames, or n).
    """

    table: Tensor
    index: Tensor

    def __add__(self, offset: Tensor) -> Modulation:  # type: ignore[override]
        """Add a block's own (1, k, d) vectors to every level, in fp32."""
        return Modulation(offset + self.table.float(), self.index)

    def vector(self, i: int) -> Tensor:
        """The i-th vector as (b, g, 1, d), ready to broadcast over tokens in runs."""
        return F.embedding(self.index, self.table[:, i])[:, :, None]


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x · (1 + scale) + shift for tokens x (b, n, d) and vectors (b, g, 1, d)."""
    runs = x.unflatten(1, (shift.shape[1], -1))  # (b, g, n/g, d)
    return torch.addcmul(shift, runs, 1 + scale).flatten(1, 2)


class ModulatedNorm(nn.Module):
    """Layer norm without weights of its own: tokens (b, n, d) are normalised, then x · (1 + scale) + shift with vectors (b, g, 1, d).

    In fp32, returned in the dtype of x. While sampling on a CPU, vectors that all tokens share go in as the norm's weight and bias: one
    sweep over memory instead of two (five in bf16).
    """

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.shape, self.eps = (dim,), eps

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        if shift.numel() == self.shape[0] and x.device.type == "cpu" and not torch.is_grad_enabled():
            return F.layer_norm(x, self.shape, 1 + scale.flatten(), shift.flatten(), self.eps)
        return modulate(F.layer_norm(x.float(), self.shape, eps=self.eps), shift, scale).to(x.dtype)


def gate(x: Tensor, update: Tensor, gate: Tensor) -> Tensor:
    """x + update · gate for tokens (b, n, d) and a vector (b, g, 1, d). The gate is first rounded to the dtype of x; the sum is formed in
    fp32 and rounded once."""
    runs = (gate.shape[1], -1)
    return torch.addcmul(x.unflatten(1, runs), update.unflatten(1, runs), gate.to(x.dtype)).flatten(1, 2)


class Levels(NamedTuple):
    """Noise levels of a batch: `values` (u,), and `index` (b, g), the level of each of g equal runs of tokens (g = 1, G or n).

    `ends` (u,): for a flow map, the level that a step from each value leads to.
    """

    values: Tensor
    index: Tensor
    ends: Tensor | None = None


def noise_levels(sigma: Tensor | Levels, grid: tuple[int, int, int], end: Tensor | None = None) -> Levels:
    """σ (b,) | (b, G) | (b, n) | (b, G, h, w) on the token grid -> distinct levels (u,) and index (b, g) with the fewest runs g.

    end: the level where each step ends, of σ's shape.

    Finding equal levels makes the host wait for the device, so training and sampling pass `Levels` (from `State.levels`), which are
    returned unchanged. Raises `UserError` if the shape of σ does not fit the grid.
    """
    if isinstance(sigma, Levels):
        return sigma
    if end is not None and end.shape != sigma.shape:
        raise UserError(f"steps that end at levels of shape {tuple(end.shape)} and begin at {tuple(sigma.shape)}: give both alike")
    if sigma.ndim == 1:
        return Levels(sigma, torch.arange(len(sigma), device=sigma.device)[:, None], end)
    G, h, w = grid
    if sigma.shape[1:] not in {(G,), (G * h * w,), (G, h, w)}:
        raise UserError(f"sigma of shape {tuple(sigma.shape)} for a token grid of {G}x{h}x{w}: give one per sample, frame or token")
    pairs = torch.stack([sigma, sigma if end is None else end], dim=-1)
    distinct, index = torch.unique(pairs.flatten(0, -2), dim=0, return_inverse=True)  # (u, 2)
    index = index.view(len(sigma), -1)  # (b, G) or (b, n)
    for g in (1, G):
        runs = index.unflatten(1, (g, -1))
        if (runs == runs[..., :1]).all():
            index = runs[..., 0]
            break
    return Levels(distinct[:, 0], index, None if end is None else distinct[:, 1])


def spell_alike(levels: Levels, grid: tuple[int, int, int]) -> Levels:
    """The result of `noise_levels` in a form with fewer distinct shapes, for compiled blocks: at least two levels, and an index for each
    row of tokens (b, G·h) or each token (b, n). `torch.compile` would make a graph of its own for a length of 1."""
    rows = grid[0] * grid[1]
    values, ends = (None if x is None else x.expand(max(2, len(x))) for x in (levels.values, levels.ends))
    return Levels(values, levels.index.repeat_interleave(max(1, rows // levels.index.shape[1]), dim=1).clone(), ends)  # no view


class TokenIndex(nn.Module):
    """Expand an index (b, g) to every token (b, n). It is a module so that context parallelism can shard it as it shards tokens."""

    def forward(self, index: Tensor, n: int) -> Tensor:
        return index.repeat_interleave(n // index.shape[1], dim=1)
