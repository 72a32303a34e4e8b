"""Distil a model into a flow map: the same clips in a few steps of one pass each, with its guidance built in.

kling-distill configs/distill/world.yaml out=runs/fast        # the shipped model; run again, the same command continues
kling-distill configs/distill/debug.yaml out=/tmp/fast        # under a minute, data and cache included

The student starts as the teacher and learns the mean velocity between any two noise levels (kling/flow/flow_map.py).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from kling_programs.train.command import helped
from torch import Tensor, nn

from kling.cache.batches import LatentSteps
from kling.cache.store import LatentCache
from kling.condition.tasks import check_tasks, keyframe_share
from kling.config import load_config
from kling.dit.cost import forward_flops
from kling.errors import UserError, program, unknown
from kling.flow.diffusers_scheduler import shift_key
from kling.flow.flow_map import draw_steps, flow_map_target
from kling.flow.guidance import given_share, guided_velocity
from kling.flow.losses import flow_loss
from kling.flow.path import velocity
from kling.flow.solvers import KlingFlowScheduler
from kling.runtime import checkpoint
from kling.runtime.accelerator import keep_in_fp32, wrap_what_is_there
from kling.runtime.device import upload
from kling.runtime.log import Later
from kling.runtime.parallel import same_rng, trained, whole
from kling.runtime.random import generator, noise_like
from kling.sampling.pipeline import KlingPipeline, load_vae
from kling.sampling.request import Request
from kling.shapes import check_lengths
from kling.text import ByteTextEncoder
from kling.text.umt5 import UMT5TextEncoder
from kling.training.ema import EMA, load_average
from kling.training.examples import Drawing, Example, draw_example
from kling.training.export import save_pipeline
from kling.training.health import DeviceGuard
from kling.training.loop import Loop
from kling.training.lora import Lora, add_lora
from kling.training.meter import Meter, log_line, matmul_ceiling
from kling.training.model import Trained, set_checkpointing
from kling.training.optim import check_names, make_optimizer, set_lr
from kling.training.start import (
    LONG_CAPTIONS,
    SHIPPED,
    Start,
    check_captions,
    check_fit,
    complete_cache,
    complete_text,
    open_start,
)
from kling.training.validation import draw_samples

VELOCITIES = ("teacher", "data")


@dataclass
class DistillConfig:
    """All settings of a distillation.

    out: folder of the run: checkpoints, metrics.jsonl, samples, and the model in export/.
    teacher: a model folder, ours, published or shipped.
    checkpoint: the registry's name of it, if its files do not tell. vae: a VAE folder; empty for the teacher's.
    velocity: the target: teacher, its guided velocity, which has no noise; or data, as in a training.
    guidance_scale, camera_guidance_scale, guidance_reach: guidance to build in; null is the teacher's own.
    gate: share of the embedded noise level that encodes the end of the step, as in AnyFlow.
    num_inference_steps: default steps of the export. beside: export the teacher together with the student, for mode fast.
    plain: share of the clips, 0 to 1, with steps of length 0, which keep the student's velocity correct.
    to_clean: share of the other clips, 0 to 1, whose steps end at level 0. delta: half the interval of the difference in time.
    steps: updates of the weights, in all. seed: of all random draws. batch: clips of the longest length in a batch of each process and
    micro-step; of a shorter one there are more, for the same number of tokens. group: consecutive batches of one shape.
    optimizer: adamw or muon, with the same lr. lr: highest learning rate. betas: of the optimizer's moments.
    warmup: updates in which lr rises from 0. schedule: constant or cosine, after the warmup. floor: fraction of lr at the end of cosine.
    weight_decay: of matrices, relative to lr. clip_grad: largest norm of the gradients. ema: decay of the averaged weights, per update.
    lora: train low-rank weights and the embedding of a step's end; they are merged in the export.
    cache: a latent cache; filled by the preset `encode` (if that is empty, the cache is used as kling-encode left it).
    encode: preset of kling-encode that fills the cache. frames: lengths to draw from in pixel frames, each 1 + 4k, at most the cache's; one
    listed twice is drawn twice as often.
    tasks: how often each is drawn, as shares. text_drop, camera_drop: share of clips, 0 to 1, whose text or camera is left out.
    long_captions: what to do with a caption that is too long for our text encoder: refuse (before the first step), or cut it.
    samples: what is drawn every `sample_every` updates, as fields of `Request`. sample_every: updates between samples, 0 draws none.
    save_every: updates between checkpoints. keep_last: checkpoints to keep. log_every: updates between lines of the log.
    mixed_precision: auto (measured), bf16 or fp32. gradient_accumulation: micro-steps of an update.
    activation_checkpointing: none, selective or full.
    trackers: tensorboard, wandb or both, in addition to metrics.jsonl. workers: processes that read clips, for each training process.
    threads: CPU threads per operation, null is OMP_NUM_THREADS or all cores.
    """

    out: str = "runs/distill"
    teacher: str = SHIPPED
    checkpoint: str | None = None
    vae: str = ""
    velocity: str = "teacher"
    guidance_scale: float | None = None
    camera_guidance_scale: float | None = None
    guidance_reach: float | None = None
    gate: float = 0.25
    num_inference_steps: int = 4
    beside: bool = False
    plain: float = 0.5
    to_clean: float = 0.5
    delta: float = 0.005
    steps: int = 1000
    seed: int = 0
    batch: int = 16
    group: int = 1
    optimizer: str = "adamw"
    lr: float = 1e-4
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    warmup: int = 20
    schedule: str = "constant"
    floor: float = 0.02
    weight_decay: float = 0.0
    clip_grad: float = 1.0
    ema: float = 0.99
    lora: Lora = field(default_factory=Lora)
    cache: str = "runs/cache"
    encode: str = "cache/world.yaml"
    frames: list[int] = field(default_factory=lambda: [17])
    tasks: dict[str, float] = field(default_factory=lambda: {"text": 1.0})
    text_drop: float = 0.05
    camera_drop: float = 0.4
    long_captions: str = "refuse"
    samples: list[dict[str, Any]] = field(default_factory=list)
    sample_every: int = 0
    save_every: int = 100
    keep_last: int = 2
    log_every: int = 10
    mixed_precision: str = "auto"
    gradient_accumulation: int = 1
    activation_checkpointing: str = "none"
    trackers: list[str] = field(default_factory=list)
    workers: int = 1
    threads: int | None = None


@program
def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if helped("kling-distill", argv):
        return
    cfg = load_config(DistillConfig, argv[0], argv[1:])
    check_names(cfg.optimizer, cfg.schedule, cfg.betas)
    check_tasks(cfg.tasks)
    check_lengths(cfg.frames)
    for name, value, known in (("velocity", cfg.velocity, VELOCITIES), ("long_captions", cfg.long_captions, LONG_CAPTIONS)):
        if value not in known:
            raise unknown(name, value, known)
    for name in ("plain", "to_clean", "gate"):
        if not 0 <= getattr(cfg, name) <= 1:
            raise UserError(f"{name} {getattr(cfg, name):g}: give a share from 0 to 1")
    if not 0 < cfg.delta <= 0.1:
        raise UserError(f"delta {cfg.delta:g}: give more than 0 and at most 0.1")
    cfg.vae = cfg.vae or ("" if cfg.teacher == SHIPPED else cfg.teacher)
    with Loop(cfg) as loop:
        train(cfg, loop)


def train(cfg: DistillConfig, loop: Loop) -> None:
    """The distillation, with the run's folder locked."""
    accelerator, layout = loop.accelerator, loop.layout
    device = accelerator.device
    if layout.split > 1:
        raise UserError("kling-distill does not share a clip between processes: take a layout without context parallelism, such as fsdp2")
    start = open_start(cfg.teacher, cfg.checkpoint, expert=None)
    vae = load_vae(cfg.vae).to(device)
    complete_cache(cfg.cache, cfg.encode, vae, loop.stop, accelerator)
    cache = LatentCache(cfg.cache)
    cache.check_vae(vae)
    if keyframe_share(cfg.tasks):
        cache.check_lengths(cfg.frames)
    data = LatentSteps(cache, cfg.batch, cfg.frames, cfg.seed, cfg.group)
    guide, text = Guide(cfg, start), start.text({}, cfg.cache)
    asked = [Request(**fields) for fields in cfg.samples] if cfg.sample_every else []
    if start.published and accelerator.is_main_process:
        complete_text(text, cfg.cache, [guide.negative, *(request.prompt for request in asked)], device, loop.stop)
    accelerator.wait_for_everyone()

    torch.manual_seed(cfg.seed)  # of low-rank weights; every later draw is counter-based
    model = build(cfg, start)
    transformer = model.transformer
    teacher = Trained(start.transformer({}), None).to(device).eval().requires_grad_(False)
    if isinstance(text, ByteTextEncoder):
        text = text.to(device).eval().requires_grad_(False)
    max_bytes = check_captions(text, cache, [request.prompt for request in asked], cfg.long_captions)
    with torch.no_grad():
        negative = text.encode([guide.negative]).to(device).float()  # (1, l, e)
    drawing = Drawing(cfg.seed, cfg.tasks, cfg.text_drop, cfg.camera_drop, cfg.group, max_bytes)
    check_fit(vae, transformer, cfg.tasks, cache)
    scheduler = start.settings["scheduler"]
    density, shift = scheduler.config.get("density", "logit_normal"), scheduler.config[shift_key(scheduler)]
    set_checkpointing(transformer, cfg.activation_checkpointing)
    for embedder in (transformer.condition_embedder.time_embedder, transformer.condition_embedder.delta_embedder):
        keep_in_fp32(accelerator, embedder)
    exact = accelerator.mixed_precision == "no"
    optimizer = make_optimizer(cfg.optimizer, model, cfg.lr, betas=cfg.betas, weight_decay=cfg.weight_decay, exact=exact)
    wrap_what_is_there(accelerator, model)
    net, optimizer = accelerator.prepare(model, optimizer)
    ema = EMA(model, cfg.ema)
    loop.resume(model, optimizer, ema)
    if accelerator.is_main_process:
        print(data.epochs.report(), file=sys.stderr)
    guard = DeviceGuard(device)
    meter = Meter(device, matmul_ceiling(device, torch.float32 if exact else torch.bfloat16))

    for place, batch in loop.batches(data, guard, meter):
        example = draw_example(drawing, batch, place, transformer, vae).to(device)
        state, b = example.state, len(batch.ids)
        still = int(cfg.plain * b + (place % 2) / 2)  # samples with steps of length 0
        t, r = (upload(x, device) for x in draw_steps(b, still, generator(cfg.seed, "sigma", place), density, shift, cfg.to_clean))
        noise = noise_like(state.clean, cfg.seed, "noise", place, range(b))
        z = state.noised(t, noise)  # (b, c, G, h, w)
        meter.lap("data")
        with torch.no_grad():
            words, nothing = text.encode(example.prompts).to(device).float(), negative.expand(b, -1, -1)  # (b, l, e)
            with accelerator.autocast():
                if cfg.velocity == "teacher":
                    v = guide(partial(teacher, z=z, level=t), example, words, nothing)
                else:
                    v = guide(partial(net, z=z, level=t), example, words, nothing, velocity(state.clean, noise))
            target = v.clone()
            if still < b:
                moving, heard = example.rows(still), words[still:]
                mean = lambda z, t, r: net(moving, z, t, (heard,), r, exact=True)  # noqa: E731, B023
                target[still:] = flow_map_target(mean, z[still:], v[still:], t[still:], r[still:], moving.state.mask, cfg.delta)
        meter.lap("target")
        with accelerator.accumulate(net):
            with accelerator.autocast():
                u = net(example, z, t, (words,), r)
            losses = flow_loss(u, target, state.mask)  # (b,)
            if cfg.velocity == "data" and 0 < still < b:  # only steps of length 0 have the data's noise: scale both parts to the same size
                size = losses[:still].mean() / losses[still:].clamp(min=1e-6)
                losses = torch.cat([losses[:still], losses[still:] * size.detach()])
            meter.lap("forward")
            accelerator.backward(losses.mean())
            meter.lap("backward")
        passes = 3 + guide.passes + 2 * (b - still) / b
        meter.add(t, losses, b * state.tokens, b * passes * forward_flops(transformer.config, state.tokens, words.shape[1]))
        if not accelerator.sync_gradients:
            continue

        norm = whole(accelerator.clip_grad_norm_(model.parameters(), cfg.clip_grad))  # () on the device, as all here is
        sums = meter.sums(accelerator)  # (2, bins)
        optimizer.optimizer.found_inf = bad = guard.judge(sums[0].sum(), norm)
        set_lr(optimizer, lr := loop.lr(cfg.lr))
        optimizer.step()
        ema.update(model, loop.done, left_out=bad)
        optimizer.zero_grad()
        meter.lap("optimizer")
        speed = meter.close(layout.ranks, accelerator.num_processes)
        numbers = torch.cat([sums.flatten(), norm.view(1), guard.counts])
        loop.update(Later(numbers, partial(log_line, guard, lr, speed)), clips=b * loop.micro * layout.ranks)
        if asked and loop.due(cfg.sample_every):
            if accelerator.is_main_process or layout.sharded:  # sharded weights need all processes
                picture = loop.out / "samples" / f"{loop.done:08d}.png" if accelerator.is_main_process else None
                with ema.swap(model), same_rng(device), accelerator.autocast():
                    draw_samples(pipeline(cfg, model, vae, text, start), asked, picture)
            meter.lap("samples")

    if accelerator.is_main_process:
        publish(cfg, vae, text, loop.out, start)
    loop.finish(loop.out / "export")


