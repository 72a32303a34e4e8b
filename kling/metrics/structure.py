"""The camera's path in any video, from points that are followed through it: no network, no knowledge of the scene.

Corners are tracked (KLT, forward and back). A camera that only turns is tried first; then bundle adjustment over turns, positions and
points, started from the essential matrix, from a plane's homography and from nothing. The simpler model stands unless the other explains
clearly more.
Points are homogeneous, (direction, inverse distance), so those at infinity are points like any other, and the start from nothing needs
no depth (Yu and Gallup, "3D reconstruction from accidental motion", 2014).
Positions are known up to one scale, which `translation_error` takes out.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor

from kling.condition.camera import Trajectory

SHORT_SIDE = 256  # pixels; smaller pictures are enlarged before corners are sought
CORNERS = 250  # followed at once
QUALITY = 3e-4  # of the strongest corner; a bright thing on a soft ground must not hide it
RETURN = 0.5  # pixels of the enlarged picture that a point may miss its start by, followed there and back
ENOUGH = 12  # points that fix a pose
AGREE, SHARE = 2.0, 0.5  # a pose is found where this share of its points lies within so many enlarged pixels
EVERY = 4  # frames between two adjustments of everything
PERFECT = 0.2  # pixels: a turning camera that leaves no more needs no rival
BETTER = 2.0  # times the error that a turning camera may leave and still be believed


@dataclass(frozen=True)
class Structure:
    """A path and how far to believe it."""

    trajectory: Trajectory  # relative to frame 0; intrinsics as given
    found: Tensor  # (T,) bool; it ends at the first frame whose pose was not found
    model: str  # "turning" or "moving"
    error: float  # pixels: upper quartile of the distance between points and where the model puts them


@dataclass
class _Scene:
    """Poses and points. Point n is seen from pose t at the direction Rᵀ(u - ρ o): linear in all but R."""

    R: np.ndarray  # (T, 3, 3) camera to world
    o: np.ndarray  # (T, 3)
    u: np.ndarray  # (N, 4) direction and inverse distance of each point, from frame 0

    def seen(self) -> np.ndarray:
        """(T, N, 3) every point in every camera."""
        return np.einsum("tji,tnj->tni", self.R, self.u[None, :, :3] - self.u[None, :, 3:] * self.o[:, None])


def estimate_structure(video: Tensor, intrinsics: Tensor) -> Structure:
    """The path of a clip (T, H, W, 3) uint8 whose intrinsics (T, 4), normalised by width and height, are known."""
    T, H, W, _ = video.shape
    scale = max(1, round(SHORT_SIDE / min(H, W)))
    K = intrinsics.double().numpy()
    xy = _tracks(video, scale) / [W * scale, H * scale]  # (T, N, 2), nan where a point is not seen
    rays = (xy - K[:, None, 2:]) / K[:, None, :2]  # (T, N, 2) on the plane z = 1
    focal = K[:, 0] * W * scale  # (T,) enlarged pixels
    known = ~np.isnan(rays[..., 0])  # (T, N)
    rays = np.nan_to_num(rays)
    turning = _turned(rays, known, focal)
    model, best, errors = "turning", turning, _errors(turning, rays, known, focal)
    if errors[1] > PERFECT * scale:
        moving = _moved(turning, rays, known, focal)
        others = _errors(moving, rays, known, focal)
        if (errors > BETTER * others + 0.1 * scale).any():
            model, best, errors = "moving", moving, others
    error = float(errors[1])
    good = ((_gap(best, rays, focal) < AGREE * min(max(1.0, error), scale)) & known).sum(1)
    found = (good >= ENOUGH) & (good >= SHARE * known.sum(1))
    found[0] = True
    c2w = torch.from_numpy(np.concatenate([best.R, best.o[..., None]], axis=-1)).float()
    return Structure(Trajectory(c2w, intrinsics), torch.from_numpy(np.cumprod(found).astype(bool)), model, error / scale)


def _tracks(video: Tensor, scale: int) -> np.ndarray:
    """Pixel positions (T, N, 2) in the enlarged picture, pixel centres at +0.5; nan before a point appears and after it is lost."""
    T, H, W, _ = video.shape
    greys = [cv2.resize(cv2.cvtColor(f, cv2.COLOR_RGB2GRAY), (W * scale, H * scale), interpolation=cv2.INTER_CUBIC) for f in video.numpy()]
    paths: list[np.ndarray] = []  # each (T, 2)
    alive: list[int] = []
    options = {"winSize": (21, 21), "maxLevel": 3, "criteria": (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 30, 0.003)}
    for t, grey in enumerate(greys):
        if alive:
            before = np.stack([paths[i][t - 1] for i in alive]).astype(np.float32)[:, None]
            after, ok, _ = cv2.calcOpticalFlowPyrLK(greys[t - 1], grey, before, None, **options)
            back, ok_back, _ = cv2.calcOpticalFlowPyrLK(grey, greys[t - 1], after, None, **options)
            kept = (ok & ok_back)[:, 0].astype(bool) & (np.linalg.norm(back - before, axis=-1)[:, 0] < RETURN)
            kept &= ((after[:, 0] > 2) & (after[:, 0] < np.array([W, H]) * scale - 3)).all(-1)
            for i, place in zip(alive, after[:, 0], strict=True):
                paths[i][t] = place
            for i in (i for i, k in zip(alive, kept, strict=True) if not k):
                paths[i][t] = np.nan
            alive = [i for i, k in zip(alive, kept, strict=True) if k]
        free = np.full(grey.shape, 255, np.uint8)
        for i in alive:
            cv2.circle(free, tuple(int(x) for x in paths[i][t]), 6, 0, -1)
        corners = cv2.goodFeaturesToTrack(grey, max(1, CORNERS - len(alive)), QUALITY, 6, mask=free) if len(alive) < CORNERS else None
        for corner in [] if corners is None else corners[:, 0]:
            paths.append(np.full((T, 2), np.nan))
            paths[-1][t] = corner
            alive.append(len(paths) - 1)
    seen_often = [p for p in paths if np.isfinite(p[:, 0]).sum() >= 3]
    return np.stack(seen_often, axis=1) + 0.5 if seen_often else np.full((T, 0, 2), np.nan)


def _turned(rays: np.ndarray, known: np.ndarray, focal: np.ndarray) -> _Scene:
    """A camera that only turns: each frame's rotation from points whose direction earlier frames fixed (Kabsch, reweighted)."""
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
    """Poses and points together: a first stretch from two starts, of which the better goes on, frame by frame."""
    T, N = known.shape
    born = np.where(known.any(0), known.argmax(0), T)  # (N,) frame in which a point is first seen
    stretch = _stretch(known)
    if (born == 0).sum() < ENOUGH or stretch < 2:
        return turning
    opening = known & (born == 0)[None]
    opening[stretch + 1 :] = False
    starts = [_from_pose(rays, known, stretch, R, o) for R, o in _two_views(rays, opening, focal, stretch)] + [_from_nothing(turning, rays)]
    for start in starts:
        _adjust(start, rays, opening, focal, frames=slice(1, stretch + 1), points=True, steps=8)
    gaps = [_gap(start, rays, focal)[opening] for start in starts]
    most = 4 * min(np.median(gap) for gap in gaps)  # what fits nothing, as things that move, counts so much and no more
    scene = starts[int(np.argmin([np.minimum(gap, most).mean() for gap in gaps]))]
    _adjust(scene, rays, opening, focal, frames=slice(1, stretch + 1), points=True, steps=25)
    for t in range(1, T):
        new = born == t - 1 if t > 1 else born < 0
        if new.any():  # consistent with their first sight, at the usual distance
            ray = np.concatenate([rays[t - 1, new], np.ones((new.sum(), 1))], axis=-1)
            usual = np.median(scene.u[born < t - 1, 3])
            at = ray / np.linalg.norm(ray, axis=-1, keepdims=True) @ scene.R[t - 1].T + usual * scene.o[t - 1]
            scene.u[new] = np.concatenate([at, np.full((new.sum(), 1), usual)], axis=-1)
        early = known & (born < t)[None]
        early[t + 1 :] = False
        if t > stretch:
            scene.R[t] = scene.R[t - 1] @ scene.R[t - 2].T @ scene.R[t - 1]  # goes on as it went
            scene.o[t] = 2 * scene.o[t - 1] - scene.o[t - 2]
            _adjust(scene, rays, early, focal, frames=slice(t, t + 1), points=False, steps=8)
        if t == T - 1 or (t > stretch and t % EVERY == 0):
            _adjust(scene, rays, early, focal, frames=slice(1, t + 1), points=True, steps=25 if t == T - 1 else 6)
    return scene


