"""Turns measurements into a Markdown table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kling.metrics.stats import bootstrap, mean, rate

Row = Mapping[str, bool | float | None]  # what one clip measured; None where a question does not apply
Summary = dict[str, dict[str, float | None]]  # by measure: value, low, high, n; None where n is 0


@dataclass(frozen=True)
class Line:
    """One line of the table: a measure of a task, the score of guessing, and the target (`>= 0.85`, `<= 5`).

    whole: the target is for the whole interval, not for the value alone; for a difference, which few cases can put on either side.
    """

    task: str
    measure: str
    title: str
    unit: str = "%"  # %, or the unit of the number
    chance: float | None = None
    target: str = ""
    whole: bool = False

    def reached(self, score: Mapping[str, float | None]) -> bool | None:
        """Whether a score (value, low, high) meets the target; None without one."""
        if not self.target or score["value"] is None or math.isnan(score["value"]):
            return None
        sign, bound = self.target.split()
        value = score["value"] if not self.whole else score["low"] if sign == ">=" else score["high"]
        return value >= float(bound) if sign == ">=" else value <= float(bound)


def summarise(rows: Sequence[Row]) -> Summary:
    """Means with intervals: shares for bools (Wilson), means for floats (bootstrap). None is left out and not counted in n,
    which may come to 0: then there is no value, and the table says so.
    """
    result: Summary = {}
    for name in dict.fromkeys(key for row in rows for key in row):
        values = [row[name] for row in rows if row.get(name) is not None]
        if values:
            result[name] = rate(values) if isinstance(values[0], bool) else mean(values)
        else:
            result[name] = {"value": None, "low": None, "high": None, "n": 0}
    return result


def paired(a: Sequence[Row], b: Sequence[Row]) -> Summary:
    """Means of b - a over pairs of rows, for every measure that both have."""
    differences = [
        {name: float(y[name]) - float(x[name]) for name in x if x[name] is not None and y.get(name) is not None}
        for x, y in zip(a, b, strict=False)
    ]
    return summarise(differences)


def portion(a: Sequence[Row], b: Sequence[Row], measure: str) -> Summary:
    """The mean of one measure of b in parts of a's, over pairs of rows that both have it; None where a's is 0."""
    pairs = [(float(x[measure]), float(y[measure])) for x, y in zip(a, b, strict=False) if None not in (x.get(measure), y.get(measure))]
    whole, part = (sum(values) for values in zip(*pairs, strict=True)) if pairs else (0.0, 0.0)
    if not whole:
        return {measure: {"value": None, "low": None, "high": None, "n": len(pairs)}}
    low, high = bootstrap(pairs, of=lambda x: x[..., 1].mean(dim=1) / x[..., 0].mean(dim=1).clamp(min=1 / len(pairs)))
    return {measure: {"value": part / whole, "low": low, "high": high, "n": len(pairs)}}


def markdown(lines: Sequence[Line], scores: Mapping[str, Summary], columns: Mapping[str, Mapping[str, Summary]]) -> str:
    """The table. scores: by task. columns: by heading (truth, controls), then by task; a cell is empty if nothing was measured.

    The columns for targets and chance appear only if a line has them.
    """
    aims, guesses = any(line.target for line in lines), any(line.chance is not None for line in lines)
    head = ["", "score", "95 % interval", "n", *(["to reach"] * aims), *(["chance"] * guesses), *columns]
    body = []
    for line in lines:
        if line.measure not in scores.get(line.task, {}):
            continue
        score = scores[line.task][line.measure]
        mark = {True: "**", False: "", None: ""}[line.reached(score)]
        cells = [
            line.title,
            f"{mark}{number(score['value'], line.unit)}{mark}",
            f"{number(score['low'], line.unit).split()[0]} to {number(score['high'], line.unit)}" if score["n"] else "",
            str(score["n"]),
        ]
        cells += [_target(line)] * aims + ["" if line.chance is None else number(line.chance, line.unit)] * guesses
        for measured in columns.values():
            other = measured.get(line.task, {}).get(line.measure)
            cells.append("" if other is None else number(other["value"], line.unit))
        body.append(cells)
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *body))


def reached(lines: Sequence[Line], scores: Mapping[str, Summary]) -> dict[str, bool]:
    """Which targets are met, by "task measure"; lines without a target or a score are left out."""
    verdicts = {f"{x.task} {x.measure}": x.reached(scores[x.task][x.measure]) for x in lines if x.measure in scores.get(x.task, {})}
    return {name: verdict for name, verdict in verdicts.items() if verdict is not None}


def number(value: float | None, unit: str) -> str:
    """A score with its unit; a dash where nothing was measured."""
    if value is None or math.isnan(value):
        return "–"
    return f"{100 * value:.1f} %" if unit == "%" else f"{value:.{2 if unit in ('dB', '°', 'levels') else 3}f} {unit}".strip()


def _target(line: Line) -> str:
    if not line.target:
        return ""
    sign, bound = line.target.split()
    return f"{'interval ' * line.whole}{'≥' if sign == '>=' else '≤'} {number(float(bound), line.unit)}"
