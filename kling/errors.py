"""One kind of error for everything a person can put right, and one place where programs turn it into a line and an exit code."""

from __future__ import annotations

import difflib
import functools
import sys
from collections.abc import Callable, Iterable

EXIT_BAD_INPUT = 2


class UserError(ValueError):
    """A mistake in what was given. The message is one line: the thing, its value, and the remedy."""


def unknown(thing: str, value: object, choices: Iterable[str], meant: str = "") -> UserError:
    """The error for a name that does not exist, with the one that was `meant`, or else the nearest in letters.

    >>> str(unknown("aspect", "16x9", ["16:9", "9:16"]))
    "unknown aspect '16x9' (did you mean '16:9'?): choose from 16:9, 9:16"
    """
    choices = list(choices)
    near = [meant] if meant else difflib.get_close_matches(str(value), choices, n=1, cutoff=0.5)
    hint = f" (did you mean '{near[0]}'?)" if near else ""
    return UserError(f"unknown {thing} '{value}'{hint}: choose from {', '.join(choices)}")


def program(main: Callable[..., None]) -> Callable[..., None]:
    """Decorate a program's `main(argv)`: a `UserError` becomes one line on stderr and exit code 2, never a traceback."""

    @functools.wraps(main)
    def run(argv: list[str] | None = None) -> None:
        try:
            main(argv)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(EXIT_BAD_INPUT) from None
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            raise SystemExit(130) from None

    return run
