"""Train the transformer and its small text encoder on cached latents, for every task at once.

kling-train configs/dit/world.yaml out=runs/dit            # the same command again goes on where it stopped
kling-train configs/dit/debug.yaml out=/tmp/dit steps=20   # under a minute, data and cache included
"""

from __future__ import annotations

import random
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from kling.cache import CacheConfig, LatentBatch, LatentCache, LatentSteps, fill_cache
from kling.condition.state import Given, State, build_state
from kling.condition.tasks import TASKS, draw_task, keyframe_share
from kling.config import load_config, save_config, to_dict
from kling.data.image import write_png
from kling.data.source import batches
from kling.dit import KlingTransformer3DModel
from kling.errors import UserError, program, unknown
from kling.flow.loss import flow_loss
from kling.flow.path import velocity
from kling.flow.scheduler import KlingFlowScheduler
from kling.flow.time import draw_sigma
from kling.pipeline import KlingPipeline, load_vae, signal
from kling.request import Request
from kling.runtime import checkpoint
from kling.runtime.accelerator import EXIT_STOPPED, StopSignal, make_accelerator, set_threads
from kling.runtime.ema import EMA
from kling.runtime.log import RunLog, loss_by_sigma
from kling.runtime.optim import adamw, lr_at, set_lr
from kling.runtime.random import generator, noise_like
from kling.shapes import latent_frames
from kling.text import ByteTextEncoder


@dataclass
class TrainDiTConfig:
    """Everything a run depends on.

    vae: a VAE folder, or empty for the shipped one. cache: a latent cache; completed by the preset `encode` (empty: it is there).
    frames: pixel lengths to draw from, at most the cache's. tasks: how often each is drawn.
    text_drop, camera_drop: how often the text or the camera is left out, for guidance. scheduler: settings stored with the weights.
    init_from: a model folder to start from. samples: what is drawn every `sample_every` steps, as fields of `Request`.
    """

    out: str = "runs/dit"
    steps: int = 1000
    seed: int = 0
    batch: int = 16
    lr: float = 1e-3
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
    vae: str = ""
    cache: str = "runs/cache"
    encode: str = "cache/world.yaml"
    frames: list[int] = field(default_factory=lambda: [17])
    max_frames: int = 41
    tasks: dict[str, float] = field(default_factory=lambda: {"text": 1.0})
    text_drop: float = 0.1
    camera_drop: float = 0.4
    samples: list[dict[str, Any]] = field(default_factory=list)
    sample_every: int = 0
    save_every: int = 500
    keep_last: int = 2
    log_every: int = 20
    mixed_precision: str = "auto"
    gradient_accumulation: int = 1
    trackers: list[str] = field(default_factory=list)
    workers: int = 1
    threads: int | None = None


class Trained(nn.Module):
    """What the optimizer sees: the transformer and the text encoder as one module, so that one wrapper serves both on many processes."""

    def __init__(self, transformer: KlingTransformer3DModel, text_encoder: ByteTextEncoder) -> None:
        super().__init__()
        self.transformer, self.text_encoder = transformer, text_encoder

    def forward(
        self, state: State, z: Tensor, level: Tensor, ids: Tensor, lengths: Tensor, rays: Tensor | None, has_camera: Tensor
    ) -> Tensor:
        text = self.text_encoder(ids, lengths)  # (b, l, e)
        return self.transformer(
            z, state.token_sigma(level), text, positions=state.position, kinds=state.kind, camera=rays, camera_mask=has_camera
        ).sample  # (b, c, G, h, w)


@program
def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        raise UserError("usage: kling-train CONFIG.yaml [key=value ...]")
    cfg = load_config(TrainDiTConfig, argv[0], argv[1:])
    for name in cfg.tasks:
        if name not in TASKS:
            raise unknown("task", name, TASKS)
    for frames in cfg.frames:
        latent_frames(frames)
    train(cfg)


