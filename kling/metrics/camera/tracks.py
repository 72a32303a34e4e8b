"""Tracks points through any video: corners spread over the picture, each followed by its appearance when it was first seen.

A point is tracked from frame to frame by Lucas and Kanade's method, forward and back, then aligned again to its first appearance, which
may have grown, rotated, become slanted or changed its brightness since. Without this alignment small errors add up, and for a growing
patch they are always to the same side: estimated paths of moving cameras are then three times as far from the truth.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, fields

import cv2
import numpy as np
from torch import Tensor

SHORT_SIDE = 256  # pixels; smaller pictures are enlarged before corners are detected
CELLS, A_CELL, APART = 8, 6, 6  # cells along the long side, corners per cell at most, enlarged pixels between two corners
QUALITY = 3e-4  # relative to the strongest corner; low, because a bright object must not hide corners of a soft ground
RETURN = 0.5  # enlarged pixels by which a point tracked forward and back may miss its start
RADIUS, WIDTH = 20, 12.0  # enlarged pixels: the patch around a point, and the width of its Gaussian weight
STEPS, STILL = 8, 0.05  # of the alignment; the last step must be shorter than this in pixels
ASTRAY, UNLIKE = 1.5, 0.5  # limits of the alignment: shift in pixels, and difference of appearance relative to the contrast

AROUND = np.mgrid[-RADIUS : RADIUS + 1, -RADIUS : RADIUS + 1][::-1].reshape(2, -1).T.astype(np.float32)  # (p, 2) x, y
BELL = np.exp(-np.square(AROUND).sum(-1) / (2 * WIDTH**2))  # (p,)
UNITS = np.array([1, 1, *[1 / RADIUS] * 4, 1 / 50, 1])  # of the 8 unknowns: makes them similar in size, for one damping
DAMPING = 1e-5

Pairs = list[tuple[np.ndarray, np.ndarray]]  # (p, q) (n, 2) each, normalised: x by the width, y by the height


@dataclass
class Looks:
    """The first appearance of n points, and how it has changed: what was at offset a from the point is now at stretch · a, with the grey
    value light · grey + shade."""

    grey: np.ndarray  # (n, p), nan outside the picture
    solve: np.ndarray  # (n, 8, p) differences of grey -> two of position, four of stretch, light and shade
    stretch: np.ndarray  # (n, 2, 2)
    light: np.ndarray  # (n, 1)
    shade: np.ndarray  # (n, 1)

    @classmethod
    def of(cls, picture: np.ndarray, points: np.ndarray) -> Looks:
        """The appearance of points (n, 2) in a float32 picture, with no change yet."""
        at = points[:, None] + AROUND  # (n, p, 2)
        grey = sample(picture, at)
        slope = [(sample(picture, at + one) - sample(picture, at - one)) / 2 for one in np.eye(2)]  # d/dx, d/dy
        by = [*slope, *(d * AROUND[:, i] for d in slope for i in (0, 1)), grey, np.ones_like(grey)]
        J = np.nan_to_num(np.stack(by, axis=1)) * UNITS[:, None]  # (n, 8, p) d grey / d unknown
        H = (J * BELL) @ J.swapaxes(1, 2)  # (n, 8, 8)
        H += DAMPING * np.trace(H, axis1=1, axis2=2)[:, None, None] * np.eye(8)
        n = len(points)
        return cls(grey, UNITS[:, None] * (np.linalg.inv(H) @ (J * BELL)), np.tile(np.eye(2), (n, 1, 1)), np.ones((n, 1)), np.zeros((n, 1)))

    def those(self, which: np.ndarray) -> Looks:
        """The appearance of the points selected by a mask (n,)."""
        return Looks(*(getattr(self, field.name)[which] for field in fields(self)))

    def and_also(self, others: Looks) -> Looks:
        return Looks(*(np.concatenate([getattr(looks, field.name) for looks in (self, others)]) for field in fields(self)))

    def set_right(self, picture: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Align points (n, 2) of a picture to their first appearance, from approximate positions: positions, and whether they match.

        Inverse compositional (Baker and Matthews, "Lucas-Kanade 20 years on", 2004): the first appearance is the one that is warped, so its
        slopes and their inverse are computed once. The changes found are kept.
        """
        x = points.astype(np.float64)
        for _ in range(STEPS):
            change = np.einsum("nip,np->ni", self.solve, self._unlike(picture, x))  # (n, 8)
            x -= np.einsum("nij,nj->ni", self.stretch, change[:, :2])
            self.stretch = self.stretch @ np.linalg.inv(np.eye(2) + change[:, 2:6].reshape(-1, 2, 2))
            self.shade = self.shade + self.light * change[:, 7:]
            self.light = self.light * (1 + change[:, 6:7])
        miss = np.sqrt(np.square(self._unlike(picture, x)) @ BELL / BELL.sum())
        area = np.linalg.det(self.stretch)
        alike = (miss < UNLIKE * (np.nanstd(self.grey, axis=1) + 1)) & (np.linalg.norm(change[:, :2], axis=-1) < STILL)
        return x, alike & (np.linalg.norm(x - points, axis=-1) < ASTRAY) & (area > 0.2) & (area < 5)

    def _unlike(self, picture: np.ndarray, x: np.ndarray) -> np.ndarray:
        """Difference (n, p) of the present appearance at x, warped back, from the first; 0 if either is outside the picture."""
        now = sample(picture, x[:, None] + AROUND @ self.stretch.swapaxes(1, 2))
        return np.nan_to_num((now - self.shade) / self.light - self.grey)


