"""Flow maps: the mean velocity between two noise levels, so that a step of any length is one pass (AnyFlow: Gu et al. 2026,
arXiv 2605.13724; MeanFlow: Geng et al. 2025, arXiv 2505.13447).

    x_r = x_t - (t - r) u(x_t, t, r)          u(x_t, t, t) = v(x_t, t)

Levels t and r are the schedule's. A token with mask m is at m t and moves with m v, so its mean velocity obeys the same identity in t.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor

from kling.flow.levels import draw_sigma, shift_sigma

Mean = Callable[[Tensor, Tensor, Tensor], Tensor]  # u(z, t (b,), r (b,)) -> (b, c, G, h, w)


def whole_part(b: int, share: float, g: Generator) -> int:
    """A share of b samples as a whole number, rounded up or down at random, so that over many batches it is exact, also where b is 1."""
    return int(share * b + torch.rand((), generator=g).item())


def draw_steps(
    b: int, plain: int, g: Generator, density: str, shift: float, to_clean: float = 0.5, counts: Sequence[int] = ()
) -> tuple[Tensor, Tensor]:
    """Levels t and r ≤ t (b,) of a batch: the first `plain` samples have r = t, at random levels.

    With `counts`, each other sample is in a step of a sampling grid: with one of these numbers of steps, r is the end of one of them, and t
    is its start in a third of the samples, otherwise anywhere in it (Heek et al. 2024, arXiv 2403.06807). Without, a share `to_clean` has
    r = 0, and the rest a random r below t: t and r are the larger and the smaller of two draws.
    """
    first, second = draw_sigma((2, b), g, density, shift)
    if counts:
        count = torch.tensor(counts)[torch.randint(len(counts), (b,), generator=g)]  # (b,) steps of the grid
        step = (torch.rand(b, generator=g, dtype=torch.float64) * count).floor()
        inside = 1 - torch.rand(b, generator=g, dtype=torch.float64)  # in (0, 1]
        inside[torch.rand(b, generator=g) < 1 / 3] = 1
        t, r = (shift_sigma(x / count, shift).float() for x in (step + inside, step))
    else:
        t, r = torch.maximum(first, second), torch.minimum(first, second)
        r[plain : plain + whole_part(b - plain, to_clean, g)] = 0
    t[:plain] = r[:plain] = first[:plain]
    return t, r


def composed_target(u: Mean, z: Tensor, v: Tensor, t: Tensor, r: Tensor, mask: Tensor, shift: float, stride: float = 0.05) -> Tensor:
    """Regression target of the mean velocity, without gradient: along v to a level s, and from there the step u to r. (b, c, G, h, w)

        ((t - s) v + (s - r) u(x_s, s, r)) / (t - r)        x_s = x_t - (t - s) m v

    It is the target below to first order in t - s, with one pass and without a difference of two of them: bf16 is good enough, and no
    error is amplified (Kim et al. 2024, arXiv 2310.02279, eq. 9). s is `stride` of the schedule below t, but not below r.

    z, v: state and velocity at t. mask: m (b, 1, G, h, w). Samples with r = t have the target v.
    """
    t, r = t.double(), r.double()
    s = torch.maximum(shift_sigma((shift_sigma(t, 1 / shift) - stride).clamp(min=0), shift), r)  # (b,)
    rest = u(z - _spread(t - s, z) * mask * v, s.to(z), r.to(z)).to(v)
    first = (t - s) / (t - r).clamp(min=1e-9)  # (b,) share of the step; where r = t it is not read
    return torch.where(_spread(t > s, z) > 0, rest.lerp(v, _spread(torch.where(s > r, first, 1.0), z)), v)


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
