"""Pixel metrics: tensors in, numbers out. Videos are (b, 3, T, H, W) in [-1, 1]."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kling.errors import UserError

SSIM_WINDOW, SSIM_SIGMA = 11, 1.5
NEIGHBOURS = 6  # pairs of frames on each side of a seam that are compared with it


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of every frame, (b, T)."""
    error = (a.float() - b.float()).square().mean(dim=(1, 3, 4))  # (b, T)
    return 10 * (4 / error.clamp(min=1e-10)).log10()


def diversity(videos: Tensor) -> float:
    """How different the clips (k, T, H, W, 3) uint8 of one request are: mean root-mean-square difference of all pairs, in [0, 1]."""
    x = videos.flatten(1).float() / 255  # (k, ·)
    pairs = torch.pdist(x) / x.shape[1] ** 0.5
    return float(pairs.mean()) if len(pairs) else 0.0


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of every frame, (b, T): gaussian window of 11 (sigma 1.5), whole windows only, mean over the colours.

    Wang, Bovik, Sheikh, Simoncelli, "Image quality assessment: from error visibility to structural similarity", 2004.
    """
    if min(a.shape[-2:]) < SSIM_WINDOW:
        raise UserError(f"{a.shape[-1]}x{a.shape[-2]} pixels are too few for SSIM: give at least {SSIM_WINDOW}x{SSIM_WINDOW}")
    n = SSIM_WINDOW // 2
    k = torch.exp(-(torch.arange(-n, n + 1, dtype=torch.float64) ** 2) / (2 * SSIM_SIGMA**2))
    k = (k / k.sum()).to(a.device)

    def local_mean(x: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x, k.view(1, 1, 1, -1)), k.view(1, 1, -1, 1))

    batch, channels, T, H, W = a.shape
    a, b = (((x.double() + 1) / 2).transpose(1, 2).reshape(-1, 1, H, W) for x in (a, b))  # (bT3, 1, H, W) in [0, 1]
    mean_a, mean_b = local_mean(a), local_mean(b)
    var_a, var_b = local_mean(a * a) - mean_a**2, local_mean(b * b) - mean_b**2
    covariance = local_mean(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + 0.01**2) / (mean_a**2 + mean_b**2 + 0.01**2)
    structure = (2 * covariance + 0.03**2) / (var_a + var_b + 0.03**2)
    return (luminance * structure).mean(dim=(1, 2, 3)).view(batch, T, channels).mean(dim=2).float()


def temporal_psnr(a: Tensor, b: Tensor) -> Tensor:
    """PSNR in dB of the change from each frame to the next, (b, T-1): ignores constant errors, detects flicker."""
    return psnr(a[:, :, 1:] - a[:, :, :-1], b[:, :, 1:] - b[:, :, :-1])


def flicker(video: Tensor) -> Tensor:
    """Mean absolute second difference in time, in levels of 255, (b,): small for steady motion, large for flicker."""
    second = video[:, :, 2:] - 2 * video[:, :, 1:-1] + video[:, :, :-2]
    return second.abs().mean(dim=(1, 2, 3, 4)) * 127.5


def seam(video: Tensor, t: int) -> dict[str, Tensor]:
    """How visible the join between frames t - 1 and t is; every entry (b,).

    psnr: of the pair. gap: dB by which it is below the median of the surrounding pairs (0 is no seam).
    jump: change of the mean colour over the seam, in levels of 255. usual: its median over the surrounding pairs.
    """
    pairs = psnr(video[:, :, 1:], video[:, :, :-1])  # (b, T-1): entry i joins frames i and i+1
    colour = video.float().mean(dim=(3, 4)) * 127.5  # (b, 3, T)
    jumps = (colour[:, :, 1:] - colour[:, :, :-1]).norm(dim=1)  # (b, T-1)
    around = [i for i in range(t - 1 - NEIGHBOURS, t + NEIGHBOURS) if 0 <= i < pairs.shape[1] and i != t - 1]
    usual_psnr, usual_jump = pairs[:, around].median(dim=1).values, jumps[:, around].median(dim=1).values
    return {"psnr": pairs[:, t - 1], "gap": usual_psnr - pairs[:, t - 1], "jump": jumps[:, t - 1], "usual": usual_jump}
