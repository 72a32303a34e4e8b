"""Plan a training before buying the machine: parameters, operations, memory by part, days, and the command that starts it.

kling-plan configs/dit/14b.yaml gpus=64 memory=80 tflops=800 mfu=0.4 clips=50000000
kling-plan configs/dit/1.3b.yaml method=align tflops=800              # what kling-align holds beside the weights; distill and dmd likewise
kling-plan configs/dit/1.3b.yaml method=dmd lora.rank=256 gpus=1      # low-rank weights on frozen ones
kling-plan configs/dit/world.yaml gpus=1 memory=16                    # without tflops: this machine is measured, and the report says so
"""

from __future__ import annotations

import json
import math
import random
import shlex
import sys
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from kling_programs.train.command import helped
from kling_programs.train.train_dit import TrainDiTConfig

from kling.cache.plan import CacheConfig
from kling.condition.state import MOST_REFERENCES
from kling.condition.tasks import TASKS, keyframe_share
from kling.config import PRESETS, built, find_config, load_config, read_preset
from kling.dit import KlingTransformer3DModel
from kling.dit.cost import forward_flops
from kling.dit.memory import StepMemory, step_memory
from kling.errors import UserError, program, unknown
from kling.runtime.precision import default_device, describe, pick_precision
from kling.shapes import aspect_size, latent_frames, latent_size, token_grid
from kling.text import ByteTextEncoder
from kling.training.lora import Lora, add_lora
from kling.training.meter import matmul_ceiling
from kling.training.model import CHECKPOINTING, Trained, set_checkpointing
from kling.training.optim import MOMENTS

GIB = 2**30
LARGEST = 256  # largest recommended number of clips in a GPU's batch, even if more fit: larger updates rarely help
RESERVE = 0.9  # usable share of a GPU's memory; the rest is for its context, communication and fragmentation


@dataclass(frozen=True)
class Method:
    """What a program holds beside the weights in training, and costs. passes: forward passes of an update; a gradient is worth two.

    teachers: frozen networks. critics: networks trained in turn with the first, so that there is one set of gradients. copies: of what is
    trained. All are sharded like the weights; of copies, the first is written into checkpoints.
    """

    passes: int
    teachers: int = 0
    critics: int = 0
    copies: int = 0


METHODS = {
    "train": Method(3),
    "distill": Method(7, teachers=1),  # of the guided teacher two or three
    "dmd": Method(6, teachers=1, critics=1),  # of 4 steps, in the mean over a student's update and 4 of the critic
    "align": Method(5, copies=2),  # the old policy, and the start
}


@dataclass
class PlanConfig:
    """The machine and the training to plan for.

    method: train; distill, with the teacher beside the student; dmd, with the critic as well; or align, with the old policy and the start.
    lora: low-rank training, as in those programs; those of the preset by default.
    gpus: number in all. node: number in one machine. memory: GiB of each.
    tflops: TFLOP/s that a GPU reaches on matrix products; 0 measures this machine.
    mfu: the share of it that training is assumed to reach, 0 to 1. clips: how many the run trains on, with repetition.
    height, width: pixels of a clip; 0 takes the largest of the preset's cache, or 480x832 if it names none. The longest length is planned.
    spatial_factor: pixels along one side of a latent of the VAE. bf16: compute in bfloat16; if tflops is measured, only if faster here.
    """

    method: str = "train"
    lora: Lora = field(default_factory=Lora)
    gpus: int = 8
    node: int = 8
    memory: float = 80.0
    tflops: float = 0.0
    mfu: float = 0.4
    clips: int = 10_000_000
    height: int = 0
    width: int = 0
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


def on_each_gpu(
    step: StepMemory, clips: int, shards: int, split: int, moments: int = 2, method: str = "train", frozen: int = 4, bf16: bool = False
) -> Part:
    """One GPU's memory with the state cut over `shards`, the sequence cut over `split`, and `clips` of its own at a time.

    What is trained, its gradients, moments and averages are fp32. A sharded run also holds two whole blocks while it computes. A validation
    swaps the averages in and keeps the weights beside them; they take the place of the gradients, which are freed by then. A teacher is in
    bf16 if the run computes in it; with low-rank training all networks have the same frozen weights, of `frozen` bytes each, and share them
    unless they are sharded. A critic's weights and moments are counted with the student's, a method's copies with the average.
    """
    how, state, still = METHODS[method], 4 * step.trained / shards, (step.parameters - step.trained) / shards
    networks = 1 + how.critics
    weights = networks * state
    if still:
        weights += frozen * still * (1 if shards == 1 else networks + how.teachers)
    else:
        weights += how.teachers * (2 if bf16 else 4) * step.parameters / shards
    gathered = 2 * 4 * step.block if shards > 1 else 0
    return Part(weights + gathered, state, networks * moments * state, (1 + how.copies) * state, step.beyond(state, clips / split))


