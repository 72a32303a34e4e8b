"""Published benchmarks: sample the videos that they need, check that they are complete, and read the results that the benchmarks write.

    kling-eval benchmark sample vbench --info VBench_full_info.json --videos out/vbench [--model FOLDER]
    kling-eval benchmark sample physics-iq --info descriptions.csv --images switch-frames/ --videos out/iq
    kling-eval benchmark check vbench-i2v --info vbench2_i2v_full_info.json --videos out/i2v
    kling-eval benchmark sample worldscore --info DATASET/static/static.json --images DATASET --still "..." --videos out/worldscore_output
    kling-eval benchmark import vbench --results evaluation_results/ --out out/vbench-scores

Benchmarks: vbench, vbench-long, vbench-i2v, vbench-2.0, physics-iq, worldscore. Between check and import their own code runs, in its own
environment, because its pinned versions conflict with ours. `sample` continues where it stopped; a video's seed follows from its place.
"""

from __future__ import annotations

import argparse
import csv
import io
import math
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from kling_programs.eval.common import as_expected, protocol_hash, read_object, results, write_json, write_text
from kling_programs.eval.options import benchmark as parse
from torch import Tensor

from kling.data.image import read_image, write_png
from kling.data.transforms import fit
from kling.data.video import probe, write_video
from kling.errors import UserError
from kling.metrics.benchmarks import BOARDS, Job, board_scores, physics_iq, physics_iq_jobs, vbench_jobs
from kling.metrics.worldscore import Instance, camera_data, image_data, worldscore, worldscore_aspects, worldscore_instances
from kling.runtime.files import head, parse_json, parse_literal, read_text
from kling.runtime.precision import describe
from kling.runtime.random import derive_seed

if TYPE_CHECKING:
    from kling.sampling.pipeline import KlingPipeline

OWN = "give the benchmark's own file"


def main(argv: list[str]) -> None:
    args = parse(argv)
    if args.action == "import":
        imported(args, argv)
        return
    if args.name == "worldscore":
        worlds = worldscore_instances(read_list(Path(args.info), "static.json or dynamic.json"), args.still or "")
        if args.action == "sample":
            sample_worlds(args, worlds)
        check_worlds(args, worlds)
        return
    jobs = read_jobs(args)
    if args.action == "sample":
        sample(args, jobs)
    check(args, jobs)


def read_jobs(args: argparse.Namespace) -> list[Job]:
    path = Path(args.info)
    with as_expected(path, OWN):
        if args.name == "physics-iq":
            return physics_iq_jobs(read_rows(path))
        return vbench_jobs(args.name, read_list(path, "full_info.json"))


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV by the names in its first line."""
    try:
        rows = list(csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True))
    except csv.Error as error:
        raise UserError(f"{path} cannot be read as a table ({error}): {OWN}") from None
    if any(None in row or None in row.values() for row in rows):
        raise UserError(f"{path} has a row of more or fewer cells than its first line: {OWN}")
    return rows


def read_list(path: Path, name: str) -> list[Any]:
    info = read_json(path)
    if not isinstance(info, list):
        raise UserError(f"{path} holds no list: give the benchmark's own {name}")
    return info


def sample(args: argparse.Namespace, jobs: list[Job]) -> None:
    """Make the missing videos."""
    pictures = {job.image for job in jobs if job.image}
    if pictures and not args.images:
        raise UserError(f"{args.name} starts from pictures: give --images, the folder that holds {sorted(pictures)[0]}")
    for name in sorted(pictures):
        head(Path(args.images) / name)
    pipe = opened(args.model)
    for k, job in enumerate(jobs):
        path = Path(args.videos) / job.file
        if path.is_file():
            continue
        image = Path(args.images) / job.image if job.image else None
        out = pipe(prompt=job.prompt, image=image, seed=derive_seed(0, args.name, k))
        write_video(path, out.frames[0], pipe.config.fps)
        print(f"{k + 1}/{len(jobs)} {job.file}", file=sys.stderr, flush=True)


def opened(model: str | None) -> KlingPipeline:
    """The model on this machine's device, in the precision that kling-sample would take; says which."""
    from kling_programs.sample.generate import load_pipeline, precision_of

    from kling.sampling.machine import pick_device

    device = pick_device(None)
    pipe = load_pipeline(model, None)[1].to(device)
    print(describe(precision_of(pipe), device.type), file=sys.stderr, flush=True)
    return pipe


