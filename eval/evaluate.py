"""Measure video models and VAEs, offline, with controls beside every number.

kling-eval world                    does a model obey the words, the camera and the pictures, on the small world whose truth is known
kling-eval videos FOLDER            any folder of videos: fidelity, flicker, motion, camera, keyframes, joins; no weights needed
kling-eval features FOLDER          FVD, JEDi, FID, LPIPS, CLIPScore, DINO and CLIP consistency, from local weight files
kling-eval vae FOLDER...            diffusers VAEs beside each other: quality, time, memory, growth
kling-eval certify                  the camera rulers on rendered truth, and what each metric costs
kling-eval benchmark ACTION NAME    other people's benchmarks: file names to sample, a check of them, their results weighted as they do
kling-eval side-by-side A B         a blind page on which people choose, and the win rate
kling-eval report RUN...            one HTML of many runs
kling-eval card RUN                 the scores of a run into a model card

`kling-eval SUITE --help` lists its options. Exit codes: 2 a mistake in what was given, 3 a metric that ranks its own controls wrongly.
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
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before numpy comes: on the rulers' small matrices its threads only wait
    importlib.import_module(f"kling_programs.eval.{SUITES[argv[0]]}").main(argv[1:])


if __name__ == "__main__":
    main()
