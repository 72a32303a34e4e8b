"""The training curve of docs/evaluation.md: its table, what a run adds to it, and the picture."""

from __future__ import annotations

import csv
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from kling_programs.eval.cases import TABLE
from PIL import Image

DOCS = Path(__file__).parents[1] / "docs"


def _curve() -> Any:
    spec = importlib.util.spec_from_file_location("docs_curve", DOCS / "curve.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


curve = _curve()


def table(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def scores(path: Path, motion: float = 0.5, suite: str = "world") -> Path:
    score = {"text-en": {"motion": {"value": motion, "low": 0.2, "high": 0.8, "n": 8}, "unheard of": {"value": 1.0, "n": 8}}}
    hashes = {"transformer/config.json": "00", "transformer/diffusion_pytorch_model.safetensors": "abcdef0123"}
    report = {"suite": suite, "protocol": "f00", "version": 3, "options": {"steps": 12}, "model": {"sha256": hashes}, "scores": score}
    path.write_text(json.dumps(report))
    return path


def test_the_table_holds_rows_of_the_evaluation_each_once() -> None:
    rows, lines = table(DOCS / "training-curve.csv"), {f"{line.task} {line.measure}": line for line in TABLE}
    assert {row["row"] for row in rows} <= set(lines)
    keys = [(row["equivalents"], row["row"], row["protocol"], row["weights"]) for row in rows]
    assert len(keys) == len(set(keys))
    least = {row["row"]: -1 if " - " in row["row"] else 0 for row in rows}  # a difference of two shares, or one
    assert all(least[row["row"]] <= float(row["value"]) <= 1 for row in rows if lines[row["row"]].unit == "%")
    assert all(row["n"] == "" or int(row["n"]) > 0 for row in rows)


def test_a_run_is_added_once_and_drawn(tmp_path: Path) -> None:
    path = tmp_path / "curve.csv"
    path.write_text((DOCS / "training-curve.csv").read_text())
    before = table(path)
    curve.main(["--table", str(path), "add", str(scores(tmp_path / "scores.json")), "--equivalents", "150000"])
    (new,) = [row for row in table(path) if row not in before]
    wanted = {"equivalents": "150000", "row": "text-en motion", "value": "0.5", "n": "8", "weights": "abcdef0", "protocol": "3, 12 steps"}
    assert new == wanted and len(table(path)) == len(before) + 1
    scores(tmp_path / "scores.json", 0.25)
    again, other = curve.measured(tmp_path, 150000), curve.measured(tmp_path, 150000, "mine")  # a folder; other weights
    assert curve.added(table(path), again) == [*before, wanted | {"value": "0.25"}]
    assert len(curve.added(table(path), other)) == len(before) + 2
    with Image.open(tmp_path / "curve.png") as picture:
        assert picture.width > 600


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"suite": "vae"}'])
def test_what_is_no_run_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    path.write_text(text)
    for run in (path, tmp_path / "nowhere"):
        with pytest.raises(curve.UserError, match="finished run of kling-eval world|finished run"):
            curve.measured(run, 1)
