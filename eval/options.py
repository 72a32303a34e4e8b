"""The command lines of kling-eval's suites, one function each, without torch, so that --help is fast."""

from __future__ import annotations

import argparse
import ast
import math
import os
from importlib.util import find_spec
from pathlib import Path

from kling_programs.sample.command import Parser, limits

import kling
from kling.errors import UserError, unknown
from kling.metrics.benchmarks import BOARDS
from kling.shapes import latent_frames, parse_size

# Values for the help texts, copied from the suites (tests/test_command.py), which import torch.
TASKS = (
    *("text-en", "text-zh", "plain", "things-2", "things-3", "long", "camera", "words", "words-read"),
    *("image", "image-motion", "first_last", "keyframes"),
    *("restyle-0.3", "restyle-0.7", "brush", "brush-none", "brush-camera", "brush-camera-none"),
    *("shots", "shots-alone"),
    *("reference", "reference-none", "reference-2"),
    *("continuation", "continuation-same", "continuation-other", "continuation-none"),
)
MODES = ("std", "pro", "fast")
PRECISIONS = ("auto", "bf16", "fp32")
QUICK = {"n": 8, "examples": 120}
COMPARE = ("fvd", "jedi", "fid", "lpips")  # with real videos
NETWORKS = (*COMPARE, "clipscore", "clip", "dino")
MOST = 100_000  # cases, or frames: more are a mistake
SEEDS = 2**32 - 1
FVD_FRAMES = 16
MOVES, SEED = 7, 11
ACTIONS = ("sample", "check", "import")
NAMES = (*BOARDS, "physics-iq", "worldscore")
CARD = Path(kling.__file__).parent / "assets" / "README.md"


def described(suite: str) -> str:
    """The docstring of a suite's file, which is not imported."""
    return ast.get_docstring(ast.parse(Path(__file__).with_name(f"{suite}.py").read_text(encoding="utf-8")))


def once(given: list[str], what: str) -> None:
    """Raises `UserError` if something is given twice, also in another spelling of its path."""
    seen: set[str] = set()
    for one in map(str, given):
        path = os.path.realpath(one)
        if path in seen:
            raise UserError(f"{what} {one} is given twice: give each once")
        seen.add(path)


def world(argv: list[str]) -> argparse.Namespace:
    parser = Parser("kling-eval world", described("world"))
    parser.add_argument("--model", metavar="FOLDER", help="default: the shipped one")
    parser.add_argument("--out", metavar="FOLDER", required=True)
    parser.add_argument("--n", metavar="N", type=int, help="cases a task (256)")
    parser.add_argument("--seed", metavar="N", type=int, help="of the scenes and the clips (0)")
    parser.add_argument("--steps", metavar="N", type=int, help="sampling steps; default: the checkpoint's own")
    parser.add_argument("--mode", metavar="MODE", help="of the requests: std, pro or fast; default: std")
    parser.add_argument("--workers", metavar="N", type=int, help="processes that share the cases and the processor (1)")
    parser.add_argument("--batch", metavar="N", type=int, help="cases that each process samples at once (8 on a GPU, else 1)")
    parser.add_argument("--precision", metavar="NAME", help="auto (as kling-sample does), bf16 or fp32; a folder has one")
    parser.add_argument("--ray", metavar="ADDRESS", help="share the cases over this Ray cluster: auto, local or HOST:6379")
    names = ", ".join(TASKS)
    parser.add_argument("--tasks", metavar="A,B", help=f"only these: {names}; a first word names all that begin with it")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK['n']} cases and less certain detectors")
    parser.add_argument("--limit-minutes", metavar="M", type=float, help="stop after this time, and report the n that was reached")
    args = parser.parse_args(argv)
    limits(args, n=(1, MOST), steps=(1, 1000), seed=(0, SEEDS), workers=(1, 1000), batch=(1, 1000))
    if args.mode is not None and args.mode not in MODES:
        raise unknown("mode", args.mode, MODES)
    if args.precision is not None and args.precision not in PRECISIONS:
        raise unknown("precision", args.precision, PRECISIONS)
    if args.limit_minutes is not None and not 0 < args.limit_minutes < math.inf:
        raise UserError(f"--limit-minutes {args.limit_minutes}: give a positive number")
    return args


