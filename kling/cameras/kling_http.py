"""The `camera_control` object of Kling's HTTP interface, to and from our axes.

    {"type": "simple", "config": {"horizontal": 0, "vertical": 0, "pan": 5, "tilt": 0, "roll": 0, "zoom": 0}}
    {"type": "forward_up"}

Its documents named pan and tilt in two ways. convention="2024": pan turns right, tilt turns up, as here. convention="2025": pan turns
up and tilt turns right.
"""

from __future__ import annotations

from typing import Any

from kling.cameras.axes import MOVES, check_axes
from kling.errors import UserError, unknown

AXES = ("horizontal", "vertical", "pan", "tilt", "roll", "zoom")
CONVENTIONS: dict[str, dict[str, str]] = {"2024": {}, "2025": {"pan": "tilt", "tilt": "pan"}}


def axes_from_wire(control: dict[str, Any], convention: str) -> dict[str, float]:
    """Axis values of a `camera_control` object. Several may be non-zero, which Kling's own server refuses.

    An axis that is null is not given. Raises `UserError` for an unknown type, axis or convention, a value outside [-10, 10] or no number,
    or a config next to a named shot.
    """
    names = _names(convention)
    kind, config = control.get("type"), control.get("config") or {}
    if isinstance(kind, str) and kind in MOVES:
        if any(config.values()):
            raise UserError(f"camera_control '{kind}' has a config: leave it out, or set type to 'simple'")
        return dict(MOVES[kind])
    if kind != "simple":
        raise unknown("camera_control type", kind, ["simple", *MOVES])
    for name, value in config.items():
        if name not in AXES:
            raise unknown("camera axis", name, AXES)
        if isinstance(value, bool) or not isinstance(value, int | float | None):
            raise UserError(f"camera axis {name}={value!r} is not a number: give a value from -10 to 10")
    return check_axes({names.get(name, name): float(value) for name, value in config.items() if value})


def axes_to_wire(axes: dict[str, float], convention: str) -> dict[str, Any]:
    """The `camera_control` object of axis values. Raises `UserError` for what the format lacks: `dolly`, or two axes but no named shot."""
    names = _names(convention)
    moving = {name: value for name, value in check_axes(axes).items() if value}
    for shot, its_axes in MOVES.items():
        if moving == its_axes:
            return {"type": shot}
    if "dolly" in moving:
        raise UserError("camera_control has no axis dolly: use zoom, or a named shot")
    if len(moving) > 1:
        raise UserError(f"camera_control carries one axis at a time, not {' and '.join(moving)}: give one, or a named shot")
    return {"type": "simple", "config": dict.fromkeys(AXES, 0.0) | {names.get(name, name): value for name, value in moving.items()}}


def _names(convention: str) -> dict[str, str]:
    """Our name of each axis that the convention names differently; swapping twice changes nothing."""
    if convention not in CONVENTIONS:
        raise unknown("camera_control convention", convention, CONVENTIONS)
    return CONVENTIONS[convention]
