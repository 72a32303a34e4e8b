"""Tensors on their way to a device, and how it multiplies."""

from __future__ import annotations

import torch
from torch import Tensor


def upload(t: Tensor, device: torch.device | str) -> Tensor:
    """`t` on the device, and the host goes on at once: to CUDA through pinned memory, which the copy does not wait for."""
    device = torch.device(device)
    if device.type != "cuda" or t.device.type != "cpu":
        return t.to(device)
    return t.pin_memory().to(device, non_blocking=True)
