"""Runs one job at a time on the model. The queue is limited, visitors take turns, and a job without a listener stops within a step.

    for event in queue.run(visitor, work):     # Waiting(place) while others run, then the events of `work(tell)`
        ...                                    # leaving the loop, or closing the generator, stops the work

    for event in queue.run(visitor, work, tab, keep=True):  # for a page: a reloaded tab finds its job again
    for event in queue.follow(tab):                         # within `ALONE` seconds; and its result, for `KEPT` seconds

All work runs on one dedicated thread, so that kernels use one pool of threads.
"""

from __future__ import annotations

import gc
import logging
import queue
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

import torch

from kling.errors import UserError

log = logging.getLogger(__name__)

Tell = Callable[[Any], None]
Work = Callable[[Tell], Any]
HEARTBEAT = 1.0  # seconds after which a job without events yields anyway, so that a closed tab is noticed
ALONE = 60.0  # seconds that a job of a page continues without a listener, while a tab is reloaded
UNHEARD = 15.0  # seconds that a job of a program continues without a listener
KEPT = 3600.0  # seconds for which the result of a job is kept for its tab
HOUR = 3600.0
REMEMBERED = 1000  # number of visitors whose last turn, and of tabs whose last job, is remembered


class Busy(UserError):
    """The queue is full, or the visitor has used their share."""


class Stopped(Exception):
    """This job has no listener any more."""


@dataclass(frozen=True)
class Waiting:
    """place: number of jobs before this one, including the running one; 0 is running."""

    place: int


@dataclass(eq=False)
class Job:
    """visitor: whose turn it uses. owner: who may stop it, a tab or a client. keep: it continues without a listener for a while.

    rough: a preview, which runs only while nothing else waits, and makes way for what comes.
    told: the last events, for a later listener.
    until: when it has used a whole share of the model's time, None for no limit.
    """

    visitor: str
    work: Work
    owner: str = ""
    keep: bool = False
    rough: bool = False
    events: queue.SimpleQueue = field(default_factory=queue.SimpleQueue)  # its events, then (result, error)
    stopped: threading.Event = field(default_factory=threading.Event)
    seen: float = field(default_factory=time.monotonic)  # when there was last a listener
    told: dict[type, Any] = field(default_factory=dict)  # the last event of each type
    end: _End | None = None
    until: float | None = None
    _switch: threading.Lock = field(default_factory=threading.Lock)

    def tell(self, event: Any) -> None:
        """Emit an event. Raises `Stopped` if there is no listener, `Busy` if the job has used a whole share: this ends the work early."""
        if self.stopped.is_set() or self.alone:
            raise Stopped
        if self.until is not None and time.monotonic() > self.until:
            raise Busy("this took longer than one visitor may use the model in an hour: ask for fewer or shorter videos", code="too_long")
        with self._switch:
            self.told[type(event)] = event
            self.events.put(event)

    def finish(self, end: _End) -> None:
        with self._switch:
            if self.end is None:
                self.end, self.seen = end, time.monotonic()
                self.told.clear()  # previews are large
                self.events.put(end)

    def listen(self) -> queue.SimpleQueue:
        """The events from now on, preceded by the last of each kind; an earlier listener gets no more."""
        with self._switch:
            self.events, self.seen = queue.SimpleQueue(), time.monotonic()
            for event in [*self.told.values(), *([self.end] if self.end else [])]:
                self.events.put(event)
            return self.events

    @property
    def alone(self) -> bool:
        """Whether there has been no listener for so long that none is expected."""
        return time.monotonic() - self.seen > (ALONE if self.keep else UNHEARD)


@dataclass(frozen=True)
class _End:
    result: Any = None
    error: BaseException | None = None


