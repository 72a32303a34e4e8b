"""Measure any folder of videos, without weights and without a download.

    kling-eval videos made/ --out out/made      flicker, warp error, dynamic degree; and with
      --reference true/                         PSNR, SSIM, temporal PSNR, VMAF against the file of the same name
      --cameras paths/ [--colmap]               RotErr, TransErr, CamMC, VBench's camera class against NAME.txt or NAME.json
      --keyframes pictures/                     how near frame F comes to NAME@F.png
      --seams 41:32                             the joins at 41, 73, 105, …, and what drifts from hop to hop

A file that is missing, cannot be read or does not fit counts with every measure's worst value, and is named. Beside every score stand
controls made from the same videos; a measure that ranks them wrongly ends the run with exit code 3. OUT gets scores.json, scores.md and
strips (worst above best).
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import shlex
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from kling_programs.eval.common import VIDEOS, check_order, files, protocol_hash, write_json, write_text
from kling_programs.sample.command import Parser
from torch import Tensor

from kling.cameras.axes import axes_trajectory
from kling.cameras.files import load_trajectory
from kling.cameras.trajectory import Trajectory
from kling.data.image import read_image, write_png
from kling.data.strip import strip
from kling.data.transforms import fit, to_tensor
from kling.data.video import probe, read_video
from kling.errors import UserError
from kling.metrics.camera.errors import WORST_ROTATION, WORST_TRANSLATION, axes_of, rotation_error, summed_errors, translation_error
from kling.metrics.camera.structure import estimate_structure
from kling.metrics.continuation import drift, seam_rows
from kling.metrics.controls import Order, frozen, noise, shuffled, stepped, turned
from kling.metrics.motion import camera_classes, dynamic_degree, optical_flow, warp_error
from kling.metrics.pixel import flicker, psnr, ssim, temporal_psnr
from kling.metrics.report import Line, Row, markdown, summarise
from kling.metrics.vmaf import vmaf

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
CONTROLS = 4  # clips from which controls are made
CONTROL_FRAMES = 17  # of each of them
STANDS_STILL = 0.5  # levels of 255: a clip that never changes more than this from its first frame is a picture, not a video
STRIPS = 4  # best and worst clips shown


@dataclass(frozen=True)
class Measure:
    """One number of a task: what a failure counts, and in which order its controls must come out (best first)."""

    task: str
    name: str
    title: str
    unit: str
    worst: float | bool
    controls: tuple[str, ...] = ()
    higher: bool = True


MEASURES = (
    Measure("reference", "psnr", "PSNR", "dB", 0.0, ("truth", "shuffled", "noise")),
    Measure("reference", "ssim", "SSIM", "", 0.0, ("truth", "shuffled", "noise")),
    Measure("reference", "temporal", "temporal PSNR", "dB", 0.0, ("truth", "shuffled", "noise")),
    Measure("reference", "vmaf", "VMAF", "", 0.0, ("truth", "noise")),
    Measure("motion", "flicker", "flicker", "levels", 510.0, ("frozen", "noise"), higher=False),
    Measure("motion", "warp", "warp error, mean square", "", 1.0, ("frozen", "noise"), higher=False),
    Measure("motion", "dynamic", "dynamic degree", "%", False, ("turned", "frozen")),
    Measure("camera", "class", "camera class (VBench's seven)", "%", False, ("turned", "frozen")),
    Measure("camera", "rotation", "RotErr", "°", WORST_ROTATION, ("turned", "frozen", "noise"), higher=False),
    Measure("camera", "rotation_sum", "RotErr, CamI2V's sum", "rad", math.nan, ("turned", "frozen", "noise"), higher=False),
    Measure("camera", "translation", "TransErr, relative", "", WORST_TRANSLATION),
    Measure("camera", "translation_sum", "TransErr, CamI2V's sum", "", math.nan),
    Measure("camera", "cammc", "CamMC, CamI2V's sum", "", math.nan, ("turned", "noise"), higher=False),
    Measure("camera", "registered", "camera found", "%", False, ("turned", "noise")),
    Measure("keyframes", "psnr", "keyframes, PSNR", "dB", 0.0, ("faded", "noise", "frozen")),
    Measure("keyframes", "frozen", "stands still (counts 0 dB)", "%", True, ("faded", "frozen"), higher=False),
    Measure("continuation", "gap", "join, below its neighbours", "dB", 100.0, ("frozen", "stepped"), higher=False),
    Measure("continuation", "jump", "join, excess colour change", "levels", 442.0, ("frozen", "stepped"), higher=False),
    Measure("continuation", "velocity", "join, change of speed", "px", 100.0, ("frozen", "stepped"), higher=False),
    Measure("continuation", "colour", "drift of colour a hop", "levels", 442.0, ("frozen", "stepped"), higher=False),
    Measure("continuation", "contrast", "drift of contrast a hop", "%", 1.0, ("frozen", "stepped"), higher=False),
    Measure("continuation", "sharpness", "drift of sharpness a hop", "%", 1.0, ("frozen", "stepped"), higher=False),
)
ORDERS = tuple(Order(f"{m.task} {m.name}", m.controls, m.higher) for m in MEASURES if m.controls)


@dataclass
class Given:
    """What is known of one clip beside its frames."""

    fps: float
    reference: Tensor | None = None  # (T, H, W, 3) uint8
    camera: Trajectory | None = None
    keyframes: dict[int, Tensor] = field(default_factory=dict)  # frame -> (H, W, 3) uint8; -1 is the last
    seams: list[int] = field(default_factory=list)
    colmap: bool = False  # whether pycolmap may place the camera too


def main(argv: list[str]) -> None:
    args = parse(argv)
    report = evaluate(args)
    report["command"] = shlex.join(["kling-eval", "videos", *argv])
    write_json(Path(args.out) / "scores.json", report)
    print(report["table"])
    for name, reason in report["failures"].items():
        print(f"failed, counted as worst: {name}: {reason}", file=sys.stderr)
    check_order(ORDERS, report["columns"])


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    made = files(args.folder, VIDEOS, "videos")
    beside = {
        "reference": files(args.reference, VIDEOS, "videos") if args.reference else {},
        "camera": files(args.cameras, (".txt", ".json"), "camera files") if args.cameras else {},
    }
    pictures = keyframe_files(args.keyframes) if args.keyframes else {}
    names = sorted(made.keys() | beside["reference"].keys() | beside["camera"].keys() | pictures.keys())
    names = names[: args.n] if args.n else names
    given = {"reference": args.reference, "camera": args.cameras, "keyframes": args.keyframes, "continuation": args.seams}
    tasks = ["motion", *(task for task, value in given.items() if value)]
    rows: dict[str, dict[str, Row]] = {}
    controls: dict[str, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    seconds: dict[str, float] = defaultdict(float)
    failures, frames = {}, 0
    for k, name in enumerate(names):
        try:
            video, given = load(name, made, beside, pictures, args)
        except UserError as error:
            failures[name] = str(error)
            rows[name] = {task: worst(task, beside["camera"].get(name)) for task in tasks}
            continue
        frames += len(video)
        rows[name] = measure(video, given, seconds)
        if k < CONTROLS:
            for control, row in control_rows(video, given):
                for task, values in row.items():
                    controls[control][task].append(values)
        print(f"{k + 1}/{len(names)} {name}", file=sys.stderr, flush=True)
    return report(args, names, rows, controls, failures, {task: 17 * s / max(frames, 1) for task, s in seconds.items()})


# -------------------------------------------------------------------------------------------------------------- what is read


def keyframe_files(folder: str) -> dict[str, dict[int, Path]]:
    """NAME@FRAME.png by name and frame."""
    found: dict[str, dict[int, Path]] = defaultdict(dict)
    for stem, path in files(folder, PICTURES, "pictures").items():
        name, at, frame = stem.rpartition("@")
        if not at or not frame.lstrip("-").isdigit():
            raise UserError(f"{path}: name it VIDEO@FRAME{path.suffix}, frames counted from 0, -1 the last")
        found[name][int(frame)] = path
    return found


def load(
    name: str, made: dict[str, Path], beside: dict[str, dict[str, Path]], pictures: dict[str, dict[int, Path]], args: argparse.Namespace
) -> tuple[Tensor, Given]:
    """A clip (T, H, W, 3) uint8 and what is known of it. Raises `UserError` for what must count as a failure."""
    if name not in made:
        raise UserError("there is no such video")
    video = read_video(made[name]).frames
    T, H, W, _ = video.shape
    given = Given(probe(made[name]).fps, seams=[t for t in seams(args.seams, T)] if args.seams else [], colmap=args.colmap)
    if beside["reference"]:
        if name not in beside["reference"]:
            raise UserError(f"{args.reference} has no video of that name")
        given.reference = read_video(beside["reference"][name]).frames
        if given.reference.shape != video.shape:
            there = "x".join(str(x) for x in given.reference.shape[:3])
            raise UserError(f"it has {T}x{H}x{W} frames, height and width, its reference {there}")
    if beside["camera"]:
        if name not in beside["camera"]:
            raise UserError(f"{args.cameras} has no path of that name")
        given.camera = load_trajectory(beside["camera"][name], T, (H, W))
    for frame, path in pictures.get(name, {}).items():
        if not -T <= frame < T:
            raise UserError(f"{path} is of frame {frame}, the video has {T}")
        given.keyframes[frame] = fit(read_image(path), H, W)
    if args.seams and not given.seams:
        raise UserError(f"it has {T} frames, so no join at {args.seams}")
    return video, given


def seams(text: str, T: int) -> list[int]:
    """`41,73` as it stands, `41:32` every 32 frames from 41 on; below T."""
    try:
        first, colon, step = text.partition(":")
        if colon and int(first) > 0 and int(step) > 0:
            return list(range(int(first), T, int(step)))
        if not colon and all(int(x) > 0 for x in text.split(",")):
            return [int(x) for x in text.split(",") if int(x) < T]
    except ValueError:
        pass
    raise UserError(f"--seams {text}: give frames like 41,73 or a first and a step like 41:32")


# ----------------------------------------------------------------------------------------------------------- what is measured


def measure(video: Tensor, given: Given, seconds: dict[str, float] | None = None) -> dict[str, Row]:
    """Rows by task for one clip (T, H, W, 3) uint8, of what is given. seconds: where the time of each task is added."""
    seconds = defaultdict(float) if seconds is None else seconds
    rows: dict[str, Row] = {}
    started = time.perf_counter()

    def done(task: str, row: Row) -> None:
        nonlocal started
        now = time.perf_counter()
        rows[task], seconds[task], started = row, seconds[task] + now - started, now

    flow = optical_flow(video)
    batch = to_tensor(video)[None]  # (1, 3, T, H, W)
    still = not (video.float() - video[:1]).abs().mean(dim=(1, 2, 3)).max() > STANDS_STILL
    row: Row = {"flicker": float(flicker(batch)) if len(video) > 2 else 0.0, "warp": warp_error(video, flow)}
    done("motion", row | {"dynamic": dynamic_degree(flow, given.fps)})
    if given.reference is not None:
        done("reference", reference_row(video, given.reference))
    if given.camera is not None:
        done("camera", camera_row(video, given, camera_classes(flow)))
    if given.keyframes:
        pairs = [(to_tensor(video[f][None])[None], to_tensor(picture[None])[None]) for f, picture in given.keyframes.items()]
        near = sum(float(psnr(a, b)) for a, b in pairs) / len(pairs)
        done("keyframes", {"psnr": 0.0 if still else near, "frozen": still})
    if given.seams:
        joins = seam_rows(batch, given.seams, flow.speed())
        done("continuation", {"gap": joins["gap"], "jump": joins["colour"], "velocity": joins["velocity"]} | drift(video, given.seams))
    return rows


def reference_row(video: Tensor, reference: Tensor) -> Row:
    a, b = to_tensor(video)[None], to_tensor(reference)[None]
    row: Row = {"psnr": float(psnr(a, b).mean()), "ssim": float(ssim(a, b).mean())}
    row["temporal"] = float(temporal_psnr(a, b).mean()) if len(video) > 1 else None
    return row | {"vmaf": vmaf(video, reference)}


def camera_row(video: Tensor, given: Given, classes: set[str]) -> Row:
    """The estimated path against the asked one; the class where the asked path is one of VBench's seven."""
    asked = given.camera
    estimate = estimate_structure(video, asked.intrinsics, given.colmap)
    found = estimate.found
    sums = summed_errors(estimate.trajectory, asked, found)
    name = vbench_class(asked)
    travels = translation_error(estimate.trajectory, asked, found)
    return {
        "class": None if name is None else name in classes,
        "rotation": rotation_error(estimate.trajectory, asked, found),
        "rotation_sum": sums["rotation"],
        "translation": travels,
        "translation_sum": None if travels is None else sums["translation"],
        "cammc": sums["cammc"],
        "registered": bool(found.all()),
    }


