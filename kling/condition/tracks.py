"""Tracks of points through a clip, and the map in which the transformer sees them.

A track says where what is under a point of one frame shall be in the others (motion brush). The map has c + 1 channels at the size of the
latents. To every place of a track it copies the latent under its start, as Wan-Move does (Chu et al. 2025, arXiv 2512.08765), and its last
channel says where that is. If no frame is given to copy from, the map has a code there instead, which says whose track it is: code 0 is the
background, code k the k-th thing that the prompt names. The last channel is then negative.

A point lies between the centres of four cells, and is spread over them by its distances, so that the map also says where in a cell it is.
A latent frame is the mean of the pixel frames that it holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kling.shapes import TEMPORAL, latent_frames, latent_of_frame

BACKGROUND = 0  # the code of what belongs to no thing


@dataclass(frozen=True)
class Tracks:
    """n tracks over T pixel frames. Places outside the picture belong to no frame, so tracks may leave it and come back."""

    points: Tensor  # (n, T, 2) x and y, divided by the width and the height of the picture
    there: Tensor  # (n, T) bool: False where the track says nothing, for example because its point is hidden
    code: Tensor  # (n,) long

    def __len__(self) -> int:
        return len(self.points)

    def frames(self, start: int, end: int) -> Tracks:
        """The same tracks in pixel frames start … end - 1 only."""
        return Tracks(self.points[:, start:end], self.there[:, start:end], self.code)


def joined(parts: Sequence[Tracks]) -> Tracks:
    """All tracks of several, over the same frames."""
    return Tracks(*(torch.cat([getattr(part, name) for part in parts]) for name in ("points", "there", "code")))


def codes(index: Tensor, channels: int) -> Tensor:
    """(n,) -> (n, channels) of 1 and -1: rows of a Hadamard matrix, so that any two of them have nothing in common.

    Entry (k, i) is negative where k and i have an odd number of bits in common (Sylvester's construction).
    """
    common = index[:, None] & torch.arange(channels)  # (n, channels)
    odd = torch.stack([(common >> bit) & 1 for bit in range(16)]).sum(0) % 2
    return 1.0 - 2.0 * odd


def track_map(tracks: Tracks, clean: Tensor, known: int, appended: Sequence[int] = ()) -> Tensor:
    """The map (c + 1, G, h, w) of one clip.

    Args:
        tracks: over the T pixel frames of the clip.
        clean: (c, F, h, w) latents, of which only the first `known` are used.
        known: latent frames that are given at the start of the clip. Latents are copied from the last of them, and tracks that are not in
            it are left out; the map says nothing about earlier ones. With 0 the map has codes.
        appended: pixel frames of the keyframes that follow the F frames of the clip.
    """
    c, F, h, w = clean.shape
    n, T, _ = tracks.points.shape
    if latent_frames(T) != F:
        raise ValueError(f"tracks over {T} frames for {F} latent frames: give {1 + TEMPORAL * (F - 1)}")
    G, last = F + len(appended), max(0, known - 1)
    cell, weight = _spread(tracks, h, w)  # (n, T, 4), (n, T, 4)
    latent = torch.tensor([latent_of_frame(t) for t in range(T)])  # (T,)
    shown = torch.where(latent == 0, 1.0, 1 / TEMPORAL) * (latent >= last)  # (T,) share of each frame in its latent
    if known:
        source = (weight * (latent == last)[:, None]).flatten(1)  # (n, 4T)
        under = clean[:, last].flatten(1).T[cell.flatten(1)]  # (n, 4T, c)
        reached = source.sum(1, keepdim=True)  # (n, 1)
        content = (under * source[..., None]).sum(1) / reached.clamp(min=1e-6)  # (n, c)
        weight = weight * (reached > 0)[..., None]
    else:
        content = codes(tracks.code, c)  # (n, c)

    at = [t for t in range(T)] + list(appended)
    frame = torch.cat([latent, torch.arange(F, G)])  # (T + K,) the latent frame of each
    share = torch.cat([shown, torch.ones(len(appended))])  # (T + K,)
    place = (frame[:, None] * (h * w) + cell[:, at]).flatten(1)  # (n, 4(T + K))
    amount = (weight[:, at] * share[:, None]).flatten(1)  # (n, 4(T + K))
    sums = torch.zeros(G * h * w, c + 1).index_add_(
        0, place.flatten(), (torch.cat([content, torch.ones(n, 1)], dim=1)[:, None] * amount[..., None]).flatten(0, 1)
    )  # (G · h · w, c + 1)
    sums = sums / sums[:, -1:].clamp(min=1)  # where many tracks meet: their mean
    if not known:
        sums[:, -1] *= -1
    return sums.T.unflatten(1, (G, h, w)).contiguous()  # (c + 1, G, h, w)


def track_maps(
    tracks: Sequence[Tracks | None], clean: Tensor, known: Sequence[int], appended: Sequence[Sequence[int]]
) -> Tensor:  # fmt: skip
    """The maps (b, c + 1, G, h, w) of a batch of clips with latents (b, c, F, h, w); 0 for a clip without tracks."""
    b, c, F, h, w = clean.shape
    maps = torch.zeros(b, c + 1, F + len(appended[0]), h, w)
    for i, mine in enumerate(tracks):
        if mine is not None and len(mine):
            maps[i] = track_map(mine, clean[i].float().cpu(), known[i], appended[i])
    return maps.to(clean)


def _spread(tracks: Tracks, h: int, w: int) -> tuple[Tensor, Tensor]:
    """The four cells around each place (n, T, 4), as indices into h · w, and the share of each (n, T, 4); 0 outside the picture."""
    x, y = tracks.points.float().unbind(-1)  # (n, T)
    inside = tracks.there & (x >= 0) & (x <= 1) & (y >= 0) & (y <= 1)
    x, y = (torch.nan_to_num(v * size - 0.5).clamp(0, size - 1) for v, size in ((x, w), (y, h)))  # centres at whole numbers
    left, top = x.floor().clamp(max=max(0, w - 2)), y.floor().clamp(max=max(0, h - 2))
    dx, dy = x - left, y - top
    right, bottom = (left + 1).clamp(max=w - 1), (top + 1).clamp(max=h - 1)
    cells = torch.stack([top * w + left, top * w + right, bottom * w + left, bottom * w + right], dim=-1).long()
    shares = torch.stack([(1 - dy) * (1 - dx), (1 - dy) * dx, dy * (1 - dx), dy * dx], dim=-1)
    return cells, shares * inside[..., None]