class ModelQueue:
    """The queue for the model. size: number of jobs that may wait while one runs.

    places: number of jobs per visitor, waiting or running; seconds: of the model's time per visitor and hour, and of one job; None: no
    limit.
    """

    def __init__(self, size: int = 8, places: int | None = None, seconds: float | None = None) -> None:
        self.size, self.places, self.seconds = size, places, seconds
        self._waiting: list[Job] = []
        self._running: Job | None = None
        self._served: dict[str, int] = {}  # visitor -> number of their last turn
        self._spent: dict[str, deque[tuple[float, float]]] = {}  # visitor -> (when, seconds) of the model's time
        self._kept: OrderedDict[str, Job] = OrderedDict()  # owner -> its last kept job
        self._turns = 0
        self._changed = threading.Condition()
        threading.Thread(target=self._serve, name="model", daemon=True).start()

    def run(
        self,
        visitor: str,
        work: Work,
        owner: str = "",
        *,
        keep: bool = False,
        rough: bool = False,
        listening: Callable[[], bool] | None = None,
    ) -> Generator[Any, None, Any]:
        """Yield the job's events and return its result. Raises `Busy` if the queue or the share is full, `Stopped` if `stop` was called.

        owner: who may stop it, by default the visitor. keep: `follow` finds it again by its owner.
        rough: a preview. It replaces the visitor's last one, waits for all other jobs, uses no place, and is stopped by the next job.
        listening: whether anybody receives what is yielded; a generator may be read although nobody does.
        """
        job = Job(visitor, work, owner or visitor, keep, rough)
        with self._changed:
            self._forget_the_left()
            self._check_share(job)
            for other in [other for other in [self._running, *self._waiting] if other is not None and other.rough]:
                if other.visitor == visitor or (other is self._running and not rough):
                    self._stop(other)
            self._waiting.append(job)
            if keep:
                self._kept[job.owner] = job
                self._kept.move_to_end(job.owner)
                while len(self._kept) > REMEMBERED:
                    self._kept.popitem(last=False)
            self._changed.notify_all()
        return (yield from self._events(job, job.events, listening))

    def follow(self, owner: str, listening: Callable[[], bool] | None = None) -> Generator[Any, None, Any]:
        """As `run`, for an existing job of an owner; an earlier follower gets no more events, and returns None."""
        job = self.job(owner)
        return (yield from self._events(job, job.listen(), listening)) if job else None

    def job(self, owner: str) -> Job | None:
        """The last kept job of an owner, until it expires."""
        job = self._kept.get(owner)
        return None if job is None or (job.end and time.monotonic() - job.seen > KEPT) else job

    def forget(self, owner: str) -> None:
        """Drop the job: its owner has seen the result."""
        if (job := self._kept.get(owner)) and job.end:
            self._kept.pop(owner, None)

    def _events(self, job: Job, events: queue.SimpleQueue, listening: Callable[[], bool] | None) -> Generator[Any, None, Any]:
        try:
            while job.events is events:
                if listening is None or listening():
                    job.seen = time.monotonic()
                elif job.alone:
                    raise Stopped
                try:
                    event = events.get(timeout=HEARTBEAT)
                except queue.Empty:
                    event = Waiting(self.place(job))
                if isinstance(event, _End):
                    if event.error is not None:
                        raise event.error
                    return event.result
                yield event
        finally:
            if not job.keep and job.events is events:  # a page's job waits for its tab to reconnect
                self._stop(job)

    def stop(self, owner: str) -> None:
        """Stop all running and waiting jobs of an owner."""
        with self._changed:
            jobs = [job for job in [self._running, *self._waiting] if job is not None and job.owner == owner]
        for job in jobs:
            self._stop(job)

    def place(self, job: Job) -> int:
        with self._changed:
            self._forget_the_left(but=job)
            return 1 + sorted(self._waiting, key=self._turn).index(job) if job in self._waiting else 0

    @property
    def waiting(self) -> int:
        """Number of waiting jobs, without previews."""
        return sum(not job.rough for job in self._waiting)

    @property
    def running(self) -> bool:
        return self._running is not None

    def _check_share(self, job: Job) -> None:
        """Raises `Busy` if the visitor cannot have this job too."""
        visitor, jobs = job.visitor, [other for other in [self._running, *self._waiting] if other is not None and not other.rough]
        if not job.rough and sum(other is not self._running for other in jobs) >= self.size:
            raise Busy(f"the queue is full ({self.size} are waiting): try again in a minute", code="queue_full", n=self.size)
        here = 0 if job.rough else sum(other.visitor == visitor for other in jobs)
        if self.places is not None and here >= self.places:
            raise Busy(f"you have {here} videos queued or running already: wait for one, or stop it", code="no_place", n=here)
        used, now = self._spent.get(visitor, deque()), time.monotonic()
        while used and used[0][0] < now - HOUR:
            used.popleft()
        if self.seconds is not None and sum(s for _, s in used) >= self.seconds:
            most, wait = f"{self.seconds / 60:g}", f"{max(1, (used[0][0] + HOUR - now) / 60):.0f}"
            raise Busy(f"you have used your {most} minutes of this hour: try again in {wait} minutes", code="no_time", n=most, wait=wait)

    def _forget_the_left(self, but: Job | None = None) -> None:
        """Remove waiting jobs without a listener from the queue."""
        for job in [job for job in self._waiting if job.alone and job is not but]:
            self._waiting.remove(job)
            job.finish(_End(error=Stopped()))

    def _turn(self, job: Job) -> tuple[bool, int]:
        """Sort key: previews last, then the visitor served longest ago first; `min` and `sorted` keep the order of arrival among equals."""
        return job.rough, self._served.get(job.visitor, 0)

    def _stop(self, job: Job) -> None:
        job.stopped.set()
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)
                job.finish(_End(error=Stopped()))

    def _next(self) -> Job:
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._waiting)
                self._forget_the_left()
                if self._waiting:
                    break
            job = self._running = min(self._waiting, key=self._turn)
            self._waiting.remove(job)
            if not job.rough:
                self._turns += 1
                self._served.pop(job.visitor, None)
                self._served[job.visitor] = self._turns
            if len(self._served) > REMEMBERED:
                self._spent.pop(gone := next(iter(self._served)), None)
                self._served.pop(gone)
            return job

    def _serve(self) -> None:
        while True:
            job = self._next()
            began = time.monotonic()
            job.until = None if self.seconds is None else began + self.seconds
            try:
                end = _End(result=job.work(job.tell))
            except torch.OutOfMemoryError:
                end = _End(error=UserError("the device has no room for this: ask for fewer seconds", code="no_memory"))
            except BaseException as error:  # passed to the listener; the thread must survive
                end = _End(error=error.with_traceback(None) if isinstance(error, Stopped) else error)
            now = time.monotonic()
            self._spent.setdefault(job.visitor, deque()).append((now, now - began))
            self._running = None
            cut_off = end.error is not None
            job.work = None  # frees its references
            if job.keep and cut_off and not isinstance(end.error, UserError | Stopped):  # it may be kept for an hour
                log.error("a request failed", exc_info=end.error)
                end = _End(error=end.error.with_traceback(None))
            job.finish(end)
            job = end = None
            if cut_off:  # a traceback may hold its tensors
                gc.collect()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
