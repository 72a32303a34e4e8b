"""The cases of the small-world evaluation: requests, the scenes that would be correct results, and the tables of scores and controls."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kling.cameras.axes import WORDS, axes_trajectory
from kling.data.world.captions import COLOURS, GROUNDS, MOTIONS, SOLIDS, caption
from kling.data.world.references import Reference, draw_references
from kling.data.world.scene import FOCAL, FPS, PHRASINGS, Scene, Thing, World, free_path, render_scene
from kling.data.world.storyboard import Storyboard, Storyboards, render_storyboard
from kling.data.world.tracks import places_of
from kling.errors import UserError, unknown
from kling.metrics.camera.errors import CLASSES
from kling.metrics.control import QUESTIONS
from kling.metrics.controls import Order
from kling.metrics.permanence import FAULTS
from kling.metrics.report import Line
from kling.metrics.world import SCENES_A_CASE, camera_scene, crowded, still, with_camera
from kling.runtime.random import derive_seed
from kling.shapes import aspect_size

ASPECT = "16:9"
FRAMES, LONG = 41, 81
GOES_ON = 56  # frames by which a clip of 5 s is continued, to 12 s
LASTING = ("still", "bounce", "circle")  # motions that stay in the picture
TRAVELS = 1.5  # of its size: how far from its start a brushed thing ends, at least
TRACKED = "tracked"  # stands for the tracks of a case, whose mask is that of the first frame, which is rendered only when it is used


@dataclass(frozen=True)
class Case:
    """One case: the fields of a `Request`, and the scene, or the storyboard, that would be a correct result.

    Pictures and videos in `request` are frame numbers of the scene `given`, which is rendered only when the case is used.
    """

    task: str
    k: int
    scene: Scene | Storyboard
    request: dict[str, Any]
    given: Scene | Storyboard


def rendered(scene: Scene | Storyboard) -> Tensor:
    """Video (T, H, W, 3) uint8."""
    return render_storyboard(scene) if isinstance(scene, Storyboard) else render_scene(scene)


def held_out(seed: int, frames: int, **settings: Any) -> World:
    """Scenes with combinations of colour, solid and motion that training never uses."""
    return World(seed, frames, ASPECT, split="heldout", **settings)


def text_case(world: World, k: int, language: str) -> Case:
    """Text only, with a static camera; both languages have the same scene and the same seed."""
    scene = still(world, k)
    return asked(f"text-{language}", k, world, scene, world.captions(scene)[language][k % PHRASINGS], camera="static")


def long_case(world: World, k: int) -> Case:
    """Text only, for twice the duration: the scene of another world, whose motions last as long."""
    return dataclasses.replace(text_case(held_out(world.seed, longer(world.frames), max_things=1), k, "en"), task="long")


def longer(frames: int) -> int:
    return 2 * frames - 1


def things_case(world: World, k: int, count: int) -> Case:
    """Text about several objects, which do not hide each other for long."""
    crowd = held_out(world.seed, world.frames, max_things=count)
    scene = crowded(crowd, k, count)
    return asked(f"things-{count}", k, crowd, scene, crowd.captions(scene)["en" if k % 2 == 0 else "zh"][k % PHRASINGS], camera="static")


def plain_case(world: World, k: int) -> Case:
    """Text that does not mention the camera, and no camera: it must be static."""
    scene = still(world, k)
    return asked("plain", k, world, scene, world.captions(scene)[list(LANGUAGES)[k % 2]][1])


def camera_case(world: World, k: int) -> Case:
    """Each camera class in turn, then a combination of two axes; the text does not mention the camera."""
    scene = camera_scene(world, k, (*CLASSES, "mixture"))
    return asked("camera", k, world, scene, world.captions(scene)["en"][1], camera=scene.axes)


def words_case(world: World, k: int, read: bool) -> Case:
    """The camera by text only, each class in turn, in both languages. read: as sampling reads it, which is else left to the weights."""
    scene, task = camera_scene(world, k, CLASSES), "words-read" if read else "words"
    text = world.captions(scene)[list(LANGUAGES)[k // len(CLASSES) % 2]][0]
    return asked(task, k, world, scene, text, **({} if read else {"camera": WORDS}))


def picture_case(world: World, k: int, task: str, **pictures: int) -> Case:
    scene = world.scene(k)
    return asked(task, k, world, scene, world.captions(scene)["en"][0], camera=scene.axes, **pictures)


def motion_case(world: World, k: int) -> Case:
    """A first frame, and text about the motion."""
    scene = still(world, k)
    return asked("image-motion", k, world, scene, world.captions(scene)["en"][k % PHRASINGS], camera="static", image=0)


def keyframe_case(world: World, k: int) -> Case:
    """The first frame and the middle one."""
    middle = half(world.frames) - 1
    case = picture_case(world, k, "keyframes", image=0)
    return dataclasses.replace(case, request=case.request | {"keyframes": [(middle, middle, 1.0)]})


def restyle_case(world: World, k: int, strength: float) -> Case:
    """A whole clip, and text that asks for another colour of its object."""
    source = still(world, k)
    thing = source.things[0]
    others = [colour for colour in COLOURS if colour != thing.colour]
    scene = dataclasses.replace(source, things=(dataclasses.replace(thing, colour=others[k % len(others)]),))
    given = {"video": slice(world.frames), "strength": strength, "camera": "static"}
    return asked(f"restyle-{strength:g}", k, world, scene, world.captions(scene)["en"][k % PHRASINGS], source, **given)


def going_on_case(world: World, k: int, words: str) -> Case:
    """A clip continued by `GOES_ON` frames, with its own text, another motion, or no text. Its motion stays in the picture."""
    frames = world.frames + GOES_ON
    lasting, index = held_out(world.seed, frames, max_things=1), k * 8
    while lasting.scene(index).things[0].motion not in LASTING:
        index += 1
    scene = still(lasting, index)
    thing = scene.things[0]
    motion = LASTING[(LASTING.index(thing.motion) + 1 + k % 2) % 3] if words == "other" else thing.motion
    told = dataclasses.replace(scene, things=(dataclasses.replace(thing, motion=motion),))
    prompt = "" if words == "none" else lasting.captions(told)["en"][k % PHRASINGS]
    given = {"video": slice(world.frames), "extend_to": (frames - 1) / FPS, "num_frames": None}
    return asked(f"continuation-{words}", k, lasting, scene, prompt, **given, camera="static")


def continuation_case(world: World, k: int) -> Case:
    scene = still(world, k)
    given = half(world.frames)
    prompt = world.captions(scene)["en"][0]
    return asked("continuation", k, world, scene, prompt, video=slice(given), num_frames=world.frames - given + 1)


def half(frames: int) -> int:
    """Number of frames given to a continuation."""
    return (frames + 1) // 2


def brush_case(world: World, k: int, brushed: bool = True, moving: bool = False) -> Case:
    """A first frame with two things, one of which is brushed along a path that its words do not tell. brushed: give the path; without it
    the request is the same. moving: the camera moves too, as it is told."""
    crowd, index = held_out(world.seed, world.frames, max_things=2), k * SCENES_A_CASE[2]
    while (scene := with_path(crowd, index, k, moving)) is None:
        index += 1
    rng = random.Random(f"brush/{world.seed}/{k}")
    things = [(thing.colour, thing.solid, thing.motion or None) for thing in scene.things]
    words = caption(things, scene.ground, scene.axes, scene.move, list(LANGUAGES)[k % 2], rng, camera=False)
    given = {"tracks": TRACKED} if brushed else {}
    task = "brush" + "-camera" * moving + "-none" * (not brushed)
    return asked(task, k, crowd, scene, words, camera=scene.axes or "static", image=0, **given)


def with_path(world: World, index: int, k: int, moving: bool) -> Scene | None:
    """Scene `index` with its first thing on a path that ends `TRAVELS` of its sizes from its start, in the picture and apart from the
    other thing, which moves as its word says; None if the scene has no room for one."""
    scene = world.scene(index)
    if len({thing.colour for thing in scene.things}) != 2 or (moving and not scene.axes):
        return None
    H, W = aspect_size(scene.aspect)
    scene = scene if moving else with_camera(world, scene, {}, "static")
    first, other = scene.things
    rng = random.Random(f"path/{world.seed}/{index}/{k}")
    path = free_path(*first.centre[0, [0, 2]].tolist(), first.size, 0.5 * W / (FOCAL * (H * W) ** 0.5), rng, scene.frames)
    scene = dataclasses.replace(scene, things=(dataclasses.replace(first, motion="", centre=path), other))
    places, size = places_of(scene), torch.tensor([W, H])
    centre, half = places.centre[0], places.half[0]
    whole = bool(((centre - half >= 0) & (centre + half <= 1)).all()) and bool(((places.centre[1] >= 0) & (places.centre[1] <= 1)).all())
    far = ((centre[-1] - centre[0]) * size).norm() >= TRAVELS * 2 * (half * size).max()
    apart = ((centre - places.centre[1]) * size).norm(dim=1) > 1.2 * ((half[:, 1] + places.half[1, :, 1]) * H)  # (T,)
    return scene if whole and far and bool(apart.all()) else None


def story_of(world: World, k: int) -> tuple[Storyboard, list[str]]:
    """The k-th storyboard of two shots, with one thing and static cameras, and a sentence for each shot."""
    stories, index = Storyboards(world.seed, world.frames, ASPECT, split="heldout", max_things=1), 8 * k
    while len((board := stories.storyboard(index)).shots) != 2:
        index += 1
    H, W = aspect_size(ASPECT)
    quiet = [(shot, axes_trajectory({}, shot.frames, H, W, FOCAL)) for shot in board.shots]
    shots = tuple(dataclasses.replace(shot, axes={}, move="static", trajectory=path) for shot, path in quiet)
    board = dataclasses.replace(board, shots=shots)
    language = list(LANGUAGES)[k % 2]
    return board, [told[language][k // 2 % PHRASINGS] for told in stories.captions(board)]


def shots_case(world: World, k: int) -> Case:
    """A storyboard of two shots: the same thing on the same ground, elsewhere, doing something else."""
    board, words = story_of(world, k)
    shots = [{"prompt": text, "seconds": shot.frames / FPS, "camera": "static"} for text, shot in zip(words, board.shots, strict=True)]
    request = {"shots": shots, "aspect": ASPECT, "seed": derive_seed(world.seed, "evaluation", k)}
    return Case("shots", k, board, request, board)


def alone_case(world: World, k: int) -> Case:
    """The first shot of a storyboard as a clip of its own, as long."""
    board, words = story_of(world, k)
    case = asked("shots-alone", k, world, board.shots[0], words[0], camera="static")
    return dataclasses.replace(case, request=case.request | {"num_frames": board.shots[0].frames})


def other_story(board: Storyboard) -> Storyboard:
    """A storyboard with its shots in the other order, so that cut and words are wrong, and another thing in one of them."""
    first, second = board.shots
    second = exchanged_thing(second)
    return dataclasses.replace(board, shots=(second, first), places=board.places[::-1])


def exchanged_thing(scene: Scene) -> Scene:
    """The scene with its first thing of another colour and another solid."""
    thing, *rest = scene.things
    colours, solids = ([name for name in names if name != own] for names, own in ((COLOURS, thing.colour), (SOLIDS, thing.solid)))
    other = dataclasses.replace(thing, colour=colours[scene.index % len(colours)], solid=solids[scene.index % len(solids)])
    return dataclasses.replace(scene, things=(other, *rest))


def reference_case(world: World, k: int, count: int = 1, shown: bool = True) -> Case:
    """Words that point at `count` things of which only pictures tell colour and solid, on another ground than those pictures. shown: give
    them; without them the request is the same."""
    world = world if count == 1 else held_out(world.seed, world.frames, max_things=count)
    scene = still(world, k) if count == 1 else crowded(world, k, count)
    rng = random.Random(f"reference/{world.seed}/{k}")
    things = [(number, thing.solid, thing.motion) for number, thing in enumerate(scene.things)]
    words = caption(things, scene.ground, {}, "static", list(LANGUAGES)[k % 2], rng, camera=False)
    task = "reference" + f"-{count}" * (count > 1) + "-none" * (not shown)
    return asked(task, k, world, scene, words, camera="static", **({"references": pictures_of(scene, k)} if shown else {}))


def pictures_of(scene: Scene, k: int) -> list[Reference]:
    """A picture of every thing of the k-th case, in the order of the words, none of them on a plain ground."""
    pictures = draw_references(scene, len(scene.things), f"evaluation/{k}", plain=False)
    return sorted(pictures, key=lambda picture: picture.thing)


def copied(scene: Scene, k: int) -> Scene:
    """The scene on the ground of its picture, as of a model that copies it, with a thing that the picture does not show; of several things,
    with each looking like another."""
    if len(scene.things) > 1:
        return exchanged(scene)
    (thing,) = scene.things
    colour, solid = ([name for name in names if name != own][k % 2] for names, own in ((COLOURS, thing.colour), (SOLIDS, thing.solid)))
    return dataclasses.replace(
        scene, ground=pictures_of(scene, k)[0].ground, things=(dataclasses.replace(thing, colour=colour, solid=solid),)
    )


@dataclass(frozen=True)
class Task:
    """A kind of case.

    make: the k-th case. needs: the required capability. few: few cases are enough, since it is measured in dB or expensive.
    at_once: not made in hops, so the model must make `FRAMES` frames at once.
    beside: the controls, see `stand_ins` in world.py. ceiling: the score is the difference to the VAE alone.
    cost: of a clip, in clips of `FRAMES`.
    """

    make: Callable[[World, int], Case]
    needs: str = "text"
    few: bool = False
    at_once: bool = False
    beside: tuple[str, ...] = ("truth", "broken")
    ceiling: bool = False
    cost: float = 1.0


EVERYTHING = ("truth", "truth through the VAE", "broken", "frozen", "shuffled", "noise")
TASKS = {
    "text-en": Task(lambda world, k: text_case(world, k, "en"), beside=EVERYTHING),
    "text-zh": Task(lambda world, k: text_case(world, k, "zh"), beside=()),
    "plain": Task(plain_case),
    "things-2": Task(lambda world, k: things_case(world, k, 2)),
    "things-3": Task(lambda world, k: things_case(world, k, 3), few=True),
    "long": Task(long_case, few=True, cost=2),
    "camera": Task(camera_case, "camera", beside=EVERYTHING),
    "words": Task(partial(words_case, read=False)),
    "words-read": Task(partial(words_case, read=True)),
    "image": Task(lambda world, k: picture_case(world, k, "image", image=0), "image", few=True, beside=(), ceiling=True),
    "image-motion": Task(motion_case, "image", beside=("truth", "broken", "frozen")),
    "first_last": Task(
        lambda world, k: picture_case(world, k, "first_last", image=0, last_image=world.frames - 1),
        "first_last", few=True, beside=("frozen",), ceiling=True,
    ),
    "keyframes": Task(keyframe_case, "keyframes", few=True, beside=("frozen",), ceiling=True),
    "restyle-0.3": Task(lambda world, k: restyle_case(world, k, 0.3), "restyle", few=True, at_once=True),
    "restyle-0.7": Task(lambda world, k: restyle_case(world, k, 0.7), "restyle", few=True, at_once=True),
    "brush": Task(brush_case, "brush", beside=("truth", "truth through the VAE", "broken", "frozen", "noise")),
    "brush-none": Task(lambda world, k: brush_case(world, k, brushed=False), "brush", beside=()),
    "brush-camera": Task(lambda world, k: brush_case(world, k, moving=True), "brush", beside=("truth", "broken", "frozen")),
    "brush-camera-none": Task(lambda world, k: brush_case(world, k, brushed=False, moving=True), "brush", few=True, beside=()),
    "shots": Task(shots_case, "shots", beside=("truth", "truth through the VAE", "broken", "frozen")),
    "shots-alone": Task(alone_case, "shots", beside=("truth",), cost=0.5),
    "reference": Task(reference_case, "reference", beside=("truth", "truth through the VAE", "broken", "noise")),
    "reference-none": Task(lambda world, k: reference_case(world, k, shown=False), "reference", beside=()),
    "reference-2": Task(lambda world, k: reference_case(world, k, 2), "reference"),
    "continuation": Task(continuation_case, "continuation", few=True, beside=("truth", "truth through the VAE")),
    "continuation-same": Task(lambda world, k: going_on_case(world, k, "same"), "continuation", cost=2),
    "continuation-other": Task(lambda world, k: going_on_case(world, k, "other"), "continuation", few=True, cost=2),
    "continuation-none": Task(lambda world, k: going_on_case(world, k, "none"), "continuation", few=True, cost=2),
}  # fmt: skip


def chosen(names: str) -> tuple[str, ...]:
    """Tasks by name, or by the first word of several (text: text-en and text-zh), separated by commas, in the order of `TASKS`.

    >>> chosen("camera,text")
    ('text-en', 'text-zh', 'camera')
    """
    families = {task: (task, task.split("-")[0]) for task in TASKS}
    given = [name.strip() for name in names.split(",")]
    if "" in given:
        raise UserError(f"--tasks '{names}' has an empty name: write names with a comma between two")
    for name in given:
        if not any(name in family for family in families.values()):
            raise unknown("task", name, dict.fromkeys(x for family in families.values() for x in family))
    return tuple(task for task, family in families.items() if any(name in family for name in given))


def asked(task: str, k: int, world: World, scene: Scene, prompt: str, source: Scene | None = None, **given: Any) -> Case:
    seed = derive_seed(world.seed, "evaluation", k)
    request = {"prompt": prompt, "aspect": ASPECT, "num_frames": world.frames, "seed": seed}
    return Case(task, k, scene, request | given, source or scene)


def spoiled(scene: Scene, k: int) -> Scene:
    """Spoil a scene half way, alternately: its first object vanishes, is doubled, gets another colour, or another solid."""
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
    """The scene with a camera that moves in the opposite direction, or moves if it should be static."""
    axes = {name: -value for name, value in scene.axes.items()} or {"pan": 8.0}
    H, W = aspect_size(scene.aspect)
    return dataclasses.replace(scene, axes=axes, move="", trajectory=axes_trajectory(axes, scene.frames, H, W, FOCAL))


def exchanged(scene: Scene) -> Scene:
    """The scene with the objects' colours exchanged, or on another ground if there is one object."""
    things = scene.things
    if len(things) == 1:
        return dataclasses.replace(scene, ground=[ground for ground in GROUNDS if ground != scene.ground][scene.index % 4])
    colours = [thing.colour for thing in (*things[1:], things[0])]
    return dataclasses.replace(scene, things=tuple(dataclasses.replace(t, colour=c) for t, c in zip(things, colours, strict=True)))


