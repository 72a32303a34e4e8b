"""What is asked of a model on the small world, the scene that would be the right answer, and the table of what must come out."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kling.cameras.axes import MOVES, UNITS, axes_trajectory
from kling.data.world.captions import COLOURS, GROUNDS, MOTIONS, SOLIDS
from kling.data.world.scene import FOCAL, PHRASINGS, Scene, Thing, World
from kling.errors import unknown
from kling.metrics.camera.errors import CLASSES, SINGLE
from kling.metrics.control import QUESTIONS
from kling.metrics.controls import Order
from kling.metrics.permanence import FAULTS
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


def plain_case(world: World, k: int) -> Case:
    """Words that leave the camera unsaid, and no camera: it must stand still."""
    scene = with_camera(world, world.scene(k), {}, "static")
    return asked("plain", k, world, scene, world.captions(scene)[list(LANGUAGES)[k % 2]][1])


def camera_case(world: World, k: int) -> Case:
    """Every class in turn, then a mixture of two axes; the words do not speak of the camera."""
    scene = camera_scene(world, k, (*CLASSES, "mixture"))
    return asked("camera", k, world, scene, world.captions(scene)["en"][1], camera=scene.axes)


def words_case(world: World, k: int) -> Case:
    """The camera by words alone, every class in turn, the languages too."""
    scene = camera_scene(world, k, CLASSES)
    return asked("words", k, world, scene, world.captions(scene)[list(LANGUAGES)[k // len(CLASSES) % 2]][0])


def camera_scene(world: World, k: int, names: Sequence[str]) -> Scene:
    """Scene k under the k-th camera of `names`, over and over."""
    rng = random.Random(f"camera/{world.seed}/{k}")
    name = names[k % len(names)]
    if name in SINGLE:
        axes, move = {axis: value / 10 * round(rng.uniform(4, 10), 1) for axis, value in SINGLE[name].items()}, ""
    elif name == "mixture":
        axes, move = {axis: rng.choice((-1, 1)) * round(rng.uniform(4, 10), 1) for axis in rng.sample(list(UNITS), 2)}, ""
    else:
        axes, move = dict(MOVES.get(name, {})), name
    return with_camera(world, world.scene(k), axes, move)


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


@dataclass(frozen=True)
class Task:
    """A kind of case: how to make the k-th, the capability it needs, and whether a few of them are enough (what is measured in dB)."""

    make: Callable[[World, int], Case]
    needs: str = "text"
    few: bool = False


TASKS = {
    "text-en": Task(lambda world, k: text_case(world, k, "en")),
    "text-zh": Task(lambda world, k: text_case(world, k, "zh")),
    "plain": Task(plain_case),
    "camera": Task(camera_case, "camera"),
    "words": Task(words_case),
    "image": Task(lambda world, k: picture_case(world, k, "image", image=0), "image", few=True),
    "first_last": Task(lambda world, k: picture_case(world, k, "first_last", image=0, last_image=world.frames - 1), "first_last", few=True),
    "continuation": Task(continuation_case, "continuation", few=True),
}


def chosen(names: str) -> tuple[str, ...]:
    """Tasks by name, or by the first word of several (text: text-en and text-zh), separated by commas, in the order of `TASKS`.

    >>> chosen("camera,text")
    ('text-en', 'text-zh', 'camera')
    """
    families = {task: (task, task.split("-")[0]) for task in TASKS}
    given = [name.strip() for name in names.split(",")]
    for name in given:
        if not any(name in family for family in families.values()):
            raise unknown("task", name, dict.fromkeys(x for family in families.values() for x in family))
    return tuple(task for task, family in families.items() if any(name in family for name in given))


def asked(task: str, k: int, world: World, scene: Scene, prompt: str, **given: Any) -> Case:
    seed = derive_seed(world.seed, "evaluation", k)
    return Case(task, k, scene, {"prompt": prompt, "aspect": ASPECT, "num_frames": world.frames, "seed": seed} | given)


def with_camera(world: World, scene: Scene, axes: dict[str, float], move: str) -> Scene:
    trajectory = axes_trajectory(axes, world.frames, *aspect_size(ASPECT), FOCAL)
    return dataclasses.replace(scene, axes=axes, move=move, trajectory=trajectory)


def spoiled(scene: Scene, k: int) -> Scene:
    """What the scene must not become half way, in turn: its first thing vanishes, is doubled, gets another colour, or another solid."""
    first, *rest = scene.things
    colours = [colour for colour in COLOURS if colour not in {thing.colour for thing in scene.things}]
    aside = torch.tensor([-2.0 if first.centre[:, 0].mean() > 0 else 2.0, 0.0, 0.0])
    ways: tuple[tuple[Thing, ...], ...] = (
        (),
        (first, dataclasses.replace(first, centre=first.centre + aside)),
        (dataclasses.replace(first, colour=colours[k // 4 % len(colours)]),),
        (dataclasses.replace(first, solid=[solid for solid in SOLIDS if solid != first.solid][k // 4 % 2]),),
    )
    return dataclasses.replace(scene, things=(*ways[k % len(ways)], *rest))


def other_camera(scene: Scene) -> Scene:
    """The scene under a camera that goes the opposite way, or moves where it should stand still."""
    axes = {name: -value for name, value in scene.axes.items()} or {"pan": 8.0}
    H, W = aspect_size(scene.aspect)
    return dataclasses.replace(scene, axes=axes, move="", trajectory=axes_trajectory(axes, scene.frames, H, W, FOCAL))


def labels(scene: Scene) -> dict[str, str]:
    """The truth in words, by the detectors' questions."""
    thing = scene.things[0]
    return {"colour": thing.colour, "solid": thing.solid, "ground": scene.ground, "motion": thing.motion}


