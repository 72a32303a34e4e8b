"""Score a model on the small world, whose truth is known: does it obey the words, the camera, and the pictures it is given?

kling-eval world --model runs/dit/export --out out/eval --n 256      # the same command again goes on where it stopped
kling-eval world --out /tmp/eval --quick                             # minutes: a look, not a score

OUT gets scores.json, scores.md, strips/<task>.png and clips/<task>/<k>.npz. Beside every score stand the same measurement on rendered truth
(how far the ruler itself can be trusted), on truth through the VAE, on three clips that obey nothing (frozen, shuffled, noise), and chance.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import shlex
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kling_programs.eval.common import Parser, check_order, write_json
from torch import Tensor

from kling.condition.axes import MOVES, UNITS, axes_trajectory
from kling.data.captions import COLOURS, GROUNDS, MOTIONS, SOLIDS
from kling.data.files import head, written
from kling.data.image import write_png
from kling.data.render import HAZE, HAZE_DISTANCE
from kling.data.transforms import fit, to_tensor
from kling.data.world import COLOUR_RGB, FOCAL, PHRASINGS, Scene, World, render_scene, start_pose
from kling.errors import UserError
from kling.metrics.camera import CLASSES, SINGLE
from kling.metrics.control import QUESTIONS, Detectors
from kling.metrics.controls import Order, frozen, noise, shuffled
from kling.metrics.odometry import Stage
from kling.metrics.pixel import flicker, psnr, seam, ssim
from kling.metrics.report import Line, Row, markdown, paired, reached, strip, summarise
from kling.metrics.ruler import Ruler
from kling.record import model_hashes
from kling.runtime.random import derive_seed
from kling.shapes import aspect_size

ASPECT, FRAMES, LONG = "16:9", 41, 81
HALF = 21  # frames given to a continuation
EXAMPLES = 400  # rendered clips that the detectors learn from
CONTROLS = 64  # clips on which the stand-ins other than truth are measured
VAE_CLIPS = 32
STRIP_ROWS = 4
QUICK = {"n": 8, "examples": 120}

Measured = dict[str, dict[str, list[Row]]]  # by who answered (the model or a stand-in), then by task
LANGUAGES = {"en": "English", "zh": "Chinese"}
MUST = {"colour": ">= 0.85", "solid": ">= 0.75", "ground": ">= 0.90", "motion": ">= 0.70"}
CHANCE = {"colour": 1 / len(COLOURS), "solid": 1 / len(SOLIDS), "ground": 1 / len(GROUNDS), "motion": 1 / len(MOTIONS)}

TABLE = (
    *(Line(f"text-{code}", q, f"{q}, {name}", "%", CHANCE[q], MUST[q]) for code, name in LANGUAGES.items() for q in QUESTIONS),
    *(Line("zh - en", q, f"{q}, Chinese less English", "%", None, ">= -0.05") for q in QUESTIONS),
    Line("camera", "class", "camera class", "%", 1 / len(CLASSES), ">= 0.85"),
    Line("camera", "rotation", "RotErr", "°", None, "<= 5"),
    Line("camera", "translation", "TransErr", "", None),
    Line("camera", "registered", "camera found", "%"),
    Line("image", "first", "first frame, PSNR", "dB"),
    Line("image below VAE", "first", "first frame, below the VAE's ceiling", "dB", None, "<= 2"),
    Line("first_last", "last", "last frame, PSNR", "dB"),
    Line("first_last below VAE", "last", "last frame, below the VAE's ceiling", "dB", None, "<= 4"),
    Line("continuation", "psnr", "seam, PSNR of the pair", "dB"),
    Line("continuation", "gap", "seam, below its neighbours", "dB"),
    Line("continuation", "jump", "seam, colour jump", "levels"),
    Line("continuation", "usual", "colour change of its neighbours", "levels"),
    Line("text-en", "flicker", "flicker", "levels"),
    *(Line(f"vae-{T}", "psnr", f"VAE, {T} frames, PSNR", "dB", None, ">= 30") for T in (FRAMES, LONG)),
    *(Line(f"vae-{T}", "ssim", f"VAE, {T} frames, SSIM", "", None, ">= 0.93") for T in (FRAMES, LONG)),
    *(Line(f"vae-{T}", "slope", f"VAE, {T} frames, PSNR per 10 frames", "dB") for T in (FRAMES, LONG)),
)

# What must come out of the clips that stand in for the model's.
ORDERS = (
    *(Order(f"text-en {q}", ("truth", "noise")) for q in ("colour", "solid", "ground")),
    Order("text-en motion", ("truth", "frozen")),
    Order("text-en flicker", ("frozen", "truth", "noise"), higher=False),
    Order("camera class", ("truth", "frozen", "noise")),
    Order("camera rotation", ("truth", "frozen", "noise"), higher=False),
    Order("camera registered", ("truth", "noise")),
)


@dataclass(frozen=True)
class Options:
    """What decides a score, beside the model. A folder holds clips of one set of options; `n` and the limit may change."""

    out: str
    n: int = 256
    seed: int = 0
    steps: int | None = None
    examples: int = EXAMPLES
    limit_minutes: float | None = None


@dataclass(frozen=True)
class Case:
    """One thing to ask: the fields of a `Request`, and the scene that would be the right answer."""

    task: str
    k: int
    scene: Scene
    request: dict[str, Any]


def main(argv: list[str]) -> None:
    args = parse(argv)
    from kling.pipeline import ASSETS, KlingPipeline

    folder = Path(args.model) if args.model else ASSETS
    pipe = KlingPipeline.from_pretrained(folder)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    given = {"n": args.n, "steps": args.steps, "seed": args.seed, "limit_minutes": args.limit_minutes}
    options = Options(args.out, **((QUICK if args.quick else {}) | {name: value for name, value in given.items() if value is not None}))
    report = evaluate(pipe, options, model_hashes(folder))
    report["command"] = shlex.join(["kling-eval", "world", *argv])
    write_json(Path(options.out) / "scores.json", report)
    print(report["table"])
    check_order(ORDERS, report["columns"])


def evaluate(pipe: Any, options: Options, model: dict[str, Any]) -> dict[str, Any]:
    """Ask, measure, report. Of `KlingPipeline`, `pipe` needs `__call__`, `encode`, `decode`, `device` and `config.capabilities`."""
    out = Path(options.out)
    claim(out, options, model)
    ruler = make_ruler(options)
    world = World(options.seed, FRAMES, ASPECT, split="heldout", max_things=1)
    able = set(pipe.config.capabilities)
    tasks = [task for task in TASKS if task.split("-")[0] in able]
    measured: Measured = defaultdict(lambda: defaultdict(list))
    started, seconds, n = time.monotonic(), [], 0

    for k in range(options.n):
        for task in tasks:
            case = TASKS[task](world, k)
            truth = render_scene(case.scene)
            video, took = answer(pipe, case, truth, options, out, camera="camera" in able)
            seconds += [took] if took else []
            measured["model"][task].append(measure(ruler, case, video, truth))
            for name, other in stand_ins(pipe, task, k, truth):
                measured[name][task].append(measure(ruler, case, other, truth))
            if k < STRIP_ROWS:
                show(out, task, world, k)
        n = k + 1
        progress(n, options, started, measured["model"])
        if options.limit_minutes and time.monotonic() - started > 60 * options.limit_minutes:
            break

    measured["model"].update(vae_rows(pipe, options))
    return report(options, model, measured, seconds, n, [task for task in TASKS if task not in tasks])


# ------------------------------------------------------------------------------------------------------------ what is asked


def text_case(world: World, k: int, language: str) -> Case:
    """Words alone, with a camera that stands still; both languages have the same scene and the same seed."""
    scene = with_camera(world, world.scene(k), {}, "static")
    return asked(f"text-{language}", k, world, scene, world.captions(scene)[language][k % PHRASINGS], camera="static")


def camera_case(world: World, k: int) -> Case:
    """Every class in turn, then a mixture of two axes; the words do not speak of the camera."""
    rng = random.Random(f"camera/{world.seed}/{k}")
    name = (*CLASSES, "mixture")[k % (len(CLASSES) + 1)]
    if name in SINGLE:
        axes, move = {axis: value / 10 * round(rng.uniform(4, 10), 1) for axis, value in SINGLE[name].items()}, ""
    elif name == "mixture":
        axes, move = {axis: rng.choice((-1, 1)) * round(rng.uniform(4, 10), 1) for axis in rng.sample(list(UNITS), 2)}, ""
    else:
        axes, move = dict(MOVES.get(name, {})), name
    scene = with_camera(world, world.scene(k), axes, move)
    return asked("camera", k, world, scene, world.captions(scene)["en"][1], camera=axes)


def picture_case(world: World, k: int, task: str, **pictures: int) -> Case:
    scene = world.scene(k)
    return asked(task, k, world, scene, world.captions(scene)["en"][0], camera=scene.axes, **pictures)


def continuation_case(world: World, k: int) -> Case:
    scene = with_camera(world, world.scene(k), {}, "static")
    return asked("continuation", k, world, scene, world.captions(scene)["en"][0], video=slice(HALF), num_frames=FRAMES - HALF + 1)


TASKS = {
    "text-en": lambda world, k: text_case(world, k, "en"),
    "text-zh": lambda world, k: text_case(world, k, "zh"),
    "camera": camera_case,
    "image": lambda world, k: picture_case(world, k, "image", image=0),
    "first_last": lambda world, k: picture_case(world, k, "first_last", image=0, last_image=FRAMES - 1),
    "continuation": continuation_case,
}


def asked(task: str, k: int, world: World, scene: Scene, prompt: str, **given: Any) -> Case:
    """Pictures in `given` are frame numbers of the truth, filled in by `answer`."""
    seed = derive_seed(world.seed, "evaluation", k)
    return Case(task, k, scene, {"prompt": prompt, "aspect": ASPECT, "num_frames": world.frames, "seed": seed} | given)


def with_camera(world: World, scene: Scene, axes: dict[str, float], move: str) -> Scene:
    trajectory = axes_trajectory(axes, world.frames, *aspect_size(ASPECT), FOCAL)
    return dataclasses.replace(scene, axes=axes, move=move, trajectory=trajectory)


def answer(pipe: Any, case: Case, truth: Tensor, options: Options, out: Path, camera: bool) -> tuple[Tensor, float]:
    """The model's clip (T, H, W, 3) uint8 at the truth's size, made now or kept from before, and the seconds it took (0 if kept)."""
    path = out / "clips" / case.task / f"{case.k:04d}.npz"
    if path.is_file():
        return fit(np.load(path, allow_pickle=False)["frames"], *truth.shape[1:3]), 0.0
    fields = dict(case.request)
    for name in ("image", "last_image", "video"):
        if name in fields:
            fields[name] = truth[fields[name]].numpy()
    if not camera:
        fields.pop("camera", None)
    if options.steps:
        fields["num_inference_steps"] = options.steps
    started = time.monotonic()
    frames = np.asarray(pipe(**fields).frames[0])
    took = time.monotonic() - started
    path.parent.mkdir(parents=True, exist_ok=True)
    with written(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, frames=frames)
    return fit(frames, *truth.shape[1:3]), took


def stand_ins(pipe: Any, task: str, k: int, truth: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Clips measured in the model's place. The second language has the first one's."""
    if task == "text-zh":
        return
    if task in ("text-en", "camera", "continuation"):
        yield "truth", truth
    if task not in ("text-en", "camera") or k < CONTROLS:
        yield "truth through the VAE", through_vae(pipe, truth)
    if task in ("text-en", "camera") and k < CONTROLS:
        seed = derive_seed(0, "controls", k)
        yield "frozen", frozen(truth)
        yield "shuffled", shuffled(truth, seed)
        yield "noise", noise(truth, seed)


