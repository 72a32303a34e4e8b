"""Pre-training of the small text encoder, before the transformer: captions of one clip should agree, captions of different clips not."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def pool(text: Tensor) -> Tensor:
    """The mean direction of a prompt's tokens, as a unit vector. (b, l, e), 0 past a prompt's end -> (b, e)."""
    return F.normalize(text.sum(dim=1), dim=-1)


def agreement_loss(a: Tensor, b: Tensor, temperature: float = 0.1) -> tuple[Tensor, Tensor]:
    """InfoNCE in both directions (van den Oord et al. 2018, arXiv 1807.03748, eq. 4; Radford et al. 2021, arXiv 2103.00020, fig. 3).

    Row i of `a` and of `b` (n, e), unit vectors, belong to one clip. Returns the loss and the share of rows whose nearest row is their own.
    """
    logits = a @ b.T / temperature  # (n, n)
    partner = torch.arange(len(a), device=a.device)
    loss = (F.cross_entropy(logits, partner) + F.cross_entropy(logits.T, partner)) / 2
    return loss, (logits.argmax(1) == partner).float().mean()
