"""Muon: momentum whose directions all count alike, for matrices and kernels; AdamW for the rest.

Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024). A step of a matrix is the orthogonal matrix nearest to
its momentum, so that rare directions (one object on much ground) move as far as loud ones. The step has the size of AdamW's, so that `lr`
and `weight_decay` mean the same (Liu et al., "Muon is scalable for LLM training", 2025, eq. 4).

`torch.optim.Muon` takes matrices that lie whole on one device, and multiplies in bf16. Here there are kernels too, rows cut by FSDP2, and
processors without bf16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

SMALLEST = 8  # a matrix with fewer rows or columns is a bundle of vectors, and has no directions to even out
ROUNDS = ((3.4445, -4.7750, 2.0315),) * 5  # Jordan's quintic: singular values in (0, 1] end in about [0.7, 1.2]


class Muon(torch.optim.AdamW):
    """AdamW, but for its groups with `momentum`: those hold matrices (rows, columns) or kernels (out, in, …), and step as above."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update. The gradients of matrices are used up by it."""
        for group in self.param_groups:
            for p in group["params"] if "momentum" in group else ():
                if p.grad is not None:
                    self._turn(p, group)
                    p.grad = None  # AdamW below passes it by
        return super().step(closure)

    def _turn(self, p: nn.Parameter, group: dict[str, Any]) -> None:
        average = self.state[p].setdefault("momentum", torch.zeros_like(p))
        average.lerp_(p.grad, 1 - group["momentum"])
        ahead = p.grad.lerp(average, group["momentum"])  # Nesterov's
        whole = ahead.full_tensor() if isinstance(ahead, DTensor) else ahead
        turned = orthogonal(whole.flatten(1))  # (rows, columns)
        turned = turned.mul_(0.2 * max(turned.shape) ** 0.5).view_as(whole).to(p.dtype)
        if isinstance(p, DTensor):
            copies = [Replicate()] * p.device_mesh.ndim
            turned = DTensor.from_local(turned, p.device_mesh, copies, run_check=False).redistribute(p.device_mesh, p.placements)
        p.mul_(1 - group["lr"] * group["weight_decay"]).add_(turned, alpha=-group["lr"])


def orthogonal(matrix: Tensor) -> Tensor:
    """About U Vᵀ of matrix (r, c) = U Σ Vᵀ, by Newton-Schulz: X ← a X + (b A + c A²) X with A = X Xᵀ. Float32, or bf16 on a GPU."""
    x = matrix.to(torch.bfloat16 if matrix.is_cuda else torch.float32)
    x = x.T if len(matrix) > matrix.shape[1] else x  # the smaller square
    x = x / x.norm().clamp(min=1e-12)
    for a, b, c in ROUNDS:
        square = x @ x.T
        x = torch.addmm(x, torch.addmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x.T if len(matrix) > matrix.shape[1] else x).to(matrix.dtype).contiguous()


def is_matrix(p: Tensor) -> bool:
    """Whether a parameter is a matrix, or a kernel that is one when its trailing dimensions are columns."""
    return p.ndim >= 2 and p.shape[0] >= SMALLEST and p.shape[1:].numel() >= SMALLEST
