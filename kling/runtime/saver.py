"""Writes the checkpoints of a run: each process writes its own rows, optionally in the background while training continues.

The parts are combined on the disk: each process leaves a small JSON beside its files, and the main one waits for all of them before it
writes the manifest. No object travels between processes, so nothing is pickled, and no background thread communicates with another
machine.
"""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from kling.errors import UserError
from kling.runtime.checkpoint import (
    Checkpoint,
    Groups,
    begin,
    disk_errors,
    finish,
    folder,
    load_latest,
    open_folder,
    write,
)
from kling.runtime.files import write_atomic
from kling.runtime.parallel import is_mine, local, same_for_all

PATIENCE = 1800.0  # seconds that the main process waits for the files of the others


class Saver:
    """Saves a run into `run_dir`. Every process makes one, and calls `save` at the same steps.

    accelerator: of a run on several processes. background: copy the tensors, and write them while training continues; at most one save
    runs at a time. keep_last, keep_every: as in `checkpoint.save`.
    """

    def __init__(
        self,
        run_dir: str | Path,
        keep_last: int = 2,
        keep_every: int = 0,
        *,
        accelerator: Accelerator | None = None,
        background: bool = True,
    ) -> None:
        self.run_dir, self.keep_last, self.keep_every = Path(run_dir), keep_last, keep_every
        self.accelerator, self.background = accelerator, background
        self.rank, self.ranks = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, step: int, tensors: Groups, meta: dict[str, Any] | None = None) -> None:
        """Write the checkpoint of `step`. Raises `UserError` if this or the previous one cannot be written, or a weight is not finite."""
        self.wait()
        mine = {name: {k: local(t) for k, t in group.items() if is_mine(t, self.rank)} for name, group in tensors.items()}
        check_finite(mine)
        if self.rank == 0:
            with disk_errors(self.run_dir, step):
                begin(self.run_dir, step)
        if self.ranks > 1:
            self.accelerator.wait_for_everyone()
        if not self.background:
            self._write(step, mine, meta or {})
            return
        copy = {name: {k: t.to("cpu", copy=True) for k, t in group.items()} for name, group in mine.items()}
        self._thread = threading.Thread(target=self._try, args=(step, copy, meta or {}), name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait for a save in the background. Raises its error."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def check(self) -> None:
        """Raise the error of a save in the background, of whatever kind: a run that only seems to save loses hours."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _try(self, *args: Any) -> None:
        try:
            self._write(*args)
        except BaseException as error:  # noqa: B036 - raised by `check`, in the thread that trains
            self._error = error

    def _write(self, step: int, mine: dict[str, dict[str, Tensor]], meta: dict[str, Any]) -> None:
        with disk_errors(self.run_dir, step):
            part = f".{self.rank:05d}" if self.ranks > 1 else ""
            files = write(self.run_dir, step, {name: group for name, group in mine.items() if group or self.rank == 0}, part)
            if self.ranks > 1:
                write_atomic(self._report(step, self.rank), json.dumps(files))
            if self.rank == 0:
                for rank in range(1, self.ranks):
                    files |= self._other(step, rank)
                for rank in range(self.ranks if self.ranks > 1 else 0):
                    self._report(step, rank).unlink()
                finish(self.run_dir, step, files, meta, self.keep_last, self.keep_every)

    def _other(self, step: int, rank: int) -> dict[str, dict[str, Any]]:
        """The file list of another process, as soon as it has written its files."""
        report, end = self._report(step, rank), time.monotonic() + PATIENCE
        while not report.is_file():
            if time.monotonic() > end:
                raise OSError(f"process {rank} has not written its part in {PATIENCE:.0f} s")
            time.sleep(0.05)
        return json.loads(report.read_text(encoding="utf-8"))

    def _report(self, step: int, rank: int) -> Path:
        return folder(self.run_dir, step).with_suffix(".tmp") / f"part-{rank:05d}.json"


def check_finite(groups: Groups) -> None:
    """Refuse to save weights that are not finite. Raises `UserError` naming the first."""
    for name, group in groups.items():
        for key, t in group.items():
            if t.is_floating_point() and not bool(torch.isfinite(t).all()):
                raise UserError(f"{name} '{key}' is not finite: not saved; go on from the last checkpoint with a lower learning rate")


def find_latest(accelerator: Accelerator, run_dir: str | Path, lost: int = 0) -> Checkpoint | None:
    """The newest intact checkpoint, the same for all processes: the main one verifies and the others follow. None if there is none yet.

    lost: the step of a run that must go back. Raises `UserError` if there is no checkpoint to go back to.
    """
    found = load_latest(run_dir) if accelerator.is_main_process else None
    step = same_for_all(accelerator, -1 if found is None else found.step)
    left = same_for_all(accelerator, int(found is not None and found.path.suffix == ".old"))  # by a kill: what `finish` would have replaced
    if step < 0 and lost:
        raise UserError(f"updates are not finite, and there is no checkpoint to go back to (step {lost}): lower lr, or raise warmup")
    if step < 0:
        return None
    return found or open_folder(folder(run_dir, step).with_suffix(".old" if left else ""))
