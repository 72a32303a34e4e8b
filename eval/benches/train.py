"""A training step from cached latents: how kling-train's time is spent, a plain loop for comparison, and the effect of checkpointing."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from diffusers.training_utils import EMAModel
from kling_programs.eval.benches.measure import Bench, Row
from kling_programs.eval.benches.memory import peak

from kling.cache.batches import LatentSteps
from kling.cache.fill import fill_cache
from kling.cache.plan import CacheConfig
from kling.cache.store import LatentCache
from kling.data.source import DataConfig
from kling.dit import KlingTransformer3DModel
from kling.dit.cost import forward_flops
from kling.flow.levels import draw_sigma
from kling.flow.losses import flow_loss
from kling.flow.path import velocity
from kling.runtime.device import upload
from kling.runtime.precision import pick_precision
from kling.runtime.random import generator
from kling.sampling.pipeline import load_vae
from kling.shapes import latent_frames
from kling.text import ByteTextEncoder
from kling.training.ema import EMA
from kling.training.examples import Drawing, Examples
from kling.training.model import CHECKPOINTING, Trained, set_checkpointing
from kling.training.optim import make_optimizer

MODEL = {"num_attention_heads": 6, "attention_head_dim": 64, "num_layers": 12, "ffn_dim": 1536}
SHIPPED = {"num_attention_heads": 4, "attention_head_dim": 64, "num_layers": 8, "ffn_dim": 768}  # as configs/dit/world.yaml
CHANNELS = 16
GOALS = {"bf16": 2.5, "fp32": 1.15}  # clips/s of ours over the peer's
OUTSIDE = 3.0  # per cent of a step allowed outside forward and backward
CHECKPOINTED = {"selective": (0.5, 1.12), "full": (0.3, 1.38)}  # peak and time, relative to those without checkpointing


def rows(bench: Bench) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        preset = root / "cache.yaml"
        preset.write_text("clips: 16\nshares: [1.0]\ndata: {source: world, frames: [17], aspects: ['16:9']}\n")
        data = DataConfig(source="world", frames=[17], aspects=["16:9"])
        for _ in fill_cache(CacheConfig(out=str(root / "cache"), clips=16, shares=[1.0], data=data), load_vae()):
            pass
        yield program(bench, root, preset)
    yield from loops(bench)
    yield from checkpointing(bench)


def program(bench: Bench, root: Path, preset: Path) -> Row:
    """kling-train itself: the share of its steps outside forward and backward; the first step, which warms up, is left out."""
    from kling_programs.train import train_dit

    batch, steps = (4, 4) if bench.quick else (16, 12)
    (root / "train.yaml").write_text(
        json.dumps({"steps": steps, "batch": batch, "frames": [17], "max_frames": 17, "encode": str(preset), "model": MODEL, "workers": 1})
    )
    train_dit.main([str(root / "train.yaml"), f"out={root / 'run'}", f"cache={root / 'cache'}", "save_every=100000", "threads=1"])
    lines = [json.loads(line) for line in (root / "run" / "metrics.jsonl").read_text().splitlines()][1:]
    total = {part: sum(line.get(f"time/{part}", 0.0) for line in lines) for part in ("step", "data", "forward", "backward", "optimizer")}
    outside = 100 * (1 - (total["forward"] + total["backward"]) / total["step"])
    shares = {f"{part} %": 100 * total[part] / total["step"] for part in ("data", "forward", "backward", "optimizer")}
    row = {"case": f"kling-train, 30M, batch {batch} of 17 frames", "peer": "none", "s a step": total["step"] / len(lines)}
    return row | shares | {"outside %": outside} | bench.judge(outside, OUTSIDE, at_most=True)


def loops(bench: Bench) -> Iterator[Row]:
    """Updates of the shipped transformer on clips of 41 frames: data, conditions, forward, backward, clipping, optimizer and average.

    Ours as in kling-train: the measured precision, our attention, Muon. The peer is the obvious loop: diffusers' module in fp32 with
    PyTorch's attention and AdamW, on the same clips. Nothing is compiled.
    """
    batch, frames = (4, 17) if bench.quick else (16, 41)
    precision = pick_precision("auto", bench.device.type)
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "cache"
        data = DataConfig(source="world", frames=[frames], aspects=["16:9"])
        for _ in fill_cache(CacheConfig(out=str(cache), clips=2 * batch, shares=[1.0], data=data), load_vae()):
            pass
        ours, peer = Ours(cache, batch, frames, precision, bench.device), Plain(cache, batch, frames, bench.device)
        case = f"an update, shipped transformer, {batch} clips of {frames} frames"
        yield bench.same(case, ours)
        row = bench.compare(case, ours, peer, name="diffusers' module, fp32, AdamW, a plain loop", goal=GOALS[precision])
        speed = {"ours_clips_s": 1e3 * batch / row["ours ms"], "peer_clips_s": 1e3 * batch / row["peer ms"]}
        used = ours.flops * 1e3 / row["ours ms"] / bench.ceilings[f"matmul {precision}"]
        yield row | speed | {"precision": precision, "share_of_ceiling": used}


class Ours:
    """An update as `train/train_dit.py` makes it."""

    def __init__(self, cache: Path, batch: int, frames: int, precision: str, device: torch.device) -> None:
        torch.manual_seed(0)
        text = ByteTextEncoder()
        self.model = Trained(KlingTransformer3DModel(**SHIPPED, text_dim=text.config.out_dim), text).to(device)
        self.optimizer, self.ema = make_optimizer("muon", self.model, 1e-4), EMA(self.model, 0.999)
        steps, drawing = LatentSteps(LatentCache(cache), batch, [frames], 0), Drawing(0, {"text": 1.0}, 0.1, 0.4)
        self.examples, self.done = Examples(steps, drawing, self.model.transformer, load_vae()), 0
        self.device, self.autocast = device, torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
        tokens = latent_frames(frames) * 28  # 4 x 7 tokens a latent frame of 112x64
        self.flops = 3 * batch * forward_flops(self.model.transformer.config, tokens, text.num_tokens)

    def __call__(self) -> None:
        example, noise = self.examples[self.done]
        example, noise = example.to(self.device), upload(noise, self.device)  # noise (b, c, G, h, w)
        level = upload(draw_sigma((len(noise),), generator(0, "sigma", self.done)), self.device)  # (b,)
        with self.autocast:
            v = self.model(example, example.state.noised(level, noise), level, self.model.words(example.prompts))
        flow_loss(v.float(), velocity(example.state.clean, noise), example.state.mask).mean().backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.ema.update(self.model, self.done)
        self.optimizer.zero_grad()
        self.done += 1


class Plain:
    """The same network, clips and text in the obvious loop."""

    def __init__(self, cache: Path, batch: int, frames: int, device: torch.device) -> None:
        torch.manual_seed(0)
        self.device, self.text = device, ByteTextEncoder().to(device)
        config = {"text_dim": self.text.config.out_dim, "freq_dim": 256, "in_channels": CHANNELS, "out_channels": CHANNELS}
        self.model = WanTransformer3DModel(**SHIPPED, **config).to(device)
        parameters = [*self.model.parameters(), *self.text.parameters()]
        self.parameters, self.optimizer = parameters, torch.optim.AdamW(parameters, lr=1e-4)
        self.ema = EMAModel(parameters, decay=0.999)
        self.cache, self.batch, self.frames = LatentCache(cache), batch, frames
        self.bucket = next(iter(self.cache.clips))

    def __call__(self) -> None:
        batch = self.cache.batch(self.bucket, torch.randperm(len(self.cache))[: self.batch].tolist(), self.frames)
        latents = batch.latents.to(self.device)
        sigma, noise = torch.randn(self.batch, device=self.device).sigmoid(), torch.randn_like(latents)
        level = sigma.view(-1, 1, 1, 1, 1)
        text = self.text(*self.text.tokenize([captions[0] for captions in batch.captions]))
        v = self.model((1 - level) * latents + level * noise, 1000 * sigma, text, return_dict=False)[0]
        F.mse_loss(v, noise - latents).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.ema.step(self.parameters)
        self.optimizer.zero_grad()


def checkpointing(bench: Bench) -> Iterator[Row]:
    """Peak memory of a step in its own process, and its time, relative to a step that keeps all activations."""
    tokens, device = 256 if bench.quick else 1024, bench.device.type
    step = {what: checkpointed(what, tokens, device)[1] for what in CHECKPOINTING}
    peaks = {what: peak(f"{__name__}:checkpointed", {"what": what, "tokens": tokens, "device": device}, device) for what in CHECKPOINTING}
    for what, (part, slower) in CHECKPOINTED.items():
        case = f"activation_checkpointing={what}, {tokens} tokens"
        row = bench.compare(case, step[what], step["none"], name="none")
        time = {"time of none": 1 / row["ratio"]} | bench.judge(1 / row["ratio"], slower, at_most=True)
        yield row | time
        saved = peaks[what] / peaks["none"]
        memory = {"ours MiB": peaks[what], "peer MiB": peaks["none"], "peak of none": saved}
        yield {"case": f"{case}, memory", "peer": "none"} | memory | bench.judge(saved, part, at_most=True)


def checkpointed(what: str, tokens: int, device: str) -> tuple[Callable[[], None], Callable[[], None]]:
    """For `memory.peak`: warms up with a step of 256 tokens. In bf16 on CUDA."""
    torch.manual_seed(0)
    where, model = torch.device(device), KlingTransformer3DModel(**MODEL, text_dim=512).train().to(device)
    set_checkpointing(model, what)

    def step(n: int) -> None:
        z, text = torch.randn(1, CHANNELS, n // 256, 32, 32, device=where), torch.randn(1, 77, 512, device=where)
        with torch.autocast(where.type, torch.bfloat16, enabled=where.type == "cuda"):
            v = model(z, torch.full((1,), 0.5, device=where), text).sample
        v.float().square().mean().backward()
        model.zero_grad(set_to_none=True)

    return lambda: step(256), lambda: step(tokens)
