"""Turn real videos into a data set that loses nothing silently.

kling-data scan VIDEOS table.csv shards.tar --out cats/manifest.jsonl      # again: goes on, and looks at what is new or has changed
kling-train-vae configs/vae/world.yaml data.source=cats/manifest.jsonl out=runs/cats
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from tqdm import tqdm

from kling.config import load_config
from kling.data.filters import Filters
from kling.data.listing import COLUMNS, Listing
from kling.data.manifest import quarantine_of
from kling.data.scan import Summary, scan
from kling.errors import UserError, program

EXIT_TOO_BAD = 3


@program
def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    args.run(args)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="kling-data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    cmd = commands.add_parser("scan", help="look at every file once; write a manifest and a quarantine")
    cmd.add_argument("paths", nargs="+", metavar="PATH", help="folders, videos, pictures, .csv, .tsv, .jsonl and WebDataset .tar files")
    cmd.add_argument("--out", default="manifest.jsonl", help="the manifest (default %(default)s); quarantine.jsonl comes beside it")
    cmd.add_argument("--map", nargs="+", default=[], metavar="FIELD=COLUMN", help=f"columns of tables; fields: {', '.join(COLUMNS)}")
    cmd.add_argument("--root", help="folder of a table's relative paths (default: the table's)")
    cmd.add_argument("--shots", action="store_true", help="split videos at their cuts (PySceneDetect)")
    cmd.add_argument("--filters", metavar="YAML", help="thresholds, such as configs/data/filters.yaml")
    cmd.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: one for each core)")
    cmd.add_argument(
        "--seconds-per-minute", type=float, default=20.0, help="what decoding a minute of video may take (default %(default)s)"
    )
    cmd.add_argument(
        "--allow-bad", type=float, default=0.05, metavar="SHARE", help="unusable files above which it fails (default %(default)s)"
    )
    cmd.set_defaults(run=run_scan)
    return top


def run_scan(args: argparse.Namespace) -> None:
    if args.workers < 1 or args.seconds_per_minute <= 0 or not 0 <= args.allow_bad <= 1:
        raise UserError("--workers and --seconds-per-minute must be positive, --allow-bad between 0 and 1: put them right")
    out = Path(args.out)
    if out.suffix != ".jsonl":
        raise UserError(f"--out {out}: end the manifest's name in .jsonl")
    mapping = dict(word.split("=", 1) if "=" in word else _no_mapping(word) for word in args.map)
    filters = load_config(Filters, args.filters) if args.filters else Filters()
    listing = Listing(mapping, args.root)
    candidates = listing.find(args.paths)
    with tqdm(total=len(candidates), unit="file", desc=f"scan to {out}") as bar:
        steps = scan(candidates, out, workers=args.workers, split=args.shots, filters=filters, per_minute=args.seconds_per_minute)
        for step in steps:
            if isinstance(step, Summary):
                summary = step
            else:
                bar.update(step[0] - bar.n)
    print(summary.table())
    if listing.passed:
        kinds = ", ".join(f"{suffix} {n}" for suffix, n in listing.passed.most_common())
        print(f"{'neither video nor picture':<28}{sum(listing.passed.values()):>8}  ({kinds})")
    if summary.bad_share > args.allow_bad:
        share = f"{100 * summary.bad_share:.1f} % of the files are unusable, more than {100 * args.allow_bad:g} %"
        print(f"error: {share}: see {quarantine_of(out)}, or accept them with --allow-bad {summary.bad_share + 0.005:.2f}", file=sys.stderr)
        raise SystemExit(EXIT_TOO_BAD)


def _no_mapping(word: str) -> tuple[str, str]:
    raise UserError(f"--map {word}: give FIELD=COLUMN, such as path=video or path={{videoID}}.mp4")


if __name__ == "__main__":
    main()