# ------------------------------------------------------------------------------------------------------ what must come out

LANGUAGES = {"en": "English", "zh": "Chinese"}
MUST = {"colour": ">= 0.99", "solid": ">= 0.99", "ground": ">= 0.98", "motion": ">= 0.95"}
WHOLE = ">= 0.92"
CHANCE = {"colour": 1 / len(COLOURS), "solid": 1 / len(SOLIDS), "ground": 1 / len(GROUNDS), "motion": 1 / len(MOTIONS)}

TABLE = (
    *(Line(f"text-{code}", q, f"{q}, {name}", "%", CHANCE[q], MUST[q]) for code, name in LANGUAGES.items() for q in QUESTIONS),
    *(Line("zh - en", q, f"{q}, Chinese less English", "%", None, ">= -0.05") for q in QUESTIONS),
    *(Line(f"text-{code}", "whole", f"whole clips, {name}", "%", None, WHOLE) for code, name in LANGUAGES.items()),
    *(Line("text-en", fault, f"of these: {fault}", "%") for fault in FAULTS),
    Line("plain", "still", "no camera given: it stands still", "%", None, ">= 0.95"),
    Line("plain", "motion", "no camera given: motion", "%", CHANCE["motion"], MUST["motion"]),
    Line("plain", "whole", "no camera given: whole clips", "%", None, WHOLE),
    Line("camera", "class", "camera class", "%", 1 / len(CLASSES), ">= 0.93"),
    Line("camera", "rotation", "RotErr", "°", None, "<= 0.8"),
    Line("camera", "translation", "TransErr", "", None, "<= 0.12"),
    Line("camera", "registered", "camera found", "%"),
    Line("camera", "whole", "camera given: whole clips", "%"),
    Line("words", "class", "camera by words: class", "%", 1 / len(CLASSES), ">= 0.85"),
    Line("words", "whole", "camera by words: whole clips", "%"),
    Line("image", "first", "first frame, PSNR", "dB"),
    Line("image below VAE", "first", "first frame, below the VAE's ceiling", "dB", None, "<= 0.3"),
    Line("first_last", "last", "last frame, PSNR", "dB"),
    Line("first_last below VAE", "last", "last frame, below the VAE's ceiling", "dB", None, "<= 1.5"),
    Line("continuation", "psnr", "seam, PSNR of the pair", "dB"),
    Line("continuation", "gap", "seam, below its neighbours", "dB", None, "<= 1"),
    Line("continuation", "jump", "seam, colour jump", "levels"),
    Line("continuation", "usual", "colour change of its neighbours", "levels"),
    Line("text-en", "flicker", "flicker", "levels"),
    *(Line(f"vae-{T}", "psnr", f"VAE, {T} frames, PSNR", "dB", None, ">= 31") for T in (FRAMES, LONG)),
    *(Line(f"vae-{T}", "ssim", f"VAE, {T} frames, SSIM", "", None, ">= 0.93") for T in (FRAMES, LONG)),
    *(Line(f"vae-{T}", "slope", f"VAE, {T} frames, PSNR per 10 frames", "dB") for T in (FRAMES, LONG)),
)

# What must come out of the clips that stand in for the model's.
ORDERS = (
    *(Order(f"text-en {q}", ("truth", "noise")) for q in ("colour", "solid", "ground")),
    Order("text-en motion", ("truth", "frozen")),
    *(Order(f"{task} whole", ("truth", "broken")) for task in ("text-en", "plain", "camera", "words")),
    Order("plain still", ("truth", "broken")),
    Order("words class", ("truth", "broken")),
    Order("text-en flicker", ("frozen", "truth", "noise"), higher=False),
    Order("camera class", ("truth", "frozen", "noise")),
    Order("camera rotation", ("truth", "frozen", "noise"), higher=False),
    Order("camera registered", ("truth", "noise")),
)
