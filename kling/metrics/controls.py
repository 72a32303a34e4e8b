"""Control clips whose ranking is known in advance, and the check that a metric ranks them correctly; one that does not is useless."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor

from kling.cameras.axes import axes_trajectory
from kling.cameras.trajectory import Trajectory

TURN = 2.0  # degrees per frame of the `turned` control
TURNED_FRAMES = 9


@dataclass(frozen=True)
class Order:
    """The expected order: controls from the best to the worst score of a measure. Neighbours may tie, the ends must not."""

    measure: str
    controls: tuple[str, ...]
    higher: bool = True  # whether more is better


def violations(orders: Sequence[Order], values: Mapping[str, Mapping[str, float]]) -> list[str]:
    """One line for every violated order. values: by control, then by measure; a measure without values is skipped.

    >>> violations([Order("psnr", ("truth", "noise"))], {"truth": {"psnr": 40.0}, "noise": {"psnr": 50.0}})
    ['psnr: truth 40 should be above noise 50']
    """
    lines = []
    for order in orders:
        known = [(name, values[name][order.measure]) for name in order.controls if order.measure in values.get(name, {})]
        pairs = list(zip(known[:-1], known[1:], strict=True))
        pairs += [(known[0], known[-1])] if len(known) > 2 else []
        for i, ((good, a), (bad, b)) in enumerate(pairs):
            ends = len(known) == 2 or i == len(pairs) - 1
            gain = (a - b) if order.higher else (b - a)
            if math.isnan(gain) or gain < 0 or (ends and gain == 0):
                lines.append(f"{order.measure}: {good} {a:.4g} should be {'above' if order.higher else 'below'} {bad} {b:.4g}")
    return lines


def frozen(video: Tensor) -> Tensor:
    """The first frame, repeated for the length of the clip (T, H, W, 3)."""
    return video[:1].expand_as(video)


def shuffled(video: Tensor, seed: int) -> Tensor:
    """The same frames in a random order."""
    return video[torch.randperm(len(video), generator=torch.Generator().manual_seed(seed))]


def taken_over(video: Tensor, other: Tensor) -> Tensor:
    """The first half of a clip (T, H, W, 3) and the second half of another."""
    return torch.cat([video[: len(video) // 2], other[len(video) // 2 :]])


def noise(video: Tensor, seed: int) -> Tensor:
    """Random pixels of the same shape."""
    return torch.randint(0, 256, video.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def turned(picture: Tensor) -> tuple[Tensor, Trajectory]:
    """A picture (H, W, 3) uint8 seen by a camera that pans right: a clip of `TURNED_FRAMES`, and the camera's exact path.

    A rotation moves pixels by the homography K Rᵀ K⁻¹ whatever their depth, so the truth is known for any picture. It is mirrored outside.
    """
    H, W, _ = picture.shape
    path = axes_trajectory({"pan": TURN * (TURNED_FRAMES - 1) / 4.5}, TURNED_FRAMES, H, W)
    fx, fy, cx, cy = path.intrinsics[0].double().numpy() * [W, H, W, H]
    K = np.array([[fx, 0, cx - 0.5], [0, fy, cy - 0.5], [0, 0, 1]])
    frames = []
    for R in path.c2w[:, :, :3].double().numpy():
        to_first = K @ R @ np.linalg.inv(K)  # maps a pixel of this frame into the picture
        flags = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
        frames.append(cv2.warpPerspective(picture.numpy(), to_first, (W, H), flags=flags, borderMode=cv2.BORDER_REFLECT))
    return torch.from_numpy(np.stack(frames)), path


def stepped(video: Tensor, seams: Sequence[int], levels: int = 10) -> Tensor:
    """The first frame for the whole clip; at every seam it gets brighter by `levels`, a fifth flatter, and shifts left by a twentieth."""
    H, W = video.shape[1:3]
    frames, first = [], video[0].float() * 0.5  # leaves room for brighter steps
    for t in range(len(video)):
        passed = sum(t >= seam for seam in seams)
        frames.append(torch.roll(first, -passed * max(1, W // 20), dims=1) * 0.8**passed + levels * passed)
    return torch.stack(frames).round().clamp(0, 255).to(torch.uint8)
