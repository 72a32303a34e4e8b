"""Measures a step: the loss over all processes, the time of its parts, and the utilisation of the machine."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from kling.runtime.accelerator import Accelerator
from kling.runtime.parallel import total
from kling.training.health import DeviceGuard

SIGMA_BINS = 4


class StepClock:
    """Measures the parts of a step: `lap(name)` after each part, `take()` once per step.

    On a GPU laps are events in its queue. `take` waits for them; `close` does not, and its result may be called once they have happened.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.device = device
        self._laps: list[tuple[str, object]] = []
        self._since = self._now()

    def _now(self) -> object:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def lap(self, name: str) -> None:
        """The time since the last lap was spent on `name`."""
        self._laps.append((name, self._now()))

    def close(self) -> Callable[[], dict[str, float]]:
        """End a step. The returned function gives the same as `take`, if called when the device has reached this point."""
        laps, since = self._laps, self._since
        self._laps, self._since = [], laps[-1][1] if laps else since

        def spent() -> dict[str, float]:
            found: dict[str, float] = {}
            before = since
            for name, now in laps:
                seconds = before.elapsed_time(now) / 1000 if self.cuda else now - before
                found[f"time/{name}"] = found.get(f"time/{name}", 0.0) + seconds
                before = now
            return found | {"time/step": sum(found.values())}

        return spent

    def take(self) -> dict[str, float]:
        """{"time/<name>": seconds} since the last `take`, "time/step" their sum."""
        spent = self.close()
        if self.cuda:
            torch.cuda.synchronize(self.device)
        return spent()


class Meter(StepClock):
    """A clock that also sums, over the micro-steps of an update, losses by σ, tokens and operations.

    ceiling: FLOP/s that the device reaches on matrix products (`matmul_ceiling`): `mfu` is the share of it used by the model's own
    operations, recomputed activations not counted.
    """

    def __init__(self, device: torch.device, ceiling: float) -> None:
        super().__init__(device)
        self.ceiling = ceiling
        self._losses = torch.zeros(2, SIGMA_BINS, device=device)  # sums and counts
        self._work = torch.zeros(2)  # tokens, operations

    def add(self, sigma: Tensor, losses: Tensor, tokens: float, flops: float) -> None:
        """Add one micro-step: levels and losses (b,) of its samples, and the whole batch's tokens and operations."""
        index = (sigma.detach().float() * SIGMA_BINS).long().clamp(0, SIGMA_BINS - 1)
        self._losses.index_add_(1, index, torch.stack([losses.detach().float(), torch.ones_like(losses, dtype=torch.float32)]))
        self._work += torch.tensor([tokens, flops])

    def sums(self, accelerator: Accelerator) -> Tensor:
        """Losses of the update over all its samples, and their number, by σ: (2, bins) on the device, the same on every process. Resets
        the sums."""
        sums = total(accelerator, self._losses.clone())
        self._losses.zero_()
        return sums

    @staticmethod
    def means(numbers: list[float]) -> dict[str, float]:
        """Mean loss in total and by σ, from the values of `sums`."""
        sums, counts = numbers[:SIGMA_BINS], numbers[SIGMA_BINS:]
        found = {"loss": sum(sums) / sum(counts)}
        for i in range(SIGMA_BINS):
            if counts[i]:
                found[f"loss/sigma_{i / SIGMA_BINS:.2f}-{(i + 1) / SIGMA_BINS:.2f}"] = sums[i] / counts[i]
        return found

    def close(self, batches: int = 1, processes: int = 1) -> Callable[[], dict[str, float]]:
        """End a step: its times, and with them tokens/s of all processes, MFU and peak memory.

        batches: number of different batches on all processes; this process's tokens and operations are taken for each.
        """
        spent, (tokens, flops), memory = super().close(), (self._work * batches).tolist(), peak_memory(self.device)
        self._work.zero_()

        def used() -> dict[str, float]:
            times = spent()
            seconds = max(times["time/step"], 1e-9)
            speed = {"tokens/s": tokens / seconds, "mfu": flops / seconds / (self.ceiling * processes), "memory/peak_gib": memory}
            return times | speed

        return used


def log_line(guard: DeviceGuard, lr: float, speed: Callable[[], dict[str, float]], numbers: list[float]) -> dict[str, float]:
    """A step's line in the log, from its numbers, which are on the host now; the guard gets them too."""
    *sums, norm, row, skipped = numbers
    guard.look(row, skipped)
    return {**Meter.means(sums), "lr": lr, "grad_norm": norm, "skipped": guard.skipped, **speed()}


def peak_memory(device: torch.device) -> float:
    """The peak memory of this process in GiB: on the GPU if it uses one, else in total."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


@cache
def matmul_ceiling(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """FLOP/s of the fastest of some large matrix products, which counts as 100 % of the machine. Measured once in a process."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.ones(n, n, device=device, dtype=dtype) for _ in range(2))
    best, end = math.inf, time.monotonic() + seconds
    while time.monotonic() < end or best == math.inf:
        clock = StepClock(device)
        a @ b
        clock.lap("matmul")
        best = min(best, clock.take()["time/step"])
    return 2 * n**3 / best
