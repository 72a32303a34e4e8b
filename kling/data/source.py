"""The sources of clips: the small world, or a manifest of real videos. A batch is a pure function of (seed, step), not of workers."""

from __future__ import annotations

import atexit
import io
import random
import signal
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kling.cameras.trajectory import Trajectory
from kling.data.buckets import Epochs, cuts_of
from kling.data.clips import ClipSample, ManifestClips, held_out, open_manifest
from kling.data.info import frame_rate
from kling.data.world.references import draw_references, reference_take
from kling.data.world.render import Take, render
from kling.data.world.scene import FPS, World, take_of
from kling.data.world.storyboard import SHORTEST, Storyboards, takes_of
from kling.errors import UserError
from kling.shapes import ASPECTS, aspect_size, latent_frames


@dataclass
class DataConfig:
    """The training data.

    source: "world", a manifest (kling-data scan), or a folder of videos with sidecar captions. frames: lengths to draw from, each 1 + 4k.
    aspects: names to draw from, or to sort into. fps: of the clips. scale: multiple of the small world's size. holdout: share of a
    manifest's files kept for evaluation; with 0, evaluation uses the training clips. reader: auto, pyav, decord or torchcodec.
    unconditional: allow clips without captions. skip_bad: leave out unusable files, and count them in the log.
    """

    source: str = "world"
    frames: list[int] = field(default_factory=lambda: [17])
    aspects: list[str] = field(default_factory=lambda: list(ASPECTS))
    fps: float = FPS
    unconditional: bool = False
    skip_bad: bool = False
    scale: int = 1
    holdout: float = 0.0
    reader: str = "auto"


SHOTS = "shots"  # the split of the world whose clips are storyboards


@dataclass(frozen=True)
class Unrendered:
    """A clip of the world before it is rendered, which takes a thousandth of its time. For the fields see `ClipSample`."""

    size: tuple[int, int]  # (H, W)
    takes: tuple[Take, ...]  # of its shots
    references: tuple[Take, ...]
    captions: list[str]
    trajectory: Trajectory
    name: str
    shots: list[tuple[int, int]] | None = None


def rendered(clips: Sequence[Unrendered], device: torch.device | str = "cpu") -> list[ClipSample]:
    """Clips of one size with their pixels, all rendered at once on the device, where the pixels stay."""
    size, shown = clips[0].size, [take for clip in clips for take in clip.references]
    videos = render([take for clip in clips for take in clip.takes], *size, device).split([len(clip.trajectory) for clip in clips])
    pictures = iter(render(shown, *size, device) if shown else ())  # (H, W, 3) each
    return [
        ClipSample(video, clip.captions, clip.trajectory, clip.name, None, None, clip.shots, tuple(islice(pictures, len(clip.references))))
        for clip, video in zip(clips, videos, strict=True)
    ]


