"""Score a model on the small world with its known truth: how well does it follow the text, the camera, and the given pictures?

kling-eval world --model runs/dit/export --out out/eval --n 256 --workers 2
kling-eval world --out /tmp/eval --tasks text,camera,image --n 64 --steps 12 --workers 2     # ten minutes, for checkpoints during training
kling-eval world --model /data/export --out /data/eval --ray auto    # on all hosts of a Ray cluster, which share /data
kling-eval world --model EXPORT --out out/eval --workers 14 --limit-minutes 1.2 --precision fp32    # one GPU and 16 cores, see below
kling-eval world --out /tmp/eval --quick                             # minutes: a quick look, not a score

OUT gets scores.json, scores.md, strips/<task>.png, clips/<task>/<k>.npz, and cases.jsonl with a line for every case as soon as it is
measured: run again, the same command continues where it stopped. Every score is given with the same measurement on rendered truth (the
accuracy of the metric itself), on truth through the VAE, on a truth that does what the task forbids (broken: an object vanishes half way,
the camera moves another way …), on three clips that follow nothing (frozen, shuffled, noise), and with chance.

On a GPU the workers share it, and each samples `--batch` cases at once (8; on a CPU 1, which is as fast there). Measuring is work for the
processor: give as many workers as cores. With --limit-minutes each worker measures at least one case, and begins no other when the time is
over. What OUT/run.json and OUT/cases.jsonl hold can be taken to another machine, where the same command goes on with the other cases; its
--precision must be the same.

Right-or-wrong measures use N cases. Measures in dB vary little, and some clips are expensive: these use the first 64 cases, and the
controls use the first 32 (the truth of the text tasks uses all). The table gives the n of each. With --tasks, for a quick look during
training, it is half as many of the former and a quarter of the latter.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import shlex
import sys
import threading
import time
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import closing
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from kling_programs.eval.cases import (
    ASPECT,
    FRAMES,
    LONG,
    ORDERS,
    TABLE,
    TASKS,
    WORST,
    Case,
    chosen,
    copied,
    exchanged,
    half,
    held_out,
    other_camera,
    other_story,
    pictures_of,
    rendered,
    spoiled,
)
from kling_programs.eval.common import check_order, protocol_hash, results, write_json
from kling_programs.eval.options import QUICK
from kling_programs.eval.options import world as parse
from kling_programs.eval.world_folder import PROTOCOL, Options, Record, claim, clip_path, recorded
from torch import Tensor

from kling.data.image import write_png
from kling.data.strip import strip
from kling.data.transforms import fit, to_tensor
from kling.data.world.references import render_reference
from kling.data.world.scene import COLOUR_RGB, Scene, World, render_scene
from kling.data.world.storyboard import Storyboard, shot_ranges
from kling.data.world.tracks import places_of
from kling.errors import UserError
from kling.hub.load import OURS, find_folder, read_index, sampling_dtype
from kling.metrics.control import QUESTIONS
from kling.metrics.controls import frozen, noise, shuffled, taken_over
from kling.metrics.motion import magnitude
from kling.metrics.pixel import flicker, psnr, seam, ssim
from kling.metrics.report import Row, Summary, markdown, paired, portion, reached, summarise
from kling.metrics.ruler import Ruler
from kling.metrics.segment import segment
from kling.metrics.things import find_things
from kling.metrics.world import labels, world_ruler
from kling.runtime.cluster import connect, shared
from kling.runtime.files import written
from kling.runtime.precision import default_device, describe
from kling.runtime.random import derive_seed
from kling.sampling.brush import Track
from kling.sampling.record import model_hashes
from kling.sampling.request import Request

STRIP_ROWS = 4
BATCH = 8  # cases that a worker samples at once on a GPU
STROKES = 11  # points of a brushed path

Measured = dict[str, dict[str, list[Row]]]  # by who answered (the model or a stand-in), then by task


def main(argv: list[str]) -> None:
    args = parse(argv)
    from kling.sampling.pipeline import ASSETS

    folder = find_folder(args.model) if args.model else ASSETS
    names = ("n", "steps", "mode", "seed", "workers", "batch", "limit_minutes")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    tasks = chosen(args.tasks) if args.tasks else ()
    if args.ray is not None:
        room = connect(args.ray)
        given = {"workers": room.gpus or room.cpus, "ray": True} | given
    with results(args, "world", same=False):  # `claim` compares the settings
        scored(args, argv, folder, tasks, given)


def scored(args: argparse.Namespace, argv: list[str], folder: Path, tasks: tuple[str, ...], given: dict[str, Any]) -> None:
    precision = precision_for(args.precision or "auto", folder)
    given = {"batch": BATCH if default_device() == "cuda" else 1} | given
    options = Options(args.out, tasks=tasks, bf16=precision == "bf16", **((QUICK if args.quick else {}) | given))
    print(describe(precision), file=sys.stderr, flush=True)
    pipe, hashes = load(folder, options), model_hashes(folder)
    report = evaluate(pipe, options, hashes, folder)
    report["command"] = shlex.join(["kling-eval", "world", *argv])
    write_json(Path(options.out) / "scores.json", report)
    print(report["table"])
    if report["n"] > 1:  # a single case may rank controls wrongly: a camera that only travels turns no more than one that stands still
        check_order(ORDERS, report["columns"])


def precision_for(name: str, folder: Path) -> str:
    """bf16 or fp32, as named; with `auto` that in which kling-sample makes clips with the model: a score is of what users get."""
    if name != "auto":
        return name
    published = read_index(folder).get("_class_name") != OURS
    return "bf16" if published or sampling_dtype(folder, default_device()) else "fp32"


def load(folder: Path, options: Options) -> Any:
    from kling.sampling.pipeline import KlingPipeline

    return KlingPipeline.from_pretrained(folder, torch.bfloat16 if options.bf16 else torch.float32).to(default_device())


def evaluate(pipe: Any, options: Options, model: dict[str, Any], folder: Path | None = None) -> dict[str, Any]:
    """Generate, measure, report. `pipe` needs these of `KlingPipeline`: `__call__` (with a batch `together`), `encode`, `decode`, `device`,
    and in its config `capabilities` and `max_frames`.

    folder: from which other workers load the model.
    """
    out, started = Path(options.out), time.time()
    claim(out, options, model)
    records = {k: record for k, record in recorded(out / "cases.jsonl").items() if k < options.n}
    before, todo = len(records), [k for k in range(options.n) if k not in records]
    examiner = Examiner(pipe, None, options, started + 60 * options.limit_minutes if options.limit_minutes else None)
    with closing(examined(examiner, todo, folder)) as answers, open(out / "cases.jsonl", "a", encoding="utf-8") as file:
        for found in answers:
            for record in found:
                file.write(json.dumps(record) + "\n")
                records[record["k"]] = record
            file.flush()
            if found:
                progress(records, before, options, started)
    for task in examiner.able:
        show(out, task, examiner.world, [k for k in range(STRIP_ROWS) if clip_path(out, task, k).is_file()])
    asked = options.tasks or tuple(TASKS)
    return report(options, model, [records[k] for k in sorted(records)], [task for task in asked if task not in examiner.able])


def estimate(examiner: Examiner, todo: list[int]) -> str:
    """The number of clips to make and measure, and the approximate time, from that of the first one, which is kept."""
    counts = examiner.missing(todo)
    task, total = next((task for task, count in counts.items() if count), None), sum(counts.values())
    if task is None:
        return "all clips exist: they are measured"
    shown = f"{total} clips ({', '.join(f'{task} {count}' for task, count in counts.items())})"
    if examiner.deadline is not None:
        return f"{shown}, as many as {examiner.options.limit_minutes:g} minutes allow"
    case = TASKS[task].make(examiner.world, todo[0])
    truth, started = rendered(case.scene), time.monotonic()
    ((video, took),) = examiner.answers([case], [truth])
    measure(examiner.ruler, case, video, truth)
    each = time.monotonic() - started
    minutes = sum(count * TASKS[task].cost for task, count in counts.items()) * each / TASKS[case.task].cost / 60 / examiner.options.workers
    return f"{shown}, {took:.1f} s to make and {each - took:.1f} s to measure each: about {minutes:.0f} minutes"


# -------------------------------------------------------------------------------------------------------- some cases after others


def examined(examiner: Examiner, todo: list[int], folder: Path | None) -> Iterator[list[Record]]:
    """Cases as they are finished: here, or by `options.workers` processes that each load the model from `folder`.

    Those processes also fit the detectors together: one alone takes longer for that than all do for many cases.
    """
    options, jobs = examiner.options, shares(todo, examiner.options)
    if not todo:
        return
    if options.workers == 1 or options.ray:
        examiner.ruler = make_ruler(options)
        print(estimate(examiner, todo), file=sys.stderr, flush=True)
        if options.ray:
            make = partial(loaded, folder, examiner.ruler, options, examiner.deadline)
            yield from shared(make, jobs, options.workers, on_gpu=True)
        else:
            yield from map(examiner, jobs)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.workers, context, start_worker, (folder, options, examiner.deadline)) as pool:
        try:
            examiner.ruler = make_ruler(options, partial(pool.map, chunksize=4))
            print(estimate(examiner, todo), file=sys.stderr, flush=True)
            for future in as_completed(pool.submit(work, examiner.ruler, job) for job in jobs):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def shares(todo: list[int], options: Options) -> list[list[int]]:
    """The cases in jobs of at most `options.batch`, which take about equally long: controls are measured in the first cases only, so each
    worker takes some of them. Earlier cases come in earlier jobs."""
    rounds = -(-len(todo) // (options.workers * options.batch))
    size = -(-len(todo) // max(1, rounds))
    return [
        job
        for start in range(0, len(todo), max(1, size))
        for i in range(options.workers)
        if (job := todo[start : start + size][i :: options.workers])
    ]


def start_worker(folder: Path, options: Options, deadline: float | None) -> None:
    global work_on
    threading.Thread(target=leave_with_parent, daemon=True).start()
    threads = max(1, torch.get_num_threads() // options.workers)
    torch.set_num_threads(threads)
    cv2.setNumThreads(threads)
    work_on = loaded(folder, None, options, deadline)


def loaded(folder: Path, ruler: Ruler | None, options: Options, deadline: float | None) -> Examiner:
    return Examiner(load(folder, options), ruler, options, deadline)


def leave_with_parent() -> None:
    """End this worker with its parent; otherwise, if the parent is killed, it would wait for its next case forever."""
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def work(ruler: Ruler, job: list[int]) -> list[Record]:
    work_on.ruler = ruler
    return work_on(job)


class Examiner:
    """Generates the clips of some cases for all tasks, and measures them. deadline: seconds since the epoch, after which it begins no other
    case but its first."""

    def __init__(self, pipe: Any, ruler: Ruler | None, options: Options, deadline: float | None = None) -> None:
        self.pipe, self.ruler, self.options, self.deadline, self.done = pipe, ruler, options, deadline, 0
        self.world = held_out(options.seed, FRAMES, max_things=1)
        self.camera = "camera" in pipe.config.capabilities
        fits = pipe.config.max_frames >= FRAMES
        self.able = [
            name for name in options.tasks or TASKS if TASKS[name].needs in pipe.config.capabilities and (fits or not TASKS[name].at_once)
        ]

    @property
    def late(self) -> bool:
        return self.done > 0 and self.deadline is not None and time.time() > self.deadline

    def __call__(self, job: Sequence[int]) -> list[Record]:
        """The cases of `job` that the time allows."""
        made: dict[int, list[tuple[Case, Tensor, Tensor, float]]] = {k: [] for k in job}
        asked = [(task, k) for k in job for task in self.able if k < self.options.cases(task)]
        for some in [asked] if self.options.batch > 1 else [[one] for one in asked]:  # tasks of one shape are also sampled together
            if self.late:
                return []
            cases = [TASKS[task].make(self.world, k) for task, k in some]
            truths = [rendered(case.scene) for case in cases]
            for case, truth, (video, took) in zip(cases, truths, self.answers(cases, truths), strict=True):
                made[case.k].append((case, truth, video, took))
        records = []
        for k in job:
            if self.late:
                break
            records.append(self.measured(k, made.pop(k)))
            self.done += 1
        return records

    def measured(self, k: int, clips: list[tuple[Case, Tensor, Tensor, float]]) -> Record:
        """Scores of a case: its (case, truth, model's clip, seconds to make it) of every task, and of the controls beside them."""
        rows: dict[str, dict[str, Row]] = defaultdict(dict)
        seconds, passed = [took for *_, took in clips if took], Passed(self.pipe)
        for case, truth, video, _ in clips:
            task = case.task
            rows["model"][task] = measure(self.ruler, case, video, truth)
            for name, other in stand_ins(passed, case, truth, self.options.controls):
                rows[name][task] = measure(self.ruler, case, other, truth)
        if k < self.options.controls and not self.options.tasks:
            rows["model"] |= {f"vae-{T}": vae_row(passed, held_out(self.options.seed, T).clip(k).video) for T in (FRAMES, LONG)}
        return {"k": k, "seconds": seconds, "rows": rows}

    def missing(self, todo: list[int]) -> dict[str, int]:
        """Clips still to be made, by task."""
        return {
            task: sum(k < self.options.cases(task) and not clip_path(self.options.out, task, k).is_file() for k in todo)
            for task in self.able
        }

    def answers(self, cases: Sequence[Case], truths: Sequence[Tensor]) -> Iterator[tuple[Tensor, float]]:
        """The model's clips (T, H, W, 3) uint8 at the truths' size, and the seconds each took (0 if it was there before)."""
        paths = [clip_path(self.options.out, case.task, case.k) for case in cases]
        new = [i for i, path in enumerate(paths) if not path.is_file()]
        started = time.monotonic()
        made = dict(zip(new, self.sampled([self.fields(cases[i], truths[i]) for i in new]), strict=True))
        took = (time.monotonic() - started) / max(1, len(new))
        for i, (path, truth) in enumerate(zip(paths, truths, strict=True)):
            if i not in made:
                try:
                    yield fit(np.load(path, allow_pickle=False)["frames"], *truth.shape[1:3]), 0.0
                except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
                    raise UserError(f"{path} is damaged ({error}): delete it, and it is made again") from None
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            with written(path) as temporary, open(temporary, "wb") as file:
                np.savez_compressed(file, frames=made[i])
            yield fit(made[i], *truth.shape[1:3]), took

    def sampled(self, asked: list[dict[str, Any]]) -> list[np.ndarray]:
        """Clips (T, H, W, 3) uint8 of requests, given as their fields: one alone, several in batches."""
        if len(asked) < 2:
            return [np.asarray(self.pipe(**fields).frames[0]) for fields in asked]
        return [frames.numpy() for frames in self.pipe.together([Request(**fields) for fields in asked])]

    def fields(self, case: Case, truth: Tensor) -> dict[str, Any]:
        """The fields of the `Request` for a case."""
        fields = dict(case.request)
        frames = truth if case.given is case.scene else rendered(case.given)
        for name in ("image", "last_image", "video"):
            if name in fields:
                fields[name] = frames[fields[name]].numpy()
        if "tracks" in fields:
            fields["tracks"] = brush_tracks(case.scene, frames)
        if "references" in fields:
            fields["references"] = [render_reference(picture, *truth.shape[1:3]).numpy() for picture in fields["references"]]
        if "keyframes" in fields:
            fields["keyframes"] = [(frames[shown].numpy(), t, strength) for shown, t, strength in fields["keyframes"]]
        if not self.camera:
            fields.pop("camera", None)
            fields |= {"shots": [shot | {"camera": None} for shot in fields["shots"]]} if "shots" in fields else {}
        if self.options.steps:
            fields["num_inference_steps"] = self.options.steps
        if self.options.mode:
            fields["mode"] = self.options.mode
        return fields


class Passed:
    """Clips through the VAE, each computed once: several tasks of a case have the same truth."""

    def __init__(self, pipe: Any) -> None:
        self.pipe, self.known = pipe, []

    def __call__(self, frames: Tensor, cuts: Sequence[int] = ()) -> Tensor:
        """cuts: latent frames at which another shot begins, as `KlingPipeline.decode` takes them."""
        for before, after in self.known:
            if before.shape == frames.shape and torch.equal(before, frames):
                return after
        after = self.pipe.decode(self.pipe.encode(frames).to(self.pipe.device), cuts)[0]
        self.known.append((frames, after))
        return after


def stand_ins(passed: Passed, case: Case, truth: Tensor, few: int) -> Iterator[tuple[str, Tensor]]:
    """Control clips: in `few` cases, except the reference of a relative score and the truth of the text tasks, which are in all."""
    task, seed = TASKS[case.task], derive_seed(0, "controls", case.k)
    cuts = case.scene.starts[1:] if isinstance(case.scene, Storyboard) else ()
    answers = {
        "truth": lambda: truth,
        "truth through the VAE": lambda: passed(truth, cuts),
        "broken": lambda: broken(case),
        "frozen": lambda: frozen(truth),
        "shuffled": lambda: shuffled(truth, seed),
        "noise": lambda: noise(truth, seed),
    }
    for name, answer in answers.items():
        always = (name == "truth" and case.task == "text-en") or (name == "truth through the VAE" and task.ceiling)
        if always or (name in task.beside and case.k < few):
            yield name, answer()


def broken(case: Case) -> Tensor:
    """A clip (T, H, W, 3) uint8 that does what its task forbids: another truth, whose objects are spoiled half way.

    The camera moves another way, objects exchange colours, the ground changes half way, the video to restyle is unchanged, or a reference's
    ground is copied and its thing is not.
    """
    scene, family = case.scene, case.task.split("-")[0]
    if family == "restyle":
        return render_scene(case.given)
    if case.task == "shots":
        return rendered(other_story(case.scene))
    if family == "reference":
        scene = copied(scene, case.k)
    if family in ("plain", "camera", "words"):
        scene = other_camera(scene)
    after = exchanged(scene) if family in ("things", "continuation") else scene
    return taken_over(render_scene(after if family == "things" else scene), render_scene(spoiled(after, case.k)))


# ----------------------------------------------------------------------------------------------------------- what is measured


def make_ruler(options: Options, share: Callable[..., Iterable[Any]] = map) -> Ruler:
    """Detectors fitted to rendered clips of the training split, with a seed that no case has. share: see `world_ruler`."""
    return world_ruler(options.seed, FRAMES, ASPECT, options.examples, share)


def measure(ruler: Ruler, case: Case, video: Tensor, truth: Tensor) -> Row:
    """The scores of one clip (T, H, W, 3) uint8 for a case; None if a measure does not apply."""
    scene, family = case.scene, case.task.split("-")[0]
    if case.task == "shots":
        return ruler.shots(video, shot_ranges(scene.starts, scene.frames), [labels(shot) for shot in scene.shots])
    named = scene.axes if len(scene.axes) < 2 or scene.move else None
    if case.task == "image":
        return {"first": float(psnr(batch(video), batch(truth))[0, 0])}
    if case.task == "first_last":
        return {"last": float(psnr(batch(video), batch(truth))[0, -1])}
    if case.task == "keyframes":
        return {"middle": float(psnr(batch(video), batch(truth))[0, half(len(truth)) - 1])}
    if case.task == "continuation":
        return {name: float(value) for name, value in seam(batch(video), half(len(truth))).items()}
    if family == "continuation":
        end = video[-len(video) // 4 :]
        row = ruler.permanence(video, 1) | {"ground": ruler.words(end, labels(scene))["ground"]}
        return row | {"kept": row["whole"] and row["ground"]}
    if family == "things" or case.task == "reference-2":
        truths = [labels(scene, place) for place in range(len(scene.things))]
        return ruler.things(video, truths) | ruler.permanence(video, len(truths))
    if family in ("camera", "words"):
        return ruler.camera(video, scene.trajectory, named) | ruler.permanence(video, 1, leaves=bool(scene.axes))
    if family == "brush":
        places, size = places_of(scene), torch.tensor([video.shape[2], video.shape[1]])
        asked, height = places.centre[0] * size, 2 * places.half[0, :, 1] * video.shape[1]
        other = None if scene.axes else labels(scene, 1)
        row = ruler.brush(video, scene.things[0].colour, asked, height, other)
        return row | ruler.permanence(video, len(scene.things), leaves=bool(scene.axes))
    row = ruler.words(video, labels(scene)) | ruler.permanence(video, 1)
    if family == "text":
        row |= {"flicker": float(flicker(batch(video))), "magnitude": magnitude(video), f"motion/{labels(scene)['motion']}": row["motion"]}
    if family == "reference":
        row["pasted"] = ruler.words(video, labels(scene) | {"ground": pictures_of(scene, case.k)[0].ground})["ground"]
    if family == "plain":
        row["still"] = ruler.camera(video, scene.trajectory, {})["class"]
    return row


def brush_tracks(scene: Scene, frames: Tensor) -> list[Track]:
    """What a user would give for the first thing of a scene: a mask of it in the first frame, and `STROKES` points of its path."""
    H, W = frames.shape[1:3]
    palette = list(COLOUR_RGB)
    (thing,) = find_things(*(x.numpy() for x in segment(frames[:1], COLOUR_RGB)), [palette.index(scene.things[0].colour)])
    path = places_of(scene).centre[0] * torch.tensor([W, H]) - 0.5
    points = path[torch.linspace(0, len(path) - 1, STROKES).round().long()]
    return [Track(thing.mask[0].astype(np.uint8), [tuple(point) for point in points.tolist()])]


def batch(frames: Tensor) -> Tensor:
    """(T, H, W, 3) uint8 -> (1, 3, T, H, W) in [-1, 1]."""
    return to_tensor(frames)[None]


def vae_row(passed: Passed, truth: Tensor) -> Row:
    """The VAE alone on a clip (T, H, W, 3) uint8: its accuracy, and whether that is constant over time."""
    a, b, T = batch(passed(truth)), batch(truth), len(truth)
    per_frame = psnr(a, b)[0].double()  # (T,)
    t = torch.arange(T, dtype=torch.float64) - (T - 1) / 2
    slope = float(10 * (t * per_frame).sum() / (t * t).sum())
    return {"psnr": float(per_frame.mean()), "ssim": float(ssim(a, b).mean()), "slope": slope}


# ------------------------------------------------------------------------------------------------------------- what is written


def report(options: Options, model: dict[str, Any], records: list[Record], left_out: list[str]) -> dict[str, Any]:
    """All measurements as plain values; writes scores.md. records: by ascending k."""
    measured, seconds, n = by_answer(records), [x for record in records for x in record["seconds"]], len(records)
    own, vae = measured["model"], measured["truth through the VAE"]
    scores = {task: summed(rows) for task, rows in own.items()}
    if "text-en" in own and "text-zh" in own:
        scores["zh - en"] = paired(own["text-en"], own["text-zh"])
    if "shots" in own and "shots-alone" in own:
        scores["shots - alone"] = paired(own["shots-alone"], own["shots"])
    if "brush" in own and "brush-none" in own:
        scores["brush / brush-none"] = portion(own["brush-none"], own["brush"], "other")
    for task in [task for task in own if task in TASKS and TASKS[task].ceiling]:
        scores[f"{task} below VAE"] = paired(own[task], vae[task])
    columns = {name: {task: summed(rows) for task, rows in by_task.items()} for name, by_task in measured.items() if name != "model"}
    for by_task in columns.values():
        by_task["text-zh"] = by_task.get("text-en", {})
    table = markdown(TABLE, scores, columns)
    notes = [f"n = {n} of {options.n} cases a task", f"of some {min(n, options.pictures)}, stand-ins in {min(n, options.controls)}"]
    notes += [f"mode {options.mode}"] if options.mode else []
    notes += [f"seed {options.seed}", f"{options.steps or 'default'} steps", "sampled in bf16" if options.bf16 else "sampled in fp32"]
    notes += [f"of all tasks, only {', '.join(options.tasks)}"] if options.tasks else []
    notes += [f"{sum(seconds) / len(seconds):.1f} s a clip"] if seconds else []
    notes += [f"not trained for, or not at this length: {', '.join(left_out)}"] if left_out else []
    strips = [
        f"**{path.stem}**: truth above answer\n\n![]({path.relative_to(options.out)})"
        for path in sorted(Path(options.out).glob("strips/*.png"))
    ]
    with written(Path(options.out) / "scores.md") as temporary:
        temporary.write_text("\n\n".join([" · ".join(notes) + "; bold = reached", table, *strips]) + "\n", encoding="utf-8")
    measured_as = {"suite": "world", "version": PROTOCOL, "frames": FRAMES, "pictures": options.pictures, "controls": options.controls}
    measured_as |= {"examples": options.examples, "seed": options.seed, "steps": options.steps, "bf16": options.bf16}
    measured_as |= {"mode": options.mode} if options.mode else {}
    return {
        "suite": "world",
        "protocol": protocol_hash(measured_as),
        "version": PROTOCOL,
        "failures": {},
        "options": dataclasses.asdict(options),
        "model": model,
        "n": n,
        "not_trained_for": left_out,
        "scores": scores,
        "columns": columns,
        "reached": reached(TABLE, scores),
        "seconds": seconds,
        "rows": measured,
        "table": table,
    }


def summed(rows: Sequence[Row]) -> Summary:
    """The means of rows, and of the measures motion/<class> the lowest, whose class has the fewest right."""
    found = summarise(rows)
    classes = [score for name, score in found.items() if name.startswith("motion/") and score["n"]]
    return found | ({WORST: min(classes, key=lambda score: score["value"])} if classes else {})


def by_answer(records: list[Record]) -> Measured:
    measured: Measured = defaultdict(lambda: defaultdict(list))
    for record in records:
        for name, by_task in record["rows"].items():
            for task, row in by_task.items():
                measured[name][task].append(row)
    return measured


def show(out: Path, task: str, world: World, cases: list[int]) -> None:
    """The strip of a task: truth above the model's clip."""
    rows = []
    for k in cases:
        truth = rendered(TASKS[task].make(world, k).scene)
        made = torch.from_numpy(np.load(clip_path(out, task, k), allow_pickle=False)["frames"])
        rows += [truth, fit(made, *truth.shape[1:3])]
    if rows:
        (out / "strips").mkdir(exist_ok=True)
        write_png(out / "strips" / f"{task}.png", strip(rows))


def progress(records: dict[int, Record], before: int, options: Options, started: float) -> None:
    spent, n = time.time() - started, len(records)
    own = by_answer(list(records.values()))["model"]
    score = summarise(own["text-en"]) | summarise(own["camera"])
    so_far = " ".join(f"{q} {100 * score[q]['value']:.0f} %" for q in (*QUESTIONS, "whole", "class") if q in score)
    left = spent / (n - before) * (options.n - n)
    print(f"{n}/{options.n} cases · {spent / 60:.1f} min, at most {left / 60:.1f} to go · {so_far}", file=sys.stderr, flush=True)
