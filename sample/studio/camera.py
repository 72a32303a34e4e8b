"""Drawings of the camera before sampling: its path seen from outside, and how points of the first frame will move.

Drawings are SVG in the page's own colours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kling.cameras.trajectory import Trajectory, pixel_rays

DEPTH = 4.0  # assumed distance in metres of the points of the first frame
AHEAD = 8  # frames (1 s of the small world) over which their motion is drawn
SHOWN = 6  # cameras along the path
FAR = 0.55  # metres from a camera's centre to the picture drawn in front of it
VIEW = torch.tensor([[0.866, 0.0, 0.5], [-0.25, 0.866, 0.433]])  # seen from behind, to the left and above: x right, y down, z forward
WIDTH, HEIGHT, MARGIN = 320, 220, 14  # of a drawing
ROWS = 5  # of points whose motion is drawn
REACH = 3  # metres of the ground to each side


def corners(trajectory: Trajectory) -> Tensor:
    """(T, 5, 3) in the world: the centre of every camera, then the corners of a picture `FAR` in front of it, clockwise."""
    fx, fy, cx, cy = trajectory.intrinsics.unbind(-1)  # (T,) each
    u = torch.tensor([0.0, 1.0, 1.0, 0.0])
    v = torch.tensor([0.0, 0.0, 1.0, 1.0])
    x = (u - cx[:, None]) / fx[:, None]  # (T, 4)
    y = (v - cy[:, None]) / fy[:, None]
    local = FAR * torch.stack([x, y, torch.ones_like(x)], dim=-1)  # (T, 4, 3)
    R, o = trajectory.c2w[:, :, :3], trajectory.c2w[:, None, :, 3]  # (T, 3, 3), (T, 1, 3)
    return torch.cat([o, local @ R.mT + o], dim=1)


def motion_field(trajectory: Trajectory, H: int, W: int, t: int, depth: float = DEPTH) -> tuple[Tensor, Tensor]:
    """Where points of frame 0 are in frame t: (start (H·W, 2), end (H·W, 2)) as fractions of width and height, NaN behind the camera.

    X = depth K₀⁻¹ [u, v, 1]ᵀ,  [u', v', 1]ᵀ ~ Kₜ Rₜᵀ (X - oₜ)
    """
    points = depth * pixel_rays(trajectory.intrinsics[:1], H, W)[0].flatten(1).T  # (H·W, 3)
    R, o = trajectory.c2w[t, :, :3], trajectory.c2w[t, :, 3]
    seen = (points - o) @ R  # (H·W, 3) = Rᵀ (X - o)

    def project(X: Tensor, intrinsics: Tensor) -> Tensor:
        z = X[:, 2:].where(X[:, 2:] > 1e-3, torch.nan)
        return intrinsics[:2] * X[:, :2] / z + intrinsics[2:]

    return project(points, trajectory.intrinsics[0]), project(seen, trajectory.intrinsics[t])


def path_svg(trajectory: Trajectory, label: str) -> str:
    """The camera's path from outside; the first camera is pale, the last one strong."""
    T = len(trajectory)
    picks = torch.linspace(0, T - 1, min(SHOWN, T)).round().long()
    frusta = corners(trajectory)  # (T, 5, 3)
    ground = _ground(frusta)  # (lines, 2, 3)
    flat = frusta @ VIEW.T  # (T, 5, 2)
    low, high = flat.flatten(0, 1).amin(0), flat.flatten(0, 1).amax(0)
    middle, size = (low + high) / 2, (high - low).clamp(min=1.6)
    scale = min((WIDTH - 2 * MARGIN) / float(size[0]), (HEIGHT - 2 * MARGIN) / float(size[1]))
    centre = torch.tensor([WIDTH / 2, HEIGHT / 2])

    def place(points: Tensor) -> list[list[float]]:
        return ((points - middle) * scale + centre).tolist()

    parts = [f'<polyline class="ground" points="{_points(place(line))}"/>' for line in ground @ VIEW.T]
    parts.append(f'<polyline class="path" points="{_points(place(flat[:, 0]))}"/>')
    for k, t in enumerate(picks.tolist()):
        eye, *rest = place(flat[t])
        strong = 0.3 + 0.7 * k / max(1, len(picks) - 1)
        sides = "".join(f"M{eye[0]:.1f} {eye[1]:.1f}L{x:.1f} {y:.1f}" for x, y in rest)
        parts.append(f'<g class="camera" opacity="{strong:.2f}"><polygon points="{_points(rest)}"/><path d="{sides}"/></g>')
    return _svg(parts, HEIGHT, label)


def motion_svg(trajectory: Trajectory, H: int, W: int, label: str) -> str:
    """Arrows on the first frame: where its points will be `AHEAD` frames later, if they are `DEPTH` metres away."""
    height = round(WIDTH * H / W)
    start, end = motion_field(trajectory, ROWS, round(ROWS * W / H), min(AHEAD, len(trajectory) - 1))
    size = torch.tensor([WIDTH, height])
    parts = [f'<rect class="frame" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="6"/>']
    for (x, y), (u, v) in zip((start * size).tolist(), (end * size).tolist(), strict=True):
        parts.append(f'<circle class="point" cx="{x:.1f}" cy="{y:.1f}" r="1.6"/>')
        if u == u and max(abs(u - x), abs(v - y)) > 0.5:  # u == u: not NaN
            parts.append(f'<line class="arrow" x1="{x:.1f}" y1="{y:.1f}" x2="{u:.1f}" y2="{v:.1f}" marker-end="url(#head)"/>')
    marker = '<marker id="head" viewBox="0 0 6 6" refX="5" refY="3" markerWidth="5" markerHeight="5" orient="auto">'
    return _svg([f'<defs>{marker}<path class="head" d="M0 0L6 3L0 6z"/></marker></defs>', *parts], height, label)


def _ground(frusta: Tensor) -> Tensor:
    """Lines of a one-metre grid below all cameras, (lines, 2, 3)."""
    y = float(frusta[..., 1].max()) + 0.4
    middle = frusta[:, 0].mean(0).round()
    x0, z0 = float(middle[0]), float(middle[2])
    steps = range(-REACH, REACH + 1)
    along = [[[x0 + i, y, z0 - REACH], [x0 + i, y, z0 + REACH]] for i in steps]
    across = [[[x0 - REACH, y, z0 + i], [x0 + REACH, y, z0 + i]] for i in steps]
    return torch.tensor(along + across)


def _points(points: list[list[float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _svg(parts: list[str], height: int, label: str) -> str:
    return f'<svg class="drawing" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
