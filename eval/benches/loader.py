"""Batches for training: clips from files, read by workers, and latents from the cache."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import torch
from kling_programs.eval.benches.measure import Bench, Row, Run
from kling_programs.eval.benches.video import FPS, FRAMES, make_video, plain_clip, starts
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kling.cache.fill import fill_cache
from kling.cache.plan import CacheConfig
from kling.cache.store import LatentCache
from kling.data.buckets import Bucket
from kling.data.clips import ManifestClips, folder_manifest
from kling.data.source import DataConfig
from kling.data.transforms import to_batch
from kling.sampling.pipeline import load_vae

GROWTH = 5.0  # allowed growth of memory over many clips, per cent
SIZE = (256, 448)  # of the training clips
CACHED = 1500  # clips per second from the latent cache, at least


def rows(bench: Bench) -> Iterator[Row]:
    clips = 4 if bench.quick else 12
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "videos").mkdir()
        make_video(root / "videos" / "a.mp4", 360 if bench.quick else 720, 12)
        for workers in (0, 1):
            ours = loading(Ours(root / "videos", clips), to_batch, workers)
            case = f"{FRAMES} frames of {SIZE[0]}x{SIZE[1]}, {workers} workers"
            yield bench.same(case, ours, wall=workers > 0)
            plain = loading(Plain(root / "videos", clips), lambda batch: batch, workers)
            row = bench.compare(case, ours, plain, name="DataLoader over plain PyAV", goal=1.5, wall=workers > 0)
            yield row | {"clips/s": 1e3 * clips / row["ours ms"], "peer clips/s": 1e3 * clips / row["peer ms"]}
        bytes_each = Ours(root / "videos", 1)[0].nbytes, Plain(root / "videos", 1)[0].nbytes
        yield {
            "case": "MB a clip from worker to trainer",
            "ours": bytes_each[0] / 1e6,
            "peer": "float tensors",
            "theirs": bytes_each[1] / 1e6,
        }
        yield cached(bench, root / "cache")
        (root / "small").mkdir()
        make_video(root / "small" / "a.mp4", 180, 12)
        yield growth(bench, root / "small", 200 if bench.quick else 2000)


class Ours(Dataset):
    """Clips as training reads them: uint8, resized by the decoder."""

    def __init__(self, root: Path, count: int, size: int = 4) -> None:
        manifest = folder_manifest(root, skip_bad=False)
        self.clips = ManifestClips(manifest, [FRAMES], ["16:9"], FPS, scale=size, unconditional=True)
        self.shots, self.starts = manifest.shots, starts(count)
        assert list(self.clips.buckets) == [Bucket("16:9", FRAMES)]

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, i: int) -> Tensor:
        return self.clips.cut(self.shots[i % len(self.shots)], self.starts[i], FRAMES, "16:9").video


class Plain(Dataset):
    """The same clips as float tensors, decoded at full size and resized in the worker."""

    def __init__(self, root: Path, count: int) -> None:
        self.paths, self.starts = sorted(root.glob("*.mp4")), starts(count)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, i: int) -> Tensor:
        return plain_clip(self.paths[i % len(self.paths)], self.starts[i], SIZE)


def loading(data: Dataset, finish: Callable[[Tensor], Tensor], workers: int) -> Run:
    """All batches as float tensors, ready for a model."""

    def load() -> None:
        for batch in DataLoader(data, batch_size=2, num_workers=workers, worker_init_fn=_one_thread):
            finish(batch)

    return load


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)


def cached(bench: Bench, folder: Path) -> Row:
    """Clips per second from the latent cache, in batches of 16, after one pass that reads the files into memory."""
    count = 16 if bench.quick else 64
    data = DataConfig(source="world", frames=[17], aspects=["1:1"])
    for _ in fill_cache(CacheConfig(out=str(folder), clips=count, shares=[1.0], shard=16, data=data), load_vae()):
        pass
    cache = LatentCache(folder)
    (bucket,) = cache.clips

    def read() -> None:
        for first in range(0, count, 16):
            cache.batch(bucket, list(range(first, first + 16)), 17)

    times = bench.times(read)
    rate = count / times
    return {"case": "cached latents", "peer": "none", "clips/s": rate} | bench.judge(rate, CACHED)


def growth(bench: Bench, root: Path, count: int) -> Row:
    """Resident memory of the loader and a worker over many clips, from the first tenth to the end."""
    data, seen, sizes = Ours(root, count, size=1), 0, []
    for batch in DataLoader(data, batch_size=2, num_workers=1, worker_init_fn=_one_thread):
        seen += len(batch)
        if seen >= count // 10 and seen % max(2, count // 20) < 2:
            me = psutil.Process()
            sizes.append(sum(p.memory_info().rss for p in (me, *me.children(recursive=True))) / 2**20)
    grown = 100 * (max(sizes[-3:]) / sizes[0] - 1)
    row = {"case": f"memory over {seen} clips", "peer": "none", "MiB at a tenth": sizes[0], "MiB at the end": sizes[-1], "growth %": grown}
    verdict = "reached" if grown < GROWTH else "missed"
    return row | {"goal": f"< {GROWTH:g} %", "verdict": verdict}