def through_vae(pipe: Any, frames: Tensor) -> Tensor:
    return pipe.decode(pipe.encode(frames).to(pipe.device))[0]


# ----------------------------------------------------------------------------------------------------------- what is measured


def make_ruler(options: Options) -> Ruler:
    """Detectors taught on rendered clips of the training split, under a seed that no case has."""
    stage = Stage(start_pose(), FOCAL, float(HAZE.mean()), HAZE_DISTANCE, COLOUR_RGB)
    world = World(derive_seed(options.seed, "ruler"), FRAMES, ASPECT, split="train", max_things=1)
    scenes = (with_camera(world, world.scene(i), {}, "static") for i in range(options.examples))
    return Ruler(stage, Detectors.fit(((render_scene(scene), labels(scene)) for scene in scenes), COLOUR_RGB))


def measure(ruler: Ruler, case: Case, video: Tensor, truth: Tensor) -> Row:
    """What one clip (T, H, W, 3) uint8 scores as an answer to a case; None where a measure does not apply."""
    scene = case.scene
    if case.task.startswith("text"):
        return ruler.words(video, labels(scene)) | {"flicker": float(flicker(batch(video)))}
    if case.task == "camera":
        return ruler.camera(video, scene.trajectory, scene.axes if len(scene.axes) < 2 or scene.move else None)
    if case.task == "continuation":
        return {name: float(value) for name, value in seam(batch(video), HALF).items()}
    per_frame = psnr(batch(video), batch(truth))[0]
    return {"first": float(per_frame[0]), "last": float(per_frame[-1]) if case.task == "first_last" else None}


