"""Measure video models and VAEs offline, with controls beside every number.

kling-eval world                    how well a model follows text, camera and pictures, on the small world with its known truth
kling-eval videos FOLDER            any folder of videos: fidelity, flicker, motion, camera, keyframes, joins; no weights needed
kling-eval features FOLDER          FVD, JEDi, FID, LPIPS, CLIPScore, DINO and CLIP consistency, from local weight files
kling-eval vae FOLDER...            compares diffusers VAEs: quality, time, memory, growth
kling-eval certify                  the accuracy of the camera estimators on rendered truth, and the cost of each metric
kling-eval benchmark ACTION NAME    published benchmarks: file names to sample, a check of them, their results with their own weights
kling-eval side-by-side A B         a blind page on which people choose, and the win rate
kling-eval report RUN...            one HTML page about several runs
kling-eval compare A B              the difference between two runs of world, case by case, with its interval
kling-eval card RUN                 writes the scores of a run into a model card

`kling-eval SUITE --help` lists its options. Exit codes: 2 a user's mistake, 3 a metric that ranks its own controls wrongly.
"""

from __future__ import annotations

import importlib
import os
import sys

from kling_programs.eval import options

from kling.errors import UserError, program, unknown

SUITES = {
    "world": "world",
    "videos": "videos",
    "features": "features",
    "vae": "vae",
    "certify": "certify",
    "benchmark": "benchmark",
    "side-by-side": "side_by_side",
    "report": "report",
    "compare": "compare",
    "card": "card",
}


@program
def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return
    if not argv or argv[0].startswith("-"):
        raise UserError(f"no suite was given: start with one of {', '.join(SUITES)} (kling-eval --help says what each does)")
    if argv[0] not in SUITES:
        raise unknown("suite", argv[0], SUITES)
    getattr(options, SUITES[argv[0]])(argv[1:])  # --help and mistakes are answered before torch is imported, which takes seconds
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before numpy is imported: on small matrices its threads only wait
    importlib.import_module(f"kling_programs.eval.{SUITES[argv[0]]}").main(argv[1:])


if __name__ == "__main__":
    main()
