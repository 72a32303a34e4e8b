"""Attention: its share of a forward pass."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from kling_programs.eval.benches.dit import SMALL, Pair
from kling_programs.eval.benches.measure import Bench, Row
from torch.profiler import ProfilerActivity, profile


def rows(bench: Bench) -> Iterator[Row]:
    """Seconds inside the attention kernel as a part of the forward pass, by the profiler, beside its share of the operations."""
    dtype = torch.bfloat16 if bench.device.type == "cuda" else torch.float32
    pair = Pair(SMALL, dtype, bench.device, bench.seed)
    cuda = bench.device.type == "cuda"
    for tokens in (256, 1024) if bench.quick else (1024, 4096, 16384) if cuda else (1024, 4096):
        run = pair.runs("forward", tokens)[0]
        run()
        with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as trace:
            run()
        events = trace.key_averages()
        spent = [(event.key, event.self_device_time_total if cuda else event.self_cpu_time_total) for event in events]
        inside = sum(t for name, t in spent if any(word in name for word in ("flash", "fmha", "attention")))
        whole, linear = pair.flops(tokens), pair.flops(tokens) - SMALL.layers * 4 * tokens**2 * SMALL.heads * SMALL.head_dim
        share = 100 * inside / sum(t for _, t in spent)
        yield {"case": f"share of attention, {tokens} tokens", "% of time": share, "% of operations": 100 * (1 - linear / whole)}
