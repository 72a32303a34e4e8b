"""Rewards that need only the pixels. A new one is one function with the decorator; `kling-align` then knows its terms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kling.metrics.motion import speed
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


@reward("magnitude")
def magnitude(videos: Tensor, requests: Sequence[Request], truths: Sequence[Any]) -> Tensor:
    """s / (s + `HALF`) for the mean speed s of all pixels (optical flow): 0 for a still, towards 1 for fast motion. A small weight keeps a
    policy from answering with pictures that stand still."""
    speeds = torch.tensor([speed(video) for video in videos])
    return (speeds / (speeds + HALF))[:, None]
