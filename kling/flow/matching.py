"""Distribution matching: few-step samples with the teacher's distribution (DMD2: Yin et al. 2024, arXiv 2405.14867).

A critic learns the distribution of the student's samples x0. At a noise level, the difference between its prediction of the clean clip and
the teacher's points from where the student's samples lie too densely to where they lie too thinly (eq. 2 and 7, for predictions of x0).
"""

from __future__ import annotations

from torch import Tensor


def matching_target(x0: Tensor, fake: Tensor, real: Tensor, mask: Tensor) -> Tensor:
    """Regression target of a student's sample: x0 - (fake - real) / mean |x0 - real|, without gradient. (b, c, G, h, w)

    The gradient of |x0 - target|² / 2 is then the difference of the two predictions, with the same size at all noise levels.

    x0: the sample. fake, real: the clean clip as predicted from the noised sample by the critic and by the guided teacher. mask: m
    (b, 1, G, h, w); given elements (m = 0) do not count in the mean.
    """
    apart = (mask > 0) * (x0 - real).abs()
    count = (mask > 0).flatten(1).sum(1) * x0.shape[1]  # (b,) elements that are not given
    size = apart.flatten(1).sum(1) / count.clamp(min=1)
    return (x0 - (fake - real) / size.clamp(min=1e-6).view(-1, 1, 1, 1, 1)).detach()
