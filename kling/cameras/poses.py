"""Arithmetic on poses: inverse, interpolation over time, crops of the picture."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kling.cameras.trajectory import Trajectory


def inverse(pose: Tensor) -> Tensor:
    """[R | t] -> [Rᵀ | -Rᵀ t], camera-to-world from world-to-camera and back: (..., 3, 4)."""
    Rᵀ = pose[..., :3].mT
    return torch.cat([Rᵀ, -Rᵀ @ pose[..., 3:]], dim=-1)


def resample(trajectory: Trajectory, times: Tensor, when: Tensor) -> Trajectory:
    """The poses at `when` (T,) of a path given at ascending `times` (n,): rotations by slerp, positions and intrinsics by lerp."""
    R, o, K = trajectory.c2w[:, :, :3], trajectory.c2w[:, :, 3], trajectory.intrinsics
    q = quaternion(R)
    if len(times) == 1:
        return Trajectory(trajectory.c2w.expand(len(when), -1, -1).clone(), K.expand(len(when), -1).clone())
    i = (torch.searchsorted(times, when, right=True) - 1).clamp(0, len(times) - 2)
    u = ((when - times[i]) / (times[i + 1] - times[i]))[:, None]  # (T, 1)
    turned = rotation_matrix(slerp(q[i], q[i + 1], u))
    moved = torch.lerp(o[i], o[i + 1], u)
    return Trajectory(torch.cat([turned, moved[:, :, None]], dim=-1), torch.lerp(K[i], K[i + 1], u))


def cropped(trajectory: Trajectory, H: int, W: int) -> Trajectory:
    """The camera of the centre crop that fills an (H, W) frame. The picture's own ratio W₀/H₀ is fy/fx, since pixels are square."""
    fx, fy = trajectory.intrinsics[0, :2].tolist()
    wider = (fy / fx) / (W / H)
    zoom = trajectory.intrinsics.new_tensor([max(1.0, wider), max(1.0, 1 / wider)])
    focal, centre = trajectory.intrinsics.split(2, dim=-1)
    return Trajectory(trajectory.c2w, torch.cat([focal * zoom, 0.5 + (centre - 0.5) * zoom], dim=-1))


def quaternion(R: Tensor) -> Tensor:
    """Unit quaternion (..., 4), w first, of the rotation nearest to R (..., 3, 3).

    Bar-Itzhack, "New method for extracting the quaternion from a rotation matrix" (2000): the leading eigenvector of a symmetric 4x4.
    """
    (a, b, c), (d, e, f), (g, h, i) = (row.unbind(-1) for row in R.unbind(-2))
    K = torch.stack(
        [
            *(a + e + i, h - f, c - g, d - b),
            *(h - f, a - e - i, b + d, c + g),
            *(c - g, b + d, e - a - i, f + h),
            *(d - b, c + g, f + h, i - a - e),
        ],
        dim=-1,
    )
    return torch.linalg.eigh(K.unflatten(-1, (4, 4))).eigenvectors[..., -1]


def rotation_matrix(q: Tensor) -> Tensor:
    """(..., 4) unit quaternions, w first -> (..., 3, 3)."""
    w, x, y, z = q.unbind(-1)
    rows = [
        *(1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
        *(2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
        *(2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
    ]
    return torch.stack(rows, dim=-1).unflatten(-1, (3, 3))


def slerp(p: Tensor, q: Tensor, u: Tensor) -> Tensor:
    """The shortest rotation from p to q (n, 4) at a constant rate, at u (n, 1) in [0, 1]."""
    q = torch.where((p * q).sum(-1, keepdim=True) < 0, -q, q)  # q and -q are one rotation
    angle = 2 * torch.atan2((p - q).norm(dim=-1, keepdim=True), (p + q).norm(dim=-1, keepdim=True))  # exact for small angles
    still = angle < 1e-9
    angle = angle.masked_fill(still, math.pi / 2)
    mixed = torch.where(still, torch.lerp(p, q, u), (((1 - u) * angle).sin() * p + (u * angle).sin() * q) / angle.sin())
    return mixed / mixed.norm(dim=-1, keepdim=True)
