"""Train the transformer and its small text encoder on cached latents, for every task at once.

kling-train configs/dit/world.yaml out=runs/dit            # run again, the same command continues where it stopped
kling-train configs/dit/debug.yaml out=/tmp/dit steps=20   # under a minute, data and cache included
accelerate launch --config_file configs/accelerate/fsdp2.yaml train/train_dit.py configs/dit/1.3b.yaml out=runs/1.3b
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import SchedulerMixin
from kling_programs.train.command import helped
from torch import Tensor, nn

from kling.cache.batches import LatentSteps
from kling.cache.store import LatentCache
from kling.condition.tasks import check_tasks, keyframe_share
from kling.config import built, load_config
from kling.data.clips import ClipSample
from kling.dit import KlingTransformer3DModel
from kling.dit.cost import forward_flops
from kling.errors import UserError, program, unknown
from kling.flow.diffusers_scheduler import shift_key
from kling.flow.levels import DENSITIES, draw_sigma
from kling.flow.losses import flow_loss
from kling.flow.path import velocity
from kling.runtime.accelerator import keep_in_fp32, wrap_what_is_there
from kling.runtime.device import upload
from kling.runtime.log import Later
from kling.runtime.parallel import same_rng, split_sequence, total, whole
from kling.runtime.random import generator
from kling.sampling.pipeline import KlingPipeline, load_vae
from kling.sampling.request import Request
from kling.shapes import check_lengths, latent_frames
from kling.text import ByteTextEncoder
from kling.training.ema import EMA, restore_average
from kling.training.examples import Drawing, Example, Examples, check_divides
from kling.training.export import save_pipeline
from kling.training.health import DeviceGuard
from kling.training.loop import Loop
from kling.training.lora import Lora, add_lora, check_half, export_lora
from kling.training.meter import Meter, log_line, matmul_ceiling
from kling.training.model import Trained, set_checkpointing
from kling.training.optim import check_names, freeze, make_optimizer, set_lr
from kling.training.start import (
    LONG_CAPTIONS,
    SHIPPED,
    Start,
    check_brush,
    check_captions,
    check_fit,
    check_reference,
    check_shots,
    complete_cache,
    complete_text,
    new_scheduler,
    open_start,
    taught_text,
)
from kling.training.validation import (
    Validation,
    check_samples,
    draw_samples,
    encode,
    held_out,
    level_quantiles,
    sample_requests,
    task_requests,
    validation_loss,
)


@dataclass
class TrainDiTConfig:
    """All settings of a run.

    out: folder of the run: checkpoints, metrics.jsonl, samples, and the model in export/. steps: updates of the weights, in all.
    seed: of the initial weights and of all random draws. batch: clips of the longest length in a batch of each process and micro-step;
    of a shorter one there are more, for the same number of tokens.
    group: consecutive batches of one shape. If the number of processes divides it, all of them have equal work in every step.
    optimizer: adamw or muon, with the same lr. lr: highest learning rate. lr_of: multiples of it for parts of the model, by name, such as
    {track_embedding: 5} for an input that starts at zero; 0 freezes a part. betas: of the optimizer's moments.
    warmup: updates in which lr rises from 0. schedule: constant or cosine, after the warmup. floor: fraction of lr at the end of cosine.
    weight_decay: of matrices, relative to lr. clip_grad: largest norm of the gradients. ema: decay of the averaged weights, per update.
    model: keys of KlingTransformer3DModel. text: keys of ByteTextEncoder. scheduler: settings stored with the weights, such as shift.
    vae: a VAE folder; empty for the one of `init_from`, or the shipped one.
    cache: a latent cache; filled by the preset `encode` (if that is empty, the cache is used as kling-encode left it).
    encode: preset of kling-encode that fills the cache. frames: lengths to draw from in pixel frames, each 1 + 4k, at most the cache's; one
    listed twice is drawn twice as often. max_frames: longest clip in pixel frames that the exported model generates at once.
    tasks: how often each is drawn, as shares.
    long_captions: what to do with a caption that is too long for our text encoder: refuse (before the first step), or cut it.
    text_drop, camera_drop: share of clips, 0 to 1, whose text or camera is left out, for guidance. reference_drop: share of the clips with
    references whose pictures show nothing, likewise.
    brush: share of clips, 0 to 1, with tracks of things or of the ground (motion brush), for a model with `track_channels`; clips of the
    cache's `paths` always have some, unless it is 0.
    shots: share of the clips of a length, 0 to 1, that are storyboards: several shots, each with words and a camera of its own. 0 leaves
    those of the cache out.
    reference: share of batches, 0 to 1, whose clips come with references, pictures of their things, of which the cache must hold some;
    a batch of single pictures then has fewer of them, for the same number of tokens.
    init_from: a model folder to start from, ours, published or shipped; conditions that `model` adds to it start at zero. checkpoint: the
    registry's name of it, if its files do not tell. expert: of two, the one to train, high or low.
    lora: train low-rank weights on top of it.
    text_from: a text encoder from kling-train-text, for a new transformer.
    samples: what is drawn every `sample_every` updates, as fields of `Request`. sample_every: updates between samples, 0 draws none.
    sample_tasks: also draw a held-out clip for each task of `tasks`. save_every: updates between checkpoints. save_in_background: go on
    training while a checkpoint is written. keep_last: checkpoints to keep. keep_every: checkpoints of these steps are kept, 0 is none.
    log_every: updates between lines of the log. mixed_precision: auto (measured), bf16 or fp32.
    gradient_accumulation: micro-steps of an update.
    activation_checkpointing: none, selective or full. compile: regional `torch.compile`, each kind of block once.
    bf16_reduction: processes exchange gradients in bf16, which halves the bytes.
    context_parallel: ulysses or ring, how the processes of a group split attention (configs/accelerate/fsdp2_cp.yaml says how many).
    watchdog: seconds without a step after which every process writes its stack; 0 is off.
    trackers: tensorboard, wandb or both, in addition to metrics.jsonl. workers: processes that read clips, for each training process.
    threads: CPU threads per operation, null is OMP_NUM_THREADS or all cores.
    """

    out: str = "runs/dit"
    steps: int = 1000
    seed: int = 0
    batch: int = 16
    optimizer: str = "adamw"
    lr: float = 1e-3
    lr_of: dict[str, float] = field(default_factory=dict)
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    warmup: int = 100
    schedule: str = "cosine"
    floor: float = 0.02
    weight_decay: float = 0.01
    clip_grad: float = 1.0
    ema: float = 0.999
    model: dict[str, Any] = field(default_factory=dict)
    text: dict[str, Any] = field(default_factory=dict)
    scheduler: dict[str, Any] = field(default_factory=dict)
    init_from: str | None = None
    checkpoint: str | None = None
    expert: str = ""
    text_from: str | None = None
    lora: Lora = field(default_factory=Lora)
    vae: str = ""
    cache: str = "runs/cache"
    encode: str = "cache/world.yaml"
    frames: list[int] = field(default_factory=lambda: [17])
    max_frames: int = 41
    group: int = 1
    long_captions: str = "refuse"
    tasks: dict[str, float] = field(default_factory=lambda: {"text": 1.0})
    text_drop: float = 0.1
    camera_drop: float = 0.4
    reference_drop: float = 0.1
    brush: float = 0.0
    shots: float = 0.0
    reference: float = 0.0
    validation: Validation = field(default_factory=Validation)
    samples: list[dict[str, Any]] = field(default_factory=list)
    sample_every: int = 0
    sample_tasks: bool = False
    save_every: int = 500
    save_in_background: bool = True
    keep_last: int = 2
    keep_every: int = 0
    log_every: int = 20
    mixed_precision: str = "auto"
    gradient_accumulation: int = 1
    bf16_reduction: bool = False
    activation_checkpointing: str = "none"
    compile: bool = False
    context_parallel: str = "ulysses"
    watchdog: float = 1800.0
    trackers: list[str] = field(default_factory=list)
    workers: int = 1
    threads: int | None = None


@program
def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if helped("kling-train", argv):
        return
    cfg = load_config(TrainDiTConfig, argv[0], argv[1:])
    check_names(cfg.optimizer, cfg.schedule, cfg.betas)
    check_tasks(cfg.tasks)
    check_lengths(cfg.frames)
    latent_frames(cfg.max_frames)  # raises for what is not 1 + 4k
    if cfg.text_from and cfg.init_from:
        raise UserError("text_from and init_from are both set: the folder of init_from has its own text encoder, so leave one out")
    if cfg.lora.rank and not cfg.init_from:
        raise UserError("lora.rank is set but not init_from: name the model folder that the low-rank weights are for")
    if cfg.compile and cfg.activation_checkpointing == "selective":
        raise UserError("activation_checkpointing selective does not go with compile, which repeats cheap steps by itself: none or full")
    if (cfg.checkpoint or cfg.expert) and not cfg.init_from:
        raise UserError("checkpoint or expert is set but not init_from: they tell which published weights to train, so name their folder")
    if cfg.expert and cfg.sample_every:
        raise UserError("sample_every is set, and samples need both experts: leave it at 0, and sample from the export")
    if cfg.long_captions not in LONG_CAPTIONS:
        raise unknown("long_captions", cfg.long_captions, LONG_CAPTIONS)
    if cfg.sample_every and not sample_requests(cfg.samples) and not cfg.sample_tasks:
        raise UserError(f"sample_every {cfg.sample_every} is set, and there is nothing to draw: give samples, or sample_every=0")
    if cfg.sample_tasks and not cfg.sample_every:
        raise UserError("sample_tasks is set but not sample_every: say every how many steps")
    cfg.vae = cfg.vae or ("" if cfg.init_from == SHIPPED else cfg.init_from) or ""
    with Loop(cfg, bf16_reduction=cfg.bf16_reduction) as loop:
        train(cfg, loop)


def train(cfg: TrainDiTConfig, loop: Loop) -> None:
    """The training, with the run's folder locked."""
    out, accelerator, layout, stop = loop.out, loop.accelerator, loop.layout, loop.stop
    device = accelerator.device
    check_half(cfg.lora, accelerator.mixed_precision)
    start = open_start(cfg.init_from, cfg.checkpoint, cfg.expert) if cfg.init_from else None
    within = start.within if start else (0.0, 1.0)
    scheduler = scheduler_of(cfg, start)
    density, shift = cfg.scheduler.get("density", scheduler.config.get("density", DENSITIES[0])), scheduler.config[shift_key(scheduler)]
    if density not in DENSITIES:
        raise unknown("scheduler.density", density, DENSITIES)
    if not (start or cfg.text_from):
        with torch.device("meta"):
            build(cfg, None)  # a mistake in its sizes is told before hours go into a cache
    vae = load_vae(cfg.vae).to(device)
    complete_cache(cfg.cache, cfg.encode, vae, stop, accelerator)
    cache = LatentCache(cfg.cache)
    cache.check_vae(vae)
    if keyframe_share(cfg.tasks):
        cache.check_lengths(cfg.frames)
    data = LatentSteps(cache, cfg.batch, cfg.frames, cfg.seed, cfg.group, cfg.shots)
    source = cache.data
    clips = held_out(cfg.validation, source, max(cfg.frames)) if cfg.validation.every or cfg.sample_tasks else []
    held = encode(clips, vae) if cfg.validation.every else []
    asked = requests(cfg, clips) if cfg.sample_every else []
    if start and start.published and accelerator.is_main_process:
        prompts = [*start.prompts(asked), *(clip.captions[0][0] for clip in held)]
        complete_text(start.text(cfg.text, cfg.cache), cfg.cache, prompts, device, stop)
    accelerator.wait_for_everyone()

    model = build(cfg, start)
    transformer, text_encoder = model.transformer, model.text_encoder
    max_bytes = check_captions(text_encoder, cache, cfg.long_captions)
    drawing = Drawing(
        cfg.seed, cfg.tasks, cfg.text_drop, cfg.camera_drop, cfg.group, max_bytes, cfg.brush, cfg.reference, cfg.reference_drop
    )
    check_fit(vae, transformer, cfg.tasks, cache)
    check_brush(cfg.brush, transformer, cache)
    check_shots(cfg.shots, transformer, cache, layout.split)
    check_reference(cfg.reference, transformer, cache)
    if cfg.compile:
        transformer.compile_repeated_blocks(dynamic=True)
    split_sequence(transformer, layout, accelerator, cfg.context_parallel)
    check_divides(data, cfg.tasks, transformer, layout.split, cfg.reference)
    if asked or (held and layout.split > 1):
        pipe = pipeline(cfg, model, vae, start)
        check_samples(pipe, asked)
        for batch in held:
            pipe.check_divides(*batch.latents.shape[2:])
    set_checkpointing(transformer, cfg.activation_checkpointing)
    keep_in_fp32(accelerator, transformer.condition_embedder.time_embedder)
    exact = accelerator.mixed_precision == "no"
    optimizer = make_optimizer(cfg.optimizer, model, cfg.lr, betas=cfg.betas, weight_decay=cfg.weight_decay, exact=exact, lr_of=cfg.lr_of)
    wrap_what_is_there(accelerator, model)
    net, optimizer = accelerator.prepare(model, optimizer)
    ema = EMA(model, cfg.ema)
    loop.resume(model, optimizer, ema)

    def predict(example: Example, level: Tensor, noise: Tensor) -> Tensor:
        """The network's velocity (b, c, G, h, w) for a batch at levels (b,)."""
        words = model.words(example.prompts)
        with accelerator.autocast():
            return net(example, example.state.noised(level, noise), level, words)

    def validate() -> dict[str, float]:
        """Loss of the averaged weights on held-out clips at fixed levels; restores weights and random generators."""
        levels = level_quantiles(cfg.validation.quantiles, density, shift, within)
        with ema.swap(model), same_rng(device), torch.compiler.set_stance("force_eager"):  # few clips, but each shape would be a new graph
            sums, counts = total(accelerator, validation_loss(predict, held, levels, layout, model, vae, device))
        losses = (sums / counts).tolist()
        by_level = {f"validation/sigma_{sigma:.2f}": loss for sigma, loss in zip(levels, losses, strict=True)}
        return {"validation/loss": sum(losses) / len(losses), **by_level}

    if accelerator.is_main_process:
        print(data.epochs.report(), file=sys.stderr)
        if cfg.group % layout.ranks:
            print(f"group {cfg.group}: the {layout.ranks} batches of a step may differ in shape, and all wait for the slowest: give a "
                  f"multiple of {layout.ranks} in a new run, if lengths differ", file=sys.stderr)  # fmt: skip
    guard = DeviceGuard(device)
    meter = Meter(device, matmul_ceiling(device, torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32))

    for place, (example, noise) in loop.batches(Examples(data, drawing, transformer, vae), guard, meter):
        example, noise = example.to(device), upload(noise, device)  # noise (b, c, G, h, w)
        b = len(noise)  # clips of one shape, with as many tokens as `cfg.batch` clips of the largest
        level = upload(draw_sigma((b,), generator(cfg.seed, "sigma", place), density, shift, within), device)  # (b,)
        meter.lap("data")
        with accelerator.accumulate(net):
            v = predict(example, level, noise)
            losses = flow_loss(v, velocity(example.state.clean, noise), example.state.mask)  # (b,)
            meter.lap("forward")
            accelerator.backward(losses.mean() * layout.split)
            meter.lap("backward")
        tokens = example.state.tokens
        flops = 3 * forward_flops(transformer.config, tokens, text_encoder.num_tokens)
        meter.add(level, losses, b * tokens, b * flops)
        if not accelerator.sync_gradients:
            continue

        norm = whole(accelerator.clip_grad_norm_(model.parameters(), cfg.clip_grad))  # () on the device, as all here is
        sums = meter.sums(accelerator)  # (2, bins + 1)
        optimizer.optimizer.found_inf = bad = guard.judge(sums[0].sum(), norm)
        set_lr(optimizer, lr := loop.lr(cfg.lr))
        optimizer.step()
        ema.update(model, loop.done, left_out=bad)
        optimizer.zero_grad()
        meter.lap("optimizer")
        speed = meter.close(layout.ranks, accelerator.num_processes)
        numbers = torch.cat([sums.flatten(), norm.view(1), guard.counts])
        loop.update(Later(numbers, partial(log_line, guard, lr, speed)), clips=b * loop.micro * layout.ranks)
        if held and loop.due(cfg.validation.every):
            loop.log(validate())
            meter.lap("validation")
        if asked and loop.due(cfg.sample_every):
            if accelerator.is_main_process or layout.sharded:  # sharded weights need all processes
                picture = out / "samples" / f"{loop.done:08d}.png" if accelerator.is_main_process else None
                with ema.swap(model), same_rng(device), accelerator.autocast(), torch.compiler.set_stance("force_eager"):
                    draw_samples(pipeline(cfg, model, vae, start), asked, picture)
            meter.lap("samples")

    if accelerator.is_main_process:
        publish(cfg, vae, out, start)
    loop.finish(out / ("lora" if cfg.lora.rank and not cfg.lora.merge else "export"))


