"""Exponential moving average of the trained weights, in fp32, sharded over processes like the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from kling.errors import UserError
from kling.runtime.checkpoint import Rows, load_latest, restore
from kling.runtime.parallel import local, reshard, trained


class EMA:
    """θ̄ ← d θ̄ + (1 - d) θ over the trained floating-point parameters of a model. Create it after the model is sharded.

    The decay warms up with the step, d(s) = min(decay, (1 + s) / (10 + s)), so that the first weights are forgotten quickly. It is a
    closed form: a resumed run needs only the averages and the step.
    """

    def __init__(self, model: nn.Module, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise UserError(f"EMA decay {decay}: give a number in [0, 1), for example 0.999")
        self.decay = decay
        self.average = {name: p.detach().float().clone() for name, p in _params(model)}

    def decay_at(self, step: int) -> float:
        return min(self.decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, model: nn.Module, step: int, left_out: Tensor | None = None) -> None:
        """Include the weights after update number `step` (0-based). left_out: () on the device, 1 if that update was skipped, else 0."""
        params = dict(_params(model))
        averages = [local(average) for average in self.average.values()]
        weight: float | list[Tensor] = 1 - self.decay_at(step)
        if left_out is not None:
            weight = [(1 - left_out) * weight] * len(averages)
        torch._foreach_lerp_(averages, [local(params[name]).float() for name in self.average], weight)

    @contextmanager
    def swap(self, model: nn.Module) -> Iterator[nn.Module]:
        """Inside the `with` the model has the averages; afterwards its own weights again, bit for bit, even after an error."""
        reshard(model)
        params = [(local(p), local(self.average[name])) for name, p in _params(model)]
        own = [p.clone() for p, _ in params]
        try:
            with torch.no_grad():
                for p, average in params:
                    p.copy_(average)
            yield model
        finally:
            reshard(model)
            with torch.no_grad():
                for (p, _), weight in zip(params, own, strict=True):
                    p.copy_(weight)

    def state_dict(self) -> dict[str, Tensor]:
        """{parameter name: fp32 average}."""
        return dict(self.average)

    def load_state_dict(self, saved: Rows) -> None:
        """Load averages. Raises `UserError` if a name is missing, unknown, or of another shape."""
        restore(saved, self.average, "EMA weight")


class Follower(EMA):
    """A copy of the weights that follows them more slowly the longer a run lasts: update number s has the decay min(rate · s, highest).

    With a rate of 0 it is a copy as of its last update, or of its making.
    """

    def __init__(self, model: nn.Module, rate: float = 0.0, highest: float = 0.0) -> None:
        super().__init__(model, highest)
        self.rate = rate

    def decay_at(self, step: int) -> float:
        return min(self.rate * step, self.decay)


def load_average(saved: Rows, model: nn.Module) -> None:
    """Replace a model's weights by the averages of a checkpoint, without keeping a copy. Raises `UserError` as `load_state_dict` does."""
    restore(saved, dict(_params(model)), "EMA weight")


def restore_average(run: str | Path, model: nn.Module) -> None:
    """Give a model, built as the run built its own, the last checkpoint's weights: the averages of those that were trained."""
    saved = load_latest(run)
    restore(saved.tensors["model"], trained(model))
    load_average(saved.tensors["ema"], model)


def _params(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad and p.is_floating_point())
