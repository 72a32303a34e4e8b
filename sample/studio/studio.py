"""The model, its queue and its shelf: everything behind the page."""

from __future__ import annotations

import logging
import time
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace
from functools import wraps
from html import escape
from inspect import isgeneratorfunction
from itertools import accumulate
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from kling_programs.sample.studio import views
from kling_programs.sample.studio.form import MAX_PROMPT, Fields
from kling_programs.sample.studio.guard import Door
from kling_programs.sample.studio.jobs import Busy, ModelQueue, Stopped, Tell
from kling_programs.sample.studio.mistakes import told_to
from kling_programs.sample.studio.remote import Remote
from kling_programs.sample.studio.shelf import Result, Shelf
from kling_programs.sample.studio.uploads import Uploads
from kling_programs.sample.studio.words import language, say

from kling.data.video import probe
from kling.errors import UserError
from kling.sampling.enhance import Enhancer
from kling.sampling.machine import Machine
from kling.sampling.memory import estimate
from kling.sampling.pipeline import KlingPipeline
from kling.sampling.plan import Plan
from kling.sampling.record import model_hashes
from kling.sampling.request import Request
from kling.shapes import ASPECTS, TEMPORAL, latent_frames

log = logging.getLogger(__name__)
PREVIEW_SHARE = 0.2  # previews take at most this share of the time
ROUGH_STEPS = 2
GUIDANCE = ("guidance_scale", "camera_guidance_scale", "brush_guidance_scale", "reference_guidance_scale")
WRITTEN = 1000  # prompts by a chat model that are remembered for records
TOAST = 12  # seconds


@dataclass(frozen=True)
class Step:
    """step of total is done; preview: (T, H, W, 3) uint8 decoded from x̂₀, every few steps."""

    step: int
    total: int
    preview: np.ndarray | None = None


@dataclass(frozen=True)
class Weights:
    """The weights for a video: names in the operator's folders; "" is the model that the page was started with, and no LoRA."""

    model: str = ""
    lora: str = ""
    scale: float = 1.0