def requests(cfg: TrainDiTConfig, clips: list[ClipSample]) -> list[Request]:
    """The samples to draw during training."""
    asked = sample_requests(cfg.samples)
    return asked + (task_requests(clips[0], [name for name, weight in cfg.tasks.items() if weight]) if cfg.sample_tasks else [])


def build(cfg: TrainDiTConfig, start: Start | None) -> Trained:
    """The models to train: new ones, or those to start from, with the conditions that `model` adds, or with low-rank weights; frozen where
    `lr_of` says so. The same each time: a checkpoint does not hold what is frozen."""
    torch.manual_seed(cfg.seed)  # the initial weights; every later draw is counter-based
    if start:
        frozen = torch.bfloat16 if cfg.lora.rank and cfg.lora.half else torch.float32
        model = Trained(start.transformer(cfg.model, frozen), start.text(cfg.text, cfg.cache))
    else:
        text = taught_text(cfg.text_from, cfg.text) if cfg.text_from else built(ByteTextEncoder, cfg.text, "text")
        if (asked := cfg.model.get("text_dim", text.config.out_dim)) != text.config.out_dim:
            raise UserError(f"model.text_dim = {asked!r} for a text encoder of text.out_dim = {text.config.out_dim}: leave it out")
        model = Trained(built(KlingTransformer3DModel, {"text_dim": text.config.out_dim, **cfg.model}, "model"), text)
    if cfg.lora.rank:
        add_lora(model, cfg.lora)
    freeze(model, cfg.lr_of)
    return model.train()


