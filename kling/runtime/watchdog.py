"""Reports where a process that makes no progress is stuck."""

from __future__ import annotations

import faulthandler
import sys
from pathlib import Path


class Watchdog:
    """Writes the stacks of this process to `hang-<rank>.txt` in the run's folder when `seconds` pass without a `beat`; 0 is off.

    Every process has its own, so that a hang, which stops all of them, shows where each one is. It only reports and ends nothing.
    """

    def __init__(self, out: str | Path, rank: int = 0, seconds: float = 1800) -> None:
        self.seconds, self.path = seconds, Path(out) / f"hang-{rank:05d}.txt"
        self._file = None

    def beat(self) -> None:
        """Report progress: start counting again."""
        if self.seconds > 0:
            faulthandler.dump_traceback_later(self.seconds, repeat=True, file=self._file)

    def __enter__(self) -> Watchdog:
        if self.seconds > 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("w")
            self.beat()
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            faulthandler.cancel_dump_traceback_later()
            self._file.close()
            stacks = self.path.read_text()
            self._file = None
            if stacks:
                print(f"the run had made no progress for a while: see {self.path}", file=sys.stderr)
            else:
                self.path.unlink()
