"""The training curve of docs/evaluation.md: every row of `kling-eval world` over the 41-frame equivalents that the weights have seen.

python docs/curve.py                                                   # docs/training-curve.csv -> docs/training-curve.png
python docs/curve.py add out/eval/scores.json --equivalents 150000     # a finished run into the table, and the picture again
python docs/curve.py add out/eval --equivalents 150000 --weights 1a2b3c4     # the commit that ships them; default: their hash

The table has a line for every row of every run: equivalents, row (the task and the measure of `TABLE` in eval/cases.py), value (a share as
a fraction), n, weights, protocol (its number in eval/world.py, and the sampling steps). A run that is added again takes its own place.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
from pathlib import Path
from textwrap import fill

from kling_programs.eval.cases import TABLE

from kling.errors import UserError
from kling.metrics.stats import wilson

HERE = Path(__file__).parent
COLUMNS = ("equivalents", "row", "value", "n", "weights", "protocol")
KEY = ("equivalents", "row", "weights", "protocol")  # what a run measured once
MARKERS, COLOURS = "os^Dv", ("tab:blue", "tab:orange")
ACROSS = 5  # panels in a row

Table = list[dict[str, str]]


def read(path: Path) -> Table:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write(path: Path, table: Table) -> None:
    """By equivalents, then protocol, then in the order of `TABLE`."""
    order = [f"{line.task} {line.measure}" for line in TABLE]
    table.sort(key=lambda x: (int(x["equivalents"]), x["protocol"], order.index(x["row"]) if x["row"] in order else len(order)))
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)


def measured(run: Path, equivalents: int, weights: str = "") -> Table:
    """The rows of a finished run, a folder of `kling-eval world` or its scores.json. Raises `UserError` for anything else."""
    path = run / "scores.json" if run.is_dir() else run
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}: give the scores.json of a finished run of kling-eval world") from None
    if not isinstance(report, dict) or report.get("suite") != "world":
        raise UserError(f"{path} is no score of kling-eval world: give the scores.json of a finished run")
    hashes = report["model"].get("sha256", {})
    own = next((value for name, value in sorted(hashes.items()) if name.startswith("transformer/") and name.endswith(".safetensors")), "")
    protocol = f"{report.get('version', report['protocol'])}, {report['options']['steps'] or 'default'} steps"
    rows = []
    for line in TABLE:
        score = report["scores"].get(line.task, {}).get(line.measure)
        if score is not None and not math.isnan(score["value"]):
            values = (equivalents, f"{line.task} {line.measure}", f"{score['value']:.4g}", score["n"], weights or own[:7], protocol)
            rows.append(dict(zip(COLUMNS, map(str, values), strict=True)))
    return rows


def added(table: Table, rows: Table) -> Table:
    """The table with the rows of a run, which replace what the same run left there before."""
    new = {tuple(row[name] for name in KEY) for row in rows}
    return [row for row in table if tuple(row[name] for name in KEY) not in new] + rows


def draw(table: Table, path: Path) -> None:
    """A panel for each row: a marker for each protocol, a colour for each language; the bars are 95 % intervals of shares."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    protocols = sorted({row["protocol"] for row in table})
    lines = {f"{line.task} {line.measure}": line for line in TABLE}
    panels: dict[str, list[str]] = {}  # title -> rows
    for name, line in lines.items():
        if any(row["row"] == name for row in table):
            title = line.title.replace(", English", "").replace(", Chinese", "")
            panels.setdefault(title, []).append(name)
    down = -(-len(panels) // ACROSS)
    figure, axes = plt.subplots(down, ACROSS, figsize=(3 * ACROSS, 2.2 * down), squeeze=False, sharex=True, layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (title, names) in zip(axes.flat, panels.items(), strict=False):
        line = lines[names[0]]
        percent = 100 if line.unit == "%" else 1
        for name, colour in zip(names, COLOURS, strict=False):
            for protocol, marker in zip(protocols, MARKERS, strict=False):
                points = sorted(
                    (int(r["equivalents"]) / 1000, float(r["value"]), int(r["n"] or 0))
                    for r in table
                    if r["row"] == name and r["protocol"] == protocol
                )
                if points:
                    x, y = [p[0] for p in points], [percent * p[1] for p in points]
                    axis.plot(x, y, marker + "-", color=colour, markersize=4, linewidth=1)
                    if line.unit == "%" and "below" not in line.task and " - " not in line.task:  # differences are no shares
                        spans = [wilson(round(value * n), n) for _, value, n in points]
                        axis.vlines(x, [100 * low for low, _ in spans], [100 * high for _, high in spans], color=colour, alpha=0.35)
        if line.target:
            axis.axhline(percent * float(line.target.split()[1]), color="tab:green", linewidth=0.8, linestyle="--")
        if line.chance is not None:
            axis.axhline(percent * line.chance, color="grey", linewidth=0.8, linestyle=":")
        axis.set_title(fill(f"{title}{f', {line.unit}' if line.unit else ''}", 42), fontsize=8)
        axis.tick_params(labelsize=7, labelbottom=True)
        if line.unit == "%" and " - " not in line.task:
            axis.set_ylim(-3, 103)
        axis.set_xlim(left=0)
    dot = plt.Line2D
    handles = [dot([], [], color="grey", marker=m, ls="", label=f"protocol {p}") for p, m in zip(protocols, MARKERS, strict=False)]
    handles += [dot([], [], color=c, label=name) for c, name in zip(COLOURS, ("English, or one row", "Chinese"), strict=True)]
    handles += [dot([], [], color="tab:green", ls="--", label="goal"), dot([], [], color="grey", ls=":", label="chance")]
    across = "over thousands of 41-frame equivalents seen (tokens / 308)"
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8, title=across, title_fontsize=9)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("docs/curve.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, metavar="FILE.csv", default=HERE / "training-curve.csv", help="the picture lies beside it")
    commands = parser.add_subparsers(dest="command")
    add = commands.add_parser("add", help="put a finished run of kling-eval world into the table")
    add.add_argument("run", type=Path, metavar="RUN", help="its folder, or its scores.json")
    add.add_argument("--equivalents", type=int, required=True, metavar="N", help="41-frame equivalents that the weights have seen in all")
    add.add_argument("--weights", default="", metavar="NAME", help="of the weights; default: the first digits of the transformer's hash")
    args = parser.parse_args(argv)
    table = read(args.table)
    if args.command == "add":
        table = added(table, measured(args.run, args.equivalents, args.weights))
        write(args.table, table)
    draw(table, args.table.with_suffix(".png"))
    print(args.table.with_suffix(".png"))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