def on_the_host(step: StepMemory, shards: int, moments: int = 2, method: str = "train", whole: bool = True) -> tuple[int, int]:
    """Bytes of one process's host memory: while a checkpoint of weights, average and moments is written in the background, and (in the main
    process only) for the export: averaged weights in fp32, and their copy in bf16. whole: whether it is of all weights, or low-rank."""
    how = METHODS[method]
    saved = (1 + how.critics) * (1 + moments) + 1 + min(how.copies, 1)
    return saved * 4 * step.trained // shards, (4 + 2) * (step.parameters if whole else step.trained)


def set_up(transformer: KlingTransformer3DModel, what: str, lora: Lora) -> None:
    """What the training programs do to a model that they are about to train. what: of its activations is computed again."""
    if lora.rank:
        for layer in transformer.blocks.modules():
            if lora.half and isinstance(layer, torch.nn.Linear):
                layer.to(torch.bfloat16)
        add_lora(Trained(transformer, None), lora)
    set_checkpointing(transformer, what)


@program
def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if helped("kling-plan", argv):
        return
    preset = read_preset(argv[0])
    if "model" not in preset or "frames" not in preset:
        raise UserError(f"preset '{argv[0]}' has no model and frames: give one that sets its sizes, such as configs/dit/1.3b.yaml")
    load_config(TrainDiTConfig, argv[0])  # raises for what kling-train would refuse
    own = [f"lora.{key}={json.dumps(value)}" for key, value in preset.get("lora", {}).items()]
    plan = load_config(PlanConfig, None, [*own, *argv[1:]])
    if plan.method not in METHODS:
        raise unknown("method", plan.method, METHODS)
    if plan.gpus < 1 or plan.node < 1 or plan.clips < 1 or not 0 < plan.memory < math.inf or not 0 < plan.mfu <= 1:
        raise UserError(f"gpus {plan.gpus}, memory {plan.memory}, mfu {plan.mfu}: give positive numbers, and an mfu of at most 1")
    if not 0 <= plan.tflops < math.inf or min(plan.height, plan.width) < 0:
        raise UserError(f"tflops {plan.tflops}, height {plan.height}, width {plan.width}: give positive numbers")
    if plan.gpus > plan.node and plan.gpus % plan.node:
        raise UserError(f"gpus {plan.gpus} are not full machines of node={plan.node}: give a multiple")
    if not plan.tflops:
        print(describe(precision_of(plan)), file=sys.stderr, flush=True)
    for line in report(preset, plan, argv[0]):
        print(line)


def own_size(preset: dict[str, Any]) -> tuple[int, int, str]:
    """(height, width, their origin): the largest clips of the cache that a preset names, or the size of published models."""
    if not preset.get("encode"):
        return 480, 832, "assumed, since the preset names no cache: give height= and width= of yours"
    data = load_config(CacheConfig, preset["encode"]).data
    sizes = (aspect_size(aspect, data.scale) for aspect in data.aspects)
    return *max(sizes, key=math.prod), f"of {preset['encode']}"


def precision_of(plan: PlanConfig) -> str:
    """bf16 or fp32. GPUs whose TFLOP/s are given are taken to have bf16."""
    return "fp32" if not plan.bf16 else "bf16" if plan.tflops else pick_precision("auto", default_device())


