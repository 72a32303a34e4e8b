"""Cuts of a clip, and whether its shots show the same things."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kling.metrics.control import QUESTIONS, Detectors, Reading
from kling.metrics.report import Row

COARSE = 2  # pixels of a cell, whose mean is compared
LEVELS = (
    6.0  # mean change of a cut's cells, at least, in levels of 255. Of 20 cuts between static shots the least had 6.8, no other pair 5.9
)
TIMES = 2.5  # and how many times that of the pairs of frames around it. Of 13 cuts between moving shots the least had 3.3
AROUND = 4  # pairs on each side
SAME = ("colour", "solid", "ground")  # what all shots of a storyboard share


def find_cuts(video: Tensor) -> list[int]:
    """The frames of a clip (T, H, W, 3) uint8 at which another shot begins: where the picture changes at once, and not before or after."""
    coarse = F.avg_pool2d(video.permute(0, 3, 1, 2).float(), COARSE)  # (T, 3, h, w)
    change = (coarse[1:] - coarse[:-1]).abs().mean((1, 2, 3))  # (T - 1,) entry i is from frame i to i + 1
    found = []
    for i, value in enumerate(change.tolist()):
        others = torch.cat([change[max(0, i - AROUND) : i], change[i + 1 : i + 1 + AROUND]])
        usual = float(others.median()) if len(others) else 0.0
        if value >= LEVELS and value >= TIMES * usual:
            found.append(i + 1)
    return found


def read_shots(video: Tensor, ranges: Sequence[tuple[int, int]], detectors: Detectors) -> list[Reading]:
    """What each shot of a clip shows, read as a clip of its own."""
    return [detectors.read(video[start:end]) for start, end in ranges]


def shots_row(video: Tensor, ranges: Sequence[tuple[int, int]], labels: Sequence[Mapping[str, str]], detectors: Detectors) -> Row:
    """Scores of a clip of several shots, static cameras, one thing.

    cut: whether its cuts are exactly where they were asked. For each of `QUESTIONS` the share of the shots that show what their words say.
    same: whether all shots show a thing of the same colour and solid on the same ground.
    """
    readings = read_shots(video, ranges, detectors)
    pairs = list(zip(readings, labels, strict=True))
    row: Row = {question: sum(read[question] == label[question] for read, label in pairs) / len(pairs) for question in QUESTIONS}
    row["cut"] = find_cuts(video) == [start for start, _ in ranges[1:]]
    row["same"] = all(None not in (values := {read[question] for read in readings}) and len(values) == 1 for question in SAME)
    return row
