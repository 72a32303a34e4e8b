"""Rewards that need only the pixels. A new one is one function with the decorator; `kling-align` then knows its terms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kling.metrics import motion
from kling.rewards.reward import Reward, Score
from kling.sampling.request import Request

HALF = 0.005  # speed, in short sides per frame, that earns one half
REWARDS: list[Reward] = []


def reward(*terms: str) -> Callable[[Score], Score]:
    """Adds a function to `REWARDS`, with the names of its terms."""

    def add(score: Score) -> Score:
        REWARDS.append(Reward(terms, score))
        return score

    return add


def speed(video: Tensor) -> float:
    """Mean motion of all pixels of a clip (T, H, W, 3) uint8, in short sides per frame."""
    return motion.magnitude(video) / min(video.shape[1:3])


def speed_of(term: Tensor) -> Tensor:
    """The speed for which a clip got its term `magnitude`, whose optical flow is the costliest thing to measure."""
    return HALF * term / (1 - term)


@reward("magnitude")
def magnitude(videos: Tensor, requests: Sequence[Request], truths: Sequence[Any]) -> Tensor:
    """s / (s + `HALF`) for the mean speed s of all pixels (optical flow): 0 for a still, towards 1 for fast motion. A small weight keeps a
    policy from answering with pictures that stand still."""
    speeds = torch.tensor([speed(video) for video in videos])
    return (speeds / (speeds + HALF))[:, None]
