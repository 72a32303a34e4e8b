"""What the wire formats share: the error that a client reads, and its numbers."""

from __future__ import annotations

import re
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

from kling.errors import UserError

# Kling's numbers, and the HTTP status of each
AUTH_FAILED, AUTH_EMPTY, AUTH_INVALID, AUTH_EARLY, AUTH_LATE = 1000, 1001, 1002, 1003, 1004
NO_PERMISSION = 1103
BAD_REQUEST, BAD_FIELD, NO_METHOD, NO_THING = 1200, 1201, 1202, 1203
TOO_FAST, TOO_MANY = 1302, 1303
BROKEN, UNAVAILABLE = 5000, 5001
STATUS = {
    **dict.fromkeys((AUTH_FAILED, AUTH_EMPTY, AUTH_INVALID, AUTH_EARLY, AUTH_LATE), 401),
    NO_PERMISSION: 403, BAD_REQUEST: 400, BAD_FIELD: 400, NO_METHOD: 404, NO_THING: 404, TOO_FAST: 429, TOO_MANY: 429,
    BROKEN: 500, UNAVAILABLE: 503,
}  # fmt: skip
LONGEST_LINE = 1000  # characters of a message
REFUSED = {"too_fast": TOO_FAST, "too_many": TOO_MANY}  # codes of `store.Refused`


class WireError(Exception):
    """A refusal. code: Kling's number; line: the thing, its value and the remedy; status: of HTTP; wait: seconds until a retry helps."""

    def __init__(self, code: int, line: str, status: int | None = None, wait: float | None = None) -> None:
        super().__init__(line)
        self.code, self.line, self.status, self.wait = code, one_line(line), status or STATUS[code], wait


class Shape(BaseModel):
    """An object of a wire format: no fields beside its own, and null, which some clients send for what they leave out, says nothing."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return {name: value for name, value in given.items() if value is not None or name not in cls.model_fields}


def one_line(text: str) -> str:
    """A message with what a client sent in it, as one line that can be sent back: no line ends, no half characters, not without end.

    >>> one_line("unknown mode 'a\\nb \\ud800'")
    "unknown mode 'a b \\\\ud800'"
    """
    half = LONGEST_LINE // 2
    text = text if len(text) <= LONGEST_LINE else f"{text[:half]}…{text[-half:]}"
    return " ".join(text.encode(errors="backslashreplace").decode().splitlines())


def refusal(error: UserError, names: dict[str, str]) -> WireError:
    """A mistake in a request, in the names of the wire format. names: of a `Request`'s field -> of the format."""
    line = str(error)
    for ours, theirs in names.items():
        line = re.sub(rf"(?<![\w-]){ours}(?![\w=-])", theirs, line)
    return WireError(REFUSED.get(error.code, BAD_FIELD), line, wait=error.values.get("wait"))
