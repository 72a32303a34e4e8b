"""What can be asked of a model in the small world, and how far a clip obeys: the scene that was asked for is known."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kling.cameras.axes import WORDS
from kling.data.transforms import fit
from kling.data.world.captions import LANGUAGES
from kling.data.world.scene import PHRASINGS, Scene, World
from kling.errors import UserError, unknown
from kling.metrics.camera.errors import CLASSES
from kling.metrics.ruler import Ruler
from kling.metrics.things import read_things
from kling.metrics.world import camera_scene, crowded, labels, still, world_ruler
from kling.rewards.reward import Reward
from kling.sampling.request import Request
from kling.shapes import aspect_size

TERMS = ("colour", "solid", "ground", "motion", "count", "permanence", "camera")
TURN, TRAVEL = 3.0, 0.3  # errors of the camera that earn 1/e: mean rotation in degrees, and translation relative to the path's length


@dataclass(frozen=True)
class Truth:
    """The scene that would be a correct answer, and what was asked (a key of `ASKS`)."""

    ask: str
    scene: Scene


def _text(world: World, crowd: World, k: int, language: str) -> tuple[Scene, str, dict[str, Any]]:
    scene = still(world, k)
    return scene, world.captions(scene)[language][k % PHRASINGS], {"camera": "static"}


def _plain(world: World, crowd: World, k: int, language: str) -> tuple[Scene, str, dict[str, Any]]:
    scene = still(world, k)
    return scene, world.captions(scene)[language][1], {}


def _camera(world: World, crowd: World, k: int, language: str) -> tuple[Scene, str, dict[str, Any]]:
    scene = camera_scene(world, k, (*CLASSES, "mixture"))
    return scene, world.captions(scene)[language][1], {"camera": scene.axes or "static"}


def _words(world: World, crowd: World, k: int, language: str) -> tuple[Scene, str, dict[str, Any]]:
    scene = camera_scene(world, k, CLASSES)
    return scene, world.captions(scene)[language][0], {"camera": WORDS}


def _things(world: World, crowd: World, k: int, language: str) -> tuple[Scene, str, dict[str, Any]]:
    scene = crowded(crowd, k, 2)
    return scene, crowd.captions(scene)[language][k % PHRASINGS], {"camera": "static"}


# name -> the k-th scene, its prompt, and further fields of the request: text with a static camera, text alone (the camera must stand
# still), a camera, a camera by words alone, two objects
Ask = Callable[[World, World, int, str], tuple[Scene, str, dict[str, Any]]]
ASKS: dict[str, Ask] = {"text": _text, "plain": _plain, "camera": _camera, "words": _words, "things": _things}


class WorldRequests:
    """Endless requests, each a function of (seed, split, index) only: fields of a `Request` with the truth.

    asks: how often each of `ASKS` is drawn. camera: whether the model takes a camera. split: "train", or "heldout", whose first objects
    are combinations that no training ever shows.
    """

    def __init__(self, seed: int, frames: int, aspect: str, asks: Mapping[str, float], camera: bool, split: str = "train") -> None:
        for name, weight in asks.items():
            if name not in ASKS:
                raise unknown("ask", name, ASKS)
            if weight < 0:
                raise UserError(f"asks.{name} = {weight:g}: give 0 or more")
        self.weights = {name: weight for name, weight in asks.items() if weight and (camera or name != "camera")}
        if not self.weights:
            raise UserError("asks leaves nothing to ask: give at least one a weight, other than camera if the model takes none")
        self.seed, self.camera, self.split = seed, camera, split
        self.world, self.crowd = (World(seed, frames, aspect, split, max_things=n) for n in (1, 2))

    def __call__(self, index: int) -> tuple[dict[str, Any], Truth]:
        rng = random.Random(f"ask/{self.seed}/{self.split}/{index}")
        name = rng.choices(list(self.weights), list(self.weights.values()))[0]
        scene, prompt, given = ASKS[name](self.world, self.crowd, index, rng.choice(list(LANGUAGES)))
        if not self.camera:
            given.pop("camera", None)
        size = {"aspect": scene.aspect, "num_frames": scene.frames}
        return {"prompt": prompt, **size, **given}, Truth(name, scene)


def obedience(ruler: Ruler) -> Reward:
    """`TERMS` of clips against the truth: right or wrong for colour, solid, ground and motion, of several objects the share that is right;
    the number of objects; the share of frames in order; and the camera, see `_followed`."""

    def score(videos: Tensor, requests: Sequence[Request], truths: Sequence[Truth]) -> Tensor:
        return torch.stack([_judged(ruler, video, truth) for video, truth in zip(videos, truths, strict=True)])

    return Reward(TERMS, score)


def _judged(ruler: Ruler, video: Tensor, truth: Truth) -> Tensor:
    """(terms,)"""
    scene, nan = truth.scene, float("nan")
    video = fit(video, *aspect_size(scene.aspect))  # other models make larger pictures
    asked = [labels(scene, place) for place in range(len(scene.things))]
    if len(asked) == 1:
        right: dict[str, float] = {name: float(x) for name, x in ruler.words(video, asked[0]).items()}
    else:
        readings = read_things(video, ruler.detectors, [thing["colour"] for thing in asked])
        pairs = list(zip(readings, asked, strict=True))
        right = {q: sum(found[q] == thing[q] for found, thing in pairs) / len(pairs) for q in asked[0]}
    stays = ruler.permanence(video, len(asked), leaves=bool(scene.axes))
    whole = stays["in_order"] * (not stays["reshaped"])
    count = float(not (stays["vanished"] or stays["extra"] or stays["split"]))
    moving = nan if scene.axes else right["motion"]  # detectors of motion are for a static camera
    camera = _followed(ruler, video, scene) if truth.ask in ("plain", "camera", "words") else nan
    return torch.tensor([right["colour"], right["solid"], right["ground"], moving, count, whole, camera])


def _followed(ruler: Ruler, video: Tensor, scene: Scene) -> float:
    """The mean of exp(-RotErr / `TURN`), exp(-TransErr / `TRAVEL`) where the camera should travel, and its class, right or wrong, where it
    has one. The rotation alone would pay a camera that stands still for a dolly or a zoom. 0 where its path cannot be read."""
    row = ruler.camera(video, scene.trajectory, scene.axes if scene.move or len(scene.axes) < 2 else None)
    if row["rotation"] is None:
        return 0.0
    found = [math.exp(-row["rotation"] / TURN)]
    if row["translation"] is not None:
        found.append(math.exp(-row["translation"] / TRAVEL))
    if row["class"] is not None:
        found.append(float(row["class"]))
    return sum(found) / len(found)


def world_reward(seed: int, frames: int, aspect: str, examples: int) -> Reward:
    """`obedience`, judged by detectors that are fitted to `examples` rendered clips."""
    return obedience(world_ruler(seed, frames, aspect, examples))
