"""The VAE against diffusers' Wan VAE with the same weights: encode and decode, with Wan 2.1's architecture at several widths.

Both get whole clips, which ours processes in chunks. On the CPU pictures of 128x128; on CUDA 480p in bf16.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKLWan
from kling_programs.eval.benches.measure import NAMES, Bench, Check, Row, poison
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from kling.runtime.precision import bf16_is_fast
from kling.vae import AutoencoderKLKling

CHECKED = 5  # frames of the clip that is compared with fp64
HALVES = ("encode", "decode")


@dataclass(frozen=True)
class Case:
    """Encoder and decoder of a VAE of width `base` on pictures of `height` x `width`, with the minimum ratio for each."""

    base: int
    dtype: torch.dtype
    goals: dict[str, float]
    height: int = 128
    width: int = 128
    frames: tuple[int, ...] = (17,)


def cases(bench: Bench) -> Iterator[Case]:
    fp32, bf16 = torch.float32, torch.bfloat16
    if bench.device.type == "cuda":
        yield Case(96, bf16, {"decode": 1.6}, 480, 832, (17, 81) if bench.quick else (17, 81, 161))
        return
    yield Case(16, fp32, {"decode": 6.0}, frames=(9,) if bench.quick else (5, 17, 33, 65))
    yield Case(32, fp32, {"decode": 1.7, "encode": 1.5}, frames=(9,) if bench.quick else (17,))
    if not bench.quick:
        yield Case(96, fp32, {"decode": 1.15}, 96, 96)
        for base, goals in ((32, {"decode": 3.0, "encode": 2.5}), (64, {"decode": 3.0}), (96, {"decode": 2.2})):
            yield Case(base, bf16, goals)


def rows(bench: Bench) -> Iterator[Row]:
    aa = True
    for case in cases(bench):
        name = f"base {case.base} {case.width}x{case.height}"
        if case.dtype == torch.bfloat16 and not bf16_is_fast(bench.device.type):
            yield {"case": name, "dtype": "bf16", "verdict": "not run: bf16 products are not faster than fp32 here"}
            continue
        pair = Pair(case, bench)
        for half in HALVES:
            if half not in case.goals:
                continue
            check = pair.check(half)
            for frames in case.frames:
                ours, peer = pair.runs(half, frames)
                if aa:
                    yield bench.same(f"{name} {half} {frames} frames", ours)
                    aa = False
                row = bench.compare(
                    f"{name} {half} {frames} frames",
                    ours,
                    peer,
                    check=check,
                    dtype=case.dtype,
                    flops=flops(case.base, half, frames, case.height, case.width),
                    goal=case.goals[half],
                )
                yield row | {"axis": "frames", "size": frames, "line": f"{name} {NAMES[case.dtype]} {half}"}


def config(base: int, blocks: int = 2) -> dict:
    """Wan 2.1's architecture at another width."""
    return {"base_dim": base, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": blocks}


class Pair:
    """Ours and diffusers' with one set of random weights."""

    def __init__(self, case: Case, bench: Bench) -> None:
        torch.manual_seed(bench.seed)
        self.case, self.device, self.random = case, bench.device, bench.generator()
        peer = AutoencoderKLWan(**config(case.base)).eval()
        ours = AutoencoderKLKling(**config(case.base)).eval()
        ours.load_state_dict(peer.state_dict())
        self.ours, self.peer = (model.to(bench.device, case.dtype) for model in (ours, peer))

    def input(self, half: str, frames: int, height: int, width: int) -> Tensor:
        """A clip, or latents of one: (1, 3, T, H, W) or (1, 16, f, h, w)."""
        x = torch.randn(shape(half, frames, height, width), generator=self.random)
        return (x.clamp(-1, 1) if half == "encode" else x).to(self.device, self.case.dtype)

    def runs(self, half: str, frames: int) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
        x = self.input(half, frames, self.case.height, self.case.width)
        return tuple(functools.partial(result, model, half, x) for model in (self.ours, self.peer))

    def check(self, half: str) -> Check:
        """Uses a shorter clip of half the size, because fp64 is slow."""
        x = self.input(half, CHECKED, self.case.height // 2 // 8 * 8, self.case.width // 2 // 8 * 8)
        exact = result(AutoencoderKLWan(**config(self.case.base)).eval().to(self.device, torch.float64), half, x.double(), self.peer)
        poison(exact.to(x.dtype))
        return Check(result(self.ours, half, x), result(self.peer, half, x), exact)


def shape(half: str, frames: int, height: int, width: int) -> tuple[int, ...]:
    return (1, 3, frames, height, width) if half == "encode" else (1, 16, 1 + frames // 4, height // 8, width // 8)


@torch.no_grad()
def result(model: torch.nn.Module, half: str, x: Tensor, weights: torch.nn.Module | None = None) -> Tensor:
    """Moments from pixels, or pixels from latents. weights: another model, whose weights are loaded first."""
    if weights is not None:
        model.load_state_dict(weights.state_dict())
    return model.encode(x).latent_dist.parameters if half == "encode" else model.decode(x).sample


@functools.cache
def flops(base: int, half: str, frames: int, height: int, width: int) -> float:
    """Operations of diffusers' pass, counted by torch on tensors without memory; both are credited with these."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        result(AutoencoderKLWan(**config(base)).eval(), half, torch.empty(shape(half, frames, height, width)))
    return counter.get_total_flops()