def scheduler_of(cfg: TrainDiTConfig, start: Start | None) -> SchedulerMixin:
    """The scheduler stored with the weights; it also determines the levels of training."""
    return start.scheduler(cfg.scheduler) if start else new_scheduler(cfg.scheduler)


def pipeline(cfg: TrainDiTConfig, model: Trained, vae: nn.Module, start: Start | None) -> KlingPipeline:
    """The models as a user gets them, with the capabilities that they had before and those trained now."""
    kept = start.settings if start else {}
    able = [name for name, weight in cfg.tasks.items() if weight > 0]
    able += ["camera"] if model.transformer.config.camera_channels and cfg.camera_drop < 1 else []
    able += ["brush"] if model.transformer.config.track_channels and cfg.brush > 0 else []
    able += ["shots"] if cfg.shots > 0 else []
    able += ["reference"] if cfg.reference > 0 else []
    able += ["text_to_image"] if 1 in cfg.frames else []
    settings = {"scheduler": scheduler_of(cfg, start), "max_frames": cfg.max_frames}
    settings["capabilities"] = list(dict.fromkeys([*kept.get("capabilities", ()), *able]))
    settings["vocabulary"] = "world" if LatentCache(cfg.cache).settings["data"]["source"] == "world" else None
    models = start.other_models(model.transformer) if start else {"transformer": model.transformer}
    return KlingPipeline(vae, text_encoder=model.text_encoder, **{**models, **kept, **settings})


def publish(cfg: TrainDiTConfig, vae: nn.Module, out: Path, start: Start | None) -> None:
    """Export the averaged weights of the last checkpoint, so that the export is what was saved and verified, however it was sharded."""
    model = build(cfg, start)
    restore_average(out, model)
    if cfg.lora.rank:
        export_lora(model.transformer, out / "lora")
        if not cfg.lora.merge:
            return
    pipe = pipeline(cfg, model, vae, start)
    if cfg.lora.rank:
        pipe.fuse_lora()
    save_pipeline(pipe, out / "export")


if __name__ == "__main__":
    main()
