"""The log of a run: `metrics.jsonl` always, tensorboard and wandb on request, and a line on the terminal."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch
from torch import Tensor

from kling.config import flatten
from kling.runtime.files import write_atomic, writing

METRICS = "metrics.jsonl"
TOTAL = "tokens"  # the value that grows: of several lines the last one is shown, not the mean
_BIN = "loss/sigma_"


class Later(NamedTuple):
    """Values of a step that are still on the device: `numbers` (k,), and a function that turns them into named values once read."""

    numbers: Tensor
    spell: Callable[[list[float]], dict[str, float]]


class RunLog:
    """The log of one run. Use it as a context manager: leaving it writes what is buffered and closes the trackers.

    out: the run's folder. steps: the run's last step, for the ETA. start: updates already done; later lines of `metrics.jsonl` belong to
    lost work and are cut. accelerator: provides the trackers and decides which process writes (None: this one, no tracker).
    """

    def __init__(
        self,
        out: str | Path,
        steps: int,
        *,
        accelerator: Any = None,
        config: Mapping[str, Any] | None = None,
        start: int = 0,
        log_every: int = 10,
        stream: TextIO | None = None,
    ) -> None:
        self.path, self.steps, self.start, self.log_every = Path(out) / METRICS, steps, start, max(1, log_every)
        self.stream = stream or sys.stderr
        self.accelerator = accelerator
        self.writes = accelerator is None or accelerator.is_main_process
        self._lines: list[tuple[int, float, Mapping[str, float] | Later]] = []  # (step, time, values), not yet written
        self._clips = 0
        self._began = self._since = time.monotonic()
        if self.writes:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            keep_until(self.path, start)
        if accelerator is not None and accelerator.log_with:
            run = {"dir": str(out), "name": Path(out).name}
            hparams = {k: v if isinstance(v, (bool, int, float, str)) else str(v) for k, v in flatten(dict(config or {})).items()}
            accelerator.init_trackers("kling", config=hparams, init_kwargs={"wandb": run})

    def log(self, step: int, values: Mapping[str, float] | Later, clips: int = 0) -> None:
        """Record the values of update number `step` (1-based: updates done), and how many clips it took, over all processes.

        `Later` values stay on the device; those of all buffered steps are read at once, every `log_every` steps.
        """
        self._lines.append((step, time.time(), values))
        self._clips += clips
        if step % self.log_every == 0 or step >= self.steps:
            self.flush()

    def flush(self) -> None:
        """Write everything recorded so far. Call it before a checkpoint is saved: a resumed run keeps lines up to its step."""
        if not self._lines:
            return
        waiting = [values.numbers for _, _, values in self._lines if isinstance(values, Later)]
        read = iter([part.tolist() for part in torch.cat(waiting).cpu().split([len(numbers) for numbers in waiting])] if waiting else [])
        lines = [(step, at, values.spell(next(read)) if isinstance(values, Later) else values) for step, at, values in self._lines]
        lines = [(step, at, {k: float(v) for k, v in values.items()}) for step, at, values in lines]
        self._lines = []
        if not self.writes:
            return
        text = ""
        for step, at, values in lines:
            finite = {k: v if math.isfinite(v) else None for k, v in values.items()}  # JSON has no NaN
            text += json.dumps({"step": step, "time": round(at, 3), **finite}) + "\n"
        append(self.path, text)
        if self.accelerator is not None and self.accelerator.log_with:
            for step, _, values in lines:
                self.accelerator.log(values, step=step)
        self._show(lines[-1][0], _means([values for _, _, values in lines]))

    def rewind(self, step: int) -> None:
        """The run goes back to `step`: cut what was recorded after it."""
        self._lines = []
        if self.writes:
            keep_until(self.path, step)

    def _show(self, step: int, means: dict[str, float]) -> None:
        now = time.monotonic()
        parts = [f"step {step}/{self.steps}"]
        parts += [f"{k} {short(v) if k == TOTAL else f'{v:.4g}'}" for k, v in means.items() if "/" not in k]
        if bins := [f"{v:.3g}" for k, v in sorted(means.items()) if k.startswith(_BIN)]:
            parts.append(f"by σ {' '.join(bins)}")
        if self._clips:
            parts.append(f"{self._clips / max(now - self._since, 1e-9):.3g} clips/s")
        if step > self.start:
            parts.append(f"ETA {duration((self.steps - step) * (now - self._began) / (step - self.start))}")
        self._clips, self._since = 0, now
        line = " · ".join(parts)
        tty = self.stream.isatty()
        self.stream.write(f"\r{line}\x1b[K" if tty else f"{line}\n")
        if tty and step >= self.steps:
            self.stream.write("\n")
        self.stream.flush()

    def close(self) -> None:
        self.flush()
        if self.accelerator is not None and self.accelerator.log_with:
            for tracker in self.accelerator.trackers:  # not `end_training`: it ends the process group, which later barriers need
                tracker.finish()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def append(path: Path, text: str) -> None:
    """Append lines to a file; if the disk is full, none of them. Raises `UserError` if they cannot be written."""
    with writing(path), path.open("ab", buffering=0) as file:
        before, left = file.seek(0, 2), memoryview(text.encode("utf-8"))
        try:
            while left:
                left = left[file.write(left) :]
        except OSError:
            file.truncate(before)
            raise


def finished(start: int, steps: int, model: Path) -> str:
    """The last line of a run. start: updates that were done when this process began."""
    if start >= steps:
        return f"already finished: {start} of {steps} steps are done, the model is in {model}; to continue give more steps= or another out="
    return f"finished: {steps} steps, the model is in {model}"


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, without one that was cut off when the process was killed."""
    lines = []
    for text in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def keep_until(path: Path, step: int) -> None:
    """Remove the lines after `step`, and broken ones, from a metrics.jsonl, if it exists."""
    if path.is_file():
        write_atomic(path, "".join(json.dumps(line) + "\n" for line in read_metrics(path) if line.get("step", 0) <= step))


def duration(seconds: float) -> str:
    """3723 -> '1h02m', 75 -> '1m15s'."""
    s = max(0, round(seconds))
    if s >= 3600:
        return f"{s // 3600}h{s % 3600 // 60:02d}m"
    return f"{s // 60}m{s % 60:02d}s" if s >= 60 else f"{s}s"


def short(n: float) -> str:
    """12_345_678 -> '12.35M'."""
    size, unit = next(((size, unit) for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if n >= size), (1, ""))
    return f"{n / size:.4g}{unit}"


def _means(rows: list[dict[str, float]]) -> dict[str, float]:
    """Mean of each value over the rows that have it; of `TOTAL` the last."""
    keys = dict.fromkeys(k for row in rows for k in row)
    columns = {k: [row[k] for row in rows if k in row] for k in keys}
    return {k: found[-1] if k == TOTAL else sum(found) / len(found) for k, found in columns.items()}
