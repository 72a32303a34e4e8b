"""Code shared by the suites of kling-eval: command lines, files, and the end of a run."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kling.errors import UserError
from kling.metrics.controls import Order, violations
from kling.metrics.report import Row, Summary
from kling.runtime.files import head, parse_json, written

EXIT_WRONG_ORDER = 3
VIDEOS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".gif")


def write_json(path: Path, value: Any) -> None:
    with written(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_object(path: Path, remedy: str = "write the run again") -> dict[str, Any]:
    """The object in a JSON file. Raises `UserError` that ends with `remedy` if there is none."""
    head(path)
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): {remedy}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}, not an object: {remedy}")
    return value


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
