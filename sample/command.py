"""The argument parser shared by the programs."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from kling.errors import UserError, unknown

MAY_BE_EMPTY = ("prompt", "negative_prompt")  # words, of which there may be none


def limits(args: argparse.Namespace, **bounds: tuple[float, float]) -> None:
    """Raises `UserError` for the first option whose number is not from least to most, which nan is not; an option left out is right."""
    for name, (least, most) in bounds.items():
        value = getattr(args, name)
        if value is not None and not least <= value <= most:
            raise UserError(f"--{name.replace('_', '-')} {value}: give {f'at most {most}' if value > most else f'at least {least}'}")


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, like every other error. The description keeps its line breaks."""

    def __init__(self, prog: str | None = None, description: str | None = None, allow_abbrev: bool = False, **more: Any) -> None:
        more = {"formatter_class": argparse.RawDescriptionHelpFormatter} | more
        super().__init__(prog, description=description, allow_abbrev=allow_abbrev, **more)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        self.given = sys.argv[1:] if args is None else list(args)
        known, rest = self.parse_known_args(args, namespace)
        if rest:
            self.refuse(rest)
        return known

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        known, rest = super().parse_known_args(args, namespace)
        for name in (action.dest for action in self._actions if action.dest not in MAY_BE_EMPTY):
            value = getattr(known, name, None)
            several = [one[0] if isinstance(one, tuple) else one for one in value] if isinstance(value, list) else [value]
            if "" in several:  # as of a shell's variable that is not set: as a path, this folder
                raise UserError(f"{self.called(name)} is empty: give a value, or leave it out ({self.prog} --help lists everything)")
        return known, rest

    def called(self, name: str) -> str:
        """What the user calls a value: its option, or the name of its place."""
        action = next(action for action in self._actions if action.dest == name)
        return (action.option_strings or [name])[-1]

    def is_strange(self, word: str) -> bool:
        """Whether a word looks like an option that there is not."""
        name = word.split("=")[0]
        return (
            len(name) > 2
            and name.startswith("--")
            and not any(option == name or self.allow_abbrev and option.startswith(name) for option in self._option_string_actions)
        )

    def refuse(self, rest: list[str]) -> None:
        """Report the first unknown word, and the option that was probably meant."""
        if rest[0].startswith("-"):
            raise unknown("option", rest[0].split("=")[0], [name for action in self._actions for name in action.option_strings])
        self.error(f"'{rest[0]}' is left over")

    def error(self, message: str) -> None:
        if "required" in message and (strange := [word for word in self.given if self.is_strange(word)]):
            self.refuse(strange)  # --output, where --out is required
        raise UserError(f"{message} ({self.prog} --help lists everything)")
