"""The camera's path, read from the frames of a small-world clip.

The world fixes its first camera (height, pitch, focal length), so every pixel's inverse depth is known once the pose is: the ground is a plane and
the sky lies at infinity. Each frame is then aligned, pixel by pixel, to a few earlier ones whose pose is already known: robust Gauss-Newton over
rotation, position and focal length (7 numbers a frame), with moving things rejected as outliers. No features, no scale ambiguity.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kling.condition.camera import Trajectory

REFERENCES = (1, 4, 12)  # a frame is aligned to the ones this many before it: the nearest for safety, the far ones against drift
BLURS = (1.5, 0.0)  # coarse to fine: gaussian sigma in pixels
ITERATIONS = (6, 8)
import os
CONTRAST_SIGMA = float(os.environ.get('CS',4))
CONTRAST_FLOOR = float(os.environ.get('CF',.02))
PIXELS = 2400  # of a reference frame, those with the strongest gradients
MIN_CORRELATION = 0.5  # of a frame with its prediction from the one before; below it the frame is not registered


@dataclass(frozen=True)
class Estimate:
    """What the frames say about the camera."""

    trajectory: Trajectory  # relative to frame 0
    correlation: Tensor  # (T,) of each frame with its prediction from the frame before; 1 at frame 0

    @property
    def registered(self) -> Tensor:
        """(T,) bool: the frames whose pose can be believed."""
        return (self.correlation > MIN_CORRELATION).long().cumprod(0).bool()


@dataclass
class _Pose:
    R: Tensor  # (3, 3) camera to world
    o: Tensor  # (3,) metres
    zoom: Tensor  # log of the focal length over the first frame's

    def moved(self, step: Tensor) -> _Pose:
        """Turn by step[:3] and travel by step[3:6], in the camera's own axes; lengthen the focal by step[6]."""
        turn = torch.linalg.matrix_exp(_cross(step[:3]))
        return _Pose(self.R @ turn, self.o + self.R @ step[3:6], self.zoom + step[6])


@dataclass(frozen=True)
class _Reference:
    """The pixels of a frame with a known pose: world direction, inverse depth and brightness at every blur."""

    d: Tensor  # (n, 3), third component 1 in that frame's camera
    w: Tensor  # (n,) 1 / depth, 0 in the sky
    o: Tensor  # (3,)
    value: list[Tensor]  # one (n,) a blur


def estimate_trajectory(video: Tensor, start: Tensor, focal: float, moving: Tensor | None = None) -> Estimate:
    """The camera of a clip (T, H, W, 3) uint8.

    start: (3, 4) world pose of frame 0, y down, ground at y = 0. focal: its focal length in units of sqrt(H * W) pixels.
    """
    T, H, W, _ = video.shape
    grey = video.double().mean(-1) / 255  # (T, H, W)
    f0 = focal * (H * W) ** 0.5
    poses = [_Pose(start[:, :3].double(), start[:, 3].double(), torch.zeros((), dtype=torch.float64))]
    still = torch.ones(T, H, W) if moving is None else (~moving).float()
    levels = [_with_gradients(_blurred(_normalised(grey, still), sigma)) for sigma in BLURS]  # each (T, 3, H, W)
    references = [_reference(poses[0], [level[0] for level in levels], still[0], f0)]
    correlation = torch.ones(T)
    step = torch.zeros(7, dtype=torch.float64)
    for t in range(1, T):
        near = [references[t - k] for k in REFERENCES if k <= t]
        pose = poses[-1].moved(step)  # constant velocity
        for i, level in enumerate(levels):
            for _ in range(ITERATIONS[i]):
                pose, moved = _improved(pose, near, level[t], i, f0)
                if moved < 1e-5:
                    break
        correlation[t] = _correlation(pose, near[0], levels[-1][t], f0)
        step = _step(poses[-1], pose)
        poses.append(pose)
        references.append(_reference(pose, [level[t] for level in levels], still[t], f0))
    return Estimate(_trajectory(poses, focal, H, W), correlation)


def _improved(pose: _Pose, references: list[_Reference], frame: Tensor, level: int, f0: float) -> tuple[_Pose, float]:
    """One Gauss-Newton step of a pose towards agreement of `frame` (3, H, W) with its references; the largest entry of the step with it."""
    A, b = 1e-6 * torch.eye(7, dtype=torch.float64), torch.zeros(7, dtype=torch.float64)
    for reference in references:
        seen, x, inside = _project(pose, reference, frame, f0)
        error = seen[0] - reference.value[level]
        scale = 1.5 * error[inside].abs().median() + 0.02 if inside.any() else 1.0
        weight = inside / (1 + (error / (2 * scale)) ** 2) ** 2 / scale**2  # Geman-McClure
        f = f0 * pose.zoom.exp()
        gx, gy = seen[1] * f / x[:, 2], seen[2] * f / x[:, 2]
        a = torch.stack([gx, gy, -(gx * x[:, 0] + gy * x[:, 1]) / x[:, 2]], dim=1)  # d brightness / d point
        J = torch.cat([torch.linalg.cross(a, x), -reference.w[:, None] * a, -(a[:, 2] * x[:, 2])[:, None]], dim=1)  # (n, 7)
        A += J.T @ (weight[:, None] * J)
        b -= J.T @ (weight * error)
    step = torch.linalg.solve(A, b).clamp(-0.2, 0.2)
    return pose.moved(step), float(step.abs().max())


