"""Our parts against what one would use in their place, on the same work in one run, as ratios.

kling-bench data                     # clip readers, the loader against a plain DataLoader over PyAV, memory over 2,000 clips
kling-bench data --quick --json out/bench.json

Runs alternate (A B B A ...), so that a busy machine slows both alike; times are the processor's; a ratio is the median over the pairs. The
first pair of every table is a thing against itself: how far from 1 that lies is how far the others can be trusted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import av
import cv2
import numpy as np
import psutil
import torch
import torch.nn.functional as F
from av.video.reformatter import ColorRange, Colorspace
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kling.data.buckets import Bucket
from kling.data.clips import ManifestClips, folder_manifest
from kling.data.decode import probe
from kling.data.files import written
from kling.data.reader import READERS, open_reader
from kling.data.transforms import to_batch
from kling.errors import UserError, program

FRAMES, FPS = 17, 8.0
SECONDS = 12  # of every made video
GROWTH = 0.05  # of memory that is allowed

Row = dict[str, Any]


@dataclass(frozen=True)
class Scale:
    """How much is measured."""

    height: int  # of the made videos
    clips: int  # in one timed run
    pairs: int
    memory_clips: int


FULL, QUICK = Scale(720, 6, 5, 2000), Scale(360, 4, 3, 200)


@program
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="kling-bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=sorted(SUITES))
    parser.add_argument("--quick", action="store_true", help="smaller and fewer: a look, not a measurement")
    parser.add_argument("--workers", type=int, default=1, help="processes of both loaders (default %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="also write the rows here")
    args = parser.parse_args(argv)
    if args.workers < 1:
        raise UserError(f"--workers {args.workers}: give at least 1")
    torch.set_num_threads(1)
    rows = SUITES[args.suite](QUICK if args.quick else FULL, args.workers)
    for row in rows:
        print("  ".join(f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items()))
    if args.json:
        with written(args.json) as temporary:
            temporary.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


def machine() -> Row:
    """Where and with what this was measured."""
    versions = {name: metadata.version(name) for name in ("torch", "av", "numpy", "opencv-python-headless")}
    return {"python": platform.python_version(), "cpus": os.cpu_count(), "load": os.getloadavg()[0], "time": time.time(), **versions}


def ratio(a: Callable[[], None], b: Callable[[], None], pairs: int) -> tuple[float, float, float]:
    """(median of b's time over a's, median seconds of a, of b), in alternating order. Seconds of the processor, the workers' included."""
    times: list[tuple[float, float]] = []
    for i in range(pairs):
        first, second = (a, b) if i % 2 == 0 else (b, a)
        begin = cpu_seconds()
        first()
        middle = cpu_seconds()
        second()
        one, two = middle - begin, cpu_seconds() - middle
        times.append((one, two) if i % 2 == 0 else (two, one))
    return median(y / x for x, y in times), median(x for x, _ in times), median(y for _, y in times)


def cpu_seconds() -> float:
    """Of this process and of its children that have ended: what neighbours on the machine do not change."""
    return sum(os.times()[:4])


# ------------------------------------------------------------------------------------------------------------------- data


def suite_data(scale: Scale, workers: int) -> list[Row]:
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for gop in (12, 240):
            make_video(root / f"gop{gop}.mp4", scale.height, gop)
            rows += readers(root / f"gop{gop}.mp4", scale, gop)
        rows += loaders(root, scale, workers)
        (root / "small").mkdir()
        make_video(root / "small" / "a.mp4", 180, 12)
        rows.append(memory(root / "small", scale, workers))
    return rows


def make_video(path: Path, height: int, gop: int) -> None:
    """H.264 of a texture that drifts and brightens, 24 frames a second, with B-frames."""
    H, W = height, height * 16 // 9 // 2 * 2
    rng = np.random.default_rng(0)
    wall = cv2.resize(rng.integers(0, 256, (H // 6, W // 3, 3), dtype=np.uint8), (2 * W, H), interpolation=cv2.INTER_CUBIC)
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=24, options={"g": str(gop), "preset": "veryfast", "crf": "23"})
        stream.width, stream.height, stream.pix_fmt = W, H, "yuv420p"
        # decoders guess differently at the matrix of an untagged HD file, so none but ours may read one
        stream.codec_context.colorspace, stream.codec_context.color_range = Colorspace.ITU709, ColorRange.MPEG
        for t in range(24 * SECONDS):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(np.roll(wall, -3 * t, axis=1)[:, :W]), format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG)
            frame.pts, frame.time_base = t, Fraction(1, 24)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())


