"""UniPC (Zhao et al. 2023, arXiv 2302.04867) of second order, as weighted sums of the few tensors that a step needs.

It gives the same numbers as diffusers' `UniPCMultistepScheduler` in the form that Wan uses (bh2, flow sigmas, x0 predicted), which instead
stacks tensors and contracts them with `einsum`.
"""

from __future__ import annotations

from math import expm1, inf, log

import torch
from diffusers import SchedulerMixin, UniPCMultistepScheduler
from torch import Tensor

FORM = {
    "solver_order": 2, "solver_type": "bh2", "prediction_type": "flow_prediction", "predict_x0": True, "use_flow_sigmas": True,
    "lower_order_final": True, "disable_corrector": [], "thresholding": False, "solver_p": None, "final_sigmas_type": "zero",
}  # fmt: skip


def is_unipc(scheduler: SchedulerMixin) -> bool:
    """Whether this scheduler computes the same as `UniPC`."""
    return type(scheduler) is UniPCMultistepScheduler and all(scheduler.config.get(key) == value for key, value in FORM.items())


class UniPC:
    """Sampling down the levels `sigmas` (steps + 1, the last is 0), with the whole clip at one level."""

    def __init__(self, sigmas: list[float]) -> None:
        self.sigmas = sigmas
        self.lambdas = [log((1 - s) / s) if 0 < s < 1 else inf if s == 0 else -inf for s in sigmas]  # half log-SNR
        self.steps = 0
        self.x0s: list[Tensor] = []  # earlier predictions, the most recent last
        self.start: Tensor  # corrected z at the previous level

    def step(self, x0: Tensor, z: Tensor) -> Tensor:
        """From z at level i, and the x0 predicted there, to z at level i + 1; first x0 corrects z."""
        i, last = self.steps, len(self.sigmas) - 1
        if i > 0:
            z = self._corrected(i, self._order(i - 1, last), x0)
        self.x0s = [*self.x0s[-1:], x0]
        self.start, self.steps = z, i + 1
        return self._predicted(i, self._order(i, last), z)

    @staticmethod
    def _order(i: int, last: int) -> int:
        """First order at both ends, where there is no previous or no later step."""
        return min(2, i + 1, last - i)

    def _base(self, i: int) -> tuple[float, float, float]:
        """From level i to i + 1: σ⁺/σ for z, α⁺(1 - e^-h) for the last x0, and the distance back to the x0 before it, in units of h."""
        h = self.lambdas[i + 1] - self.lambdas[i]
        rk = (self.lambdas[i - 1] - self.lambdas[i]) / h if i else 0.0
        return self.sigmas[i + 1] / self.sigmas[i], -(1 - self.sigmas[i + 1]) * expm1(-h), rk

    def _predicted(self, i: int, order: int, z: Tensor) -> Tensor:
        keep, move, rk = self._base(i)
        if order == 1:
            return weighted((keep, z), (move, self.x0s[-1]))
        slope = 0.5 * move / rk
        return weighted((keep, z), (move - slope, self.x0s[-1]), (slope, self.x0s[-2]))

    def _corrected(self, i: int, order: int, x0: Tensor) -> Tensor:
        """z at level i, corrected with the x0 predicted there."""
        keep, move, rk = self._base(i - 1)
        if order == 1:
            return weighted((keep, self.start), (0.5 * move, self.x0s[-1]), (0.5 * move, x0))
        minus_h = self.lambdas[i - 1] - self.lambdas[i]
        e = expm1(minus_h)
        phi = e / minus_h - 1
        b1, b2 = phi / e, 2 * (phi / minus_h - 0.5) / e
        past = (b2 - b1) / (rk - 1)  # ρ₁ and ρ₂ of the paper's R ρ = b
        now = b1 - past
        slope, ours = past * move / rk, self.start  # `start` was made by a correction, so it may be overwritten
        return weighted((keep, ours), (move - slope - now * move, self.x0s[-1]), (slope, self.x0s[-2]), (now * move, x0), into=ours)


def weighted(*terms: tuple[float, Tensor], into: Tensor | None = None) -> Tensor:
    """Sum of weight · tensor, with one pass over memory for each. into: the first tensor, if it is not needed any more."""
    (weight, first), *rest = terms
    total = torch.mul(first, weight, out=into)
    for weight, x in rest:
        total.add_(x, alpha=weight)
    return total