def labels(scene: Scene) -> dict[str, str]:
    thing = scene.things[0]
    return {"colour": thing.colour, "solid": thing.solid, "ground": scene.ground, "motion": thing.motion}


def batch(frames: Tensor) -> Tensor:
    """(T, H, W, 3) uint8 -> (1, 3, T, H, W) in [-1, 1]."""
    return to_tensor(frames)[None]


def vae_rows(pipe: Any, options: Options) -> dict[str, list[Row]]:
    """The VAE alone, on held-out clips of both lengths: does it hold over time?"""
    rows: dict[str, list[Row]] = {}
    for T in (FRAMES, LONG):
        world = World(options.seed, T, ASPECT, split="heldout")
        rows[f"vae-{T}"] = []
        for k in range(min(VAE_CLIPS, options.n)):
            truth = world.clip(k).video
            a, b = batch(through_vae(pipe, truth)), batch(truth)
            per_frame = psnr(a, b)[0].double()  # (T,)
            t = torch.arange(T, dtype=torch.float64) - (T - 1) / 2
            slope = float(10 * (t * per_frame).sum() / (t * t).sum())
            rows[f"vae-{T}"].append({"psnr": float(per_frame.mean()), "ssim": float(ssim(a, b).mean()), "slope": slope})
    return rows


