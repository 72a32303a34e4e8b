"""Errors between an estimated and a requested camera path, and the name of the camera movement that a path shows."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from kling.cameras.axes import LIMIT, MOVES, UNITS, rotation
from kling.cameras.trajectory import Trajectory

STATIC = 1.5  # axis units (10 is the full range): a camera that moves less in total is static; training requests at least 3
TRAVELS = 0.1  # metres: a path that stays closer to its start has no direction to compare

SINGLE = {f"{name}{sign}": {name: LIMIT if sign == "+" else -LIMIT} for name in UNITS for sign in "+-"}
CLASSES = (*SINGLE, *MOVES, "static")


def rotation_error(estimate: Trajectory, asked: Trajectory, found: Tensor) -> float | None:
    """Mean angle in degrees between the estimated and the asked rotations, both relative to frame 0 (which is left out).

    found: (T,) bool, frames whose pose is known. None unless all are: a mean over some frames, or with a worst value for the others,
    would be no angle. Whoever takes means says in how many clips there was one.
    """
    if not found.all():
        return None
    turn = estimate.relative().c2w[1:, :, :3].double().mT @ asked.relative().c2w[1:, :, :3].double()
    sine = (turn - turn.mT).flatten(1).norm(dim=1) / math.sqrt(8)  # the trace alone is insensitive to small angles
    cosine = (turn.diagonal(dim1=1, dim2=2).sum(dim=1) - 1) / 2
    angle = torch.rad2deg(torch.atan2(sine, cosine))
    return float(angle.mean())


def translation_error(estimate: Trajectory, asked: Trajectory, found: Tensor) -> float | None:
    """Mean distance between the two paths, each in units of its largest distance from the start; 0 is perfect, 2 is the worst.

    None where the asked path does not travel, or not every frame is found (see `rotation_error`). An estimate that hardly moves is not
    blown up: its unit is at least a tenth of the asked one.
    """
    a, b = estimate.relative().c2w[1:, :, 3].double(), asked.relative().c2w[1:, :, 3].double()
    far = float(b.norm(dim=1).max())
    if far < TRAVELS or not found.all():
        return None
    a_far = max(float(a.norm(dim=1).max()), far / 10)
    return float((a / a_far - b / far).norm(dim=1).mean())


def summed_errors(estimate: Trajectory, asked: Trajectory) -> dict[str, float]:
    """RotErr in radians, relative TransErr and CamMC as CamI2V (He et al. 2024) sums them over the frames after the first.

    Both paths are relative to frame 0 and divided by their own furthest distance from it. CamMC is the norm of the difference of the
    3x4 poses. For a path of which every frame was found.
    """
    a, b = estimate.relative().c2w[1:].double(), asked.relative().c2w[1:].double()
    a, b = (torch.cat([x[..., :3], x[..., 3:] / (x[..., 3].norm(dim=1).max() + 1e-9)], dim=-1) for x in (a, b))
    cosine = ((a[..., :3].mT @ b[..., :3]).diagonal(dim1=1, dim2=2).sum(dim=1) - 1) / 2
    return {
        "rotation": float(cosine.clamp(-1, 1).acos().sum()),
        "translation": float((a - b)[..., 3].norm(dim=1).sum()),
        "cammc": float((a - b).flatten(1).norm(dim=1).sum()),
    }


def axes_of(trajectory: Trajectory) -> dict[str, float]:
    """The axis values that best describe a path: the inverse of `axes_trajectory`, for any path.

    Rotations and zoom are slopes over the whole clip (not differences of the end points, which one bad frame could spoil); translation is
    summed in the camera's own directions.
    """
    path = trajectory.relative()
    R, o, T = path.c2w[:, :, :3].double(), path.c2w[:, :, 3].double(), len(path)
    s = torch.linspace(0, 1, T, dtype=torch.float64)
    pan, roll = torch.atan2(R[:, 0, 2], R[:, 2, 2]), torch.atan2(R[:, 1, 0], R[:, 1, 1])
    tilt = torch.asin((-R[:, 1, 2]).clamp(-1, 1))
    halfway = rotation(*((a[1:] + a[:-1]) / 2 for a in (pan, tilt, roll)))  # (T-1, 3, 3)
    travel = torch.einsum("tji,tj->i", halfway, o[1:] - o[:-1])  # right, down, forward
    zoom = -(path.intrinsics[:, 0] / path.intrinsics[0, 0]).double().log2()

    def slope(a: Tensor) -> float:
        return float((s * a).sum() / (s * s).sum())

    amount = {"horizontal": float(travel[0]), "vertical": -float(travel[1]), "dolly": float(travel[2]), "zoom": slope(zoom)}
    amount |= {name: math.degrees(slope(a)) for name, a in (("pan", pan), ("tilt", tilt), ("roll", roll))}
    return {name: amount[name] / unit * LIMIT for name, (unit, _) in UNITS.items()}


def camera_class(axes: Mapping[str, float]) -> str:
    """One of `CLASSES`: static, or the single axis or master shot with the nearest direction in axis units.

    >>> camera_class({"pan": 5.0, "dolly": 0.4})
    'pan+'
    """
    size = math.hypot(*axes.values()) if axes else 0.0
    if size < STATIC:
        return "static"
    return max({**SINGLE, **MOVES}.items(), key=lambda item: _cosine(axes, item[1]))[0]


def _cosine(a: Mapping[str, float], b: Mapping[str, float]) -> float:
    return sum(value * b.get(name, 0.0) for name, value in a.items()) / math.hypot(*a.values()) / math.hypot(*b.values())