class ClipSource:
    """Clips by index, at a given length and aspect: of the endless world, or of a manifest (`manifest`, None for the world)."""

    def __init__(self, cfg: DataConfig, seed: int = 0, split: str = "train") -> None:
        self.cfg, self.seed, self.split = cfg, seed, split
        self.manifest: ManifestClips | None = None
        if cfg.source != "world":
            if cfg.reader not in ("auto", "pyav") and Path(cfg.source).is_dir():
                raise UserError(f"data.reader {cfg.reader} does not notice damage: make a manifest of {cfg.source} with kling-data scan")
            manifest = held_out(open_manifest(cfg.source, cfg.skip_bad), cfg.holdout, evaluation=split != "train")
            self.manifest = ManifestClips(
                manifest,
                cfg.frames,
                cfg.aspects,
                float(frame_rate(cfg.fps)),
                scale=cfg.scale,
                reader=cfg.reader,
                seed=seed,
                unconditional=cfg.unconditional,
                skip_bad=cfg.skip_bad,
            )

    def clip(self, index: int, frames: int, aspect: str, split: str = "", references: int = 0) -> ClipSample:
        """Clip `index` at a length and an aspect; a manifest is cycled through, without clips that are too short. split: of the world,
        instead of the source's. references: pictures of the world's things to render with it."""
        if self.manifest:
            return self.manifest.any(index, frames, aspect)
        return rendered([self.unrendered(index, frames, aspect, split, references)])[0]

    def unrendered(self, index: int, frames: int, aspect: str, split: str = "", references: int = 0) -> Unrendered:
        """Clip `index` of the world, as `clip`, to be rendered later together with others."""
        split, size = split or self.split, aspect_size(aspect)
        name = f"world/{self.seed}/{split}/{aspect}/{index}"
        if split == SHOTS:
            world = Storyboards(self.seed, frames, aspect, self.split)
            board = world.storyboard(index)
            takes, first, trajectory = takes_of(board), board.shots[0], board.trajectory  # the first has the things of all shots
            told = [[text for texts in shot.values() for text in texts] for shot in world.captions(board)]
            captions = [text for texts in told for text in texts]  # those of each shot follow those of the one before
            shots = [(start, len(texts)) for start, texts in zip(board.starts, told, strict=True)]
        else:
            world = World(self.seed, frames, aspect, split)
            first = world.scene(index)
            takes, trajectory, shots = (take_of(first),), first.trajectory, None
            captions = [text for texts in world.captions(first).values() for text in texts]
        pictures = tuple(reference_take(one, *size) for one in draw_references(first, references, name))
        return Unrendered(size, takes, pictures, captions, trajectory, name, shots)

    def captions(self, index: int) -> list[str]:
        """Captions of clip `index`, without rendering or decoding it."""
        if self.manifest:
            shots = self.manifest.manifest.shots
            return [caption.text for caption in shots[index % len(shots)].captions] or [""]
        world = World(self.seed, self.cfg.frames[0], split=self.split)
        return [text for texts in world.captions(world.scene(index)).values() for text in texts]


