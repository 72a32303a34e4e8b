"""Updates that are not finite are skipped and counted; too many in a row roll the run back to its last checkpoint."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kling.errors import UserError
from kling.runtime.files import write_atomic

LIMIT = 5  # updates in a row that may be skipped


class Guard:
    """Decides on every update from its loss and gradient norm, which are the same on all processes, so that all decide the same.

    An update that is not finite is skipped and counted. After `limit` in a row `rollback` is True once: return to the last checkpoint.
    If it happens again, `rollback` raises `UserError`.
    """

    def __init__(self, limit: int = LIMIT) -> None:
        self.limit, self.skipped, self.row, self.rolled_back = limit, 0, 0, False

    def sound(self, *values: float) -> bool:
        """True if an update with these values may be made."""
        fine = all(math.isfinite(value) for value in values)
        self.row = 0 if fine else self.row + 1
        self.skipped += not fine
        return fine

    def rollback(self, batch: list[dict[str, Any]], out: str | Path, rank: int = 0) -> bool:
        """True if the run must return to its last checkpoint now. batch: places and clips of the update, written out before stopping."""
        if self.row < self.limit:
            return False
        if self.rolled_back:
            path = Path(out) / f"bad-batch-{rank:05d}.json"
            write_atomic(path, json.dumps(batch))
            raise UserError(
                f"{self.row} updates in a row were not finite, again after returning to the last checkpoint: "
                f"the clips of the last one are in {path}; look at them, or lower the learning rate"
            )
        self.row, self.rolled_back = 0, True
        return True


class DeviceGuard(Guard):
    """The same without waiting in any update: bad updates are skipped on the device (`found_inf` of PyTorch's fused optimizers and of
    `Muon`), and counted there. The host reads the counts whenever the log is read, and returns to the last checkpoint if at that moment
    `limit` or more in a row were skipped; none of them has changed anything.
    """

    def __init__(self, device: torch.device, limit: int = LIMIT) -> None:
        super().__init__(limit)
        self.counts = torch.zeros(2, device=device)  # skipped updates: in a row, and in total

    def judge(self, *values: Tensor) -> Tensor:
        """() 1.0 if an update with these values must be skipped, else 0.0. The values are the same on all processes, as in `Guard`."""
        bad = 1.0 - torch.stack([value.float() for value in values]).isfinite().all().float()
        self.counts = torch.stack([(self.counts[0] + 1) * bad, self.counts[1] + bad])
        return bad

    def look(self, row: float, skipped: float) -> None:
        """Take the values of `counts`, read from the device."""
        self.row, self.skipped = int(row), int(skipped)

    def rollback(self, batch: list[dict[str, Any]], out: str | Path, rank: int = 0) -> bool:
        back = super().rollback(batch, out, rank)
        if back:
            self.counts[0].zero_()
        return back
