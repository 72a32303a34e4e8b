"""Train the causal 3-D VAE, from scratch or from a checkpoint.

kling-train-vae configs/vae/world.yaml out=runs/vae            # run again, the same command continues where it stopped
kling-train-vae configs/vae/debug.yaml out=/tmp/vae steps=20   # seconds
accelerate launch --config_file configs/accelerate/ddp.yaml train/train_vae.py configs/vae/16x8x8.yaml out=runs/vae
"""

from __future__ import annotations

import math
import random
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from kling_programs.train.command import helped
from torch import Tensor

from kling.config import built, load_config
from kling.data.image import write_png
from kling.data.source import ClipSource, DataConfig, StepBatches, check_data
from kling.data.strip import strip
from kling.data.transforms import to_batch, to_tensor, to_uint8
from kling.data.world.storyboard import SHORTEST
from kling.errors import UserError, program, unknown
from kling.metrics.pixel import psnr
from kling.runtime.accelerator import Accelerator
from kling.runtime.files import written_folder
from kling.runtime.parallel import scalar, total
from kling.runtime.random import generator
from kling.sampling.pipeline import load_vae
from kling.training.ema import EMA
from kling.training.health import Guard
from kling.training.loop import Loop
from kling.training.meter import StepClock, peak_memory
from kling.training.optim import adamw, check_names, make_optimizer, set_lr
from kling.training.start import SHIPPED
from kling.vae import AutoencoderKLKling, LossWeights, vae_loss
from kling.vae.discriminator import Adversary, PatchDiscriminator3d, Perceptual, frozen, generator_loss, hinge
from kling.vae.paths import PATHS, Autoencoding, half

FREEZABLE = ("encoder", "quant_conv", "post_quant_conv", "decoder")


@dataclass
class TrainVAEConfig:
    """All settings of a run. `model` has the keys of `AutoencoderKLKling`.

    out: folder of the run: checkpoints, metrics.jsonl, strips, and the VAE in export/. steps: updates of the weights, in all.
    seed: of the initial weights and of all random draws. batch: clips in each process and micro-step.
    optimizer: adamw or muon, with the same lr. lr: highest learning rate. warmup: updates in which lr rises from 0.
    schedule: constant or cosine, after the warmup. floor: fraction of lr at the end of cosine. weight_decay: of matrices, relative to lr.
    clip_grad: largest norm of the gradients. ema: decay of the averaged weights, per update. model: keys of AutoencoderKLKling.
    init_from: a VAE folder to start from, or shipped; replaces `model`. freeze: parts that are not trained; with [encoder, quant_conv] the
    decoder improves while the latents stay the same, so that a transformer trained on them stays valid.
    draw: the decoder gets a sample of the posterior instead of its mean; without it only `loss.kl` trains the posterior's width, and a
    sample costs decibels. loss.halved: latents halved in size decode to the halved video (scale equivariance, see `Autoencoding`).
    cuts: share of the world's clips that are storyboards, whose cuts a decoder must see to keep a shot's colours out of the next; 0 to 1.
    group: consecutive batches of one shape. If the number of processes divides it, all of them have equal work in every step.
    paths: how often clips are processed whole, streamed in chunks, or in blended tiles, so that training covers the ways of sampling.
    perceptual: weight of VGG-16's features. perceptual_weights: a local safetensors file of VGG-16.
    save_every: updates between checkpoints. keep_last: checkpoints to keep. eval_every: updates between evaluations.
    eval_clips: clips of each. log_every: updates between lines of the log. mixed_precision: auto (measured), bf16 or fp32.
    gradient_accumulation: micro-steps of an update. trackers: tensorboard, wandb or both, in addition to metrics.jsonl.
    workers: processes that read clips, for each training process. threads: CPU threads per operation, null is all cores.
    watchdog: seconds without a step after which every process writes its stack; 0 is off.
    """

    out: str = "runs/vae"
    steps: int = 1000
    seed: int = 0
    batch: int = 4
    optimizer: str = "adamw"
    lr: float = 1e-3
    warmup: int = 50
    schedule: str = "cosine"
    floor: float = 0.05
    weight_decay: float = 0.0
    clip_grad: float = 1.0
    ema: float = 0.99
    model: dict[str, Any] = field(default_factory=dict)
    init_from: str | None = None
    freeze: list[str] = field(default_factory=list)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossWeights = field(default_factory=LossWeights)
    draw: bool = False
    cuts: float = 0.0
    group: int = 1
    paths: dict[str, float] = field(default_factory=lambda: {"whole": 1.0})
    adversary: Adversary = field(default_factory=Adversary)
    perceptual: float = 0.0
    perceptual_weights: str = ""
    save_every: int = 200
    keep_last: int = 2
    eval_every: int = 200
    eval_clips: int = 4
    log_every: int = 10
    mixed_precision: str = "auto"
    gradient_accumulation: int = 1
    watchdog: float = 1800.0
    trackers: list[str] = field(default_factory=list)
    workers: int = 1
    threads: int | None = None