def vbench_class(path: Trajectory) -> str | None:
    """Which of VBench's seven a path is, if one: a single axis, where travel sideways reads as a pan and travel forward as a zoom."""
    axes = {name: value for name, value in axes_of(path).items() if abs(value) > 0.5}
    if not axes:
        return "static"
    if len(axes) > 1:
        return None
    (name, value), names = next(iter(axes.items())), ("left", "right")
    if name in ("pan", "horizontal"):
        return f"pan_{names[value > 0]}"
    if name in ("tilt", "vertical"):
        return "tilt_up" if value > 0 else "tilt_down"
    if name in ("zoom", "dolly"):
        return "zoom_in" if (value > 0) == (name == "dolly") else "zoom_out"
    return None


def worst(task: str, camera: Path | None = None) -> Row:
    """The row of a failure. The sums are those of as many frames as a control has: the file that would tell is the one that failed."""
    row: Row = {m.name: m.worst for m in MEASURES if m.task == task}
    if task == "camera":
        path = load_trajectory(camera, CONTROL_FRAMES) if camera else axes_trajectory({}, CONTROL_FRAMES, 1, 1)
        sums = summed_errors(path, path, torch.zeros(len(path), dtype=torch.bool))
        row |= {"rotation_sum": sums["rotation"], "translation_sum": sums["translation"], "cammc": sums["cammc"]}
    return row