@dataclass
class Studio:
    """model: folder and hashes of the weights, as in a record. run: a training run to inspect, or None. door: the access control.

    models, loras: the choices for visitors, name -> folder or file. One choice is kept loaded in addition to `pipe`. enhancer: writes
    prompts out, if the operator gave a chat model.
    """

    pipe: KlingPipeline
    model: dict[str, Any]
    shelf: Shelf
    uploads: Uploads
    run: Path | None = None
    queue: ModelQueue = field(default_factory=ModelQueue)
    door: Door | None = None
    models: dict[str, Path] = field(default_factory=dict)
    loras: dict[str, Path] = field(default_factory=dict)
    enhancer: Enhancer | None = None
    remote: Remote | None = None  # a server that makes the videos; `pipe` only plans then
    _rate: float | None = None  # operations a second, as measured
    _other: tuple[Weights, KlingPipeline, dict[str, Any]] | None = None
    _planners: dict[str, KlingPipeline] = field(default_factory=dict)
    _written: OrderedDict[tuple[str, str], dict[str, str]] = field(default_factory=OrderedDict)  # see `remember`

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """aspect -> (H, W) of this model."""
        return self.pipe.config.get("sizes") or ASPECTS

    def make(
        self, visitor: str, requests: Request | list[Request], owner: str = "", weights: Weights | None = None, **kept: Any
    ) -> Generator[Any, None, list[Result]]:
        """Sample requests in turn: yields `Waiting`, `Step` and each `Result` but the last, returns all. kept: see `ModelQueue.run`."""
        requests, weights = requests if isinstance(requests, list) else [requests], weights or Weights()
        planner = self._planner(weights.model)
        for request in requests:
            planner.plan(request)  # refuses invalid requests before the wait

        def ask(tell: Tell) -> list[Result]:
            made: list[Result] = []
            for number, request in enumerate(requests):
                of = planner.plan(request).total_steps

                def step(at: tuple[int, int], before: int = number * of, of: int = of) -> None:
                    tell(Step(before + at[0], of * len(requests)))

                made.append(self.shelf.keep_made(*self.remote.make(request, step), request, visitor, **self.wrote(visitor, request)))
                if len(made) < len(requests):
                    tell(made[-1])
            return made

        def work(tell: Tell) -> list[Result]:
            made: list[Result] = []
            pipe, model = self._load(weights)
            for number, request in enumerate(requests):
                began = time.perf_counter()
                frames, plan = sample(pipe, request, tell, video=(number, len(requests)))
                seconds = time.perf_counter() - began
                self._rate = operations(pipe, plan) / seconds
                more = self.wrote(visitor, request)
                made.append(self.shelf.put(frames, request, plan, pipe, seconds, visitor, model, **more))
                if len(made) < len(requests):
                    tell(made[-1])
            return made

        return (yield from self.queue.run(visitor, work if self.remote is None else ask, owner, **kept))

    def heard(self, request: gr.Request) -> Callable[[], bool] | None:
        """A function that says whether anybody receives the events of a request; None if that is not known."""
        return None if self.door is None else lambda: self.door.heard(request.session_hash)

    def rough(self, visitor: str, request: Request) -> np.ndarray | None:
        """A rough clip (T, H, W, 3) uint8 by the few-step weights, once nothing else waits; None if a newer one or a real job came."""
        own = dict.fromkeys(("negative_prompt", "shift", *GUIDANCE))  # guidance is built in
        request = request.replace(**own, mode="fast", num_inference_steps=ROUGH_STEPS, num_videos=1)
        if len((plan := self.pipe.plan(request)).hops) > 1:
            request = beginning(request, plan)
        work = self.queue.run(visitor, lambda tell: sample(self.pipe, request, tell, previews=False)[0], f"rough {visitor}", rough=True)
        try:
            while True:
                next(work)
        except StopIteration as done:
            return done.value
        except (Stopped, Busy):
            return None

    # ---- who wrote a prompt ----

    def write_out(self, visitor: str, request: Request, pipe: KlingPipeline) -> str:
        """The prompt of a request as the chat model writes it out; on the model's thread."""
        prompt = self.enhancer(request, pipe)
        self.remember(visitor, {"request": {"prompt": prompt}, "enhanced": {"prompt": request.prompt, "by": self.enhancer.folder.name}})
        return prompt

    def remember(self, visitor: str, record: dict[str, Any]) -> None:
        """Note whether a chat model wrote a record's prompt, for the records of what this visitor makes from the same prompt."""
        prompt, enhanced = record["request"].get("prompt"), record.get("enhanced")
        said = [prompt, *(enhanced.get(name) for name in ("prompt", "by"))] if isinstance(enhanced, dict) else [None]
        if all(isinstance(text, str) and 0 < len(text) <= MAX_PROMPT for text in said):  # a record may come from anywhere
            self._written[visitor, prompt] = {"prompt": said[1], "by": said[2]}
            self._written.move_to_end((visitor, prompt))
            while len(self._written) > WRITTEN:
                self._written.popitem(last=False)

    def wrote(self, visitor: str, request: Request) -> dict[str, Any]:
        """What a record says about a prompt that a chat model wrote, and nobody changed since; else nothing."""
        enhanced = self._written.get((visitor, request.prompt))
        return {} if enhanced is None else {"enhanced": enhanced}

    # ---- what visitors choose ----

    def weights_of(self, fields: dict[str, Any]) -> Weights:
        """The weights that the fields name. Raises `UserError` for names that the operator does not offer."""
        given = Fields(fields)
        model, lora = given.choice("model", self.models) or "", given.choice("lora", self.loras) or ""
        return Weights(model, lora, given.number("lora_scale", -2, 2, 1.0) if lora else 1.0)

    def weights_from(self, record: dict[str, Any]) -> Weights | None:
        """The weights of a record, if they are offered here."""
        there = record.get("studio") or {}
        try:
            weights = self.weights_of({name: there.get(name) for name in ("model", "lora", "lora_scale")})
        except UserError:
            return None
        ours = self.model["sha256"].get("transformer/config.json")
        theirs = ((record.get("model") or {}).get("sha256") or {}).get("transformer/config.json")
        return None if not weights.model and theirs not in (None, ours) else weights

    def planner(self, fields: dict[str, Any]) -> KlingPipeline:
        """A pipeline that plans for the requested weights, possibly without loading them."""
        return self._planner(self.weights_of(fields).model)

    def _planner(self, model: str) -> KlingPipeline:
        if not model:
            return self.pipe
        if model not in self._planners:
            self._planners[model] = KlingPipeline.from_pretrained(self.models[model], weights=False)
        return self._planners[model]

    def _load(self, weights: Weights) -> tuple[KlingPipeline, dict[str, Any]]:
        """The pipeline and its record; on the model's thread. Frees the previous choice."""
        if weights == Weights():
            return self.pipe, self.model
        if self._other is None or self._other[0] != weights:
            self._other = None
            folder = self.models[weights.model] if weights.model else Path(self.model["path"])
            lora = self.loras.get(weights.lora)
            pipe = KlingPipeline.from_pretrained(folder, lora=[(str(lora), weights.scale)] if lora else ()).to(self.pipe.device)
            pipe.set_progress_bar_config(disable=True)
            chosen = {"model": weights.model, "lora": weights.lora, "lora_scale": weights.scale}
            self._other = weights, pipe, {**model_hashes(folder, [lora] if lora else []), "studio": chosen}
        return self._other[1], self._other[2]

    # ---- what it will take ----

    def clip_seconds(self, request: Request, plan: Plan) -> float | None:
        """Length in seconds of a given clip if only its beginning is used; None if all of it is."""
        if not isinstance(request.video, str) or plan.hops[0].overlap:
            return None
        info = probe(request.video)
        return info.duration if info.count(plan.fps) >= plan.frames + TEMPORAL else None

    def needs(self, pipe: KlingPipeline, plan: Plan, request: Request) -> tuple[float | None, int]:
        """Approximate (seconds, bytes) that a request will take. Seconds are known after the first result."""
        seconds = None if self._rate is None else request.num_videos * operations(pipe, plan) / self._rate
        return seconds, estimate(pipe, plan, Machine()).peak