def _stretch(known: np.ndarray) -> int:
    """The last frame, of the first dozen, that still shows half of the points of frame 0."""
    left = (known & known[:1]).sum(1)  # (T,)
    return int(np.flatnonzero(left[:13] >= left[0] / 2).max())


def _from_nothing(turning: _Scene, rays: np.ndarray) -> _Scene:
    """A camera that stands still, and every point of frame 0 at the same distance."""
    b = np.concatenate([rays[0], np.ones((rays.shape[1], 1))], axis=-1)
    u = np.concatenate([b / np.linalg.norm(b, axis=-1, keepdims=True), np.full((len(b), 1), 0.5)], axis=-1)
    return _Scene(np.stack([np.eye(3)] * len(rays)), np.zeros((len(rays), 3)), u)


def _two_views(rays: np.ndarray, known: np.ndarray, focal: np.ndarray, last: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Where the camera may be at frame `last`, as (R, o) seen from frame 0: by the essential matrix, and by the homography of a plane.

    A ground that fills the picture has two explanations (Faugeras and Lustman 1988), and the wrong one takes the sky for outliers.
    So all are given.
    """
    both = known[0] & known[last]
    a, b = rays[0, both], rays[last, both]
    poses = []
    E, _ = cv2.findEssentialMat(a, b, np.eye(3), method=cv2.RANSAC, prob=0.999, threshold=1 / focal[0])
    if E is not None:
        R1, R2, direction = cv2.decomposeEssentialMat(E[:3])
        R = max((R1, R2), key=np.trace)  # the smaller turn
        poses += [(R, direction), (R, -direction)]
    H, _ = cv2.findHomography(a, b, cv2.RANSAC, 2 / focal[0])
    if H is not None:
        _, turns, travels, _ = cv2.decomposeHomographyMat(H, np.eye(3))
        poses += list(zip(turns, travels, strict=True))
    poses = [(R.T, -(R.T @ t)[:, 0]) for R, t in poses if np.isfinite(R).all() and np.linalg.norm(t) > 1e-9]
    return [(R, o / np.linalg.norm(o)) for R, o in poses]


def _from_pose(rays: np.ndarray, known: np.ndarray, last: int, R: np.ndarray, o: np.ndarray) -> _Scene:
    """Even motion from frame 0 to a pose at frame `last`, and the points of frame 0 where their two sights meet."""
    turn = cv2.Rodrigues(R)[0][:, 0]
    T, N = known.shape
    part = (np.arange(T) / last).clip(0, 1)
    u = np.concatenate([rays[0], np.ones((N, 1))], axis=-1)
    u /= np.linalg.norm(u, axis=-1, keepdims=True)
    seen = np.concatenate([rays[last], np.ones((N, 1))], axis=-1)
    across, along = np.cross(seen, u @ R), np.cross(seen, np.broadcast_to(o @ R, u.shape))  # seen x Rᵀ(u - ρ o) = 0
    distance = ((across * along).sum(-1) / np.square(along).sum(-1).clip(1e-9)).clip(0, 5)
    return _Scene(np.stack([cv2.Rodrigues(turn * s)[0] for s in part]), part[:, None] * o, np.concatenate([u, distance[:, None]], axis=-1))


def _adjust(scene: _Scene, rays: np.ndarray, known: np.ndarray, focal: np.ndarray, frames: slice, points: bool, steps: int) -> None:
    """Levenberg-Marquardt on the poses of `frames`, and the points if asked, in place. Points are eliminated (Schur complement)."""
    span = range(*frames.indices(len(scene.R)))
    rows = np.array([0, *span]) if points else np.array(span)  # frame 0 stands still but its sight of the points counts
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
            trial.u[:, 3] = trial.u[:, 3].clip(min=0)  # nothing lies beyond infinity; without this a truck passes for a pan
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
    """Pixels by which each point misses its sight (t, n, 2), and how much that sight weighs (t, n): Geman-McClure."""
    p = scene.seen()
    r = (p[..., :2] / p[..., 2:].clip(1e-2) - rays) * focal[:, None, None]
    gap = np.linalg.norm(r, axis=-1)
    scale = 2 * np.median(gap[known]) + 0.1 if known.any() else 1.0
    return r, known * (p[..., 2] > 1e-2) / (1 + (gap / scale) ** 2) ** 2


def _jacobians(scene: _Scene, focal: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """d pixel / d pose (t, n, 2, 6): turn in the camera's own axes, then position; d pixel / d point (t, n, 2, 4)."""
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


def _errors(scene: _Scene, rays: np.ndarray, known: np.ndarray, focal: np.ndarray) -> np.ndarray:
    """Median and upper quartile of the distance of points from where the model puts them, in enlarged pixels: (2,)."""
    gap = _gap(scene, rays, focal)[known]
    return np.quantile(gap, [0.5, 0.75]) if len(gap) else np.full(2, np.inf)
