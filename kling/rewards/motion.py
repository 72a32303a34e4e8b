"""How much a clip moves, whatever it shows. A small weight keeps a policy from answering with pictures that stand still."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kling.metrics.motion import speed
from kling.rewards.reward import Reward
from kling.sampling.request import Request

HALF = 0.005  # speed, in short sides per frame, that earns one half


def magnitude(videos: Tensor, requests: Sequence[Request], truths: Sequence[Any]) -> Tensor:
    """s / (s + `HALF`) for the mean speed s of all pixels (optical flow), (b, 1): 0 for a still, towards 1 for fast motion."""
    speeds = torch.tensor([speed(video) for video in videos])
    return (speeds / (speeds + HALF))[:, None]


MOTION = Reward(("magnitude",), magnitude)
