"""Camera paths by structure from motion: pycolmap, an optional extra. For cameras that move through a scene that stands still."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch

from kling.condition.camera import Trajectory
from kling.condition.poses import resample
from kling.data.camera import WIDTH, Estimate
from kling.data.decode import VideoInfo
from kling.data.files import Source
from kling.data.image import write_png_frames
from kling.data.reader import open_reader
from kling.errors import UserError

RATE = 4.0  # frames a second: neighbours must differ for points to have a depth
SIDE = 640  # pixels of the long side
FEWEST = 0.3  # of the frames that must be placed


def estimate_colmap(source: Source, info: VideoInfo, start: float, end: float) -> Estimate:
    """The path of a stretch of a video, in units of its own. Frames that were not placed are interpolated, and not counted as registered.

    Raises `UserError` if pycolmap is missing, or finds no model of at least `FEWEST` of the frames.
    """
    try:
        import pycolmap
    except ImportError:
        raise UserError(
            "estimating cameras by structure from motion needs pycolmap: pip install 'kling[colmap]', or use rotation"
        ) from None
    pycolmap.logging.minloglevel = pycolmap.logging.Level.ERROR.value
    fps = min(RATE, info.fps)
    count = max(2, int((end - start) * fps + 1e-6))
    scale = min(1.0, SIDE / max(info.width, info.height))
    size = tuple(max(2, round(x * scale)) for x in (info.height, info.width))
    frames = open_reader(source, info=info).at([start + i / fps for i in range(count)], size)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        names = [path.name for path in write_png_frames(work / "frames", frames)]
        database = work / "points.db"
        reading = pycolmap.ImageReaderOptions(camera_model="SIMPLE_PINHOLE")
        pycolmap.extract_features(database, work / "frames", camera_mode=pycolmap.CameraMode.SINGLE, reader_options=reading)
        pycolmap.match_sequential(database)
        models = pycolmap.incremental_mapping(database, work / "frames", work)
        model = max(models.values(), key=lambda m: m.num_reg_images(), default=None)
        if model is None or model.num_reg_images() < max(2, FEWEST * count):
            placed = 0 if model is None else model.num_reg_images()
            raise UserError(f"colmap placed {placed} of {count} frames: the camera moves too little, or the scene too much; try rotation")
        found = sorted((names.index(image.name), image) for image in model.images.values() if image.has_pose)
        H, W = size
        w2c = np.stack([image.cam_from_world().matrix() for _, image in found])
        K = np.stack([image.camera.calibration_matrix() for _, image in found])
        error = float(model.compute_mean_reprojection_error()) * WIDTH / W
    Rᵀ = w2c[:, :, :3].transpose(0, 2, 1)
    c2w = torch.from_numpy(np.concatenate([Rᵀ, -Rᵀ @ w2c[:, :, 3:]], axis=-1))
    intrinsics = torch.from_numpy(np.stack([K[:, 0, 0] / W, K[:, 1, 1] / H, K[:, 0, 2] / W, K[:, 1, 2] / H], axis=-1))
    times = torch.tensor([float(i) for i, _ in found], dtype=torch.float64)
    when = torch.arange(count, dtype=torch.float64).clamp(times[0], times[-1])
    path = resample(Trajectory(c2w, intrinsics), times, when).relative()
    return Estimate(Trajectory(path.c2w.float(), path.intrinsics.float()), fps, len(found) / count, error)
