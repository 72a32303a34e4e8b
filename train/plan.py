"""Plan a training before buying the machine: parameters, operations, memory by part, days, and the layout to start it with.

kling-plan configs/dit/14b.yaml gpus=64 memory=80 tflops=800 mfu=0.4 clips=50000000
kling-plan configs/dit/world.yaml gpus=1 memory=16                    # tflops left out: measured on this machine
"""

from __future__ import annotations

import math
import random
import sys
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from kling.condition.tasks import TASKS, keyframe_share
from kling.config import load_config, read_preset
from kling.dit import KlingTransformer3DModel
from kling.dit.cost import forward_flops
from kling.dit.memory import StepMemory, step_memory
from kling.errors import UserError, program, unknown
from kling.runtime.precision import bf16_is_fast, default_device
from kling.shapes import latent_frames, latent_size, token_grid
from kling.text import ByteTextEncoder
from kling.training.meter import matmul_ceiling
from kling.training.model import CHECKPOINTING, set_checkpointing
from kling.training.optim import MOMENTS

GIB = 2**30
RESERVE = 0.9  # of a GPU's memory; the rest is for its context, communication and fragments


@dataclass
class PlanConfig:
    """What it is planned for.

    gpus, node: how many in all and in one machine. memory: GiB of each. tflops: what a GPU reaches on matrix products, 0 measures this one.
    mfu: the part of it that training is assumed to reach. clips: how many the run trains on, with repetition.
    height, width: pixels of a clip; the preset's longest length is planned for.
    """

    gpus: int = 8
    node: int = 8
    memory: float = 80.0
    tflops: float = 0.0
    mfu: float = 0.4
    clips: int = 10_000_000
    height: int = 480
    width: int = 832
    spatial_factor: int = 8
    bf16: bool = True


@dataclass(frozen=True)
class Part:
    """Bytes on each GPU."""

    weights: float
    gradients: float
    optimizer: float
    average: float
    activations: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.average + self.activations


def on_each_gpu(step: StepMemory, clips: int, shards: int, split: int, moments: int = 2) -> Part:
    """One GPU's memory when the state is cut over `shards` and the sequence over `split`, with `clips` of its own at a time.

    Weights, gradients, the optimizer's moments and the average are fp32. A sharded run also holds two whole blocks while it computes. A
    validation keeps the weights beside the averages that it uses: in the place of the gradients, which are gone by then.
    """
    state = 4 * step.parameters / shards
    gathered = 2 * 4 * step.block if shards > 1 else 0
    return Part(state + gathered, state, moments * state, state, step.beyond(state, clips / split))


def on_the_host(step: StepMemory, shards: int, moments: int = 2) -> tuple[int, int]:
    """Bytes of one process's host memory: while a checkpoint of weights, average and moments is written in the background, and, in the main
    process alone, of the export: averaged weights in fp32, and their copy in bf16."""
    return (2 + moments) * 4 * step.parameters // shards, (4 + 2) * step.parameters


@program
def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        raise UserError("usage: kling-plan configs/dit/PRESET.yaml [gpus=64 memory=80 tflops=800 mfu=0.4 clips=N height=480 width=832]")
    preset = read_preset(argv[0])
    if "model" not in preset or "frames" not in preset:
        raise UserError(f"preset '{argv[0]}' has no model and frames: give one that says its sizes, such as configs/dit/1.3b.yaml")
    plan = load_config(PlanConfig, None, argv[1:])
    if plan.gpus < 1 or plan.memory <= 0 or not 0 < plan.mfu <= 1:
        raise UserError(f"gpus {plan.gpus}, memory {plan.memory}, mfu {plan.mfu}: give positive numbers, and an mfu of at most 1")
    for line in report(preset, plan):
        print(line)


