"""Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598), on text and separately on the camera."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def guided_velocity(predict: Callable[[str, bool], Tensor], guidance_scale: float, camera_guidance_scale: float, camera: bool) -> Tensor:
    """Combine as few predictions as the two scales need.

        v = v(text, cam) + (g - 1) (v(text, cam) - v(negative, cam)) + (g_cam - 1) (v(text, cam) - v(text, no cam))

    predict(text, camera): the velocity with text "prompt" or "negative", with the camera or without; each a tensor of its own, which may be
    written into. A scale of 1 costs no extra pass.
    """
    v = full = predict("prompt", camera)
    if guidance_scale != 1:
        v = predict("negative", camera).lerp_(full, guidance_scale)  # one sweep over memory, into the negative's own
    if camera and camera_guidance_scale != 1:
        v = v + torch.sub(full, predict("prompt", False)).mul_(camera_guidance_scale - 1)
    return v


class Guidance:
    """Guidance on part of a walk, for the time it saves.

    interval: the levels (low, high) at which there is any; high noise gains nothing from it and low noise little (Kynkäänniemi et al. 2024,
    arXiv 2404.07724). every: only each so many-th of these steps computes it anew, and those between add its last change once more.
    """

    def __init__(self, interval: tuple[float, float] = (0.0, 1.0), every: int = 1) -> None:
        self.low, self.high = interval
        self.every = every
        self.steps = 0
        self.change: Tensor | None = None

    def __call__(
        self, predict: Callable[[str, bool], Tensor], guidance_scale: float, camera_guidance_scale: float, camera: bool, level: float
    ) -> Tensor:
        """As `guided_velocity`, at a noise level."""
        if not self.low <= level <= self.high:
            return predict("prompt", camera)
        again = self.steps % self.every == 0
        self.steps += 1
        if not again:
            return predict("prompt", camera) + self.change
        if self.every == 1:
            return guided_velocity(predict, guidance_scale, camera_guidance_scale, camera)
        plain: list[Tensor] = []

        def remember(which: str, with_camera: bool) -> Tensor:
            v = predict(which, with_camera)
            plain.append(v)
            return v

        v = guided_velocity(remember, guidance_scale, camera_guidance_scale, camera)
        self.change = v - plain[0]  # the first prediction is the plain one
        return v