def control_rows(video: Tensor, given: Given) -> Iterator[tuple[str, dict[str, Row]]]:
    """Known clips, made from this one, by name; each measured like an answer."""
    video, fps = video[:CONTROL_FRAMES], given.fps
    yield "frozen", {"motion": measure(frozen(video), Given(fps))["motion"]}
    yield "noise", {"motion": measure(noise(video, 0), Given(fps))["motion"]}
    turning, path = turned(video[0])
    known = Given(8.0, camera=path if given.camera else None, colmap=given.colmap)
    yield "turned", measure(turning, known)
    if given.camera:
        for name, clip in (("frozen", frozen(turning)), ("noise", noise(turning, 0))):
            yield name, {"camera": measure(clip, known)["camera"]}
    if given.reference is not None:
        truth = given.reference[:CONTROL_FRAMES]
        for name, clip in (("truth", truth), ("shuffled", shuffled(truth, 0)), ("noise", noise(truth, 0))):
            yield name, {"reference": reference_row(clip, truth)}
    if given.keyframes:
        picture = next(iter(given.keyframes.values()))
        fade = torch.linspace(0, 1, CONTROL_FRAMES)[:, None, None, None]
        faded = torch.lerp(picture.float(), picture.flip(1).float(), fade).round().to(torch.uint8)
        for name, clip in (("faded", faded), ("frozen", frozen(faded)), ("noise", noise(faded, 0))):
            yield name, {"keyframes": measure(clip, Given(fps, keyframes={0: picture}))["keyframes"]}
    if given.seams:
        picture, known = video[:1].expand(CONTROL_FRAMES, -1, -1, -1), Given(fps, seams=[9, 13])
        for name, at in (("frozen", []), ("stepped", known.seams)):
            yield name, {"continuation": measure(stepped(picture, at), known)["continuation"]}


