"""Flow maps: the mean velocity between two noise levels, so that a step of any length is one pass (AnyFlow: Gu et al. 2026,
arXiv 2605.13724; MeanFlow: Geng et al. 2025, arXiv 2505.13447).

    x_r = x_t - (t - r) u(x_t, t, r)          u(x_t, t, t) = v(x_t, t)

Levels t and r are the schedule's. A token with mask m is at m t and moves with m v, so its mean velocity obeys the same identity in t.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor

from kling.flow.levels import draw_sigma

Mean = Callable[[Tensor, Tensor, Tensor], Tensor]  # u(z, t (b,), r (b,)) -> (b, c, G, h, w)


def draw_steps(b: int, plain: int, g: Generator, density: str, shift: float, to_clean: float = 0.5) -> tuple[Tensor, Tensor]:
    """Levels t and r ≤ t (b,) of a batch: the first `plain` samples have r = t; of the others a share `to_clean` has r = 0, and the rest
    a random r below t: t and r are the larger and the smaller of two draws."""
    first, second = draw_sigma((2, b), g, density, shift)
    t, r = torch.maximum(first, second), torch.minimum(first, second)
    r[plain : plain + round(to_clean * (b - plain))] = 0
    t[:plain] = r[:plain] = first[:plain]
    return t, r


def flow_map_target(u: Mean, z: Tensor, v: Tensor, t: Tensor, r: Tensor, mask: Tensor, delta: float = 0.005) -> Tensor:
    """Regression target of the mean velocity: v - (t - r) du/dt along the path, without gradient. (b, c, G, h, w)

    The derivative is a difference of two passes, `delta` ahead and behind in t as far as t + delta ≤ 1 and t - delta ≥ r allow it.
    Sampling starts at t = 1, where only the difference behind exists. The passes must be in fp32: in bf16 the difference is noise.

    z, v: state and velocity at t. mask: m (b, 1, G, h, w). Samples with r = t have the target v; give at least one with r < t.
    """
    t, r = t.double(), r.double()
    ahead, behind = (1 - t).clamp(max=delta), (t - r).clamp(max=delta)  # (b,)
    over = (ahead + behind).clamp(min=1e-9)

    def at(change: Tensor) -> Tensor:
        return u(z + _spread(change, z) * mask * v, (t + change).to(z), r.to(z)).float()

    slope = (at(ahead) - at(-behind)) / _spread(over, z)
    return v - torch.where(_spread(t > r, z) > 0, _spread(t - r, z) * slope, 0.0)


def _spread(level: Tensor, like: Tensor) -> Tensor:
    """(b,) -> (b, 1, 1, 1, 1) in the dtype of `like`."""
    return level.to(like).view(-1, 1, 1, 1, 1)
