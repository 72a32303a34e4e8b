"""Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598), on text and separately on the camera."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def guided_velocity(predict: Callable[[str, bool], Tensor], guidance_scale: float, camera_guidance_scale: float, camera: bool) -> Tensor:
    """Combine as few predictions as the two scales need.

        v = v(text, cam) + (g - 1) (v(text, cam) - v(negative, cam)) + (g_cam - 1) (v(text, cam) - v(text, no cam))

    predict(text, camera): the velocity with text "prompt" or "negative", with the camera or without. A scale of 1 costs no extra pass.
    """
    v = full = predict("prompt", camera)
    if guidance_scale != 1:
        v = v + (guidance_scale - 1) * (full - predict("negative", camera))
    if camera and camera_guidance_scale != 1:
        v = v + (camera_guidance_scale - 1) * (full - predict("prompt", False))
    return v
