"""Several clips sampled as one batch: one request with several seeds, or requests of one shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kling.condition.state import State
from kling.errors import UserError
from kling.runtime.device import upload
from kling.runtime.random import generator
from kling.sampling.plan import Plan
from kling.sampling.request import Request
from kling.sampling.sampler import Sampler, Signals


class Asked(NamedTuple):
    """A request for one clip, resolved: what is given of it, and the other inputs of the transformer, for a batch of one, on its device."""

    plan: Plan
    state: State
    signals: Signals


def batch_key(asked: Asked) -> Any:
    """What clips must have in common to be sampled as one batch: all settings, and the shapes of all inputs; their task and cuts are
    in their states."""
    plan, state, signals = asked
    shapes = [None if t is None else t.shape for t in (state.clean, state.tracks, state.shot, signals.concat, signals.image)]
    camera = None if signals.camera is None else (signals.camera.c2w.shape, signals.camera.size, signals.camera.references)
    settings = replace(plan, task="", hops=[], cuts=(), notes=(), tokens=0)
    words = tuple((which, t.shape) for which, t in signals.text.items())
    return repr((settings, shapes, state.frames, state.sigma_c, camera, words, signals.camera is not None))


class Batches:
    """The part of `KlingPipeline` that makes several clips at once."""

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
            if self._one_clip(request):
                asked = self.ask(request)
                alike.setdefault(batch_key(asked), []).append((i, asked))
            else:
                made[i] = torch.from_numpy(self(request).frames[0])
        for several in alike.values():
            places, asked = zip(*several, strict=True)
            joined = Asked(asked[0].plan, State.joined([one.state for one in asked]), Signals.joined([one.signals for one in asked]))
            made |= zip(places, self.decode(self._sample(joined, [requests[i].seed for i in places])), strict=True)
        return [made[i] for i in range(len(requests))]

    def _one_clip(self, request: Request) -> bool:
        """Whether `ask` answers a request, and its clip is the whole result."""
        plan = self.plan(request)
        (hop, *more) = plan.hops
        whole = not more and hop.overlap == 0 and hop.given.space is None  # nothing of a given video before it, or pasted into it
        looks_at_both = self.transformer.config.pos_embed_seq_len is not None
        lone_loop = request.loop and request.image is None
        return whole and not (plan.block_frames or lone_loop or looks_at_both)

    def _sample(self, asked: Asked, seeds: Sequence[int]) -> Tensor:
        """Latents (b, c, F, h, w) of a batch; each clip starts from the noise of its seed."""
        plan, state = asked.plan, asked.state
        noise = torch.cat([torch.randn(state.clean[:1].shape, generator=generator(seed, "noise", 0)) for seed in seeds])
        sampler = Sampler([self.transformer_fast] if plan.fast else self.experts, self.config.get("boundary_ratio"), self.scheduler, plan)
        for step in sampler(state, asked.signals, upload(noise, self._execution_device), seeds):  # noqa: B007 - the last one counts
            pass
        return state.finish(step.z)