def report(preset: dict[str, Any], plan: PlanConfig, name: str = "PRESET") -> list[str]:
    """The lines of a plan. name: of the preset, for the command."""
    if (optimizer := preset.get("optimizer", "adamw")) not in MOMENTS:
        raise unknown("optimizer", optimizer, MOMENTS)
    with torch.device("meta"):
        text = built(ByteTextEncoder, preset.get("text", {}), "text")
        model = {"text_dim": text.config.out_dim, **preset["model"]}
        config = {**built(KlingTransformer3DModel, {**model, "num_layers": 1}, "model").config, "num_layers": model.get("num_layers", 40)}
    height, width, whose = own_size(preset)
    height, width, whose = plan.height or height, plan.width or width, "as given" if plan.height or plan.width else whose
    patch, frames, l = tuple(config["patch_size"]), max(preset["frames"]), text.num_tokens
    h, w = latent_size(height, width, plan.spatial_factor, patch[1])
    latents = (1, config["in_channels"], latent_frames(frames), h, w)
    tokens = math.prod(token_grid(*latents[2:], patch))
    flops = METHODS[plan.method].passes * forward_flops(config, tokens, l)
    device = default_device()
    precision = precision_of(plan)
    if plan.lora.half and precision != "bf16":
        raise UserError("lora.half holds weights in bf16, and this plan computes in fp32: give tflops= of a GPU without bf16=false")
    bf16 = precision == "bf16"
    tasks = preset.get("tasks", {"text": 1.0})
    references = stored_references(preset)
    held = (*latents[:2], latents[2] + (keyframe_share(tasks) > 0 and frames > 1) + references, h, w)  # the largest shape of a batch
    runs = level_runs(tasks, token_grid(*held[2:], patch), references)
    steps = {what: step_memory(model, held, l, partial(set_up, what=what, lora=plan.lora), bf16, runs) for what in CHECKPOINTING}
    some = steps["none"]
    each = partial(on_each_gpu, moments=MOMENTS[optimizer], method=plan.method, frozen=2 if plan.lora.half else 4, bf16=bf16)

    ceiling = plan.tflops * 1e12 or matmul_ceiling(torch.device(device), torch.bfloat16 if bf16 else torch.float32)
    rate = ceiling * plan.mfu * plan.gpus / flops  # clips a second
    size = f"{width}x{height}"
    here = f"measured on this machine's {torch.cuda.get_device_name() if device == 'cuda' else 'CPU'} in {precision}"
    if device == "cpu":
        here += ": no GPU is here, so give tflops= of yours (matrix products in bf16 reach about 600 on an H100, 230 on an A100)"
    speed = f"{rate:.3g} clips/s, {rate * tokens:.4g} tokens/s"
    lines = [
        f"model          {some.parameters / 1e9:.3f} B parameters, {some.block / 1e6:.1f} M in each of {config['num_layers']} blocks",
        *([f"low rank       {plan.lora.rank}: {some.trained / 1e6:.1f} M of them are trained"] if plan.lora.rank else []),
        f"precision      {precision}, with {'what is trained' if plan.lora.half else 'weights'}, gradients and optimizer in fp32",
        f"clip           {frames} frames of {size} ({whose}): latents {tuple(latents[1:])}, {tokens} tokens, {l} of text",
        f"operations     {flops / 1e12:.3g} TFLOP a clip and update",
        f"speed          {speed}, on {plan.gpus} x {ceiling / 1e12:.3g} TFLOP/s at MFU {plan.mfu:.2f}",
        f"               TFLOP/s as {'given by tflops=' if plan.tflops else here}",
        f"time           {plan.clips} clips in {plan.clips / rate / 86400:.3g} days",
        "",
        f"{'memory of each GPU in GiB, one clip at a time':<54}weights gradients optimizer   average activations   total",
    ]
    best = None
    for layout, shards, split, what in (tried := layouts(plan.gpus, plan.node, plan.method == "train")):
        part = each(steps[what], 1, shards, split)
        fits = part.total < RESERVE * plan.memory * GIB
        values = [getattr(part, field) / GIB for field in ("weights", "gradients", "optimizer", "average", "activations", "total")]
        row = "".join(f"{value:>10.2f}" for value in values)
        lines.append(f"  {layout:<20} {what:<12} {'fits' if fits else 'too large':<15}" + row)
        if fits and best is None:
            best = layout, shards, split, what, part
    if best is None:
        least = min(each(steps[what], 1, shards, split).total for _, shards, split, what in tried) / GIB
        return [*lines, "", f"nothing fits: the smallest layout needs {least:.3g} GiB; take more GPUs, or shorter or smaller clips"]
    whole = plan.lora.merge or not plan.lora.rank or METHODS[plan.method].teachers > 0
    saving, export = on_the_host(some, best[1], MOMENTS[optimizer], plan.method, whole)
    host = f"host memory    {saving / GIB:.3g} GiB a process to save in the background, {export / GIB:.3g} GiB in the main one to export"
    return [*lines, "", host, *advice(*best, plan, preset, name)]