def starts(count: int) -> list[float]:
    """Where the clips of a run begin, seconds."""
    return (np.random.default_rng(1).random(count) * (SECONDS - FRAMES / FPS - 0.1)).tolist()


def readers(path: Path, scale: Scale, gop: int) -> list[Row]:
    """Clips a second of each reader, opening included, to 256x448; how many times as long the others take as pyav."""
    info, size = probe(path), (256, 448)

    def run(name: str) -> Callable[[], None]:
        def read() -> None:
            for start in starts(scale.clips):
                open_reader(path, name, info, threads=1).at([start + i / FPS for i in range(FRAMES)], size)

        return read

    rows = []
    for label, name in (("pyav again", "pyav"), *((name, name) for name in READERS if name != "pyav")):
        row: Row = {"suite": "reader", "file": f"{scale.height}p gop {gop}", "reader": label}
        try:
            run(name)()
        except UserError as error:
            rows.append(row | {"absent": str(error)})
            continue
        times, ours, theirs = ratio(run("pyav"), run(name), scale.pairs)
        rows.append(row | {"clips/s": scale.clips / theirs, "pyav clips/s": scale.clips / ours, "time over pyav's": times})
    return rows


class Ours(Dataset):
    """Clips as training reads them: uint8, resized in the decoder."""

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
    """The same clips as one writes it the first time: seek, decode, RGB arrays, float tensors, `interpolate`."""

    def __init__(self, root: Path, count: int) -> None:
        self.paths, self.starts = sorted(root.glob("*.mp4")), starts(count)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, i: int) -> Tensor:
        start, frames = self.starts[i], []
        wanted = [start + k / FPS for k in range(FRAMES)]
        with av.open(str(self.paths[i % len(self.paths)])) as container:
            stream = container.streams.video[0]
            container.seek(int(start / stream.time_base), stream=stream)
            for frame in container.decode(stream):
                while len(frames) < FRAMES and frame.time >= wanted[len(frames)] - 0.5 / 24:
                    frames.append(torch.from_numpy(frame.to_ndarray(format="rgb24")))
                if len(frames) == FRAMES:
                    break
        video = torch.stack(frames).permute(0, 3, 1, 2).float() / 127.5 - 1  # (T, 3, H, W)
        return F.interpolate(video, (256, 448), mode="bilinear", antialias=True).transpose(0, 1)  # (3, T, H, W)


def loaders(root: Path, scale: Scale, workers: int) -> list[Row]:
    """Batches of float tensors, ready for a model, from the same files with the same number of workers."""

    def run(data: Dataset, finish: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        def load() -> None:
            for batch in DataLoader(data, batch_size=2, num_workers=workers, worker_init_fn=_one_thread):
                finish(batch)

        return load

    ours, plain = run(Ours(root, scale.clips), to_batch), run(Plain(root, scale.clips), lambda batch: batch)
    rows = []
    for label, other in (("ours again", ours), ("plain DataLoader over PyAV", plain)):
        times, mine, theirs = ratio(ours, other, scale.pairs)
        row: Row = {"suite": "loader", "workers": workers, "loader": label, "clips/s": scale.clips / theirs}
        rows.append(row | {"our clips/s": scale.clips / mine, "time over ours": times, "goal": ">= 1.5" if other is plain else "1"})
    return rows


def memory(root: Path, scale: Scale, workers: int) -> Row:
    """Resident memory of the loader and its workers over many clips, from the first tenth to the end."""
    data, seen, sizes = Ours(root, scale.memory_clips, size=1), 0, []
    for batch in DataLoader(data, batch_size=2, num_workers=workers, worker_init_fn=_one_thread):
        seen += len(batch)
        if seen >= scale.memory_clips // 10 and seen % max(2, scale.memory_clips // 20) < 2:
            me = psutil.Process()
            sizes.append(sum(p.memory_info().rss for p in (me, *me.children(recursive=True))) / 2**20)
    growth = max(sizes[-3:]) / sizes[0] - 1
    row: Row = {"suite": "memory", "clips": seen, "MiB at a tenth": sizes[0], "MiB at the end": sizes[-1]}
    return row | {"growth %": 100 * growth, "goal": f"< {100 * GROWTH:g}"}


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)


SUITES = {"data": suite_data}

if __name__ == "__main__":
    main()
