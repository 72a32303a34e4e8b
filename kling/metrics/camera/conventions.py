"""Checks the convention of given poses: whether they, or the same numbers in another convention, agree with the motion of points.

A point p of frame i, a ray K⁻¹p, is seen in frame j at

    q ~ R_j⁻¹ R_i p + s R_j⁻¹ (o_i - o_j),    s >= 0, the inverse of its distance

for poses [R | o] that map camera to world in OpenCV axes. With s free this needs no depth and no scale. s >= 0 distinguishes a path from
its inverse: with poses stored world-to-camera, or in axes with y up, no distance explains where the points are.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from kling.cameras.poses import inverse
from kling.cameras.trajectory import Trajectory
from kling.errors import UserError
from kling.metrics.camera.rotation import WIDTH
from kling.metrics.camera.tracks import Pairs


def _inverted(c2w: np.ndarray) -> np.ndarray:
    return inverse(torch.from_numpy(c2w)).numpy()


WRONG = 2.0  # the given convention is refused if another explains the points this many times better
FLIP = np.diag([1.0, -1.0, -1.0])  # OpenCV axes <-> OpenGL's: y up, looking along -z
CONVENTIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "camera-to-world in OpenCV axes": lambda c2w: c2w,
    "world-to-camera": lambda c2w: _inverted(c2w),
    "camera-to-world in OpenGL axes (y up, z backward)": lambda c2w: np.concatenate([c2w[:, :, :3] @ FLIP, c2w[:, :, 3:]], -1),
    "world-to-camera in OpenGL axes (y up, z backward)": lambda c2w: np.concatenate(
        [_inverted(c2w)[:, :, :3] @ FLIP, _inverted(c2w)[:, :, 3:]], -1
    ),
}


def convention_errors(trajectory: Trajectory, pairs: Pairs, gap: int = 1) -> dict[str, float]:
    """Median distance, in pixels at a width of 320, between observed points and the nearest position possible, for each convention.

    trajectory: a pose for every frame; pairs: points of frame i and of frame i + gap (`tracks`).
    """
    given, K = trajectory.c2w.double().numpy(), trajectory.intrinsics.double().numpy()
    errors = {}
    for name, read in CONVENTIONS.items():
        c2w = read(given)
        off = [_misplaced(c2w[i], c2w[i + gap], K[i], K[i + gap], p, q) for i, (p, q) in enumerate(pairs) if len(p)]
        errors[name] = float(np.median(np.concatenate(off))) if off else np.inf
    return errors


def check_convention(trajectory: Trajectory, pairs: Pairs, gap: int, where: object) -> float:
    """The error of the poses in the expected convention. Raises `UserError` if another convention explains the video much better."""
    errors = convention_errors(trajectory, pairs, gap)
    right, given = next(iter(errors)), next(iter(errors.values()))
    best = min(errors, key=errors.__getitem__)
    if best != right and errors[best] * WRONG < given:
        off = f"points are {given:.1f} pixels off as camera-to-world in OpenCV axes, {errors[best]:.1f} as {best}"
        raise UserError(f"{where} holds {best} ({off}, at a width of {WIDTH}): convert it")
    return given


def _misplaced(a: np.ndarray, b: np.ndarray, Ka: np.ndarray, Kb: np.ndarray, p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Distance (n,) in pixels from q to the nearest position where camera b can see a point that camera a sees at p."""
    ray = np.concatenate([(p - Ka[2:]) / Ka[:2], np.ones((len(p), 1))], -1) @ (b[:, :3].T @ a[:, :3]).T  # (n, 3)
    seen = np.concatenate([(q - Kb[2:]) / Kb[:2], np.ones((len(q), 1))], -1)
    toward = b[:, :3].T @ (a[:, 3] - b[:, 3])  # (3,)
    u, v = np.cross(seen, ray), np.cross(seen, toward[None])
    s = np.maximum(0, -(u * v).sum(-1) / np.maximum((v * v).sum(-1), 1e-12))
    point = ray + s[:, None] * toward
    ahead = point[:, 2] > 1e-6
    place = point[:, :2] / np.where(ahead, point[:, 2], 1)[:, None]
    off = np.linalg.norm((place - seen[:, :2]) * Kb[0], axis=-1) * WIDTH  # square pixels: one focal length for both axes
    return np.where(ahead, np.minimum(off, WIDTH), WIDTH)