@program
def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if helped("kling-train-vae", argv):
        return
    cfg = load_config(TrainVAEConfig, argv[0], argv[1:])
    check_names(cfg.optimizer, cfg.schedule)
    check_data(cfg.data)
    for name in cfg.paths:
        if name not in PATHS:
            raise unknown("path", name, PATHS)
    if bool(cfg.perceptual) != bool(cfg.perceptual_weights):
        raise UserError(
            "perceptual and perceptual_weights belong together: give both, a weight and a safetensors file of VGG-16, or neither"
        )
    if cfg.cuts and (cfg.data.source != "world" or not 0 < cfg.cuts <= 1 or max(cfg.data.frames) < SHORTEST):
        raise UserError(f"cuts {cfg.cuts:g}: give a share of the world's clips, from 0 to 1, with a length of {SHORTEST} frames or more")
    lone = 1 in cfg.data.frames  # single frames do not use the convolutions that halve or double time
    with Loop(cfg, some_unused=lone) as loop:
        train(cfg, loop)


def train(cfg: TrainVAEConfig, loop: Loop) -> None:
    """The training, with the run's folder locked."""
    out, accelerator, device = loop.out, loop.accelerator, loop.accelerator.device
    if accelerator.is_fsdp2:
        raise UserError("a VAE is trained whole on every GPU: use configs/accelerate/ddp.yaml")
    torch.manual_seed(cfg.seed)  # the initial weights; every later draw is counter-based
    model = load_vae("" if cfg.init_from == SHIPPED else cfg.init_from) if cfg.init_from else built(AutoencoderKLKling, cfg.model, "model")
    model.train()
    for name in cfg.freeze:
        if name not in FREEZABLE:
            raise unknown("part to freeze", name, FREEZABLE)
        getattr(model, name).requires_grad_(False)
    critic = PatchDiscriminator3d(cfg.adversary.width, cfg.adversary.layers) if cfg.adversary.weight else None
    perceptual = Perceptual(cfg.perceptual_weights).to(device) if cfg.perceptual else None
    exact = accelerator.mixed_precision == "no"
    optimizer = make_optimizer(cfg.optimizer, model, cfg.lr, weight_decay=cfg.weight_decay, exact=exact)
    net, optimizer = accelerator.prepare(Autoencoding(model), optimizer)
    others = {}
    if critic is not None:
        critic_net, critic_optimizer = accelerator.prepare(critic, adamw(critic, cfg.adversary.lr, betas=(0.5, 0.9), weight_decay=0.0))
        others["critic_"] = (critic, critic_optimizer)
    ema = EMA(model, cfg.ema)
    loop.resume(model, optimizer, ema, **others)
    data = StepBatches(ClipSource(cfg.data, cfg.seed), cfg.batch, cfg.group, cfg.cuts)
    if accelerator.is_main_process and (report := data.report()):
        print(report, file=sys.stderr)
    guard, clock, sums = Guard(), StepClock(device), {}

    for place, video in loop.batches(data, guard, clock):
        judged = critic is not None and loop.done >= cfg.adversary.start
        clock.lap("data")
        with accelerator.accumulate(*([net, critic_net] if judged else [net])):
            video = to_batch(video.to(device))  # (b, 3, T, H, W)
            drawn = generator(cfg.seed, "posterior", place) if cfg.draw else None
            recon, posterior, halved = net(video, draw_path(cfg, place), drawn, cfg.loss.halved > 0)
            loss, terms = vae_loss(video, recon, posterior, cfg.loss, None if halved is None else (half(video), halved))
            if perceptual is not None:
                terms["perceptual"] = perceptual(video, recon)
                loss = loss + cfg.perceptual * terms["perceptual"]
            if judged and (weight := cfg.adversary.weight_at(loop.done)):
                with frozen(critic):
                    terms["fooled"] = generator_loss(critic(recon))
                loss = loss + weight * terms["fooled"]
            clock.lap("forward")
            accelerator.backward(loss)
            if judged:
                terms["critic"] = hinge(*critic_net(torch.cat([video, recon.detach()])).chunk(2))
                accelerator.backward(terms["critic"])
            clock.lap("backward")
        for name, value in {"loss": loss, **terms}.items():
            sums[name] = sums.get(name, 0) + value.detach()
        if not accelerator.sync_gradients:
            continue

        norms = {"grad_norm": scalar(accelerator.clip_grad_norm_(model.parameters(), cfg.clip_grad))}
        if judged:
            norms["critic_grad_norm"] = scalar(accelerator.clip_grad_norm_(critic.parameters(), math.inf))
        batches = cfg.gradient_accumulation * accelerator.num_processes
        means = dict(zip(sums, (total(accelerator, torch.stack(list(sums.values()))) / batches).tolist(), strict=True))
        sums, rate = {}, loop.lr(1.0)
        set_lr(optimizer, cfg.lr * rate)
        if guard.sound(means["loss"], *norms.values()):
            optimizer.step()
            ema.update(model, loop.done)
            if judged:
                set_lr(critic_optimizer, cfg.adversary.lr * rate)
                critic_optimizer.step()
        optimizer.zero_grad()
        if judged:
            critic_optimizer.zero_grad()
        clock.lap("optimizer")
        seen = {"lr": cfg.lr * rate, "skipped": guard.skipped, "memory/peak_gib": peak_memory(device)}
        loop.update({**means, **norms, **seen, **clock.take()}, clips=len(video) * batches)
        if loop.due(cfg.eval_every):
            with ema.swap(model):
                loop.log(evaluate(model, cfg, accelerator, out / "samples" / f"{loop.done:08d}.png"))
            clock.lap("validation")

    if accelerator.is_main_process:
        with ema.swap(model):
            save_vae(model, cfg, out / "export")
    loop.finish(out / "export")


