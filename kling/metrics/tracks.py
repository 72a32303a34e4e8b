"""Points followed through any video: corners spread over the picture, carried on by Lucas and Kanade's method, there and back."""

from __future__ import annotations

from collections import defaultdict

import cv2
import numpy as np
from torch import Tensor

SHORT_SIDE = 256  # pixels; smaller pictures are enlarged before corners are sought
CELLS, A_CELL, APART = 8, 6, 6  # cells along the long side, corners in each at most, enlarged pixels between two
QUALITY = 3e-4  # of the strongest corner; a bright thing on a soft ground must not hide it
RETURN = 0.5  # pixels of the enlarged picture that a point may miss its start by, followed there and back
LOOK_BACK = 6  # frames; longer, and a point no longer looks as it did


def follow_points(video: Tensor, scale: int) -> np.ndarray:
    """Pixel positions (T, N, 2) in the enlarged picture, pixel centres at +0.5; nan before a point appears and after it is lost.

    A point is carried from frame to frame, then set right against its look up to `LOOK_BACK` frames ago: small misses would add up.
    """
    T, H, W, _ = video.shape
    greys = [cv2.resize(cv2.cvtColor(f, cv2.COLOR_RGB2GRAY), (W * scale, H * scale), interpolation=cv2.INTER_CUBIC) for f in video.numpy()]
    paths = np.full((T, 0, 2), np.nan, np.float32)
    alive = np.zeros(0, dtype=int)
    for t, grey in enumerate(greys):
        if len(alive):
            before = paths[t - 1, alive]
            after, ok = followed(greys[t - 1], grey, before, before, levels=3)
            born = np.isfinite(paths[:t, alive, 0]).argmax(0)
            for first in range(max(0, t - LOOK_BACK), t - 1):
                old = np.maximum(born, t - LOOK_BACK) == first
                if old.any():
                    right, sure = followed(greys[first], grey, paths[first, alive[old]], after[old], levels=0)
                    sure &= np.linalg.norm(right - after[old], axis=-1) < 1
                    after[old] = np.where(sure[:, None], right, after[old])
            back, ok_back = followed(grey, greys[t - 1], after, after, levels=3)
            kept = ok & ok_back & (np.linalg.norm(back - before, axis=-1) < RETURN)
            kept &= ((after > 2) & (after < np.array([W, H]) * scale - 3)).all(-1)
            alive = alive[kept]
            paths[t, alive] = after[kept]
        fresh = corners(grey, paths[t, alive])
        new = np.full((T, len(fresh), 2), np.nan, np.float32)
        new[t] = fresh
        alive = np.concatenate([alive, paths.shape[1] + np.arange(len(fresh))])
        paths = np.concatenate([paths, new], axis=1)
    return paths[:, np.isfinite(paths[..., 0]).sum(0) >= 3].astype(np.float64) + 0.5


def corners(grey: np.ndarray, taken: np.ndarray) -> np.ndarray:
    """New corners (n, 2), away from those that are followed (m, 2), at most `A_CELL` of both in each cell of a grid over the picture.

    Else a bright object, which may move on its own, holds most points, and the far ones that fix the turn are too few.
    """
    free = np.full(grey.shape, 255, np.uint8)
    for place in taken:
        cv2.circle(free, tuple(int(x) for x in place), APART, 0, -1)
    found = cv2.goodFeaturesToTrack(grey, 0, QUALITY, APART, mask=free)  # the strongest first
    side = max(grey.shape) / CELLS
    room: dict[tuple[int, ...], int] = defaultdict(lambda: A_CELL)
    for place in taken:
        room[tuple((place // side).astype(int))] -= 1
    chosen = []
    for place in found[:, 0] if found is not None else ():
        cell = tuple((place // side).astype(int))
        room[cell] -= 1
        chosen += [place] if room[cell] >= 0 else []
    return np.array(chosen, np.float32).reshape(-1, 2)


def followed(one: np.ndarray, other: np.ndarray, points: np.ndarray, guess: np.ndarray, levels: int) -> tuple[np.ndarray, np.ndarray]:
    """Where points (n, 2) of a picture are in another, sought near a guess (Lucas-Kanade), and whether they were found."""
    stop = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 30, 0.003)
    options = {"winSize": (21, 21), "maxLevel": levels, "criteria": stop, "flags": cv2.OPTFLOW_USE_INITIAL_FLOW}
    there, ok, _ = cv2.calcOpticalFlowPyrLK(one, other, points[:, None], guess[:, None].copy(), **options)
    return there[:, 0], ok[:, 0].astype(bool)
