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


def track_maps(
    tracks: Sequence[Tracks | None], clean: Tensor, known: Sequence[int], appended: Sequence[Sequence[int]]
) -> Tensor:  # fmt: skip
    """The maps (b, c + 1, G, h, w) of a batch of clips; 0 for a clip without tracks.

    Args:
        tracks: of each clip, over its T pixel frames.
        clean: (b, c, F, h, w) latents, of which only the first `known` are used.
        known: latent frames that are given at the start of each clip. Latents are copied from the last of them, and tracks that are not in
            it are left out; the map says nothing about earlier ones. With 0 the map has codes.
        appended: pixel frames of the keyframes that follow the F frames of each clip, as many for all.
    """
    b, c, F, h, w = clean.shape
    maps = torch.zeros(b, c + 1, F + len(appended[0]), h, w)
    some = [i for i, mine in enumerate(tracks) if mine is not None and len(mine)]
    if some:
        begins, times = (torch.tensor([of[i] for i in some], dtype=torch.long) for of in (known, [*map(list, appended)]))
        maps[some] = _maps([mine for mine in tracks if mine is not None and len(mine)], clean[some].float().cpu(), begins, times)
    return maps.to(clean)


def _maps(tracks: Sequence[Tracks], clean: Tensor, known: Tensor, appended: Tensor) -> Tensor:
    """(b, c + 1, G, h, w) of clips that all have tracks, n together: clean (b, c, F, h, w), known (b,), appended (b, K)."""
    b, c, F, h, w = clean.shape
    every, T, K = joined(tracks), tracks[0].points.shape[1], appended.shape[1]
    if latent_frames(T) != F:
        raise ValueError(f"tracks over {T} frames for {F} latent frames: give {1 + TEMPORAL * (F - 1)}")
    G, of = F + K, torch.repeat_interleave(torch.arange(b), torch.tensor([len(mine) for mine in tracks]))  # (n,) whose track it is
    cell, weight = _spread(every, h, w)  # (n, T, 4), (n, T, 4)
    latent = torch.tensor([latent_of_frame(t) for t in range(T)])  # (T,)
    last = (known - 1).clamp(min=0)  # (b,)
    shown = torch.where(latent == 0, 1.0, 1 / TEMPORAL) * (latent >= last[of, None])  # (n, T) share of each frame in its latent
    content = codes(every.code, c)  # (n, c)
    copied = (known[of] > 0).nonzero()[:, 0]  # (m,) tracks of clips with a frame to copy from
    if len(copied):
        source = (weight[copied] * (latent == last[of[copied], None])[..., None]).flatten(1)  # (m, 4T)
        frame = clean[torch.arange(b), :, last].flatten(2).mT  # (b, h · w, c)
        under = frame[of[copied, None], cell[copied].flatten(1)]  # (m, 4T, c)
        reached = source.sum(1, keepdim=True)  # (m, 1)
        content[copied] = (under * source[..., None]).sum(1) / reached.clamp(min=1e-6)
        weight[copied] *= (reached > 0)[..., None]

    lone = torch.arange(len(of))[:, None], appended[of]  # places at the keyframes (n, K)
    cell, weight = torch.cat([cell, cell[lone]], dim=1), torch.cat([weight, weight[lone]], dim=1)  # (n, T + K, 4)
    frame = torch.cat([latent, torch.arange(F, G)])  # (T + K,) the latent frame of each
    place = ((of[:, None] * G + frame) * (h * w))[..., None] + cell  # (n, T + K, 4)
    amount = weight * torch.cat([shown, torch.ones(len(of), K)], dim=1)[..., None]  # (n, T + K, 4)
    track, when, corner = amount.nonzero(as_tuple=True)  # (s,) each
    values = torch.cat([content, torch.ones(len(of), 1)], dim=1)[track] * amount[track, when, corner, None]  # (s, c + 1)
    sums = torch.zeros(b * G * h * w, c + 1).index_add_(0, place[track, when, corner], values)
    sums = (sums / sums[:, -1:].clamp(min=1)).unflatten(0, (b, G, h, w))  # where many tracks meet: their mean
    sums[known == 0, ..., -1] *= -1
    return sums.movedim(-1, 1)


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
