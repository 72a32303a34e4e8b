"""The VAE's norm. It mixes the channels of one point and nothing else: no statistics over time or space, so causality stays exact."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ChannelNorm(nn.Module):
    """y = √c · x / ‖x‖ · γ, the norm taken over the c channels of each point in fp32. x (b, c, ...), any number of axes after c."""

    def __init__(self, channels: int, axes: int = 3) -> None:
        super().__init__()
        self.scale = channels**0.5
        self.gamma = nn.Parameter(torch.ones(channels, *[1] * axes))  # shape as published: one axis of 1 per axis after c

    def forward(self, x: Tensor) -> Tensor:
        x = x.movedim(1, -1)  # (b, ..., c): a view, and contiguous when x is channels-last
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).clamp_min(1e-12)  # (b, ..., 1)
        y = x * (self.scale / length).to(x.dtype) * self.gamma.flatten()
        return y.movedim(-1, 1)