class Guide:
    """The guidance to build in: the teacher's own, or the one in the run's settings."""

    def __init__(self, cfg: DistillConfig, start: Start) -> None:
        pipe = KlingPipeline.from_pretrained(start.folder, weights=False, checkpoint=cfg.checkpoint)
        self.scale = pipe.setting("guidance_scale", cfg.guidance_scale)[0]
        self.camera_scale = pipe.setting("camera_guidance_scale", cfg.camera_guidance_scale)
        self.reach = pipe.setting("guidance_reach", cfg.guidance_reach)
        self.negative = pipe.setting("negative_prompt")
        self.passes = 1 + (self.scale != 1) + (self.camera_scale != 1)

    def __call__(self, net: Callable[..., Tensor], example: Example, words: Tensor, nothing: Tensor, v: Tensor | None = None) -> Tensor:
        """The guided velocity (b, c, G, h, w) of `net`, or `v` guided by it."""

        def predict(which: str, camera: bool) -> Tensor:
            if v is not None and which == "prompt" and camera == (example.cameras is not None):
                return v
            shown = example if camera else replace(example, has_camera=torch.zeros_like(example.has_camera))
            return net(shown, words=(words if which == "prompt" else nothing,)).float()

        share = given_share(*example.state.host, self.reach)
        share = None if share is None else upload(share, example.state.mask.device)
        return guided_velocity(predict, self.scale, self.camera_scale, example.cameras is not None, share)


