"""Finds the input of a scan: videos and pictures in folders, csv, json and jsonl tables, and WebDataset tar shards, with their captions.

A table needs a column with the file. Well-known column names are recognised (OpenVid `video`, Panda and Koala `videoID`, ...); others are
mapped, with a template if the column is only part of the name: {"path": "{videoID}.mp4", "caption": ["text", "text_zh"]}.
A .json table is a list of such rows, as VideoX-Fun and DiffSynth keep them: [{"file_path": "a.mp4", "text": "...", "type": "video"}].
"""

from __future__ import annotations

import csv
import math
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kling.data.manifest import Caption, read_lines
from kling.data.scan.sidecar import caption, caption_suffixes, captions_from, captions_in, find_camera, nothing, read_captions
from kling.errors import UserError, unknown
from kling.runtime.files import Member, Source, file_of, head, member_of, parse_json, parse_literal, sniff

VIDEOS = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".gif", ".mpg", ".mpeg", ".ts", ".m2ts", ".flv", ".wmv", ".ogv", ".3gp")
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
TEXTS = (".txt", ".json", ".jsonl", ".csv", ".tsv", ".md", ".yaml", ".html")  # files that are not checked for being a video
TABLES = (".csv", ".tsv", ".json", ".jsonl")
COLUMNS = {
    "path": ("path", "video", "video_path", "file", "file_path", "file_name", "filename", "videoID", "clip_id"),
    "caption": ("caption", "captions", "text", "prompt"),
    "start": ("start", "start_time"),
    "end": ("end", "end_time"),
    "timestamp": ("timestamp", "timestamps"),
    "camera": ("camera",),
}
csv.field_size_limit(1 << 24)  # Koala's captions are long


@dataclass(frozen=True)
class Candidate:
    """A file to examine, or a part of it, in seconds. `trouble`: an error that is already known."""

    source: Source
    captions: tuple[Caption, ...] = ()
    start: float | None = None
    end: float | None = None
    camera: Path | None = None
    trouble: str = ""


