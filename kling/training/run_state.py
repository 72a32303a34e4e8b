"""Saves and restores the tensors of a checkpoint that belong to a model in training."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from kling.runtime.checkpoint import (
    Checkpoint,
    restore,
)
from kling.runtime.parallel import trained
from kling.training.ema import EMA
from kling.training.optim import load_optimizer_tensors, optimizer_tensors


def run_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, ema: EMA | None = None, prefix: str = "") -> dict[str, Any]:
    """The groups of a checkpoint for a model in training: its trained weights, its optimizer, and its average."""
    groups: dict[str, Any] = {f"{prefix}model": trained(model), f"{prefix}optimizer": optimizer_tensors(optimizer, model)}
    return groups if ema is None else groups | {f"{prefix}ema": ema.state_dict()}


def load_run_tensors(
    saved: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer, ema: EMA | None = None, prefix: str = ""
) -> None:
    """Restore the result of `run_tensors`, also on another number of processes. Raises `UserError` if it does not fit."""
    restore(saved.tensors[f"{prefix}model"], trained(model))
    load_optimizer_tensors(optimizer, model, saved.tensors[f"{prefix}optimizer"])
    if ema is not None:
        ema.load_state_dict(saved.tensors[f"{prefix}ema"])
