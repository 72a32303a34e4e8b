"""One HTML page about several runs: tables with intervals, n, failures and controls; curves of training; strips; worst and best videos.

    kling-eval report out/eval out/made runs/dit --out out/report.html

A RUN is a folder that another suite wrote (scores.json), or a training run (metrics.jsonl). The page is one file with the pictures inside;
only videos are links. Runs with different protocols are marked, because their numbers cannot be compared.
"""

from __future__ import annotations

import base64
import html
import math
from pathlib import Path
from typing import Any

from kling_programs.eval.common import as_expected, read_scores, write_text
from kling_programs.eval.options import report as parse

from kling.data.manifest import read_lines
from kling.errors import UserError

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; color: #222; background: #fff }
table { border-collapse: collapse; display: block; overflow-x: auto }
td, th { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap }
td:first-child, th:first-child { text-align: left; white-space: normal; min-width: 9rem; position: sticky; left: 0; background: #fff }
th { font-weight: 600 } h2, .note { overflow-wrap: anywhere } figure { display: inline-block; margin: .2rem }
img { max-width: 100%; display: block; margin: .5rem 0 }
.note { color: #666 } .bad { color: #b00020 } video { width: 14rem; display: block } svg { background: #fafafa; margin: .3rem }
"""
POINTS = 400  # of a curve; longer ones are averaged
SHOWN = 6  # videos at each end


def main(argv: list[str]) -> None:
    args = parse(argv)
    runs = [read(Path(run)) for run in args.runs]
    suites: dict[str, set[str]] = {}
    for _, report, _ in runs:
        if report:
            suites.setdefault(report.get("suite", "world"), set()).add(report.get("protocol", ""))
    mixed = {suite for suite, protocols in suites.items() if len(protocols) > 1}
    sections = []
    for folder, report, steps in runs:
        with as_expected(folder / "scores.json"):
            sections.append(section(folder, report, steps, mixed))
    page = f"<!doctype html><html lang=en><meta charset=utf-8><title>kling-eval report</title><style>{STYLE}</style><h1>Evaluation</h1>"
    write_text(Path(args.out), page + "".join(sections) + "</html>\n")
    print(args.out)


def read(folder: Path) -> tuple[Path, dict[str, Any] | None, list[dict[str, float]]]:
    """A run's scores and its training log. Raises `UserError` if it has neither."""
    scores, log = folder / "scores.json", folder / "metrics.jsonl"
    if not scores.is_file() and not log.is_file():
        raise UserError(f"{folder} holds neither scores.json nor metrics.jsonl: give a folder that kling-eval or kling-train wrote")
    report = read_scores(scores) if scores.is_file() else None
    return folder, report, [row for _, row in read_lines(log)] if log.is_file() else []


def section(folder: Path, report: dict[str, Any] | None, steps: list[dict[str, float]], mixed: set[str]) -> str:
    parts = [f"<h2>{html.escape(str(folder))}</h2>"]
    if report:
        suite = report.get("suite", "world")
        facts = [
            f"suite {suite}",
            f"n = {report.get('n')}",
            f"protocol {report.get('protocol', 'none')}",
            html.escape(report.get("command", "")),
        ]
        parts.append(f"<p class=note>{' · '.join(facts)}</p>")
        if suite in mixed:
            parts.append(f"<p class=bad>The {suite} runs here were measured in different ways (see protocol): do not compare them.</p>")
        parts.append(table(report.get("table", "")))
        if failures := report.get("failures"):
            items = "".join(f"<li>{html.escape(name)}: {html.escape(reason)}</li>" for name, reason in failures.items())
            counted = "are in no mean" if "failed" in report else "count as worst"
            parts.append(f"<p class=bad>{len(failures)} failed and {counted}:</p><ul>{items}</ul>")
        parts.append(videos(report))
    parts += [f"<p class=note>{path.stem}</p><img alt='{path.stem}' src='{inlined(path)}'>" for path in sorted(folder.glob("strips/*.png"))]
    names = [name for name in dict.fromkeys(key for row in steps for key in row) if name not in ("step", "time")]
    parts += [plot(name, [(row["step"], row[name]) for row in steps if plottable(row, name)]) for name in names]
    return "".join(parts)


def plottable(row: dict[str, Any], name: str) -> bool:
    value = row.get(name)
    return isinstance(row.get("step"), int) and isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def table(text: str) -> str:
    """The Markdown table of a report as HTML; lines around it become paragraphs."""
    rows: list[str] = []
    out = []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            cells = [html.escape(cell.strip()) for cell in line.strip("|").split("|")]
            if not all(cell.strip(":-") == "" and "-" in cell for cell in cells):  # not the rule below the header
                tag = "td" if rows else "th"
                rows.append("<tr>" + "".join(f"<{tag}>{bold(cell)}</{tag}>" for cell in cells) + "</tr>")
            continue
        if rows:
            out.append(f"<table>{''.join(rows)}</table>")
            rows = []
        if line.strip():
            out.append(f"<p>{html.escape(line)}</p>")
    return "".join(out)


def bold(cell: str) -> str:
    return f"<b>{cell[2:-2]}</b>" if len(cell) > 4 and cell.startswith("**") and cell.endswith("**") else cell


def videos(report: dict[str, Any]) -> str:
    """Both ends of a ranking, as links: worst first, then best."""
    ranked, source = report.get("ranked") or [], Path(report.get("options", {}).get("folder", "."))
    if not ranked:
        return ""
    found = {path.stem: path for path in source.glob("*.*")} if source.is_dir() else {}
    half = min(SHOWN, (len(ranked) + 1) // 2)
    parts = []
    for title, names in (("worst first", ranked[:half]), ("best first", ranked[half:][::-1][:half])):
        clips = [(name, found[name].absolute().as_uri()) for name in names if name in found]
        parts.append(
            f"<p class=note>{title}</p>"
            + "".join(  # with the fragment a browser shows a frame before playing
                f"<figure><video src='{html.escape(uri, quote=True)}#t=0.01' preload=metadata controls muted loop></video>"
                f"<figcaption class=note>{html.escape(name)}</figcaption></figure>"
                for name, uri in clips
            )
        )
    return "".join(parts)


def plot(name: str, points: list[tuple[int, float]]) -> str:
    """A curve over training steps as SVG, averaged to `POINTS`; empty for fewer than two."""
    if len(points) < 2:
        return ""
    size = math.ceil(len(points) / POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    curve = [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]
    (x0, x1), (y0, y1) = ((min(v), max(v)) for v in zip(*curve, strict=True))
    line = " ".join(f"{10 + 340 * (x - x0) / ((x1 - x0) or 1):.1f},{150 - 120 * (y - y0) / ((y1 - y0) or 1):.1f}" for x, y in curve)
    label = f"{html.escape(name)}: {y0:.4g} to {y1:.4g}, steps {x0:.0f} to {x1:.0f}"
    return (
        f"<svg width=360 height=170 role=img aria-label='{label}'><text x=10 y=18 font-size=12>{label}</text>"
        f"<polyline points='{line}' fill=none stroke='#2563eb' stroke-width=1.5 /></svg>"
    )


def inlined(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