def build(cfg: DistillConfig, start: Start) -> Trained:
    """The student: the teacher's weights, with an embedding of the end of the step."""
    model = Trained(start.transformer({"gate_value": cfg.gate}), None)
    if cfg.lora.rank:
        add_lora(model, cfg.lora)
        model.transformer.condition_embedder.delta_embedder.requires_grad_(True)
    return model.train()


def pipeline(cfg: DistillConfig, model: Trained, vae: nn.Module, text: ByteTextEncoder | UMT5TextEncoder, start: Start) -> KlingPipeline:
    """The student as a user gets it; or, with `beside`, the teacher with the student for mode fast."""
    settings, own = dict(start.settings), start.settings["scheduler"]
    shift, extra = own.config[shift_key(own)], {}
    if cfg.beside:
        teacher = start.transformer({}, model.transformer.dtype).to(model.transformer.device)
        models = start.other_models(teacher) | {"transformer_fast": model.transformer}
        extra = {"fast": {"num_inference_steps": cfg.num_inference_steps, "shift": shift}}
    else:
        models = start.other_models(model.transformer)
        settings["scheduler"] = KlingFlowScheduler(shift, "flow_map", cfg.num_inference_steps, guidance_scale=1.0)
        settings.pop("defaults", None)
    return KlingPipeline(vae, text_encoder=text, **models, **settings, **extra)


def publish(cfg: DistillConfig, vae: nn.Module, text: ByteTextEncoder | UMT5TextEncoder, out: Path, start: Start) -> None:
    """Export the averaged weights of the last checkpoint."""
    saved = checkpoint.load_latest(out)
    model = build(cfg, start)
    checkpoint.restore(saved.tensors["model"], trained(model))
    load_average(saved.tensors["ema"], model)
    if cfg.lora.rank:
        model.transformer.fuse_lora()
        model.transformer.unload_lora()
    save_pipeline(pipeline(cfg, model, vae, text, start), out / "export")


if __name__ == "__main__":
    main()
