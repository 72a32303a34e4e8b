"""The results: videos with their replay JSON, under names that cannot be guessed, up to a limit."""

from __future__ import annotations

import dataclasses
import json
import re
import secrets
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
from kling_programs.sample.generate import precision_of

from kling.data.image import write_png
from kling.data.video import frame_rate, read_video, write_gif, write_video
from kling.errors import UserError
from kling.runtime.files import writing, written
from kling.sampling import record as records
from kling.sampling.pipeline import KlingPipeline
from kling.sampling.plan import Plan
from kling.sampling.request import Request

OTHER_KINDS = ("gif", "webm")  # other formats of a video, made at the first request
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
    """folder: for results; `folder/inputs` has their inputs. keep: number of results to keep.

    If there are more, the visitor with most loses their oldest, so that nobody displaces the results of others.
    """

    def __init__(self, folder: Path, model: dict[str, Any], keep: int = 200) -> None:
        self.folder, self.model, self.keep = folder.resolve(), model, keep
        self.inputs = self.folder / "inputs"
        with writing(self.folder):
            self.inputs.mkdir(parents=True, exist_ok=True)
        self._converting = threading.Lock()
        self._owners: dict[str, str] = {}  # result -> visitor; those of an earlier start count as one visitor's

    def put(
        self, frames: np.ndarray, request: Request, plan: Plan, pipe: KlingPipeline, seconds: float, visitor: str = "",
        model: dict[str, Any] | None = None, **more: Any,
    ) -> Result:  # fmt: skip
        """Add a result. frames: uint8 (T, H, W, 3). visitor: its owner. model: the weights, if they are not the default ones. more: for its
        record."""
        kind = "mp4" if len(frames) > 1 else "png"
        result = Result(self.folder / f"{secrets.token_hex(8)}.{kind}")
        if kind == "mp4":
            write_video(result.path, frames, plan.fps)
        else:
            write_png(result.path, frames[0])
        weights = model or self.model
        output = {"path": str(result.path), "format": kind, "fps": plan.fps, "seconds": round(seconds, 2)}
        record = records.make_record(
            request, plan, {name: weights[name] for name in ("path", "sha256")}, pipe.device, frames, precision_of(pipe),
            output=output, command="kling-demo", **({"studio": weights["studio"]} if "studio" in weights else {}), **more,
        )  # fmt: skip
        records.write_record(result.record_path, record)
        self._owners[result.id] = visitor
        self._tidy()
        return result

    def keep_made(self, kind: str, video: bytes, record: dict[str, Any], request: Request, visitor: str = "", **more: Any) -> Result:
        """Add a result that a server made. kind: "mp4" or "png". record: the server's, which gets this machine's names of files, and
        `more`."""
        result = Result(self.folder / f"{secrets.token_hex(8)}.{kind}")
        with written(result.path) as temporary:
            temporary.write_bytes(video)
        record |= {"request": dataclasses.asdict(request), **more}
        record["inputs"] = records.input_hashes(request)
        record["output"] |= {"path": str(result.path)}
        records.write_record(result.record_path, record)
        self._owners[result.id] = visitor
        self._tidy()
        return result

    def get(self, name: Any) -> Result:
        """The result of a name. Raises `UserError` for a name that is not, or no longer, on the shelf."""
        if isinstance(name, str) and re.fullmatch(r"[0-9a-f]{16}", name):
            for kind in ("mp4", "png"):
                result = Result(self.folder / f"{name}.{kind}")
                if result.path.is_file() and result.record_path.is_file():
                    return result
        raise UserError("that video is no longer here: make it again", code="gone")

    def convert(self, name: str) -> None:
        """Make `ID.gif` or `ID.webm` beside a result, unless it exists or there is no such result."""
        one, _, kind = name.partition(".")
        target = self.folder / name
        if kind not in OTHER_KINDS or not re.fullmatch(r"[0-9a-f]{16}", one):
            return
        with self._converting:
            source = self.folder / f"{one}.mp4"
            if target.exists() or not source.is_file():
                return
            clip = read_video(source)
            if kind == "gif":
                write_gif(target, clip.frames, clip.fps)
            else:
                write_webm(target, clip.frames.numpy(), clip.fps)

    def results(self) -> list[Result]:
        """All results, the newest first."""
        found = [Result(path) for kind in ("mp4", "png") for path in self.folder.glob(f"*.{kind}")]
        ages = {one: one.record_path.stat().st_mtime_ns for one in found if one.record_path.is_file()}
        return sorted(ages, key=ages.__getitem__, reverse=True)

    def _tidy(self) -> None:
        """Delete the oldest results beyond `keep`, from the visitor with most, and inputs that no result needs."""
        stay = self.results()
        while len(stay) > self.keep:
            most = Counter(self._owners.get(one.id, "") for one in stay).most_common(1)[0][0]
            gone = next(one for one in reversed(stay) if self._owners.get(one.id, "") == most)
            stay.remove(gone)
            self._owners.pop(gone.id, None)
            for path in (gone.record_path, gone.path, *self.folder.glob(f"{gone.id}.*")):
                path.unlink(missing_ok=True)
        self.tidy_inputs()

    def tidy_inputs(self) -> None:
        """Delete inputs that no result was made from and that were not used for a while."""
        used = {name for one in self.results() for name in one.record["inputs"]}
        old = time.time() - UNUSED_SECONDS
        for path in self.inputs.iterdir():
            if str(path) not in used and path.stat().st_mtime < old:
                path.unlink(missing_ok=True)


def write_webm(path: Path, frames: np.ndarray, fps: float) -> None:
    """Write uint8 (T, H, W, 3) as VP9, which every browser plays."""
    with written(path) as temporary, av.open(f"file:{temporary}", "w", format="webm", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream(
            "libvpx-vp9", rate=frame_rate(fps), options={"crf": "24", "b": "0", "deadline": "good", "cpu-used": "4"}
        )
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for picture in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")))
        container.mux(stream.encode())
