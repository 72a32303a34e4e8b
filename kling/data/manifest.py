"""The manifest: one JSON line for every clip that may be used for training, with what a scan measured.

    {"path": "cats/a.mp4", "start": 0.0, "end": 5.12, "captions": [{"text": "a cat", "language": "en", "weight": 1.0}],
     "video": {"width": 640, "height": 272, "frames": 250, "fps": 25.0, ...}, "bytes": 509868, "sha256": "5d41...", "measures": {...}, ...}

A clip of several shots, which a scan never makes, has "shots": [[0.0, 1], [2.4, 1]], where each begins and how many captions are its own.
Paths are relative to the manifest, or absolute. Times are seconds from the first frame. Unknown keys are an error, so that none is lost.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import typing
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from kling.condition.state import MOST_REFERENCES
from kling.config import is_a
from kling.data.info import VideoInfo
from kling.errors import UserError, unknown
from kling.runtime.files import Member, Source, parse_json, stamp, written

LONGEST = 1e6  # seconds of a file, eleven days
IMAGE = "image"  # VideoInfo.container of a still picture


class MissingClip(UserError):
    """A file that a manifest lists does not exist."""


@dataclass(frozen=True)
class Caption:
    """One description. `weight` is how often training uses it, relative to the clip's other captions."""

    text: str
    language: str = ""
    weight: float = 1.0


@dataclass(frozen=True)
class Shot:
    """One clip: a part of a video without a cut, or a picture."""

    path: str
    video: VideoInfo
    bytes: int
    mtime_ns: int
    sha256: str
    start: float = 0.0  # seconds
    end: float = 0.0  # seconds; the end of the last frame
    member: tuple[str, int, int] | None = None  # (name, start, bytes) if `path` is a tar
    clock: tuple[float, tuple[tuple[float, int], ...]] | None = None  # (time of the first frame, (step, repetitions) …), seconds
    captions: tuple[Caption, ...] = ()
    camera: str | None = None  # a camera file, beside the manifest
    tracks: str | None = None  # a file of tracks, beside the manifest
    shots: tuple[tuple[float, int], ...] = ()  # of each shot where it begins, seconds, and the number of captions that are its own
    references: tuple[str, ...] = ()  # pictures of its things, beside the manifest
    measures: dict[str, Any] = field(default_factory=dict)

    @property
    def is_image(self) -> bool:
        return self.video.container == IMAGE

    @property
    def name(self) -> str:
        """A readable name: "cats/a.mp4@5.125"."""
        inside = f"/{self.member[0]}" if self.member else ""
        return f"{self.path}{inside}@{self.start:.3f}"

    @property
    def seconds(self) -> float:
        return self.end - self.start

    def count(self, fps: float) -> int:
        """Frames that the clip gives at `fps`: 1 for a picture."""
        whole = dataclasses.replace(self.video, duration=self.seconds)
        return 1 if self.is_image else whole.count(fps)


@dataclass(frozen=True)
class Bad:
    """A file that cannot be used, or a clip that was left out, and why."""

    path: str
    reason: str  # one or two words; reasons are counted
    detail: str  # one line
    bytes: int = 0
    mtime_ns: int = 0
    start: float = 0.0
    shot: dict[str, Any] | None = None  # everything measured, for a clip that a filter dropped


class Manifest:
    """The clips of a file, with the folder that their paths are relative to."""

    def __init__(self, shots: Iterable[Shot], folder: str | Path = ".") -> None:
        self.shots, self.folder = list(shots), Path(folder)

    def __len__(self) -> int:
        return len(self.shots)

    def source(self, shot: Shot) -> Source:
        path = self.folder / shot.path
        return Member(path, *shot.member) if shot.member else path

    def check(self, shot: Shot) -> Source:
        """The clip's file. Raises `UserError` if it has changed since it was scanned (`MissingClip` if it is gone)."""
        source = self.source(shot)
        try:
            now = stamp(source)
        except OSError as error:
            raise MissingClip(f"{source} of clip {shot.name} cannot be read ({error.strerror}): restore it, or scan again") from None
        if now != (shot.mtime_ns, shot.bytes):
            raise UserError(f"{source} has changed since it was scanned: run kling-data scan again")
        return source


def read_manifest(path: str | Path) -> Manifest:
    """Read a manifest. Raises `UserError` with the line number for invalid lines, and if there is no clip."""
    path = Path(path)
    shots = [shot_from(line, f"{path} line {number}") for number, line in read_lines(path)]
    if not shots:
        raise UserError(f"manifest {path} holds no clip: see the reasons in {quarantine_of(path)}")
    return Manifest(shots, path.parent)


def write_manifest(path: str | Path, shots: Iterable[Shot]) -> None:
    write_lines(path, (dataclasses.asdict(shot) for shot in shots))


def quarantine_of(manifest: Path) -> Path:
    """Where a scan lists unusable files: manifest.jsonl -> quarantine.jsonl, cats.jsonl -> cats.quarantine.jsonl."""
    return manifest.with_name("quarantine.jsonl" if manifest.stem == "manifest" else f"{manifest.stem}.quarantine.jsonl")


