"""Named camera controls: six axes as Kling defines them, our own `dolly`, and Kling's four master shots.

An axis value in [-10, 10] is the whole move over the clip, at constant speed, whatever the clip's length. Several may be non-zero at once.
Translation follows the camera's current orientation, so `pan` with `dolly` drives along an arc and `pan` against `horizontal` orbits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kling.cameras.trajectory import Trajectory, focal_of
from kling.errors import UserError, unknown

# What a value of 10 does over the whole clip.
UNITS: dict[str, tuple[float, str]] = {
    "horizontal": (2.5, "metres to the right"),
    "vertical": (1.0, "metres up"),
    "pan": (45.0, "degrees, turning right about the vertical axis"),
    "tilt": (20.0, "degrees, turning up about the horizontal axis"),
    "roll": (30.0, "degrees, the camera turning clockwise as seen from behind it"),
    "zoom": (1.0, "halvings of the focal length: + is a wider view"),
    "dolly": (3.0, "metres forward"),
}
LIMIT = 10.0
WORDS = "words"  # as a camera: none is given, and the words of the prompt alone say how it moves

MOVES: dict[str, dict[str, float]] = {
    "down_back": {"vertical": -7.0, "dolly": -8.0},
    "forward_up": {"vertical": 7.0, "dolly": 8.0},
    "right_turn_forward": {"pan": 7.0, "dolly": 7.0},
    "left_turn_forward": {"pan": -7.0, "dolly": 7.0},
}


def parse_axes(text: str) -> dict[str, float]:
    """`pan=5,zoom=-2`, a master shot's name, or `static` -> axis values. Raises `UserError` for other names and values beyond 10."""
    text = text.strip()
    if text in MOVES:
        return dict(MOVES[text])
    if text in ("", "static"):
        return {}
    axes: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = (p.strip() for p in part.partition("="))
        if name not in UNITS:
            raise unknown("camera axis" if value else "camera move", name, list(UNITS) if value else ["static", WORDS, *MOVES])
        if name in axes:
            raise UserError(f"camera axis '{name}' is given twice: give it once")
        try:
            axes[name] = float(value)
        except ValueError:
            raise UserError(f"camera axis {name}='{value}' is not a number: give a value from -10 to 10") from None
    return check_axes(axes)


def check_axes(axes: dict[str, float]) -> dict[str, float]:
    """The axes, if every name is known and every value lies in [-10, 10]."""
    for name, value in axes.items():
        if name not in UNITS:
            raise unknown("camera axis", name, UNITS)
        if not -LIMIT <= value <= LIMIT:  # also refuses nan
            said = "a number of hundreds of digits" if abs(value) >= 1e300 else f"{value:g}"  # nan is no such number
            raise UserError(f"camera axis {name}={said} is outside [-10, 10]: give a smaller move")
    return axes


def rotation(pan: Tensor, tilt: Tensor, roll: Tensor) -> Tensor:
    """Camera-to-world rotations (…, 3, 3) for angles in radians: pan about y, then tilt about x, then roll about z (x right, y down)."""
    zero, one = torch.zeros_like(pan), torch.ones_like(pan)

    def matrix(*entries: Tensor) -> Tensor:
        return torch.stack(entries, dim=-1).unflatten(-1, (3, 3))

    cp, sp, ct, st, cr, sr = pan.cos(), pan.sin(), tilt.cos(), tilt.sin(), roll.cos(), roll.sin()
    R_pan = matrix(cp, zero, sp, zero, one, zero, -sp, zero, cp)
    R_tilt = matrix(one, zero, zero, zero, ct, -st, zero, st, ct)
    R_roll = matrix(cr, -sr, zero, sr, cr, zero, zero, zero, one)
    return R_pan @ R_tilt @ R_roll


def axes_trajectory(axes: dict[str, float], T: int, H: int, W: int, f: float = 1.1) -> Trajectory:
    """The path of `axes` over T frames of an (H, W) picture; `f` is the first frame's focal length in units of sqrt(H * W)."""
    amount = {name: axes.get(name, 0.0) / LIMIT * unit for name, (unit, _) in UNITS.items()}
    s = torch.linspace(0, 1, T, dtype=torch.float64) if T > 1 else torch.zeros(1, dtype=torch.float64)
    pan, tilt, roll = (math.radians(amount[name]) * s for name in ("pan", "tilt", "roll"))
    R = rotation(pan, tilt, roll)  # (T, 3, 3)
    velocity = torch.tensor([amount["horizontal"], -amount["vertical"], amount["dolly"]], dtype=torch.float64)  # y points down
    halfway = rotation(*((a[1:] + a[:-1]) / 2 for a in (pan, tilt, roll)))  # (T-1, 3, 3): midpoint rule
    steps = (halfway @ velocity) * (s[1:] - s[:-1])[:, None]  # (T-1, 3)
    o = torch.cat([torch.zeros(1, 3, dtype=torch.float64), steps.cumsum(0)])  # (T, 3)
    fx, fy = focal_of(H, W, f)
    zoom = 2.0 ** (-amount["zoom"] * s)  # (T,)
    half = torch.full_like(s, 0.5)
    return Trajectory(torch.cat([R, o[:, :, None]], dim=-1).float(), torch.stack([fx * zoom, fy * zoom, half, half], dim=-1).float())
