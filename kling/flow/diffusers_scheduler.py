"""Any flow scheduler of diffusers behind our scheduler interface, for clips in which every element is either given or at one level."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import SchedulerMixin
from torch import Tensor

from kling.flow.path import to_x0, where_made
from kling.flow.unipc import UniPC, is_unipc
from kling.runtime.device import upload

TRAIN_STEPS = 1000  # a published timestep is 1000 σ


class DiffusersWalk:
    """Sampling with a diffusers scheduler. `sigmas` (steps + 1,) are the levels passed to the network, which are the published timesteps;
    on the CPU.

    UniPC rounds the timesteps to whole numbers; the levels that it computes with are its own and exact. `unipc.py` computes its usual form
    in a third of the time.
    """

    def __init__(self, scheduler: SchedulerMixin, num_inference_steps: int, device: torch.device | str, shift: float) -> None:
        key = shift_key(scheduler)
        self.scheduler = type(scheduler).from_config(scheduler.config, **{key: shift})
        self.scheduler.set_timesteps(num_inference_steps, device="cpu")
        told = self.scheduler.timesteps.double() / TRAIN_STEPS  # fp64, so that the embedder recovers the whole number
        self.sigmas = torch.cat([told, told.new_zeros(1)])
        self._steps = 0
        self._levels = upload(self.scheduler.sigmas, device)
        self._unipc = UniPC(self.scheduler.sigmas.tolist()) if is_unipc(scheduler) else None
        if self._unipc is None:
            self.scheduler.set_timesteps(num_inference_steps, device=device)
            self.scheduler.set_begin_index(0)  # otherwise it would search for its position on the device

    def step(
        self, v: Tensor, sigma: Tensor, next_sigma: Tensor, z: Tensor, mask: Tensor | None, clean: Tensor
    ) -> tuple[Tensor, Callable[[], Tensor]]:
        """As `KlingFlowScheduler.step`, for one level: given elements (m = 0) stay unchanged."""
        level = self._levels[self._steps]

        def x0() -> Tensor:
            return to_x0(z, v, level)

        if self._unipc is not None:
            moved = self._unipc.step(x0(), z)
        else:
            moved = self.scheduler.step(v, self.scheduler.timesteps[self._steps], z, return_dict=False)[0]
        self._steps += 1
        return where_made(mask, moved, z), lambda: where_made(mask, x0(), clean)


def shift_key(scheduler: SchedulerMixin) -> str:
    """The name of a scheduler's shift setting."""
    return "flow_shift" if "flow_shift" in scheduler.config else "shift"
