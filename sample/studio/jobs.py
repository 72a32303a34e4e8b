"""One job on the model at a time. At most so many wait, visitors take turns, and a job stops within a step once nobody waits for it.

    for event in queue.run(visitor, work):     # Waiting(place) while others are served, then whatever `work(tell)` tells
        ...                                    # leaving the loop, or closing the generator, stops the work

All work runs on one thread of its own: kernels keep one pool of threads, whoever asks.
"""

from __future__ import annotations

import gc
import queue
import threading
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

import torch

from kling.errors import UserError

Tell = Callable[[Any], None]
Work = Callable[[Tell], Any]
HEARTBEAT = 1.0  # seconds after which a silent job hands over a sign of life, so that a closed tab is noticed
REMEMBERED = 1000  # visitors whose last turn is remembered


class Busy(UserError):
    """The queue is full."""


class Stopped(Exception):
    """Nobody waits for this job any more."""


@dataclass(frozen=True)
class Waiting:
    """place: jobs that come before this one, the running one included; 0 is running."""

    place: int


@dataclass(eq=False)
class Job:
    visitor: str
    work: Work
    events: queue.SimpleQueue = field(default_factory=queue.SimpleQueue)  # what it tells, then (result, error)
    stopped: threading.Event = field(default_factory=threading.Event)

    def tell(self, event: Any) -> None:
        """Hand over an event. Raises `Stopped` if nobody listens: this is where work ends early."""
        if self.stopped.is_set():
            raise Stopped
        self.events.put(event)


@dataclass(frozen=True)
class _End:
    result: Any = None
    error: BaseException | None = None


class ModelQueue:
    """The model's door. size: how many jobs may wait while one runs."""

    def __init__(self, size: int = 8) -> None:
        self.size = size
        self._waiting: list[Job] = []
        self._running: Job | None = None
        self._served: dict[str, int] = {}  # visitor -> number of their last turn
        self._turns = 0
        self._changed = threading.Condition()
        threading.Thread(target=self._serve, name="model", daemon=True).start()

    def run(self, visitor: str, work: Work) -> Generator[Any, None, Any]:
        """Yield what the job tells and return its result. Raises `Busy` if the queue is full, `Stopped` if `stop` was called."""
        job = Job(visitor, work)
        with self._changed:
            if len(self._waiting) >= self.size:
                raise Busy(f"the queue is full ({self.size} are waiting): try again in a minute")
            self._waiting.append(job)
            self._changed.notify_all()
        try:
            while True:
                try:
                    event = job.events.get(timeout=HEARTBEAT)
                except queue.Empty:
                    event = Waiting(self.place(job))
                if isinstance(event, _End):
                    if event.error is not None:
                        raise event.error
                    return event.result
                yield event
        finally:
            self._stop(job)

    def stop(self, visitor: str) -> None:
        """Stop everything that a visitor has running or waiting."""
        with self._changed:
            jobs = [job for job in [self._running, *self._waiting] if job is not None and job.visitor == visitor]
        for job in jobs:
            self._stop(job)

    def place(self, job: Job) -> int:
        with self._changed:
            return 1 + sorted(self._waiting, key=self._turn).index(job) if job in self._waiting else 0

    @property
    def waiting(self) -> int:
        """Jobs that wait for their turn."""
        return len(self._waiting)

    @property
    def running(self) -> bool:
        return self._running is not None

    def _turn(self, job: Job) -> int:
        """Who was served longest ago comes first; `min` and `sorted` keep the order of arrival among equals."""
        return self._served.get(job.visitor, 0)

    def _stop(self, job: Job) -> None:
        job.stopped.set()
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)
                job.events.put(_End(error=Stopped()))

    def _next(self) -> Job:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting)
            job = self._running = min(self._waiting, key=self._turn)
            self._waiting.remove(job)
            self._turns += 1
            self._served.pop(job.visitor, None)
            self._served[job.visitor] = self._turns
            if len(self._served) > REMEMBERED:
                self._served.pop(next(iter(self._served)))
            return job

    def _serve(self) -> None:
        while True:
            job = self._next()
            try:
                end = _End(result=job.work(job.tell))
            except torch.OutOfMemoryError:
                end = _End(error=UserError("the device has no room for this: ask for fewer seconds"))
            except BaseException as error:  # handed to whoever waits; the thread must live
                end = _End(error=error.with_traceback(None) if isinstance(error, Stopped) else error)
            self._running = None
            cut_off = end.error is not None
            job.events.put(end)
            job = end = None
            if cut_off:  # its tensors may hang on a traceback
                gc.collect()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
