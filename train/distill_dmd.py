"""Method dmd of kling-distill: few-step clips with the teacher's distribution (kling/flow/matching.py).

The student makes a clip in a few fixed steps, as it will be sampled: each goes to x0 and adds fresh noise (solver "renoise"), or, if the
student is a flow map, goes on to the next level. Training stops at a random step, whose x0 has the gradient (Huang et al. 2025, arXiv
2506.08009). Of every `dmd.critic_updates` + 1 updates the last is the student's; the others are the critic's, which starts as the teacher.
Given content, camera and text are the same in all three networks.
"""

from __future__ import annotations

import random
import sys
from functools import partial
from typing import Any

import torch
from kling_programs.train.students import DistillConfig, adapted, frozen_dtype, prepare, publish, sample
from torch import Tensor, nn

from kling.dit.cost import forward_flops
from kling.flow.levels import draw_sigma, sigma_grid
from kling.flow.losses import flow_loss
from kling.flow.matching import matching_target
from kling.flow.path import velocity
from kling.runtime.accelerator import keep_in_fp32, wrap_what_is_there
from kling.runtime.device import upload
from kling.runtime.log import Later
from kling.runtime.parallel import whole
from kling.runtime.random import generator, noise_like
from kling.training.ema import EMA
from kling.training.examples import Example, Examples
from kling.training.health import DeviceGuard
from kling.training.loop import Loop
from kling.training.meter import Meter, log_line, matmul_ceiling
from kling.training.model import Trained, set_checkpointing
from kling.training.optim import make_optimizer, set_lr

NOISED = (0.02, 0.98)  # levels at which the distributions are compared


