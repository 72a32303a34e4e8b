"""Requests in a jsonl file: each line an object with the fields of a `Request`, and the files that they name beside the list.

{"prompt": "a red ball rolls left on grass"}
{"prompt": "the ball rolls on", "image": "first.png", "camera": "pan=5", "seed": 7}
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from kling.errors import UserError
from kling.runtime.files import parse_object

FILES = ("image", "last_image", "video", "mask", "control")  # fields of a request that name a file
MORE_FILES = ("shots", "tracks", "win", "lose")  # and of a line; the last two are of a pair of clips


def request_rows(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number of the line from 1, fields) of every line that is not empty. Raises `UserError` for what cannot be read, and for a line that
    is no object."""
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # not splitlines: JSON may hold what that takes for a line's end
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, or a NUL in the name
        reason = "it is no UTF-8" if isinstance(error, UnicodeDecodeError) else getattr(error, "strerror", None) or error
        raise UserError(f"requests {path} cannot be read ({reason}): give a .jsonl file") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            fields = parse_object(line, once=True)
        except ValueError as error:
            raise UserError(f'{path} line {number}: {error}: write an object, such as {{"prompt": "a red ball"}}') from None
        yield number, located(fields, path.parent)


def located(fields: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A copy of the fields of a request in which the files that they name are found: they lie in `folder`."""
    folder, fields = folder.absolute(), copy.deepcopy(fields)

    def file(name: Any) -> Any:
        return str(folder / name) if isinstance(name, str) and name else name

    def camera(move: Any) -> Any:  # a move, unless there is a file of that name
        return file(move) if isinstance(move, str) and os.path.isfile(folder / move) else move

    for name in (*FILES, *MORE_FILES):
        if name in fields:
            fields[name] = file(fields[name])
    if "camera" in fields:
        fields["camera"] = camera(fields["camera"])
    if "references" in fields:
        fields["references"] = [*map(file, given)] if isinstance(given := fields["references"], list) else file(given)
    for name, key, place in (("keyframes", 0, file), ("tracks", "mask", file), ("shots", "camera", camera)):
        for row in given if isinstance(given := fields.get(name), list) else ():
            with suppress(LookupError, TypeError):  # what is no row is refused by the request
                row[key] = place(row[key])
    return fields
