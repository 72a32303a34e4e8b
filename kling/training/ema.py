"""Exponential moving average of the weights that train, kept in fp32 beside the model, and cut over processes as the model is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from kling.errors import UserError
from kling.runtime.checkpoint import Rows, restore
from kling.runtime.parallel import local, reshard


class EMA:
    """θ̄ ← d θ̄ + (1 - d) θ over the floating-point parameters of a model that train. Make it after the model was sharded.

    The decay warms up with the step, d(s) = min(decay, (1 + s) / (10 + s)), so that the first weights are forgotten quickly. It is a
    closed form: a resumed run needs the averages and the step only.
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
        """Take in the weights after update number `step` (0-based). left_out: () 1 on the device if that was not made, else 0."""
        params = dict(_params(model))
        averages = [local(average) for average in self.average.values()]
        weight: float | list[Tensor] = 1 - self.decay_at(step)
        if left_out is not None:
            weight = [(1 - left_out) * weight] * len(averages)
        torch._foreach_lerp_(averages, [local(params[name]).float() for name in self.average], weight)

    @contextmanager
    def swap(self, model: nn.Module) -> Iterator[nn.Module]:
        """The model carries the averages inside the `with`, and its own weights, bit for bit, after it (errors included)."""
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
        """Raises `UserError` if a name is missing, not known, or of another shape."""
        restore(saved, self.average, "EMA weight")


def load_average(saved: Rows, model: nn.Module) -> None:
    """Give a model the averages of a checkpoint for good, without a copy of its own weights. Raises `UserError` as `load_state_dict`."""
    restore(saved, dict(_params(model)), "EMA weight")


def _params(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad and p.is_floating_point())
