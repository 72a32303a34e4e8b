"""Where clips come from: the small world, or a folder of videos. A batch is a pure function of (seed, step), not of workers."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kling.condition.camera import Trajectory
from kling.data.transforms import to_tensor
from kling.data.world import FPS, World
from kling.errors import UserError
from kling.shapes import ASPECTS, aspect_size


@dataclass
class DataConfig:
    """What to train on.

    source: "world", or a folder of videos with sidecar captions. frames: lengths to draw from, each 1 + 4k. aspects: names to draw from.
    unconditional: a folder without captions is meant. skip_bad: leave out files that cannot be read, counted in the log.
    """

    source: str = "world"
    frames: list[int] = field(default_factory=lambda: [17])
    aspects: list[str] = field(default_factory=lambda: list(ASPECTS))
    fps: float = FPS
    unconditional: bool = False
    skip_bad: bool = False


@dataclass(frozen=True)
class ClipSample:
    """One clip: video (T, H, W, 3) uint8, captions, and the camera where it is known."""

    video: Tensor
    captions: list[str]
    trajectory: Trajectory | None
    name: str


class ClipSource:
    """Clips by index, at a length and an aspect. The world is endless; a folder goes round in a new order every epoch."""

    def __init__(self, cfg: DataConfig, seed: int = 0, split: str = "train") -> None:
        self.cfg, self.seed, self.split = cfg, seed, split
        self._folders: dict[tuple[int, str], object] = {}

    def clip(self, index: int, frames: int, aspect: str) -> ClipSample:
        if self.cfg.source == "world":
            clip = World(self.seed, frames, aspect, self.split).clip(index)
            captions = [text for texts in clip.captions.values() for text in texts]
            return ClipSample(clip.video, captions, clip.trajectory, f"world/{self.seed}/{self.split}/{aspect}/{index}")
        folder = self.folder(frames, aspect)
        epoch, place = divmod(index, len(folder))
        order = random.Random(f"order/{self.seed}/{epoch}").sample(range(len(folder)), len(folder))
        item = folder.item(order[place])
        return ClipSample(torch.as_tensor(item.video), item.captions or [""], None, item.source)

    def captions(self, index: int) -> list[str]:
        """Captions of clip `index`, without its pictures."""
        cfg = self.cfg
        if cfg.source == "world":
            world = World(self.seed, cfg.frames[0], split=self.split)
            return [text for texts in world.captions(world.scene(index)).values() for text in texts]
        cuts = self.folder(cfg.frames[0], cfg.aspects[0]).cuts
        return list(cuts[index % len(cuts)].captions) or [""]

    def folder(self, frames: int, aspect: str):  # noqa: ANN201 - VideoFolder, imported only when a folder is read
        from kling.data.folder import VideoFolder

        key = frames, aspect
        if key not in self._folders:
            cfg = self.cfg
            size = aspect_size(aspect)
            self._folders[key] = VideoFolder(cfg.source, frames, cfg.fps, size, unconditional=cfg.unconditional, skip_bad=cfg.skip_bad)
        return self._folders[key]


class StepBatches(Dataset):
    """Batch of step s and rank r: video (b, 3, T, H, W) in [-1, 1]. Length and aspect are drawn once a step, the same on every rank.

    `batch` counts clips of the longest length; of a shorter one there are as many more as make the same frames, up to `MOST`.
    """

    MOST = 16

    def __init__(self, source: ClipSource, batch: int, rank: int = 0, ranks: int = 1) -> None:
        self.source, self.batch, self.rank, self.ranks = source, batch, rank, ranks

    def __getitem__(self, step: int) -> Tensor:
        cfg = self.source.cfg
        rng = random.Random(f"shape/{self.source.seed}/{step}")
        frames, aspect = rng.choice(cfg.frames), rng.choice(cfg.aspects)
        count = max(self.batch, min(self.MOST, self.batch * max(cfg.frames) // frames))
        first = (step * self.ranks + self.rank) * max(self.batch, self.MOST)
        return torch.stack([to_tensor(self.source.clip(first + i, frames, aspect).video) for i in range(count)])


def batches(data: Dataset, start: int, steps: int, workers: int) -> Iterator:
    """The batches of steps start … steps - 1, made ahead by `workers` processes of one thread each."""
    if start >= steps:
        return iter(())
    loader = DataLoader(data, batch_size=None, sampler=range(start, steps), num_workers=workers, worker_init_fn=_start_worker)
    return iter(loader)


def _start_worker(worker: int) -> None:
    """One thread; and signals are the main process's business: it finishes its step, saves, and ends its workers."""
    torch.set_num_threads(1)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def check_data(cfg: DataConfig) -> None:
    """Refuse a data section that cannot work, before anything is built."""
    from kling.shapes import latent_frames

    for frames in cfg.frames:
        latent_frames(frames)
    for aspect in cfg.aspects:
        aspect_size(aspect)
    if not cfg.frames or not cfg.aspects:
        raise UserError("data.frames and data.aspects must not be empty: give at least one length and one aspect")
