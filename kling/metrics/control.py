"""Reads what a clip of the small world shows from its frames only: the colour, solid and motion of its object, and the ground.

The colour comes from the palette. For the other three a few numbers are compared with those of rendered examples with known truth:

    detectors = Detectors.fit(((video, labels) for ...), palette)    # a few hundred rendered clips, static camera, one object
    detectors.read(video)                                            # {"colour": "red", "solid": "ball", "ground": "sand", ...}

An object that is missing in most frames reads None, which never counts as right.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kling.metrics.segment import Palette, segment

QUESTIONS = ("colour", "solid", "ground", "motion")
Reading = dict[str, str | None]

MIN_PIXELS = 12  # of an object in a frame
MIN_FRAMES = 0.5  # share of the frames that must show the object
CROP = 16  # side in pixels of the normalised silhouette
GROUND_ROWS = 0.35  # lowest share of the picture: it has no haze


@dataclass(frozen=True)
class Track:
    """The object over time. Boxes are set only in frames that show it."""

    colour: int  # index in the palette
    mask: Tensor  # (T, H, W) bool
    shown: Tensor  # (T,) bool
    box: Tensor  # (T, 4) left, top, right, bottom in pixels; right and bottom exclusive


@dataclass
class Detectors:
    """Colour by palette; solid, ground and motion by ridge regression on a few features, fitted to rendered examples."""

    palette: Palette
    solid: _Ridge
    ground: _Ridge
    motion: _Ridge

    @classmethod
    def fit(cls, examples: Iterable[tuple[Tensor, Mapping[str, str]]], palette: Palette) -> Detectors:
        """Fit to (video (T, H, W, 3) uint8, labels by question). Examples whose object leaves the picture are used for the ground only."""
        return cls.learned((example_features(video, labels, palette) for video, labels in examples), palette)

    @classmethod
    def learned(cls, examples: Iterable[Mapping[str, tuple[np.ndarray, str]]], palette: Palette) -> Detectors:
        """As `fit`, from the features of each example, which several processes may have computed."""
        known = list(examples)
        rows = ([(torch.from_numpy(x[q][0]), x[q][1]) for x in known if q in x] for q in ("solid", "ground", "motion"))
        return cls(palette, *map(_Ridge.fit, rows))

    def read(self, video: Tensor) -> Reading:
        """The answers for a clip (T, H, W, 3) uint8 with a static camera; colour, solid and ground are also valid for a moving one."""
        track = follow(video, self.palette)
        reading: Reading = {"colour": None, "solid": None, "motion": None}
        reading["ground"] = self.ground(ground_features(video, self.palette))
        if track is not None:
            reading["colour"] = list(self.palette)[track.colour]
            reading["solid"] = self.solid(solid_features(video, track))
            reading["motion"] = self.motion(motion_features(track))
        return reading


def example_features(video: Tensor, labels: Mapping[str, str], palette: Palette) -> dict[str, tuple[np.ndarray, str]]:
    """What detectors learn from one example: by question the features, and the right answer; the ground's alone if the object leaves."""
    found, track = {"ground": (ground_features(video, palette).numpy(), labels["ground"])}, follow(video, palette)
    if track is not None:
        found["solid"] = (solid_features(video, track).numpy(), labels["solid"])
        found["motion"] = (motion_features(track).numpy(), labels["motion"])
    return found


def follow(video: Tensor, palette: Palette) -> Track | None:
    """The largest object of the most visible palette colour; None if too few frames show one."""
    colours, near = segment(video, palette)  # (T, H, W) each
    votes = near**2  # many pixels that are only near a colour must not outvote a few that match it
    colour = torch.bincount(colours.flatten(), votes.flatten(), minlength=len(palette)).argmax()
    mask = _largest_part(near > 0, votes * (colours == colour))
    shown = mask.sum(dim=(1, 2)) >= MIN_PIXELS
    if shown.float().mean() < MIN_FRAMES:
        return None
    columns, rows = mask.any(dim=1).float(), mask.any(dim=2).float()  # (T, W), (T, H)
    left, top = columns.argmax(dim=1), rows.argmax(dim=1)
    right, bottom = mask.shape[2] - columns.flip(1).argmax(dim=1), mask.shape[1] - rows.flip(1).argmax(dim=1)
    return Track(int(colour), mask, shown, torch.stack([left, top, right, bottom], dim=1).float())


