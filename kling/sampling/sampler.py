"""Sampling with a plan: the expert, its inputs and its guidance at each step, and the scheduler."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from diffusers import SchedulerMixin
from torch import Tensor

from kling.cameras.trajectory import Cameras
from kling.condition.state import State
from kling.dit import KlingTransformer3DModel
from kling.dit.history import History
from kling.dit.walk_cache import WalkCache
from kling.flow.diffusers_scheduler import DiffusersWalk
from kling.flow.guidance import Guidance, given_share
from kling.flow.solvers import SOLVERS, KlingFlowScheduler
from kling.flow.walk import Predict, Scheduler, Step, walk, walk_blocks
from kling.nn.modulation import Levels
from kling.runtime.device import upload
from kling.runtime.random import generator
from kling.sampling.plan import Plan


@dataclass(frozen=True)
class Signals:
    """The inputs of the transformer besides the noise, all on its device.

    text: "prompt" (S, l, e) of S shots, and "negative" (1, l, e). camera: poses, from which the transformer computes rays.
    camera_mask: (1, G) True for the frames that have a camera; None: all.
    concat: channels of the older layouts (1, ·, F, h, w). image: image-encoder tokens (1 or 2, i, image_dim).
    """

    text: dict[str, Tensor]
    camera: Cameras | None = None
    concat: Tensor | None = None
    image: Tensor | None = None
    camera_mask: Tensor | None = None

    def repeated(self, k: int) -> Signals:
        """Those of one clip for k clips that differ in their noise only."""
        one = {"concat": self.concat, "image": self.image, "camera_mask": self.camera_mask}
        wide = {name: None if t is None else t.expand(k, *t.shape[1:]) for name, t in one.items()}
        text = {which: t.repeat(k, 1, 1) for which, t in self.text.items()}  # (k · S, l, e), one clip after another
        return Signals(text, None if self.camera is None else self.camera.repeated(k), **wide)

    @staticmethod
    def joined(parts: Sequence[Signals]) -> Signals:
        """Those of several clips as of one batch. They have the same inputs, of the same shapes; only some may have a camera_mask."""
        first = parts[0]
        whole = {name: torch.cat([getattr(p, name) for p in parts]) for name in ("concat", "image") if getattr(first, name) is not None}
        if any(part.camera_mask is not None for part in parts):
            like = next(part.camera_mask for part in parts if part.camera_mask is not None)  # (1, G)
            rows = [torch.ones_like(like) if part.camera_mask is None else part.camera_mask for part in parts]
            whole["camera_mask"] = torch.cat(rows)
        text = {which: torch.cat([part.text[which] for part in parts]) for which in first.text}  # (b · S, l, e), one clip after another
        return Signals(text, None if first.camera is None else Cameras.joined([part.camera for part in parts]), **whole)


@dataclass(frozen=True)
class Sampler:
    """experts: one transformer, or two, the second of which is used at levels below `boundary`."""

    experts: list[KlingTransformer3DModel]
    boundary: float | None
    scheduler: SchedulerMixin
    plan: Plan

    def __call__(self, state: State, signals: Signals, noise: Tensor, seeds: Sequence[int] = (0,), hop: int = 0) -> Iterator[Step]:
        """From noise (b, c, G, h, w) to the clips; yields after every step. seeds (one per clip), hop: for the noise that few-step weights
        add."""
        plan = self.plan
        for expert in self.experts:
            expert._reset_stateful_cache()  # a step cache may hold results of another clip

        def fresh(start: int = 0, end: int | None = None) -> Callable[[int], Tensor]:
            like, frames = noise[:1, :, start:end], (end or state.frames) - start

            def again(i: int) -> Tensor:
                rows = [draw_noise(like.shape, frames, seed, "renoise", hop, start, i) for seed in seeds]
                return upload(torch.cat(rows).to(like.dtype), like.device)

            return again

        if not plan.block_frames:
            predict = self._predict(state, signals)
            yield from walk(state, self._walker(state, noise.device), predict, noise, fresh(), plan.frame_delay)
            return
        history = {which: History(len(self.experts[0].blocks)) for which in signals.text}

        def remember(block: State, clip: Tensor) -> None:
            clean = noise.new_zeros(1)
            for which, frames in history.items():
                frames.keep(True)
                self._velocity(self.experts[-1], block, signals, which, True, clip, clean, frames)
                frames.keep(False)

        yield from walk_blocks(
            state,
            lambda: self._walker(state, noise.device),
            lambda block: self._predict(block, signals, history),
            noise,
            fresh,
            plan.block_frames,
            remember,
        )

    def _walker(self, state: State, device: torch.device) -> Scheduler:
        """The planned scheduler, at its first step."""
        plan = self.plan
        if plan.solver not in SOLVERS:
            if not state.plain or plan.frame_delay:
                raise ValueError(f"{plan.solver} was planned, and has one level for all elements: plan one of {', '.join(SOLVERS)}")
            return DiffusersWalk(self.scheduler, plan.num_inference_steps, device, plan.shift)
        ours = self.scheduler if isinstance(self.scheduler, KlingFlowScheduler) else KlingFlowScheduler()
        ours.set_timesteps(plan.num_inference_steps, device, plan.shift, plan.solver)
        return ours

    def _predict(self, state: State, signals: Signals, history: dict[str, History] | None = None) -> Predict:
        """The function that computes the guided velocity of a clip. The expert and its guidance follow from the level."""
        plan, keep_text = self.plan, text_counts(state, signals)
        walk_caches: dict[tuple[bool, str], WalkCache] = {}
        share = given_share(*state.host, plan.guidance_reach)
        share = None if share is None else upload(share, state.mask.device)
        without = {"no tracks": plan.brush_guidance_scale, "no references": plan.reference_guidance_scale}
        # of each expert its own: what guidance changed in one is nothing to the other
        guided = [Guidance(plan.guidance_interval, plan.guidance_every, share, without) for _ in self.experts]

        def cache(second: bool, text: str) -> WalkCache:
            if (second, text) not in walk_caches:
                beside = next((kept for (expert, _), kept in walk_caches.items() if expert == second), None)
                walk_caches[second, text] = WalkCache(len(self.experts[second].blocks), keep_text, beside)
            return walk_caches[second, text]

        def predict(z: Tensor, level: Tensor, next_level: Tensor, highest: float) -> Tensor:
            second = len(self.experts) > 1 and highest < self.boundary
            expert, guidance = self.experts[second], plan.guidance_scale_2 if second else plan.guidance_scale
            if second and (False, "prompt") in walk_caches:  # the first expert is not used any more, nor what was cached for it
                walk_caches.clear()
            sigma = state.levels(level, next_level if plan.solver == "flow_map" else None)

            def velocity(which: str, camera: bool) -> Tensor:
                past = None if history is None else history[which]
                return self._velocity(expert, state, signals, which, camera, z, sigma, past, cache(second, text_of(which)))

            return guided[second](velocity, guidance, plan.camera_guidance_scale, signals.camera is not None, highest)

        return predict

    @staticmethod
    def _velocity(
        expert: KlingTransformer3DModel, state: State, signals: Signals, which: str, camera: bool, z: Tensor,
        sigma: Tensor | Levels, history: History | None, walk_cache: WalkCache | None = None,
    ) -> Tensor:  # fmt: skip
        """One pass of one expert: z (b, c, G, h, w) and its level (1,) or (b,), or its tokens' levels -> velocity (b, c, G, h, w)."""
        dtype = expert.dtype
        text, tracks = text_of(which), None if which == "no tracks" else state.tracks
        z = state.without_references(z) if which == "no references" else z
        x = z if signals.concat is None else torch.cat([z, signals.concat], dim=1)
        branch = which if camera or signals.camera is None else "no camera"  # step caches use this name to keep passes apart
        with expert.cache_context(branch) if expert.is_cache_enabled else nullcontext():
            return expert(
                x.to(dtype),
                sigma,
                signals.text[text].to(dtype),
                positions=state.position,
                kinds=state.kind,
                camera=signals.camera if camera else None,
                camera_mask=signals.camera_mask if camera else None,
                tracks=tracks,
                shots=state.shot if len(signals.text[text]) > len(z) else None,  # the negative prompt is that of all shots
                encoder_hidden_states_image=None if signals.image is None else signals.image.to(dtype),
                history=history,
                walk_cache=walk_cache,
            ).sample.float()


def text_of(which: str) -> str:
    """The text of a pass: "negative" or "prompt"."""
    return which if which == "negative" else "prompt"


def draw_noise(shape: Sequence[int], frames: int, seed: int, *name: int | str) -> Tensor:
    """Noise of one clip, of shape (1, c, G, h, w). That of its F = `frames` is drawn first, then that of one appended frame after another:
    a picture more, or less, leaves the noise of the clip as it is."""
    (_, c, G, h, w), draw = shape, generator(seed, *name)
    return torch.cat([torch.randn(1, c, n, h, w, generator=draw) for n in (frames, *[1] * (G - frames))], dim=2)


def text_counts(state: State, signals: Signals) -> bool:
    """Whether caching the text's keys and values is worth it: if the video has 16 times as many tokens, they are below 1 % of a pass, and
    for 512 text tokens the largest models would hold 800 MB of them."""
    return state.tokens < 16 * signals.text["prompt"].shape[1]