def report(preset: dict[str, Any], plan: PlanConfig) -> list[str]:
    """The lines of a plan."""
    if (optimizer := preset.get("optimizer", "adamw")) not in MOMENTS:
        raise unknown("optimizer", optimizer, MOMENTS)
    with torch.device("meta"):
        text = ByteTextEncoder(**preset.get("text", {}))
        model = {"text_dim": text.config.out_dim, **preset["model"]}
        config = {**KlingTransformer3DModel(**{**model, "num_layers": 1}).config, "num_layers": model.get("num_layers", 40)}
    patch, frames, l = tuple(config["patch_size"]), max(preset["frames"]), text.num_tokens
    h, w = latent_size(plan.height, plan.width, plan.spatial_factor, patch[1])
    latents = (1, config["in_channels"], latent_frames(frames), h, w)
    tokens = math.prod(token_grid(*latents[2:], patch))
    flops = 3 * forward_flops(config, tokens, l)
    tasks = preset.get("tasks", {"text": 1.0})
    held = (*latents[:2], latents[2] + (keyframe_share(tasks) > 0 and frames > 1), h, w)  # the largest that a batch is
    runs = level_runs(tasks, token_grid(*held[2:], patch))
    steps = {what: step_memory(model, held, l, partial(set_checkpointing, what=what), plan.bf16, runs) for what in CHECKPOINTING}
    some = steps["none"]
    each = partial(on_each_gpu, moments=MOMENTS[optimizer])

    dtype = torch.bfloat16 if plan.bf16 and bf16_is_fast(default_device()) else torch.float32
    ceiling = plan.tflops * 1e12 or matmul_ceiling(torch.device(default_device()), dtype)
    rate = ceiling * plan.mfu * plan.gpus / flops  # clips a second
    size = f"{plan.width}x{plan.height}"
    speed = f"{rate:.3g} clips/s, {rate * tokens:.4g} tokens/s"
    lines = [
        f"model          {some.parameters / 1e9:.3f} B parameters, {some.block / 1e6:.1f} M in each of {config['num_layers']} blocks",
        f"clip           {frames} frames of {size}: latents {tuple(latents[1:])}, {tokens} tokens, {l} of text",
        f"operations     {flops / 1e12:.3g} TFLOP a clip and update",
        f"speed          {speed}, on {plan.gpus} x {ceiling / 1e12:.3g} TFLOP/s at MFU {plan.mfu:.2f}",
        f"time           {plan.clips} clips in {plan.clips / rate / 86400:.3g} days",
        "",
        f"{'memory of each GPU in GiB, one clip at a time':<54}weights gradients optimizer   average activations   total",
    ]
    best = None
    for name, shards, split, what in layouts(plan.gpus, plan.node):
        part = each(steps[what], 1, shards, split)
        fits = part.total < RESERVE * plan.memory * GIB
        values = [getattr(part, field) / GIB for field in ("weights", "gradients", "optimizer", "average", "activations", "total")]
        row = "".join(f"{value:>10.2f}" for value in values)
        lines.append(f"  {name:<20} {what:<12} {'fits' if fits else 'too large':<15}" + row)
        if fits and best is None:
            best = name, shards, split, what, part
    if best is None:
        least = each(steps["full"], 1, plan.gpus, min(8, plan.gpus, plan.node)).total / GIB
        return [*lines, "", f"nothing fits: the smallest layout needs {least:.3g} GiB; take more GPUs, or shorter or smaller clips"]
    saving, export = on_the_host(some, best[1], MOMENTS[optimizer])
    host = f"host memory    {saving / GIB:.3g} GiB a process to save in the background, {export / GIB:.3g} GiB in the main one to export"
    return [*lines, "", host, *advice(*best, plan, preset.get("compile", False))]


def level_runs(tasks: dict[str, float], grid: tuple[int, int, int]) -> int:
    """Runs of equal noise levels in a clip's tokens, (f, h, w): all tokens where a task gives parts of frames, f where it gives frames."""
    drawn = [TASKS[name][1](random.Random(0), max(2, grid[0]), 4, 4) for name, weight in tasks.items() if weight > 0]
    if any(given.space is not None for given in drawn):
        return math.prod(grid)
    return grid[0] if any(given.known or given.keyframes for given in drawn) else 1


def layouts(gpus: int, node: int) -> list[tuple[str, int, int, str]]:
    """(name, shards, split, checkpointing) from the fastest to the smallest: whole weights first, then cut, then the sequence cut too."""
    found = [("ddp", 1, 1)] if gpus > 1 else [("one GPU", 1, 1)]
    if gpus > node:
        found.append(("hsdp", node, 1))
    if gpus > 1:
        found.append(("fsdp2", gpus, 1))
    found += [("fsdp2_cp", gpus, split) for split in (2, 4, 8) if split <= min(gpus, node)]
    return [
        (name if split == 1 else f"{name} cp_size={split}", shards, split, what) for name, shards, split in found for what in CHECKPOINTING
    ]


def advice(name: str, shards: int, split: int, what: str, part: Part, plan: PlanConfig, compiled: bool) -> list[str]:
    """The first layout that fits, and the largest batch in it."""
    room = RESERVE * plan.memory * GIB - (part.total - part.activations)
    clips = max(1, int(room // max(1.0, part.activations)))
    preset = {"one GPU": "cpu" if not torch.cuda.is_available() else "ddp"}.get(name, name.split()[0])
    options = f"activation_checkpointing={what} batch={clips}" + (" compile=false" if compiled and what == "selective" else "")
    return [
        f"recommended    {name}, {options}: {clips * plan.gpus // split} clips a micro-step",
        f"               accelerate launch --config_file configs/accelerate/{preset}.yaml train/train_dit.py PRESET {options}",
    ]


if __name__ == "__main__":
    main()
