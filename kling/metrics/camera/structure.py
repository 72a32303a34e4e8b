"""The camera's path in any video, from tracked points: no network, no knowledge of the scene.

A camera that only rotates is tried first; then bundle adjustment over rotations, positions and points from many starts: the essential
matrix, a plane's homography, rotations that many points share, pycolmap if requested, and a static camera. The simpler model is kept
unless the other explains half as many observations again: a path that bends to explain a moving object gains a tenth, while a camera
that really travels gains half and more.
Points are homogeneous, (direction, inverse distance), so points at infinity are not special, and the start from a static camera needs no
depth (Yu and Gallup, "3D reconstruction from accidental motion", 2014).
Positions are known up to one scale, which `translation_error` removes.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor

from kling.cameras.trajectory import Trajectory
from kling.metrics.camera.colmap import colmap_path
from kling.metrics.camera.tracks import SHORT_SIDE, follow_points

ENOUGH = 12  # minimum number of points that determine a pose
AGREE, SHARE = 2.0, 0.5  # a pose is found if this share of its points lies within so many enlarged pixels
EVERY = 4  # frames between two adjustments of all poses and points
PERFECT = 0.2  # pixels: a rotating camera with a smaller error is accepted without alternatives
SAMPLES, TURNS = 300, 6  # random pairs of points, and distinct rotations tried, for the pose of a second view
DISTINCT, ALONG = 0.02, 0.97  # two rotations differ by more radians than this, two translations have a smaller cosine
HOPEFUL = 6  # number of candidate paths that are followed to the end
MOST = 0.7  # a rotating camera is accepted if it explains this share of what a moving one explains; the rest may be moving objects


@dataclass(frozen=True)
class Structure:
    """A path and how reliable it is."""

    trajectory: Trajectory  # relative to frame 0; intrinsics as given
    found: Tensor  # (T,) bool; False from the first frame whose pose was not found
    model: str  # "turning", "moving", or "colmap" for a moving camera that pycolmap placed
    error: float  # pixels: upper quartile of the distance between points and the model's prediction


@dataclass
class _Scene:
    """Poses and points. Point n is seen from pose t in the direction Rᵀ(u - ρ o), which is linear in everything except R."""

    R: np.ndarray  # (T, 3, 3) camera to world
    o: np.ndarray  # (T, 3)
    u: np.ndarray  # (N, 4) direction and inverse distance of each point, from frame 0

    def seen(self) -> np.ndarray:
        """(T, N, 3) every point in the coordinates of every camera."""
        return np.einsum("tji,tnj->tni", self.R, self.u[None, :, :3] - self.u[None, :, 3:] * self.o[:, None])


def estimate_structure(video: Tensor, intrinsics: Tensor, colmap: bool = False) -> Structure:
    """The path of a clip (T, H, W, 3) uint8 with known intrinsics (T, 4), normalised by width and height.

    colmap: also try pycolmap's path; it is used if it has the smallest error after the same adjustment.
    """
    T, H, W, _ = video.shape
    scale = max(1, round(SHORT_SIDE / min(H, W)))
    K = intrinsics.double().numpy()
    xy = follow_points(video, scale) / [W * scale, H * scale]  # (T, N, 2), nan where a point is not seen
    rays = (xy - K[:, None, 2:]) / K[:, None, :2]  # (T, N, 2) on the plane z = 1
    focal = K[:, 0] * W * scale  # (T,) enlarged pixels
    known = ~np.isnan(rays[..., 0])  # (T, N)
    rays = np.nan_to_num(rays)
    turning = _turned(rays, known, focal)
    gap = _gap(turning, rays, focal)[known]
    model, best, error = "turning", turning, float(np.quantile(gap, 0.75)) if len(gap) else np.inf
    if len(gap) and error > PERFECT * scale:
        moving = {"moving": _moved(turning, rays, known, focal)}
        if colmap and (path := colmap_path(video, intrinsics, scale)) is not None:
            c2w = path.c2w.double().numpy()
            moving["colmap"] = _placed(c2w[:, :, :3], c2w[:, :, 3], rays, known, focal)
        scene = _best_first(list(moving.values()), rays, known, focal)[0]
        turned, moved = _gap(turning, rays, focal)[known], _gap(scene, rays, focal)[known]
        near = 2 * np.median(moved) + 0.1 * scale
        if (turned < near).mean() < MOST * (moved < near).mean():
            model, best = next(name for name, other in moving.items() if other is scene), scene
            error = float(np.quantile(moved, 0.75))
    good = ((_gap(best, rays, focal) < AGREE * min(max(1.0, error), scale)) & known).sum(1)
    found = (good >= ENOUGH) & (good >= SHARE * known.sum(1))
    found[0] = True
    c2w = torch.from_numpy(np.concatenate([best.R, best.o[..., None]], axis=-1)).float()
    return Structure(Trajectory(c2w, intrinsics), torch.from_numpy(np.cumprod(found).astype(bool)), model, error / scale)


def _turned(rays: np.ndarray, known: np.ndarray, focal: np.ndarray) -> _Scene:
    """A camera that only rotates: each frame's rotation from points whose direction earlier frames determined (Kabsch, reweighted)."""
    T, N = known.shape
    b = np.concatenate([rays, np.ones((T, N, 1))], axis=-1)
    b /= np.linalg.norm(b, axis=-1, keepdims=True)
    R, total, first = np.stack([np.eye(3)] * T), np.zeros((N, 3)), np.full(N, T)
    for t in range(T):
        if t:
            R[t] = R[t - 1]
            both = known[t] & (first < t)
            for _ in range(10 if both.sum() >= 3 else 0):
                world = total[both] / np.linalg.norm(total[both], axis=-1, keepdims=True)
                gap = np.linalg.norm(b[t][both] @ R[t].T - world, axis=-1) * focal[t]
                w = 1 / (1 + (gap / (2 * np.median(gap) + 0.1)) ** 2) ** 2
                U, _, Vt = np.linalg.svd((world * w[:, None]).T @ b[t][both])
                R[t] = U @ np.diag([1, 1, np.linalg.det(U @ Vt)]) @ Vt
        first = np.where(known[t] & (first == T), t, first)
        total += np.where(known[t][:, None], b[t] @ R[t].T, 0)
    u = total / np.linalg.norm(total, axis=-1, keepdims=True).clip(1e-9)
    return _Scene(R, np.zeros((T, 3)), np.concatenate([u, np.zeros((N, 1))], axis=-1))


