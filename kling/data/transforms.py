"""Sizes and number ranges: the one rule that fits images and videos to a model's frame size.

Cover (the default): scale until the frame is filled, crop the centre. Contain: scale until the whole picture fits, centre it.
Scaling averages areas when it shrinks (no aliasing) and is bicubic when it enlarges. An image and a video of it give equal results.
"""

from __future__ import annotations

import math

import cv2
import numpy as np
import torch
from torch import Tensor

from kling.errors import UserError, unknown

Frames = Tensor | np.ndarray  # uint8 (T, H, W, 3), or one image (H, W, 3)
MOST = 2**26  # pixels of a scaled picture; a line of 1x1000000 pixels would have 10 ** 10 of them at a height of 112
AROUND = 4  # pixels kept beside the part of a picture that is used, for the filter


def to_tensor(frames: Frames) -> Tensor:
    """uint8 (T, H, W, 3) -> float32 (3, T, H, W) in [-1, 1]."""
    frames = torch.as_tensor(frames)
    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        raise ValueError(f"expected uint8 frames (T, H, W, 3), got {frames.dtype} {tuple(frames.shape)}")
    return frames.permute(3, 0, 1, 2).float().div_(127.5).sub_(1)


def to_batch(frames: Tensor) -> Tensor:
    """uint8 (b, T, H, W, 3) -> float32 (b, 3, T, H, W) in [-1, 1], on the same device."""
    return frames.permute(0, 4, 1, 2, 3).float().div_(127.5).sub_(1)


def to_uint8(video: Tensor) -> Tensor:
    """(3, T, H, W) in [-1, 1] -> uint8 (T, H, W, 3) on the CPU, rounded and clamped. Raises `ValueError` on NaN or infinity."""
    if video.ndim != 4 or video.shape[0] != 3:
        raise ValueError(f"expected a video (3, T, H, W), got {tuple(video.shape)}")
    if not torch.isfinite(video).all():
        raise ValueError("the video holds NaN or infinity")
    pixels = (video.detach().float() + 1).mul_(127.5).round_().clamp_(0, 255)
    return pixels.to(torch.uint8).permute(1, 2, 3, 0).contiguous().cpu()


def fit(frames: Frames, H: int, W: int, mode: str = "cover") -> Tensor:
    """Fit pictures to (H, W): uint8 (T, H, W, 3) or (H, W, 3), or a float mask (H, W), in and out.

    "cover" fills the frame and crops the centre; "contain" shows the whole picture, with black around it.
    """
    if mode not in ("cover", "contain"):
        raise unknown("fit", mode, ["cover", "contain"])
    check_size(H, W)
    return _each(frames, lambda picture: _cover(picture, H, W) if mode == "cover" else _contain(picture, H, W, cv2.BORDER_CONSTANT))


def contain(frames: Frames, H: int, W: int) -> tuple[Tensor, Tensor]:
    """Place whole pictures in an (H, W) frame for outpainting: (frames, mask (H, W) float32, 1 where the picture is unknown).

    The unknown part repeats the picture's edge, so that a model encoding the frame sees no false border.
    """
    check_size(H, W)
    h, w = frames.shape[-3:-1]
    placed = _each(frames, lambda picture: _contain(picture, H, W, cv2.BORDER_REPLICATE))
    return placed, torch.from_numpy(_contain(np.zeros((h, w), np.float32), H, W, cv2.BORDER_CONSTANT, 1.0))


def check_size(H: int, W: int) -> None:
    """Raises `UserError` unless both are positive whole numbers."""
    if any(isinstance(x, bool) or not isinstance(x, int) or x < 1 for x in (H, W)):
        raise UserError(f"size {W}x{H}: give a positive whole number of pixels for the width and the height")


def _each(frames: Frames, one) -> Tensor:
    """Apply `one` to an image, a mask, or every frame of a video."""
    pixels = np.asarray(frames)
    return torch.from_numpy(np.stack([one(f) for f in pixels]) if pixels.ndim == 4 else np.ascontiguousarray(one(pixels)))


def _resize(picture: np.ndarray, h: int, w: int) -> np.ndarray:
    if picture.shape[:2] == (h, w):
        return picture
    shrinks = h < picture.shape[0] or w < picture.shape[1]
    return cv2.resize(picture, (w, h), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)


def _cover(picture: np.ndarray, H: int, W: int) -> np.ndarray:
    h, w = cover_size(*picture.shape[:2], H, W)
    if h * w > MOST:  # far longer than the frame: only its middle is scaled
        scale = max(H / picture.shape[0], W / picture.shape[1])
        used = (2 * AROUND + math.ceil(side / scale) for side in (H, W))
        picture = crop(picture, *(min(most, side) for most, side in zip(used, picture.shape, strict=False)))
        h, w = cover_size(*picture.shape[:2], H, W)
    return crop(_resize(picture, h, w), H, W)


def cover_size(h: int, w: int, H: int, W: int) -> tuple[int, int]:
    """The size to which (h, w) is scaled to fill (H, W)."""
    scale = max(H / h, W / w)
    return max(H, round(h * scale)), max(W, round(w * scale))


def crop(picture: np.ndarray, H: int, W: int) -> np.ndarray:
    """The central (H, W) of a picture (h, w, ...) that is at least as large."""
    top, left = (picture.shape[0] - H) // 2, (picture.shape[1] - W) // 2
    return picture[top : top + H, left : left + W]


def _contain(picture: np.ndarray, H: int, W: int, border: int, value: float = 0) -> np.ndarray:
    h, w = picture.shape[:2]
    scale = min(H / h, W / w)
    h, w = min(H, max(1, round(h * scale))), min(W, max(1, round(w * scale)))
    top, left = (H - h) // 2, (W - w) // 2
    return cv2.copyMakeBorder(_resize(picture, h, w), top, H - h - top, left, W - w - left, border, value=(value,) * 3)