def _project(pose: _Pose, reference: _Reference, frame: Tensor, f0: float) -> tuple[Tensor, Tensor, Tensor]:
    """Where a reference's pixels are in `frame` (3, H, W): brightness and gradients there (3, n), points in the camera (n, 3), visible (n,)."""
    H, W = frame.shape[1:]
    x = (reference.d + reference.w[:, None] * (reference.o - pose.o)) @ pose.R  # (n, 3), scaled by the inverse depth: finite in the sky
    z = x[:, 2].clamp(min=1e-3)
    f = f0 * pose.zoom.exp()
    u, v = f * x[:, 0] / z, f * x[:, 1] / z  # pixels from the centre
    inside = (x[:, 2] > 1e-3) & (u.abs() < W / 2 - 1) & (v.abs() < H / 2 - 1)
    grid = torch.stack([2 * u / W, 2 * v / H], dim=-1)[None, None]  # (1, 1, n, 2)
    seen = F.grid_sample(frame[None], grid, mode="bicubic", padding_mode="border", align_corners=False)[0, :, 0]
    return seen, torch.cat([x[:, :2], z[:, None]], dim=1), inside


def _reference(pose: _Pose, frames: list[Tensor], still: Tensor, f0: float) -> _Reference:
    H, W = frames[0].shape[1:]
    v, u = torch.meshgrid(torch.arange(H) + 0.5 - H / 2, torch.arange(W) + 0.5 - W / 2, indexing="ij")
    border = (u.abs() < W / 2 - 1) & (v.abs() < H / 2 - 1)
    strength = (frames[0][1].square() + frames[0][2].square()) * border * still
    chosen = strength.flatten().topk(min(PIXELS, H * W)).indices
    f = f0 * pose.zoom.exp()
    rays = torch.stack([u / f, v / f, torch.ones_like(u)], dim=-1).flatten(0, 1)[chosen].double()  # (n, 3)
    d = rays @ pose.R.T
    w = (d[:, 1] / -pose.o[1].clamp(max=-0.05)).clamp(min=0)
    return _Reference(d, w, pose.o, [frame[0].flatten()[chosen] for frame in frames])


def _correlation(pose: _Pose, reference: _Reference, frame: Tensor, f0: float) -> Tensor:
    seen, _, inside = _project(pose, reference, frame, f0)
    if int(inside.sum()) < 50:
        return torch.zeros(())
    return torch.corrcoef(torch.stack([seen[0][inside], reference.value[-1][inside]]))[0, 1].nan_to_num().float()


def _step(a: _Pose, b: _Pose) -> Tensor:
    """The step that takes pose a to pose b (small turns)."""
    turn = a.R.T @ b.R
    w = torch.stack([turn[2, 1] - turn[1, 2], turn[0, 2] - turn[2, 0], turn[1, 0] - turn[0, 1]]) / 2
    return torch.cat([w, a.R.T @ (b.o - a.o), (b.zoom - a.zoom)[None]])


def _trajectory(poses: list[_Pose], focal: float, H: int, W: int) -> Trajectory:
    c2w = torch.stack([torch.cat([p.R, p.o[:, None]], dim=1) for p in poses])
    f = focal * (H * W) ** 0.5 * torch.stack([p.zoom for p in poses]).exp()
    half = torch.full_like(f, 0.5)
    return Trajectory(c2w, torch.stack([f / W, f / H, half, half], dim=1)).relative()


def _cross(w: Tensor) -> Tensor:
    zero = torch.zeros_like(w[0])
    return torch.stack([zero, -w[2], w[1], w[2], zero, -w[0], -w[1], w[0], zero]).view(3, 3)


def _normalised(grey: Tensor, still: Tensor) -> Tensor:
    """(T, H, W) with its local mean removed and its local contrast evened out: haze and distance change both, and are no motion."""
    share = _blurred(still.double(), CONTRAST_SIGMA) + 1e-3
    mean = _blurred(grey * still, CONTRAST_SIGMA) / share
    rest = grey - mean
    spread = (_blurred(rest.square() * still, CONTRAST_SIGMA) / share).sqrt()
    return rest / (spread + CONTRAST_FLOOR)


def _blurred(grey: Tensor, sigma: float) -> Tensor:
    """(T, H, W) smoothed by a gaussian."""
    if not sigma:
        return grey
    n = int(3 * sigma + 0.5)
    k = torch.exp(-(torch.arange(-n, n + 1, dtype=grey.dtype) ** 2) / (2 * sigma**2))
    k = k / k.sum()
    x = F.pad(grey[:, None], (n, n, n, n), mode="replicate")
    return F.conv2d(F.conv2d(x, k.view(1, 1, 1, -1)), k.view(1, 1, -1, 1))[:, 0]


def _with_gradients(grey: Tensor) -> Tensor:
    """(T, H, W) -> (T, 3, H, W): brightness and its slope along x and y, per pixel."""
    x = F.pad(grey[:, None], (1, 1, 1, 1), mode="replicate")[:, 0]
    return torch.stack([grey, (x[:, 1:-1, 2:] - x[:, 1:-1, :-2]) / 2, (x[:, 2:, 1:-1] - x[:, :-2, 1:-1]) / 2], dim=1)
