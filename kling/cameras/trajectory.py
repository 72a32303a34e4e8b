"""Camera trajectories and the Plücker rays a model sees.

Conventions, written down once:
  - OpenCV axes: x right, y down, z forward. `c2w` maps camera to world, and is relative to frame 0 (frame 0 is the identity).
  - Intrinsics (fx, fy, cx, cy) per frame, normalised: fx and cx by the width, fy and cy by the height. Pixel centres lie at +0.5.
  - A ray through a pixel: d = R K^-1 [u, v, 1]^T normalised, moment o x d; six components in the order (o x d, d).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from kling.errors import UserError
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
    u = ((torch.arange(W, dtype=intrinsics.dtype) + 0.5) / W)[None, None, :]
    v = ((torch.arange(H, dtype=intrinsics.dtype) + 0.5) / H)[None, :, None]
    x = ((u - cx) / fx).expand(-1, H, W)
    y = ((v - cy) / fy).expand(-1, H, W)
    return torch.stack([x, y, torch.ones_like(x)], dim=1)


def plucker_rays(trajectory: Trajectory, H: int, W: int) -> Tensor:
    """(o x d, d) for every pixel centre, as (T, 6, H, W)."""
    R, o = trajectory.c2w[:, :, :3], trajectory.c2w[:, :, 3]
    d = torch.einsum("tij,tjhw->tihw", R, pixel_rays(trajectory.intrinsics, H, W))  # (T, 3, H, W)
    d = d / d.norm(dim=1, keepdim=True)
    moment = torch.linalg.cross(o[:, :, None, None].expand_as(d), d, dim=1)
    return torch.cat([moment, d], dim=1)


def pack_rays(rays: Tensor) -> Tensor:
    """(T, 6, H, W) -> (24, f, H, W): frame 0 four times, then four frames a latent; channel = component * 4 + frame."""
    latent_frames(len(rays))  # refuses what is not 1 + 4k
    rays = torch.cat([rays[:1].expand(TEMPORAL, -1, -1, -1), rays[1:]])  # (4f, 6, H, W)
    return rearrange(rays, "(f t) c h w -> (c t) f h w", t=TEMPORAL)


def camera_signal(trajectory: Trajectory, H: int, W: int, appended: tuple[int, ...] = ()) -> Tensor:
    """P of the design: (24, G, H, W), the clip's packed rays and then, for every appended keyframe, its own pose four times.

    `H, W` is the grid of the rays: the pixels for a model that folds 8x8 pixels into channels, the latent grid for one that pools.
    """
    rays = plucker_rays(trajectory, H, W)  # (T, 6, H, W)
    packed = [pack_rays(rays)]
    packed += [rays[t][:, None].expand(-1, TEMPORAL, -1, -1).reshape(RAY_CHANNELS, 1, H, W) for t in appended]
    return torch.cat(packed, dim=1)


def focal_of(H: int, W: int, f: float = 1.1) -> tuple[float, float]:
    """Normalised (fx, fy) of a square-pixel camera whose focal length is `f` times sqrt(H * W) pixels: equal areas see equal angles."""
    focal = f * (H * W) ** 0.5
    return focal / W, focal / H
