"""The discriminator for the second half of the VAE's training: a 3-D patch network, its losses, and perceptual features from a file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from kling.errors import UserError


@dataclass
class Adversary:
    """weight: of the generator's term; 0 trains no discriminator. start: the update at which it begins, when reconstructions are good.

    warmup: updates in which only the discriminator learns, followed by as many in which the generator's weight rises from 0 to `weight`, so
    that an untrained discriminator has no influence. lr: of the discriminator. width: of its first layer. layers: halvings of space.
    """

    weight: float = 0.0
    start: int = 0
    warmup: int = 100
    lr: float = 4e-4
    width: int = 64
    layers: int = 3

    def weight_at(self, step: int) -> float:
        """The weight of the generator's term at update number `step`."""
        rise = (step - self.start - self.warmup) / max(1, self.warmup)
        return self.weight * min(1.0, max(0.0, rise))


class PatchDiscriminator3d(nn.Module):
    """Video (b, 3, T, H, W) -> scores (b, 1, T', H', W') of overlapping patches, high for real ones.

    PatchGAN (Isola et al. 2017, arXiv 1611.07004) in 3-D. Space is halved `layers` times, and time twice if there is more than one frame,
    so that one discriminator serves images and videos.
    Spectral norms bound every layer, so that no gradient penalty is needed (Miyato et al. 2018, arXiv 1802.05957).
    """

    def __init__(self, width: int = 64, layers: int = 3) -> None:
        super().__init__()
        widths = [3, *(width * min(2**i, 8) for i in range(layers))]
        self.convs = nn.ModuleList(
            nn.utils.parametrizations.spectral_norm(nn.Conv3d(a, b, (3, 4, 4), stride=(1, 2, 2), padding=1))
            for a, b in zip(widths[:-1], widths[1:], strict=True)
        )
        self.score = nn.utils.parametrizations.spectral_norm(nn.Conv3d(widths[-1], 1, 3, padding=1))

    def forward(self, video: Tensor) -> Tensor:
        x = video
        for i, conv in enumerate(self.convs):
            x = F.leaky_relu(conv(x), 0.2)  # (b, c, t, h/2, w/2)
            if 0 < i < 3 and x.shape[2] > 1:
                x = F.avg_pool3d(x, (2, 1, 1), ceil_mode=True)  # (b, c, ⌈t/2⌉, h, w)
        return self.score(x)


def hinge(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's loss: E max(0, 1 - D(x)) + E max(0, 1 + D(x̂)) (Lim and Ye 2017, arXiv 1705.02894)."""
    return F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean()


def generator_loss(fake: Tensor) -> Tensor:
    """The generator's loss: -E D(x̂)."""
    return -fake.float().mean()


@contextmanager
def frozen(critic: nn.Module) -> Iterator[None]:
    """Within this context the discriminator's weights get no gradients; the video does."""
    critic.requires_grad_(False)
    try:
        yield
    finally:
        critic.requires_grad_(True)


class Perceptual(nn.Module):
    """Distance between frames in the features of VGG-16 (Zhang et al. 2018, arXiv 1801.03924, without its learned weights).

    weights: a safetensors file with torchvision's names, `features.0.weight` … `features.28.bias`; no file is downloaded or unpickled.
    """

    LAYERS = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512)  # channels of convolutions; 0 halves the size
    MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def __init__(self, weights: str | Path) -> None:
        super().__init__()
        try:
            state = load_file(weights)
        except (OSError, SafetensorError) as error:
            raise UserError(f"perceptual weights '{weights}' cannot be read ({error}): give a safetensors file of VGG-16") from None
        layers: list[nn.Module] = []
        channels = 3
        for width in self.LAYERS:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()] if width else [nn.MaxPool2d(2)]
            channels = width or channels
        self.features = nn.Sequential(*layers)
        state = {name: t for name, t in state.items() if name.startswith("features.")}
        try:
            self.load_state_dict(state)
        except RuntimeError as error:
            raise UserError(f"perceptual weights '{weights}' are not VGG-16: {str(error).splitlines()[-1].strip()}") from None
        self.register_buffer("mean", torch.tensor(self.MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(self.STD).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    def forward(self, video: Tensor, reconstruction: Tensor) -> Tensor:
        """Videos (b, 3, T, H, W) in [-1, 1] -> mean squared distance of unit features, over stages, positions and frames."""
        x, y = ((v.transpose(1, 2).flatten(0, 1) / 2 + 0.5 - self.mean) / self.std for v in (video, reconstruction))  # (b·T, 3, H, W)
        distance = x.new_zeros(())
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):  # the end of a stage
                distance = distance + (F.normalize(x, dim=1) - F.normalize(y, dim=1)).square().sum(1).mean()
            x, y = layer(x), layer(y)
        return distance + (F.normalize(x, dim=1) - F.normalize(y, dim=1)).square().sum(1).mean()
