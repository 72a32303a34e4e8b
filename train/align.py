"""Align a model with rewards or preferences: it makes clips, they are judged, and it learns to make more of the better ones.

kling-align configs/align/world-nft.yaml out=runs/obeys       # the shipped model and the small world's truth; run again, it continues
kling-align configs/align/debug.yaml out=/tmp/align           # a minute or two: two rounds of clips, updates, checks, export
kling-align configs/align/wan-1.3b.yaml model=Wan-AI/Wan2.1-T2V-1.3B-Diffusers requests=prompts.jsonl reward_model=MODEL out=runs/aligned

A round: the old policy makes `clips` clips of each of `groups` requests; `updates` updates learn from them; the old policy moves.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kling_programs.train.command import helped
from safetensors.torch import save_file
from torch import Tensor, nn

from kling.config import load_config
from kling.data.image import write_png
from kling.data.strip import strip
from kling.dit.cost import forward_flops
from kling.errors import UserError, program, unknown
from kling.flow.diffusers_scheduler import shift_key
from kling.flow.levels import draw_sigma
from kling.flow.losses import flow_loss
from kling.flow.path import velocity
from kling.flow.preferences import CLIP, advantages, awm_loss, deviation, dpo_loss, nft_loss, norm_hinge, norm_ratio, optimality
from kling.rewards.local import model_reward
from kling.rewards.pixels import REWARDS
from kling.rewards.reward import Judge, Reward
from kling.rewards.world import TERMS, WorldRequests, world_reward
from kling.runtime.accelerator import keep_in_fp32, wrap_what_is_there
from kling.runtime.checkpoint import Rows
from kling.runtime.device import upload
from kling.runtime.files import written
from kling.runtime.log import Later
from kling.runtime.parallel import same_for_all, same_rng, total, whole
from kling.runtime.random import generator, noise_like
from kling.sampling.pipeline import KlingPipeline, load_vae
from kling.sampling.request import Request
from kling.text import ByteTextEncoder
from kling.text.umt5 import UMT5TextEncoder
from kling.training.ema import EMA, Follower, load_average, restore_average
from kling.training.export import save_pipeline
from kling.training.health import DeviceGuard
from kling.training.loop import Loop
from kling.training.lora import Lora, add_lora, check_half, export_lora
from kling.training.meter import Meter, log_line, matmul_ceiling
from kling.training.model import Trained, set_checkpointing
from kling.training.optim import check_names, make_optimizer, set_lr
from kling.training.rollout import (
    Asking,
    Group,
    Places,
    RequestFile,
    belong,
    cached,
    check_even,
    chunk,
    example_of,
    falls,
    forget,
    history,
    left_out,
    make_group,
    passed,
    read_checks,
    read_pair,
    round_folder,
    seeds_of,
    start_of,
    write_checks,
)
from kling.training.start import SHIPPED, Start, open_start

METHODS = ("nft", "dpo", "awm")
KNOWN = (*TERMS, *(term for reward in REWARDS for term in reward.terms), "model")  # terms of rewards
STRIP = 4  # clips of a strip
PASSED = "passed.safetensors"  # averaged weights of the last check that passed


@dataclass
class World:
    """The small world that is asked about, and its judge.

    frames: of a clip, 1 + 4k. aspect: of its picture. examples: rendered clips to fit the detectors to.
    """

    frames: int = 17
    aspect: str = "16:9"
    examples: int = 400


@dataclass
class AlignConfig:
    """All settings of an alignment.

    out: folder of the run: checkpoints, metrics.jsonl, rollouts, strips, checks.json, and the model in export/ or lora/.
    model: a model folder, ours, published or shipped.
    checkpoint: the registry's name of it, if its files do not tell. vae: a VAE folder; empty for the model's.
    method: nft (DiffusionNFT), dpo (the best and the worst clip of a group, or given pairs) or awm (advantage-weighted matching).
    requests: world, or a jsonl file with the fields of one request in each line; cycled through.
    pairs: a jsonl file instead: fields of a request, and the videos `win` and `lose`; for dpo.
    request: fields that the requests of rounds share, such as fewer steps; those of a line go first. Guidance is the model's own, so that
    rewards judge what users get: what it does already need not be learned.
    check_request: likewise for checks, which otherwise use the model's own steps and guidance.
    asks: if requests is world, how often each is drawn: text (one thing, static camera), plain (the same, no camera given), camera, words
    (the camera by words alone), things (two of them).
    rewards: weight of each term, 0 leaves it out. colour, solid, ground, motion, count, permanence and camera judge the small world by its
    truth, magnitude is how much moves, and model is `reward_model`.
    reward_model: folder of a transformers model that scores clips: a dual encoder such as CLIP, or one that answers questions.
    checker: terms that check the policy on held-out requests, and that no reward may use.
    checks: number of held-out requests. check_every: updates between checks, 0 is never. If the checker is below three quarters of its
    first value in two checks in a row, or falls in three in a row that are below 0.85 of it, the run exports the weights of the last check
    above that, and ends.
    groups: requests of a round, over all processes. clips: of each request. updates: of a round. batch: clips of a micro-step, of one
    request; for dpo as pairs.
    b: of nft: a smaller one goes further at once. beta: of dpo. clip: of awm's ratio.
    jitter: deviation of the rewards that means nothing: that of a round, by which advantages are measured, counts as at least this; dpo
    learns from pairs that differ by more.
    null: share of the clips that learn nothing from rewards: without text, camera, tracks or references, where the guidance of roll-outs
    leaves these out, the velocity is only held to the start's.
    kl: weight of the squared distance of the velocity from the start's (from the old policy's for awm).
    hinge: weight of the velocity's growth over the start's.
    follow: the old policy's decay after round i is `follow` times i. follow_most: at most this, 0 to below 1.
    steps: updates of the weights, in all. seed: of all random draws. optimizer: adamw or muon, with the same lr. lr: highest learning rate.
    betas: of the optimizer's moments. warmup: updates in which lr rises from 0. schedule: constant or cosine, after the warmup.
    floor: fraction of lr at the end of cosine. weight_decay: of matrices, relative to lr. clip_grad: largest norm of the gradients.
    ema: decay of the averaged weights, per update.
    lora: train low-rank weights, to be loaded beside the model, or merged.
    save_every: updates between checkpoints. keep_last: checkpoints to keep. keep_every: also keep those of multiples of this, 0 keeps none.
    log_every: updates between lines of the log.
    mixed_precision: auto (measured), bf16 or fp32. gradient_accumulation: micro-steps of an update.
    activation_checkpointing: none, selective or full. trackers: tensorboard, wandb or both, in addition to metrics.jsonl.
    threads: CPU threads per operation, null is OMP_NUM_THREADS or all cores.
    """

    out: str = "runs/align"
    model: str = SHIPPED
    checkpoint: str | None = None
    vae: str = ""
    method: str = "nft"
    requests: str = "world"
    pairs: str = ""
    request: dict[str, Any] = field(default_factory=lambda: {"num_inference_steps": 10})
    check_request: dict[str, Any] = field(default_factory=dict)
    asks: dict[str, float] = field(default_factory=lambda: {"text": 1.0, "plain": 1.0, "camera": 1.0, "words": 1.0, "things": 1.0})
    world: World = field(default_factory=World)
    rewards: dict[str, float] = field(default_factory=dict)
    reward_model: str = ""
    checker: list[str] = field(default_factory=list)
    checks: int = 8
    check_every: int = 0
    groups: int = 8
    clips: int = 12
    updates: int = 8
    batch: int = 12
    b: float = 1.0
    beta: float = 2000.0
    clip: float = 0.2
    jitter: float = 0.05
    null: float = 0.1
    kl: float = 1e-4
    hinge: float = 0.01
    follow: float = 0.001
    follow_most: float = 0.5
    steps: int = 400
    seed: int = 0
    optimizer: str = "adamw"
    lr: float = 1e-4
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    warmup: int = 10
    schedule: str = "constant"
    floor: float = 0.02
    weight_decay: float = 0.0
    clip_grad: float = 1.0
    ema: float = 0.9
    lora: Lora = field(default_factory=Lora)
    save_every: int = 50
    keep_last: int = 2
    keep_every: int = 0
    log_every: int = 1
    mixed_precision: str = "auto"
    gradient_accumulation: int = 1
    activation_checkpointing: str = "none"
    trackers: list[str] = field(default_factory=list)
    threads: int | None = None
    workers = 0  # of `Loop`: its batches are only places


@program
def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if helped("kling-align", argv):
        return
    cfg = load_config(AlignConfig, argv[0], argv[1:])
    check(cfg)
    cfg.vae = cfg.vae or ("" if cfg.model == SHIPPED else cfg.model)
    with Loop(cfg) as loop:
        train(cfg, loop)


def check(cfg: AlignConfig) -> None:
    """Raises `UserError` for settings that do not go together."""
    check_names(cfg.optimizer, cfg.schedule, cfg.betas)
    if cfg.method not in METHODS:
        raise unknown("method", cfg.method, METHODS)
    if cfg.pairs and cfg.method != "dpo":
        raise UserError(f"pairs {cfg.pairs} with method {cfg.method}: pairs are for dpo, the other methods need rewards")
    if cfg.pairs and cfg.requests != "world":
        raise UserError(f"pairs {cfg.pairs} and requests {cfg.requests} are both set: each line of pairs is a request too; leave one out")
    if cfg.pairs and cfg.clips != 2:
        raise UserError(f"clips {cfg.clips}: a given pair has two; set clips=2 batch=2")
    for term in (*cfg.rewards, *cfg.checker):
        if term not in KNOWN:
            raise unknown("reward", term, KNOWN)
    for term, weight in cfg.rewards.items():
        if not 0 <= weight < math.inf:
            raise UserError(f"rewards.{term} = {weight:g}: give 0 or more")
    if cfg.pairs and counted(cfg):
        raise UserError("rewards and pairs are both set: pairs say which clip is better; leave rewards out, or measure them as checker")
    if not cfg.pairs and not counted(cfg):
        raise UserError(f"no reward counts: give at least one of {', '.join(KNOWN)} a weight, such as rewards.motion=1")
    if cfg.clips < 2:
        raise UserError(f"clips {cfg.clips}: a clip is compared with others of its request; give at least 2")
    if cfg.method == "dpo" and (cfg.batch % 2 or cfg.batch > cfg.clips):
        raise UserError(f"batch {cfg.batch}: dpo takes pairs out of {cfg.clips} clips; give an even number of at most that")
    if cfg.method != "dpo" and cfg.clips % cfg.batch:
        raise UserError(f"clips {cfg.clips} do not divide into micro-steps of batch={cfg.batch}: change one of them")
    if "model" in used(cfg) and not cfg.reward_model:
        raise UserError("the term model needs reward_model: give the folder of a transformers model")
    if cfg.check_every and not cfg.checker:
        raise UserError("check_every is set but not checker: name terms that no reward uses, such as checker=[permanence]")
    if cfg.checker and not cfg.check_every:
        raise UserError("checker is set but not check_every: say every how many updates")
    if (cfg.pairs or cfg.requests != "world") and (asked := set(TERMS) & used(cfg)):
        raise UserError(f"the term {min(asked)} needs the small world's truth, which no file has: take others, or the world's requests")
    if cfg.world.examples < 20:
        raise UserError(f"world.examples {cfg.world.examples}: the detectors need more to tell solids and motions apart; give at least 20")
    for name, value in (("b", cfg.b), ("beta", cfg.beta), ("clip", cfg.clip), ("jitter", cfg.jitter)):
        if value <= 0:
            raise UserError(f"{name} {value:g}: give a number above 0")
    for name, method in (("b", "nft"), ("beta", "dpo"), ("clip", "awm")):
        if cfg.method != method and getattr(cfg, name) != getattr(AlignConfig, name):
            raise UserError(f"{name} {getattr(cfg, name):g} belongs to method {method}, and this run's is {cfg.method}: leave it out")
    if not 0 <= cfg.null < 1:
        raise UserError(f"null {cfg.null:g}: give a number from 0 to below 1, such as 0.1")
    if cfg.reward_model and "model" not in used(cfg):
        raise UserError(f"reward_model {cfg.reward_model} would not be asked: set rewards.model=1, or name model as a checker")
    for name, value in (("kl", cfg.kl), ("hinge", cfg.hinge), ("follow", cfg.follow)):
        if value < 0:
            raise UserError(f"{name} {value:g}: give 0 or more")


def train(cfg: AlignConfig, loop: Loop) -> None:
    """The alignment, with the run's folder locked."""
    out, accelerator, layout = loop.out, loop.accelerator, loop.layout
    device = accelerator.device
    if layout.split > 1:
        raise UserError("kling-align does not share a clip between processes: take a layout without context parallelism, such as fsdp2")
    if cfg.groups % layout.ranks:
        raise UserError(f"groups {cfg.groups} do not divide over {layout.ranks} processes: give a multiple")
    check_half(cfg.lora, accelerator.mixed_precision)
    start = open_start(cfg.model, cfg.checkpoint, expert=None)
    asking, held = requests(cfg, start)
    for fields, base in ((asking(0)[0], cfg.request), (held(0)[0], cfg.check_request)):
        if taken := {"seed", "num_videos"} & {*fields, *base}:
            raise UserError(f"{min(taken)} is set in a request: the clips of a group follow from the run's seed and clips; leave it out")
        if cfg.requests == "world" and not cfg.pairs and (idle := base.keys() & fields_of(fields).keys()):
            raise UserError(f"request.{min(idle)} would be ignored: every request of the small world has its own; leave it out")
        Request(**{**base, **fields_of(fields)})  # raises for unknown fields, before anything is loaded
    known = rewards(cfg, device)
    judge = None if cfg.pairs else Judge(known, counted(cfg))
    examiner = Judge(known, counted(cfg), cfg.checker) if cfg.check_every else None
    vae, text = load_vae(cfg.vae).to(device), start.text({}, out)
    if start.published and isinstance(asking, RequestFile) and accelerator.is_main_process:  # before the transformer takes the memory
        pairs = ((cfg.request, asking), (cfg.check_request, held))
        prompts = start.prompts([Request(**{**base, **fields_of(row)}) for base, source in pairs for row in source.rows])
        for _ in text.learn(sorted({"", *prompts}), device):
            pass
    if accelerator.is_main_process:
        belong(out, loop.config, [start.folder, *(Path(name) for name in (cfg.vae, cfg.reward_model, cfg.requests, cfg.pairs) if name)])
    accelerator.wait_for_everyone()

    torch.manual_seed(cfg.seed)  # of low-rank weights; every later draw is counter-based
    model = build(cfg, start)
    transformer = model.transformer
    if isinstance(text, ByteTextEncoder):
        text = text.to(device).eval().requires_grad_(False)
    scheduler = start.settings["scheduler"]
    density, shift = scheduler.config.get("density", "logit_normal"), scheduler.config[shift_key(scheduler)]
    set_checkpointing(transformer, cfg.activation_checkpointing)
    keep_in_fp32(accelerator, transformer.condition_embedder.time_embedder)
    exact = accelerator.mixed_precision == "no"
    optimizer = make_optimizer(cfg.optimizer, model, cfg.lr, betas=cfg.betas, weight_decay=cfg.weight_decay, exact=exact)
    wrap_what_is_there(accelerator, model)
    net, optimizer = accelerator.prepare(model, optimizer)
    ema, old, ref = EMA(model, cfg.ema), Follower(model, cfg.follow, cfg.follow_most), Follower(model)  # ref stays what it is: the start
    loop.resume(model, optimizer, ema, {"old": old})
    pipe = pipeline(model, vae, text, start)
    guard = DeviceGuard(device)
    meter = Meter(device, matmul_ceiling(device, torch.float32 if exact else torch.bfloat16))
    matching = {"nft": CLIP / cfg.b, "awm": 1.0, "dpo": cfg.beta / 4}[cfg.method]  # weight of flow matching in the gradient
    beside = torch.zeros(5, device=device)  # sums over an update: KL, |v| / |v_ref|, the hinge, |log ratio| of awm, samples

    def roll_out(number: int, folder: Path) -> list[Group]:
        """The groups of a round, each made by one process and read by all. A signal may stop it between two: their files stay."""
        found, made, rows = [], False, [asking(number * cfg.groups + g)[0] for g in range(cfg.groups)]
        paths = [folder / f"{g:03d}.safetensors" for g in range(cfg.groups)]
        asked = [pipe.ask(Request(**{**cfg.request, **fields_of(fields)})) for fields in rows]
        with old.swap(model), same_rng(device), accelerator.autocast(), torch.no_grad():
            transformer.eval()
            for j in range(cfg.groups // layout.ranks):
                loop.leave()
                g = j * layout.ranks + layout.rank
                lacks = float(total(accelerator, torch.tensor(float(not paths[g].is_file()), device=device)))
                if lacks:  # of any process: sharded weights need all of them
                    made = True
                    cached(paths[g], partial(one_group, number * cfg.groups + g, asked[g], start_of(folder)), again=True)
            transformer.train()
        accelerator.wait_for_everyone()
        stored = [cached(path, dict) for path in paths]
        for g, tensors in enumerate(stored):
            gained = tensors["terms"][:, 0] if cfg.pairs else judge.total(tensors["terms"])
            found.append(Group(asked[g], tensors["latents"], gained))
        if made:
            gains = [group.rewards for group in found]
            means = {"rollout/reward": mean(gains), "rollout/deviation": deviation(gains)}
            loop.log(summary(("win",) if cfg.pairs else judge.terms, stored) | means)
        return found

    def one_group(index: int, asked: Any, place: int) -> dict[str, Tensor]:
        fields, truth = asking(index)
        if cfg.pairs:
            return read_pair(pipe, asked, fields)
        seeds = seeds_of(cfg.seed, index, cfg.clips, place)
        return make_group(pipe, asked, Request(**{**cfg.request, **fields}), truth, judge, seeds)[0]

    def look(step: int) -> None:
        """Check the averaged weights on held-out requests, and keep them if they pass."""
        results, clips = [], []
        with ema.swap(model), same_rng(device), accelerator.autocast(), torch.no_grad():
            transformer.eval()
            for i in range(cfg.checks):
                fields, truth = held(i)
                request = Request(**{**cfg.check_request, **fields_of(fields)})
                stored, videos = make_group(pipe, pipe.ask(request), request, truth, examiner, seeds_of(cfg.seed + 1, i, 2))
                results.append(stored)
                clips.append(videos[0])
            transformer.train()
        values = summary(examiner.terms, results, "check")
        values["check/checker"] = mean([torch.tensor([values[f"check/{term}"] for term in cfg.checker])])
        loop.log(values)
        checks = read_checks(out / "checks.json", step) | {step: values}
        if accelerator.is_main_process:
            write_checks(out / "checks.json", checks)
            show(out, step, clips[:STRIP])
        if not same_for_all(accelerator, int(not passed([*history(checks).values()]))):
            average = {name: whole(x).cpu().contiguous() for name, x in ema.average.items()}  # of every process its part
            if accelerator.is_main_process:
                with written(out / PASSED) as temporary:
                    save_file(average, temporary)
        end_if_hacked(step)

    def end_if_hacked(step: int) -> None:
        """Export the last weights that passed and end the run, if what no reward uses got worse and stayed so."""
        accelerator.wait_for_everyone()  # until the main process has written it
        found = history(read_checks(out / "checks.json", step))
        if not same_for_all(accelerator, int(falls([*found.values()]))):
            return
        if accelerator.is_main_process:
            publish(cfg, vae, text, out, start, out / PASSED)
        accelerator.wait_for_everyone()
        first, *_, a, b = found.values()
        good = max(s for s, value in found.items() if passed([first, value]))
        raise UserError(
            f"the checker ({', '.join(cfg.checker)}) began at {first:.3f} and was {a:.3f} and {b:.3f} in the last two checks: the policy "
            f"hacks its rewards. The run ends at update {step}, and {result(cfg)} has the weights of update {good}, the last that passed; "
            "change the rewards, in another out"
        )

    if cfg.check_every:
        end_if_hacked(loop.done)
    if layout.sharded and not cfg.pairs:
        last = cfg.groups * math.ceil(cfg.steps / cfg.updates)
        check_even(pipe, [Request(**{**cfg.request, **asking(i)[0]}) for i in range(last)], layout.ranks)
    if layout.sharded:  # FSDP2 takes the module of the first forward pass as the root, and sampling calls the transformer alone
        asked = pipe.ask(Request(**{**cfg.request, **fields_of(asking(0)[0])}))
        clip = asked.state.clean[:, :, : asked.state.frames]  # (1, c, F, h, w)
        example, words = example_of(asked, clip, transformer, pipe)
        with torch.no_grad(), accelerator.autocast():
            net(example, example.state.clean, torch.ones(1, device=device), (words,))
    number, folder, groups, scale = -1, out, [], 1.0
    unseen = cfg.check_every and same_for_all(accelerator, int(loop.done == 0 and not read_checks(out / "checks.json", 0)))
    for place, _ in loop.batches(Places(), guard, meter):
        if unseen:
            look(0)
            unseen = 0
        if number != loop.done // cfg.updates:
            number = loop.done // cfg.updates
            folder = round_folder(out, number, loop.places, loop.done % cfg.updates == 0)
            groups = roll_out(number, folder)
            scale = max(deviation([group.rewards for group in groups]), cfg.jitter)
            meter.lap("rollout")
        group, rows = chunk(groups, cfg.batch, cfg.seed, number, place - start_of(folder), cfg.method == "dpo")
        b, advantage = len(rows), upload(advantages(group.rewards, scale)[rows], device)  # (b,)
        example, words = example_of(group.asked, group.latents[rows].to(device), transformer, pipe)
        pairs = [i // 2 if cfg.method == "dpo" else i for i in range(b)]  # the two clips of a pair have the same noise and level
        if cfg.null:
            example, words, bare = left_out(example, words, group.asked, cfg.null, generator(cfg.seed, "null", place), pairs)  # (b,)
        state = example.state
        noise = noise_like(state.clean, cfg.seed, "noise", place, pairs)  # (b, c, G, h, w)
        t = upload(draw_sigma((b,), generator(cfg.seed, "sigma", place), density, shift)[pairs], device)  # (b,)
        z, target = state.noised(t, noise), velocity(state.clean, noise)
        meter.lap("data")
        with torch.no_grad():  # each with an autocast of its own, which remembers the weights that it has cast
            with ref.swap(model), accelerator.autocast():
                v_ref = net(example, z, t, (words,)).float()
            if cfg.method != "dpo":  # which compares with the start
                with old.swap(model), accelerator.autocast():
                    v_old = net(example, z, t, (words,)).float()
        meter.lap("policies")
        with accelerator.accumulate(net):
            with accelerator.autocast():
                v = net(example, z, t, (words,)).float()
            if cfg.method == "nft":
                losses = nft_loss(v, v_old, z, state.clean, state.sigma(t), state.mask, optimality(advantage), cfg.b)  # (b,)
            elif cfg.method == "awm":
                losses = awm_loss(v, v_old, target, state.mask, advantage, cfg.clip)
            else:
                differ = group.rewards[rows[::2]] - group.rewards[rows[1::2]] > cfg.jitter
                losses = dpo_loss(v, v_ref, target, state.mask, cfg.beta) * upload(differ, device)  # (b / 2,)
            moved, hinge = flow_loss(v, v_ref, state.mask), norm_hinge(v, v_ref, state.mask)  # (b,)
            distance, ratio = moved, torch.zeros_like(moved)
            if cfg.method == "awm":
                distance, ratio = flow_loss(v, v_old, state.mask), flow_loss(v_old, target, state.mask) - flow_loss(v, target, state.mask)
            if cfg.null:
                still = matching * moved.view(len(losses), -1).mean(1)
                losses = torch.where(bare.view(len(losses), -1)[:, 0], still, losses)
            beside += torch.stack([moved.sum(), norm_ratio(v, v_ref, state.mask).sum(), hinge.sum(),
                                   ratio.abs().sum(), torch.tensor(float(b), device=device)]).detach()  # fmt: skip
            meter.lap("forward")
            accelerator.backward(losses.mean() + cfg.kl * distance.mean() + cfg.hinge * hinge.mean())
            meter.lap("backward")
        levels = t[::2] if cfg.method == "dpo" else t
        passes = 4 if cfg.method == "dpo" else 5  # of the start, the old policy and the policy, whose gradient is worth two
        meter.add(levels, losses, b * state.tokens, passes * b * forward_flops(transformer.config, state.tokens, words.shape[1]))
        if not accelerator.sync_gradients:
            continue

        norm = whole(accelerator.clip_grad_norm_(model.parameters(), cfg.clip_grad))  # () on the device, as all here is
        sums, also = meter.sums(accelerator), total(accelerator, beside.clone())  # (2, bins + 1), (5,)
        beside.zero_()
        optimizer.optimizer.found_inf = bad = guard.judge(sums[0].sum(), norm)
        set_lr(optimizer, lr := loop.lr(cfg.lr))
        optimizer.step()
        ema.update(model, loop.done, left_out=bad)
        if (loop.done + 1) % cfg.updates == 0:
            old.update(model, (loop.done + 1) // cfg.updates)
        optimizer.zero_grad()
        meter.lap("optimizer")
        speed = meter.close(layout.ranks, accelerator.num_processes)
        numbers = torch.cat([also, sums.flatten(), norm.view(1), guard.counts])
        loop.update(Later(numbers, partial(told, guard, lr, speed, cfg.method)), clips=b * loop.micro * layout.ranks)
        if accelerator.is_main_process:
            forget(out, cfg.updates, cfg.keep_last)
        if loop.due(cfg.check_every):
            look(loop.done)
            meter.lap("check")

    if accelerator.is_main_process:
        publish(cfg, vae, text, out, start)
    loop.finish(result(cfg))


def requests(cfg: AlignConfig, start: Start) -> tuple[Asking, Asking]:
    """The requests of the rounds, and those held out for checks."""
    if cfg.pairs:
        return RequestFile(cfg.pairs, cfg.checks * bool(cfg.check_every), pairs=True), RequestFile(cfg.pairs, max(1, cfg.checks), True)
    if cfg.requests != "world":
        return RequestFile(cfg.requests, cfg.checks * bool(cfg.check_every)), RequestFile(cfg.requests, max(1, cfg.checks), heldout=True)
    camera, world = "camera" in start.settings.get("capabilities", ()), cfg.world
    return tuple(WorldRequests(cfg.seed, world.frames, world.aspect, cfg.asks, camera, split) for split in ("train", "heldout"))


def fields_of(row: dict[str, Any]) -> dict[str, Any]:
    """The fields of a request, without the videos of a pair."""
    return {key: value for key, value in row.items() if key not in ("win", "lose")}


def rewards(cfg: AlignConfig, device: torch.device) -> list[Reward]:
    """All rewards whose terms can be used; a model among them is on the device."""
    found = list(REWARDS)
    if used(cfg) & set(TERMS):
        found.append(world_reward(cfg.seed, cfg.world.frames, cfg.world.aspect, cfg.world.examples))
    return [*found, model_reward(cfg.reward_model, device)] if cfg.reward_model else found


def counted(cfg: AlignConfig) -> dict[str, float]:
    """The terms that count, with their weights."""
    return {term: weight for term, weight in cfg.rewards.items() if weight}


def used(cfg: AlignConfig) -> set[str]:
    """The terms that count or check."""
    return {*counted(cfg), *cfg.checker}


def build(cfg: AlignConfig, start: Start) -> Trained:
    """The policy: the model, or low-rank weights on it."""
    frozen = torch.bfloat16 if cfg.lora.rank and cfg.lora.half else torch.float32
    model = Trained(start.transformer({}, frozen), None)
    if cfg.lora.rank:
        add_lora(model, cfg.lora)
    return model.train()


def pipeline(model: Trained, vae: nn.Module, text: ByteTextEncoder | UMT5TextEncoder, start: Start) -> KlingPipeline:
    """The policy as a user gets it, with all settings of the start."""
    return KlingPipeline(vae, text_encoder=text, **start.other_models(model.transformer), **start.settings)


def mean(values: list[Tensor]) -> float:
    """The mean of all numbers but NaN; NaN of none."""
    return float(torch.cat([x.flatten().float() for x in values]).nanmean())


def summary(terms: tuple[str, ...], groups: list[dict[str, Tensor]], title: str = "rollout") -> dict[str, float]:
    """Means over groups: of each term, of the speed in short sides per frame, and of the diversity within a group."""
    found = {f"{title}/{term}": mean([group["terms"][:, i] for group in groups]) for i, term in enumerate(terms)}
    return found | {f"{title}/{name}": mean([group[name] for group in groups]) for name in ("speed", "diversity")}


def told(guard: DeviceGuard, lr: float, speed: Any, method: str, numbers: list[float]) -> dict[str, float]:
    """A step's line in the log."""
    kl, norm, hinge, ratio, count, *rest = numbers
    values = {"kl": kl, "norm_ratio": norm, "hinge": hinge} | ({"log_ratio": ratio} if method == "awm" else {})
    return log_line(guard, lr, speed, rest) | {name: value / count for name, value in values.items()}


def show(out: Path, step: int, clips: list[Tensor]) -> None:
    """Write a strip of the same requests and seeds: the start's clip above the present one, for each."""
    before = out / "strips" / "start.npz"
    if step == 0 or not before.is_file():
        with written(before) as temporary, open(temporary, "wb") as file:
            np.savez_compressed(file, **{str(i): clip.numpy() for i, clip in enumerate(clips)})
    with np.load(before, allow_pickle=False) as first:
        rows = [row for i, clip in enumerate(clips) for row in (torch.from_numpy(first[str(i)]), clip)]
    write_png(out / "strips" / f"{step:08d}.png", strip(rows).numpy())


def result(cfg: AlignConfig) -> Path:
    """The folder of the result."""
    return Path(cfg.out) / ("lora" if cfg.lora.rank and not cfg.lora.merge else "export")


def publish(
    cfg: AlignConfig, vae: nn.Module, text: ByteTextEncoder | UMT5TextEncoder, out: Path, start: Start, average: Path | None = None
) -> None:
    """Export averaged weights: those of a file, or of the last checkpoint."""
    model = build(cfg, start)
    if average is None:
        restore_average(out, model)
    else:
        load_average(Rows([average]), model)
    if cfg.lora.rank:
        export_lora(model.transformer, out / "lora")
        if not cfg.lora.merge:
            return
        model.transformer.fuse_lora()
        model.transformer.unload_lora()
    save_pipeline(pipeline(model, vae, text, start), out / "export")


if __name__ == "__main__":
    main()
