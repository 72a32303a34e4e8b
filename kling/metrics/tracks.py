"""Tracks of points in any video, by dense optical flow (DIS) from frame to frame; and of a manifest's clips, written beside it."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import cv2
import numpy as np
import torch
from torch import Tensor

from kling.condition.tracks import BACKGROUND, Tracks
from kling.data.manifest import Manifest, Shot
from kling.data.reader import open_reader
from kling.data.tracks import save_tracks
from kling.errors import UserError
from kling.metrics.motion import optical_flow, visible

SIDE = 256  # pixels of the short side at which flow is computed
RATE = 8.0  # frames a second
GRID = 8  # points along each side
AGAIN = 2.0  # seconds after which a new grid of points is begun
SHORTEST = 4  # frames that a track must last


def flow_tracks(video: Tensor, every: int = 16) -> Tracks:
    """Tracks of grids of points that begin in every `every`-th frame of a clip (T, H, W, 3) uint8. A track ends for good where its point
    leaves the picture, or where the flow there and back does not return to it. Those shorter than `SHORTEST` frames are left out."""
    T, H, W = video.shape[:3]
    flow = optical_flow(video)
    seen = [visible(there, back) for there, back in zip(flow.forward, flow.backward, strict=True)]  # T - 1 masks (H, W)
    x, y = np.meshgrid((np.arange(GRID) + 0.5) * W / GRID - 0.5, (np.arange(GRID) + 0.5) * H / GRID - 0.5)
    begun = np.stack([x, y], axis=-1).reshape(-1, 2).astype(np.float32)  # (g, 2) pixels
    points, there = [], []
    for start in range(0, T - SHORTEST + 1, every):
        path, known = np.tile(begun, (T, 1, 1)), np.zeros((T, len(begun)), bool)
        known[start] = True
        for t in range(start, T - 1):
            at = path[t]
            step = cv2.remap(flow.forward[t], at[None, :, 0], at[None, :, 1], cv2.INTER_LINEAR)[0]  # (g, 2)
            column, row = at.round().astype(int).clip(0, [W - 1, H - 1]).T
            path[t + 1] = at + step
            inside = ((path[t + 1] >= 0) & (path[t + 1] <= [W - 1, H - 1])).all(1)
            known[t + 1] = known[t] & seen[t][row, column] & inside
        points.append(path)
        there.append(known)
    places = torch.from_numpy(np.concatenate(points, axis=1)).transpose(0, 1) if points else torch.empty(0, T, 2)  # (n, T, 2)
    shown = torch.from_numpy(np.concatenate(there, axis=1)).T if there else torch.empty(0, T, dtype=torch.bool)  # (n, T)
    long = shown.sum(1) >= SHORTEST
    places = (places[long] + 0.5) / torch.tensor([W, H])
    return Tracks(places, shown[long], torch.full((int(long.sum()),), BACKGROUND))


def estimated_tracks(manifest: Manifest, shot: Shot) -> Shot:
    """The clip with its tracks: writes them beside the manifest, and their number and length to `measures`. Raises `UserError` if no point
    can be followed."""
    source, info = manifest.check(shot), shot.video
    fps = min(RATE, info.fps)
    count = max(2, int(shot.seconds * fps + 1e-6))
    scale = min(1.0, SIDE / min(info.width, info.height))
    size = tuple(max(2, round(x * scale)) for x in (info.height, info.width))
    video = open_reader(source, info=info).at([shot.start + i / fps for i in range(count)], size)
    tracks = flow_tracks(torch.as_tensor(video), max(1, round(AGAIN * fps)))
    if not len(tracks):
        raise UserError("no point can be followed for more than a few frames: leave its tracks out")
    name = f"tracks/{hashlib.sha256(f'{shot.sha256}@{shot.start}'.encode()).hexdigest()[:16]}.safetensors"
    (manifest.folder / "tracks").mkdir(exist_ok=True)
    save_tracks(manifest.folder / name, tracks, fps, shot.start, info.width / info.height)
    seconds = float(tracks.there.sum(1).double().mean()) / fps
    return replace(shot, tracks=name, measures=shot.measures | {"tracks": {"count": len(tracks), "seconds": round(seconds, 2)}})
