"""Camera trajectories and the Plücker rays a model sees.

Conventions, written down once:
  - OpenCV axes: x right, y down, z forward. `c2w` maps camera to world, and is relative to frame 0 (frame 0 is the identity).
  - Intrinsics (fx, fy, cx, cy) per frame, normalised: fx and cx by the width, fy and cy by the height. Pixel centres lie at +0.5.
  - A ray through a pixel: d = R K^-1 [u, v, 1]^T normalised, moment o x d; six components in the order (o x d, d).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from einops import rearrange
from torch import Tensor

from kling.errors import UserError
from kling.runtime.device import upload
from kling.shapes import TEMPORAL, latent_frames

RAY_CHANNELS = 6 * TEMPORAL


@dataclass(frozen=True)
class Trajectory:
    """Where the camera is and how it sees, for every pixel frame."""

    c2w: Tensor  # (T, 3, 4) [R | o], relative to frame 0; translation in the units of the model's scale rule (metres in the small world)
    intrinsics: Tensor  # (T, 4) fx, fy, cx, cy, normalised by W and H

    def __post_init__(self) -> None:
        if self.c2w.shape[1:] != (3, 4) or self.intrinsics.shape != (len(self.c2w), 4):
            raise UserError(
                f"camera with c2w {tuple(self.c2w.shape)} and intrinsics {tuple(self.intrinsics.shape)}: give (T, 3, 4) and (T, 4)"
            )

    def __len__(self) -> int:
        return len(self.c2w)

    def __getitem__(self, frames: slice) -> Trajectory:
        return Trajectory(self.c2w[frames], self.intrinsics[frames])

    def relative(self, frame: int = 0) -> Trajectory:
        """The same path seen from `frame`, whose pose becomes the identity."""
        R, o = self.c2w[:, :, :3], self.c2w[:, :, 3:]
        Rᵀ = R[frame].mT
        return Trajectory(torch.cat([Rᵀ @ R, Rᵀ @ (o - o[frame])], dim=-1), self.intrinsics)

    def scaled(self, scale: float) -> Trajectory:
        """The same path with its translation multiplied by `scale`."""
        return Trajectory(torch.cat([self.c2w[:, :, :3], scale * self.c2w[:, :, 3:]], dim=-1), self.intrinsics)


def pixel_rays(intrinsics: Tensor, H: int, W: int) -> Tensor:
    """K^-1 [u, v, 1]^T for every pixel centre, not normalised: (T, 4) -> (T, 3, H, W), third component 1."""
    fx, fy, cx, cy = (k[:, None, None] for k in intrinsics.unbind(-1))  # (T, 1, 1) each
    like = {"dtype": intrinsics.dtype, "device": intrinsics.device}
    u = ((torch.arange(W, **like) + 0.5) / W)[None, None, :]
    v = ((torch.arange(H, **like) + 0.5) / H)[None, :, None]
    x = ((u - cx) / fx).expand(-1, H, W)
    y = ((v - cy) / fy).expand(-1, H, W)
    return torch.stack([x, y, torch.ones_like(x)], dim=1)


def plucker_rays(trajectory: Trajectory, H: int, W: int) -> Tensor:
    """(o x d, d) for every pixel centre, as (T, 6, H, W)."""
    R, o = trajectory.c2w[:, :, :3], trajectory.c2w[:, :, 3]
    with torch.autocast(R.device.type, enabled=False):  # directions stay fp32 inside a pass in bf16
        d = torch.einsum("tij,tjhw->tihw", R, pixel_rays(trajectory.intrinsics, H, W))  # (T, 3, H, W)
    d = d / d.norm(dim=1, keepdim=True)
    moment = torch.linalg.cross(o[:, :, None, None].expand_as(d), d, dim=1)
    return torch.cat([moment, d], dim=1)


@dataclass(frozen=True)
class Cameras:
    """The cameras of a batch in the form that is copied to a device: poses of 64 bytes a frame, from which the device computes the rays.

    The rays themselves are large: 805 MB for a clip of 81 frames at 480p.
    """

    c2w: Tensor  # (b, T, 3, 4), as in `Trajectory`
    intrinsics: Tensor  # (b, T, 4)
    size: tuple[int, int]  # (H, W) of the grid of rays: the pixels for a model that folds 8x8 of them, the latents for one that pools
    appended: Tensor  # (b, K) pixel frames of the lone keyframes
    references: int = 0  # pictures after them, which no camera of the clip saw: their rays are 0, which no ray is

    def __post_init__(self) -> None:
        latent_frames(self.c2w.shape[1])  # refuses what is not 1 + 4k

    @property
    def frames(self) -> int:
        """G: latent frames, and after them the keyframes and the references."""
        return self._posed + self.references

    @property
    def _posed(self) -> int:
        return latent_frames(self.c2w.shape[1]) + self.appended.shape[1]

    def to(self, device: torch.device | str) -> Cameras:
        """On another device, without waiting for it."""
        return self.each(partial(upload, device=device))

    def each(self, change: Callable[[Tensor], Tensor]) -> Cameras:
        """The same with every tensor changed."""
        return replace(self, **{name: change(getattr(self, name)) for name in ("c2w", "intrinsics", "appended")})

    def rows(self, start: int) -> Cameras:
        """The samples from `start` on."""
        return self.each(lambda t: t[start:])

    def repeated(self, k: int) -> Cameras:
        """The camera of one clip for k equal ones."""
        return self.each(lambda t: t.expand(k, *t.shape[1:]))

    @staticmethod
    def joined(parts: Sequence[Cameras]) -> Cameras:
        """The cameras of several clips of the same length, grid and appended pictures, as of one batch."""
        whole = {name: torch.cat([getattr(part, name) for part in parts]) for name in ("c2w", "intrinsics", "appended")}
        return replace(parts[0], **whole)

    def rays(self, start: int = 0, end: int | None = None) -> Tensor:
        """The packed rays P of latent frames start … end - 1, on the device of the poses: (b, 24, end - start, H, W).

        Frame 0 is repeated four times, then each latent has its four frames; an appended keyframe repeats its own pose four times. A
        reference has none.
        """
        b, T = self.c2w.shape[:2]
        end = self.frames if end is None else end
        blank = max(0, end - max(start, self._posed))  # references among them
        clip = (torch.arange(T + TEMPORAL - 1, device=self.c2w.device) - (TEMPORAL - 1)).clamp(min=0)  # (4f,)
        lone = self.appended[..., None].expand(-1, -1, TEMPORAL).flatten(1)  # (b, 4K)
        at = torch.cat([clip.expand(b, -1), lone], dim=1)[:, TEMPORAL * start : TEMPORAL * end]
        row = torch.arange(b, device=at.device)[:, None]
        rays = plucker_rays(Trajectory(self.c2w[row, at].flatten(0, 1), self.intrinsics[row, at].flatten(0, 1)), *self.size)
        rays = rearrange(rays, "(b f t) c h w -> b (c t) f h w", b=b, t=TEMPORAL)
        return torch.nn.functional.pad(rays, (0, 0, 0, 0, 0, blank)) if blank else rays


def focal_of(H: int, W: int, f: float = 1.1) -> tuple[float, float]:
    """Normalised (fx, fy) of a square-pixel camera whose focal length is `f` times sqrt(H * W) pixels: equal areas see equal angles."""
    focal = f * (H * W) ** 0.5
    return focal / W, focal / H