class StepBatches(Dataset):
    """The batch at a place in a run's endless sequence of batches: uint8 (b, T, H, W, 3).

    For the world, length and aspect are drawn once for every `group` consecutive batches; `batch` is the number of clips of the longest
    length, and shorter ones have more clips, for the same number of frames, up to `MOST`. cuts: share of the world's clips that are
    storyboards, where a length has room for a cut. A manifest's clips come in the order of `Epochs`,
    `batch` of the largest shape and more of smaller ones, for the same number of tokens.
    """

    MOST = 16

    def __init__(self, source: ClipSource, batch: int, group: int = 1, cuts: float = 0.0) -> None:
        self.source, self.batch, self.group, self.cuts = source, batch, group, cuts
        if source.manifest:
            buckets = source.manifest.buckets
            items = {bucket: len(pieces) for bucket, pieces in buckets.items()}
            self.epochs = Epochs(items, cuts_of(list(buckets), batch), source.seed, group)

    def __getitem__(self, place: int) -> Tensor:
        return torch.stack([torch.as_tensor(clip.video) for clip in self.clips(place)])

    def clips(self, place: int) -> list[ClipSample]:
        """The clips of a batch."""
        source = self.source
        if source.manifest:
            epoch, bucket, _, numbers = self.epochs[place]
            return [source.manifest.clip(bucket, number, epoch) for number in numbers]
        rng = random.Random(f"shape/{source.seed}/{place // self.group}")
        frames, aspect = rng.choice(source.cfg.frames), rng.choice(source.cfg.aspects)
        count = max(self.batch, min(self.MOST, self.batch * max(source.cfg.frames) // frames))
        first = place * max(self.batch, self.MOST)
        return [source.clip(first + i, frames, aspect, SHOTS if self._is_cut(first + i, frames) else "") for i in range(count)]

    def _is_cut(self, index: int, frames: int) -> bool:
        return frames >= SHORTEST and random.Random(f"cuts/{self.source.seed}/{index}").random() < self.cuts

    def names(self, place: int) -> list[str]:
        return [clip.name for clip in self.clips(place)]

    def report(self) -> str:
        """How many clips are used, and how often. Empty for the world, which is endless."""
        return f"{self.source.manifest.report()}\n{self.epochs.report()}" if self.source.manifest else ""


def batches(data: Dataset, start: int, steps: int, workers: int, ahead: int = 2) -> Iterator:
    """The batches of steps start … steps - 1, prepared ahead by `workers` processes of one thread each: up to `ahead` by each of them.

    A `UserError` in a worker is raised here unchanged, without the worker's traceback in its message. The workers end with this iterator,
    and at the latest with the program, however that ends.
    """
    if start >= steps:
        return
    pinned, ready = workers > 0 and torch.cuda.is_available(), {"prefetch_factor": ahead} if workers else {}
    loader = DataLoader(
        _Told(data), None, sampler=range(start, steps), num_workers=workers, worker_init_fn=_start_worker, pin_memory=pinned, **ready
    )
    feed = iter(loader)
    if workers:
        _feeds.add(feed)
    try:
        for item in feed:
            if isinstance(item, UserError):
                raise item
            yield item
    finally:
        if workers:
            _end_workers(feed)


def packed(item: Any) -> bytes:
    """An item as a message to another process, which reads it with `unpacked`. Its tensors travel in the message; torch would put each into
    a file of its own in shared memory, which takes the reader longer than to render a clip on a GPU."""
    buffer = io.BytesIO()
    _Packer(buffer).dump(item)
    return buffer.getvalue()


unpacked = ForkingPickler.loads


class _Packer(ForkingPickler):
    def reducer_override(self, x: Any) -> Any:
        return (torch.from_numpy, (x.numpy(),)) if isinstance(x, Tensor) else NotImplemented


class _Told(Dataset):
    """Items of `data`, or the `UserError` that making one raised: torch would wrap an error raised in a worker in a traceback."""

    def __init__(self, data: Dataset) -> None:
        self.data = data

    def __getitem__(self, i: int) -> Any:
        try:
            return self.data[i]
        except UserError as error:
            return error


_feeds: weakref.WeakSet = weakref.WeakSet()  # iterators that have workers


def _end_workers(feed: Any) -> None:
    """Ask the workers of a loader's iterator to stop, then kill those still busy: they ignore SIGTERM, which torch sends."""
    _feeds.discard(feed)
    feed._shutdown_workers()
    for process in feed._workers:
        if process.is_alive():
            process.kill()


@atexit.register
def _end_all_workers() -> None:
    """Stop all workers at exit, before multiprocessing waits for them forever: the traceback of an error in the loop keeps them alive."""
    for feed in list(_feeds):
        _end_workers(feed)


def _start_worker(worker: int) -> None:
    """Use one thread, and ignore signals: the main process handles them, finishes its step, saves, and ends its workers."""
    _feeds.clear()  # a forked process inherits its parent's
    torch.set_num_threads(1)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def check_data(cfg: DataConfig) -> None:
    """Raise `UserError` for invalid data settings, before anything is built."""
    for frames in cfg.frames:
        latent_frames(frames)
    for aspect in cfg.aspects:
        aspect_size(aspect)
    if not cfg.frames or not cfg.aspects:
        raise UserError("data.frames and data.aspects must not be empty: give at least one length and one aspect")
    if cfg.scale < 1 or not 0 <= cfg.holdout < 1:
        raise UserError(f"data.scale {cfg.scale} and data.holdout {cfg.holdout:g}: give 1 or more, and 0 to below 1")
    if cfg.source == "world" and (cfg.scale, cfg.holdout, cfg.reader) != (1, 0.0, "auto"):
        raise UserError("data.scale, data.holdout and data.reader are for a manifest: leave them out for the world")
