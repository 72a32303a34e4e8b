"""Estimates the camera's path from the frames of a small-world clip.

The world fixes the first camera (height, pitch, focal length), so a pose determines the inverse depth of every pixel: the ground is a
plane and the sky is at infinity. Each frame is aligned, pixel by pixel, to a few earlier frames with known poses: robust Gauss-Newton over
rotation, position and focal length, seven numbers per frame. There are no features and no scale ambiguity. Moving objects are masked by
their colour, and whatever the mask misses is treated as outliers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kling.cameras.trajectory import Trajectory
from kling.metrics.segment import grown, segment

# A frame is aligned to the frames this many before it, and to frame 0: near ones for robustness, far ones against drift.
REFERENCES = (1, 4, 12)
BLUR = 1.0  # gaussian sigma in pixels: what a grid of every `STRIDE`th pixel can represent
STRIDE = 2
BORDER = 2  # pixels
ITERATIONS = 12
ENOUGH = 3e-5  # a pose has converged when its step (radians, metres, log focal) is smaller
PRIOR = 0.02  # standard deviation (same units) from constant velocity: fixes what a picture leaves undetermined
NOISE = 0.002  # brightness: minimum scale of the residual
MIN_CORRELATION = 0.5  # of a frame with its prediction from the one before; below it the frame is not registered
MIN_SEEN = 0.1  # share of a reference's pixels that must stay in view


@dataclass(frozen=True)
class Stage:
    """What is known of every scene in advance."""

    start: Tensor  # (3, 4) world pose of the first camera: y down, ground at y = 0
    focal: float  # its focal length in units of sqrt(H * W) pixels
    haze: float  # brightness of very distant ground
    haze_distance: float  # metres of depth over which contrast falls to 1/e
    palette: Mapping[str, tuple[float, float, float]]  # colours of the objects that may move


@dataclass(frozen=True)
class AlignedPath:
    """The estimated camera path."""

    trajectory: Trajectory  # relative to frame 0
    correlation: Tensor  # (T,) of each frame with its prediction from the frame before; 1 at frame 0, 0 after the first lost frame

    @property
    def registered(self) -> Tensor:
        """(T,) bool: frames with a reliable pose, up to the first one without."""
        return (self.correlation > MIN_CORRELATION).long().cumprod(0).bool()


@dataclass(frozen=True)
class _Pose:
    R: Tensor  # (3, 3) camera to world
    o: Tensor  # (3,) metres
    zoom: Tensor  # () log of the focal length over the first frame's

    def moved(self, step: Tensor) -> _Pose:
        """Rotate by step[:3] and translate by step[3:6], both in the camera's own axes, and change the log focal length by step[6]."""
        return _Pose(self.R @ torch.linalg.matrix_exp(_cross(step[:3])), self.o + self.R @ step[3:6], self.zoom + step[6])

    def step_to(self, other: _Pose) -> Tensor:
        """The step (7,) that leads from this pose to a nearby one."""
        turn = self.R.T @ other.R
        w = torch.stack([turn[2, 1] - turn[1, 2], turn[0, 2] - turn[2, 0], turn[1, 0] - turn[0, 1]]) / 2
        return torch.cat([w, self.R.T @ (other.o - self.o), (other.zoom - self.zoom)[None]])


@dataclass(frozen=True)
class _Anchor:
    """Grid pixels of a frame with a known pose."""

    d: Tensor  # (n, 3) ray in world axes, of depth 1 in its own camera
    w: Tensor  # (n,) inverse depth, 0 in the sky
    o: Tensor  # (3,) position of the camera
    value: Tensor  # (n,) brightness
    solid: Tensor  # (n,) bool: not a moving object


def estimate_trajectory(video: Tensor, stage: Stage) -> AlignedPath:
    """Estimate the camera path of a clip (T, H, W, 3) uint8."""
    T, H, W, _ = video.shape
    moving = grown(segment(video, stage.palette)[1] > 0, 4)
    maps = _maps(video.float().mean(-1) / 255, moving)  # (T, 4, H, W)
    f0 = stage.focal * (H * W) ** 0.5
    start = stage.start.double()
    poses = [_Pose(start[:, :3], start[:, 3], torch.zeros((), dtype=torch.float64))]
    anchors = [_anchor(poses[0], maps[0], f0)]
    correlation = torch.ones(T)
    velocity = torch.zeros(7, dtype=torch.float64)
    for t in range(1, T):
        near = [anchors[i] for i in sorted({0, *(t - k for k in REFERENCES if k <= t)}, reverse=True)]
        pose, correlation[t] = _aligned(poses[-1].moved(velocity), near, maps[t], f0, stage)
        if correlation[t] <= MIN_CORRELATION:  # lost, and so are all later frames
            correlation[t:] = 0
            poses += [poses[-1]] * (T - t)
            break
        velocity = poses[-1].step_to(pose)
        poses.append(pose)
        anchors.append(_anchor(pose, maps[t], f0))
    return AlignedPath(_trajectory(poses, stage.focal, H, W), correlation)