def train(cfg: TrainDiTConfig) -> None:
    set_threads(cfg.threads)
    out = Path(cfg.out)
    accelerator = make_accelerator(out, cfg.mixed_precision, cfg.gradient_accumulation, cfg.trackers)
    checkpoint.check_same_config(out, to_dict(cfg))
    vae = load_vae(cfg.vae)
    if accelerator.is_main_process:
        complete_cache(cfg, vae)
    accelerator.wait_for_everyone()
    cache = LatentCache(cfg.cache)
    torch.manual_seed(cfg.seed)  # the initial weights; every later draw is counter-based
    model = build(cfg)
    optimizer = adamw(model, cfg.lr, betas=tuple(cfg.betas), weight_decay=cfg.weight_decay)
    ema = EMA(model, cfg.ema)

    start = 0
    if saved := checkpoint.load_latest(out):
        start = saved.step
        model.load_state_dict(saved.tensors["model"])
        ema.load_state_dict(saved.tensors["ema"])
        checkpoint.load_optimizer_tensors(optimizer, model, saved.tensors["optimizer"])
    if accelerator.is_main_process:
        save_config(cfg, out / "config.yaml")
    net, optimizer = accelerator.prepare(model, optimizer)
    micro, ranks, rank = cfg.gradient_accumulation, accelerator.num_processes, accelerator.process_index
    data = Places(LatentSteps(cache, cfg.batch, cfg.frames, cfg.seed), ranks, rank)
    if accelerator.is_main_process:
        print(data.steps.epochs.report(), file=sys.stderr)

    with (
        StopSignal() as stop,
        RunLog(out, cfg.steps, accelerator=accelerator, config=to_dict(cfg), start=start, log_every=cfg.log_every) as log,
    ):
        for index, batch in enumerate(batches(data, start * micro, cfg.steps * micro, cfg.workers), start=start * micro):
            step, place = index // micro, index * ranks + rank
            with accelerator.accumulate(net):
                state, prompts, rays, has_camera = condition(cfg, batch, index, place, model.transformer, vae)
                state, rays = state.to(accelerator.device), None if rays is None else rays.to(accelerator.device)
                b = len(batch.ids)  # clips of one shape, as many as make the tokens of `cfg.batch` of the largest
                level = draw_sigma((b,), generator(cfg.seed, "sigma", place), model_density(cfg), model_shift(cfg)).to(accelerator.device)
                noise = noise_like(state.clean, cfg.seed, "noise", place, range(b))  # (b, c, G, h, w)
                ids, lengths = model.text_encoder.tokenize(prompts)
                v = net(state, state.noised(level, noise), level, ids, lengths, rays, has_camera.to(accelerator.device))
                losses = flow_loss(v, velocity(state.clean, noise), state.mask)  # (b,)
                loss = losses.mean()
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(model.parameters(), cfg.clip_grad)
                set_lr(optimizer, lr_at(step, lr=cfg.lr, warmup=cfg.warmup, steps=cfg.steps, schedule=cfg.schedule, floor=cfg.floor))
                optimizer.step()
                optimizer.zero_grad()
            if not accelerator.sync_gradients:
                continue
            ema.update(model, step)
            done = step + 1
            log.log(done, {"loss": loss, "grad_norm": norm, **loss_by_sigma(level, losses)}, clips=b * micro * ranks)

            stopping = stop.seen(accelerator)
            last = done == cfg.steps
            if accelerator.is_main_process and (last or stopping or done % cfg.save_every == 0):
                log.flush()
                groups = {"model": model.state_dict(), "ema": ema.state_dict()}
                groups["optimizer"] = checkpoint.optimizer_tensors(optimizer.optimizer, model)
                checkpoint.save(out, done, groups, {"config": to_dict(cfg)}, cfg.keep_last)
            if accelerator.is_main_process and cfg.samples and cfg.sample_every and (last or done % cfg.sample_every == 0) and not stopping:
                with ema.swap(model):
                    draw_samples(pipeline(cfg, model, vae), cfg, out / "samples" / f"{done:08d}.png")
            if stopping:
                raise SystemExit(EXIT_STOPPED)

    if accelerator.is_main_process:
        with ema.swap(model):
            export(pipeline(cfg, model, vae), out / "export")


class Places(torch.utils.data.Dataset):
    """The batch that one rank takes at every micro-step."""

    def __init__(self, steps: LatentSteps, ranks: int, rank: int) -> None:
        self.steps, self.ranks, self.rank = steps, ranks, rank

    def __getitem__(self, index: int) -> LatentBatch:
        return self.steps[index * self.ranks + self.rank]


def complete_cache(cfg: TrainDiTConfig, vae: nn.Module) -> None:
    """Fill the latent cache if it is missing or unfinished; without a preset it is taken as kling-encode left it."""
    if not cfg.encode:
        return
    settings = load_config(CacheConfig, cfg.encode, [f"out={cfg.cache}"])
    for done, total in fill_cache(settings, vae):
        print(f"latent cache {cfg.cache}: {done}/{total} clips", file=sys.stderr)


def build(cfg: TrainDiTConfig) -> Trained:
    """The models to train, new or from `init_from`."""
    if cfg.init_from:
        pipe = KlingPipeline.from_pretrained(cfg.init_from)
        return Trained(pipe.transformer, pipe.text_encoder).train()
    text = ByteTextEncoder(**cfg.text)
    return Trained(KlingTransformer3DModel(**{"text_dim": text.config.out_dim, **cfg.model}), text).train()


