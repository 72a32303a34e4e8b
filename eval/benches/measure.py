"""The rules of a comparison: the same work, checked before it is timed; ours and the peer's in turns; how far the ratio can be trusted.

    def rows(bench: Bench) -> Iterator[Row]:                     # a suite
        yield bench.same("forward", ours)                        # ours against itself: what no difference looks like here, today
        yield bench.compare("forward", ours, peer, check=Check(a, b, exact), flops=flops, goal=1.1)

Runs alternate A B B A A B ..., so that a machine that slows down slows both. A ratio is the peer's time over ours, the median over the
pairs, with its bootstrap interval. Where one thread computes on a CPU, processor time is judged, since a neighbour does not count in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from kling_programs.eval.benches.machine import Seconds, clock
from torch import Tensor

from kling.metrics.stats import bootstrap, row_medians
from kling.runtime.precision import bf16_is_fast

Row = dict[str, Any]
Run = Callable[[], object]

QUIET = (0.97, 1.03)  # a thing against itself beyond these: the run is noisy, and nothing is judged
LEAST = 0.02  # seconds of one timing; shorter runs are repeated
ALLOWED = {torch.float32: 1e-5, torch.bfloat16: 3e-2}  # relative error that is never too much
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Check:
    """Three results of the same fresh inputs: ours, the peer's, and the peer's in fp64."""

    ours: Tensor
    peer: Tensor
    exact: Tensor

    @property
    def errors(self) -> tuple[float, float]:
        """Relative errors ‖x - exact‖ / ‖exact‖ of ours and of the peer's; nan where a result is not finite."""
        exact = self.exact.double()
        return tuple(float((x.to(exact) - exact).norm() / exact.norm()) for x in (self.ours, self.peer))

    @property
    def row(self) -> Row:
        """`wrong` is there if ours is further off than three times the peer's error and than the dtype allows."""
        error, peer = self.errors
        allowed = max(3 * peer, ALLOWED[self.ours.dtype])
        found: Row = {"error": error, "peer error": peer}
        return found if error <= allowed else found | {"wrong": f"error {error:.2g}, allowed {allowed:.2g}: not timed"}


def poison(like: Tensor, count: int = 4) -> None:
    """Fill memory of a result's size with nan and let it go, so that a result that is not written does not pass for the last one."""
    del [torch.full_like(like, math.nan) for _ in range(count)][:]


@dataclass
class Bench:
    """What all suites share. `ceilings` as `machine.ceilings` gives them; `noisy` is set by `same`."""

    device: torch.device
    quick: bool = False
    threads: int = 1
    seed: int = 0
    ceilings: dict[str, float] = field(default_factory=dict)
    noisy: bool = False

    @property
    def pairs(self) -> int:
        return 3 if self.quick else 7

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def same(self, case: str, ours: Run, wall: bool = False) -> Row:
        """Ours against itself. Sets `noisy`, for everything after it."""
        times = self._times(ours, ours, wall)
        ratio = median(b / a for a, b in times)
        self.noisy = not QUIET[0] <= ratio <= QUIET[1]
        return {"case": case, "peer": "itself", "ratio": ratio} | ({"verdict": "noisy: nothing below is judged"} if self.noisy else {})

    def compare(
        self,
        case: str,
        ours: Run,
        peer: Run,
        *,
        name: str = "diffusers",
        check: Check | None = None,
        dtype: torch.dtype = torch.float32,
        flops: float = 0.0,
        goal: float | None = None,
        wall: bool = False,
    ) -> Row:
        """Time both. flops: of one run. goal: the least ratio. wall: judge by the wall clock, where other processes do the work."""
        row: Row = {"case": case, "dtype": NAMES[dtype], "peer": name} | (check.row if check else {})
        if "wrong" in row:
            return row
        seconds: list[tuple[Seconds, Seconds]] = []
        times = self._times(ours, peer, wall, seconds)
        ratios = [b / a for a, b in times]
        low, high = bootstrap(ratios, seed=self.seed, of=row_medians)
        a, b = (median(column) for column in zip(*times, strict=True))
        clocks = {which: median(getattr(y, which) / getattr(x, which) for x, y in seconds) for which in ("wall", "cpu")}
        row |= {"ours ms": 1e3 * a, "peer ms": 1e3 * b, "ratio": median(ratios), "low": low, "high": high}
        row |= {"wall ratio": clocks["wall"], "cpu ratio": clocks["cpu"]}
        if flops:
            top = self.ceilings.get(f"matmul {NAMES[dtype]}", math.nan)
            row |= {"GF/s": flops / a / 1e9, "peer GF/s": flops / b / 1e9, "% of ceiling": 100 * flops / a / top}
        return row | self.judge(row["ratio"], goal, dtype)

    def times(self, run: Run, wall: bool = False) -> float:
        """Seconds of one run alone: the median over as many as a comparison makes."""
        return median(a for a, _ in self._times(run, run, wall))

    def once(self, run: Run) -> float:
        """Seconds of a single run, for what takes long."""
        seconds = clock(run, self.device)
        return seconds.wall if self.device.type == "cuda" or self.threads > 1 else seconds.cpu

    def judge(self, value: float, goal: float | None, dtype: torch.dtype = torch.float32, at_most: bool = False) -> Row:
        """Whether a goal is reached, or why that cannot be said here."""
        if goal is None:
            return {}
        text = f"{'<=' if at_most else '>='} {goal:g}"
        if self.noisy:
            return {"goal": text, "verdict": "not judged: noisy"}
        if dtype == torch.bfloat16 and not bf16_is_fast(self.device.type):
            return {"goal": text, "verdict": "not judged: bf16 is not faster than fp32 here"}
        reached = value <= goal if at_most else value >= goal
        return {"goal": text, "verdict": "reached" if reached else "missed"}

    def _times(self, a: Run, b: Run, wall: bool, seconds: list[tuple[Seconds, Seconds]] | None = None) -> list[tuple[float, float]]:
        """(a's, b's) seconds by the clock that is judged, a pair each; all clocks go to `seconds`."""
        wall = wall or self.device.type == "cuda" or self.threads > 1
        repeats = []
        for run in (a, b):
            run()  # warm
            repeats.append(max(1, math.ceil(LEAST / max(1e-9, clock(run, self.device).wall))))
        found = []
        for i in range(self.pairs):
            pair: dict[int, Seconds] = {}
            for j in (0, 1) if i % 2 == 0 else (1, 0):
                pair[j] = clock((a, b)[j], self.device, repeats[j])
            if seconds is not None:
                seconds.append((pair[0], pair[1]))
            found.append(tuple(pair[j].wall if wall else pair[j].cpu for j in (0, 1)))
        return found


def absent(case: str, name: str, remedy: str) -> Row:
    """The row of a peer that is not installed."""
    return {"case": case, "peer": name, "absent": remedy}
