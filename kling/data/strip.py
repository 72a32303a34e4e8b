"""Clips as one picture."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kling.data.transforms import Frames


def spread(clip: torch.Tensor, columns: int = 6) -> torch.Tensor:
    """The frames of a clip (T, H, W, 3) that a strip shows, (columns, H, W, 3)."""
    return clip[torch.linspace(0, len(clip) - 1, columns).round().long()]


def strip(rows: Sequence[Frames], columns: int = 6, gap: int = 2) -> torch.Tensor:
    """Clips (T, H, W, 3) uint8 as one picture (h, w, 3): a row per clip, each with `columns` frames spread evenly over the clip.

    gap: pixels between frames. Gaps, and the end of rows narrower than others, are white.
    """
    pictures = []
    for clip in map(torch.as_tensor, rows):
        frames = torch.nn.functional.pad(spread(clip, columns), (0, 0, 0, gap, 0, gap), value=255)  # (columns, H+gap, W+gap, 3)
        pictures.append(torch.cat(list(frames), dim=1))
    widest = max(picture.shape[1] for picture in pictures)
    whole = torch.cat([torch.nn.functional.pad(picture, (0, 0, 0, widest - picture.shape[1]), value=255) for picture in pictures])
    return whole[: len(whole) - gap, : widest - gap]
