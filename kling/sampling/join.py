"""The join of a video and its continuation, which shows its last frames again through the VAE."""

from __future__ import annotations

import torch
from torch import Tensor

from kling.metrics.motion import fetch, flows

ALIKE = 16.0  # levels of 255 by which a place may change and still be held for the same


def join(before: Tensor, frames: Tensor, overlap: int, fade: int) -> Tensor:
    """The video so far (T, H, W, 3) and what continues it (t, H, W, 3), uint8, whose first `overlap` frames are the last ones of the former
    through the VAE.

    What the VAE lost of the last frame before the join would be missing from the next one, and be seen as a jump. It is added to the next
    `fade` frames, to each less, where optical flow says that what it was lost from is now, and the picture agrees.
    """
    if not fade:
        return torch.cat([before, frames[overlap:]])
    last, new = frames[overlap - 1], frames[overlap:].clone()
    known = torch.cat([last, before[-1]], dim=-1).float()  # (H, W, 6)
    for k in range(fade):
        there = flows(torch.stack([new[k], last]), back=False)[0][0]  # (H, W, 2) from the new frame to the last one
        then, true = torch.from_numpy(fetch(known.numpy(), there)[0]).split(3, dim=-1)  # what each place was, decoded and given
        change = (then - new[k]).abs().amax(dim=-1, keepdim=True)  # (H, W, 1)
        share = (1 - (k + 1) / (fade + 1)) * torch.exp(-((change / ALIKE) ** 2))
        new[k] = (new[k] + share * (true - then)).round().clamp(0, 255).to(torch.uint8)
    return torch.cat([before, new])