def solid_features(video: Tensor, track: Track) -> Tensor:
    """Mean silhouette and mean shading of the object, each scaled to the same size: (2 * CROP * CROP,)."""
    left, top, right, bottom = track.box[track.shown].unbind(dim=1)  # (t,) each
    H, W = track.mask.shape[1:]
    whole = (left > 0) & (top > 0) & (right < W) & (bottom < H)
    mask, grey = track.mask[track.shown].float(), video[track.shown].float().mean(dim=-1) / 255
    if whole.any():  # frames in which the border cuts the object are left out
        left, top, right, bottom, mask, grey = (x[whole] for x in (left, top, right, bottom, mask, grey))
    half = torch.maximum(right - left, bottom - top) / 2 + 1
    x = (left + right)[:, None] / 2 + half[:, None] * torch.linspace(-1, 1, CROP)  # (t, CROP) pixels
    y = (top + bottom)[:, None] / 2 + half[:, None] * torch.linspace(-1, 1, CROP)
    grid = torch.stack([(2 * x / W - 1)[:, None, :].expand(-1, CROP, -1), (2 * y / H - 1)[:, :, None].expand(-1, -1, CROP)], dim=-1)
    brightness = (grey * mask).sum(dim=(1, 2)) / mask.sum(dim=(1, 2))
    pictures = torch.stack([mask, mask * (grey / brightness[:, None, None].clamp(min=1e-3) - 1)], dim=1)  # (t, 2, H, W)
    return F.grid_sample(pictures, grid, align_corners=False).mean(dim=0).flatten()


def ground_features(video: Tensor, palette: Palette) -> Tensor:
    """Mean and spread of the colours at the bottom of the picture, without objects: (6,)."""
    low = video[::4, int(video.shape[1] * (1 - GROUND_ROWS)) :]
    pixels = low[segment(low, palette)[1] == 0].float() / 255  # (n, 3)
    if len(pixels) < 2:
        return torch.zeros(6)
    return torch.cat([pixels.mean(dim=0), pixels.std(dim=0)])


def motion_features(track: Track) -> Tensor:
    """How far the object moves across, up and closer over the clip, in its own sizes, and how much it swings about that: (6,)."""
    left, top, right, bottom = track.box[track.shown].unbind(dim=1)
    size = ((right - left) * (bottom - top)).sqrt()
    scale = size.mean()
    paths = torch.stack([(left + right) / 2 / scale, (top + bottom) / 2 / scale, size.log()])  # (3, t)
    s = torch.linspace(0, 1, len(track.shown))[track.shown]
    s = s - s.mean()
    slope = (paths * s).sum(dim=1) / (s * s).sum()
    swing = (paths - paths.mean(dim=1, keepdim=True) - slope[:, None] * s).std(dim=1)
    return torch.cat([slope, swing])


def _largest_part(mask: Tensor, votes: Tensor) -> Tensor:
    """For each mask (T, H, W), the connected part with the most votes (T, H, W) >= 0; empty if there are none."""
    parts = torch.zeros_like(mask)
    for t, (frame, vote) in enumerate(zip(mask.numpy(), votes.numpy(), strict=True)):
        _, labels = cv2.connectedComponents(frame.astype(np.uint8))
        held = np.bincount(labels.ravel(), vote.ravel())
        if held[1:].any():
            parts[t] = torch.from_numpy(labels == 1 + held[1:].argmax())
    return parts


@dataclass
class _Ridge:
    """Classifies by ridge regression to one-hot answers on standardised features; if there are few, their products are used too."""

    names: tuple[str, ...]
    mean: Tensor
    scale: Tensor
    weights: Tensor  # (features + 1, names)

    @classmethod
    def fit(cls, rows: list[tuple[Tensor, str]], strength: float = 0.03) -> _Ridge:
        x = torch.stack([features for features, _ in rows]).double()
        names = tuple(sorted({name for _, name in rows}))
        answers = F.one_hot(torch.tensor([names.index(name) for _, name in rows]), len(names)).double()
        self = cls(names, x.mean(dim=0), x.std(dim=0) + 1e-3, torch.empty(0))
        x = self._lifted(x)
        weight = (answers / answers.sum(dim=0)).sum(dim=1, keepdim=True) * len(rows) / len(names)  # all names have equal weight
        damping = strength * len(rows) * torch.eye(x.shape[1], dtype=x.dtype)
        self.weights = torch.linalg.solve(x.T @ (weight * x) + damping, x.T @ (weight * answers))
        return self

    def __call__(self, features: Tensor) -> str:
        return self.names[int((self._lifted(features.double()[None]) @ self.weights).argmax())]

    def _lifted(self, x: Tensor) -> Tensor:
        x = ((x - self.mean) / self.scale).clamp(-4, 4)
        terms = [torch.ones(len(x), 1, dtype=x.dtype), x]
        if x.shape[1] < CROP:
            i, j = torch.triu_indices(x.shape[1], x.shape[1])
            terms.append(x[:, i] * x[:, j] / math.sqrt(2))
        return torch.cat(terms, dim=1)
