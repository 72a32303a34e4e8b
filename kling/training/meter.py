"""Measures a step: the loss over all processes, the time of its parts, and the utilisation of the machine."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from kling.runtime.accelerator import Accelerator
from kling.runtime.log import METRICS, read_metrics
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

    tokens: of all updates logged so far, over all processes; `Loop` keeps it in the checkpoints. ceiling: FLOP/s that the device reaches on
    matrix products (`matmul_ceiling`): `mfu` is the share of it used by the model's own operations, recomputed activations not counted.
    """

    def __init__(self, device: torch.device, ceiling: float) -> None:
        super().__init__(device)
        self.ceiling, self.tokens = ceiling, 0
        self._sums = torch.zeros(2, SIGMA_BINS + 1, device=device)  # of losses and of 1 by σ; the last column: 0, tokens
        self._flops = 0.0

    def add(self, sigma: Tensor, losses: Tensor, tokens: float, flops: float) -> None:
        """Add one micro-step: levels and losses (b,) of its samples, and the whole batch's tokens and operations."""
        index = (sigma.detach().float() * SIGMA_BINS).long().clamp(0, SIGMA_BINS - 1)
        self._sums.index_add_(1, index, torch.stack([losses.detach().float(), torch.ones_like(losses, dtype=torch.float32)]))
        self._sums[1, -1].add_(tokens)
        self._flops += flops

    def sums(self, accelerator: Accelerator) -> Tensor:
        """Losses of the update over all its samples, and their number, by σ; in a last column 0, and its tokens, both over all processes:
        (2, bins + 1) on the device, the same on every process. Resets the sums."""
        sums = total(accelerator, self._sums.clone())
        self._sums.zero_()
        return sums

    @staticmethod
    def means(numbers: list[float]) -> dict[str, float]:
        """Mean loss in total and by σ, from the values of `sums`."""
        sums, counts = numbers[:SIGMA_BINS], numbers[SIGMA_BINS + 1 : -1]
        found = {"loss": sum(sums) / sum(counts)}
        for i in range(SIGMA_BINS):
            if counts[i]:
                found[f"loss/sigma_{i / SIGMA_BINS:.2f}-{(i + 1) / SIGMA_BINS:.2f}"] = sums[i] / counts[i]
        return found

    def close(self, batches: int = 1, processes: int = 1) -> Callable[[float], dict[str, float]]:
        """End a step. The returned function takes the last value of `sums`, the tokens of all processes, once per step and in order, and
        gives the step's times, and with them all tokens so far, tokens/s, MFU and peak memory.

        batches: number of different batches on all processes, of which there are more if several share a clip; this process's operations
        are taken for each.
        """
        spent, flops, memory = super().close(), self._flops * batches, peak_memory(self.device)
        self._flops = 0.0

        def used(tokens: float) -> dict[str, float]:
            times, own = spent(), tokens * batches / processes
            seconds = max(times["time/step"], 1e-9)
            self.tokens += round(own)
            speed = {"tokens/s": own / seconds, "mfu": flops / seconds / (self.ceiling * processes), "memory/peak_gib": memory}
            return {"tokens": self.tokens, **times, **speed}

        return used


def log_line(guard: DeviceGuard, lr: float, speed: Callable[[float], dict[str, float]], numbers: list[float]) -> dict[str, float]:
    """A step's line in the log, from its numbers, which are on the host now; the guard gets them too. speed: of `Meter.close`."""
    *sums, norm, row, skipped = numbers
    guard.look(row, skipped)
    return {**Meter.means(sums), "lr": lr, "grad_norm": norm, "skipped": guard.skipped, **speed(sums[-1])}


def logged_tokens(run: Path, step: int) -> int:
    """The tokens of a run's updates until `step`, by the speeds and times in its log: for a checkpoint that does not tell."""
    lines = read_metrics(run / METRICS) if (run / METRICS).is_file() else []
    return round(sum((line.get("tokens/s") or 0) * (line.get("time/step") or 0) for line in lines if line.get("step", 0) <= step))


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
