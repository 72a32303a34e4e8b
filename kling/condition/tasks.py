"""What training hides: each task is one line that draws what is given of a clip. A checkpoint lists the ones it was trained for."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import torch
from torch import Tensor

from kling.condition.state import Given
from kling.errors import unknown
from kling.shapes import pixel_frames

# name -> (how many keyframes it appends, what it gives). t is a drawn inner pixel frame, end the last one.
Draw = Callable[[Random, int, int, int], Given]


def _end(F: int) -> int:
    return pixel_frames(F) - 1


def _box(rng: Random, h: int, w: int) -> Tensor:
    """A rectangle to generate (h, w), an inner hole or everything but a kept window, in whole 2x2 patches."""
    space = torch.zeros(h, w)
    hh, ww = 2 * rng.randint(1, max(1, h // 2 - 1)), 2 * rng.randint(1, max(1, w // 2 - 1))
    y, x = 2 * rng.randint(0, (h - hh) // 2), 2 * rng.randint(0, (w - ww) // 2)
    space[y : y + hh, x : x + ww] = 1
    return 1 - space if rng.random() < 0.5 else space


TASKS: dict[str, tuple[int, Draw]] = {
    "text": (0, lambda rng, F, h, w: Given()),
    "image": (0, lambda rng, F, h, w: Given(known=1)),
    "continuation": (0, lambda rng, F, h, w: Given(known=rng.randint(2, max(2, F // 2)))),
    "inpaint": (0, lambda rng, F, h, w: Given(known=rng.random() < 0.2, space=_box(rng, h, w))),
    "restyle": (0, lambda rng, F, h, w: Given(hold=rng.uniform(0.2, 0.9))),
    "last": (1, lambda rng, F, h, w: Given(keyframes=((_end(F), 1.0),))),
    "first_last": (1, lambda rng, F, h, w: Given(known=1, keyframes=((_end(F), 1.0),))),
    "keyframes": (1, lambda rng, F, h, w: Given(known=rng.random() < 0.5, keyframes=((-1, rng.choice((1.0, 1.0, 0.7))),))),
}


def draw_task(rng: Random, weights: dict[str, float], keyframes: int) -> str:
    """A task's name, among those that append `keyframes` frames, so that a batch shares its shape."""
    for name in weights:
        if name not in TASKS:
            raise unknown("task", name, TASKS)
    fit = {name: weight for name, weight in weights.items() if TASKS[name][0] == keyframes and weight > 0}
    return rng.choices(list(fit), weights=list(fit.values()))[0]


def keyframe_share(weights: dict[str, float]) -> float:
    """The share of tasks that append a keyframe: how often a batch is of that shape."""
    return sum(weight for name, weight in weights.items() if TASKS[name][0]) / sum(weights.values())