def stored_references(preset: dict[str, Any]) -> int:
    """The most references that a batch has: as many as the cache holds of a clip."""
    if not preset.get("reference"):
        return 0
    return load_config(CacheConfig, preset["encode"]).references if preset.get("encode") else MOST_REFERENCES


def level_runs(tasks: dict[str, float], grid: tuple[int, int, int], references: int = 0) -> int:
    """Runs of equal noise levels in a clip's tokens, (f, h, w): all tokens if a task gives parts of frames, f if it gives frames."""
    drawn = [TASKS[name][1](random.Random(0), max(2, grid[0]), 4, 4) for name, weight in tasks.items() if weight > 0]
    if any(given.space is not None for given in drawn):
        return math.prod(grid)
    return grid[0] if references or any(given.known or given.keyframes for given in drawn) else 1


def layouts(gpus: int, node: int, cut: bool = True) -> list[tuple[str, int, int, str]]:
    """(name, shards, split, checkpointing) from the fastest to the smallest: whole weights, then sharded, then the sequence cut as well,
    if the program can `cut` it."""
    found = [("ddp", 1, 1)] if gpus > 1 else [("one GPU", 1, 1)]
    if gpus > node:
        found.append(("hsdp", node, 1))
    if gpus > 1:
        found.append(("fsdp2", gpus, 1))
    found += [("fsdp2_cp", gpus, split) for split in (2, 4, 8) if cut and split <= min(gpus, node)]
    return [
        (name if split == 1 else f"{name} cp_size={split}", shards, split, what) for name, shards, split in found for what in CHECKPOINTING
    ]


def advice(layout: str, shards: int, split: int, what: str, part: Part, plan: PlanConfig, preset: dict[str, Any], name: str) -> list[str]:
    """The first layout that fits, the largest batch in it, and the command, which runs as printed if a cache is named."""
    room = RESERVE * plan.memory * GIB - (part.total - part.activations)
    clips = max(1, int(room // max(1.0, part.activations)))
    batch = min(clips, LARGEST)
    options = [f"activation_checkpointing={what}", f"batch={batch}"]
    options += ["compile=false"] if preset.get("compile", False) and what == "selective" else []
    said = f"recommended    {layout}, {' '.join(options)}: {batch * plan.gpus // split} clips a micro-step, {clips} fit on a GPU"
    if plan.method != "train":
        program = {"dmd": "kling-distill method=dmd"}.get(plan.method, f"kling-{plan.method}")
        said_of = f"low-rank weights with lora.rank={plan.lora.rank}" if plan.lora.rank else "every weight; a LoRA (lora.rank=) needs less"
        beyond = ". Making clips takes time beyond this" if plan.method == "align" else ""
        return [said, f"               for {program}, of {said_of}{beyond}"]
    if plan.lora.rank:
        own = {**asdict(Lora()), **preset.get("lora", {})}
        options += [f"lora.{key}={json.dumps(value)}" for key, value in asdict(plan.lora).items() if value != own[key]]
        options += [] if preset.get("init_from") else ["init_from=MODEL"]
    given = [f"out=runs/{Path(name).stem}", *([] if preset.get("encode") else ["vae=VAE", "cache=CACHE"]), *options]
    if plan.gpus == 1:
        return [said, f"               kling-train {shlex.join([name, *given])}"]
    nodes, kind = -(-plan.gpus // plan.node), layout.split()[0]
    sizes = {
        "fsdp2": {"dp_shard_size": plan.gpus},
        "hsdp": {"dp_replicate_size": nodes, "dp_shard_size": plan.node},
        "fsdp2_cp": {"cp_size": split, "dp_shard_size": plan.gpus // split},
    }.get(kind, {})
    config = find_config(f"accelerate/{kind}.yaml")
    words = ["--config_file", str(config if PRESETS[0] not in config.parents else Path("configs") / config.relative_to(PRESETS[0]))]
    words += ["--num_processes", str(plan.gpus), "--num_machines", str(nodes)]
    words += [word for key, value in sizes.items() for word in (f"--parallelism_config_{key}", str(value))]
    words += ["--machine_rank", "0", "--main_process_ip", "HOST", "--main_process_port", "29500"] if nodes > 1 else []
    launch = f"               accelerate launch {shlex.join([*words, '-m', 'kling_programs.train.train_dit', name, *given])}"
    note = "               HOST is machine 0's address; on the others --machine_rank 1, 2, ...; with SLURM see configs/slurm.sh"
    return [said, launch, note] if nodes > 1 else [said, launch]


if __name__ == "__main__":
    main()
