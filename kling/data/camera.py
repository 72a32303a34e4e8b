"""Cameras from pixels: where points went from frame to frame, what rotation that means, and whether given poses agree with it.

Points are tracked between frames (Shi-Tomasi corners, Lucas-Kanade there and back). A point p of frame i, a ray K⁻¹p, is seen in frame j at

    q ~ R_j⁻¹ R_i p + s R_j⁻¹ (o_i - o_j),    s >= 0, the inverse of its distance

for poses [R | o] that map camera to world in OpenCV axes. With s free this needs no depth and no scale. With s >= 0 it tells a path from
its inverse: poses that were stored world-to-camera, or in axes with y up, leave the points where no distance can explain them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import torch

from kling.condition.camera import Trajectory
from kling.condition.poses import load_window, save_trajectory
from kling.data.decode import VideoInfo, probe
from kling.data.files import Source
from kling.data.manifest import Manifest, Shot
from kling.data.reader import open_reader
from kling.errors import UserError

METHODS = ("rotation", "colmap")
WIDTH = 320  # pixels at which points are tracked; errors are in these
RATE = 8.0  # poses a second
CLOSE = 1.5  # pixels within which a point agrees with a rotation
SAMPLES = 12  # pairs of rays that are tried; nine in ten rays of a camera that turns agree
ENOUGH = 0.5  # of the points must agree for a frame to count as registered
DEFAULT_FOCAL = 1.07  # widths: 50 degrees across, where a path does not tell
FOCALS = np.geomspace(0.5, 2.5, 13)
WRONG = 2.0  # how many times better another convention must explain the points before the given one is refused


@dataclass(frozen=True)
class Estimate:
    """A camera path from pixels. registered: share of the frames that were placed. error: median, pixels at a width of 320."""

    trajectory: Trajectory
    fps: float
    registered: float
    error: float


Pairs = list[tuple[np.ndarray, np.ndarray]]  # (p, q) (n, 2) each, normalised: x by the width, y by the height


def read_tracks(source: Source, info: VideoInfo, start: float, end: float, rate: float = RATE, gap: int = 1) -> tuple[Pairs, float]:
    """(points of frame i and of frame i + gap, for all i; frames a second) of a stretch of a video. At most its own rate."""
    fps = min(rate, info.fps)
    count = max(2, int((end - start) * fps + 1e-6))
    height = max(2, round(WIDTH * info.height / info.width))
    frames = open_reader(source, info=info).at([start + i / fps for i in range(count)], (height, WIDTH)).numpy()
    return tracks(frames, gap), fps


def tracks(frames: np.ndarray, gap: int = 1) -> Pairs:
    """Where points of each frame (T, H, W, 3) lie `gap` frames later; those that do not find their way back are left out."""
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


# ----------------------------------------------------------------------------------------------------------- rotation model


def estimate_rotation(pairs: Pairs, fps: float, ratio: float) -> Estimate:
    """The path of a camera that turns on the spot, from points of consecutive frames. ratio: width / height.

    The focal length is the one of `FOCALS` under which the points agree best, if it matters; frames in which fewer than `ENOUGH` of
    the points agree go on as their neighbour did, and are not counted as registered. Raises `UserError` if no frame is.
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
    return Estimate(path, fps, float(registered.mean()), error)


def _chain(pairs: Pairs, focal: float, ratio: float) -> tuple[list[np.ndarray], float, np.ndarray, float]:
    """(rotation from each frame to the next, robust cost, which are registered, median error of what agrees) under a focal length."""
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
    """(R with b ≈ R a, each ray's error in pixels): Kabsch's solution from random pairs of rays, then from all that agree with it."""
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


# -------------------------------------------------------------------------------------------------------------- conventions

FLIP = np.diag([1.0, -1.0, -1.0])  # OpenCV axes <-> OpenGL's: y up, looking along -z
CONVENTIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "camera-to-world in OpenCV axes": lambda c2w: c2w,
    "world-to-camera": lambda c2w: _inverse(c2w),
    "camera-to-world in OpenGL axes (y up, z backward)": lambda c2w: np.concatenate([c2w[:, :, :3] @ FLIP, c2w[:, :, 3:]], -1),
    "world-to-camera in OpenGL axes (y up, z backward)": lambda c2w: np.concatenate(
        [_inverse(c2w)[:, :, :3] @ FLIP, _inverse(c2w)[:, :, 3:]], -1
    ),
}


