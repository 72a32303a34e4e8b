"""Batches of different shapes in one row of tokens, without padding: pictures beside clips, short clips beside long ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # (b, n, heads, head_dim), keys and values (b, m, ...) -> (b, n, d)


@dataclass(frozen=True)
class Packing:
    """`shapes` are (b, n) of each batch: b samples of n tokens. The row is (1, N, ...) with N = Σ b·n."""

    shapes: tuple[tuple[int, int], ...]

    @staticmethod
    def join(batches: list[Tensor]) -> Tensor:
        """Batches (b, n, ...) -> (1, N, ...)."""
        return torch.cat([x.flatten(0, 1) for x in batches])[None]

    def split(self, row: Tensor) -> list[Tensor]:
        """(1, N, ...) -> batches (b, n, ...), as views."""
        parts = row[0].split([b * n for b, n in self.shapes])
        return [part.unflatten(0, shape) for part, shape in zip(parts, self.shapes, strict=True)]

    @property
    def lengths(self) -> list[int]:
        """Tokens of every sample."""
        return [n for b, n in self.shapes for _ in range(b)]

    def bounds(self, device: torch.device) -> Tensor:
        """Where every sample begins, and the end: (samples + 1,) int32."""
        return torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32, device=device)


def attend_packed(query: Tensor, key: Tensor, value: Tensor, attend: Attend, of: Packing, to: Packing) -> Tensor:
    """Attention in which no sample sees another: (1, N, heads, head_dim) -> (1, N, d).

    One batch after another through `attend`; half precision on CUDA in one kernel for all lengths (FlashAttention's, `varlen_attn`).
    """
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16):
        from torch.nn.attention.varlen import varlen_attn

        bounds = of.bounds(query.device), to.bounds(query.device)
        return varlen_attn(query[0], key[0], value[0], *bounds, max(of.lengths), max(to.lengths)).flatten(1)[None]
    return Packing.join([attend(q, k, v) for q, k, v in zip(of.split(query), to.split(key), to.split(value), strict=True)])
