"""The path of a camera that only rotates, from points tracked between frames: one rotation per frame, and one focal length."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from kling.cameras.trajectory import Trajectory
from kling.errors import UserError
from kling.metrics.camera.tracks import Pairs

WIDTH = 320  # width in pixels at which points are tracked and errors are given
CLOSE = 1.5  # pixels within which a point agrees with a rotation
SAMPLES = 12  # random pairs of rays; if the camera only rotates, nine in ten rays agree
ENOUGH = 0.5  # share of the points that must agree for a frame to count as registered
DEFAULT_FOCAL = 1.07  # picture widths: a 50 degree field of view, if the path does not determine it
FOCALS = np.geomspace(0.5, 2.5, 13)


@dataclass(frozen=True)
class CameraEstimate:
    """A camera path from pixels. registered: share of registered frames. error: median, in pixels at a width of 320."""

    trajectory: Trajectory
    fps: float
    registered: float
    error: float


def estimate_rotation(pairs: Pairs, fps: float, ratio: float) -> CameraEstimate:
    """The path of a camera that only rotates, from points of consecutive frames. ratio: width / height.

    The focal length is the one of `FOCALS` with which the points agree best, if it has an effect. Frames in which fewer than `ENOUGH` of
    the points agree continue the previous rotation, and are not counted as registered. Raises `UserError` if no frame is registered.
    """
    scores = {focal: _chain(pairs, focal, ratio) for focal in (DEFAULT_FOCAL, *FOCALS)}
    best = min(scores, key=lambda focal: scores[focal][1])
    if scores[best][1] > 0.95 * scores[DEFAULT_FOCAL][1]:
        best = DEFAULT_FOCAL
    turns, _, registered, error = scores[best]
    if not registered.any():
        raise UserError("no frame could be placed by a rotation: its points do not move together; try --method colmap")
    poses, R = [np.eye(3)], np.eye(3)
    for turn in turns:
        R = R @ turn.T
        poses.append(R)
    c2w = np.concatenate([np.stack(poses), np.zeros((len(poses), 3, 1))], axis=-1)
    intrinsics = np.tile([best, best * ratio, 0.5, 0.5], (len(poses), 1))
    path = Trajectory(torch.from_numpy(c2w).float(), torch.from_numpy(intrinsics).float())
    return CameraEstimate(path, fps, float(registered.mean()), error)


def _chain(pairs: Pairs, focal: float, ratio: float) -> tuple[list[np.ndarray], float, np.ndarray, float]:
    """(rotation from each frame to the next, robust cost, registered frames, median error of agreeing points) for a focal length."""
    turns, costs, registered, errors = [], [], [], []
    for p, q in pairs:
        turn, off = _rotation(_bearings(p, focal, ratio), _bearings(q, focal, ratio), focal * WIDTH)
        agree = off < CLOSE
        registered.append(len(off) >= 8 and agree.mean() >= ENOUGH)
        turns.append(turn if registered[-1] else (turns[-1] if turns else np.eye(3)))
        costs += list(np.minimum(off, CLOSE))
        errors += list(off[agree]) if registered[-1] else []
    return turns, float(np.mean(costs)) if costs else np.inf, np.array(registered), float(np.median(errors)) if errors else np.inf


def _rotation(a: np.ndarray, b: np.ndarray, pixels: float) -> tuple[np.ndarray, np.ndarray]:
    """(R with b ≈ R a, each ray's error in pixels): Kabsch's solution from random pairs of rays, then from all rays that agree with it."""
    if len(a) < 3:
        return np.eye(3), np.full(len(a), np.inf)
    rng = np.random.default_rng(0)
    best = np.eye(3)
    off = _angle(best, a, b) * pixels
    for _ in range(SAMPLES):
        i = rng.choice(len(a), 2, replace=False)
        R = _kabsch(a[i], b[i])
        if np.minimum(trial := _angle(R, a, b) * pixels, CLOSE).sum() < np.minimum(off, CLOSE).sum():
            best, off = R, trial
    for _ in range(3):
        if (agree := off < CLOSE).sum() >= 3:
            best = _kabsch(a[agree], b[agree])
            off = _angle(best, a, b) * pixels
    return best, off


def _kabsch(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    U, _, Vt = np.linalg.svd(b.T @ a)
    return U @ np.diag([1, 1, np.linalg.det(U @ Vt)]) @ Vt


def _angle(R: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.linalg.norm(a @ R.T - b, axis=-1)


def _bearings(points: np.ndarray, focal: float, ratio: float) -> np.ndarray:
    rays = np.concatenate([(points - 0.5) / [focal, focal * ratio], np.ones((len(points), 1))], axis=-1)
    return rays / np.linalg.norm(rays, axis=-1, keepdims=True)
