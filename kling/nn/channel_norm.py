"""The VAE's norm. It mixes only the channels of one point: no statistics over time or space, so that causality is exact."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable


class ChannelNorm(nn.Module):
    """y = √c · x / ‖x‖ · γ, the norm taken over the c channels of each point in fp32 at least. x (..., c)."""

    def __init__(self, channels: int, axes: int = 3) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *[1] * axes))  # shape as published: one axis of 1 per axis after c

    def forward(self, x: Tensor) -> Tensor:
        return x * per_length(x) * self.gamma.flatten()


class NormSilu(ChannelNorm):
    """silu(y), appended to the history in time: x (b, t, h, w, c), history (b, k, h, w, c) -> (b, k + t, h, w, c)."""

    def forward(self, x: Tensor, history: Tensor) -> Tensor:
        return HistoryNormSilu.apply(x, self.gamma.flatten(), history)


def per_length(x: Tensor) -> Tensor:
    """√c / ‖x‖ of each point: (..., c) -> (..., 1)."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32)).clamp_min(1e-12)
    return (x.shape[-1] ** 0.5 / length).to(x.dtype)


class HistoryNormSilu(torch.autograd.Function):
    """`NormSilu` with a hand-written backward pass: it saves x only, where autograd would save four tensors of that size, and makes half
    the passes over memory.

    With r = √c/‖x‖, n = r x, p = silu'(γ n) ∂y n:  ∂γ = Σ_points p,  ∂x = r (silu'(γ n) ∂y γ - n/c Σ_c γ p).
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, gamma: Tensor, history: Tensor) -> Tensor:
        k = history.shape[1]
        y = x.new_empty(x.shape[0], k + x.shape[1], *x.shape[2:])  # (b, k + t, h, w, c)
        y[:, :k] = history
        new = torch.mul(x, per_length(x), out=y[:, k:])
        F.silu(new.mul_(gamma), inplace=True)
        ctx.save_for_backward(x, gamma)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, gamma = ctx.saved_tensors
        k, g = grad.shape[1] - x.shape[1], gamma.to(x.dtype)  # under autocast the weights stay in fp32
        r = per_length(x)  # (b, t, h, w, 1)
        n = x * r  # (b, t, h, w, c)
        s = torch.ops.aten.silu_backward(grad[:, k:], n * g)
        p = s * n
        along = (p @ g).div_(len(g)).unsqueeze(-1)  # (b, t, h, w, 1)
        to_gamma = p.sum(dim=(0, 1, 2, 3), dtype=gamma.dtype)  # (c,)
        return s.mul_(g).addcmul_(n, along, value=-1).mul_(r), to_gamma, grad[:, :k]
