"""Plot the scores of mode fast over its steps, beside mode std: docs/fast-steps.png.

for n in 1 2 4; do kling-eval world --mode fast --steps $n --out out/fast-$n --n 24 --tasks text-en,camera,image-motion; done
kling-eval world --out out/std --n 24 --tasks text-en,camera,image-motion
python docs/steps.py out/std out/fast-1 out/fast-2 out/fast-4
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt

ROWS = {
    ("text-en", "motion"): "motion",
    ("text-en", "whole"): "whole clips",
    ("camera", "class"): "camera class",
    ("image-motion", "motion"): "motion from a first frame",
}


def main() -> None:
    std, *fast = (json.loads((Path(folder) / "scores.json").read_text(encoding="utf-8")) for folder in sys.argv[1:])
    steps = [run["options"]["steps"] or 4 for run in fast]  # the checkpoint's own
    figure, axes = plt.subplots(1, len(ROWS), figsize=(11, 2.8), sharey=True)
    for axis, ((task, row), title) in zip(axes, ROWS.items(), strict=True):
        scores = [run["scores"][task][row] for run in fast]
        low, high = ([abs(100 * (score[end] - score["value"])) for score in scores] for end in ("low", "high"))
        axis.errorbar(range(len(steps)), [100 * score["value"] for score in scores], [low, high], marker="o", capsize=3, label="fast")
        axis.axhline(100 * std["scores"][task][row]["value"], color="0.5", linestyle="--", label="std, 20 steps")
        axis.set(title=title, xlabel="steps", ylim=(0, 104), xticks=range(len(steps)), xticklabels=steps)
    axes[0].set_ylabel("% of cases")
    axes[0].legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(Path(__file__).with_name("fast-steps.png"), dpi=110)


if __name__ == "__main__":
    main()
