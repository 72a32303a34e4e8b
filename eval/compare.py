"""The difference between two runs of `kling-eval world`, case by case, with its interval.

kling-eval compare out/teacher out/fast                  # every row: A, B, B - A and the 95 % interval of the difference
kling-eval compare out/before out/after --out out/difference.md

Both runs have made the same cases with the same seeds, so that the difference of a pair is free of what makes one case harder than another:
its interval is narrower than that of two scores. Cases that only one run has are left out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kling_programs.eval.cases import TABLE
from kling_programs.eval.common import as_expected, read_object, write_text
from kling_programs.eval.options import compare as parse
from kling_programs.eval.world_folder import Record, recorded

from kling.errors import UserError
from kling.metrics.report import Line, Row, number, paired, summarise
from kling.runtime.files import head

SAME = ("seed", "examples")  # settings that make two runs' cases the same and measure them alike


def main(argv: list[str]) -> None:
    args = parse(argv)
    first = Path(args.a)
    tables = []
    for other in args.b:
        with as_expected(Path(other) / "cases.jsonl"):
            tables.append(f"{other} less {first}\n\n{difference(first, Path(other))}")
    print("\n\n".join(tables))
    if args.out:
        write_text(Path(args.out), "\n\n".join(tables) + "\n")


def difference(a: Path, b: Path) -> str:
    """The table of B - A, over the cases that both have."""
    (settings, rows), (others, answers) = read(a), read(b)
    if changed := [name for name in SAME if settings.get(name) != others.get(name)]:
        raise UserError(f"{a} and {b} were made with different {' and '.join(changed)}: their cases are not the same")
    shown = ["| | A | B | B - A | 95 % interval | n |", "|---|---|---|---|---|---|"]
    for line in TABLE:
        pairs = [(rows[k], answers[k]) for k in sorted(rows.keys() & answers.keys())]
        both = [(x[line.task], y[line.task]) for x, y in pairs if line.task in x and line.task in y]
        both = [(x, y) for x, y in both if x.get(line.measure) is not None and y.get(line.measure) is not None]
        if both:
            shown.append(compared(line, both))
    if len(shown) == 2:
        raise UserError(f"{a} and {b} have no case in common: give both the same --tasks")
    return "\n".join(shown)


def compared(line: Line, pairs: list[tuple[Row, Row]]) -> str:
    """One line of the table."""
    before, after = ([{line.measure: row[line.measure]} for row in rows] for rows in zip(*pairs, strict=True))
    values = [number(summarise(rows)[line.measure]["value"], line.unit) for rows in (before, after)]
    change = paired(before, after)[line.measure]
    cells = [*values, *(signed(change[name], line.unit) for name in ("value", "low", "high"))]
    return f"| {line.title} | {cells[0]} | {cells[1]} | {cells[2]} | {cells[3]} to {cells[4]} | {len(pairs)} |"


def signed(value: float, unit: str) -> str:
    """A difference; of shares in percentage points."""
    return f"{100 * value:+.0f}" if unit == "%" else f"{value:+.3g}"


def read(folder: Path) -> tuple[dict[str, Any], dict[int, dict[str, Row]]]:
    """A run's settings, and the model's rows of every case by k and task."""
    settings = read_object(folder / "run.json")
    head(folder / "cases.jsonl")
    records: dict[int, Record] = recorded(folder / "cases.jsonl")
    with as_expected(folder / "cases.jsonl"):
        return settings, {k: dict(record["rows"]["model"]) for k, record in records.items()}