# ------------------------------------------------------------------------------------------------------------- what is written


def report(
    args: argparse.Namespace,
    names: Sequence[str],
    rows: dict[str, dict[str, Row]],
    controls: Any,
    failures: dict[str, str],
    seconds: dict[str, float],
) -> dict[str, Any]:
    tasks = list(dict.fromkeys(m.task for m in MEASURES))
    scores = {task: summarise([rows[name][task] for name in names if task in rows[name]]) for task in tasks}
    columns = {name: {task: summarise(found) for task, found in by_task.items()} for name, by_task in controls.items()}
    lines = [Line(m.task, m.name, m.title, m.unit) for m in MEASURES]
    protocol = {"suite": "videos", "version": 2, "measures": [dataclasses.astuple(m)[:3] for m in MEASURES], "seams": args.seams}
    protocol["colmap"] = args.colmap
    table = markdown(lines, scores, columns)
    head = f"n = {len(names)}, of which {len(failures)} failed and count as worst; protocol {protocol_hash(protocol)}"
    notes = "; ".join(f"{task} {s:.2f} s" for task, s in seconds.items())
    failed = "".join(f"\n- failed: {name}: {reason}" for name, reason in failures.items())
    write_text(Path(args.out) / "scores.md", f"{head}\n\n{table}\n\nseconds for 17 frames: {notes}\n{failed}\n")
    ranked = show(args, [n for n in names if n not in failures], rows)
    return {
        "suite": "videos",
        "options": {name: value for name, value in vars(args).items() if value is not None},
        "protocol": protocol_hash(protocol),
        "n": len(names),
        "failures": failures,
        "scores": scores,
        "columns": columns,
        "seconds_per_17_frames": seconds,
        "ranked": ranked,
        "rows": rows,
        "table": table,
    }