def videos(argv: list[str]) -> argparse.Namespace:
    parser = Parser("kling-eval videos", described("videos"))
    parser.add_argument("folder", metavar="FOLDER", help="the videos")
    parser.add_argument("--out", metavar="FOLDER", required=True)
    parser.add_argument("--reference", metavar="FOLDER", help="the true videos, with the same names")
    parser.add_argument("--cameras", metavar="FOLDER", help="requested paths, RealEstate10K text or JSON")
    parser.add_argument("--colmap", action="store_true", help="also use pycolmap if it explains a clip better; slow")
    parser.add_argument("--keyframes", metavar="FOLDER", help="pictures NAME@FRAME.png")
    parser.add_argument("--seams", metavar="FRAMES", help="first frames of hops: 41,73 or 41:32")
    parser.add_argument("--n", metavar="N", type=int, help="only the first N names")
    args = parser.parse_args(argv)
    limits(args, n=(1, MOST))
    if args.colmap and not args.cameras:
        raise UserError("--colmap estimates cameras: give --cameras, the requested paths")
    if args.colmap and find_spec("pycolmap") is None:
        raise UserError("--colmap needs pycolmap: pip install 'kling[colmap]'")
    return args


def features(argv: list[str]) -> argparse.Namespace:
    parser = Parser("kling-eval features", described("features"))
    parser.add_argument("folder", metavar="FOLDER", help="the videos")
    parser.add_argument("--out", metavar="FOLDER", required=True)
    parser.add_argument("--with", dest="weights", metavar="NAME=PATH[#SHA256]", action="append", required=True, help=", ".join(NETWORKS))
    parser.add_argument("--reference", metavar="FOLDER", help="real videos; for lpips and clipscore by the same names")
    parser.add_argument("--prompts", metavar="FOLDER", help="NAME.txt for each video")
    parser.add_argument("--frames", metavar="N", type=int, default=FVD_FRAMES, help=f"of each video ({FVD_FRAMES})")
    parser.add_argument("--stride", metavar="N", type=int, default=1, help="use every Nth frame (1)")
    args = parser.parse_args(argv)
    names = [text.partition("=")[0] for text in args.weights]
    args.paired = "lpips" in names or "clipscore" in names
    limits(args, frames=(1, MOST), stride=(1, MOST))
    once(names, "--with")
    if args.reference and not {"clipscore", *COMPARE} & set(names):
        raise UserError(f"--reference is for {', '.join(COMPARE)} and clipscore: leave it out, or give one of them --with")
    if args.prompts and "clipscore" not in names:
        raise UserError("--prompts is for clipscore: leave it out, or give --with clipscore=FOLDER")
    if (sets := [name for name in names if name in COMPARE]) and not args.reference:
        raise UserError(f"{sets[0]} compares with real videos: give --reference FOLDER")
    if "clipscore" in names and not args.prompts:
        raise UserError("clipscore compares with words: give --prompts FOLDER, NAME.txt for each video")
    return args


def vae(argv: list[str]) -> argparse.Namespace:
    parser = Parser("kling-eval vae", described("vae"))
    parser.add_argument("folders", metavar="FOLDER", nargs="+", help="of a VAE: config.json and safetensors")
    parser.add_argument("--out", metavar="FOLDER", required=True)
    parser.add_argument("--videos", metavar="FOLDER", help="clips; default: held-out scenes of the small world")
    parser.add_argument("--frames", metavar="T,T", default="17,41", help="lengths, each 1 + 4k (17,41)")
    parser.add_argument("--size", metavar="WIDTHxHEIGHT", help="default: 112x64, or each video's own")
    parser.add_argument("--n", metavar="N", type=int, default=8, help="clips (8)")
    args = parser.parse_args(argv)
    try:
        args.frames = [int(x) for x in args.frames.split(",")]
    except ValueError:
        raise UserError(f"--frames {args.frames}: give whole numbers, like 17,41") from None
    args.size = parse_size(args.size) if args.size else None
    for T in args.frames:
        latent_frames(T)
    once(args.folders, "the folder")
    once(args.frames, "--frames")
    if max(args.frames) > MOST:
        raise UserError(f"--frames {max(args.frames)}: give at most {MOST}")
    if args.size and min(args.size) < 16:
        raise UserError(f"--size {args.size[1]}x{args.size[0]}: give at least 16x16")
    limits(args, n=(1, MOST))
    return args


