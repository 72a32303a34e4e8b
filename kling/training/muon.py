"""Muon: momentum with equalised directions for matrices and kernels; AdamW for the rest.

Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024). The step of a matrix is the orthogonal matrix nearest to
its momentum, so that rare directions (one object on a large ground) change as much as dominant ones. The step has the size of AdamW's, so
that `lr` and `weight_decay` mean the same (Liu et al., "Muon is scalable for LLM training", 2025, eq. 4).

`torch.optim.Muon` takes whole matrices on one device, one at a time, and multiplies in bf16. This one also takes kernels, rows sharded by
FSDP2, and processors without bf16; matrices of one shape are orthogonalised together.

With sharded rows (FSDP2, HSDP) the momentum is sharded with them, so a group of shards holds it once, and every matrix has one process that
gathers and orthogonalises it and sends the rows back (as in Dion, Ahn et al. 2025, and nanochat): each has a share of work and memory. With
whole weights on every process (DDP) nothing is shared: each holds the momentum of all matrices and orthogonalises all of them.
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

MOST = 2**26  # numbers in matrices that a process handles together: 256 MB in fp32, and a few times that inside a round
SMALLEST = 8  # a matrix with fewer rows or columns is a set of vectors, without directions to equalise
# Each round's polynomial is the best for what the one before leaves of singular values in [0.003, 1] (Polar Express, Amsel et al. 2025,
# arXiv 2505.16932); all but the last expect values 2 % too large, so that bf16's rounding does not lead out of the range where they shrink
# what is too large. Values end in [0.76, 1.2] after four rounds; those of Jordan's, the same in each of five, in [0.68, 1.2].
ROUNDS = ((8.2193, -23.3375, 16.6266), (3.9641, -2.8377, 0.5158), (3.4368, -2.4752, 0.4762), (2.4901, -1.8343, 0.4368))


class Muon(torch.optim.AdamW):
    """AdamW, except for groups with `momentum`: those hold matrices (rows, columns) or kernels (out, in, …), and step as described above.

    exact: the rounds are in fp32 even if bf16 is faster.
    """

    def __init__(self, *args: Any, exact: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.exact = exact

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update. It consumes the gradients of matrices."""
        for group in self.param_groups:
            if "momentum" in group:
                self._turn([p for p in group["params"] if p.grad is not None], group)
        return super().step(closure)

    def _turn(self, params: list[nn.Parameter], group: dict[str, Any]) -> None:
        """Orthogonalise matrices of one shape together."""
        bad: Tensor | None = getattr(self, "found_inf", None)  # () 1 on the device: skip the update, as PyTorch's fused AdamW does
        keep: float | Tensor = 1 - group["lr"] * group["weight_decay"]
        if bad is not None:
            keep = torch.where(bad > 0, 1.0, keep)
        alike: dict[tuple[int, int], list[tuple[nn.Parameter, Tensor]]] = {}
        for p in params:
            state = self.state[p]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(p)
            average = state["momentum"]
            if bad is not None:  # values that are not finite must not enter the momentum, which stays unchanged
                local(p.grad).copy_(torch.where(bad > 0, local(average), local(p.grad)))
            average.lerp_(p.grad, 1 - group["momentum"])
            ahead = p.grad.lerp(average, group["momentum"])  # Nesterov's
            p.grad = None  # so that AdamW skips it
            dtype = rounds_in(p.device.type, self.exact)
            alike.setdefault((p.shape[0], p.shape[1:].numel()), []).append((p, local(ahead).flatten(1).to(dtype)))
        turned_before = 0  # matrices of other shapes so far: continue with the next owner, instead of the first one again
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
    """Assigns matrices of parameters sharded by rows over `shards` processes, in `copies` copies, to processes: matrix i of a step belongs
    to process i modulo their number. Whole matrices are orthogonalised by every process itself."""

    def __init__(self, p: Tensor) -> None:
        self.shards = self.copies = 1
        self.place = (0, 0)  # (copy, shard) of this process
        if isinstance(p, DTensor):  # FSDP2 shards over the last dimension of its mesh, HSDP copies over the first
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
        mine = [[i for i, at in enumerate(owner) if at == (self.place[0], s)] for s in range(self.shards)]  # in this copy, by shard
        turned = self._turn_those_of(mine, parts, rows)
        for copy in range(self.copies if self.copies > 1 else 0):
            theirs = [i for i, at in enumerate(owner) if at[0] == copy]
            sent = torch.stack([turned.get(i, parts[i]) for i in theirs]) if theirs else parts[0][:0]
            dist.broadcast(sent, group=self.copy_group, group_src=copy)
            turned |= dict(zip(theirs, sent, strict=False))
        return [turned[i] for i in range(len(parts))]

    def _turn_those_of(self, owned: list[list[int]], parts: list[Tensor], rows: int) -> dict[int, Tensor]:
        """For each shard's process, the numbers of its matrices -> {number: this process's rows of it, orthogonalised}."""
        columns, cut = parts[0].shape[1], -(-rows // self.shards)
        heights = [min(cut, max(0, rows - k * cut)) for k in range(self.shards)]  # rows that each process holds, as in torch.chunk
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
    """The dtype of the rounds: bf16 if it is faster and `exact` is not set."""
    return torch.bfloat16 if not exact and bf16_is_fast(device_type) else torch.float32


def orthogonal(matrices: Tensor) -> Tensor:
    """About U Vᵀ of matrices (k, r, c) = U Σ Vᵀ, by `ROUNDS` of X ← a X + (b A + c A²) X with A = X Xᵀ. In their own dtype."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices  # gives the smaller square
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-12)
    for a, b, c in ROUNDS:
        square = x @ x.mT  # (k, r, r)
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).contiguous()


def is_matrix(p: Tensor) -> bool:
    """Whether a parameter is a matrix, or a kernel that becomes one by flattening its trailing dimensions."""
    return p.ndim >= 2 and p.shape[0] >= SMALLEST and p.shape[1:].numel() >= SMALLEST
