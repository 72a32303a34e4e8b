"""Train the causal 3-D VAE, from scratch or from a checkpoint.

kling-train-vae configs/vae/world.yaml out=runs/vae            # the same command again goes on where it stopped
kling-train-vae configs/vae/debug.yaml out=/tmp/vae steps=20   # seconds
accelerate launch --config_file configs/accelerate/ddp.yaml train/train_vae.py configs/vae/16x8x8.yaml out=runs/vae
"""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kling.config import load_config, save_config, to_dict
from kling.data.image import write_png
from kling.data.source import ClipSource, DataConfig, StepBatches, batches, check_data
from kling.data.transforms import to_batch, to_tensor, to_uint8
from kling.errors import UserError, program, unknown
from kling.metrics.pixel import psnr
from kling.pipeline import load_vae
from kling.runtime import checkpoint
from kling.runtime.accelerator import EXIT_STOPPED, StopSignal, make_accelerator, set_threads
from kling.runtime.ema import EMA
from kling.runtime.health import LIMIT, Guard
from kling.runtime.log import RunLog
from kling.runtime.optim import adamw, lr_at, make_optimizer, set_lr
from kling.runtime.parallel import scalar
from kling.runtime.saver import Saver, find_latest, load_run_tensors, run_tensors, versions
from kling.vae import AutoencoderKLKling, LossWeights, vae_loss
from kling.vae.discriminator import Adversary, PatchDiscriminator3d, Perceptual, fooled, frozen, hinge
from kling.vae.paths import PATHS, Autoencoding

PARTS = ("encoder", "quant_conv", "post_quant_conv", "decoder")