# ------------------------------------------------------------------------------------------------------ what must come out

LANGUAGES = {"en": "English", "zh": "Chinese"}
MUST = {"colour": ">= 0.99", "solid": ">= 0.99", "ground": ">= 0.98", "motion": ">= 0.95"}
WHOLE = ">= 0.92"
WORST = "worst motion"  # of the measures motion/<class>, that of the class with the lowest share
CHANCE = {"colour": 1 / len(COLOURS), "solid": 1 / len(SOLIDS), "ground": 1 / len(GROUNDS), "motion": 1 / len(MOTIONS)}

TABLE = (
    *(Line(f"text-{code}", q, f"{q}, {name}", "%", CHANCE[q], MUST[q]) for code, name in LANGUAGES.items() for q in QUESTIONS),
    *(Line(f"text-{code}", WORST, f"the worst of the motions, {name}", "%", None, ">= 0.85") for code, name in LANGUAGES.items()),
    *(Line("zh - en", q, f"{q}, Chinese less English", "%", None, ">= -0.05", whole=True) for q in QUESTIONS),
    *(Line(f"text-{code}", "whole", f"whole clips, {name}", "%", None, WHOLE) for code, name in LANGUAGES.items()),
    *(Line("text-en", fault, f"of these: {fault}", "%") for fault in FAULTS),
    Line("plain", "still", "no camera given: it stands still", "%", None, ">= 0.95"),
    Line("plain", "motion", "no camera given: motion", "%", CHANCE["motion"], MUST["motion"]),
    Line("plain", "whole", "no camera given: whole clips", "%", None, WHOLE),
    *(
        Line(f"things-{n}", q, f"{word} things, {title}", "%", None, must)
        for n, word in ((2, "two"), (3, "three"))
        for q, title, must in (
            ("right", "all right", ">= 0.75" if n == 2 else ""),
            *((q, f"{q} of all", "") for q in ("colour", "solid", "motion")),
            ("whole", "whole clips", ""),
        )
    ),
    *(Line("long", q, f"10 s: {q}", "%", CHANCE.get(q)) for q in (*QUESTIONS, "whole")),
    Line("camera", "class", "camera class", "%", 1 / len(CLASSES), ">= 0.93"),
    Line("camera", "registered", "camera found", "%"),
    Line("camera", "rotation", "RotErr, where found", "°", None, "<= 0.8"),
    Line("camera", "translation", "TransErr, where found and travelling", "", None, "<= 0.12"),
    Line("camera", "whole", "camera given: whole clips", "%"),
    Line("words", "class", "camera by words: class", "%", 1 / len(CLASSES), ">= 0.85"),
    Line("words", "whole", "camera by words: whole clips", "%"),
    Line("words-read", "class", "the same words, read as a camera: class", "%", 1 / len(CLASSES), ">= 0.85"),
    Line("words-read", "whole", "the same words, read as a camera: whole clips", "%"),
    Line("image", "first", "first frame, PSNR", "dB"),
    Line("image below VAE", "first", "first frame, below the VAE's ceiling", "dB", None, "<= 0.3"),
    Line("image-motion", "motion", "first frame given: motion", "%", CHANCE["motion"], ">= 0.93"),
    Line("image-motion", "whole", "first frame given: whole clips", "%"),
    Line("first_last", "last", "last frame, PSNR", "dB"),
    Line("first_last below VAE", "last", "last frame, below the VAE's ceiling", "dB", None, "<= 1.5"),
    Line("keyframes", "middle", "keyframe, PSNR", "dB"),
    Line("keyframes below VAE", "middle", "keyframe, below the VAE's ceiling", "dB"),
    Line("brush", "near", "brushed thing within half its size at the end", "%", None, ">= 0.85"),
    Line("brush", "distance", "brushed thing from its path, mean", "sizes", None, "<= 0.35"),
    Line("brush-none", "near", "the same without the brush", "%", None, "<= 0.35"),
    Line("brush-none", "distance", "the same without the brush, from the path", "sizes"),
    Line("brush", "other", "brushed: the other thing's motion", "%", CHANCE["motion"]),
    Line("brush-none", "other", "the other thing's motion without the brush", "%", CHANCE["motion"]),
    Line("brush / brush-none", "other", "the other thing's motion, in parts of that without the brush", "%", None, ">= 0.85"),
    Line("brush", "whole", "brushed: whole clips", "%"),
    Line("brush-camera", "near", "brushed with a moving camera: within half its size at the end", "%", None, ">= 0.75"),
    Line("brush-camera", "distance", "brushed with a moving camera: from its path, mean", "sizes"),
    Line("brush-camera-none", "near", "the same without the brush", "%", None, "<= 0.35"),
    Line("shots", "cut", "storyboards: every cut at its rounded place", "%", None, ">= 0.95"),
    Line("shots", "same", "storyboards: the same thing and ground in all shots", "%", None, ">= 0.85"),
    *(Line("shots", q, f"{q} of a shot", "%", CHANCE[q]) for q in QUESTIONS),
    *(Line("shots-alone", q, f"{q} of a shot made alone", "%", CHANCE[q]) for q in QUESTIONS),
    *(Line("shots - alone", q, f"{q}, a shot of several less one alone", "%", None, ">= -0.05", whole=True) for q in QUESTIONS),
    Line("reference", "colour", "a reference: its colour", "%", CHANCE["colour"], ">= 0.95"),
    Line("reference", "solid", "a reference: its solid", "%", CHANCE["solid"], ">= 0.95"),
    Line("reference-none", "colour", "the same words without the reference: colour", "%", CHANCE["colour"], "<= 0.3"),
    Line("reference-none", "solid", "the same words without the reference: solid", "%", CHANCE["solid"]),
    Line("reference", "ground", "a reference: the ground of the words", "%", CHANCE["ground"], ">= 0.95"),
    Line("reference", "pasted", "a reference: the ground of its picture", "%", None, "<= 0.02"),
    Line("reference", "motion", "a reference: motion", "%", CHANCE["motion"], ">= 0.9"),
    Line("reference", "whole", "a reference: whole clips", "%"),
    Line("reference-2", "right", "two references, all right", "%", None, ">= 0.7"),
    *(Line("reference-2", q, f"two references: {q} of both", "%") for q in ("colour", "solid", "ground", "motion")),
    *(
        Line(f"restyle-{strength}", q, f"restyled at {strength}: {title}", "%")
        for strength in ("0.3", "0.7")
        for q, title in (("colour", "new colour"), ("solid", "solid kept"), ("ground", "ground kept"), ("motion", "motion kept"))
    ),
    *(
        Line(f"continuation-{words}", "kept", f"continued to 12 s by {title}: ground and thing kept", "%", None, must)
        for words, title, must in (("same", "its words", ">= 0.9"), ("other", "other words", ""), ("none", "no words", ""))
    ),
    *(
        Line(f"continuation-{words}", "ground", f"continued to 12 s by {title}: ground kept", "%")
        for words, title in (("same", "its words"), ("other", "other words"), ("none", "no words"))
    ),
    Line("continuation", "psnr", "seam, PSNR of the pair", "dB"),
    Line("continuation", "gap", "seam, below its neighbours", "dB", None, "<= 1"),
    Line("continuation", "jump", "seam, colour jump", "levels"),
    Line("continuation", "usual", "colour change of its neighbours", "levels"),
    Line("text-en", "flicker", "flicker", "levels"),
    Line("text-en", "magnitude", "motion magnitude", "px"),
    *(Line(f"vae-{T}", "psnr", f"VAE, {T} frames, PSNR", "dB", None, ">= 31") for T in (FRAMES, LONG)),
    *(Line(f"vae-{T}", "ssim", f"VAE, {T} frames, SSIM", "", None, ">= 0.93") for T in (FRAMES, LONG)),
    *(Line(f"vae-{T}", "slope", f"VAE, {T} frames, PSNR per 10 frames", "dB") for T in (FRAMES, LONG)),
)

