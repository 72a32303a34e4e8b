"""What earlier versions wrote stays readable, whatever moves inside the library. tests/data/record.json is of commit ff373bd."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

from kling import KlingPipeline
from kling.sampling.pipeline import ASSETS
from kling.sampling.record import check_same_settings, read_record, request_of

RECORD = Path(__file__).parent / "data" / "record.json"


def test_an_old_record_asks_for_the_same_again() -> None:
    record = read_record(RECORD)
    request = request_of(record, str(RECORD))
    check_same_settings(record, KlingPipeline.from_pretrained(weights=False).plan(request), str(RECORD))


def test_class_paths_in_model_folders_exist() -> None:
    """model_index.json names a library, or a module of ours, and a class in it."""
    for library, name in filter(
        lambda value: isinstance(value, list) and len(value) == 2, json.loads((ASSETS / "model_index.json").read_text()).values()
    ):
        if library:
            assert getattr(importlib.import_module(library), name)
