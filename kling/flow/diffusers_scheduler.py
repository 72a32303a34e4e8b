"""Any flow scheduler of diffusers, behind the interface of ours, for clips whose elements are all at one level or given."""

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
    """One walk of a diffusers scheduler. `sigmas` (steps + 1,) are the levels that the network is told, which are the published
    timesteps; on the CPU.

    UniPC rounds those to whole numbers; the levels that it steps with are its own and exact. Its common form is computed in `unipc.py`, in
    a third of the time.
    """

    def __init__(self, scheduler: SchedulerMixin, num_inference_steps: int, device: torch.device | str, shift: float) -> None:
        key = shift_key(scheduler)
        self.scheduler = type(scheduler).from_config(scheduler.config, **{key: shift})
        self.scheduler.set_timesteps(num_inference_steps, device="cpu")
        told = self.scheduler.timesteps.double() / TRAIN_STEPS  # fp64, so that the embedder gets the whole number back
        self.sigmas = torch.cat([told, told.new_zeros(1)])
        self._steps = 0
        self._levels = upload(self.scheduler.sigmas, device)
        self._unipc = UniPC(self.scheduler.sigmas.tolist()) if is_unipc(scheduler) else None
        if self._unipc is None:
            self.scheduler.set_timesteps(num_inference_steps, device=device)
            self.scheduler.set_begin_index(0)  # or it would look for its place on the device

    def step(
        self, v: Tensor, sigma: Tensor, next_sigma: Tensor, z: Tensor, mask: Tensor | None, clean: Tensor
    ) -> tuple[Tensor, Callable[[], Tensor]]:
        """As `KlingFlowScheduler.step`, for one level: given elements (m = 0) stay as they are."""
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
    """What a scheduler calls its shift."""
    return "flow_shift" if "flow_shift" in scheduler.config else "shift"