def _moved(turning: _Scene, rays: np.ndarray, known: np.ndarray, focal: np.ndarray) -> _Scene:
    """Poses and points together: the first part of the clip from many starts; the best few continue to the end, and the best one is kept.

    The first frames alone cannot decide: if a moving object has a third of the points, a wrong path often explains more of them.
    """
    born = np.where(known.any(0), known.argmax(0), len(known))  # (N,) frame in which a point is first seen
    stretch = _stretch(known)
    if (born == 0).sum() < ENOUGH or stretch < 2:
        return turning
    opening = known & (born == 0)[None]
    opening[stretch + 1 :] = False
    starts = [_from_pose(rays, known, stretch, R, o) for R, o in _two_views(rays, opening, focal, stretch)] + [_from_nothing(turning, rays)]
    for start in starts:
        _adjust(start, rays, opening, focal, frames=slice(1, stretch + 1), points=True, steps=8)
    hopeful: list[_Scene] = []
    for start in _best_first(starts, rays, opening, focal):
        if len(hopeful) < HOPEFUL and all(_differ(start, other, stretch) for other in hopeful):
            hopeful.append(start)
    for scene in hopeful:
        _go_on(scene, rays, known, born, stretch, focal)
    # points are computed again: some are still where an early, worse path put them
    return _best_first([_placed(scene.R, scene.o, rays, known, focal) for scene in hopeful], rays, known, focal)[0]


