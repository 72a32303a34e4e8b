"""The join of a continuation: what the VAE lost of the last frame fades out, on the thing that it was lost from, and nowhere else."""

from __future__ import annotations

import cv2
import numpy as np
import torch
from torch import Tensor

from kling.sampling.join import join

H, W, OVERLAP, FADE = 64, 112, 5, 4
SHARES = (0.8, 0.6, 0.4, 0.2)


def texture() -> np.ndarray:
    rough = np.random.default_rng(0).integers(60, 200, (H // 4, W // 4, 3)).astype(np.float32)
    return cv2.resize(rough, (W, H), interpolation=cv2.INTER_CUBIC).clip(0, 255)


def clip(pictures: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(pictures).round().astype(np.uint8))


def case(new: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A still texture, of which the VAE loses fine detail; new frames as decoded. (new frames out, in, what was lost)."""
    sharp = texture()
    detail = np.random.default_rng(1).normal(0, 4, (H, W, 3)).astype(np.float32)
    before, frames = clip([sharp + detail] * 7), clip([sharp] * OVERLAP + new)
    out = join(before, frames, OVERLAP, FADE)
    assert torch.equal(out[:7], before) and len(out) == 7 + len(new) and torch.equal(out[7 + FADE :], frames[OVERLAP + FADE :])
    return out[7:].numpy().astype(float), frames[OVERLAP:].numpy().astype(float), (before[-1].float() - frames[0].float()).numpy()


def test_on_what_stays_it_fades_in_place() -> None:
    out, new, lost = case([texture()] * 8)
    for k, share in enumerate(SHARES):
        assert np.abs(out[k] - (new[k] + share * lost).clip(0, 255)).mean() < 0.3


def test_on_what_moves_it_moves() -> None:
    out, new, lost = case([np.roll(texture(), 2 * (k + 1), axis=1) for k in range(8)])
    for k, share in enumerate(SHARES):
        added, there = (out[k] - new[k])[8:-8, 24:-24], np.roll(lost, 2 * (k + 1), axis=1)[8:-8, 24:-24]
        assert np.corrcoef(added.ravel(), there.ravel())[0, 1] > 0.8, "it goes with the picture"
        assert abs(np.corrcoef(added.ravel(), lost[8:-8, 24:-24].ravel())[0, 1]) < 0.2, "and does not stay behind"
        assert np.abs(added).mean() < share * np.abs(lost).mean() + 0.5


def test_what_appears_is_left_alone() -> None:
    covered = texture()
    covered[16:48, 30:80] = (255, 0, 0)
    out, new, _ = case([covered] * 8)
    assert np.abs(out - new)[:, 18:46, 32:78].max() <= 1


def test_nothing_fades_over_a_cut() -> None:
    before, frames = clip([texture()] * 5), clip([texture() * 0.5] * 13)
    assert torch.equal(join(before, frames, OVERLAP, 0), torch.cat([before, frames[OVERLAP:]]))