def convention_errors(trajectory: Trajectory, pairs: Pairs, gap: int = 1) -> dict[str, float]:
    """Median distance, pixels at a width of 320, between where points went and where the poses can put them, under each convention.

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
    """The error of poses that are what they should be. Raises `UserError` if another reading of them explains the video much better."""
    errors = convention_errors(trajectory, pairs, gap)
    right, given = next(iter(errors)), next(iter(errors.values()))
    best = min(errors, key=errors.__getitem__)
    if best != right and errors[best] * WRONG < given:
        off = f"points are {given:.1f} pixels off as camera-to-world in OpenCV axes, {errors[best]:.1f} as {best}"
        raise UserError(f"{where} holds {best} ({off}, at a width of {WIDTH}): convert it")
    return given


def _misplaced(a: np.ndarray, b: np.ndarray, Ka: np.ndarray, Kb: np.ndarray, p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Distance (n,) in pixels from q to the nearest place at which a point seen at p by camera a can be seen by camera b."""
    ray = np.concatenate([(p - Ka[2:]) / Ka[:2], np.ones((len(p), 1))], -1) @ (b[:, :3].T @ a[:, :3]).T  # (n, 3)
    seen = np.concatenate([(q - Kb[2:]) / Kb[:2], np.ones((len(q), 1))], -1)
    toward = b[:, :3].T @ (a[:, 3] - b[:, 3])  # (3,)
    u, v = np.cross(seen, ray), np.cross(seen, toward[None])
    s = np.maximum(0, -(u * v).sum(-1) / np.maximum((v * v).sum(-1), 1e-12))
    point = ray + s[:, None] * toward
    ahead = point[:, 2] > 1e-6
    place = point[:, :2] / np.where(ahead, point[:, 2], 1)[:, None]
    off = np.linalg.norm((place - seen[:, :2]) * Kb[0], axis=-1) * WIDTH  # square pixels: one focal length in both
    return np.where(ahead, np.minimum(off, WIDTH), WIDTH)


def _inverse(c2w: np.ndarray) -> np.ndarray:
    Rᵀ = c2w[:, :, :3].transpose(0, 2, 1)
    return np.concatenate([Rᵀ, -Rᵀ @ c2w[:, :, 3:]], axis=-1)


# ------------------------------------------------------------------------------------------------------------- whole clips


def check_file(path: Path, source: Source, start: float = 0.0, end: float | None = None) -> float:
    """The error, in pixels, with which the poses of a file explain a video. Raises `UserError` if another convention explains it better."""
    info = probe(source)
    gap = 2  # quarter seconds: long enough to see a slow move, short enough to track a fast one
    pairs, fps = read_tracks(source, info, start, end or info.duration, gap=gap)
    if not any(len(p) for p, _ in pairs):
        raise UserError(f"{path}: no point of {source} can be tracked, so its convention cannot be checked")
    when = start + torch.arange(len(pairs) + gap, dtype=torch.float64) / fps
    return check_convention(load_window(path, when, (info.height, info.width), info.duration), pairs, gap, path)


def estimated(manifest: Manifest, shot: Shot, method: str) -> Shot:
    """The clip with a camera file beside the manifest, RealEstate10K text, and how well it was found in its measures."""
    source = manifest.check(shot)
    if method == "colmap":
        from kling.data.colmap import estimate_colmap

        estimate = estimate_colmap(source, shot.video, shot.start, shot.end)
    else:
        pairs, fps = read_tracks(source, shot.video, shot.start, shot.end)
        estimate = estimate_rotation(pairs, fps, shot.video.width / shot.video.height)
    name = f"cameras/{hashlib.sha256(f'{shot.sha256}@{shot.start}'.encode()).hexdigest()[:16]}.txt"
    (manifest.folder / "cameras").mkdir(exist_ok=True)
    save_trajectory(manifest.folder / name, estimate.trajectory, estimate.fps, shot.start)
    found = {"method": method, "registered": round(estimate.registered, 4), "error": round(estimate.error, 3)}
    return replace(shot, camera=name, measures=shot.measures | {"camera": found})
