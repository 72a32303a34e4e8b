"""The cost of a sampling step outside the network, the time saved and accuracy lost by steps that reuse work, and the speed of mode fast.

The network is a stub that returns fixed velocities, so only guidance, the solver and the bookkeeping of levels are timed. The peer is the
body of `WanPipeline`'s loop: its guidance and its schedulers. Caches are timed on the shipped model, against the full run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import SimpleNamespace

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SchedulerMixin, UniPCMultistepScheduler
from kling_programs.eval.benches.measure import Bench, Check, Row
from torch import Tensor

from kling.condition.state import Given, build_state
from kling.data.transforms import to_tensor
from kling.flow.solvers import KlingFlowScheduler
from kling.metrics.pixel import psnr
from kling.sampling.machine import Machine, set_up
from kling.sampling.pipeline import KlingPipeline
from kling.sampling.plan import Plan
from kling.sampling.request import Request
from kling.sampling.sampler import Sampler, Signals

STEPS, GUIDANCE, SHIFT = 20, 4.0, 3.0
LATENTS = {"2k": (1, 8, 4, 8), "344k": (16, 21, 32, 32), "1.2M": (16, 21, 60, 60)}  # (c, f, h, w)
GOALS = {"euler": 2.5, "unipc": 6.0}  # ms per step at 1.2M latents
FAST = {"without a camera": ({}, 4.5), "with a camera": ({"camera": "pan=5"}, 6.0)}  # of a 5 s clip: fields, and the speed over std
UNIPC = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "num_train_timesteps": 1000, "flow_shift": SHIFT}
CACHES = {
    "first-block=0.1": {"cache": "first-block=0.1"},
    "first-block=0.2": {"cache": "first-block=0.2"},
    "taylorseer=3": {"cache": "taylorseer=3"},
    "guidance every 2nd step": {"guidance_every": 2},
    "guidance at 0.2:0.95": {"guidance_interval": (0.2, 0.95)},
}


def rows(bench: Bench) -> Iterator[Row]:
    for size, shape in LATENTS.items():
        for solver in GOALS:
            yield from overhead(bench, size, shape, solver)
    yield from fast(bench)
    yield from caches(bench)


def overhead(bench: Bench, size: str, shape: tuple[int, ...], solver: str) -> Iterator[Row]:
    """Milliseconds per step, sampling with `STEPS` steps."""
    generator = bench.generator()
    noise, *fixed = (torch.randn(1, *shape, generator=generator).to(bench.device) for _ in range(3))
    fixed = dict(zip(("prompt", "negative"), fixed, strict=True))
    moving = {which: lambda z, u=u: torch.tanh(z) + u.to(z.dtype) for which, u in fixed.items()}
    buffers = {which: torch.empty_like(u) for which, u in fixed.items()}
    still = {which: lambda z, which=which: buffers[which].copy_(fixed[which]) for which in fixed}
    stub = bench.times(lambda: [velocity(noise) for velocity in still.values()])
    check = Check(our_walk(solver, moving, noise), peer_walk(solver, moving, noise), exact_walk(solver, moving, noise.double()))
    ours, peer = (lambda walk=walk: walk(solver, still, noise) for walk in (our_walk, peer_walk))
    case = f"{solver}, {size} latents, {STEPS} steps"
    if size == "344k" and solver == "euler":  # smaller ones are too short to time reliably
        yield bench.same(case, ours)
    row = bench.compare(case, ours, peer, name="WanPipeline's loop", check=check)
    if "wrong" in row:
        yield row
        return
    each = {f"{who} ms a step": row[f"{who} ms"] / STEPS - 1e3 * stub for who in ("ours", "peer")}  # without the stub's own time
    goal = bench.judge(each["ours ms a step"], GOALS[solver] if size == "1.2M" else None, at_most=True)
    yield row | each | {"axis": "latents", "size": math.prod(shape), "line": solver} | goal


Velocities = dict[str, Callable[[Tensor], Tensor]]  # of each text, as functions of z


class Stub:
    """The parts of a transformer that the sampler uses."""

    blocks, is_cache_enabled, dtype = (), False, torch.float32

    def __init__(self, velocities: Velocities) -> None:
        self.velocities = velocities

    def _reset_stateful_cache(self) -> None:
        pass

    def cache_context(self, name: str) -> nullcontext:
        return nullcontext()

    def __call__(self, z: Tensor, sigma: Tensor, text: Tensor, **_: object) -> SimpleNamespace:
        return SimpleNamespace(sample=self.velocities["prompt" if bool(text[0, 0, 0]) else "negative"](z))


def schedulers(solver: str) -> tuple[SchedulerMixin, SchedulerMixin]:
    """Ours and the peer's."""
    if solver == "euler":
        return KlingFlowScheduler(shift=SHIFT), FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    return UniPCMultistepScheduler(**UNIPC), UniPCMultistepScheduler(**UNIPC)


