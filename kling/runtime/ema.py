"""Exponential moving average of the weights, kept in fp32 beside the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from kling.errors import UserError


class EMA:
    """θ̄ ← d θ̄ + (1 - d) θ over the floating-point parameters of a model.

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
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after update number `step` (0-based)."""
        params = dict(_params(model))
        averages = list(self.average.values())
        torch._foreach_lerp_(averages, [params[name].detach().float() for name in self.average], 1 - self.decay_at(step))

    @contextmanager
    def swap(self, model: nn.Module) -> Iterator[nn.Module]:
        """The model carries the averages inside the `with`, and its own weights, bit for bit, after it (errors included)."""
        params = [(p, self.average[name]) for name, p in _params(model)]
        own = [p.detach().clone() for p, _ in params]
        try:
            with torch.no_grad():
                for p, average in params:
                    p.copy_(average)
            yield model
        finally:
            with torch.no_grad():
                for (p, _), weight in zip(params, own, strict=True):
                    p.copy_(weight)

    def state_dict(self) -> dict[str, Tensor]:
        """{parameter name: fp32 average}."""
        return dict(self.average)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Raises `UserError` if a name is missing, not known, or of another shape."""
        if odd := sorted(state.keys() ^ self.average.keys()):
            raise UserError(
                f"EMA weights do not fit the model: {odd[0]} is {'missing' if odd[0] in self.average else 'not one of its parameters'}"
            )
        for name, average in self.average.items():
            if state[name].shape != average.shape:
                raise UserError(f"EMA weight {name} has shape {tuple(state[name].shape)}, the model's has {tuple(average.shape)}")
            average.copy_(state[name])


def _params(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in model.named_parameters() if p.is_floating_point())
