"""Distil a model: the same clips in a few steps of one pass each, with its guidance built in.

kling-distill configs/distill/world.yaml out=runs/fast        # the shipped model; run again, the same command continues
kling-distill configs/distill/debug.yaml out=/tmp/fast        # under a minute, data and cache included

Method flow_map, below: the student starts as the teacher and learns the mean velocity between any two noise levels
(kling/flow/flow_map.py), so that a step of any length is one pass. Method dmd is in distill_dmd.py.
"""

from __future__ import annotations

import sys
from functools import partial

import torch
from kling_programs.train.command import helped
from kling_programs.train.students import DistillConfig, prepare, publish, sample

from kling.config import load_config
from kling.dit.cost import forward_flops
from kling.errors import program
from kling.flow.flow_map import composed_target, draw_steps, flow_map_target, whole_part
from kling.flow.losses import flow_loss
from kling.flow.path import velocity
from kling.runtime.accelerator import keep_in_fp32, wrap_what_is_there
from kling.runtime.device import upload
from kling.runtime.log import Later
from kling.runtime.parallel import whole
from kling.runtime.random import generator
from kling.training.ema import EMA
from kling.training.examples import Examples
from kling.training.health import DeviceGuard
from kling.training.loop import Loop
from kling.training.meter import Meter, log_line, matmul_ceiling
from kling.training.model import set_checkpointing
from kling.training.optim import make_optimizer, set_lr


@program
def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if helped("kling-distill", argv):
        return
    cfg = load_config(DistillConfig, argv[0], argv[1:])
    cfg.check()
    with Loop(cfg) as loop:
        if cfg.method == "dmd":
            from kling_programs.train import distill_dmd

            distill_dmd.train(cfg, loop)
        else:
            train(cfg, loop)


def train(cfg: DistillConfig, loop: Loop) -> None:
    """The distillation into a flow map, with the run's folder locked."""
    accelerator, layout, device, how = loop.accelerator, loop.layout, loop.accelerator.device, cfg.flow_map
    parts = prepare(cfg, loop)
    model, teacher, guide, data = parts.student, parts.teacher, parts.guide, parts.data
    transformer = model.transformer
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

    for place, (example, noise) in loop.batches(Examples(data, parts.drawing, transformer, parts.vae), guard, meter):
        example, noise = example.to(device), upload(noise, device)  # noise (b, c, G, h, w)
        state, b = example.state, len(noise)
        still = whole_part(b, how.plain, generator(cfg.seed, "plain", place))  # samples with steps of length 0
        drawn = draw_steps(b, still, generator(cfg.seed, "sigma", place), parts.density, parts.shift, how.to_clean, how.counts)
        t, r = (upload(x, device) for x in drawn)
        z = state.noised(t, noise)  # (b, c, G, h, w)
        meter.lap("data")
        with torch.no_grad():
            words, nothing = parts.words(example)  # (b · S, l, e)
            with accelerator.autocast():
                if how.velocity == "teacher":
                    v = guide(partial(teacher, level=t), example, z, words, nothing)
                else:
                    v = guide(partial(net, level=t), example, z, words, nothing, velocity(state.clean, noise))
            target = v.clone()
            first = min(still, b - 1) if layout.sharded else still  # every process of a sharded run makes these passes; a target of v stays
            if first < b:
                moving, heard = example.rows(first), words[first * len(words) // b :]  # of every shot
                mean = lambda z, t, r: net(moving, z, t, (heard,), r, exact=not how.stride)  # noqa: E731, B023
                there = z[first:], v[first:], t[first:], r[first:], moving.state.mask
                with accelerator.autocast():
                    if how.stride:
                        target[first:] = composed_target(mean, *there, parts.shift, how.stride)
                    else:
                        target[first:] = flow_map_target(mean, *there, how.delta)
        meter.lap("target")
        with accelerator.accumulate(net):
            with accelerator.autocast():
                u = net(example, z, t, (words,), r)
            losses = flow_loss(u, target, state.mask)  # (b,)
            if how.velocity == "data" and 0 < still < b:  # only steps of length 0 have the data's noise: scale both parts to the same size
                size = losses[:still].mean() / losses[still:].clamp(min=1e-6)
                losses = torch.cat([losses[:still], losses[still:] * size.detach()])
            meter.lap("forward")
            accelerator.backward(losses.mean())
            meter.lap("backward")
        guided = guide.passes(example) - (how.velocity == "data")  # whose unguided velocity is given
        passes = 3 + guided + (1 if how.stride else 2) * (b - first) / b
        meter.add(t, losses, b * state.tokens, b * passes * forward_flops(transformer.config, state.tokens, words.shape[1]))
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
        if parts.asked and loop.due(cfg.sample_every):
            sample(cfg, loop, parts, ema)
            meter.lap("samples")

    publish(cfg, loop, parts)


if __name__ == "__main__":
    main()