def certify(argv: list[str]) -> argparse.Namespace:
    parser = Parser("kling-eval certify", described("certify"))
    parser.add_argument("--out", metavar="FOLDER", required=True)
    parser.add_argument("--sizes", metavar="WIDTHxHEIGHT,…", default="112x64,128x128,256x256", help="(112x64,128x128,256x256)")
    parser.add_argument("--n", metavar="N", type=int, default=1, help=f"clips for each of {MOVES} moves (1)")
    parser.add_argument("--seed", metavar="N", type=int, default=SEED, help=f"of the scenes ({SEED})")
    parser.add_argument("--made", metavar="FOLDER", help="videos of the small world made by a model, without zoom")
    args = parser.parse_args(argv)
    args.sizes = [parse_size(size) for size in args.sizes.split(",")]
    once([f"{W}x{H}" for H, W in args.sizes], "--sizes")
    for H, W in args.sizes:
        if not 32 <= min(H, W) <= max(H, W) <= 4096:
            raise UserError(f"--sizes {W}x{H}: give from 32x32 to 4096x4096")
    limits(args, n=(1, MOST), seed=(0, SEEDS))
    return args


def benchmark(argv: list[str]) -> argparse.Namespace:
    parser = Parser("kling-eval benchmark", described("benchmark"))
    parser.add_argument("action", metavar="ACTION", help=", ".join(ACTIONS))
    parser.add_argument("name", metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--info", metavar="FILE", help="the benchmark's list of prompts (sample, check)")
    parser.add_argument("--videos", metavar="FOLDER", help="where the videos are or go (sample, check)")
    parser.add_argument("--images", metavar="FOLDER", help="the benchmark's pictures (sample)")
    parser.add_argument("--still", metavar="TEXT", help="of worldscore: the sentence that ends the prompts of static scenes (sample)")
    parser.add_argument("--model", metavar="FOLDER", help="default: the shipped one (sample)")
    parser.add_argument("--results", metavar="PATH", help="the benchmark's results (import)")
    parser.add_argument("--out", metavar="FOLDER", help="where the scores go (import)")
    args = parser.parse_args(argv)
    if args.action not in ACTIONS:
        raise unknown("action", args.action, ACTIONS)
    if args.name not in NAMES:
        raise unknown("benchmark", args.name, NAMES)
    still = ("still",) if args.name == "worldscore" else ()
    needed = ("results", "out") if args.action == "import" else ("info", "videos")
    sampled = ("info", "videos", "images", "model", *still)
    allowed = {"sample": sampled, "check": ("info", "videos"), "import": ("results", "out")}[args.action]
    for option in ("info", "videos", "images", "still", "model", "results", "out"):
        value = getattr(args, option)
        if value is None and option in needed:
            raise UserError(f"{args.action} needs --{option}")
        if value is not None and option not in allowed:
            raise UserError(f"{args.action} does not use --{option}: leave it out")
    return args


def side_by_side(argv: list[str]) -> argparse.Namespace:
    parser = Parser("kling-eval side-by-side", described("side_by_side"))
    parser.add_argument("a", metavar="A", help="a folder of videos")
    parser.add_argument("b", metavar="B", help="another with the same names")
    parser.add_argument("--votes", metavar="FILE", required=True, help="SQLite file, made if it does not exist")
    parser.add_argument("--result", action="store_true", help="print the win rate and open nothing")
    parser.add_argument("--port", metavar="N", type=int, help="of the page")
    parser.add_argument("--share", action="store_true", help="give the page a public address")
    args = parser.parse_args(argv)
    limits(args, port=(1, 65535))
    once([args.a, args.b], "the folder")
    if args.result and (args.share or args.port is not None):
        raise UserError(f"--result opens no page: leave out {'--share' if args.share else '--port'}")
    return args


def report(argv: list[str]) -> argparse.Namespace:
    parser = Parser("kling-eval report", described("report"))
    parser.add_argument("runs", metavar="RUN", nargs="+", help="folders with scores.json or metrics.jsonl")
    parser.add_argument("--out", metavar="FILE.html", required=True)
    args = parser.parse_args(argv)
    once(args.runs, "the run")
    if Path(args.out).suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--out {args.out}: end the page's name in .html")
    return args


def compare(argv: list[str]) -> argparse.Namespace:
    parser = Parser("kling-eval compare", described("compare"))
    parser.add_argument("a", metavar="A", help="a folder that kling-eval world wrote")
    parser.add_argument("b", metavar="B", nargs="+", help="others with the same cases; each is compared with A")
    parser.add_argument("--out", metavar="FILE.md", help="also write the table here")
    args = parser.parse_args(argv)
    once([args.a, *args.b], "the run")
    return args


def card(argv: list[str]) -> argparse.Namespace:
    parser = Parser("kling-eval card", described("card"))
    parser.add_argument("run", metavar="RUN", help="a folder that kling-eval world wrote")
    parser.add_argument("--into", metavar="FILE.md", default=str(CARD), help="the card; default: the shipped model's")
    return parser.parse_args(argv)
