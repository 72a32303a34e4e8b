"""What is asked of a model on the small world, the scene that would be the right answer, and the table of what must come out."""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass
from typing import Any

from kling.cameras.axes import MOVES, UNITS, axes_trajectory
from kling.data.world.captions import COLOURS, GROUNDS, MOTIONS, SOLIDS
from kling.data.world.scene import FOCAL, PHRASINGS, Scene, World
from kling.metrics.camera.errors import CLASSES, SINGLE
from kling.metrics.control import QUESTIONS
from kling.metrics.controls import Order
from kling.metrics.report import Line
from kling.runtime.random import derive_seed
from kling.shapes import aspect_size

ASPECT = "16:9"
FRAMES, LONG = 41, 81


@dataclass(frozen=True)
class Case:
    """One thing to ask: the fields of a `Request`, and the scene that would be the right answer.

    Pictures and videos in `request` are frame numbers of the truth, which is rendered only when it is asked.
    """

    task: str
    k: int
    scene: Scene
    request: dict[str, Any]


def held_out(seed: int, frames: int, **settings: Any) -> World:
    """Scenes whose combinations of colour, solid and motion are in no training."""
    return World(seed, frames, ASPECT, split="heldout", **settings)


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
    given = half(world.frames)
    prompt = world.captions(scene)["en"][0]
    return asked("continuation", k, world, scene, prompt, video=slice(given), num_frames=world.frames - given + 1)


def half(frames: int) -> int:
    """Frames given to a continuation."""
    return (frames + 1) // 2


CASES = {
    "text-en": lambda world, k: text_case(world, k, "en"),
    "text-zh": lambda world, k: text_case(world, k, "zh"),
    "camera": camera_case,
    "image": lambda world, k: picture_case(world, k, "image", image=0),
    "first_last": lambda world, k: picture_case(world, k, "first_last", image=0, last_image=world.frames - 1),
    "continuation": continuation_case,
}


def asked(task: str, k: int, world: World, scene: Scene, prompt: str, **given: Any) -> Case:
    seed = derive_seed(world.seed, "evaluation", k)
    return Case(task, k, scene, {"prompt": prompt, "aspect": ASPECT, "num_frames": world.frames, "seed": seed} | given)


def with_camera(world: World, scene: Scene, axes: dict[str, float], move: str) -> Scene:
    trajectory = axes_trajectory(axes, world.frames, *aspect_size(ASPECT), FOCAL)
    return dataclasses.replace(scene, axes=axes, move=move, trajectory=trajectory)


def labels(scene: Scene) -> dict[str, str]:
    """The truth in words, by the detectors' questions."""
    thing = scene.things[0]
    return {"colour": thing.colour, "solid": thing.solid, "ground": scene.ground, "motion": thing.motion}


# ------------------------------------------------------------------------------------------------------ what must come out

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