# ------------------------------------------------------------------------------------------------------------- what is written


def report(
    options: Options, model: dict[str, Any], measured: Measured, seconds: list[float], n: int, left_out: list[str]
) -> dict[str, Any]:
    """Everything measured as plain values; writes scores.md."""
    own, vae = measured["model"], measured["truth through the VAE"]
    scores = {task: summarise(rows) for task, rows in own.items()}
    scores["zh - en"] = paired(own["text-en"], own["text-zh"])
    for task in ("image", "first_last"):
        scores[f"{task} below VAE"] = paired(own[task], vae[task])
    columns = {name: {task: summarise(rows) for task, rows in by_task.items()} for name, by_task in measured.items() if name != "model"}
    for by_task in columns.values():
        by_task["text-zh"] = by_task.get("text-en", {})
    table = markdown(TABLE, scores, columns)
    notes = [f"n = {n} of {options.n} cases a task", f"seed {options.seed}", f"{options.steps or 'default'} steps"]
    notes += [f"{sum(seconds) / len(seconds):.1f} s a clip"] if seconds else []
    notes += [f"not trained for: {', '.join(left_out)}"] if left_out else []
    strips = [
        f"**{path.stem}**: truth above answer\n\n![]({path.relative_to(options.out)})"
        for path in sorted(Path(options.out).glob("strips/*.png"))
    ]
    with written(Path(options.out) / "scores.md") as temporary:
        temporary.write_text("\n\n".join([" · ".join(notes) + "; bold = reached", table, *strips]) + "\n", encoding="utf-8")
    return {
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


def show(out: Path, task: str, world: World, last: int) -> None:
    """The strip of a task: truth above what was made, for the cases so far."""
    rows = []
    for k in range(last + 1):
        truth = render_scene(TASKS[task](world, k).scene)
        made = torch.from_numpy(np.load(out / "clips" / task / f"{k:04d}.npz", allow_pickle=False)["frames"])
        rows += [truth, fit(made, *truth.shape[1:3])]
    (out / "strips").mkdir(exist_ok=True)
    write_png(out / "strips" / f"{task}.png", strip(rows))


def progress(n: int, options: Options, started: float, own: dict[str, list[Row]]) -> None:
    spent = time.monotonic() - started
    text = summarise(own.get("text-en", []))
    so_far = " ".join(f"{q} {100 * text[q]['value']:.0f} %" for q in QUESTIONS if q in text)
    left = spent / n * (options.n - n)
    print(f"{n}/{options.n} cases · {spent / 60:.1f} min, {left / 60:.1f} to go · {so_far}", file=sys.stderr, flush=True)


def claim(out: Path, options: Options, model: dict[str, Any]) -> None:
    """Make the folder, or see that the clips in it are of the same model and options."""
    mine = {"seed": options.seed, "steps": options.steps, "weights": model.get("sha256")}
    path = out / "run.json"
    if path.is_file():
        head(path)
        before = json.loads(path.read_text(encoding="utf-8"))
        if changed := [name for name in mine if before.get(name) != mine[name]]:
            raise UserError(f"{out} holds clips made with other {' and '.join(changed)}: give another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_json(path, mine)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser("kling-eval world", __doc__)
    parser.add_argument("--model", metavar="FOLDER", help="default: the shipped one")
    parser.add_argument("--out", metavar="FOLDER", required=True)
    parser.add_argument("--n", metavar="N", type=int, help="cases a task (256)")
    parser.add_argument("--seed", metavar="N", type=int, help="of the scenes and the clips (0)")
    parser.add_argument("--steps", metavar="N", type=int, help="sampling steps; default: the checkpoint's own")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK['n']} cases and less certain detectors")
    parser.add_argument("--limit-minutes", metavar="M", type=float, help="stop asking after this long, and say what n was reached")
    args = parser.parse_args(argv)
    if args.n is not None and args.n < 1:
        raise UserError(f"--n {args.n}: give at least 1")
    return args
