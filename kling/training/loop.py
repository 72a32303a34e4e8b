"""The part of a training that is the same whatever is trained: batches in order, resume, rollback, log, checkpoints, signals, the end.

A program that uses it reads top to bottom as one loop: forward, loss, backward, optimizer and what is logged stand in the program.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import Dataset

from kling.cache.batches import RankBatches
from kling.config import save_config, to_dict
from kling.data.source import batches
from kling.runtime.accelerator import EXIT_STOPPED, StopSignal, make_accelerator, set_threads
from kling.runtime.checkpoint import check_same_config
from kling.runtime.lock import locked
from kling.runtime.log import Later, RunLog, finished
from kling.runtime.parallel import check_draws, lay_out
from kling.runtime.random import generator
from kling.runtime.saver import Saver, find_latest, versions
from kling.runtime.watchdog import Watchdog
from kling.training.ema import EMA
from kling.training.health import Guard
from kling.training.meter import StepClock
from kling.training.optim import lr_at
from kling.training.run_state import load_run_tensors, run_tensors

OPTIONAL = {"gradient_accumulation": 1, "keep_every": 0, "save_in_background": True, "watchdog": 0.0}  # of a program without these settings


class Loop:
    """One run, from its settings to its last checkpoint. How a program uses it shows `train/train_text.py`, the shortest one.

    Inside the `with` the run's folder is this run's alone, and a signal ends it after an update. done: updates made. places: batches used,
    over all processes: they only grow, so what made updates unsound is not met again.

    cfg: the program's settings, of which it reads out, seed, steps, warmup, schedule, floor, workers, threads, log_every, save_every (0 is
    at the end and at a signal alone), keep_last, mixed_precision and trackers, and of `OPTIONAL` those that there are. how: further
    arguments of `make_accelerator`. Raises `UserError`, as the `with` is entered, if the run was started with other settings, or another
    process holds it.
    """

    done = places = began = 0

    def __init__(self, cfg: Any, **how: Any) -> None:
        self.cfg, self.how, self.out, self.config = cfg, how, Path(cfg.out), to_dict(cfg)
        self.settings = OPTIONAL | self.config
        self._run: Iterator[tuple[int, Any]] | None = None

    def __enter__(self) -> Loop:
        cfg, settings, self.micro = self.cfg, self.settings, self.settings["gradient_accumulation"]
        set_threads(cfg.threads)
        with ExitStack() as stack:
            self.stop = stack.enter_context(StopSignal())
            self.accelerator = make_accelerator(self.out, cfg.mixed_precision, self.micro, cfg.trackers, **self.how)
            stack.enter_context(locked(self.out, "run", self.accelerator))
            check_same_config(self.out, self.config, defaults=to_dict(type(cfg)()))
            self._stack = stack.pop_all()
        self.layout, background = lay_out(self.accelerator), settings["save_in_background"]
        self._saver = Saver(self.out, cfg.keep_last, settings["keep_every"], accelerator=self.accelerator, background=background)
        return self

    def __exit__(self, *_: object) -> None:
        with self._stack:
            if self._run is not None:
                self._run.close()  # an error in the program's own lines: what was logged is written

    def resume(self, model: nn.Module, optimizer: Optimizer, ema: EMA, **others: tuple[nn.Module, Optimizer]) -> None:
        """Go on from the newest good checkpoint, if there is one, and save these from now on.

        optimizer: as accelerate prepared it. others: further models that train, with their optimizers and without an average; the keyword
        is the prefix of their groups in a checkpoint. Raises `UserError` if a checkpoint does not fit.
        """
        self._kept = {"": (model, optimizer, ema)} | {prefix: (*kept, None) for prefix, kept in others.items()}
        self._load()
        self.began, layout = self.done, self.layout
        check_draws(self.accelerator, layout, torch.randn(8, generator=generator(self.cfg.seed, "sigma", self.places + layout.rank)))
        if self.accelerator.is_main_process:
            save_config(self.cfg, self.out / "config.yaml")

    def batches(self, data: Dataset, guard: Guard, clock: StepClock | None = None) -> Iterator[tuple[int, Any]]:
        """This process's micro-steps until all updates are made: place and batch of each.

        data: batches by place, with `names(place)` of their clips. guard: decides on every update; the program asks it. clock: the
        program's, told of the time for checkpoints. Raises `SystemExit` with `EXIT_STOPPED` after the update at which a signal was seen,
        and `UserError` if updates are unsound again after a rollback.
        """
        self._data, self._guard, self._clock = data, guard, clock
        self._run = self._micro_steps()
        return self._run

    def _micro_steps(self) -> Iterator[tuple[int, Any]]:
        steps, told = self.cfg.steps, {"config": self.config, "start": self.done, "log_every": self.cfg.log_every}
        with (
            Watchdog(self.out, self.accelerator.process_index, self.settings["watchdog"]) as self._watchdog,
            RunLog(self.out, steps, accelerator=self.accelerator, **told) as self._log,
        ):
            while self.done < steps:
                feed, self._used, self._back, self._stopping = RankBatches(self._data, self.places, self.layout), [], False, False
                for k, batch in enumerate(batches(feed, 0, (steps - self.done) * self.micro, self.cfg.workers)):
                    self._used.append(place := feed.place(k))
                    yield place, batch
                    if self._stopping:
                        self._saver.wait()
                        raise SystemExit(EXIT_STOPPED)
                    if self._back:
                        break
        self._saver.wait()

    def lr(self, highest: float) -> float:
        """The learning rate of the update that comes."""
        cfg = self.cfg
        return lr_at(self.done, lr=highest, warmup=cfg.warmup, steps=cfg.steps, schedule=cfg.schedule, floor=cfg.floor)

    def update(self, values: Mapping[str, float] | Later, clips: int) -> None:
        """An update was made, or left out by the guard. Log it, and save, go back or prepare to stop where that is due.

        values: what the log says of it. clips: how many it took, over all processes.
        """
        guard, rank, ranks = self._guard, self.accelerator.process_index, self.accelerator.num_processes
        self.done, self.places = self.done + 1, self.places + self.micro * self.layout.ranks
        self._watchdog.beat()
        self._log.log(self.done, values, clips)
        look = self._at(self._log.log_every)  # several processes must ask each other who got a signal
        stopping = (look or ranks == 1) and self.stop.seen(self.accelerator)
        save = stopping or self._at(self.cfg.save_every)
        if save:
            self._log.flush()

        unsound = [{"place": place, "clips": self._data.names(place)} for place in self._used] if guard.row >= guard.limit else []
        if guard.rollback(unsound, self.out, rank):
            self._load(lost=self.done)
            self._log.rewind(self.done)
            self._back = True
            return
        self._used, self._stopping = [], stopping
        self._saver.check()
        if save and (stopping or self.done == self.cfg.steps or not guard.row):  # never amid lost updates: what to go back to
            tensors: dict[str, Any] = {}
            for prefix, (model, optimizer, ema) in self._kept.items():
                tensors |= run_tensors(model, optimizer.optimizer, ema, prefix)
            self._saver.save(self.done, tensors, {"config": self.config, "places": self.places, "versions": versions()})
            if self._clock is not None:
                self._clock.lap("save")

    def due(self, every: int) -> bool:
        """Whether to do now what is done each `every` updates and at the end; 0 is never. Not where the run stops or has just gone back."""
        return every > 0 and not (self._stopping or self._back) and self._at(every)

    def _at(self, every: int) -> bool:
        return self.done == self.cfg.steps or (every > 0 and self.done % every == 0)

    def log(self, values: Mapping[str, float]) -> None:
        """A line of the log beside that of the update."""
        self._log.log(self.done, values)

    def finish(self, model: Path) -> None:
        """Say that the run has ended, and where its model is; every process waits for the main one, which has written it."""
        if self.accelerator.is_main_process:
            print(finished(self.began, self.cfg.steps, model), file=sys.stderr)
        self.accelerator.wait_for_everyone()

    def _load(self, lost: int = 0) -> None:
        """The newest good checkpoint, if there is one. lost: the step from which a run goes back: its weights do, its data goes on."""
        self._saver.wait()
        saved = find_latest(self.accelerator, self.out, lost)
        if saved is None:
            return
        for prefix, (model, optimizer, ema) in self._kept.items():
            load_run_tensors(saved, model, optimizer.optimizer, ema, prefix)
        self.done = saved.step
        if not lost:
            self.places = saved.meta.get("places", saved.step * self.micro * self.layout.ranks)
