"""Updates that are not finite are left out and counted; too many of them in a row take the run back to its last checkpoint."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kling.errors import UserError
from kling.runtime.files import write_atomic

LIMIT = 5  # updates in a row that may be left out


class Guard:
    """Decides on every update, from its loss and gradient norm: values that all processes share, so they all decide alike.

    An update that is not finite is left out and counted. After `limit` in a row `rollback` is True once: go back to the last checkpoint.
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
        """True if the run must go back to its last checkpoint now. batch: places and clips of the update, written out before it stops."""
        if self.row < self.limit:
            return False
        if self.rolled_back:
            path = Path(out) / f"bad-batch-{rank:05d}.json"
            write_atomic(path, json.dumps(batch))
            raise UserError(
                f"{self.row} updates in a row were not finite, again after going back to the last checkpoint: "
                f"the clips of the last one are in {path}; look at them, or lower the learning rate"
            )
        self.row, self.rolled_back = 0, True
        return True


class DeviceGuard(Guard):
    """The same without a wait in any update: each is left out where its gradients are, on the device (`found_inf` of PyTorch's fused
    optimizers and of `Muon`), and counted there. The host looks at the counts whenever the log is read, and goes back to the last
    checkpoint if at that moment `limit` or more in a row were left out; none of them has changed anything.
    """

    def __init__(self, device: torch.device, limit: int = LIMIT) -> None:
        super().__init__(limit)
        self.counts = torch.zeros(2, device=device)  # updates left out: in a row, and in all

    def judge(self, *values: Tensor) -> Tensor:
        """() 1.0 if an update with these values must be left out, else 0.0. Values that all processes share, as in `Guard`."""
        bad = 1.0 - torch.stack([value.float() for value in values]).isfinite().all().float()
        self.counts = torch.stack([(self.counts[0] + 1) * bad, self.counts[1] + bad])
        return bad

    def look(self, row: float, skipped: float) -> None:
        """What `counts` was, read."""
        self.row, self.skipped = int(row), int(skipped)

    def rollback(self, batch: list[dict[str, Any]], out: str | Path, rank: int = 0) -> bool:
        back = super().rollback(batch, out, rank)
        if back:
            self.counts[0].zero_()
        return back