def draw_path(cfg: TrainVAEConfig, place: int) -> str:
    """The path of the clips of one batch through the VAE."""
    return random.Random(f"path/{cfg.seed}/{place}").choices(list(cfg.paths), weights=list(cfg.paths.values()))[0]


@torch.no_grad()
def evaluate(model: AutoencoderKLKling, cfg: TrainVAEConfig, accelerator: Accelerator, picture: Path) -> dict[str, float]:
    """PSNR of held-out clips of the longest length, divided over the processes, and a picture of some: truth above reconstruction."""
    source, rows = ClipSource(cfg.data, cfg.seed, split="heldout"), []
    score = torch.zeros((), device=model.device)
    for i in range(accelerator.process_index, cfg.eval_clips, accelerator.num_processes):
        video = to_tensor(source.clip(i, max(cfg.data.frames), cfg.data.aspects[i % len(cfg.data.aspects)]).video)[None]
        recon = model(video.to(model.device)).sample.cpu().clamp(-1, 1)
        score += psnr(recon, video).mean().to(score.device)
        rows += [to_uint8(video[0]), to_uint8(recon[0])] if i % len(cfg.data.aspects) == 0 else []
    if accelerator.is_main_process:
        picture.parent.mkdir(parents=True, exist_ok=True)
        write_png(picture, strip(rows, min(5, max(cfg.data.frames)), gap=0).numpy())
    return {"eval/psnr": float(total(accelerator, score)) / cfg.eval_clips}


@torch.no_grad()
def save_vae(model: AutoencoderKLKling, cfg: TrainVAEConfig, folder: Path) -> None:
    """Write the folder that `from_pretrained` reads; the statistics of the latents are measured again if they may have changed."""
    if not {"encoder", "quant_conv"} <= set(cfg.freeze):
        mean, std = latent_statistics(model, cfg)
        model.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    with written_folder(folder) as temporary:
        model.save_pretrained(temporary)


def latent_statistics(model: AutoencoderKLKling, cfg: TrainVAEConfig, clips: int = 32) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the latents' channels over training clips of every length and aspect, (c,) each."""
    source, latents = ClipSource(cfg.data, cfg.seed), []
    for i in range(clips):
        clip = source.clip(i, cfg.data.frames[i % len(cfg.data.frames)], cfg.data.aspects[i % len(cfg.data.aspects)])
        z = model.encode(to_tensor(clip.video)[None].to(model.device)).latent_dist.mode()
        latents.append(z[0].flatten(1))  # (c, n)
    z = torch.cat(latents, dim=1)
    return z.mean(1), z.std(1)


if __name__ == "__main__":
    main()
