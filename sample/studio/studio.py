"""The model, its queue and its shelf: everything behind the page that is not the page."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from kling_programs.sample.studio.chinese import in_chinese
from kling_programs.sample.studio.jobs import ModelQueue, Stopped, Tell
from kling_programs.sample.studio.shelf import Result, Shelf
from kling_programs.sample.studio.uploads import Uploads
from kling_programs.sample.studio.words import language, say

from kling.errors import UserError
from kling.sampling.pipeline import KlingPipeline
from kling.sampling.plan import Plan
from kling.sampling.request import Request
from kling.shapes import ASPECTS, latent_frames

log = logging.getLogger(__name__)
PREVIEW_SHARE = 0.2  # previews take at most this part of the time


@dataclass(frozen=True)
class Step:
    """step of total is done; preview: (T, H, W, 3) uint8 decoded from x̂₀, every few steps."""

    step: int
    total: int
    preview: np.ndarray | None = None


@dataclass
class Studio:
    """model: folder and hashes of the weights, as a record has them. run: a training run to look at, or None."""

    pipe: KlingPipeline
    model: dict[str, Any]
    shelf: Shelf
    uploads: Uploads
    run: Path | None = None
    queue: ModelQueue = field(default_factory=ModelQueue)

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """aspect -> (H, W) of this model."""
        return self.pipe.config.get("sizes") or ASPECTS

    def make(self, visitor: str, request: Request) -> Generator[Any, None, Result]:
        """Sample a request in turn: yields `Waiting` and `Step`, returns the finished result."""
        self.pipe.plan(request)  # refused now rather than after the wait

        def work(tell: Tell) -> Result:
            began = time.perf_counter()
            frames, plan = sample(self.pipe, request, tell)
            return self.shelf.put(frames, request, plan, self.pipe, time.perf_counter() - began)

        return (yield from self.queue.run(visitor, work))


def sample(pipe: KlingPipeline, request: Request, tell: Tell, previews: bool = True) -> tuple[np.ndarray, Plan]:
    """uint8 (T, H, W, 3) of one video, telling every `Step`."""
    plan = pipe.plan(request)
    spent, began = 0.0, time.perf_counter()  # on previews, and in all
    tell(Step(0, plan.total_steps))

    def advance(pipe: KlingPipeline, step: int, timestep: Any, state: dict) -> dict:
        nonlocal spent
        tell(Step(step + 1, plan.total_steps))
        now = time.perf_counter()
        if previews and step + 1 < plan.total_steps and spent <= PREVIEW_SHARE * (now - began):
            hop = plan.hops[min(step // plan.num_inference_steps, len(plan.hops) - 1)]
            x0 = state["x0"][:, :, : latent_frames(hop.frames)]  # without the appended keyframes
            tell(Step(step + 1, plan.total_steps, pipe.decode(x0)[0].numpy()))
            spent += time.perf_counter() - now
        return state

    frames = pipe(request.replace(num_videos=1), callback_on_step_end=advance).frames[0]
    return frames, plan


def guarded(fn: Callable) -> Callable:
    """A generator of an event, whose mistakes are one line for the visitor; what nobody foresaw goes to the server's log."""

    @wraps(fn)
    def run(*args: Any) -> Generator:
        try:
            yield from fn(*args)
        except Exception as error:
            raise public(error, next((a for a in args if isinstance(a, gr.Request)), None)) from None

    return run


def public(error: BaseException, request: gr.Request | None = None) -> gr.Error:
    """What a visitor is told: never a trace, never a path of the server."""
    lang = language(request)
    if isinstance(error, gr.Error):
        return error
    if isinstance(error, UserError):
        line = without_folders(str(error))
        return gr.Error(in_chinese(line) if lang else line, print_exception=False, title="")
    if isinstance(error, Stopped):
        return gr.Error(say(lang, "stopped"), print_exception=False, title="")
    log.error("a request failed", exc_info=error)
    return gr.Error(say(lang, "failed"), print_exception=False, title="")


def without_folders(message: str) -> str:
    """Absolute paths cut down to their last name.

    >>> without_folders("/tmp/gradio/ab12/clip.mp4 is damaged (use 16:9 or 4/3)")
    'clip.mp4 is damaged (use 16:9 or 4/3)'
    """
    return " ".join(word.rsplit("/", 1)[1] if word.lstrip("'\"(").startswith("/") else word for word in message.split(" "))