def model_density(cfg: TrainDiTConfig) -> str:
    return cfg.scheduler.get("density", "logit_normal")


def model_shift(cfg: TrainDiTConfig) -> float:
    return cfg.scheduler.get("shift", 1.0)


def condition(
    cfg: TrainDiTConfig, batch: LatentBatch, index: int, place: int, transformer: KlingTransformer3DModel, vae: nn.Module
) -> tuple[State, list[str], Tensor | None, Tensor]:
    """What is given of every clip of a batch, its prompt and its camera. Draws depend on (seed, place) alone.

    The number of keyframes is drawn from (seed, index), the same on all ranks, so that they all have batches of one shape.
    """
    rng = random.Random(f"condition/{cfg.seed}/{place}")
    shape = random.Random(f"keyframes/{cfg.seed}/{index}")
    b, _, f, h, w = batch.latents.shape
    K = int(f > 1 and shape.random() < keyframe_share(cfg.tasks))
    given: list[Given] = []
    lone, prompts = [], []
    for i in range(b):
        task = draw_task(rng, cfg.tasks, K) if f > 1 else "text"
        what = TASKS[task][1](rng, f, h, w)
        if K:
            what, j = choose_keyframe(what, batch.times[i].tolist(), f, rng)
            lone.append(batch.keyframes[i, j])
        given.append(what)
        prompts.append("" if rng.random() < cfg.text_drop else rng.choices(batch.captions[i], batch.weights[i])[0])
    keyframes = torch.stack(lone)[:, :, None] if K else None  # (b, c, 1, h, w)
    state = build_state(given, batch.latents, keyframes, tuple(transformer.config.patch_size))

    has_camera = torch.tensor([camera is not None and rng.random() >= cfg.camera_drop for camera in batch.cameras])
    rays = None
    if transformer.config.camera_channels and has_camera.any():
        s = vae.spatial_factor
        rows = [
            signal(transformer, vae, camera, h * s, w * s, tuple(t for t, _ in what.keyframes)) if camera is not None else None
            for camera, what in zip(batch.cameras, given, strict=True)
        ]
        blank = torch.zeros_like(next(row for row in rows if row is not None))
        rays = torch.stack([blank if row is None else row for row in rows])  # (b, 24, G, h', w')
    return state, prompts, rays, has_camera


def choose_keyframe(what: Given, times: list[int], f: int, rng: random.Random) -> tuple[Given, int]:
    """The task's keyframe, tied to a lone frame of the cache: the end where the task says so, an inner one where it leaves it open (-1)."""
    (t, strength), end = what.keyframes[0], 4 * (f - 1)
    inner = [j for j, time in enumerate(times) if 0 < time < end]
    j = times.index(end) if t == end or not inner else rng.choice(inner)
    return Given(known=what.known, keyframes=((times[j], strength),)), j


def pipeline(cfg: TrainDiTConfig, model: Trained, vae: nn.Module) -> KlingPipeline:
    """The models as a user gets them."""
    able = [name for name, weight in cfg.tasks.items() if weight > 0]
    able += ["camera"] if model.transformer.config.camera_channels and cfg.camera_drop < 1 else []
    able += ["text_to_image"] if 1 in cfg.frames else []
    scheduler = KlingFlowScheduler(**cfg.scheduler)
    return KlingPipeline(vae, model.transformer, model.text_encoder, scheduler, capabilities=able, max_frames=cfg.max_frames)


def draw_samples(pipe: KlingPipeline, cfg: TrainDiTConfig, picture: Path) -> None:
    """One row of frames for each of `cfg.samples`."""
    rows = []
    pipe.transformer.eval()
    for fields in cfg.samples:
        frames = torch.from_numpy(pipe(Request(**fields)).frames[0])  # (T, H, W, 3)
        picks = torch.linspace(0, len(frames) - 1, 6).round().long()
        rows.append(torch.cat(list(frames[picks]), dim=1))
    pipe.transformer.train()
    picture.parent.mkdir(parents=True, exist_ok=True)
    write_png(picture, torch.cat(rows).numpy())


def export(pipe: KlingPipeline, folder: Path) -> None:
    """The folder that `KlingPipeline.from_pretrained` reads, weights in bf16; whole or absent."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    for name in ("vae", "transformer", "text_encoder"):
        part = getattr(pipe, name)
        part.save_config(temporary / name)
        weights = {key: t.detach().to("cpu", torch.bfloat16).contiguous() for key, t in part.state_dict().items()}
        save_file(weights, temporary / name / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    pipe.scheduler.save_pretrained(temporary / "scheduler")
    pipe.save_config(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


if __name__ == "__main__":
    main()
