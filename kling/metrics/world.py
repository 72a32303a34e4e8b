"""Scenes of the small world made to ask one thing of a model, and the ruler that judges the answer. Evaluation and rewards share both."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from kling.cameras.axes import MOVES, UNITS, axes_trajectory
from kling.data.world.render import HAZE, HAZE_DISTANCE
from kling.data.world.scene import COLOUR_RGB, FOCAL, Scene, World, render_scene, start_pose
from kling.metrics.camera.errors import SINGLE
from kling.metrics.camera.odometry import Stage
from kling.metrics.control import Detectors, example_features
from kling.metrics.ruler import Ruler
from kling.runtime.random import derive_seed
from kling.shapes import aspect_size

SCENES_A_CASE = {2: 40, 3: 200}  # scenes searched for one with so many distinguishable objects
OVERLAPS = 0.2  # share of the frames in which they may overlap


def world_ruler(seed: int, frames: int, aspect: str, examples: int, share: Callable[..., Iterable[Any]] = map) -> Ruler:
    """Detectors fitted to `examples` rendered clips of the training split, with a seed that no case has.

    share(f, numbers): f of each number in order, as the builtin `map`; an executor's `map` uses several processes.
    """
    stage = Stage(start_pose(), FOCAL, float(HAZE.mean()), HAZE_DISTANCE, COLOUR_RGB)
    world = World(derive_seed(seed, "ruler"), frames, aspect, split="train", max_things=1)
    return Ruler(stage, Detectors.learned(share(partial(_example, world), range(examples)), COLOUR_RGB))


def _example(world: World, i: int) -> dict[str, Any]:
    scene = still(world, i)
    return example_features(render_scene(scene), labels(scene), COLOUR_RGB)


def still(world: World, k: int) -> Scene:
    """Scene k with a static camera."""
    return with_camera(world, world.scene(k), {}, "static")


def crowded(world: World, k: int, count: int) -> Scene:
    """The k-th scene with `count` objects, which do not hide each other for long, and a static camera."""
    index = k * SCENES_A_CASE[count]
    while not tells_apart(world.scene(index), count):
        index += 1
    return still(world, index)


def tells_apart(scene: Scene, count: int) -> bool:
    """Whether there are `count` objects of different colours that a static camera sees overlap in few frames."""
    things = scene.things
    if len(things) != count or len({thing.colour for thing in things}) != count:
        return False
    pose = start_pose()
    seen = [(thing.centre - pose[:, 3]) @ pose[:, :3] for thing in things]  # (T, 3) each, in the camera's axes
    for i, a in enumerate(seen):
        for j, b in enumerate(seen[:i]):
            apart = (a[:, :2] / a[:, 2:] - b[:, :2] / b[:, 2:]).norm(dim=1)  # (T,)
            reach = 1.2 * (things[i].size / a[:, 2] + things[j].size / b[:, 2])
            if (apart < reach).float().mean() > OVERLAPS:
                return False
    return True


def camera_scene(world: World, k: int, names: Sequence[str]) -> Scene:
    """Scene k with the k-th camera of `names`, cyclically."""
    rng = random.Random(f"camera/{world.seed}/{k}")
    name = names[k % len(names)]
    if name in SINGLE:
        axes, move = {axis: value / 10 * round(rng.uniform(4, 10), 1) for axis, value in SINGLE[name].items()}, ""
    elif name == "mixture":
        axes, move = {axis: rng.choice((-1, 1)) * round(rng.uniform(4, 10), 1) for axis in rng.sample(list(UNITS), 2)}, ""
    else:
        axes, move = dict(MOVES.get(name, {})), name
    return with_camera(world, world.scene(k), axes, move)


def with_camera(world: World, scene: Scene, axes: dict[str, float], move: str) -> Scene:
    """The scene with another camera; `axes` and `move` as in `Scene`."""
    trajectory = axes_trajectory(axes, world.frames, *aspect_size(scene.aspect), FOCAL)
    return dataclasses.replace(scene, axes=axes, move=move, trajectory=trajectory)


def labels(scene: Scene, place: int = 0) -> dict[str, str]:
    """The truth about an object in words, by the detectors' questions."""
    thing = scene.things[place]
    return {"colour": thing.colour, "solid": thing.solid, "ground": scene.ground, "motion": thing.motion}
