"""The argument parser shared by the programs."""

from __future__ import annotations

import argparse
from typing import Any

from kling.errors import UserError, unknown


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, like every other error. The description keeps its line breaks."""

    def __init__(self, prog: str | None = None, description: str | None = None, allow_abbrev: bool = False, **more: Any) -> None:
        more = {"formatter_class": argparse.RawDescriptionHelpFormatter} | more
        super().__init__(prog, description=description, allow_abbrev=allow_abbrev, **more)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        known, rest = self.parse_known_args(args, namespace)
        if rest:
            self.refuse(rest)
        for name, value in vars(known).items():
            if "" in (value if isinstance(value, list) else [value]):  # as of a shell's variable that is not set: as a path, this folder
                raise UserError(f"{name.replace('_', '-')} is empty: give a value, or leave it out ({self.prog} --help lists everything)")
        return known

    def refuse(self, rest: list[str]) -> None:
        """Report the first unknown word, and the option that was probably meant."""
        if rest[0].startswith("-"):
            raise unknown("option", rest[0].split("=")[0], [name for action in self._actions for name in action.option_strings])
        self.error(f"'{rest[0]}' is left over")

    def error(self, message: str) -> None:
        raise UserError(f"{message} ({self.prog} --help lists everything)")
