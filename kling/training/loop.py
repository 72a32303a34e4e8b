"""The part that every training program shares: the order of batches, resume, rollback, log, checkpoints, stop signals and the end.

Forward pass, loss, backward pass, optimizer and logged values stay in the program, which reads top to bottom as one loop.
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
from kling.runtime.checkpoint import Checkpoint, check_same_config, restore
from kling.runtime.lock import locked
from kling.runtime.log import Later, RunLog, finished
from kling.runtime.parallel import check_draws, lay_out, total, trained
from kling.runtime.random import generator
from kling.runtime.saver import Saver, find_latest
from kling.runtime.versions import versions
from kling.runtime.watchdog import Watchdog
from kling.training.ema import EMA
from kling.training.health import Guard
from kling.training.meter import Meter, StepClock, logged_tokens
from kling.training.optim import load_optimizer_tensors, lr_at, optimizer_tensors

PACKAGES = ("kling", "torch", "diffusers", "accelerate", "safetensors")  # whose versions a checkpoint names
OPTIONAL = {"gradient_accumulation": 1, "keep_every": 0, "save_in_background": True, "watchdog": 0.0}  # for programs without these settings


class Loop:
    """One run. The shortest program that uses it is `train/train_text.py`.

    The `with` block holds the lock of the run's folder, and turns stop signals into an exit after the current update. done: updates made.
    places: batches used, over all processes; they never decrease, so a rollback does not use the same batches again. tokens: of the updates
    that the weights have had, where the program's clock is a `Meter`.

    cfg: the program's settings. Read are out, seed, steps, warmup, schedule, floor, workers, threads, log_every, save_every (0 saves only
    at the end and at a signal), keep_last, mixed_precision and trackers, and those of `OPTIONAL` that exist. how: further arguments of
    `make_accelerator`. Entering the block raises `UserError` if the run was started with other settings, or another process uses it.
    """

    done = places = began = tokens = 0
    _clock: StepClock | None = None

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
            self.layout, background = lay_out(self.accelerator), settings["save_in_background"]
            self._saver = Saver(self.out, cfg.keep_last, settings["keep_every"], accelerator=self.accelerator, background=background)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        with self._stack:
            if self._run is not None:
                self._run.close()  # after an error in the program itself: write the lines logged so far

    def resume(
        self, model: nn.Module, optimizer: Optimizer, ema: EMA | None, averages: Mapping[str, EMA] | None = None,
        **others: tuple[nn.Module, Optimizer],
    ) -> None:  # fmt: skip
        """Load the newest intact checkpoint, if there is one. Later checkpoints hold the same models.

        optimizer: as prepared by accelerate. averages: further ones of the model, by their group in a checkpoint. others: further models in
        training with their optimizers, without an average; the keyword is the prefix of their groups in a checkpoint. Raises `UserError`
        if a checkpoint does not fit.
        """
        self._kept = {"": (model, optimizer, ema)} | {prefix: (*kept, None) for prefix, kept in others.items()}
        self._averages = dict(averages or {})
        self._load()
        self.began, layout = self.done, self.layout
        check_draws(self.accelerator, layout, torch.randn(8, generator=generator(self.cfg.seed, "sigma", self.places + layout.rank)))
        if self.accelerator.is_main_process:
            save_config(self.cfg, self.out / "config.yaml")

    def batches(self, data: Dataset, guard: Guard, clock: StepClock | None = None) -> Iterator[tuple[int, Any]]:
        """(place, batch) of every micro-step of this process, until all updates are made.

        data: batches by place; `data.names(place)` lists their clips. guard: the one that the program asks about every update. clock: the
        program's clock, for the time of checkpoints. Raises `SystemExit` with `EXIT_STOPPED` after the update at which a signal was seen,
        and `UserError` if updates are not finite again after a rollback.
        """
        self._data, self._guard, self._clock = data, guard, clock
        if isinstance(clock, Meter):
            clock.tokens = self.tokens
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
        """The learning rate of the next update. highest: its value after the warmup."""
        cfg = self.cfg
        return lr_at(self.done, lr=highest, warmup=cfg.warmup, steps=cfg.steps, schedule=cfg.schedule, floor=cfg.floor)

    def update(self, values: Mapping[str, float] | Later, clips: int) -> None:
        """Call after every update, also one that the guard skipped: logs it, and saves, rolls back or stops if necessary.

        values: for the log. clips: the number of clips of this update, over all processes.
        """
        guard, rank = self._guard, self.accelerator.process_index
        self.done, self.places = self.done + 1, self.places + self.micro * self.layout.ranks
        self._watchdog.beat()
        self._log.log(self.done, values, clips)
        stopping = self.stop.seen(self.accelerator)
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
        if save and (stopping or self.done == self.cfg.steps or not guard.row):  # a rollback needs a sound checkpoint
            tensors: dict[str, Any] = {}
            for prefix, (model, optimizer, ema) in self._kept.items():
                tensors |= run_tensors(model, optimizer.optimizer, ema, prefix)
            tensors |= {name: average.state_dict() for name, average in self._averages.items()}
            meta = {"config": self.config, "places": self.places, "versions": versions(*PACKAGES)}
            self._saver.save(self.done, tensors, meta | ({"tokens": self._clock.tokens} if isinstance(self._clock, Meter) else {}))
            if self._clock is not None:
                self._clock.lap("save")

    def leave(self) -> None:
        """Stop here if any process got a signal: for long work between two updates. Those since the last checkpoint will be made again."""
        if total(self.accelerator, torch.tensor(float(bool(self.stop)), device=self.accelerator.device)) > 0:
            self._saver.wait()
            raise SystemExit(EXIT_STOPPED)

    def due(self, every: int) -> bool:
        """Whether this is a multiple of `every` updates, or the end. False for 0, when the run is stopping, and after a rollback."""
        return every > 0 and not (self._stopping or self._back) and self._at(every)

    def _at(self, every: int) -> bool:
        return self.done == self.cfg.steps or (every > 0 and self.done % every == 0)

    def log(self, values: Mapping[str, float]) -> None:
        """Add a line to the log, beside the one of the update."""
        self._log.log(self.done, values)

    def finish(self, model: Path) -> None:
        """Print where the exported model is, and wait for all processes."""
        if self.accelerator.is_main_process:
            print(finished(self.began, self.cfg.steps, model), file=sys.stderr)
        self.accelerator.wait_for_everyone()

    def _load(self, lost: int = 0) -> None:
        """Load the newest intact checkpoint. lost: for a rollback, the step reached: the position in the data then stays."""
        self._saver.wait()
        saved = find_latest(self.accelerator, self.out, lost)
        if saved is None:
            return
        for prefix, (model, optimizer, ema) in self._kept.items():
            load_run_tensors(saved, model, optimizer.optimizer, ema, prefix)
        for name, average in self._averages.items():
            average.load_state_dict(saved.tensors[name])
        self.done = saved.step
        self.tokens = saved.meta["tokens"] if "tokens" in saved.meta else logged_tokens(self.out, saved.step)
        if isinstance(self._clock, Meter):
            self._clock.tokens = self.tokens
        if not lost:
            self.places = saved.meta.get("places", saved.step * self.micro * self.layout.ranks)


def run_tensors(model: nn.Module, optimizer: Optimizer, ema: EMA | None = None, prefix: str = "") -> dict[str, Any]:
    """The groups of a checkpoint for a model in training: its trained weights, its optimizer, and its average."""
    groups: dict[str, Any] = {f"{prefix}model": trained(model), f"{prefix}optimizer": optimizer_tensors(optimizer, model)}
    return groups if ema is None else groups | {f"{prefix}ema": ema.state_dict()}


def load_run_tensors(saved: Checkpoint, model: nn.Module, optimizer: Optimizer, ema: EMA | None = None, prefix: str = "") -> None:
    """Restore the result of `run_tensors`, also on another number of processes. Raises `UserError` if it does not fit."""
    restore(saved.tensors[f"{prefix}model"], trained(model))
    load_optimizer_tensors(optimizer, model, saved.tensors[f"{prefix}optimizer"])
    if ema is not None:
        ema.load_state_dict(saved.tensors[f"{prefix}ema"])
