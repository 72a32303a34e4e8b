"""Muon: momentum whose directions all count alike, for matrices and kernels; AdamW for the rest.

Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024). A step of a matrix is the orthogonal matrix nearest to
its momentum, so that rare directions (one object on much ground) move as far as loud ones. The step has the size of AdamW's, so that `lr`
and `weight_decay` mean the same (Liu et al., "Muon is scalable for LLM training", 2025, eq. 4).

`torch.optim.Muon` takes matrices that lie whole on one device, one at a time, and multiplies in bf16. Here there are kernels too, rows cut
by FSDP2, and processors without bf16; matrices of one shape are turned together.

Where rows are cut (FSDP2, HSDP) the momentum is cut with them, so a group of shards holds it once, and every matrix has one process that
gathers and turns it and sends the rows back (as in Dion, Ahn et al. 2025, and nanochat): a share of the work and of the memory each. Where
weights are whole on every process (DDP) nothing is shared: each holds the momentum of all matrices and turns all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor

from kling.runtime.parallel import local
from kling.runtime.precision import bf16_is_fast

MOST = 2**26  # numbers of matrices that a process turns together: 256 MB in fp32, and a few times that inside a round
SMALLEST = 8  # a matrix with fewer rows or columns is a bundle of vectors, and has no directions to even out
ROUNDS = ((3.4445, -4.7750, 2.0315),) * 5  # Jordan's quintic: singular values in (0, 1] end in about [0.7, 1.2]


class Muon(torch.optim.AdamW):
    """AdamW, but for its groups with `momentum`: those hold matrices (rows, columns) or kernels (out, in, …), and step as above.

    exact: the rounds are in fp32 even where bf16 is faster.
    """

    def __init__(self, *args: Any, exact: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.exact = exact

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update. The gradients of matrices are used up by it."""
        for group in self.param_groups:
            if "momentum" in group:
                self._turn([p for p in group["params"] if p.grad is not None], group)
        return super().step(closure)

    def _turn(self, params: list[nn.Parameter], group: dict[str, Any]) -> None:
        """Matrices of one shape are made orthogonal together."""
        bad: Tensor | None = getattr(self, "found_inf", None)  # () 1 on the device: leave the update out, as PyTorch's fused AdamW does
        keep: float | Tensor = 1 - group["lr"] * group["weight_decay"]
        if bad is not None:
            keep = torch.where(bad > 0, 1.0, keep)
        alike: dict[tuple[int, int], list[tuple[nn.Parameter, Tensor]]] = {}
        for p in params:
            state = self.state[p]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(p)
            average = state["momentum"]
            if bad is not None:  # what is not finite must not come into the momentum, which then stays as it is
                local(p.grad).copy_(torch.where(bad > 0, local(average), local(p.grad)))
            average.lerp_(p.grad, 1 - group["momentum"])
            ahead = p.grad.lerp(average, group["momentum"])  # Nesterov's
            p.grad = None  # AdamW passes it by
            dtype = rounds_in(p.device.type, self.exact)
            alike.setdefault((p.shape[0], p.shape[1:].numel()), []).append((p, local(ahead).flatten(1).to(dtype)))
        turned_before = 0  # matrices of other shapes: their owners are not the first ones again
        for (rows, columns), found in alike.items():
            scale, owners = 0.2 * max(rows, columns) ** 0.5, Owners(found[0][0])
            together = max(1, MOST // (rows * columns)) * owners.count
            for start in range(0, len(found), together):
                batch = found[start : start + together]
                updates = owners.turn([part for _, part in batch], rows, turned_before + start)
                for (p, _), update in zip(batch, updates, strict=True):
                    own = local(p)
                    own.mul_(keep)
                    own.add_(update.view(own.shape) if bad is None else update.view(own.shape) * (1 - bad), alpha=-group["lr"] * scale)
            turned_before += len(found)


class Owners:
    """Which process turns which matrix of parameters that are cut by rows over `shards` processes, in `copies` copies: of the matrices of a
    step, number i is that of process i modulo their number. Those that are whole every process turns by itself, all of them."""

    def __init__(self, p: Tensor) -> None:
        self.shards = self.copies = 1
        self.place = (0, 0)  # (copy, shard) of this process
        if isinstance(p, DTensor):  # FSDP2 cuts over the last dimension of its mesh, and HSDP copies over the first
            mesh = p.device_mesh
            self.shards, self.copies = mesh.size(-1), mesh.size() // mesh.size(-1)
            self.place = (mesh.get_coordinate()[0] if mesh.ndim > 1 else 0, mesh.get_coordinate()[-1])
            self.shard_group, self.copy_group = mesh.get_group(mesh.ndim - 1), mesh.get_group(0)
        self.count = self.shards * self.copies

    def turn(self, parts: list[Tensor], rows: int, first: int) -> list[Tensor]:
        """This process's rows (r, c) of matrices (rows, c) -> the same rows of the orthogonal ones. first: number of the first matrix."""
        if self.count == 1:
            return list(orthogonal(torch.stack(parts)))
        owner = [divmod((first + i) % self.count, self.shards) for i in range(len(parts))]
        mine = [[i for i, at in enumerate(owner) if at == (self.place[0], s)] for s in range(self.shards)]  # of this copy, shard by shard
        turned = self._turn_those_of(mine, parts, rows)
        for copy in range(self.copies if self.copies > 1 else 0):
            theirs = [i for i, at in enumerate(owner) if at[0] == copy]
            sent = torch.stack([turned.get(i, parts[i]) for i in theirs]) if theirs else parts[0][:0]
            dist.broadcast(sent, group=self.copy_group, group_src=copy)
            turned |= dict(zip(theirs, sent, strict=False))
        return [turned[i] for i in range(len(parts))]

    def _turn_those_of(self, owned: list[list[int]], parts: list[Tensor], rows: int) -> dict[int, Tensor]:
        """Of each shard's process, the numbers of its matrices -> {number: this process's rows of it, turned}."""
        columns, cut = parts[0].shape[1], -(-rows // self.shards)
        heights = [min(cut, max(0, rows - k * cut)) for k in range(self.shards)]  # rows that each process holds, as torch.chunk has it
        order, height, mine = [i for numbers in owned for i in numbers], heights[self.place[1]], len(owned[self.place[1]])
        out = [len(numbers) * height * columns for numbers in owned]
        back = [mine * h * columns for h in heights]
        there = torch.cat([parts[i].flatten() for i in order]) if order else parts[0].new_empty(0)
        here = there.new_empty(sum(back))
        dist.all_to_all_single(here, there, back, out, group=self.shard_group)
        if mine:
            whole = [part.view(mine, h, columns) for part, h in zip(here.split(back), heights, strict=True)]
            whole = orthogonal(torch.cat(whole, dim=1))  # (mine, rows, columns)
            here = torch.cat([part.flatten() for part in whole.split(heights, dim=1)])
        dist.all_to_all_single(there, here, out, back, group=self.shard_group)
        return dict(zip(order, there.view(len(order), height, columns), strict=True))


def rounds_in(device_type: str, exact: bool = False) -> torch.dtype:
    """The number type of the rounds: bf16 where that is the faster one and `exact` does not forbid it."""
    return torch.bfloat16 if not exact and bf16_is_fast(device_type) else torch.float32


def orthogonal(matrices: Tensor) -> Tensor:
    """About U Vᵀ of matrices (k, r, c) = U Σ Vᵀ, by Newton-Schulz: X ← a X + (b A + c A²) X with A = X Xᵀ. In their own dtype."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices  # the smaller square
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-12)
    for a, b, c in ROUNDS:
        square = x @ x.mT  # (k, r, r)
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).contiguous()


def is_matrix(p: Tensor) -> bool:
    """Whether a parameter is a matrix, or a kernel that is one when its trailing dimensions are columns."""
    return p.ndim >= 2 and p.shape[0] >= SMALLEST and p.shape[1:].numel() >= SMALLEST
