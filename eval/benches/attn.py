"""Attention: its share of a pass, and clips of many lengths packed in one row against padding to the longest.

The padded peer is the obvious implementation: `scaled_dot_product_attention` over the batch with a mask of the valid tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from kling_programs.eval.benches.dit import SMALL, Pair
from kling_programs.eval.benches.measure import Bench, Check, Row, poison
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from kling.nn.packing import Packing, attend_packed

ALIKE = (256, 256, 512, 1024, 1024, 1024)  # 4096 tokens: pictures, short clips and long ones
PRESET = (
    108,
    108,
    108,
    540,
    1188,
    2268,
)  # pictures and clips of 17, 41 and 81 frames, as in the large presets, with 108 tokens per latent frame
GOALS = {"forward": 1.9, "forward + backward": 1.7}


def rows(bench: Bench) -> Iterator[Row]:
    yield from against_padding(bench, ALIKE, GOALS)
    if not bench.quick:
        yield from against_padding(bench, PRESET, dict.fromkeys(GOALS))
    yield from shares(bench)


def against_padding(bench: Bench, lengths: tuple[int, ...], goals: dict[str, float | None]) -> Iterator[Row]:
    packing = Packing(tuple((1, n) for n in lengths))
    heads, width = (24, 128) if bench.device.type == "cuda" else (6, 64)
    dtype = torch.bfloat16 if bench.device.type == "cuda" else torch.float32
    flops = sum(4 * n * n * heads * width for n in lengths)
    for what, goal in goals.items():
        backward = what != "forward"
        q, k, v, g = (torch.randn(1, sum(lengths), heads, width, device=bench.device).to(dtype) for _ in range(4))
        ours, peer = Attending(packed, q, k, v, g, packing, backward), Attending(padded, q, k, v, g, packing, backward)
        exact = Attending(padded, *(x.double() for x in (q, k, v, g)), packing, backward)
        found = []
        for run in (ours, peer, exact):
            poison(q)
            found.append(run.result())
        if not backward and lengths is ALIKE:
            yield bench.same(what, ours)
        useful = flops * (3.5 if backward else 1)  # a backward pass has five products where a forward has two
        case = f"packed, {sum(lengths)} tokens in {len(lengths)} of at most {max(lengths)}, {what}"
        row = bench.compare(
            case, ours, peer, name="padded to the longest, masked",
            check=Check(*found), dtype=dtype, flops=useful, goal=goal,
        )  # fmt: skip
        yield row


class Attending:
    """One implementation of attention, optionally with the gradients of its inputs."""

    def __init__(self, how: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, g: Tensor, packing: Packing, backward: bool) -> None:
        self.how, self.packing, self.backward, self.upstream = how, packing, backward, g.flatten(2)
        self.inputs = [x.clone().requires_grad_(backward) for x in (q, k, v)]

    def __call__(self) -> Tensor:
        for x in self.inputs:
            x.grad = None
        out = self.how(*self.inputs, self.packing)
        if self.backward:
            out.backward(self.upstream)
        return out

    def result(self) -> Tensor:
        """The output, and the gradients if requested."""
        out = self().detach()
        return torch.cat([out.flatten(), *(x.grad.flatten() for x in self.inputs)]) if self.backward else out


def packed(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    """(1, N, heads, head_dim) -> (1, N, d)"""
    return attend_packed(q, k, v, sdpa, packing, packing)


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask).transpose(1, 2).flatten(2)


def padded(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    """The same with a batch padded to the longest; (1, N, heads, head_dim) -> (1, N, d)."""
    lengths = packing.lengths
    rows = [torch.nn.utils.rnn.pad_sequence(x[0].split(lengths), batch_first=True) for x in (q, k, v)]  # (b, longest, heads, head_dim)
    real = torch.arange(max(lengths), device=q.device)[None] < torch.tensor(lengths, device=q.device)[:, None]  # (b, longest)
    out = sdpa(*rows, mask=real[:, None, None])
    return out[real][None]


def shares(bench: Bench) -> Iterator[Row]:
    """Seconds in the attention kernel as a share of the forward pass, by the profiler, and its share of the operations."""
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
