"""The one sampling loop, from noise to a clip: all frames together, each frame some steps behind the one before, or block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from kling.condition.state import State
from kling.flow.levels import frame_grid
from kling.runtime.device import upload


class Step:
    """The state after a step: its timestep (1000 σ, of the noisiest frame), z (b, c, G, h, w), and x0, the current prediction of the clip.

    x0 costs a pass over memory, and is computed when it is first read.
    """

    def __init__(self, timestep: float, z: Tensor, find_x0: Callable[[], Tensor]) -> None:
        self.timestep, self.z, self._find_x0 = timestep, z, find_x0

    @cached_property
    def x0(self) -> Tensor:
        return self._find_x0()


class Scheduler(Protocol):
    sigmas: Tensor  # (steps + 1,), on the CPU

    def step(
        self, v: Tensor, sigma: Tensor, next_sigma: Tensor, z: Tensor, mask: Tensor | None, clean: Tensor, **noise: Tensor
    ) -> tuple[Tensor, Callable[[], Tensor]]: ...


# predict(z, level and next level (b, 1 or G) on the device, the highest level) -> guided velocity; fresh(step) -> noise of z's shape
Predict = Callable[[Tensor, Tensor, Tensor, float], Tensor]
Fresh = Callable[[int], Tensor]


def walk(state: State, scheduler: Scheduler, predict: Predict, noise: Tensor, fresh: Fresh, delay: int = 0) -> Iterator[Step]:
    """From noise (b, c, G, h, w) to the clip. delay: number of steps by which each frame is behind the one before (diffusion forcing); a
    keyframe goes with the frame at which it lies.

    All levels are known on the host before the first step and are copied to the device at once, so that no step waits for it.
    """
    grid = scheduler.sigmas[:, None, None]  # (steps + 1, 1, 1)
    if delay:
        grid = frame_grid(scheduler.sigmas, delay * state.lies_at)  # (steps', b, G)
    highest, mask = grid.amax((1, 2)).tolist(), state.mask if state.gives else None
    z = state.noised(torch.ones(1, device=noise.device), noise)
    for i, (level, next_level) in enumerate(pairwise(upload(grid, noise.device))):  # (1, 1) or (b, G) each
        v = predict(z, level, next_level, highest[i])
        again = {"noise": fresh(i)} if getattr(scheduler, "renoises", False) else {}
        z, x0 = scheduler.step(v, state.spread_sigma(level), state.spread_sigma(next_level), z, mask, state.clean, **again)
        z = z.to(noise.dtype)
        yield Step(1000 * highest[i], z, lambda x0=x0: x0().to(noise.dtype))


def walk_blocks(
    state: State,
    scheduler: Callable[[], Scheduler],
    predict: Callable[[State], Predict],
    noise: Tensor,
    fresh: Callable[[int, int], Fresh],
    size: int,
    remember: Callable[[State, Tensor], None],
) -> Iterator[Step]:
    """As `walk`, `size` frames at a time; each block sees those before it (Yin et al. 2024, arXiv 2412.07772).

    scheduler(): a scheduler at its first step. predict(block): the prediction function of a block's frames. fresh(first, last frame): noise
    of a block. remember(block, clip): called with each finished block.
    """
    z = state.noised(torch.ones(1, device=noise.device), noise)
    x0 = z.clone()
    for start in range(0, state.frames, size):
        end = min(start + size, state.frames)
        block = state.part(start, end)
        for step in walk(block, scheduler(), predict(block), noise[:, :, start:end], fresh(start, end)):
            z, x0 = z.clone(), x0.clone()
            z[:, :, start:end], x0[:, :, start:end] = step.z, step.x0
            yield Step(step.timestep, z, lambda x0=x0: x0)
        remember(block, block.finish(step.z))