def show(args: argparse.Namespace, names: list[str], rows: dict[str, dict[str, Row]]) -> list[str]:
    """Clips from worst to best by the first measure that was asked for; writes the ends as a strip."""
    key = next((m for m in MEASURES if all(m.task in rows[n] for n in names) and m.task != "motion"), MEASURES[5])
    ranked = sorted(names, key=lambda n: (rows[n][key.task][key.name] or 0) * (1 if key.higher else -1))
    ends = ranked if len(ranked) <= 2 * STRIPS else ranked[:STRIPS] + ranked[-STRIPS:]
    if ends:
        made = files(args.folder, VIDEOS, "videos")
        clips = [read_video(made[name]).frames for name in ends]
        H, W = clips[0].shape[1:3]
        write_png(Path(args.out) / "strips" / f"{key.task}-{key.name}.png", strip([fit(clip, H, W) for clip in clips]))
    return ranked


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser("kling-eval videos", __doc__)
    parser.add_argument("folder", metavar="FOLDER", help="the videos")
    parser.add_argument("--out", metavar="FOLDER", required=True)
    parser.add_argument("--reference", metavar="FOLDER", help="what they should be, by the same names")
    parser.add_argument("--cameras", metavar="FOLDER", help="paths that were asked for, RealEstate10K text or JSON")
    parser.add_argument("--colmap", action="store_true", help="let pycolmap place cameras too, where it explains a clip better; slow")
    parser.add_argument("--keyframes", metavar="FOLDER", help="pictures NAME@FRAME.png")
    parser.add_argument("--seams", metavar="FRAMES", help="where hops begin: 41,73 or 41:32")
    parser.add_argument("--n", metavar="N", type=int, help="only the first N names")
    args = parser.parse_args(argv)
    if args.n is not None and args.n < 1:
        raise UserError(f"--n {args.n}: give at least 1")
    if args.seams:
        seams(args.seams, 2)
    if args.colmap and not args.cameras:
        raise UserError("--colmap places cameras: give --cameras, the paths that were asked for")
    if args.colmap and find_spec("pycolmap") is None:
        raise UserError("--colmap needs pycolmap: pip install 'kling[colmap]'")
    return args
