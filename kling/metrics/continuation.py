"""How a long video holds together that was made in hops: the joins, and what drifts from hop to hop."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kling.metrics.pixel import NEIGHBOURS, seam


def seam_rows(video: Tensor, seams: Sequence[int], speed: np.ndarray) -> dict[str, float]:
    """Means over the joins of a clip (1, 3, T, H, W) in [-1, 1]; `seams` are the frames that begin a hop, `speed` (T-1,) is `Flow.speed`.

    gap: dB that the pair at a join lies below its neighbours. colour: excess change of the mean colour there, levels of 255.
    velocity: how far the speed of the motion at the join is off its neighbours' median, pixels a frame.
    """
    gaps, colours, velocities = [], [], []
    for t in seams:
        here = seam(video, t)
        gaps.append(float(here["gap"]))
        colours.append(float(here["jump"] - here["usual"]))
        around = [i for i in range(t - 1 - NEIGHBOURS, t + NEIGHBOURS) if 0 <= i < len(speed) and i != t - 1]
        velocities.append(float(abs(speed[t - 1] - np.median(speed[around]))))
    return {"gap": float(np.mean(gaps)), "colour": float(np.mean(colours)), "velocity": float(np.mean(velocities))}


def drift(video: Tensor, seams: Sequence[int]) -> dict[str, float]:
    """What a video (T, H, W, 3) uint8 loses or gains with every hop: slopes of a straight line through one value a hop.

    colour: levels of 255 by which the mean colour moves away from the first hop's. contrast, sharpness: share of the first hop's
    (deviation of the brightness; mean slope between neighbouring pixels) that is lost or gained a hop, in absolute value.
    """
    hops = [hop for hop in torch.tensor_split(video, list(seams)) if len(hop)]
    colour, contrast, sharpness = [], [], []
    for hop in hops:
        grey = hop.float().mean(-1)  # (t, H, W)
        colour.append(hop.float().mean((0, 1, 2)))
        contrast.append(float(grey.std(dim=(1, 2)).mean()))
        sharpness.append(float((grey[:, :, 1:] - grey[:, :, :-1]).abs().mean() + (grey[:, 1:] - grey[:, :-1]).abs().mean()))
    away = [float((c - colour[0]).norm()) for c in colour]
    relative = {"contrast": contrast, "sharpness": sharpness}
    return {"colour": abs(_slope(away))} | {name: abs(_slope(x)) / max(x[0], 1e-6) for name, x in relative.items()}


def _slope(values: Sequence[float]) -> float:
    if len(values) < 2:
        return 0.0
    return float(np.polyfit(np.arange(len(values)), values, 1)[0])