def read_quarantine(path: str | Path) -> list[Bad]:
    """The lines of a quarantine; [] if there is none. Raises `UserError` with the line number for invalid ones."""
    path, rows = Path(path), []
    for number, line in read_lines(path) if path.is_file() else ():
        _check_types(Bad, line, where := f"{path} line {number}")
        if lacks := {"path", "reason", "detail"} - set(line):
            raise UserError(f"{where} has no {min(lacks)}: it is no quarantine of kling-data scan; move it away and scan again")
        rows.append(Bad(**line))
    return rows


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of a jsonl file. Raises `UserError` naming the line."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: make it with kling-data scan") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}): give a jsonl file in UTF-8") from None
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = parse_json(line)
        except ValueError as error:
            raise UserError(f"{path} line {number} is not JSON ({error}): give one object a line") from None
        if not isinstance(value, dict):
            raise UserError(f"{path} line {number} holds a {type(value).__name__}: give one object a line")
        yield number, value


def write_lines(path: str | Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write a jsonl file atomically."""
    with written(path) as temporary:
        temporary.write_bytes(b"".join(as_line(row) for row in rows))


def as_line(row: dict[str, Any]) -> bytes:
    """One line of a jsonl file in UTF-8. Bytes of a file name that are not UTF-8 become JSON escapes, and are restored when read."""
    return (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def shot_from(row: dict[str, Any], where: str) -> Shot:
    """The `Shot` of a manifest's line. Raises `UserError` that begins with `where`, for a line that a scan cannot have written."""
    try:
        _check_types(Shot, row, where)
        for cls, parts in ((VideoInfo, [row["video"]]), (Caption, row.get("captions", []))):
            for part in parts:
                _check_types(cls, part, where)
        video = VideoInfo(**row["video"] | {"keyframes": tuple(row["video"].get("keyframes", ()))})
        captions = tuple(Caption(**c) for c in row.get("captions", []))
        member = tuple(row["member"]) if row.get("member") else None
        shots = tuple((float(start), int(count)) for start, count in row.get("shots", ()))
        clock = (row["clock"][0], tuple(map(tuple, row["clock"][1]))) if row.get("clock") else None
        shot = Shot(**row | {"video": video, "captions": captions, "member": member, "clock": clock, "shots": shots})
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{where} is not a line of a manifest ({error}): make it with kling-data scan") from None
    _check_facts(shot, where)
    if shots:
        begins = [start for start, _ in shots]
        if begins[0] != shot.start or any(b <= a for a, b in pairwise([*begins, shot.end])) or shot.is_image:
            raise UserError(
                f"{where}: shots begin at {begins} of a clip from {shot.start:g} to {shot.end:g} s: give rising times, its start first"
            )
        if sum(count for _, count in shots) != len(captions) or any(count < 1 for _, count in shots):
            raise UserError(
                f"{where}: shots have {[count for _, count in shots]} captions, and there are {len(captions)}: give each its own"
            )
        if shot.camera or shot.tracks:
            raise UserError(f"{where}: a clip of several shots has a camera or tracks, which are of one: leave them out")
    files = shot.references
    if not is_a(files, list[str]) or len(files) > MOST_REFERENCES:
        raise UserError(f"{where}: references {files!r:.60}: give a list of up to {MOST_REFERENCES} pictures")
    return dataclasses.replace(shot, references=tuple(files))


def _check_types(cls: type, row: Any, where: str) -> None:
    """Raises `UserError` for a value of a row that is not of its field's type. Parts with fields of their own are checked by themselves."""
    line = f"{where} is not a line of a {'quarantine' if cls is Bad else 'manifest'}"
    hints = typing.get_type_hints(cls)
    if not isinstance(row, dict):
        raise UserError(f"{line}: {row!r:.60} is a {type(row).__name__}: give an object of {', '.join(hints)}")
    for key, value in row.items():
        if key not in hints:
            raise UserError(f"{line}: {unknown('key', key, hints)}")
        plain = {"video": dict, "captions": list[object], "references": object}.get(key) if cls is Shot else None
        if not is_a(value, plain or hints[key]):
            raise UserError(f"{line}: {key} is {value!r:.60}: give a {_called(plain or hints[key])}")


def _called(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)


def _check_facts(shot: Shot, where: str) -> None:
    """Raises `UserError` for what no file can have, or a clip that lies outside its file: readers take these facts as given."""
    video = shot.video
    if min(video.width, video.height, video.frames) < 1 or video.fps <= 0 or not 0 <= video.duration <= LONGEST or video.pixel_aspect <= 0:
        facts = f"{video.width}x{video.height}, {video.frames} frames, {video.fps:g} fps, {video.duration:g} s"
        raise UserError(f"{where}: no video is of {facts}: scan it again")
    if not 0 <= shot.start <= shot.end <= video.duration + max(1.0, video.gap):
        raise UserError(f"{where}: a clip from {shot.start:g} to {shot.end:g} s of a file of {video.duration:g} s: give times inside it")
    if not re.fullmatch("[0-9a-f]{64}", shot.sha256):
        raise UserError(f"{where}: sha256 is {shot.sha256!r:.40}: give 64 hexadecimal digits, or scan it again")
    if bad := next((caption for caption in shot.captions if caption.weight <= 0), None):
        raise UserError(f"{where}: the caption '{bad.text:.40}' has weight {bad.weight:g}: give a number above 0")


def relative(path: Path, folder: Path) -> str:
    """The name of a file in a manifest in `folder`: relative if the file is below the folder, absolute otherwise."""
    path, folder = Path(os.path.abspath(path)), Path(os.path.abspath(folder))
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.as_posix()