def beginning(request: Request, plan: Plan) -> Request:
    """The request of the first hop of a plan alone."""
    hop = plan.hops[0]
    if request.shots is None:
        return request.replace(duration=None, extend_to=None, num_frames=hop.frames)
    *before, last = request.storyboard[: hop.shots[-1][0] + 1]
    left = (hop.frames - 1) / plan.fps - sum(shot.seconds for shot in before)
    return request.replace(shots=[*before, replace(last, seconds=min(last.seconds, left))])


def operations(pipe: KlingPipeline, plan: Plan) -> float:
    """Operations of all passes through the transformer: 2 for each weight and token, 4 for each pair of tokens, channel and layer.

    The rest is small, or proportional to it, and is included in the measured rate.
    """
    config = pipe.transformer.config
    weights = sum(p.numel() for p in pipe.transformer.parameters())
    pairs = config.num_layers * config.num_attention_heads * config.attention_head_dim
    n = plan.tokens
    return plan.total_steps * plan.passes * (2 * weights * n + 4 * pairs * n**2)


def sample(
    pipe: KlingPipeline, request: Request, tell: Tell, previews: bool = True, video: tuple[int, int] = (0, 1)
) -> tuple[np.ndarray, Plan]:
    """uint8 (T, H, W, 3) of one video; emits every `Step`. video: (its number, of how many); steps count over all."""
    plan = pipe.plan(request)
    before, total = video[0] * plan.total_steps, video[1] * plan.total_steps
    ends = list(accumulate(map(plan.steps_of, plan.hops)))  # the number of steps until the end of each hop
    spent, began = 0.0, time.perf_counter()  # on previews, and in all
    tell(Step(before, total))

    def advance(pipe: KlingPipeline, step: int, timestep: Any, state: dict) -> dict:
        nonlocal spent
        tell(Step(before + step + 1, total))
        now = time.perf_counter()
        if previews and step + 1 < plan.total_steps and spent <= PREVIEW_SHARE * (now - began):
            hop = plan.hops[bisect_right(ends, step)]
            x0 = state["x0"][:, :, : latent_frames(hop.frames)]  # without the appended keyframes
            tell(Step(before + step + 1, total, pipe.decode(x0, hop.cuts)[0].numpy()))
            spent += time.perf_counter() - now
        return state

    frames = pipe(request.replace(num_videos=1), callback_on_step_end=advance).frames[0]
    return frames, plan


