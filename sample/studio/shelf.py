"""What was made: a video and its replay JSON under a name that nobody can guess, and only so many of them."""

from __future__ import annotations

import json
import re
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kling.data.image import write_png
from kling.data.video import write_video
from kling.errors import UserError
from kling.sampling import record as records
from kling.sampling.pipeline import KlingPipeline
from kling.sampling.plan import Plan
from kling.sampling.request import Request

UNUSED_SECONDS = 3600  # an input that no result refers to is kept this long


@dataclass(frozen=True)
class Result:
    """One finished video (or picture) on the shelf."""

    path: Path

    @property
    def id(self) -> str:
        return self.path.stem

    @property
    def record_path(self) -> Path:
        return records.find_record(self.path) or records.record_path(self.path)

    @property
    def record(self) -> dict[str, Any]:
        return json.loads(self.record_path.read_text(encoding="utf-8"))


class Shelf:
    """folder: where results go; `folder/inputs` holds what they were made from. keep: how many results stay."""

    def __init__(self, folder: Path, model: dict[str, Any], keep: int = 200) -> None:
        self.folder, self.model, self.keep = folder.resolve(), model, keep
        self.inputs = self.folder / "inputs"
        self.inputs.mkdir(parents=True, exist_ok=True)

    def put(self, frames: np.ndarray, request: Request, plan: Plan, pipe: KlingPipeline, seconds: float) -> Result:
        """frames: uint8 (T, H, W, 3)."""
        kind = "mp4" if len(frames) > 1 else "png"
        result = Result(self.folder / f"{secrets.token_hex(8)}.{kind}")
        if kind == "mp4":
            write_video(result.path, frames, plan.fps)
        else:
            write_png(result.path, frames[0])
        output = {"path": str(result.path), "format": kind, "fps": plan.fps, "seconds": round(seconds, 2)}
        record = records.make_record(request, plan, self.model, pipe.device, frames, output=output, command="kling-demo")
        records.write_record(result.record_path, record)
        self._tidy()
        return result

    def get(self, name: Any) -> Result:
        """Raises `UserError` for a name that is not, or no longer, on the shelf."""
        if isinstance(name, str) and re.fullmatch(r"[0-9a-f]{16}", name):
            for kind in ("mp4", "png"):
                path = self.folder / f"{name}.{kind}"
                if path.is_file() and records.find_record(path):
                    return Result(path)
        raise UserError("that video is no longer here: make it again")

    def _results(self) -> list[Path]:
        """Records, the newest first."""
        return sorted(self.folder.glob("*.json"), key=lambda p: p.stat().st_mtime_ns, reverse=True)

    def _tidy(self) -> None:
        """Drop the oldest results beyond `keep`, and inputs that none of the rest was made from."""
        stay, go = self._results()[: self.keep], self._results()[self.keep :]
        for record in go:
            name = record.name.split(".")[0]
            for path in (record, self.folder / f"{name}.mp4", self.folder / f"{name}.png"):
                path.unlink(missing_ok=True)
        used = {name for record in stay for name in json.loads(record.read_text(encoding="utf-8"))["inputs"]}
        old = time.time() - UNUSED_SECONDS
        for path in self.inputs.iterdir():
            if str(path) not in used and path.stat().st_mtime < old:
                path.unlink(missing_ok=True)