def _aligned(guess: _Pose, anchors: list[_Anchor], frame: Tensor, f0: float, stage: Stage) -> tuple[_Pose, Tensor]:
    """The pose near `guess` that aligns `frame` (4, H, W) with its anchors, and its correlation with the first of them."""
    d, w, o, value = (torch.stack([getattr(a, name) for a in anchors]) for name in ("d", "w", "o", "value"))  # (r, n, …)
    solid = torch.stack([a.solid for a in anchors])  # (r, n)
    pose, away = guess, torch.zeros(7, dtype=torch.float64)  # away: distance from the guess, for the prior
    for _ in range(ITERATIONS):
        x = ((d + w[..., None] * (o[:, None] - pose.o)) @ pose.R).float()  # (r, n, 3) times inverse depth, so finite in the sky too
        z, f = x[..., 2].clamp(min=1e-3), float(f0 * pose.zoom.exp())
        seen, inside = _sampled(frame, f * x[..., 0] / z, f * x[..., 1] / z)  # (4, r, n), (r, n)
        valid = inside & (x[..., 2] > 1e-3) & solid & (seen[3] > 0.5)
        nearer = ((1 - x[..., 2]) / (stage.haze_distance * w.float()).clamp(min=1e-4)).clamp(-1, 1) * (w > 0)  # in haze distances
        expected = stage.haze + (value - stage.haze) * nearer.exp()
        error = seen[0] - expected
        scale = torch.where(valid, error.abs(), torch.nan).nanmedian(dim=1, keepdim=True).values.nan_to_num(1.0) * 1.5 + NOISE  # (r, 1)
        weight = valid / (1 + (error / (2 * scale)) ** 2) ** 2 / scale**2  # Geman-McClure
        gx, gy = seen[1] * f / z, seen[2] * f / z
        a = torch.stack([gx, gy, -(gx * x[..., 0] + gy * x[..., 1]) / z], dim=-1)  # (r, n, 3) d brightness / d point
        J = torch.cat([torch.linalg.cross(a, x), -w.float()[..., None] * a, -(a[..., 2] * z)[..., None]], dim=-1).flatten(0, 1)  # (rn, 7)
        A = ((weight.view(-1, 1) * J).T @ J).double() + torch.eye(7) / PRIOR**2
        b = -((weight * error).view(-1) @ J).double() - away / PRIOR**2
        step = torch.linalg.solve(A, b).clamp(-0.1, 0.1)
        pose, away = pose.moved(step), away + step
        if float(step.abs().max()) < ENOUGH:
            break
    return pose, _correlation(seen[0, 0], expected[0], valid[0])


def _sampled(frame: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """`frame` (c, H, W) at u, v pixels from its centre (r, n): values (c, r, n), and whether they are inside its border."""
    H, W = frame.shape[1:]
    grid = torch.stack([2 * u / W, 2 * v / H], dim=-1)[None]  # (1, r, n, 2)
    seen = F.grid_sample(frame[None], grid, mode="bicubic", padding_mode="border", align_corners=False)[0]
    return seen, (u.abs() < W / 2 - BORDER) & (v.abs() < H / 2 - BORDER)


def _anchor(pose: _Pose, frame: Tensor, f0: float) -> _Anchor:
    """The grid pixels of `frame` (4, H, W), projected from its pose onto the ground and the sky."""
    H, W = frame.shape[1:]
    rows, columns = torch.arange(BORDER, H - BORDER, STRIDE), torch.arange(BORDER, W - BORDER, STRIDE)
    v, u = torch.meshgrid(rows + 0.5 - H / 2, columns + 0.5 - W / 2, indexing="ij")
    f = float(f0 * pose.zoom.exp())
    d = torch.stack([u / f, v / f, torch.ones_like(u)], dim=-1).flatten(0, 1).double() @ pose.R.T  # (n, 3)
    w = (d[:, 1] / -pose.o[1].clamp(max=-0.05)).clamp(min=0)
    value, solid = (frame[i][rows][:, columns].flatten() for i in (0, 3))
    return _Anchor(d, w, pose.o, value, solid > 0.5)


def _correlation(a: Tensor, b: Tensor, valid: Tensor) -> Tensor:
    if valid.float().mean() < MIN_SEEN:
        return torch.zeros(())
    return torch.corrcoef(torch.stack([a[valid], b[valid]]))[0, 1].nan_to_num()


def _maps(grey: Tensor, moving: Tensor) -> Tensor:
    """Per frame (T, 4, H, W): smoothed brightness, its slopes per pixel along x and y, and 1 where nothing moves."""
    n = int(3 * BLUR + 0.5)
    k = torch.exp(-(torch.arange(-n, n + 1) ** 2) / (2 * BLUR**2))
    k = k / k.sum()
    x = F.pad(grey[:, None], (n, n, n, n), mode="replicate")
    smooth = F.conv2d(F.conv2d(x, k.view(1, 1, 1, -1)), k.view(1, 1, -1, 1))  # (T, 1, H, W)
    x = F.pad(smooth, (1, 1, 1, 1), mode="replicate")
    slope_x, slope_y = (x[..., 1:-1, 2:] - x[..., 1:-1, :-2]) / 2, (x[..., 2:, 1:-1] - x[..., :-2, 1:-1]) / 2
    return torch.cat([smooth, slope_x, slope_y, (~moving)[:, None].float()], dim=1)


def _trajectory(poses: list[_Pose], focal: float, H: int, W: int) -> Trajectory:
    c2w = torch.stack([torch.cat([p.R, p.o[:, None]], dim=1) for p in poses])  # (T, 3, 4)
    f = focal * (H * W) ** 0.5 * torch.stack([p.zoom for p in poses]).exp()
    half = torch.full_like(f, 0.5)
    relative = Trajectory(c2w, torch.stack([f / W, f / H, half, half], dim=1)).relative()
    return Trajectory(relative.c2w.float(), relative.intrinsics.float())


def _cross(w: Tensor) -> Tensor:
    """The matrix (3, 3) of the cross product with w."""
    zero = torch.zeros_like(w[0])
    return torch.stack([zero, -w[2], w[1], w[2], zero, -w[0], -w[1], w[0], zero]).view(3, 3)
