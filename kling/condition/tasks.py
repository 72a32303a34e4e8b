"""The tasks of training: each draws what is given of a clip, and states how a user would give it.

A checkpoint lists the tasks that it was trained for.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kling.condition.state import Given
from kling.errors import UserError, unknown
from kling.shapes import nearest_frames, pixel_frames

Draw = Callable[[Random, int, int, int], Given]
Show = Callable[[np.ndarray], dict[str, Any]]  # uint8 (T, H, W, 3)

REFERENCES = (1, 1, 1, 2, 2, 3, 4)  # given with a task, whichever it is; each number equally often


def _end(F: int) -> int:
    return pixel_frames(F) - 1


def _box(rng: Random, h: int, w: int) -> Tensor:
    """A rectangle to generate (h, w), an inner hole or everything but a kept window, in whole 2x2 patches."""
    space = torch.zeros(h, w)
    hh, ww = 2 * rng.randint(1, max(1, h // 2 - 1)), 2 * rng.randint(1, max(1, w // 2 - 1))
    y, x = 2 * rng.randint(0, (h - hh) // 2), 2 * rng.randint(0, (w - ww) // 2)
    space[y : y + hh, x : x + ww] = 1
    return 1 - space if rng.random() < 0.5 else space


def _begun(video: np.ndarray) -> dict[str, Any]:
    """The first half, plus the frames needed to restore the full length."""
    there = nearest_frames((len(video) + 1) // 2)[0]
    return {"video": video[:there], "num_frames": len(video) - there + 1}


def _holed(video: np.ndarray) -> dict[str, Any]:
    """A hole of half the height and width in the middle."""
    hole = np.zeros(video.shape[1:3], np.float32)
    H, W = hole.shape
    hole[H // 4 : H - H // 4, W // 4 : W - W // 4] = 1
    return {"video": video, "mask": hole}


# name -> (number of appended keyframes, a function that draws what is given, the same as fields of a `Request` for a whole clip). -1 is a
# random inner pixel frame.
TASKS: dict[str, tuple[int, Draw, Show]] = {
    "text": (0, lambda rng, F, h, w: Given(), lambda video: {}),
    "image": (0, lambda rng, F, h, w: Given(known=1), lambda video: {"image": video[0]}),
    "continuation": (0, lambda rng, F, h, w: Given(known=rng.randint(2, max(2, F // 2))), _begun),
    "inpaint": (0, lambda rng, F, h, w: Given(known=int(rng.random() < 0.2), space=_box(rng, h, w)), _holed),
    "restyle": (0, lambda rng, F, h, w: Given(hold=rng.uniform(0.2, 0.9)), lambda video: {"video": video, "strength": 0.5}),
    "last": (1, lambda rng, F, h, w: Given(keyframes=((_end(F), 1.0),)), lambda video: {"last_image": video[-1]}),
    "first_last": (
        1,
        lambda rng, F, h, w: Given(known=1, keyframes=((_end(F), 1.0),)),
        lambda video: {"image": video[0], "last_image": video[-1]},
    ),
    "keyframes": (
        1,
        lambda rng, F, h, w: Given(known=int(rng.random() < 0.5), keyframes=((-1, rng.choice((1.0, 1.0, 0.7))),)),
        lambda video: {"keyframes": [(video[len(video) // 2], len(video) // 2, 1.0)]},
    ),
}


def check_tasks(weights: dict[str, float]) -> None:
    """Raises `UserError` unless the weights name tasks, and at least one of them is drawn."""
    for name, weight in weights.items():
        if name not in TASKS:
            raise unknown("task", name, TASKS)
        if not 0 <= weight < inf:
            raise UserError(f"tasks.{name} = {weight:g}: give 0 or more")
    if not any(weights.values()):
        raise UserError("all tasks have the weight 0: give one of them more")


def draw_task(rng: Random, weights: dict[str, float], keyframes: int) -> str:
    """A random task among those that append `keyframes` frames, so that all clips of a batch have one shape. weights: checked before
    (`check_tasks`)."""
    fit = {name: weight for name, weight in weights.items() if TASKS[name][0] == keyframes and weight > 0}
    return rng.choices(list(fit), weights=list(fit.values()))[0]


def keyframe_share(weights: dict[str, float]) -> float:
    """The share of tasks that append a keyframe, and so the share of batches of that shape."""
    return sum(weight for name, weight in weights.items() if TASKS[name][0]) / sum(weights.values())