# The expected order of the control clips.
ORDERS = (
    *(Order(f"text-en {q}", ("truth", "noise")) for q in ("colour", "solid", "ground")),
    Order("text-en motion", ("truth", "frozen")),
    *(Order(f"{task} whole", ("truth", "broken")) for task in ("text-en", "plain", "camera", "words", "words-read")),
    Order("plain still", ("truth", "broken")),
    Order("words class", ("truth", "broken")),
    Order("words-read class", ("truth", "broken")),
    *(Order(f"things-{n} {q}", ("truth", "broken")) for n in (2, 3) for q in ("right", "whole")),
    Order("long whole", ("truth", "broken")),
    Order("image-motion motion", ("truth", "frozen")),
    Order("image-motion whole", ("truth", "broken")),
    *(Order(f"{task} near", ("truth", "frozen")) for task in ("brush", "brush-camera")),
    Order("brush distance", ("truth", "frozen"), higher=False),
    *(Order(f"shots {q}", ("truth", "broken")) for q in ("cut", "same", "motion")),
    Order("shots cut", ("truth", "frozen")),
    *(Order(f"reference {q}", ("truth", "broken")) for q in ("colour", "solid", "ground", "whole")),
    *(Order(f"reference {q}", ("truth", "noise")) for q in ("colour", "solid", "ground")),
    Order("reference pasted", ("truth", "broken"), higher=False),
    *(Order(f"reference-2 {q}", ("truth", "broken")) for q in ("right", "whole")),
    Order("first_last last", ("truth through the VAE", "frozen")),
    Order("keyframes middle", ("truth through the VAE", "frozen")),
    *(Order(f"restyle-{strength} colour", ("truth", "broken")) for strength in ("0.3", "0.7")),
    *(Order(f"continuation-{words} {q}", ("truth", "broken")) for words in ("same", "other", "none") for q in ("kept", "ground")),
    Order("text-en flicker", ("frozen", "truth", "noise"), higher=False),
    Order("camera class", ("truth", "frozen", "noise")),
    Order("camera rotation", ("truth", "frozen"), higher=False),
    Order("camera registered", ("truth", "noise")),
)
