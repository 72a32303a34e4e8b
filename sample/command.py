"""The command line that the programs share."""

from __future__ import annotations

import argparse
from typing import Any

from kling.errors import UserError


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line, like every other mistake. The description keeps its lines."""

    def __init__(self, prog: str | None = None, description: str | None = None, allow_abbrev: bool = False, **more: Any) -> None:
        more = {"formatter_class": argparse.RawDescriptionHelpFormatter} | more
        super().__init__(prog, description=description, allow_abbrev=allow_abbrev, **more)

    def error(self, message: str) -> None:
        raise UserError(f"{message} ({self.prog} --help lists everything)")
