"""Camera adapter: packed Plücker rays become a residual added to the tokens; zero at initialisation."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from kling.errors import unknown

FOLDS = ("unshuffle", "pool")


class ResidualBlock(nn.Module):
    """x + conv(relu(conv(x))), the identity until trained."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(dim, dim, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(x)))


class CameraAdapter(nn.Module):
    """Rays (b, c, G, H, W) -> (b, n, d).

    `unshuffle` folds every pixel of a latent cell into channels, with the parameter names of the published Wan-Fun Camera weights;
    `pool` averages the cell, which is enough for small models and 64 times smaller.
    """

    def __init__(
        self, channels: int, dim: int, patch: tuple[int, int], fold: str = "unshuffle", downscale: int = 8, blocks: int = 1
    ) -> None:
        super().__init__()
        if fold not in FOLDS:
            raise unknown("camera_fold", fold, FOLDS)
        self.downscale = downscale
        self.fold = fold
        in_channels = channels * downscale**2 if fold == "unshuffle" else channels
        self.conv = nn.Conv2d(in_channels, dim, kernel_size=patch, stride=patch)
        self.residual_blocks = nn.Sequential(*(ResidualBlock(dim) for _ in range(blocks)))

    def zero_init(self) -> None:
        """Set the output to exactly 0, in a way that leaves gradients non-zero."""
        for conv in (self.conv, *(block.conv2 for block in self.residual_blocks)):
            nn.init.zeros_(conv.weight)
            nn.init.zeros_(conv.bias)

    def forward(self, rays: Tensor) -> Tensor:
        b = rays.shape[0]
        x = rays.transpose(1, 2).flatten(0, 1)  # (b·G, c, H, W)
        x = F.pixel_unshuffle(x, self.downscale) if self.fold == "unshuffle" else F.avg_pool2d(x, self.downscale)  # (b·G, c', h, w)
        x = self.residual_blocks(self.conv(x))  # (b·G, d, h/ph, w/pw)
        return x.flatten(2).transpose(1, 2).reshape(b, -1, x.shape[1])  # (b, n, d)
