"""Which number type to compute in, decided by measurement: the speed of one matrix product in float32 and in bfloat16.

Processor flags are no guide: CPUs with `avx512_bf16` and no AMX multiply bfloat16 up to seven times as fast as float32, and a CPU without
such units is some hundred times slower in bfloat16.
"""

from __future__ import annotations

import time
from functools import cache
from typing import NamedTuple

import torch

from kling.errors import UserError, unknown

PRECISIONS = ("auto", "bf16", "fp16", "fp32")
GAIN = 1.3  # bfloat16 is chosen if its product is at least this many times as fast
PRODUCT = (1024, 256, 768)  # (tokens, width, hidden width) of a small model's feed-forward
PRODUCT_CUDA = (8192, 2048, 8192)
SECONDS = 0.05  # spent on each type


class Speeds(NamedTuple):
    """FLOP/s of a matrix product."""

    fp32: float
    bf16: float


@cache
def speeds(device_type: str) -> Speeds:
    """Speed of a product of a small model's size in both types on "cpu" or "cuda", measured once per process (about 0.1 s)."""
    return Speeds(*(_product(torch.device(device_type), dtype) for dtype in (torch.float32, torch.bfloat16)))


def bf16_is_fast(device_type: str) -> bool:
    """Whether bfloat16 products are at least `GAIN` times as fast as float32 ones on this device."""
    measured = speeds(device_type)
    return measured.bf16 >= GAIN * measured.fp32


def pick_precision(name: str = "auto", device_type: str | None = None) -> str:
    """The precision to compute in: bf16, fp16 or fp32. `auto` is bf16 where `bf16_is_fast`, else fp32.

    Raises `UserError` for an unknown name, or fp16 without a CUDA device.
    """
    if name not in PRECISIONS:
        raise unknown("mixed_precision", name, PRECISIONS)
    if name == "fp16" and not torch.cuda.is_available():
        raise UserError("mixed_precision 'fp16' needs a CUDA device: use fp32, bf16 or auto")
    if name != "auto":
        return name
    return "bf16" if bf16_is_fast(device_type or default_device()) else "fp32"


def describe(precision: str, device_type: str | None = None) -> str:
    """The line that every program prints first, such as "precision bf16 (450 against 98 GFLOP/s)": bfloat16 against float32."""
    measured = speeds(device_type or default_device())
    return f"precision {precision} ({measured.bf16 / 1e9:.0f} against {measured.fp32 / 1e9:.0f} GFLOP/s)"


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _product(device: torch.device, dtype: torch.dtype) -> float:
    rows, inner, columns = PRODUCT_CUDA if device.type == "cuda" else PRODUCT
    a = torch.ones(rows, inner, device=device, dtype=dtype)
    b = torch.ones(inner, columns, device=device, dtype=dtype)

    def seconds() -> float:
        if device.type != "cuda":  # processor time, not wall time: the load of other processes must not decide
            started = time.process_time()
            a @ b
            return (time.process_time() - started) / torch.get_num_threads()
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        a @ b
        torch.cuda.synchronize(device)
        return time.perf_counter() - started

    first = seconds()  # includes the kernel's set-up; if it alone takes longer than the budget, it is enough
    best, spent = first, first
    while spent < SECONDS:
        best = min(best, took := seconds())
        spent += max(took, 1e-6)
    return 2 * rows * inner * columns / best
