"""Cameras of a manifest's clips: estimated, or read from files and checked. The only part of the metrics that opens videos."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import torch

from kling.cameras.files import load_window, save_trajectory
from kling.data.decode import VideoInfo, probe
from kling.data.manifest import Manifest, Shot
from kling.data.reader import open_reader
from kling.errors import UserError
from kling.metrics.camera.colmap import estimate_colmap
from kling.metrics.camera.conventions import check_convention
from kling.metrics.camera.rotation import WIDTH, CameraEstimate, estimate_rotation
from kling.metrics.camera.tracks import Pairs, tracks
from kling.runtime.files import Source

METHODS = ("rotation", "colmap")
RATE = 8.0  # poses a second
COLMAP_RATE = 4.0  # frames a second: consecutive frames must differ for points to have a depth
COLMAP_SIDE = 640  # pixels of the long side


def read_tracks(source: Source, info: VideoInfo, start: float, end: float, rate: float = RATE, gap: int = 1) -> tuple[Pairs, float]:
    """(points of frame i and of frame i + gap, for all i; frames a second) of a part of a video, at no more than its own rate."""
    fps = min(rate, info.fps)
    count = max(2, int((end - start) * fps + 1e-6))
    height = max(2, round(WIDTH * info.height / info.width))
    frames = open_reader(source, info=info).at([start + i / fps for i in range(count)], (height, WIDTH)).numpy()
    return tracks(frames, gap), fps


def read_colmap(source: Source, info: VideoInfo, start: float, end: float) -> CameraEstimate:
    """The camera path of a part of a video by structure from motion."""
    fps = min(COLMAP_RATE, info.fps)
    count = max(2, int((end - start) * fps + 1e-6))
    scale = min(1.0, COLMAP_SIDE / max(info.width, info.height))
    size = tuple(max(2, round(x * scale)) for x in (info.height, info.width))
    return estimate_colmap(open_reader(source, info=info).at([start + i / fps for i in range(count)], size), fps)


def check_file(path: Path, source: Source, start: float = 0.0, end: float | None = None) -> float:
    """The error, in pixels, with which a file's poses explain a video. Raises `UserError` if another convention explains it better."""
    info = probe(source)
    gap = 2  # quarter of a second: long enough to see a slow movement, short enough to track a fast one
    pairs, fps = read_tracks(source, info, start, end or info.duration, gap=gap)
    if not any(len(p) for p, _ in pairs):
        raise UserError(f"{path}: no point of {source} can be tracked, so its convention cannot be checked")
    when = start + torch.arange(len(pairs) + gap, dtype=torch.float64) / fps
    return check_convention(load_window(path, when, (info.height, info.width), info.duration), pairs, gap, path)


def estimated(manifest: Manifest, shot: Shot, method: str) -> Shot:
    """The clip with its camera estimated: writes RealEstate10K text beside the manifest, and adds the estimate's quality to `measures`."""
    source = manifest.check(shot)
    if method == "colmap":
        estimate = read_colmap(source, shot.video, shot.start, shot.end)
    else:
        pairs, fps = read_tracks(source, shot.video, shot.start, shot.end)
        estimate = estimate_rotation(pairs, fps, shot.video.width / shot.video.height)
    name = f"cameras/{hashlib.sha256(f'{shot.sha256}@{shot.start}'.encode()).hexdigest()[:16]}.txt"
    (manifest.folder / "cameras").mkdir(exist_ok=True)
    save_trajectory(manifest.folder / name, estimate.trajectory, estimate.fps, shot.start)
    found = {"method": method, "registered": round(estimate.registered, 4), "error": round(estimate.error, 3)}
    return replace(shot, camera=name, measures=shot.measures | {"camera": found})
