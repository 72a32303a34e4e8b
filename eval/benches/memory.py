"""Peak memory of a piece of work, in its own process, above what the process used after warming up.

    peak("kling_programs.eval.benches.vae:decode", {"which": "ours", "frames": 65})       # MiB

calls decode(which="ours", frames=65) there, which prepares and returns (warm_up, work), two functions without arguments. Only what `work`
takes beyond the memory after `warm_up` is counted, so imports, weights and the allocator's first blocks are not.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import subprocess
import sys
import threading
import time
from typing import Any

import psutil
import torch

MIB = 2**20
EVERY = 0.002  # seconds between two samples


class PeakMemory:
    """`with PeakMemory() as peak: ...` then `peak.mib`: the peak of resident memory inside, above that at the entry.

    Sampled every 2 ms; if the process has reached a new maximum, the kernel's exact figure is used. On a GPU, its allocator's.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.mib = device, 0.0

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self.start = torch.cuda.memory_allocated(self.device)
            return self
        self.process, self.most, self.done = psutil.Process(), 0, threading.Event()
        self.start, self.ever = self.process.memory_info().rss, _high_water()
        self.thread = threading.Thread(target=self._look, daemon=True)
        self.thread.start()
        return self

    def _look(self) -> None:
        while not self.done.is_set():
            self.most = max(self.most, self.process.memory_info().rss)
            time.sleep(EVERY)

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            most = torch.cuda.max_memory_allocated(self.device)
        else:
            self.done.set()
            self.thread.join()
            now = _high_water()
            most = now if now > self.ever else self.most
        self.mib = max(0.0, (most - self.start) / MIB)


def _high_water() -> int:
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def peak(target: str, arguments: dict[str, Any], device: str = "cpu", threads: int = 1) -> float:
    """Peak MiB of the work of `target` ("module:function") in a child process. Raises `RuntimeError` if it fails."""
    environment = os.environ | {"MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", __name__, target, json.dumps(arguments), device]
    child = subprocess.run(command, capture_output=True, text=True, env=environment)
    if child.returncode:
        raise RuntimeError(f"{target} {arguments} ended with {child.returncode}: {child.stderr.strip()[-2000:]}")
    return float(child.stdout.strip().splitlines()[-1])


def slope(sizes: list[float], peaks: list[float]) -> float:
    """Least-squares growth of the peak per unit of size.

    >>> slope([1, 2, 3], [5.0, 7.0, 9.0])
    2.0
    """
    x, y = sum(sizes) / len(sizes), sum(peaks) / len(peaks)
    return sum((a - x) * (b - y) for a, b in zip(sizes, peaks, strict=True)) / sum((a - x) ** 2 for a in sizes)


def main(target: str, arguments: str, device: str) -> None:
    module, function = target.split(":")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    warm_up, work = getattr(importlib.import_module(module), function)(**json.loads(arguments))
    warm_up()
    with PeakMemory(torch.device(device)) as memory:
        work()
    print(memory.mib)


if __name__ == "__main__":
    main(*sys.argv[1:])