def check(args: argparse.Namespace, jobs: list[Job]) -> None:
    """Check that every video exists and can be read. Raises `UserError` for the first that does not."""
    folder = Path(args.videos)
    missing = [job.file for job in jobs if not (folder / job.file).is_file()]
    if missing:
        raise UserError(f"{folder} lacks {len(missing)} of {len(jobs)} videos, the first is '{missing[0]}': sample it")
    lengths = {probe(folder / job.file).frames for job in jobs}
    spread = str(min(lengths)) if len(lengths) == 1 else f"{min(lengths)} to {max(lengths)}"
    print(f"{args.name}: all {len(jobs)} videos are there, {spread} frames each")


def sample_worlds(args: argparse.Namespace, worlds: list[Instance]) -> None:
    """Make the missing folders. image_data.json is written last: a folder that contains it is complete."""
    if any(world.still for world in worlds) and not args.still:
        raise UserError("still worlds need --still, the sentence that generate_prompt_from_list of WorldScore's utils.py ends prompts with")
    if not args.images:
        raise UserError("worldscore starts from pictures: give --images, the folder WorldScore-Dataset")
    for world in worlds:
        head(Path(args.images) / world.image)
    pipe = opened(args.model)
    for k, world in enumerate(worlds):
        folder = Path(args.videos) / world.folder
        if (folder / "image_data.json").is_file():
            continue
        picture = read_image(Path(args.images) / world.image)
        clips = []
        for i, prompt in enumerate(world.prompts):
            image = clips[-1][-1] if clips else picture.numpy()
            clips.append(pipe(prompt=prompt, image=image, seed=derive_seed(0, args.name, k, i)).frames[0])
        write_world(folder, world, picture, clips, pipe.config.fps)
        print(f"{k + 1}/{len(worlds)} {world.folder}", file=sys.stderr, flush=True)


def write_world(folder: Path, world: Instance, picture: Tensor, clips: list[np.ndarray], fps: float) -> None:
    """Write one instance in WorldScore's layout. clips: (F, H, W, 3) uint8, each beginning with the last frame of the previous one."""
    frames = np.concatenate([clips[0], *(clip[1:] for clip in clips[1:])])
    digits = max(3, len(str(len(frames) - 1)))  # names are sorted as text
    for t, frame in enumerate(frames):
        write_png(folder / "frames" / f"{t:0{digits}d}.png", frame)
    write_video(folder / "videos" / "output.mp4", frames, fps)
    write_png(folder / "input_image.png", fit(picture, *frames.shape[1:3]))
    if world.still:
        write_json(folder / "camera_data.json", camera_data(world.moves, len(clips[0])))
    write_json(folder / "image_data.json", image_data(world, len(clips[0])))


def check_worlds(args: argparse.Namespace, worlds: list[Instance]) -> None:
    """Check that every folder has the stated number of frames and cameras. Raises `UserError` for the first that has not."""
    root, lengths = Path(args.videos), set()
    if missing := [world.folder for world in worlds if not (root / world.folder / "image_data.json").is_file()]:
        raise UserError(f"{root} lacks {len(missing)} of {len(worlds)} worlds, the first is '{missing[0]}': sample it")
    for world in worlds:
        folder = root / world.folder
        total, there = read_json(folder / "image_data.json")["total_frames"], len(list((folder / "frames").glob("*.png")))
        cameras = len(read_json(folder / "camera_data.json")["cameras_interp"]) if world.still else total
        if not (there == cameras == total and (folder / "input_image.png").is_file()):
            raise UserError(f"{folder} has {there} frames and {cameras} cameras, and should have {total}: delete it, and sample it again")
        lengths.add(total)
    print(f"worldscore: all {len(worlds)} worlds are there, {' or '.join(str(n) for n in sorted(lengths))} frames each")


def imported(args: argparse.Namespace, argv: list[str]) -> None:
    """The benchmark's own numbers, with its own weights."""
    found = read_results(args.name, Path(args.results))
    with results(args, "benchmark"):
        write_results(args, argv, found)