def follow_points(video: Tensor, scale: int) -> np.ndarray:
    """Pixel positions (T, N, 2) in the enlarged picture, pixel centres at +0.5; nan before a point appears and after it is lost."""
    T, H, W, _ = video.shape
    greys = [cv2.resize(cv2.cvtColor(f, cv2.COLOR_RGB2GRAY), (W * scale, H * scale), interpolation=cv2.INTER_CUBIC) for f in video.numpy()]
    paths = np.full((T, 0, 2), np.nan, np.float32)
    alive, looks = np.zeros(0, dtype=int), Looks.of(greys[0].astype(np.float32), np.zeros((0, 2), np.float32))
    for t, grey in enumerate(greys):
        picture = grey.astype(np.float32)
        if len(alive):
            before = paths[t - 1, alive]
            after, ok = followed(greys[t - 1], grey, before)
            back, ok_back = followed(grey, greys[t - 1], after)
            kept = ok & ok_back & (np.linalg.norm(back - before, axis=-1) < RETURN)
            kept &= ((after > 2) & (after < np.array([W, H]) * scale - 3)).all(-1)
            alive, looks = alive[kept], looks.those(kept)
            right, alike = looks.set_right(picture, after[kept])
            alive, looks = alive[alike], looks.those(alike)
            paths[t, alive] = right[alike]
        fresh = corners(grey, paths[t, alive])
        new = np.full((T, len(fresh), 2), np.nan, np.float32)
        new[t] = fresh
        alive, looks = np.concatenate([alive, paths.shape[1] + np.arange(len(fresh))]), looks.and_also(Looks.of(picture, fresh))
        paths = np.concatenate([paths, new], axis=1)
    return paths[:, np.isfinite(paths[..., 0]).sum(0) >= 3].astype(np.float64) + 0.5


def corners(grey: np.ndarray, taken: np.ndarray) -> np.ndarray:
    """New corners (n, 2) away from tracked ones (m, 2), with at most `A_CELL` of both in each cell of a grid over the picture.

    Otherwise a bright object, which may move on its own, has most points, and too few are on the distant ones that fix the rotation.
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


def followed(one: np.ndarray, other: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions in another picture of points (n, 2) (Lucas-Kanade), and whether they were found."""
    stop = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 30, 0.003)
    there, ok, _ = cv2.calcOpticalFlowPyrLK(one, other, points[:, None], None, winSize=(21, 21), maxLevel=3, criteria=stop)
    return there[:, 0], ok[:, 0].astype(bool)


def sample(picture: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Grey values at pixel positions: (n, p, 2) -> (n, p), nan outside the picture."""
    if not at.size:
        return np.zeros(at.shape[:-1], np.float32)
    x, y = at.astype(np.float32).transpose(2, 0, 1)
    return cv2.remap(picture, np.ascontiguousarray(x), np.ascontiguousarray(y), cv2.INTER_LINEAR, borderValue=np.nan)


def tracks(frames: np.ndarray, gap: int = 1) -> Pairs:
    """Positions of points of each frame (T, H, W, 3), and where they are `gap` frames later; unreliable points are left out."""
    greys = [cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2GRAY) for frame in frames]
    unit = np.array([frames.shape[2], frames.shape[1]], np.float32)
    pairs = []
    for a, b in zip(greys, greys[gap:], strict=False):
        p = cv2.goodFeaturesToTrack(a, 400, 0.005, 5)
        if p is None:
            pairs.append((np.empty((0, 2)), np.empty((0, 2))))
            continue
        q, found, _ = cv2.calcOpticalFlowPyrLK(a, b, p, None, winSize=(15, 15))
        back, returned, _ = cv2.calcOpticalFlowPyrLK(b, a, q, None, winSize=(15, 15))
        good = (found & returned).ravel().astype(bool) & (np.linalg.norm(back - p, axis=-1).ravel() < 0.5)
        pairs.append(tuple((x.reshape(-1, 2)[good] + 0.5) / unit for x in (p, q)))  # pixel centres lie at +0.5
    return pairs
