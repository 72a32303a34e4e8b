"""A folder of videos with a caption file beside each, as a dataset: the shortest way to train on footage of your own.

    cats/a.mp4   cats/a.txt    one caption a line
    dogs/b.webm  dogs/b.json   {"caption": "..."} or {"captions": ["...", "..."]}

Every video is cut into as many clips as it is long. `item(i)` is a pure function of i: it holds no state and draws no numbers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from kling.data.transforms import check_size
from kling.data.video import frame_rate, probe, read_video
from kling.errors import UserError
from kling.shapes import latent_frames

SUFFIXES = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".gif", ".mpg", ".mpeg", ".ts", ".m2ts", ".flv", ".wmv", ".ogv", ".3gp")
NAMED = 3  # unusable files that one error line names


@dataclass(frozen=True)
class Sample:
    """One clip of the dataset."""

    video: Tensor  # uint8 (T, H, W, 3)
    captions: list[str]  # at least one; [""] where there is none
    source: str  # "cats/a.mp4@5.125": the path under the root, and the second at which the clip begins


@dataclass(frozen=True)
class Cut:
    """Where a clip lies."""

    path: Path
    start: float  # seconds
    captions: tuple[str, ...]


class VideoFolder:
    """Clips of `frames` frames at `fps` and `size` (H, W), from every video below `root`, in the order of their names.

    unconditional  a video without a caption file is used, with the caption ""
    skip_bad       leave unusable files out; `bad` lists them and `report()` counts them. Otherwise they are a `UserError`.
    """

    def __init__(
        self,
        root: str | Path,
        frames: int,
        fps: float,
        size: tuple[int, int],
        *,
        unconditional: bool = False,
        skip_bad: bool = False,
    ) -> None:
        latent_frames(frames)
        check_size(*size)
        self.root, self.frames, self.size, self.unconditional = Path(root), frames, size, unconditional
        self.fps = float(frame_rate(fps))
        if not self.root.is_dir():
            raise UserError(f"{self.root} is not a folder: give the folder that holds the videos")
        self.cuts: list[Cut] = []
        self.bad: list[tuple[Path, str]] = []
        self.files = 0
        for path in find_videos(self.root):
            try:
                self.cuts += self._cut(path)
                self.files += 1
            except UserError as error:
                self.bad.append((path, str(error)))
        if self.bad and not skip_bad:
            raise UserError(f"{self.report()}; repair or move them, or skip them with skip_bad")
        if not self.cuts:
            raise UserError(f"{self.report()}: put videos ({' '.join(SUFFIXES)}) there, with captions in .txt or .json")

    def __len__(self) -> int:
        return len(self.cuts)

    def __getitem__(self, index: int) -> Sample:
        return self.item(index)

    def item(self, index: int) -> Sample:
        """Clip `index`. Raises `IndexError` out of range and `UserError` if the file has gone bad since it was listed."""
        cut = self.cuts[index]
        clip = read_video(cut.path, fps=self.fps, start=cut.start, num_frames=self.frames, size=self.size)
        return Sample(clip.frames, list(cut.captions), f"{cut.path.relative_to(self.root).as_posix()}@{cut.start:.3f}")

    def report(self) -> str:
        """One line: what is used, and what is not and why."""
        line = f"{self.root}: {len(self.cuts)} clips of {self.frames} frames from {self.files} videos"
        if self.bad:
            named = "; ".join(reason for _, reason in self.bad[:NAMED])
            more = f"; and {len(self.bad) - NAMED} more" if len(self.bad) > NAMED else ""
            line += f", {len(self.bad)} unusable ({named}{more})"
        return line

    def _cut(self, path: Path) -> list[Cut]:
        """The clips of one video, one after the other."""
        info = probe(path)
        clips = info.count(self.fps) // self.frames
        if not clips:
            seconds = self.frames / self.fps
            raise UserError(f"{path} is {info.duration:.2f} s long, one clip takes {seconds:.2f} s: remove it or ask for fewer frames")
        captions = read_captions(path, required=not self.unconditional)
        return [Cut(path, k * self.frames / self.fps, captions) for k in range(clips)]


def find_videos(root: Path) -> list[Path]:
    """Videos below `root` by suffix, sorted; hidden files and folders are passed over, links are followed once."""

    def walk() -> Iterator[Path]:
        seen: set[str] = set()
        for folder, folders, names in os.walk(root, followlinks=True):
            real = os.path.realpath(folder)
            folders[:] = [] if real in seen else [name for name in folders if not name.startswith(".")]
            if real not in seen:
                yield from (Path(folder, n) for n in names if not n.startswith(".") and Path(n).suffix.lower() in SUFFIXES)
            seen.add(real)

    return sorted(walk())


def read_captions(video: Path, required: bool = True) -> tuple[str, ...]:
    """The captions beside a video. Raises `UserError` naming the file if they are missing, empty, doubled or ill-formed."""
    text, record = video.with_suffix(".txt"), video.with_suffix(".json")
    present = [path for path in (text, record) if path.is_file()]
    if len(present) == 2:
        raise UserError(f"{video} has both {text.name} and {record.name}: keep one")
    if not present:
        if required:
            raise UserError(f"{video} has no caption: write {text.name} beside it (one caption a line), or train with unconditional")
        return ("",)
    (path,) = present
    try:
        body = path.read_text(encoding="utf-8-sig")
        captions = _from_json(path, json.loads(body)) if path == record else body.splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8: save it as UTF-8") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON ({error}): repair it") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check its permissions") from None
    captions = tuple(line.strip() for line in captions if line.strip())
    if not captions:
        raise UserError(f"{path} holds no caption: write one a line, or remove the file and train with unconditional")
    return captions


def _from_json(path: Path, record: object) -> list[str]:
    """The captions of {"caption": str | [str], "captions": [str]}; other keys are the user's own."""
    captions: list[object] = []
    for key in ("caption", "captions"):
        value = record.get(key, []) if isinstance(record, dict) else None
        captions += [value] if isinstance(value, str) else value if isinstance(value, list) else [None]
    if not all(isinstance(caption, str) for caption in captions):
        raise UserError(f'{path}: captions must be text: write {{"caption": "..."}} or {{"captions": ["...", "..."]}}')
    return captions