def guarded(fn: Callable) -> Callable:
    """Wrap an event, a function or a generator: any error becomes one line, a toast."""

    def toast(error: Exception, args: tuple) -> gr.Error:
        return gr.Error(escape(told(error, _request_in(args))), print_exception=False, title="")  # a toast shows HTML

    @wraps(fn)
    def run(*args: Any) -> Any:
        try:
            return fn(*args)
        except Exception as error:  # `told` logs what is no mistake of the visitor
            raise toast(error, args) from None

    @wraps(fn)
    def generate(*args: Any) -> Generator:
        try:
            yield from fn(*args)
        except Exception as error:
            raise toast(error, args) from None

    return generate if isgeneratorfunction(fn) else run


def in_place(fn: Callable) -> Callable:
    """Wrap an event that returns HTML: any error becomes one line, in its place."""

    @wraps(fn)
    def run(*args: Any) -> str:
        try:
            return fn(*args)
        except Exception as error:  # `told` logs what is no mistake of the visitor
            return views.mistake(told(error, _request_in(args)))

    return run


def _request_in(args: tuple) -> gr.Request | None:
    return next((arg for arg in args if isinstance(arg, gr.Request)), None)


def lenient(fn: Callable) -> Callable:
    """Wrap an event that only draws: on an error the drawing stays unchanged, and the page shows no error."""

    @wraps(fn)
    def run(*args: Any) -> Any:
        try:
            return fn(*args)
        except UserError:
            return gr.skip()

    return run


def told(error: BaseException, request: gr.Request | None = None) -> str:
    """The line that a visitor sees for an error, without traces and server paths. Errors that are no mistake of theirs are logged."""
    return _code_and_line(error, request)[1]


def coded(error: BaseException, request: gr.Request | None = None) -> gr.Error:
    """The same for programs: with the error's code as its title."""
    code, line = _code_and_line(error, request)
    return gr.Error(line, print_exception=False, title=code)


def _code_and_line(error: BaseException, request: gr.Request | None) -> tuple[str, str]:
    lang = language(request)
    if isinstance(error, UserError):
        return error.code or "refused", told_to(lang, error)
    if isinstance(error, Stopped):
        return "stopped", say(lang, "stopped")
    log.error("a request failed", exc_info=error)
    return "failed", say(lang, "failed")


def warn(error: BaseException, request: gr.Request) -> None:
    """Show an error as a toast while the event goes on."""
    gr.Warning(escape(told(error, request)), duration=TOAST, title="")


def inform(text: str) -> None:
    """Show a text as a toast, which would take it as HTML."""
    gr.Info(escape(text), duration=TOAST, title="")


def visitor(request: gr.Request | None) -> str:
    """The visitor whose share is used: the signed-in user, else the address."""
    if request is None:
        return ""
    client = getattr(request, "client", None)
    return getattr(request, "username", None) or getattr(client, "host", None) or ""
