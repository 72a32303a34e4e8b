"""An extension for mkdocstrings: `>>>` lines of a docstring, and their results up to the next blank line, are shown as code."""

from __future__ import annotations

import re
from typing import Any

import griffe


class Examples(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = re.sub(r"^>>> .*(?:\n\S.*)*", r"```pycon\n\g<0>\n```", obj.docstring.value, flags=re.M)
