"""Steps a state down its noise levels, each token at its own level: a diffusers scheduler, and its solvers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from kling.errors import unknown
from kling.flow.levels import sigma_grid
from kling.flow.path import to_x0, where_made
from kling.runtime.device import upload


def euler(v: Tensor, previous: Tensor, step: Tensor, previous_step: Tensor) -> Tensor:
    """First order: the velocity unchanged."""
    return v


def adams(v: Tensor, previous: Tensor, step: Tensor, previous_step: Tensor) -> Tensor:
    """Second-order Adams-Bashforth on uneven steps: no extra evaluation; first order for an element that has not moved yet."""
    ahead = torch.where(previous_step > 0, step / (2 * previous_step.clamp(min=1e-12)), 0.0)  # (b, 1, G, h, w)
    return torch.lerp(previous, v, 1 + ahead.to(v.dtype))  # v + ahead (v - previous)


# renoise: see `KlingFlowScheduler.step`. flow_map: the network is told where a step ends, and gives the mean velocity until there.
SOLVERS = {"euler": euler, "adams": adams, "renoise": euler, "flow_map": euler}


class KlingFlowScheduler(SchedulerMixin, ConfigMixin):
    """Flow matching with a noise level per token.

    The settings are stored in the checkpoint (`scheduler/scheduler_config.json`), never guessed. After `set_timesteps`, `sigmas`
    (steps + 1,) is the grid, on the CPU as in diffusers; `timesteps` are all its values but the last, times 1000, on the device.
    """

    order = 1

    @register_to_config
    def __init__(
        self,
        shift: float = 1.0,
        solver: str = "euler",
        num_inference_steps: int = 25,
        guidance_scale: float = 3.0,
        camera_guidance_scale: float = 1.0,
        brush_guidance_scale: float = 1.0,
        reference_guidance_scale: float = 1.0,
        guidance_reach: float = 0.0,
        density: str = "logit_normal",
    ) -> None:
        if solver not in SOLVERS:
            raise unknown("solver", solver, SOLVERS)
        self.set_timesteps(num_inference_steps)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        shift: float | None = None,
        solver: str | None = None,
    ) -> None:
        """Start sampling with `num_inference_steps` steps. Arguments that are None use the checkpoint's settings."""
        steps = self.config.num_inference_steps if num_inference_steps is None else num_inference_steps
        self.sigmas = sigma_grid(steps, self.config.shift if shift is None else shift)  # (steps + 1,)
        self.timesteps = upload(1000 * self.sigmas[:-1], device or "cpu")
        self._solver = solver or self.config.solver
        self._solve = SOLVERS[self._solver]
        self._previous: tuple[Tensor, Tensor] | None = None  # velocity and step of every element

    @property
    def renoises(self) -> bool:
        """Whether `step` needs fresh noise."""
        return self._solver == "renoise"

    def step(
        self, v: Tensor, sigma: Tensor, next_sigma: Tensor, z: Tensor, mask: Tensor | None, clean: Tensor, noise: Tensor | None = None
    ) -> tuple[Tensor, Callable[[], Tensor]]:
        """One step: x0 = z - sigma v where m > 0, c where m = 0; z <- z - (sigma - sigma+) v, which is x0 + (sigma+ / sigma)(z - x0).

        Elements that are given, or are already clean, have sigma+ = sigma and stay unchanged.

        The solver "renoise" of few-step weights (consistency and distribution-matching distillation: Yin et al. 2024, arXiv 2405.14867)
        goes to x0 in one step and adds fresh noise: z <- (1 - sigma+) x0 + sigma+ eps.

        Args:
            v: (b, c, G, h, w) guided velocity at `sigma`.
            sigma, next_sigma: levels of every element before and after, (b, 1, G, h, w) or broadcastable to it.
            z, mask, clean: as in `State`; no mask if everything is generated.
            noise: eps (b, c, G, h, w), for "renoise" only.

        Returns z at the next level, and a function that computes x0, the current prediction of the clip.
        """
        step = sigma - next_sigma
        previous, previous_step = self._previous or (v, torch.zeros_like(step))
        self._previous = v, step
        v = self._solve(v, previous, step, previous_step)

        def x0() -> Tensor:
            return where_made(mask, to_x0(z, v, sigma), clean)

        if self.renoises:
            return torch.where((sigma > 0) & (sigma > next_sigma), (1 - next_sigma) * x0() + next_sigma * noise, z), x0
        return torch.addcmul(z, step, v, value=-1), x0