class Listing:
    """Lists the files below the given paths. `passed` counts, by suffix, files in folders and tars that are neither video nor picture.

    mapping: field of `COLUMNS` -> column or template, or several for captions. root: the folder that a table's paths are relative to; by
    default the table's own.
    """

    def __init__(self, mapping: Mapping[str, str | Sequence[str]] | None = None, root: str | Path | None = None) -> None:
        self.mapping = {name: [columns] if isinstance(columns, str) else list(columns) for name, columns in (mapping or {}).items()}
        self.root, self.passed = root, Counter[str]()
        if root is not None and not Path(root).is_dir():
            raise UserError(f"root {root} is no folder: give the one that the table's paths begin in")
        for name, columns in self.mapping.items():
            if name not in COLUMNS:
                raise unknown("field", name, COLUMNS)
            if len(columns) > 1 and name != "caption":
                raise UserError(f"{name} is mapped to {', '.join(columns)}: choose one; only captions may have several columns")

    def find(self, paths: Iterable[str | Path]) -> list[Candidate]:
        """Everything below `paths`, each file once, sorted by name; if a file is listed again, its captions are added to the first entry.

        Raises `UserError` for an invalid path or table.
        """
        paths, found = [Path(path) for path in paths], {}
        given = [name for name, value in (("a mapping of columns", self.mapping), (f"the root {self.root}", self.root)) if value]
        if given and not any(path.suffix.lower() in TABLES and not path.is_dir() for path in paths):
            raise UserError(f"{given[0]} is for tables, and {', '.join(map(str, paths))} are none: leave it out, or give a table")
        for path in paths:
            if path.is_dir():
                candidates = self._folder(path)
            elif path.suffix.lower() in (".csv", ".tsv"):
                candidates = self._table(path, _read_csv(path))
            elif path.suffix.lower() == ".json":
                candidates = self._table(path, _read_list(path))
            elif path.suffix.lower() == ".jsonl":
                candidates = self._table(path, ((f"line {number}", row) for number, row in read_lines(path)))
            elif is_tar(path):
                candidates = self._tar(path)
            else:
                head(path)  # raises if the path is missing
                candidates = iter([with_sidecars(path)])
            for one in candidates:
                key = (os.path.abspath(file_of(one.source)), member_of(one.source), one.start, one.end)
                found[key] = _joined(found[key], one) if key in found else one
        if found and all(one.trouble and is_tar(one.source) for one in found.values()):
            raise UserError(next(iter(found.values())).trouble)  # only shards were given, and none can be read
        if not found:
            seen = f" ({sum(self.passed.values())} other files)" if self.passed else ""
            raise UserError(
                f"no video or picture in {', '.join(map(str, paths))}{seen}: give folders, csv, json, jsonl or tar files that hold some"
            )
        return list(found.values())

    def _folder(self, root: Path) -> Iterator[Candidate]:
        for path in walk(root):
            suffix = path.suffix.lower()
            if is_tar(path):
                yield from self._tar(path)
            elif suffix in VIDEOS + IMAGES or (suffix not in TEXTS and is_media(path)):
                yield with_sidecars(path)
            else:
                self.passed[suffix or "no suffix"] += 1

    def _tar(self, path: Path) -> Iterator[Candidate]:
        """Media of a WebDataset shard; the files of one sample have the same name up to the first dot.

        A damaged shard gives its files up to the damage, then a candidate with the error.
        """
        samples: dict[str, dict[str, Member]] = {}
        trouble = ""
        try:
            with tarfile.open(path, "r:") as tar:
                for entry in tar:
                    if entry.isfile():
                        folder, _, name = entry.name.rpartition("/")
                        key, _, suffix = name.partition(".")
                        samples.setdefault(f"{folder}/{key}", {})[f".{suffix}"] = Member(path, entry.name, entry.offset_data, entry.size)
                with path.open("rb") as file:  # tarfile takes a damaged header for the end
                    file.seek(tar.offset)
                    if (end := file.read(tarfile.BLOCKSIZE)) != bytes(tarfile.BLOCKSIZE):
                        trouble = f"{path} is damaged at byte {tar.offset} of {path.stat().st_size}" if end else f"{path} is cut short"
                        trouble += ": the rest is lost, so download or make it again"
        except (tarfile.TarError, OSError, ValueError) as error:
            trouble = f"{path} is not an uncompressed tar that can be read to its end ({error}): unpack it, or make it again"
        for parts in samples.values():
            media = {s: m for s, m in parts.items() if s.lower() in VIDEOS + IMAGES or (s.lower() not in TEXTS and is_media(m))}
            beside = {suffix: caption_suffixes(suffix) for suffix in media}
            self.passed.update(s for s in parts if s not in media and not any(s in suffixes for suffixes in beside.values()))
            for suffix, member in media.items():
                try:
                    yield Candidate(member, captions_in([parts[s] for s in beside[suffix] if s in parts]))
                except UserError as error:
                    yield Candidate(member, trouble=str(error))
        if trouble:
            yield Candidate(path, trouble=trouble)

    def _table(self, table: Path, rows: Iterable[tuple[str, dict[str, Any]]]) -> Iterator[Candidate]:
        """The files of rows, each given with its position in the table, such as "line 3"."""
        root = Path(self.root) if self.root else table.parent
        for place, row in rows:
            where = f"{table} {place}"
            path = self._field(row, "path", where)
            if not isinstance(path, str | int):
                raise UserError(f"{where} names no file; its columns are {', '.join(row)}: map one with path=COLUMN or path={{COLUMN}}.mp4")
            captions = [c for value in self._fields(row, "caption", where) for c in _captions(value, where)]
            camera = self._field(row, "camera", where)
            media, stretches = root / str(path), self._stretches(row, where)
            there = with_sidecars(media)
            shares = [tuple(captions)] * len(stretches)
            if len(captions) > 1 and len(stretches) > 1:  # Panda: a list of captions, one for each of a list of time ranges
                if len(captions) != len(stretches):
                    raise UserError(
                        f"{where} has {len(captions)} captions for {len(stretches)} stretches: give one for each, or one for all"
                    )
                shares = [(one,) for one in captions]
            for own, (start, end) in zip(shares, stretches, strict=True):
                yield Candidate(media, own or there.captions, start, end, root / str(camera) if camera else there.camera, there.trouble)

    def _field(self, row: dict[str, Any], field: str, where: str) -> Any:
        """The value of a field in a row; None if it has none."""
        return next(iter(self._fields(row, field, where)), None)

    def _fields(self, row: dict[str, Any], field: str, where: str) -> list[Any]:
        """The values of a field in a row: from all columns it is mapped to, or else from the first well-known column that is not empty."""
        if field not in self.mapping:
            return [row[name] for name in COLUMNS[field] if not nothing(row.get(name))][:1]
        values: list[Any] = []
        for column in self.mapping[field]:
            if "{" in column:
                values.append(_filled(column, row, f"{field}={column}", where))
            elif column in row:
                values.append(row[column])
            else:
                raise unknown(f"column in {where}:", column, row)
        return [value for value in values if not nothing(value)]

    def _stretches(self, row: dict[str, Any], where: str) -> list[tuple[float | None, float | None]]:
        stamps = self._field(row, "timestamp", where)
        if stamps is None:
            return [(seconds(self._field(row, "start", where), where), seconds(self._field(row, "end", where), where))]
        try:
            pairs = parse_literal(stamps) if isinstance(stamps, str) else stamps
            pairs = pairs if isinstance(pairs[0], list | tuple) else [pairs]
            return [(seconds(a, where), seconds(b, where)) for a, b in pairs]
        except (ValueError, TypeError, IndexError, KeyError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{where}: timestamp {stamps!r:.60}: give [start, end], or a list of such pairs") from None


def _joined(first: Candidate, again: Candidate) -> Candidate:
    new = tuple(caption for caption in again.captions if caption not in first.captions)
    return replace(first, captions=first.captions + new, camera=first.camera or again.camera, trouble=first.trouble or again.trouble)


def with_sidecars(path: Path) -> Candidate:
    """A file with its sidecar files."""
    try:
        return Candidate(path, read_captions(path), camera=find_camera(path))
    except UserError as error:
        return Candidate(path, trouble=str(error))
    except OSError as error:  # such as a name that is too long for a file, in a table
        return Candidate(path, trouble=f"{str(path)[:200]} cannot be read ({error.strerror}): check the path")


def walk(root: Path) -> list[Path]:
    """Files below `root`, sorted; hidden files and folders are skipped, links are followed once."""

    def files() -> Iterator[Path]:
        seen: set[str] = set()
        for folder, folders, names in os.walk(root, followlinks=True):
            real = os.path.realpath(folder)
            folders[:] = [] if real in seen else [name for name in folders if not name.startswith(".")]
            if real not in seen:
                yield from (Path(folder, name) for name in names if not name.startswith("."))
            seen.add(real)

    return sorted(files())


def is_media(source: Source) -> bool:
    """True if the first bytes are those of a video or a picture."""
    try:
        demuxer, kind = sniff(head(source))
    except UserError:
        return False
    return demuxer is not None or kind.endswith("image")


def seconds(value: Any, where: str) -> float | None:
    """12.5, "12.5" or "0:00:12.500" in seconds; None for nothing."""
    if value in (None, ""):
        return None
    try:
        if isinstance(value, str) and re.fullmatch(r"\d+(:\d+){1,2}(\.\d+)?", value.strip()):
            total = 0.0
            for part in value.split(":"):
                total = 60 * total + float(part)
        else:
            total = float(value)
    except (TypeError, ValueError, OverflowError):
        total = math.nan
    if not 0 <= total < math.inf:
        raise UserError(f"{where}: time {value!r:.60}: give seconds, or h:mm:ss.sss")
    return total


def _captions(value: Any, where: str) -> list[Caption]:
    """The captions in a table's cell: a text, or a list of them, which csv writes in Python or JSON syntax."""
    if isinstance(value, str) and value.startswith("[") and value.endswith("]"):
        try:
            value = parse_literal(value)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        except ValueError:
            return [caption(value, where=where)]  # not a list: a sentence in brackets
    return captions_from({"captions": value}, where)


def _filled(template: str, row: dict[str, Any], word: str, where: str) -> str:
    """A template with {column} replaced by the row's cells. No other format syntax is supported inside the braces."""

    def cell(found: re.Match[str]) -> str:
        name = found[1]
        if name not in row:
            raise UserError(f"{where} has no column '{name}' for {word}: its columns are {', '.join(row)}")
        if not isinstance(row[name], str | int | float) or nothing(row[name]):
            raise UserError(f"{where} has nothing to put for {{{name}}} in {word}: fill the cell, or take the row out")
        return str(row[name])

    return re.sub(r"\{([^{}]*)\}", cell, template)


def is_tar(source: Source) -> bool:
    return isinstance(source, Path) and source.suffix.lower() == ".tar"


def _read_csv(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    head(path)
    place = "line 1"
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
            names = reader.fieldnames or []
            if double := [name for name in names if name and names.count(name) > 1]:
                raise UserError(f"{path} has two columns '{double[0]}': give each its own name")
            for row in reader:
                place = f"line {reader.line_num}"
                if any(cell.strip() for cell in row.pop(None, [])):  # a comma in a text without quotes
                    many = f"{path} {place} has more cells than the {len(names)} columns of the first line"
                    raise UserError(f'{many}: put texts that hold commas in double quotes, such as a.mp4,"a red ball, rolling"')
                yield place, row
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        what = f"{path} cannot be read as a table, after {place} ({error})"
        raise UserError(f"{what}: give csv in UTF-8 with a first line of column names, quotes inside quotes doubled") from None


def _read_list(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    head(path)
    try:
        rows = parse_json(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as a table ({error}): give JSON in UTF-8, a list of rows") from None
    if not isinstance(rows, list):
        raise UserError(f'{path} holds a {type(rows).__name__}: give a list of rows, such as [{{"file_path": "a.mp4", "text": "..."}}]')
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            what = f"{path} entry {number} holds a {type(row).__name__}"
            raise UserError(f'{what}: give rows, such as {{"file_path": "a.mp4", "text": "..."}}')
        yield f"entry {number}", row