def write_results(args: argparse.Namespace, argv: list[str], found: dict[str, float]) -> None:
    table = "\n".join(["| | score |", "| --- | ---: |", *(f"| {name} | {100 * value:.2f} % |" for name, value in found.items())])
    if args.name in ("physics-iq", "worldscore"):
        table = "\n".join(["| | score |", "| --- | ---: |", *(f"| {name} | {value:.3f} |" for name, value in found.items())])
    report: dict[str, Any] = {
        "suite": "benchmark",
        "name": args.name,
        "options": vars(args),
        "protocol": protocol_hash({"name": args.name}),
    }
    scores = {name: {"value": value, "low": value, "high": value, "n": 1} for name, value in found.items()}
    report |= {"n": 1, "failures": {}, "scores": {args.name: scores}, "columns": {}, "table": table}
    report["command"] = shlex.join(["kling-eval", "benchmark", *argv])
    write_json(Path(args.out) / "scores.json", report)
    write_text(Path(args.out) / "scores.md", table + "\n")
    print(table)


def read_results(name: str, path: Path) -> dict[str, float]:
    """From a folder of VBench's `*_eval_results.json` ({dimension: [score, videos]}), Physics-IQ's CSV, or what WorldScore wrote."""
    if name == "physics-iq":
        rows = read_rows(path)
        with as_expected(path, OWN):
            return physics_iq([{key: parsed(path, key, value) for key, value in row.items()} for row in rows])
    if name == "worldscore":
        return read_worldscore(path)
    files = sorted(path.rglob("*.json")) if path.is_dir() else [path]
    raw: dict[str, float] = {}
    for file in files:
        content = read_json(file)
        if isinstance(content, dict):  # the lists are the prompts, which VBench writes too
            raw |= {key: number(file, key, value[0] if isinstance(value, list) and value else value) for key, value in content.items()}
    if not raw.keys() & set(BOARDS[name].dimensions):
        raise UserError(f"{path} holds no results: give the folder with *_eval_results.json")
    if missing := [key for key in BOARDS[name].dimensions if key not in raw]:
        print(f"not measured, counted as 0 as {name} does: {', '.join(missing)}", file=sys.stderr)
    return board_scores(BOARDS[name], raw)


def read_worldscore(path: Path) -> dict[str, float]:
    """From worldscore.json, or from the folder of a model's run, which holds static/ and dynamic/ with one evaluation.json per instance.

    The sums in the file must agree with its aspects.
    """
    if path.is_dir():
        files = [(movement, file) for movement in ("static", "dynamic") for file in sorted((path / movement).rglob("evaluation.json"))]
        if not files:
            raise UserError(f"{path} holds no static/ or dynamic/ with evaluation.json files: give the folder that WorldScore evaluated")
        aspects = worldscore_aspects([(movement, read_object(file, OWN)) for movement, file in files])
        return aspects | worldscore(aspects)
    found = {key: number(path, key, value) for key, value in read_object(path, OWN).items()}
    aspects = {key: value for key, value in found.items() if not key.startswith("WorldScore-")}
    sums = worldscore(aspects)
    for name, value in sums.items():
        stated = found.get(f"WorldScore-{name.capitalize()}", value)
        if abs(stated - value) > 0.011:
            raise UserError(f"{path}: WorldScore-{name.capitalize()} is {stated}, its aspects give {value}: the file was changed")
    return aspects | sums


def parsed(path: Path, key: str, value: str) -> Any:
    """A cell of a CSV: a number, a list of numbers, or text."""
    try:
        return parse_literal(value)
    except UserError as error:
        raise UserError(f"{path}, column {key}: {error}") from None
    except ValueError:
        if key.split("_perspective")[0].endswith(("mse", "iou_v1", "iou", "spatial")):
            raise UserError(f"{path}, column {key}: '{value[:40]}' is no number and no list of numbers") from None
        return value


def number(path: Path, key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{path}: {key} is {value!r}, not a finite number: give the file that the benchmark wrote")
    return float(value)


def read_json(path: Path) -> Any:
    text = read_text(path)
    try:
        return parse_json(text)
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): {OWN}") from None
