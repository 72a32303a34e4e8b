"""Plots of time, memory and tasks a minute over frames, tokens and workers."""

from __future__ import annotations

from pathlib import Path

from kling_programs.eval.benches.measure import Row

QUANTITIES = ("ms", "MiB", "tasks/min")


def plot(rows: list[Row], path: Path) -> bool:
    """Plot every row that has an `axis` ("frames", "tokens", ...), a `size` and the `line` it belongs to; False if none has.

    One panel for each axis and quantity: "ours ms", "peer ms", "ours MiB", … over the size. Raises `ImportError` without
    matplotlib.
    """
    panels: dict[tuple[str, str], dict[str, list[tuple[float, float]]]] = {}
    for row in rows:
        for quantity in QUANTITIES if "axis" in row else ():
            for who in ("ours", "peer"):
                if f"{who} {quantity}" in row:
                    name = f"{row['line']}, {who if who == 'ours' else row['peer']}"
                    panel = panels.setdefault((row["axis"], quantity), {})
                    panel.setdefault(name, []).append((row["size"], row[f"{who} {quantity}"]))
    if not panels:
        return False
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    columns = min(2, len(panels))
    figure, axes = pyplot.subplots(
        -(-len(panels) // columns), columns, figsize=(7 * columns, 4.5 * -(-len(panels) // columns)), squeeze=False
    )
    for ax in axes.flat[len(panels) :]:
        ax.axis("off")
    for ax, ((axis, quantity), lines) in zip(axes.flat, sorted(panels.items()), strict=False):
        for name, points in sorted(lines.items()):
            style = "-o" if name.endswith(", ours") else "--s"
            ax.plot(*zip(*sorted(points), strict=True), style, label=name, markersize=4)
        ax.set(xlabel=axis, ylabel=quantity, ylim=(0, None))
        ax.xaxis.get_major_locator().set_params(integer=True)  # there is no half a frame, token or worker
        ax.grid(alpha=0.3)
        ax.legend(fontsize=7)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True
