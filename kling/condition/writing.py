"""How published weights take tracks: written into the extra input channels of the plain Wan 2.1 image-to-video layout (mask, clean).

copy    Wan-Move (Chu et al. 2025, arXiv 2512.08765; wan/modules/trajectory.py): the latent of the first frame under a track's start
        replaces that of every later place. A latent takes the last of its four frames.
splat   ATI (Wang et al. 2025, arXiv 2505.22944; wan/modules/motion_patch.py): the same latent, interpolated, is spread around the mean
        place of the four frames by exp(-220 d²), and the mask says with which weight. d is in halves of the picture's shorter side.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kling.condition.tracks import Tracks
from kling.shapes import TEMPORAL

WAYS = ("copy", "splat")
SHARPNESS = 220.0
NEAREST = 2  # tracks that a place takes
TINY = 1e-5  # in ATI's mean over visible frames


def write_tracks(concat: Tensor, tracks: Tracks, way: str) -> Tensor:
    """The extra channels (1, 4 + c, F, h, w), mask and clean latents, with tracks over the clip's frames written into them."""
    mask, clean = concat[0, :TEMPORAL], concat[0, TEMPORAL:]  # (4, F, h, w), (c, F, h, w)
    write = {"copy": _copied, "splat": _splatted}[way]
    return torch.cat(write(mask, clean, tracks))[None]


def _copied(mask: Tensor, clean: Tensor, tracks: Tracks) -> tuple[Tensor, Tensor]:
    c, F_, h, w = clean.shape
    points, there = tracks.points[:, ::TEMPORAL], tracks.there[:, ::TEMPORAL]  # (n, F, 2), (n, F): frames 0, 4, 8, …
    inside = there & (points >= 0).all(-1) & (points < 1).all(-1)  # (n, F)
    column, row = (torch.nan_to_num(points, posinf=0, neginf=0) * points.new_tensor([w, h])).long().unbind(-1)  # (n, F)
    clean = clean.clone()
    first = clean[:, 0].clone()  # (c, h, w)
    for n in inside[:, 0].nonzero().flatten().tolist():
        when = inside[n, 1:].nonzero().flatten() + 1
        clean[:, when, row[n, when], column[n, when]] = first[:, row[n, 0], column[n, 0], None]
    return mask, clean


def _splatted(mask: Tensor, clean: Tensor, tracks: Tracks) -> tuple[Tensor, Tensor]:
    c, F_, h, w = clean.shape
    half = torch.tensor([w, h]) / min(w, h)  # the picture's half sides, in halves of the shorter one
    place = torch.nan_to_num(2 * tracks.points - 1, posinf=9.0, neginf=-9.0)  # (n, T, 2) in [-1, 1] inside the picture
    seen = tracks.there[:, 1:].float().unflatten(1, (F_ - 1, TEMPORAL))  # (n, F - 1, 4)
    moved = (place * half)[:, 1:].unflatten(1, (F_ - 1, TEMPORAL))  # (n, F - 1, 4, 2)
    count = seen.sum(2)  # (n, F - 1)
    mean = (moved * seen[..., None]).sum(2) / (count[..., None] + TINY)  # (n, F - 1, 2)
    y, x = (torch.linspace(-float(limit), float(limit), size) for limit, size in ((half[1], h), (half[0], w)))
    far = (mean[:, :, None, None, 0] - x) ** 2 + (mean[:, :, None, None, 1] - y[:, None]) ** 2  # (n, F - 1, h, w)
    weight = torch.exp(-SHARPNESS * far) * count.clamp(max=1)[:, :, None, None]  # (n, F - 1, h, w)
    most, which = weight.topk(min(NEAREST, len(weight)), dim=0)  # (k, F - 1, h, w)
    under = F.grid_sample(clean[None, :, 0], place[None, :, :1].clamp(-1, 1), align_corners=False)[0, :, :, 0]  # (c, n)
    content = (under[:, which] * most).sum(1)  # (c, F - 1, h, w)
    total = most.sum(0)  # (F - 1, h, w)
    later = content + clean[:, 1:] * (1 - total.clamp(0, 1))
    known = torch.cat([torch.ones_like(total[:1]), total]).expand_as(mask)  # (4, F, h, w)
    return known, torch.cat([clean[:, :1], later], dim=1)
