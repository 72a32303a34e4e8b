"""Several objects of a small-world clip, distinguished by their colours, which differ within a scene."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor

from kling.metrics.control import (
    MIN_FRAMES,
    MIN_PIXELS,
    Detectors,
    Reading,
    Track,
    ground_features,
    motion_features,
    solid_features,
)
from kling.metrics.segment import segment

NEAR = 2  # pixels between two objects at which one may hide a part of the other


@dataclass
class Thing:
    """What is visible of one colour in every frame."""

    colour: int  # index in the palette
    mask: np.ndarray  # (T, H, W) bool: its largest part
    box: np.ndarray  # (T, 4) left, top, right, bottom in pixels; right and bottom exclusive
    parts: np.ndarray  # (T,) number of parts; an object that another one cuts in two by standing in front counts as one
    free: np.ndarray  # (T,) bool: visible, with no other object near
    edge: np.ndarray  # (T,) bool: touches the border of the picture

    @property
    def seen(self) -> np.ndarray:
        return self.parts > 0

    def track(self) -> Track | None:
        """The frames used to read it: those that show it free and whole if there are enough, else free, else at all; None if too few."""
        if self.seen.mean() < MIN_FRAMES:
            return None
        for shown in (self.free & ~self.edge, self.free, self.seen):
            if shown.mean() >= MIN_FRAMES / 2:
                break
        return Track(self.colour, *map(torch.from_numpy, (self.mask, shown, self.box.astype(np.float32))))


def read_things(video: Tensor, detectors: Detectors, colours: Sequence[str]) -> list[Reading]:
    """Reads the objects of these colours in a clip (T, H, W, 3) uint8 with a static camera, as `Detectors.read` does for one.

    A colour that too few frames show reads None for every question.
    """
    names = list(detectors.palette)
    ground = detectors.ground(ground_features(video, detectors.palette))
    things = find_things(*(x.numpy() for x in segment(video, detectors.palette)), [names.index(colour) for colour in colours])
    readings: list[Reading] = []
    for colour, thing in zip(colours, things, strict=True):
        reading: Reading = {"colour": None, "solid": None, "ground": ground, "motion": None}
        if (track := thing.track()) is not None:
            reading |= {"colour": colour, "solid": detectors.solid(solid_features(video, track))}
            reading["motion"] = detectors.motion(motion_features(track))
        readings.append(reading)
    return readings


def find_things(colours: np.ndarray, near: np.ndarray, kinds: Sequence[int]) -> list[Thing]:
    """A `Thing` for each colour of `kinds`. colours, near: (T, H, W) each, from `segment`."""
    T, H, W = colours.shape
    things = [Thing(c, np.zeros((T, H, W), bool), np.zeros((T, 4)), np.zeros(T, int), np.zeros(T, bool), np.zeros(T, bool)) for c in kinds]
    for t in range(T):
        own = [opened((near[t] > 0) & (colours[t] == c)) for c in kinds]
        joined, _ = parts(np.logical_or.reduce(own))
        for thing, mine in zip(things, own, strict=True):
            held = np.bincount(joined[mine], minlength=1)
            thing.parts[t] = (held >= MIN_PIXELS).sum()
            if not thing.parts[t]:
                continue
            others = np.logical_or.reduce([np.zeros((H, W), bool), *(other for other in own if other is not mine)])
            thing.mask[t] = around(mine & (joined == held.argmax())) & (near[t] > 0) & ~others  # including its rim, of any colour
            rows, columns = np.flatnonzero(thing.mask[t].any(1)), np.flatnonzero(thing.mask[t].any(0))
            thing.box[t] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
            thing.edge[t] = columns[0] == 0 or rows[0] == 0 or columns[-1] == W - 1 or rows[-1] == H - 1
        for thing, mine in zip(things, own, strict=True):
            near_others = any((around(thing.mask[t]) & other).any() for other in own if other is not mine)
            thing.free[t] = thing.parts[t] > 0 and not near_others
    return things


def opened(mask: np.ndarray) -> np.ndarray:
    """A mask (H, W) bool without parts one pixel wide: a rim, mixed with the background, may look like a third colour."""
    return cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_OPEN, np.ones((2, 2), np.uint8)) > 0


def around(mask: np.ndarray) -> np.ndarray:
    """A mask (H, W) bool extended by `NEAR` pixels."""
    return cv2.dilate(mask.astype(np.uint8), np.ones((2 * NEAR + 1, 2 * NEAR + 1), np.uint8)) > 0


def parts(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Connected parts of a mask (H, W): labels from 1, and areas by label (0 for the background)."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    areas = stats[:, cv2.CC_STAT_AREA].copy()
    areas[0] = 0
    return labels, areas
