"""Several clips sampled as one batch: one request with several seeds, or requests of one shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kling.cameras.trajectory import Trajectory
from kling.condition.state import State
from kling.errors import UserError
from kling.runtime.device import upload
from kling.sampling.inputs import Inputs
from kling.sampling.plan import Plan
from kling.sampling.request import Request
from kling.sampling.sampler import Sampler, Signals, draw_noise


class Asked(NamedTuple):
    """A request for one clip, resolved: what is given of it, and the other inputs of the transformer, for a batch of one, on its device."""

    plan: Plan
    state: State
    signals: Signals


def batch_key(asked: Asked) -> Any:
    """What clips must have in common to be sampled as one batch: all settings, the shapes of all inputs, and the number of references;
    their task and cuts are in their states."""
    plan, state, signals = asked
    shapes = [None if t is None else t.shape for t in (state.clean, state.tracks, state.shot, signals.concat, signals.image)]
    camera = None if signals.camera is None else (signals.camera.c2w.shape, signals.camera.size, signals.camera.references)
    settings = replace(plan, task="", hops=[], cuts=(), notes=(), tokens=0)
    words = tuple((which, t.shape) for which, t in signals.text.items())
    return repr((settings, shapes, state.frames, state.references, state.sigma_c, camera, words))


class Batches:
    """The part of `KlingPipeline` that makes several clips at once."""

    @torch.no_grad()
    def ask(self, request: Request) -> Asked:
        """Everything that a request's clip is sampled from, except the noise. For `sample_group`, and for training on what it made.

        Raises `UserError` for a request that one clip does not answer: in several hops, block by block, or a loop without a first frame.
        """
        request, plan, inputs, camera = self._prepare(request)
        if not self._one_clip(request, plan):
            raise UserError(f"'{request.prompt[:40]}' takes more than one clip: ask for fewer frames, and no loop without a first frame")
        if self._looks_at_both:
            raise UserError("these weights look at the first and the last frame together, which no group of clips can share: take others")
        return self._asked(request, plan, inputs, camera)

    @torch.no_grad()
    def sample_group(self, asked: Asked, seeds: Sequence[int]) -> Tensor:
        """Latents (k, c, F, h, w) of one request with k seeds, sampled as one batch; each starts from the noise of its seed."""
        return self._sample(Asked(asked.plan, asked.state.repeated(len(seeds)), asked.signals.repeated(len(seeds))), seeds)

    @torch.no_grad()
    def together(self, requests: Sequence[Request]) -> list[Tensor]:
        """The clips (T, H, W, 3) uint8 of several requests for one video each, equal to those of single calls up to rounding.

        Requests of one shape are sampled and decoded as one batch, which costs a GPU hardly more than one clip of a small model. A request
        that one clip does not answer (see `ask`), or of which a part is given, is made alone.
        """
        made: dict[int, Tensor] = {}
        alike: dict[Any, list[tuple[int, Asked]]] = {}
        for i, request in enumerate(requests):
            if request.num_videos != 1:
                raise UserError(f"{request.num_videos} videos of one request among several requests: give it as often, with other seeds")
            request, plan, inputs, camera = self._prepare(request)
            hop = plan.hops[0]
            whole = hop.overlap == 0 and hop.given.space is None  # nothing of a given video before it, or pasted into it
            if whole and self._one_clip(request, plan) and not self._looks_at_both:
                asked = self._asked(request, plan, inputs, camera)
                alike.setdefault(batch_key(asked), []).append((i, asked))
            else:
                made[i], _ = self._one(request, plan, inputs, camera, self._encode_text(request, plan), request.seed)
        for several in alike.values():
            places, asked = zip(*several, strict=True)
            joined = Asked(asked[0].plan, State.joined([one.state for one in asked]), Signals.joined([one.signals for one in asked]))
            latents, cuts = self._sample(joined, [requests[i].seed for i in places]), [one.plan.hops[0].cuts for one in asked]
            if any(cuts):  # each clip has its own
                videos = [self.decode(clip[None], mine)[0] for clip, mine in zip(latents, cuts, strict=True)]
            else:
                videos = self.decode(latents)
            made |= zip(places, videos, strict=True)
        self.maybe_free_model_hooks()
        return [made[i] for i in range(len(requests))]

    def _one_clip(self, request: Request, plan: Plan) -> bool:
        lone_loop = request.loop and request.image is None  # its first frame is a clip before it
        return len(plan.hops) == 1 and not plan.block_frames and not lone_loop

    @property
    def _looks_at_both(self) -> bool:
        return self.transformer.config.pos_embed_seq_len is not None

    def _asked(self, request: Request, plan: Plan, inputs: Inputs, camera: Trajectory | None) -> Asked:
        (hop,), signals = plan.hops, Signals(self._encode_text(request, plan), image=self._image_tokens(inputs))
        return Asked(plan, *self._conditions(request, plan, hop, inputs, camera, signals, inputs.video))

    def _sample(self, asked: Asked, seeds: Sequence[int]) -> Tensor:
        """Latents (b, c, F, h, w) of a batch; each clip starts from the noise of its seed."""
        plan, state = asked.plan, asked.state
        noise = torch.cat([draw_noise(state.clean[:1].shape, state.frames, seed, "noise", 0) for seed in seeds])
        sampler = Sampler([self.transformer_fast] if plan.fast else self.experts, self.config.get("boundary_ratio"), self.scheduler, plan)
        for step in sampler(state, asked.signals, upload(noise, self._execution_device), seeds):  # noqa: B007 - the last one counts
            pass
        return state.finish(step.z)
