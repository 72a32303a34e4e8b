"""Measure any folder of videos, without weights or downloads.

    kling-eval videos made/ --out out/made      flicker, warp error, dynamic degree; and with
      --reference true/                         PSNR, SSIM, temporal PSNR, VMAF against the file of the same name
      --cameras paths/ [--colmap]               RotErr, TransErr, CamMC, VBench's camera class against NAME.txt or NAME.json
      --keyframes pictures/                     the difference between frame F and NAME@F.png
      --seams 41:32                             the joins at 41, 73, 105, …, and the drift from hop to hop

A file that is missing, unreadable or of the wrong shape is listed, counted as failed and left out of the means: a video in every task, a
file beside it only in its own task. So is a clip whose camera cannot be found. Every score is given with those of controls made from the
same videos; if a measure ranks them wrongly, the exit code is 3. OUT gets scores.json, scores.md and strips (worst above best). A metric
is one function in kling/metrics/clip.py.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from kling_programs.eval.common import MOST_GIB, VIDEOS, check_order, files, protocol_hash, results, write_json, write_text
from kling_programs.eval.options import videos as parse

from kling.cameras.files import load_trajectory
from kling.data.image import read_image, write_png
from kling.data.strip import spread, strip
from kling.data.transforms import fit
from kling.data.video import read_video
from kling.errors import UserError
from kling.metrics.clip import METRICS, Clip
from kling.metrics.controls import Order, frozen, noise, shuffled, stepped, turned
from kling.metrics.report import Line, Row, markdown, summarise

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
CONTROLS = 4  # clips from which controls are made
CONTROL_FRAMES = 17  # frames of each of them
STRIPS = 4  # best and worst clips shown


def main(argv: list[str]) -> None:
    args = parse(argv)
    if args.seams:
        seams(args.seams, 2)  # a mistake is told before the first video is read
    with results(args, "videos"):
        report = evaluate(args)
        report["command"] = shlex.join(["kling-eval", "videos", *argv])
        write_json(Path(args.out) / "scores.json", report)
    print(report["head"], report["table"], sep="\n\n")
    for name, reason in report["failures"].items():
        print(f"failed, in no mean: {name}: {reason}", file=sys.stderr)
    if report["camera_not_found"]:
        print(lost_in_words(report["camera_not_found"]), file=sys.stderr)
    nothing = [task for task, n in report["failed"].items() if n == report["n"]]
    if nothing:
        raise UserError(f"no video could be measured in {' and '.join(nothing)}: every reason is above, and in {args.out}/scores.md")
    check_order([Order(f"{m.task} {m.name}", m.controls, m.higher) for m in METRICS if m.controls], report["columns"])


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
    failed: dict[str, dict[str, str]] = {}  # by name, then task: the error
    frames = shown = 0
    for k, name in enumerate(names):
        try:
            clip, troubles = load(name, made, beside, pictures, args)
            rows[name] = measure(clip, seconds)
        except UserError as error:
            failed[name], rows[name] = dict.fromkeys(tasks, str(error)), {}
            continue
        failed |= {name: troubles} if troubles else {}
        frames += len(clip.video)
        if shown < CONTROLS:
            shown += 1
            for control, row in control_rows(clip):
                for task, values in row.items():
                    controls[control][task].append(values)
        print(f"{k + 1}/{len(names)} {name}", file=sys.stderr, flush=True)
    return report(args, names, rows, controls, failed, {task: 17 * s / max(frames, 1) for task, s in seconds.items()})


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
) -> tuple[Clip, dict[str, str]]:
    """A clip with its inputs, and the errors of the files beside it, by the task that they affect.

    Raises `UserError` if the video itself is missing or cannot be read.
    """
    if name not in made:
        raise UserError("there is no such video")
    whole = read_video(made[name], max_gib=MOST_GIB)
    video = whole.frames
    T, H, W, _ = video.shape
    clip = Clip(video, whole.fps, colmap=args.colmap)
    troubles: dict[str, str] = {}

    def beside_it(task: str, read: Callable[[], None]) -> None:
        try:
            read()
        except UserError as error:
            troubles[task] = str(error)

    def reference() -> None:
        if name not in beside["reference"]:
            raise UserError(f"{args.reference} has no video of that name")
        clip.reference = read_video(beside["reference"][name], max_gib=MOST_GIB).frames
        if clip.reference.shape != video.shape:
            there, clip.reference = "x".join(str(x) for x in clip.reference.shape[:3]), None
            raise UserError(f"it has {T}x{H}x{W} frames, height and width, its reference {there}")

    def camera() -> None:
        if name not in beside["camera"]:
            raise UserError(f"{args.cameras} has no path of that name")
        clip.camera = load_trajectory(beside["camera"][name], T, (H, W))

    def keyframes() -> None:
        found = {}
        for frame, path in pictures.get(name, {}).items():
            if not -T <= frame < T:
                raise UserError(f"{path} is of frame {frame}, the video has {T}")
            found[frame] = fit(read_image(path), H, W)
        clip.keyframes = found

    def continuation() -> None:
        clip.seams = seams(args.seams, T)
        if not clip.seams:
            raise UserError(f"it has {T} frames, so no join at {args.seams}")

    for given, task, read in (
        (beside["reference"], "reference", reference), (beside["camera"], "camera", camera), (pictures, "keyframes", keyframes),
        (args.seams, "continuation", continuation),
    ):  # fmt: skip
        if given:
            beside_it(task, read)
    return clip, troubles


def seams(text: str, T: int) -> list[int]:
    """`41,73` as given; `41:32` is every 32 frames from 41 on; below T."""
    try:
        first, colon, step = text.partition(":")
        if colon and int(first) > 0 and int(step) > 0:
            return list(range(int(first), T, int(step)))
        frames = [] if colon else [int(x) for x in text.split(",")]
        if frames and frames[0] > 0 and all(a < b for a, b in pairwise(frames)):
            return [x for x in frames if x < T]
    except ValueError:
        pass
    raise UserError(f"--seams {text}: give frames like 41,73 or a first and a step like 41:32")


# ----------------------------------------------------------------------------------------------------------- what is measured


def measure(clip: Clip, seconds: dict[str, float] | None = None, only: str = "") -> dict[str, Row]:
    """Rows by task for the inputs of a clip, or for one task only. seconds: the time of each task is added to it."""
    seconds = defaultdict(float) if seconds is None else seconds
    rows: dict[str, Row] = {}
    for m in METRICS:
        if clip.has(m.task) and only in ("", m.task):
            started = time.perf_counter()
            rows[m.task] = {**rows.get(m.task, {}), m.name: m.of(clip)}
            seconds[m.task] += time.perf_counter() - started
    return rows


def control_rows(clip: Clip) -> Iterator[tuple[str, dict[str, Row]]]:
    """Control clips made from this one, by name, measured like any other."""
    video, fps = clip.video[:CONTROL_FRAMES], clip.fps
    yield "frozen", measure(Clip(frozen(video), fps))
    yield "noise", measure(Clip(noise(video, 0), fps))
    turning, path = turned(video[0])
    known = Clip(turning, 8.0, camera=path if clip.camera else None, colmap=clip.colmap)
    yield "turned", measure(known)
    if clip.camera:
        for name, made in (("frozen", frozen(turning)), ("noise", noise(turning, 0))):
            yield name, measure(Clip(made, 8.0, camera=path, colmap=clip.colmap), only="camera")
    if clip.reference is not None:
        truth = clip.reference[:CONTROL_FRAMES]
        for name, made in (("truth", truth), ("shuffled", shuffled(truth, 0)), ("noise", noise(truth, 0))):
            yield name, measure(Clip(made, fps, reference=truth), only="reference")
    if clip.keyframes:
        picture = next(iter(clip.keyframes.values()))
        fade = torch.linspace(0, 1, CONTROL_FRAMES)[:, None, None, None]
        faded = torch.lerp(picture.float(), picture.flip(1).float(), fade).round().to(torch.uint8)
        for name, made in (("faded", faded), ("frozen", frozen(faded)), ("noise", noise(faded, 0))):
            yield name, measure(Clip(made, fps, keyframes={0: picture}), only="keyframes")
    if clip.seams:
        picture = video[:1].expand(CONTROL_FRAMES, -1, -1, -1)
        for name, at in (("frozen", []), ("stepped", [9, 13])):
            yield name, measure(Clip(stepped(picture, at), fps, seams=[9, 13]), only="continuation")


# ------------------------------------------------------------------------------------------------------------- what is written


def report(
    args: argparse.Namespace,
    names: Sequence[str],
    rows: dict[str, dict[str, Row]],
    controls: Any,
    failed: dict[str, dict[str, str]],
    seconds: dict[str, float],
) -> dict[str, Any]:
    tasks = list(dict.fromkeys(m.task for m in METRICS))
    scores = {task: summarise([rows[name][task] for name in names if task in rows[name]]) for task in tasks}
    columns = {name: {task: summarise(found) for task, found in by_task.items()} for name, by_task in controls.items()}
    lines = [Line(m.task, m.name, m.title, m.unit) for m in METRICS]
    protocol = {"suite": "videos", "version": 4, "measures": [(m.task, m.name, m.title) for m in METRICS], "seams": args.seams}
    protocol["colmap"] = args.colmap
    table = markdown(lines, scores, columns)
    counts = {task: sum(task in troubles for troubles in failed.values()) for task in tasks}
    left_out = ", ".join(f"{n} in {task}" for task, n in counts.items() if n) or "none"
    head = f"n = {len(names)}, failed and in no mean: {left_out}; protocol {protocol_hash(protocol)}"
    notes = "; ".join(f"{task} {s:.2f} s" for task, s in seconds.items())
    failures = {name: reason_of(troubles) for name, troubles in failed.items()}
    said = "".join(f"\n- failed: {name}: {reason}" for name, reason in failures.items())
    lost = [name for name in names if rows[name].get("camera", {}).get("registered") is False]
    said += f"\n- {lost_in_words(lost)}" if lost else ""
    write_text(Path(args.out) / "scores.md", f"{head}\n\n{table}\n\nseconds for 17 frames: {notes}\n{said}\n")
    ranked = show(args, names, rows)
    return {
        "suite": "videos",
        "options": {name: value for name, value in vars(args).items() if value is not None},
        "protocol": protocol_hash(protocol),
        "n": len(names),
        "failures": failures,
        "failed": counts,
        "camera_not_found": lost,
        "scores": scores,
        "columns": columns,
        "seconds_per_17_frames": seconds,
        "ranked": ranked,
        "rows": rows,
        "head": head,
        "table": table,
    }


def lost_in_words(names: Sequence[str]) -> str:
    return f"camera not found, so in no mean of camera errors ({len(names)}): {', '.join(names)}"


def reason_of(troubles: dict[str, str]) -> str:
    """The error of a video (the same in every task), or of the files beside it."""
    own = set(troubles.values())
    return own.pop() if len(own) == 1 < len(troubles) else "; ".join(f"{task}: {why}" for task, why in troubles.items())


def show(args: argparse.Namespace, names: list[str], rows: dict[str, dict[str, Row]]) -> list[str]:
    """Clips from worst to best by the first requested measure; writes both ends as a strip."""
    asked = [m for m in METRICS if m.task != "motion" and any(m.task in row for row in rows.values())]
    key = next(iter(asked), next(m for m in METRICS if m.name == "warp"))
    known = [n for n in names if rows[n].get(key.task, {}).get(key.name) is not None]
    ranked = sorted(known, key=lambda n: rows[n][key.task][key.name] * (1 if key.higher else -1))
    ends = ranked if len(ranked) <= 2 * STRIPS else ranked[:STRIPS] + ranked[-STRIPS:]
    if ends:
        made = files(args.folder, VIDEOS, "videos")
        clips = [spread(read_video(made[name], max_gib=MOST_GIB).frames) for name in ends]
        H, W = clips[0].shape[1:3]
        write_png(Path(args.out) / "strips" / f"{key.task}-{key.name}.png", strip([fit(clip, H, W) for clip in clips]))
    return ranked
