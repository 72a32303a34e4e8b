"""Code shared by the suites of kling-eval: command lines, files, and the end of a run."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kling.errors import UserError
from kling.metrics.controls import Order, violations
from kling.metrics.report import Row, Summary
from kling.runtime.files import parse_json, read_text, written
from kling.runtime.lock import locked

EXIT_WRONG_ORDER = 3
MOST_GIB = 2  # pixels of a video that is measured as a whole: its floats and its motion take twenty times as much
KINDS: dict[str, type] = dict.fromkeys(("suite", "protocol", "command", "table"), str)  # of the parts of scores.json
KINDS |= {"n": int, "failures": dict, "options": dict, "scores": dict, "ranked": list}
VIDEOS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".gif")


def write_json(path: Path, value: Any) -> None:
    with written(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_object(path: Path, remedy: str = "write the run again") -> dict[str, Any]:
    """The object in a JSON file. Raises `UserError` that ends with `remedy` if there is none."""
    text = read_text(path)
    try:
        value = parse_json(text)
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): {remedy}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}, not an object: {remedy}")
    return value


def read_scores(path: Path) -> dict[str, Any]:
    """The scores.json of a run. Raises `UserError` if a part of it is not of the kind that a suite writes."""
    report = read_object(path)
    for name, kind in KINDS.items():
        if not isinstance(report.get(name, kind()), kind):
            raise UserError(f"{path}: {name} is {report[name]!r:.60}, which no suite writes: write the run again")
    return report


@contextmanager
def as_expected(path: Path, remedy: str = "write the run again") -> Iterator[None]:
    """Turn the errors of code that goes through a file's contents into a `UserError`: they are not what belongs there."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError, ZeroDivisionError) as error:
        raise UserError(f"{path} is not as expected ({type(error).__name__}: {error}): {remedy}") from None


@contextmanager
def results(args: argparse.Namespace, suite: str, same: bool = True) -> Iterator[None]:
    """Lock the folder --out while a suite works, so that one which cannot be written is told before the work.

    Raises `UserError` if it holds the scores of another suite or, with `same`, of other options: they would be lost.
    """
    scores = Path(args.out) / "scores.json"
    with locked(args.out, "evaluation"):
        if scores.is_file():
            report = read_object(scores, f"give another --out, or delete {scores}")
            name = report.get("suite", "world")
            if name != suite or (same and given(report.get("options")) != given(vars(args))):
                told = report.get("command") or f"kling-eval {name}"
                raise UserError(f"{args.out} holds the scores of another run ({told}): give another --out, or delete that folder")
        yield


def given(options: Mapping[str, Any] | None) -> dict[str, Any]:
    """The options of a run, without its folder, as scores.json holds them."""
    return json.loads(json.dumps({name: value for name, value in (options or {}).items() if name != "out" and value is not None}))


def write_text(path: Path, text: str) -> None:
    with written(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def files(folder: str | Path, endings: Sequence[str], what: str) -> dict[str, Path]:
    """Files of a folder by stem. Raises `UserError` if it is no folder, has none, or two share a stem."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give one with {what}")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in endings and not path.name.startswith("."):
            if path.stem in found:
                raise UserError(f"{path} and {found[path.stem].name} have one name: keep one of them")
            found[path.stem] = path
    if not found:
        raise UserError(f"{folder} holds no {what}: files must end in {', '.join(endings)}")
    return found


def found_only(row: Row) -> Row:
    """A row as it is measured now: before, a camera that was not found counted 180° and 2, which no mean should hold."""
    return {**row, "rotation": None, "translation": None} if row.get("registered") is False else row


def protocol_hash(protocol: Mapping[str, Any]) -> str:
    """Twelve digits that two runs share only if they measured in the same way."""
    return hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()[:12]


def check_order(orders: Sequence[Order], columns: Mapping[str, Mapping[str, Summary]]) -> None:
    """Exit with code 3 if a metric ranks its controls wrongly. columns: by control, then task; measures are "task measure"."""
    values = {
        control: {f"{task} {name}": x["value"] for task, summary in by_task.items() for name, x in summary.items() if x["n"]}
        for control, by_task in columns.items()
    }
    if lines := violations(orders, values):
        for line in lines:
            print(f"wrong order: {line}", file=sys.stderr)
        raise SystemExit(EXIT_WRONG_ORDER)
