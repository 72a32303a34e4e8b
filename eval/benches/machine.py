"""The machine of a benchmark: one pinned core, its peak rates, and everything needed to repeat the run."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.nn.functional as F

from kling.errors import UserError
from kling.runtime.precision import bf16_is_fast
from kling.runtime.versions import versions

PACKAGES = ("torch", "diffusers", "av", "decord", "torchcodec", "numpy", "opencv-python-headless", "accelerate")
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def pin(core: int | None, threads: int) -> int | None:
    """With one thread, stay on one core (by default the last that this process may use); else use `threads` on any cores.

    Returns the core. Raises `UserError` if this process may not use it.
    """
    torch.set_num_threads(threads)
    if threads > 1 or not hasattr(os, "sched_setaffinity"):
        return None
    allowed = os.sched_getaffinity(0)
    core = max(allowed) if core is None else core
    try:
        os.sched_setaffinity(0, {core})
    except OSError:
        raise UserError(f"--core {core}: this process may use {', '.join(map(str, sorted(allowed)))}") from None
    return core


def cpu_flags() -> list[str]:
    """Those of `FLAGS` that this CPU has; empty if the system does not report them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
    found = next((line.split(":")[1].split() for line in lines if line.startswith("flags")), [])
    return [flag for flag in FLAGS if flag in found]


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def commit() -> str:
    """The commit of these sources, with a + if files have changed since; "unknown" outside a checkout."""
    here = Path(__file__).resolve().parent
    try:
        run = [["git", "-C", str(here), *what] for what in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "-uno"])]
        head, changed = (subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() for command in run)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if changed else "")


def describe(device: torch.device, core: int | None, seed: int) -> dict[str, Any]:
    """Versions, hardware and load, for the report."""
    found = {
        "cpu": cpu_name(),
        "flags": cpu_flags(),
        "cores": os.cpu_count(),
        "core": core,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "memory GiB": round(psutil.virtual_memory().total / 2**30, 1),
        "python": platform.python_version(),
        "versions": versions(*PACKAGES),
        "commit": commit(),
        "seed": seed,
        "time": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()) + " UTC",
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        clock = torch.cuda.clock_rate(device) if _has_nvml() else None
        found |= {
            "gpu": properties.name,
            "gpu GiB": round(properties.total_memory / 2**30, 1),
            "gpu MHz": clock,
            "cuda": torch.version.cuda,
        }
    return found


def _has_nvml() -> bool:
    return versions("nvidia-ml-py")["nvidia-ml-py"] != "absent"


def ceilings(device: torch.device, quick: bool = False) -> dict[str, float]:
    """The peak rates of this device at this moment: FLOP/s of matrix products and attention by dtype and head width, bytes/s of a copy.

    The names are "matmul fp32", "sdpa bf16 d=128" and so on; "copy" counts both bytes read and bytes written.
    """
    cuda = device.type == "cuda"
    seconds = 0.2 if quick else 0.6
    found = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        slow = dtype == torch.bfloat16 and not bf16_is_fast(device.type)  # emulated, up to fifty times slower
        n = 8192 if cuda else 256 if slow else 1024
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        found[f"matmul {name}"] = 2 * n**3 / fastest(lambda a=a, b=b: a @ b, device, seconds)
        for width in (64, 128):
            heads, tokens = (24, 8192) if cuda else (1, 256) if slow else (4, 1024)
            q = torch.randn(1, heads, tokens, width, device=device).to(dtype)
            run = lambda q=q: F.scaled_dot_product_attention(q, q, q)  # noqa: E731
            found[f"sdpa {name} d={width}"] = 4 * heads * tokens**2 * width / fastest(run, device, seconds)
    x = torch.randn(2**28 if cuda else 2**24, device=device)
    y = torch.empty_like(x)
    found["copy"] = 2 * 4 * x.numel() / fastest(lambda: y.copy_(x), device, seconds)
    return found


def fastest(run: Callable[[], object], device: torch.device, seconds: float) -> float:
    """The shortest time of a run, tried for about `seconds`. For one thread it is processor time, which other processes do not affect."""
    run()
    best, end = float("inf"), time.monotonic() + seconds
    while time.monotonic() < end or best == float("inf"):
        spent = clock(run, device)
        best = min(best, spent.wall if device.type == "cuda" or torch.get_num_threads() > 1 else spent.cpu)
    return best


class Seconds:
    """Seconds of the wall clock, and of the processor (all threads of this process)."""

    __slots__ = ("wall", "cpu")

    def __init__(self, wall: float, cpu: float) -> None:
        self.wall, self.cpu = wall, cpu


def clock(run: Callable[[], object], device: torch.device, repeat: int = 1) -> Seconds:
    """The time of one of `repeat` runs. On a GPU the wall time is that between two events in its queue."""
    if device.type != "cuda":
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(repeat):
            run()
        return Seconds((time.perf_counter() - wall) / repeat, (time.process_time() - cpu) / repeat)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    cpu = time.process_time()
    begin.record()
    for _ in range(repeat):
        run()
    end.record()
    torch.cuda.synchronize(device)
    return Seconds(begin.elapsed_time(end) / 1000 / repeat, (time.process_time() - cpu) / repeat)
