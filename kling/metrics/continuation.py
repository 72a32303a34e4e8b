"""The consistency of a long video made in several hops: visible joins, and drift from hop to hop."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kling.metrics.pixel import NEIGHBOURS, seam


def seam_rows(video: Tensor, seams: Sequence[int], speed: np.ndarray) -> dict[str, float]:
    """Means over the joins of a clip (1, 3, T, H, W) in [-1, 1]; `seams` are the first frames of hops, `speed` (T-1,) is `Flow.speed`.

    gap: dB by which the pair at a join is below its neighbours. colour: excess change of the mean colour there, levels of 255.
    velocity: difference between the speed of motion at the join and the median of its neighbours, pixels per frame.
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
    """The drift of a video (T, H, W, 3) uint8 per hop: slopes of a straight line through one value per hop.

    colour: levels of 255 by which the mean colour moves away from that of the first hop. contrast, sharpness: change per hop as a share of
    the first hop's value (deviation of the brightness; mean slope between neighbouring pixels), in absolute value.
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
