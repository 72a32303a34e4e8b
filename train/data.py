"""Turn real videos into a data set; every file that is left out is listed with the reason.

kling-data scan VIDEOS table.csv shards.tar --out cats/manifest.jsonl      # run again, it looks only at new and changed files
kling-data scan /data --out /data/manifest.jsonl --ray auto               # on all hosts of a Ray cluster, which share /data
kling-data report cats/manifest.jsonl                                      # cats/manifest.html: what was kept, what was not, and why
kling-data caption cats/manifest.jsonl --model MODEL --language en zh      # writes captions for clips without one
kling-data camera cats/manifest.jsonl                                      # estimates missing camera paths; checks the others
kling-data tracks cats/manifest.jsonl                                      # follows points through the clips, for the motion brush
kling-train-vae configs/vae/world.yaml data.source=cats/manifest.jsonl out=runs/cats
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from kling_programs.sample.command import Parser

from kling.errors import UserError, program

if TYPE_CHECKING:
    from kling.data.manifest import Manifest, Shot

EXIT_TOO_BAD = 3
SAVE_EVERY = 30.0  # seconds: a manifest is written as a whole, so that one write per clip would take longer the more clips there are
# Choices of the command line, copied from the library (tests/test_data_program.py) because importing torch takes seconds.
FIELDS = ("path", "caption", "start", "end", "timestamp", "camera")
LANGUAGES = ("en", "zh")
METHODS = ("rotation", "colmap")


@program
def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    with own(Path(getattr(args, args.changes))) if "changes" in args else nullcontext():
        args.run(args)


def own(manifest: Path, new: bool = False) -> AbstractContextManager[None]:
    """Keep other commands from changing a manifest, which is read at the start and written as a whole: one's work would be lost. new: it
    may not exist yet."""
    if manifest.suffix != ".jsonl" or not (new or manifest.is_file()):
        return nullcontext()
    from kling.runtime.lock import locked

    return locked(manifest.parent, "manifest", file=manifest.name)


@contextmanager
def changed(path: Path) -> Iterator[tuple[Manifest, Callable[[int, Shot], None]]]:
    """A manifest, and a function that replaces its clip of a number. It is written every `SAVE_EVERY` seconds, and at the end, also after
    an error or Ctrl-C."""
    from kling.data.manifest import read_manifest, write_manifest

    manifest, written, pending = read_manifest(path), time.monotonic(), False

    def put(i: int, shot: Shot) -> None:
        nonlocal written, pending
        manifest.shots[i], pending = shot, True
        if time.monotonic() - written >= SAVE_EVERY:
            write_manifest(path, manifest.shots)
            written, pending = time.monotonic(), False

    try:
        yield manifest, put
    finally:
        if pending:
            write_manifest(path, manifest.shots)


def parser() -> Parser:
    top = Parser("kling-data", __doc__, allow_abbrev=True)
    commands = top.add_subparsers(required=True, metavar="COMMAND", parser_class=partial(Parser, allow_abbrev=True))

    cmd = commands.add_parser("scan", help="examine every file once; write a manifest and a quarantine")
    cmd.add_argument(
        "paths", nargs="+", metavar="PATH", help="folders, videos, pictures, .csv .tsv .json .jsonl tables, WebDataset .tar files"
    )
    cmd.add_argument("--out", default="manifest.jsonl", help="the manifest (default %(default)s); quarantine.jsonl is written beside it")
    cmd.add_argument("--map", nargs="+", default=[], metavar="FIELD=COLUMN", help=f"columns of tables; fields: {', '.join(FIELDS)}")
    cmd.add_argument("--root", help="folder that a table's paths are relative to (default: the table's)")
    cmd.add_argument("--shots", action="store_true", help="split videos at their cuts (PySceneDetect)")
    cmd.add_argument("--filters", metavar="YAML", help="thresholds, such as configs/data/filters.yaml")
    cmd.add_argument("--workers", type=int, help="processes (default: one per core)")
    cmd.add_argument("--ray", metavar="ADDRESS", help="share the files over this Ray cluster: auto, local or HOST:6379")
    cmd.add_argument(
        "--seconds-per-minute", type=float, default=20.0, help="time limit for decoding a minute of video (default %(default)s)"
    )
    cmd.add_argument(
        "--allow-bad", type=float, default=0.05, metavar="SHARE", help="fail if more of the files are unusable (default %(default)s)"
    )
    cmd.set_defaults(run=run_scan)

    cmd = commands.add_parser("report", help="an HTML page of a manifest and its quarantine")
    cmd.add_argument("manifest")
    cmd.add_argument("--out", help="the page (default: the manifest's name in .html)")
    cmd.add_argument("--sheet", type=int, default=24, metavar="N", help="clips shown in each section (default %(default)s)")
    cmd.set_defaults(run=run_report)

    cmd = commands.add_parser("caption", help="write captions with a local image-text-to-text model")
    cmd.add_argument("manifest")
    cmd.add_argument("--model", required=True, metavar="DIR", help="a transformers model with its processor")
    cmd.add_argument("--language", nargs="+", default=["en"], choices=LANGUAGES, help="one caption in each (default: en)")
    cmd.add_argument("--prompt", help="the question to the model, instead of the default one")
    cmd.add_argument("--frames", type=int, default=4, help="number of frames shown to the model (default %(default)s)")
    cmd.add_argument("--device", default="cpu")
    cmd.set_defaults(run=run_caption, changes="manifest")

    cmd = commands.add_parser("camera", help="estimate the cameras of a manifest's clips, or check one camera file")
    cmd.add_argument("path", help="a manifest, or a camera file (RealEstate10K .txt, .json)")
    cmd.add_argument("--method", choices=METHODS, help="rotation (default): a camera that only rotates; colmap: pycolmap")
    cmd.add_argument("--video", help="the video of a camera file, to check the file's convention against it")
    cmd.add_argument("--png", help="where to draw the path of a camera file (default: its name in .png)")
    cmd.set_defaults(run=run_camera, changes="path")

    cmd = commands.add_parser("tracks", help="follow points through a manifest's clips, for training the motion brush")
    cmd.add_argument("manifest")
    cmd.set_defaults(run=run_tracks, changes="manifest")
    return top


def run_scan(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from kling.config import load_config
    from kling.data.manifest import quarantine_of
    from kling.data.scan.filters import Filters
    from kling.data.scan.listing import Listing
    from kling.data.scan.scan import Summary, scan
    from kling.runtime.cluster import connect

    if (args.workers is not None and args.workers < 1) or not 0 < args.seconds_per_minute < math.inf or not 0 <= args.allow_bad <= 1:
        raise UserError("--workers and --seconds-per-minute must be positive, --allow-bad between 0 and 1: change them")
    out = Path(args.out)
    if out.suffix != ".jsonl":
        raise UserError(f"--out {out}: end the manifest's name in .jsonl")
    mapping: dict[str, list[str]] = {}
    for word in args.map:
        field, given, column = word.partition("=")
        if not given:
            raise UserError(f"--map {word}: give FIELD=COLUMN, such as path=video or path={{videoID}}.mp4")
        mapping.setdefault(field, []).append(column)
    filters = load_config(Filters, args.filters) if args.filters else Filters()
    listing = Listing(mapping, args.root)
    candidates = listing.find(args.paths)
    cores = os.cpu_count() if args.ray is None else connect(args.ray).cpus
    how = {"workers": args.workers or cores, "split": args.shots, "per_minute": args.seconds_per_minute, "cluster": args.ray is not None}
    with own(out, new=True), tqdm(total=len(candidates), unit="file", desc=f"scan to {out}") as bar:
        for step in scan(candidates, out, filters=filters, **how):
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


def run_report(args: argparse.Namespace) -> None:
    from kling.data.manifest import quarantine_of, read_manifest, read_quarantine
    from kling.data.scan.report import write_report

    path = Path(args.manifest)
    out = Path(args.out) if args.out else path.with_suffix(".html")
    if out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--out {out}: end the page's name in .html")
    if args.sheet < 0:
        raise UserError(f"--sheet {args.sheet}: give 0 or more")
    write_report(out, read_manifest(path), read_quarantine(quarantine_of(path)), args.sheet)
    print(out)


def run_caption(args: argparse.Namespace) -> None:
    """Existing captions in a language are kept, so running the same command again continues where it stopped. A clip that cannot be
    described costs only itself."""
    from tqdm import tqdm

    from kling.data.scan.captioner import PROMPTS, Captioner
    from kling.sampling.machine import pick_device

    if args.frames < 1:
        raise UserError(f"--frames {args.frames}: give at least 1")
    path, written = Path(args.manifest), 0
    with changed(path) as (manifest, put):
        captioner = Captioner(args.model, args.frames, device=str(pick_device(args.device)))
        todo = [(i, x) for i, shot in enumerate(manifest.shots) for x in args.language if x not in {c.language for c in shot.captions}]
        for i, language in tqdm(todo, unit="caption"):
            shot = manifest.shots[i]
            try:
                caption = captioner.describe(manifest, shot, args.prompt or PROMPTS[language], language)
            except UserError as error:
                print(f"{shot.name}: {error}", file=sys.stderr)
                continue
            put(i, replace(shot, captions=(*shot.captions, caption)))
            written += 1
    print(f"{written} captions written to {path}, {sum(not s.captions for s in manifest.shots)} clips without one")


def run_camera(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from kling.cameras.files import read_path
    from kling.cameras.plot import draw_path
    from kling.data.image import write_png
    from kling.metrics.camera.clips import check_file, estimated
    from kling.metrics.camera.rotation import WIDTH

    path, file = Path(args.path), Path(args.path).suffix != ".jsonl"
    for name in ("method",) if file else ("video", "png"):
        if getattr(args, name) is not None:
            kind, other = ("camera file", "manifest") if file else ("manifest", "camera file")
            raise UserError(f"--{name} is for a {other}, and {path} is a {kind}: leave it out")
    if file:
        times, trajectory = read_path(path)
        picture = Path(args.png or path.with_suffix(".png"))
        if picture.suffix.lower() != ".png":
            raise UserError(f"--png {picture}: end the picture's name in .png")
        write_png(picture, draw_path(trajectory.relative(), path.name))
        error = check_file(path, Path(args.video)) if args.video else None
        print(
            f"{path}: {len(times)} poses"
            + (f", points {error:.2f} pixels off at a width of {WIDTH}" if args.video else "")
            + f" · {picture}"
        )
        return
    rows, failed = [], 0
    with changed(path) as (manifest, put):
        for i, shot in enumerate(tqdm(manifest.shots, unit="clip")):
            if shot.is_image:
                continue
            try:
                if shot.camera is None:
                    shot = estimated(manifest, shot, args.method or METHODS[0])
                else:
                    error = check_file(manifest.folder / shot.camera, manifest.check(shot), shot.start, shot.end)
                    shot = replace(shot, measures=shot.measures | {"camera": {"method": "given", "error": round(error, 3)}})
            except UserError as error:
                failed += 1
                print(f"{shot.name}: {error}", file=sys.stderr)
                continue
            put(i, shot)
            rows.append(shot.measures["camera"])
    errors = [row["error"] for row in rows]
    placed = [row["registered"] for row in rows if "registered" in row]
    print(
        f"{len(rows)} clips with a camera, {failed} without"
        + (f" · median error {median(errors):.2f} px at a width of {WIDTH}" if rows else "")
    )
    print(f"frames registered: {100 * sum(placed) / len(placed):.1f} % of {len(placed)} estimated clips" if placed else "none estimated")


def run_tracks(args: argparse.Namespace) -> None:
    """Clips that have tracks keep them, so running the same command again continues where it stopped."""
    from tqdm import tqdm

    from kling.metrics.tracks import estimated_tracks

    failed = 0
    with changed(Path(args.manifest)) as (manifest, put):
        for i, shot in enumerate(tqdm(manifest.shots, unit="clip")):
            if shot.is_image or shot.tracks:
                continue
            try:
                shot = estimated_tracks(manifest, shot)
            except UserError as error:
                failed += 1
                print(f"{shot.name}: {error}", file=sys.stderr)
                continue
            put(i, shot)
    rows = [shot.measures["tracks"] for shot in manifest.shots if shot.tracks]
    print(
        f"{len(rows)} clips with tracks, {failed} without"
        + (f" · {median(r['count'] for r in rows):g} tracks of {median(r['seconds'] for r in rows):.1f} s in a median clip" if rows else "")
    )


if __name__ == "__main__":
    main()
