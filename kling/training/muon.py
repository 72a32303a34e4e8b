"""Muon: momentum whose directions all count alike, for matrices and kernels; AdamW for the rest.

Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024). A step of a matrix is the orthogonal matrix nearest to
its momentum, so that rare directions (one object on much ground) move as far as loud ones. The step has the size of AdamW's, so that `lr`
and `weight_decay` mean the same (Liu et al., "Muon is scalable for LLM training", 2025, eq. 4).

`torch.optim.Muon` takes matrices that lie whole on one device, one at a time, and multiplies in bf16. Here there are kernels too, rows cut
by FSDP2, and processors without bf16; matrices of one shape are turned together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from kling.runtime.precision import bf16_is_fast

SMALLEST = 8  # a matrix with fewer rows or columns is a bundle of vectors, and has no directions to even out
ROUNDS = ((3.4445, -4.7750, 2.0315),) * 5  # Jordan's quintic: singular values in (0, 1] end in about [0.7, 1.2]


class Muon(torch.optim.AdamW):
    """AdamW, but for its groups with `momentum`: those hold matrices (rows, columns) or kernels (out, in, …), and step as above."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update. The gradients of matrices are used up by it."""
        for group in self.param_groups:
            if "momentum" in group:
                self._turn([p for p in group["params"] if p.grad is not None], group)
        return super().step(closure)

    def _turn(self, params: list[nn.Parameter], group: dict[str, Any]) -> None:
        """Matrices of one shape are made orthogonal together."""
        alike: dict[tuple[int, ...], list[tuple[nn.Parameter, Tensor]]] = {}
        for p in params:
            state = self.state[p]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(p)
            average = state["momentum"]
            average.lerp_(p.grad, 1 - group["momentum"])
            ahead = p.grad.lerp(average, group["momentum"])  # Nesterov's
            p.grad = None  # AdamW passes it by
            whole = ahead.full_tensor() if isinstance(ahead, DTensor) else ahead
            alike.setdefault(whole.flatten(1).shape, []).append((p, whole.flatten(1)))
        for (rows, columns), found in alike.items():
            turned = orthogonal(torch.stack([matrix for _, matrix in found])).mul_(0.2 * max(rows, columns) ** 0.5)
            for (p, _), update in zip(found, turned, strict=True):
                update = update.view(p.shape).to(p.dtype)
                if isinstance(p, DTensor):
                    copies = [Replicate()] * p.device_mesh.ndim
                    update = DTensor.from_local(update, p.device_mesh, copies, run_check=False).redistribute(p.device_mesh, p.placements)
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])


def orthogonal(matrices: Tensor) -> Tensor:
    """About U Vᵀ of matrices (k, r, c) = U Σ Vᵀ, by Newton-Schulz: X ← a X + (b A + c A²) X with A = X Xᵀ.

    The rounds are in bf16 where that is the faster type, else in float32; the result has the dtype of the input.
    """
    x = matrices.to(torch.bfloat16 if bf16_is_fast(matrices.device.type) else torch.float32)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x  # the smaller square
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-12)
    for a, b, c in ROUNDS:
        square = x @ x.mT  # (k, r, r)
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype).contiguous()


def is_matrix(p: Tensor) -> bool:
    """Whether a parameter is a matrix, or a kernel that is one when its trailing dimensions are columns."""
    return p.ndim >= 2 and p.shape[0] >= SMALLEST and p.shape[1:].numel() >= SMALLEST
