"""Tensors on their way to a device, and how it multiplies."""

from __future__ import annotations

import torch
from torch import Tensor


def multiply_in_tf32(on: bool = True) -> None:
    """How CUDA multiplies what is fp32, in products and convolutions alike: with 10 bits of mantissa, which is still more than bf16's 7, at
    about eight times the speed; or in full. PyTorch's own choice is one for products and the other for convolutions."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = on


def upload(t: Tensor, device: torch.device | str) -> Tensor:
    """`t` on the device, and the host goes on at once: to CUDA through pinned memory, which the copy does not wait for."""
    device = torch.device(device)
    if device.type != "cuda" or t.device.type != "cpu":
        return t.to(device)
    return t.pin_memory().to(device, non_blocking=True)