@dataclass
class TrainVAEConfig:
    """Everything a run depends on. `model` holds the keys of `AutoencoderKLKling`.

    optimizer: adamw or muon, with the same lr. init_from: a VAE folder to start from, in place of `model`. freeze: parts that stay as
    they are; with [encoder, quant_conv] a decoder gets better under a transformer that is already trained, since the latents do not move.
    paths: how often clips go through whole, streamed in chunks, or in blended tiles, so that the loss sees what sampling does.
    adversary: a discriminator that joins later. perceptual: weight, and a local file of VGG-16.
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
    trackers: list[str] = field(default_factory=list)
    workers: int = 1
    threads: int | None = None


@program
def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        raise UserError("usage: kling-train-vae CONFIG.yaml [key=value ...]")
    cfg = load_config(TrainVAEConfig, argv[0], argv[1:])
    check_data(cfg.data)
    for name in cfg.paths:
        if name not in PATHS:
            raise unknown("path", name, PATHS)
    if bool(cfg.perceptual) != bool(cfg.perceptual_weights):
        raise UserError(
            "perceptual and perceptual_weights belong together: give both, a weight and a safetensors file of VGG-16, or neither"
        )
    with StopSignal() as stop:
        train(cfg, stop)


def train(cfg: TrainVAEConfig, stop: StopSignal) -> None:
    set_threads(cfg.threads)
    out = Path(cfg.out)
    lone = 1 in cfg.data.frames  # convolutions over time that halve or double it see no lone frame
    accelerator = make_accelerator(out, cfg.mixed_precision, cfg.gradient_accumulation, cfg.trackers, some_unused=lone)
    if accelerator.is_fsdp2:
        raise UserError("a VAE is trained whole on every GPU: use configs/accelerate/ddp.yaml")
    checkpoint.check_same_config(out, to_dict(cfg), defaults=to_dict(TrainVAEConfig()))
    torch.manual_seed(cfg.seed)  # the initial weights; every later draw is counter-based
    model = load_vae(cfg.init_from) if cfg.init_from else AutoencoderKLKling(**cfg.model)
    model.train()
    for name in cfg.freeze:
        if name not in PARTS:
            raise unknown("part to freeze", name, PARTS)
        getattr(model, name).requires_grad_(False)
    critic = PatchDiscriminator3d(cfg.adversary.width, cfg.adversary.layers) if cfg.adversary.weight else None
    perceptual = Perceptual(cfg.perceptual_weights).to(accelerator.device) if cfg.perceptual else None
    net, optimizer = accelerator.prepare(Autoencoding(model), make_optimizer(cfg.optimizer, model, cfg.lr, weight_decay=cfg.weight_decay))
    if critic is not None:
        critic_net, critic_optimizer = accelerator.prepare(critic, adamw(critic, cfg.adversary.lr, betas=(0.5, 0.9), weight_decay=0.0))
    ema = EMA(model, cfg.ema)
    saver = Saver(out, cfg.keep_last, accelerator=accelerator)

    start = 0
    if saved := find_latest(accelerator, out):
        start = saved.step
        load_run_tensors(saved, model, optimizer.optimizer, ema)
        if critic is not None:
            load_run_tensors(saved, critic, critic_optimizer.optimizer, prefix="critic_")
    if accelerator.is_main_process:
        save_config(cfg, out / "config.yaml")
    data = StepBatches(ClipSource(cfg.data, cfg.seed), cfg.batch, accelerator.process_index, accelerator.num_processes)
    if accelerator.is_main_process and (report := data.report()):
        print(report, file=sys.stderr)
    micro = cfg.gradient_accumulation

    guard = Guard()
    with RunLog(out, cfg.steps, accelerator=accelerator, config=to_dict(cfg), start=start, log_every=cfg.log_every) as log:
        for index, video in enumerate(batches(data, start * micro, cfg.steps * micro, cfg.workers), start=start * micro):
            step = index // micro
            judged = critic is not None and step >= cfg.adversary.start
            with accelerator.accumulate(*([net, critic_net] if judged else [net])):
                video = to_batch(video.to(accelerator.device))  # (b, 3, T, H, W)
                recon, posterior = net(video, draw_path(cfg, index))
                loss, terms = vae_loss(video, recon, posterior, cfg.loss)
                if perceptual is not None:
                    terms["perceptual"] = perceptual(video, recon)
                    loss = loss + cfg.perceptual * terms["perceptual"]
                if judged and (weight := cfg.adversary.weight_at(step)):
                    with frozen(critic):
                        terms["fooled"] = fooled(critic(recon))
                    loss = loss + weight * terms["fooled"]
                accelerator.backward(loss)
                if judged:
                    terms["critic"] = hinge(*critic_net(torch.cat([video, recon.detach()])).chunk(2))
                    accelerator.backward(terms["critic"])
                if accelerator.sync_gradients:
                    norm = scalar(accelerator.clip_grad_norm_(model.parameters(), cfg.clip_grad))
            if not accelerator.sync_gradients:
                continue
            rate = lr_at(step, lr=1.0, warmup=cfg.warmup, steps=cfg.steps, schedule=cfg.schedule, floor=cfg.floor)
            set_lr(optimizer, cfg.lr * rate)
            if guard.sound(norm):
                optimizer.step()
                ema.update(model, step)
                if judged:
                    set_lr(critic_optimizer, cfg.adversary.lr * rate)
                    critic_optimizer.step()
            optimizer.zero_grad()
            if judged:
                critic_optimizer.zero_grad()
            if guard.row == LIMIT:
                raise UserError(f"{LIMIT} updates in a row were not finite, at step {step + 1}: lower the learning rate and run it again")
            done = step + 1
            shown = {name: term.detach() for name, term in terms.items()}
            counts = {"skipped": guard.skipped, "clips": len(video)}
            log.log(done, {"loss": loss, "grad_norm": norm, **shown, **counts}, clips=len(video) * micro * accelerator.num_processes)

            stopping = stop.seen(accelerator)
            saver.check()
            if accelerator.is_main_process and (done % cfg.eval_every == 0 or done == cfg.steps) and not stopping:
                with ema.swap(model):
                    log.log(done, evaluate(model, cfg, out / "samples" / f"{done:08d}.png"))
            if done % cfg.save_every == 0 or done == cfg.steps or stopping:
                log.flush()
                groups = run_tensors(model, optimizer.optimizer, ema)
                if critic is not None:
                    groups |= run_tensors(critic, critic_optimizer.optimizer, prefix="critic_")
                saver.save(done, groups, {"config": to_dict(cfg), "versions": versions()})
            if stopping:
                saver.wait()
                raise SystemExit(EXIT_STOPPED)

    saver.wait()
    if accelerator.is_main_process:
        with ema.swap(model):
            export(model, cfg, out / "export")


def draw_path(cfg: TrainVAEConfig, index: int) -> str:
    """How the clips of one micro-step go through, the same on every process."""
    return random.Random(f"path/{cfg.seed}/{index}").choices(list(cfg.paths), weights=list(cfg.paths.values()))[0]


@torch.no_grad()
def evaluate(model: AutoencoderKLKling, cfg: TrainVAEConfig, picture: Path) -> dict[str, float]:
    """PSNR of held-out clips of the longest length, and a picture: truth above reconstruction."""
    source = ClipSource(cfg.data, cfg.seed, split="heldout")
    scores, rows = [], []
    for i in range(cfg.eval_clips):
        video = to_tensor(source.clip(i, max(cfg.data.frames), cfg.data.aspects[i % len(cfg.data.aspects)]).video)[None]
        recon = model(video.to(model.device)).sample.cpu().clamp(-1, 1)
        scores.append(float(psnr(recon, video).mean()))
        rows += [strip(video[0]), strip(recon[0])] if i % len(cfg.data.aspects) == 0 else []
    picture.parent.mkdir(parents=True, exist_ok=True)
    write_png(picture, torch.cat(rows).numpy())
    return {"eval/psnr": sum(scores) / len(scores)}


def strip(video: Tensor, n: int = 5) -> Tensor:
    """(3, T, H, W) -> (H, n W, 3) uint8: n frames side by side, first to last."""
    picks = torch.linspace(0, video.shape[1] - 1, min(n, video.shape[1])).round().long()
    return torch.cat(list(to_uint8(video[:, picks])), dim=1)


@torch.no_grad()
def export(model: AutoencoderKLKling, cfg: TrainVAEConfig, folder: Path) -> None:
    """Write the folder that `from_pretrained` reads; latents that may have moved are measured anew."""
    if "encoder" not in cfg.freeze:
        mean, std = latent_statistics(model, cfg)
        model.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    model.save_pretrained(folder)


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
