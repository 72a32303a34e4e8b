"""Copies of tensors to a device, and the precision of its fp32 products."""

from __future__ import annotations

import torch
from torch import Tensor


def multiply_in_tf32(on: bool = True) -> None:
    """Let CUDA compute fp32 products and convolutions in TF32 (on), or in full fp32. TF32 has 10 bits of mantissa, still more than the 7 of
    bf16, and is about eight times as fast. PyTorch's default is fp32 for products and TF32 for convolutions."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = on


def upload(t: Tensor, device: torch.device | str) -> Tensor:
    """`t` on the device, without blocking the host: to CUDA through pinned memory."""
    device = torch.device(device)
    if device.type != "cuda" or t.device.type != "cpu":
        return t.to(device)
    return t.pin_memory().to(device, non_blocking=True)
