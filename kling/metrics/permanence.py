"""Checks that the objects of a small-world clip stay the same: the requested number, each in one piece, of one colour and of one solid.

Four properties of the world make this measurable on pixels. The objects of a scene differ in colour, so a colour identifies an object. All
solids are convex, so a silhouette with a dent is torn or molten, unless something hides a part of it. They are rigid and hardly rotate, so
a silhouette always fills the same share of its smallest enclosing circle. And objects move little per frame, relative to their size.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
import torch
from torch import Tensor

from kling.metrics.control import MIN_PIXELS, Track, solid_features
from kling.metrics.report import Row
from kling.metrics.segment import Palette, segment
from kling.metrics.things import NEAR, Thing, find_things, opened, parts

SHARE = 0.95  # of the frames that must be free of faults
CONVEX = 0.8  # share of its convex hull that a silhouette must fill
BENT = 0.2  # allowed deviation of the filled share of the circle from its median over the clip; rendered truth stays within 0.09
JUMP = 1.0  # of its size by which an object may move per frame
GROWTH = 1.8  # factor by which the area of its box may change per frame
FOREIGN = 0.25  # share of a silhouette that may have another colour
PALE = 0.3  # nearness to the palette below which a part is ground of a similar colour, such as a wave close to the camera
HIDDEN = 1 / 3  # share of the clip for which an object may be behind another
STRETCHES = 3  # parts of a clip; the solid is read in each
FAULTS = ("vanished", "split", "extra", "torn", "bent", "jumped", "recoloured")


def permanence(video: Tensor, palette: Palette, count: int, solid: Callable[[Tensor], str] | None = None, leaves: bool = False) -> Row:
    """Whether the `count` objects of a clip (T, H, W, 3) uint8 stay the same, whatever they are.

    solid: classifies `solid_features` (`Detectors.solid`); without it changes of the solid are not detected. leaves: the camera may move,
    so objects may leave the picture.

    Returns "whole": at least `SHARE` of the frames have no fault, and no object's solid changes. "in_order": that share. And for each of
    `FAULTS` and for "reshaped", whether the clip has the fault (in more frames than are allowed to).
    """
    colours, near = (x.numpy() for x in segment(video, palette))  # (T, H, W) each
    votes = np.bincount(colours.ravel(), (near**2).ravel(), minlength=len(palette))
    kinds = [int(c) for c in np.argsort(-votes, kind="stable")[:count]]
    things = find_things(colours, near, kinds)
    faults = {name: np.zeros(len(video), dtype=bool) for name in FAULTS}
    faults["extra"], faults["recoloured"] = _foreign(colours, near, kinds)
    for thing in things:
        faults["vanished"] |= _vanished(thing, [other for other in things if other is not thing], leaves)
        faults["split"] |= thing.parts > 1
        faults["torn"] |= [bool(free) and _filled(mask) < CONVEX for free, mask in zip(thing.free, thing.mask, strict=True)]
        faults["bent"] |= _bent(thing)
        faults["jumped"] |= _jumped(thing)
    in_order = float((~np.logical_or.reduce(list(faults.values()))).mean())
    has = {name: bool(frames.mean() > 1 - SHARE) for name, frames in faults.items()}
    has["reshaped"] = solid is not None and any(_reshaped(video, thing, solid) for thing in things)
    return {"whole": in_order >= SHARE and not has["reshaped"], "in_order": in_order, **has}


def _foreign(colours: np.ndarray, near: np.ndarray, kinds: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Frames (T,) bool with a part in none of the expected colours, and with a part that also has another colour than its own."""
    extra, recoloured = np.zeros(len(near), bool), np.zeros(len(near), bool)
    for t in range(len(near)):
        known = np.isin(colours[t], kinds)
        labels, areas = parts(opened(near[t] > 0))
        for part in np.flatnonzero(areas >= MIN_PIXELS):
            inside = labels == part
            foreign = int((opened(inside & ~known) & (near[t] > 0.5)).sum())
            extra[t] |= not (inside & known).any() and near[t][inside].mean() > PALE
            recoloured[t] |= foreign > FOREIGN * areas[part]
    return extra, recoloured


def _vanished(thing: Thing, others: list[Thing], leaves: bool) -> np.ndarray:
    """(T,) bool: not visible, with nothing in front of its last position and no border near it."""
    missing, hidden, last = np.zeros(len(thing.seen), bool), np.zeros(len(thing.seen), bool), None
    for t, seen in enumerate(thing.seen):
        if seen:
            last = t
        elif last is None:
            missing[t] = True
        elif any(other.seen[t] and _touch(thing.box[last], other.box[t]) for other in others):
            hidden[t] = True
        else:
            missing[t] = not (leaves and thing.edge[last])
    return missing | hidden if hidden.mean() > HIDDEN else missing


def _touch(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two boxes (4,) overlap or are within `NEAR` of each other."""
    return bool((a[:2] <= b[2:] + NEAR).all() and (b[:2] <= a[2:] + NEAR).all())


def _filled(mask: np.ndarray) -> float:
    """The share of its convex hull that a mask (H, W) fills."""
    points = np.argwhere(mask)[:, ::-1].astype(np.int32)
    hull = cv2.fillConvexPoly(np.zeros(mask.shape, np.uint8), cv2.convexHull(points), 1)
    return float(mask.sum() / hull.sum())


def _bent(thing: Thing) -> np.ndarray:
    """(T,) bool: the silhouette differs from that of most of the clip, independent of its size and orientation."""
    filled = np.full(len(thing.seen), np.nan)
    for t in np.flatnonzero(thing.free & ~thing.edge):
        _, radius = cv2.minEnclosingCircle(np.argwhere(thing.mask[t]).astype(np.float32))
        filled[t] = thing.mask[t].sum() / (np.pi * (radius + 0.5) ** 2)
    clear = ~np.isnan(filled)
    return clear & (np.abs(filled / np.median(filled[clear]) - 1) > BENT) if clear.any() else clear


def _jumped(thing: Thing) -> np.ndarray:
    """(T,) bool: farther from the previous frame, or changed more in size, than is possible in the world."""
    sides = thing.box[:, 2:] - thing.box[:, :2]
    size, centre = sides.prod(1) ** 0.5, (thing.box[:, :2] + thing.box[:, 2:]) / 2
    clear, jumps = thing.free & ~thing.edge, np.zeros(len(size), bool)
    a, b = size[:-1], size[1:]
    far = np.linalg.norm(centre[1:] - centre[:-1], axis=1) > JUMP * np.maximum(a, b)
    jumps[1:] = clear[1:] & clear[:-1] & (far | (np.maximum(a, b) > GROWTH**0.5 * np.minimum(a, b)))
    return jumps


def _reshaped(video: Tensor, thing: Thing, solid: Callable[[Tensor], str]) -> bool:
    """Whether the parts of a clip show different solids. Only frames that show the whole object are used."""
    clear, names = torch.from_numpy(thing.free & ~thing.edge), set()
    mask, box = torch.from_numpy(thing.mask), torch.from_numpy(thing.box).float()
    for stretch in torch.arange(len(clear)).tensor_split(STRETCHES):
        shown = torch.zeros_like(clear)
        shown[stretch] = clear[stretch]
        if shown.sum() >= len(stretch) / 4:
            names.add(solid(solid_features(video, Track(thing.colour, mask, shown, box))))
    return len(names) > 1
