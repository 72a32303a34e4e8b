"""A camera path as a picture: from above and from the side, with the view of some frames, blue at the start and red at the end."""

from __future__ import annotations

import cv2
import numpy as np

from kling.cameras.trajectory import Trajectory

SIDE = 480  # pixels of each panel
VIEWS = 9  # frames whose view is drawn


def draw_path(trajectory: Trajectory, title: str = "") -> np.ndarray:
    """uint8 (H, W, 3): x to the right and z (forward) up on the left, z to the right and y (down) down on the right."""
    c2w = trajectory.c2w.double().numpy()
    K = trajectory.intrinsics.double().numpy()
    span = max(float(np.ptp(c2w[:, :, 3], axis=0).max()), 1e-3)
    reach = 0.25 * span if span > 1e-2 else 1.0  # a camera that only rotates has a path of size 0: the views set the scale
    picture = np.full((SIDE + 40, 2 * SIDE, 3), 255, np.uint8)
    _text(picture, title or f"{len(c2w)} poses", (12, 26))
    extent = f"{span:.3g} units across" if span > 1e-2 else "turning on the spot"
    _text(picture, f"from above: x right, z up    {extent}", (12, SIDE + 28))
    _text(picture, "from the side: z right, y down", (SIDE + 12, SIDE + 28))
    for panel, (right, down, sign) in enumerate(((0, 2, -1), (2, 1, 1))):
        axes = np.array([right, down])
        tips = np.concatenate([_corners(pose, k, reach) for pose, k in zip(c2w, K, strict=True)])
        points = np.concatenate([c2w[:, :, 3], tips])[:, axes] * [1, sign]
        middle, size = (points.max(0) + points.min(0)) / 2, max(float(np.ptp(points, axis=0).max()), 1e-6)
        place = _placer(axes, sign, middle, 0.82 * SIDE / size, panel)
        for t in range(1, len(c2w)):
            cv2.line(picture, place(c2w[t - 1, :, 3]), place(c2w[t, :, 3]), _colour(t / len(c2w)), 2, cv2.LINE_AA)
        for t in np.unique(np.linspace(0, len(c2w) - 1, VIEWS).round().astype(int)):
            colour, corners = _colour(t / max(1, len(c2w) - 1)), _corners(c2w[t], K[t], reach)
            for a, b in zip(corners, np.roll(corners, -1, axis=0), strict=True):
                cv2.line(picture, place(a), place(b), colour, 1, cv2.LINE_AA)
                cv2.line(picture, place(c2w[t, :, 3]), place(a), colour, 1, cv2.LINE_AA)
            cv2.circle(picture, place(c2w[t, :, 3]), 3, colour, -1, cv2.LINE_AA)
    cv2.line(picture, (SIDE, 40), (SIDE, SIDE), (220, 220, 220), 1)
    return picture


def _placer(axes: np.ndarray, sign: int, middle: np.ndarray, scale: float, panel: int):  # noqa: ANN202 - point -> pixel
    def place(point: np.ndarray) -> tuple[int, int]:
        x, y = (point[axes] * [1, sign] - middle) * scale + [SIDE * (panel + 0.5), 20 + SIDE / 2]
        return round(float(x)), round(float(y))

    return place


def _corners(pose: np.ndarray, k: np.ndarray, reach: float) -> np.ndarray:
    """The corners (4, 3) of what a camera sees at a distance of `reach`."""
    corners = np.array([[(u - k[2]) / k[0], (v - k[3]) / k[1], 1.0] for u, v in ((0, 0), (1, 0), (1, 1), (0, 1))])
    return reach * corners @ pose[:, :3].T + pose[:, 3]


def _colour(u: float) -> tuple[int, int, int]:
    return tuple(int(round(a + (b - a) * u)) for a, b in ((40, 210), (90, 50), (220, 40)))


def _text(picture: np.ndarray, text: str, at: tuple[int, int]) -> None:
    cv2.putText(picture, text.encode("ascii", "replace").decode(), at, cv2.FONT_HERSHEY_SIMPLEX, 0.5, (60, 60, 60), 1, cv2.LINE_AA)
