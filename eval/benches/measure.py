"""The rules of a comparison: the same work, checked before it is timed, runs of both in turns, and an interval for the ratio.

    def rows(bench: Bench) -> Iterator[Row]:                     # a suite
        yield bench.same("forward", ours)                        # ours against itself: the ratio of equal things, here and today
        yield bench.compare("forward", ours, peer, check=Check(a, b, exact), flops=flops, goal=1.1)

Runs alternate A B B A A B ..., so that a slowdown of the machine affects both. A ratio is the peer's time over ours, the median over the
pairs, with its bootstrap interval. For one thread on a CPU, processor time is used, because other processes do not affect it.
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

QUIET = (0.97, 1.03)  # if the ratio of a thing to itself is outside, the machine is noisy and no goal is judged
LEAST = 0.02  # seconds of one timing; shorter runs are repeated
ALLOWED = {torch.float32: 1e-5, torch.bfloat16: 3e-2}  # relative errors that are always accepted
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Check:
    """Three results for the same new inputs: ours, the peer's, and the peer's in fp64."""

    ours: Tensor
    peer: Tensor
    exact: Tensor

    @property
    def errors(self) -> tuple[float, float]:
        """Relative errors ‖x - exact‖ / ‖exact‖ of ours and of the peer's; nan if a result is not finite."""
        exact = self.exact.double()
        return tuple(float((x.to(exact) - exact).norm() / exact.norm()) for x in (self.ours, self.peer))

    @property
    def row(self) -> Row:
        """Contains `wrong` if our error is larger than three times the peer's and than the dtype allows."""
        error, peer = self.errors
        allowed = max(3 * peer, ALLOWED[self.ours.dtype])
        found: Row = {"error": error, "peer error": peer}
        return found if error <= allowed else found | {"wrong": f"error {error:.2g}, allowed {allowed:.2g}: not timed"}


def poison(like: Tensor, count: int = 4) -> None:
    """Fill memory of a result's size with nan and free it, so that a run that writes no result cannot pass with the previous one."""
    del [torch.full_like(like, math.nan) for _ in range(count)][:]


@dataclass
class Bench:
    """What all suites share. `ceilings` are from `machine.ceilings`; `noisy` is set by `same`. `cores`: those that this process could use
    before it chose one; empty if the system does not tell."""

    device: torch.device
    quick: bool = False
    threads: int = 1
    seed: int = 0
    ceilings: dict[str, float] = field(default_factory=dict)
    noisy: bool = False
    cores: set[int] = field(default_factory=set)

    @property
    def pairs(self) -> int:
        return 3 if self.quick else 7

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def same(self, case: str, ours: Run, wall: bool = False) -> Row:
        """Compare ours with itself. Sets `noisy` for everything that follows."""
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
        """Time both. flops: of one run. goal: minimum ratio. wall: use the wall clock, if other processes do the work."""
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
        """Seconds of one run: the median over as many runs as a comparison makes."""
        return median(a for a, _ in self._times(run, run, wall))

    def once(self, run: Run) -> float:
        """Seconds of a single run, for slow work."""
        seconds = clock(run, self.device)
        return seconds.wall if self.device.type == "cuda" or self.threads > 1 else seconds.cpu

    def judge(self, value: float, goal: float | None, dtype: torch.dtype = torch.float32, at_most: bool = False) -> Row:
        """Whether a goal is reached, or why that cannot be judged here."""
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
        """(a's, b's) seconds by the clock that counts, one pair each; the times of all clocks are appended to `seconds`."""
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
