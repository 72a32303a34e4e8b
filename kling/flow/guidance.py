"""Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598), on the text and separately on the camera, tracks and references."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from kling.condition.state import is_reference


def guided_velocity(
    predict: Callable[[str, bool], Tensor], guidance_scale: float, camera_guidance_scale: float, camera: bool,
    share: Tensor | None = None, without: Mapping[str, float] = {},
) -> Tensor:  # fmt: skip
    """Combine as few predictions as the scales require.

        v = v(text, cam) + (g - 1) (v(text, cam) - v(negative, cam)) + (g_cam - 1) (v(text, cam) - v(text, no cam))

    predict(which, camera): the velocity with text "prompt" or "negative", with the camera or without; each a new tensor, which may be
    overwritten. A scale of 1 costs no extra pass.
    without: scales of what else can be left out, "no tracks" and "no references": `predict` gets these names, for a pass with the prompt.
    share: (b, 1, G, 1, 1) the fraction of every scale - 1 for each frame; None is all of it. See `given_share`.
    """
    v = full = predict("prompt", camera)
    if guidance_scale != 1:
        scale = guidance_scale if share is None else (1 + share * (guidance_scale - 1)).to(v)
        v = predict("negative", camera).lerp_(full, scale)  # one pass over memory, in place
    if camera and camera_guidance_scale != 1:
        change = torch.sub(full, predict("prompt", False)).mul_(camera_guidance_scale - 1)
        v = v + (change if share is None else share.to(v) * change)
    for which, scale in without.items():
        if scale != 1:
            change = torch.sub(full, predict(which, camera)).mul_(scale - 1)
            v = v + (change if share is None else share.to(v) * change)
    return v


def given_share(mask: Tensor, position: Tensor, kind: Tensor, reach: float) -> Tensor | None:
    """The fraction of guidance for each frame: 0 where a whole frame is given, 1 from `reach` latent frames away, linear in between.

    A picture carries more information than words, and guidance moves the frames near it away from its colours. Stable Video Diffusion
    (Blattmann et al. 2023, arXiv 2311.15127) raises the scale over the frames after a first one; this does so from any given frame.

    mask: (b, 1, G, h, w), 0 where given. position, kind: (b, G). All on the CPU, otherwise the host waits for them. A reference shows a
    thing, not what a frame near it looks like, so it takes no guidance from the clip.
    Returns (b, 1, G, 1, 1), or None if no clip has a whole given frame.
    """
    whole = (mask.amax(dim=(1, 3, 4)) == 0) & ~is_reference(kind)  # (b, G)
    if reach == 0 or not bool(whole.any()):
        return None
    far = (position[:, :, None] - position[:, None]).abs()  # (b, G, G)
    nearest = far.masked_fill(~whole[:, None], torch.inf).amin(dim=2)  # (b, G)
    return (nearest / reach).clamp(max=1)[:, None, :, None, None]


class Guidance:
    """Guidance on some of the steps, to save time, and on some of the frames.

    interval: the levels (low, high) between which guidance is used; it gains nothing at high noise and little at low noise (Kynkäänniemi et
    al. 2024, arXiv 2404.07724). every: it is computed in every `every`-th of these steps; the steps between add the last change again.
    share, without: as in `guided_velocity`.
    """

    def __init__(
        self, interval: tuple[float, float] = (0.0, 1.0), every: int = 1, share: Tensor | None = None, without: Mapping[str, float] = {}
    ) -> None:
        self.low, self.high = interval
        self.every, self.share, self.without = every, share, without
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
            return guided_velocity(predict, guidance_scale, camera_guidance_scale, camera, self.share, self.without)
        plain: list[Tensor] = []

        def remember(which: str, with_camera: bool) -> Tensor:
            v = predict(which, with_camera)
            plain.append(v)
            return v

        v = guided_velocity(remember, guidance_scale, camera_guidance_scale, camera, self.share, self.without)
        self.change = v - plain[0]  # the first prediction is the plain one
        return v
