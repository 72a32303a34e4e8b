"""Updates that are not finite are left out and counted; too many of them in a row take the run back to its last checkpoint."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

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