def _best_first(scenes: list[_Scene], rays: np.ndarray, known: np.ndarray, focal: np.ndarray) -> list[_Scene]:
    """Sort by the mean distance of points from their predictions; outliers, such as moving objects, count a fixed amount."""
    gaps = [_gap(scene, rays, focal)[known] for scene in scenes]
    most = 4 * min(np.median(gap) for gap in gaps)
    return [scenes[i] for i in np.argsort([np.minimum(gap, most).mean() for gap in gaps])]


def _differ(one: _Scene, other: _Scene, frame: int) -> bool:
    """Whether two scenes differ in rotation or in direction of travel at a frame."""
    a, b = one.o[frame], other.o[frame]
    along = a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-9)
    return np.trace(one.R[frame] @ other.R[frame].T) < 3 - DISTINCT**2 or along < ALONG


def _go_on(scene: _Scene, rays: np.ndarray, known: np.ndarray, born: np.ndarray, stretch: int, focal: np.ndarray) -> None:
    """Continue from the first part to the last frame, in place: pose each frame from known points, and readjust everything regularly."""
    T, opening = len(known), known & (born == 0)[None]
    opening[stretch + 1 :] = False
    _adjust(scene, rays, opening, focal, frames=slice(1, stretch + 1), points=True, steps=10)
    for t in range(1, T):
        new = born == t - 1 if t > 1 else born < 0
        if new.any():  # in the direction of the first observation, at the median distance
            ray = np.concatenate([rays[t - 1, new], np.ones((new.sum(), 1))], axis=-1)
            usual = np.median(scene.u[born < t - 1, 3])
            at = ray / np.linalg.norm(ray, axis=-1, keepdims=True) @ scene.R[t - 1].T + usual * scene.o[t - 1]
            scene.u[new] = np.concatenate([at, np.full((new.sum(), 1), usual)], axis=-1)
        early = known & (born < t)[None]
        early[t + 1 :] = False
        if t > stretch:
            scene.R[t] = scene.R[t - 1] @ scene.R[t - 2].T @ scene.R[t - 1]  # continues the previous rotation
            scene.o[t] = 2 * scene.o[t - 1] - scene.o[t - 2]
            _adjust(scene, rays, early, focal, frames=slice(t, t + 1), points=False, steps=8)
        if t == T - 1 or (t > stretch and t % EVERY == 0):
            _adjust(scene, rays, early, focal, frames=slice(1, t + 1), points=True, steps=25 if t == T - 1 else 6)


def _stretch(known: np.ndarray) -> int:
    """The last of the first dozen frames that still shows half of the points of frame 0."""
    left = (known & known[:1]).sum(1)  # (T,)
    return int(np.flatnonzero(left[:13] >= left[0] / 2).max())


def _from_nothing(turning: _Scene, rays: np.ndarray) -> _Scene:
    """A static camera, with every point of frame 0 at the same distance."""
    b = np.concatenate([rays[0], np.ones((rays.shape[1], 1))], axis=-1)
    u = np.concatenate([b / np.linalg.norm(b, axis=-1, keepdims=True), np.full((len(b), 1), 0.5)], axis=-1)
    return _Scene(np.stack([np.eye(3)] * len(rays)), np.zeros((len(rays), 3)), u)