def train(cfg: DistillConfig, loop: Loop) -> None:
    """The distillation by distribution matching, with the run's folder locked."""
    accelerator, layout, device = loop.accelerator, loop.layout, loop.accelerator.device
    parts = prepare(cfg, loop)
    teacher, guide, data, one = parts.teacher, parts.guide, parts.data, None if layout.sharded else parts.teacher
    student, critic = parts.student, adapted(cfg, Trained(parts.start.transformer({}, frozen_dtype(cfg)), None), one)
    exact = accelerator.mixed_precision == "no"
    nets, optimizers = {}, {}
    wrap_what_is_there(accelerator, student)  # the critic has the same parts
    for name, model, lr in (("student", student, cfg.lr), ("critic", critic, cfg.dmd.critic_lr)):
        set_checkpointing(model.transformer, cfg.activation_checkpointing)
        for embedder in ("time_embedder", "delta_embedder"):
            if (found := getattr(model.transformer.condition_embedder, embedder, None)) is not None:
                keep_in_fp32(accelerator, found)
        optimizer = make_optimizer(cfg.optimizer, model, lr, betas=cfg.betas, weight_decay=cfg.weight_decay, exact=exact)
        nets[name], optimizers[name] = accelerator.prepare(model, optimizer)
    ema = EMA(student, cfg.ema)
    loop.resume(student, optimizers["student"], ema, critic_=(critic, optimizers["critic"]))
    if accelerator.is_main_process:
        print(data.epochs.report(), file=sys.stderr)
    guard = DeviceGuard(device)
    meter = Meter(device, matmul_ceiling(device, torch.float32 if exact else torch.bfloat16))
    grid = sigma_grid(cfg.num_inference_steps, parts.shift).to(device)
    moved = torch.zeros(2, device=device)  # over an update: change between neighbouring frames, of the student's clips and of the data

    for place, (example, start) in loop.batches(Examples(data, parts.drawing, student.transformer, parts.vae), guard, meter):
        turn = "student" if loop.done % (cfg.dmd.critic_updates + 1) == cfg.dmd.critic_updates else "critic"
        model, net, optimizer = {"student": student, "critic": critic}[turn], nets[turn], optimizers[turn]
        example, start = example.to(device), upload(start, device)  # the noise of the roll-out (b, c, G, h, w)
        state, b = example.state, len(start)
        noise = lambda name: noise_like(state.clean, cfg.seed, name, place, range(b))  # noqa: E731, B023
        last = random.Random(f"last/{cfg.seed}/{loop.done}").randrange(cfg.num_inference_steps)  # sharded weights need the same on all
        drawn = draw_sigma((b,), generator(cfg.seed, "sigma", place), "uniform", parts.shift)
        t = upload(drawn.clamp(*NOISED), device)
        meter.lap("data")
        with accelerator.accumulate(net), accelerator.autocast():
            with torch.no_grad():
                words, nothing = parts.words(example)  # (b · S, l, e)
                levels, z = grid[: last + 1], state.noised(grid[:1], start)
                for i in range(last):
                    z = step(nets["student"], example, z, levels[i : i + 1], grid[i + 1 : i + 2], words, noise(f"again/{i}"))
            meter.lap("roll-out")
            with torch.set_grad_enabled(turn == "student"):
                x0 = clean(nets["student"], example, z, levels[last:], words)  # (b, c, G, h, w)
            there = noise("renoised")
            at = partial(noised, example, x0.detach(), t, there)
            if turn == "student":
                with torch.no_grad():
                    z, sigma = at()
                    fake = z - sigma * nets["critic"](example, z, t, (words,)).float()
                    real = z - sigma * guide(partial(teacher, level=t), example, z, words, nothing)
                losses = 0.5 * flow_loss(x0, matching_target(x0.float(), fake, real, state.mask), state.mask)  # (b,)
            else:
                z, _ = at()
                losses = flow_loss(net(example, z, t, (words,)), velocity(x0.float(), there), state.mask)
            meter.lap("forward")
            accelerator.backward(losses.mean())
            meter.lap("backward")
        moved += torch.stack([motion(x0.detach(), state.frames), motion(state.clean, state.frames)])
        passes = last + 3 + (guide.passes(example) + 1 if turn == "student" else 1)
        meter.add(t, losses, b * state.tokens, b * passes * forward_flops(model.transformer.config, state.tokens, words.shape[1]))
        if not accelerator.sync_gradients:
            continue

        # accelerate's own function cannot tell the parameters of two sharded models apart
        norm = whole(nn.utils.clip_grad_norm_(model.parameters(), cfg.clip_grad))  # () on the device, as all here is
        sums = meter.sums(accelerator)  # (2, bins + 1)
        optimizer.optimizer.found_inf = bad = guard.judge(sums[0].sum(), norm)
        set_lr(optimizer, lr := loop.lr(cfg.lr if turn == "student" else cfg.dmd.critic_lr))
        optimizer.step()
        if turn == "student":
            ema.update(student, loop.done // (cfg.dmd.critic_updates + 1), left_out=bad)
        optimizer.zero_grad()
        meter.lap("optimizer")
        speed = meter.close(layout.ranks, accelerator.num_processes)
        numbers = torch.cat([(moved[0] / moved[1].clamp(min=1e-9)).view(1), sums.flatten(), norm.view(1), guard.counts])
        moved = torch.zeros_like(moved)
        loop.update(Later(numbers, partial(line, turn, guard, lr, speed)), clips=b * loop.micro * layout.ranks)
        if parts.asked and loop.due(cfg.sample_every):
            sample(cfg, loop, parts, ema)
            meter.lap("samples")

    publish(cfg, loop, parts)


def step(net: Any, example: Example, z: Tensor, level: Tensor, end: Tensor, words: Tensor, fresh: Tensor) -> Tensor:
    """One sampling step of the student from `level` to `end` (1,), as its solver makes it. (b, c, G, h, w)"""
    state = example.state
    if is_map(net):
        u = net(example, z, level.expand(len(z)), (words,), end.expand(len(z))).float()
        return z - (state.sigma(level) - state.sigma(end)) * u
    x0 = clean(net, example, z, level, words)
    return noised(example, x0, end, fresh)[0]


def clean(net: Any, example: Example, z: Tensor, level: Tensor, words: Tensor) -> Tensor:
    """The clip that the student predicts from z at `level` (1,): a step to level 0. Given elements are exact. (b, c, G, h, w)"""
    state, ends = example.state, torch.zeros_like(level).expand(len(z)) if is_map(net) else None
    v = net(example, z, level.expand(len(z)), (words,), ends).float()
    return torch.where(state.mask > 0, z - state.sigma(level) * v, state.clean)


def noised(example: Example, x0: Tensor, level: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """x0 noised to a level (b,) or (1,), by the tokens' shares of it; and the level of every element (b, 1, G, h, w)."""
    sigma = example.state.sigma(level)
    return (1 - sigma) * x0 + sigma * noise, sigma


def is_map(net: Any) -> bool:
    """Whether a network, perhaps inside a wrapper of DDP, is a flow map."""
    return getattr(net, "module", net).transformer.config.gate_value is not None


def motion(clip: Tensor, frames: int) -> Tensor:
    """Mean change between neighbouring latent frames of the clips (b, c, G, h, w), without appended frames; 0 for single frames. ()"""
    clip = clip[:, :, :frames].float()
    return (clip[:, :, 1:] - clip[:, :, :-1]).abs().mean() if frames > 1 else clip.new_zeros(())


def line(turn: str, guard: DeviceGuard, lr: float, speed: Any, numbers: list[float]) -> dict[str, float]:
    """A step's line in the log. motion: of the student's clips, in parts of the data's: a student that stands still falls below 1."""
    moved, *rest = numbers
    seen = log_line(guard, lr, speed, rest)
    return {f"{turn}/{name}" if name in ("loss", "lr", "grad_norm") else name: value for name, value in seen.items()} | {"motion": moved}