@torch.no_grad()
def our_walk(solver: str, velocities: Velocities, noise: Tensor) -> Tensor:
    state = build_state([Given()], torch.zeros_like(noise), None)
    walks = "euler" if solver == "euler" else UniPCMultistepScheduler.__name__
    plan = Plan("text", [], 0, 0, 8.0, STEPS, walks, GUIDANCE, GUIDANCE, 1.0, SHIFT, 0)
    text = {"prompt": noise.new_ones(1, 1, 1), "negative": noise.new_zeros(1, 1, 1)}
    for step in Sampler([Stub(velocities)], None, schedulers(solver)[0], plan)(state, Signals(text), noise):
        z = step.z
    return state.finish(z)


@torch.no_grad()
def peer_walk(solver: str, velocities: Velocities, noise: Tensor) -> Tensor:
    """`WanPipeline.__call__` without its network."""
    scheduler, latents = schedulers(solver)[1], noise
    if solver == "euler":  # with the same levels as ours
        scheduler.set_timesteps(sigmas=torch.linspace(1, 0, STEPS + 1, dtype=torch.float64)[:-1].tolist(), device=noise.device)
    else:
        scheduler.set_timesteps(STEPS, device=noise.device)
    for t in scheduler.timesteps:
        z = latents.to(torch.float32)
        t.expand(latents.shape[0])
        prompt, negative = velocities["prompt"](z), velocities["negative"](z)
        v = negative + GUIDANCE * (prompt - negative)
        latents = scheduler.step(v, t, latents, return_dict=False)[0]
    return latents


def exact_walk(solver: str, velocities: Velocities, noise: Tensor) -> Tensor:
    """The peer in fp64. Its Euler step casts to fp32, so that step is written out here."""
    if solver == "unipc":
        scheduler, z = schedulers(solver)[1], noise
        scheduler.set_timesteps(STEPS, device=noise.device)
        for t in scheduler.timesteps:
            prompt, negative = velocities["prompt"](z), velocities["negative"](z)
            z = scheduler.step(negative + GUIDANCE * (prompt - negative), t, z, return_dict=False)[0]
        return z
    s = torch.linspace(1, 0, STEPS + 1, dtype=torch.float64)
    sigmas, z = (SHIFT * s / (1 + (SHIFT - 1) * s)).tolist(), noise
    for i in range(STEPS):
        prompt, negative = velocities["prompt"](z), velocities["negative"](z)
        z = z - (sigmas[i] - sigmas[i + 1]) * (negative + GUIDANCE * (prompt - negative))
    return z


def caches(bench: Bench) -> Iterator[Row]:
    """Time of the full run relative to that with a cache, and the difference of the frames."""
    request = {"prompt": "a red ball rolls left on grass", "num_frames": 17, "seed": 1}
    full = KlingPipeline.from_pretrained().to(bench.device)
    whole = run_of(full, Request(**request))
    frames = to_tensor(torch.from_numpy(whole().frames[0]))[None]  # (1, 3, T, H, W)
    for name, how in list(CACHES.items())[:: 4 if bench.quick else 1]:
        pipe = KlingPipeline.from_pretrained()
        machine = Machine(cache=how.get("cache"))
        set_up(pipe, machine, bench.device, pipe.setting("num_inference_steps"))
        run = run_of(pipe, Request(**request, **{key: value for key, value in how.items() if key != "cache"}))
        made = to_tensor(torch.from_numpy(run().frames[0]))[None]
        row = bench.compare(f"shipped model, {name}", run, whole, name="the full run")
        yield row | {"PSNR dB": float(psnr(made, frames).mean())}


def fast(bench: Bench) -> Iterator[Row]:
    """Time of a 5 s clip in mode std relative to mode fast, decoding included."""
    pipe = KlingPipeline.from_pretrained().to(bench.device)
    pipe.set_progress_bar_config(disable=True)
    for name, (fields, goal) in FAST.items():
        request = Request("a red ball rolls left on grass", duration=5.0, seed=1, **fields)
        quick, std = run_of(pipe, request.replace(mode="fast")), run_of(pipe, request)
        yield bench.compare(f"shipped model, fast, {name}", quick, std, name="std", goal=goal)


def run_of(pipe: KlingPipeline, request: Request) -> Callable[[], object]:
    return lambda: pipe(request)