def _two_views(rays: np.ndarray, known: np.ndarray, focal: np.ndarray, last: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Candidate poses (R, o) of frame `last` relative to frame 0: from the essential matrix, and from the homography of a plane.

    A ground that fills the picture has two explanations (Faugeras and Lustman 1988), and the wrong one treats the sky as outliers.
    So all candidates are returned.
    """
    both = known[0] & known[last]
    a, b = rays[0, both], rays[last, both]
    poses = []
    E, _ = cv2.findEssentialMat(a, b, np.eye(3), method=cv2.RANSAC, prob=0.999, threshold=1 / focal[0])
    if E is not None:
        R1, R2, direction = cv2.decomposeEssentialMat(E[:3])
        R = max((R1, R2), key=np.trace)  # the smaller rotation
        poses += [(R, direction), (R, -direction)]
    H, _ = cv2.findHomography(a, b, cv2.RANSAC, 2 / focal[0])
    if H is not None:
        _, turns, travels, _ = cv2.decomposeHomographyMat(H, np.eye(3))
        poses += list(zip(turns, travels, strict=True))
    poses = [(R.T, -(R.T @ t)[:, 0]) for R, t in poses if np.isfinite(R).all() and np.linalg.norm(t) > 1e-9]
    return [(R, o / np.linalg.norm(o)) for R, o in poses] + _turn_then_travel(a, b, focal[0])


def _turn_then_travel(a: np.ndarray, b: np.ndarray, focal: float) -> list[tuple[np.ndarray, np.ndarray]]:
    """Poses (R, o) of a second view: rotations that many points share, as distant points do, each with the translation for the rest.

    Two points determine a rotation, and two more the direction of travel. Such small samples are likely to contain only distant points,
    only near points or only points of one moving object, unlike the five points of an essential matrix. a, b: (n, 2) rays.
    """
    n, rng = len(a), np.random.default_rng(0)
    if n < ENOUGH:
        return []
    a, b = (np.concatenate([x, np.ones((n, 1))], axis=-1) for x in (a, b))
    a, b = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (a, b))
    pairs = rng.permuted(np.tile(np.arange(n), (SAMPLES, 1)), axis=1)[:, :2]
    turns = _frame(*a[pairs].swapaxes(0, 1)) @ _frame(*b[pairs].swapaxes(0, 1)).swapaxes(1, 2)  # (s, 3, 3)
    near = np.linalg.norm(a - b @ turns.swapaxes(1, 2), axis=-1) * focal < 1  # (s, n)
    poses: list[tuple[np.ndarray, np.ndarray]] = []
    for i in np.argsort(-near.sum(1)):
        if any(np.trace(turns[i] @ R.T) > 3 - DISTINCT**2 for R, _ in poses):
            continue
        U, _, Vt = np.linalg.svd(a[near[i]].T @ b[near[i]])
        R = U @ np.diag([1, 1, np.linalg.det(U @ Vt)]) @ Vt
        moved = b @ R.T
        across = np.cross(moved, a)  # (n, 3) the translation is perpendicular to all of these
        parallax = np.flatnonzero(np.linalg.norm(across, axis=-1) * focal > 1)
        if len(parallax) < 2:
            continue
        i, j = parallax[rng.integers(len(parallax), size=(2, SAMPLES))]
        o = np.cross(across[i], across[j])
        o = o[np.linalg.norm(o, axis=-1) > 1e-12]
        o = np.concatenate([o, -o]) / np.linalg.norm(np.concatenate([o, o]), axis=-1, keepdims=True)  # (2s, 3)
        sine = np.linalg.norm(np.cross(a, o[:, None]), axis=-1).clip(1e-6)  # (2s, n) of the angle between a point and the travel
        beside = np.abs(o @ across.T) / sine * focal < 1
        away = (moved - a) @ o.T < ((moved * a).sum(-1) - 1)[:, None] * (a @ o.T)  # points move against the translation
        agree = beside & (away.T | (np.linalg.norm(across, axis=-1) * focal < 1))
        poses.append((R, o[agree.sum(1).argmax()]))
        if len(poses) == TURNS:
            break
    return poses


def _frame(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Right-handed axes (s, 3, 3), as columns, from two directions (s, 3)."""
    z = np.cross(x, y)
    z /= np.linalg.norm(z, axis=-1, keepdims=True).clip(1e-12)
    return np.stack([x, np.cross(z, x), z], axis=-1)


def _from_pose(rays: np.ndarray, known: np.ndarray, last: int, R: np.ndarray, o: np.ndarray) -> _Scene:
    """Uniform motion from frame 0 to a pose at frame `last`, and the points of frame 0, triangulated from these two views."""
    turn = cv2.Rodrigues(R)[0][:, 0]
    T, N = known.shape
    part = (np.arange(T) / last).clip(0, 1)
    u = np.concatenate([rays[0], np.ones((N, 1))], axis=-1)
    u /= np.linalg.norm(u, axis=-1, keepdims=True)
    seen = np.concatenate([rays[last], np.ones((N, 1))], axis=-1)
    across, along = np.cross(seen, u @ R), np.cross(seen, np.broadcast_to(o @ R, u.shape))  # seen x Rᵀ(u - ρ o) = 0
    distance = ((across * along).sum(-1) / np.square(along).sum(-1).clip(1e-9)).clip(0, 5)
    return _Scene(np.stack([cv2.Rodrigues(turn * s)[0] for s in part]), part[:, None] * o, np.concatenate([u, distance[:, None]], axis=-1))


def _placed(R: np.ndarray, o: np.ndarray, rays: np.ndarray, known: np.ndarray, focal: np.ndarray) -> _Scene:
    """A path with all points triangulated (smallest eigenvector of their linear equations), then adjusted. R (T, 3, 3), o (T, 3)."""
    o = o / np.linalg.norm(o, axis=-1).max().clip(1e-9)
    P = np.concatenate([R, -(o[:, None] @ R)], axis=1).transpose(0, 2, 1)  # (T, 3, 4) of Rᵀ(u - ρ o)
    A = P[:, None, :2] - rays[..., None] * P[:, None, 2:]  # (T, N, 2, 4)
    u = np.linalg.eigh(np.einsum("tnij,tnik->njk", A * known[..., None, None], A))[1][..., 0]  # (N, 4)
    u *= np.sign(np.einsum("tj,nj,tn->n", P[:, 2], u, known))[:, None]  # in front
    u /= np.linalg.norm(u[:, :3], axis=-1, keepdims=True).clip(1e-6)
    scene = _Scene(R.copy(), o, np.concatenate([u[:, :3], u[:, 3:].clip(min=0)], axis=-1))
    _adjust(scene, rays, known, focal, frames=slice(1, len(R)), points=True, steps=25)
    return scene


def _adjust(scene: _Scene, rays: np.ndarray, known: np.ndarray, focal: np.ndarray, frames: slice, points: bool, steps: int) -> None:
    """Levenberg-Marquardt on the poses of `frames`, and optionally on the points, in place. Points are eliminated (Schur complement)."""
    span = range(*frames.indices(len(scene.R)))
    rows = np.array([0, *span]) if points else np.array(span)  # frame 0 is fixed, but its observations of the points count
    use = known[rows].any(0)
    damping, previous = 1e-3, np.inf
    for _ in range(steps):
        part = _Scene(scene.R[rows], scene.o[rows], scene.u[use])
        r, weight = _residual(part, rays[rows][:, use], known[rows][:, use], focal[rows])
        cost = (weight[..., None] * r**2).sum()
        A, B = _jacobians(part, focal[rows])  # (t, n, 2, 6), (t, n, 2, 4)
        wA = weight[..., None, None] * A
        U = np.einsum("tnij,tnik->tjk", wA, A)
        gU = np.einsum("tnij,tni->tj", wA, r)
        U += damping * U.diagonal(axis1=1, axis2=2)[:, None] * np.eye(6) + 1e-9 * np.eye(6)
        t, n = len(rows), int(use.sum())
        S, g = np.zeros((t, 6, t, 6)), gU
        S[range(t), :, range(t)] = U
        if points:
            V = np.einsum("tnij,tnik->njk", weight[..., None, None] * B, B)
            V += damping * V.diagonal(axis1=1, axis2=2)[:, None] * np.eye(4) + 1e-6 * np.eye(4)
            gV = np.einsum("tnij,tni->nj", weight[..., None, None] * B, r)
            C = np.einsum("tnij,tnik->tjnk", wA, B)  # (t, 6, n, 4)
            inverse = np.linalg.inv(V)
            D = np.einsum("tjnk,nkl->tjnl", C, inverse)
            S -= (D.reshape(6 * t, 4 * n) @ C.reshape(6 * t, 4 * n).T).reshape(t, 6, t, 6)
            g = gU - np.einsum("tjnl,nl->tj", D, gV)
        free = slice(1, None) if points else slice(None)
        count = 6 * (t - 1 if points else t)
        step = np.zeros((t, 6))
        step[free] = -np.linalg.lstsq(S[free][:, :, free].reshape(count, count), g[free].reshape(-1), rcond=None)[0].reshape(-1, 6)
        step = step.clip(-0.3, 0.3)
        trial = _Scene(np.stack([R @ cv2.Rodrigues(s[:3])[0] for R, s in zip(part.R, step, strict=True)]), part.o + step[:, 3:], part.u)
        if points:
            trial.u = part.u - np.einsum("nkl,nl->nk", inverse, gV + np.einsum("tjnk,tj->nk", C, step))
            trial.u = trial.u / np.linalg.norm(trial.u[:, :3], axis=-1, keepdims=True).clip(1e-6)
            trial.u[:, 3] = trial.u[:, 3].clip(min=0)  # no inverse distance below 0; otherwise a sideways move could pass for a pan
        after, _ = _residual(trial, rays[rows][:, use], known[rows][:, use], focal[rows])
        if (weight[..., None] * after**2).sum() < cost:
            scene.R[rows], scene.o[rows], scene.u[use] = trial.R, trial.o, trial.u
            damping = max(damping / 5, 1e-9)
            if previous - cost < 1e-6 * cost and abs(previous) < np.inf:
                break
            previous = cost
        else:
            damping = min(damping * 10, 1e6)


def _residual(scene: _Scene, rays: np.ndarray, known: np.ndarray, focal: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each point's distance in pixels from its observation (t, n, 2), and the observation's Geman-McClure weight (t, n)."""
    p = scene.seen()
    r = (p[..., :2] / p[..., 2:].clip(1e-2) - rays) * focal[:, None, None]
    gap = np.linalg.norm(r, axis=-1)
    scale = 2 * np.median(gap[known]) + 0.1 if known.any() else 1.0
    return r, known * (p[..., 2] > 1e-2) / (1 + (gap / scale) ** 2) ** 2


def _jacobians(scene: _Scene, focal: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """d pixel / d pose (t, n, 2, 6): rotation in the camera's own axes, then position; d pixel / d point (t, n, 2, 4)."""
    p, (t, n) = scene.seen(), (len(scene.R), len(scene.u))
    z = p[..., 2].clip(1e-2)
    zero = np.zeros_like(z)
    flat = np.stack([np.stack([1 / z, zero, -p[..., 0] / z**2], -1), np.stack([zero, 1 / z, -p[..., 1] / z**2], -1)], -2)
    flat = flat * focal[:, None, None, None]  # (t, n, 2, 3) d pixel / d p
    x, y, w = p[..., 0], p[..., 1], p[..., 2]
    cross = np.stack([np.stack([zero, -w, y], -1), np.stack([w, zero, -x], -1), np.stack([-y, x, zero], -1)], -2)  # p × δ
    Rᵀ = scene.R.transpose(0, 2, 1)
    by_direction = flat @ Rᵀ[:, None]  # (t, n, 2, 3)
    by_position = -scene.u[None, :, 3, None, None] * by_direction
    by_distance = -(by_direction @ scene.o[:, None, :, None])  # (t, n, 2, 1)
    return np.concatenate([flat @ cross, by_position], -1), np.concatenate([by_direction, by_distance], -1).reshape(t, n, 2, 4)


def _gap(scene: _Scene, rays: np.ndarray, focal: np.ndarray) -> np.ndarray:
    p = scene.seen()
    return np.linalg.norm((p[..., :2] / p[..., 2:].clip(1e-2) - rays) * focal[:, None, None], axis=-1)
