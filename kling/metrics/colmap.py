"""Camera poses by pycolmap's structure from motion, an optional extra: slow, and at its best where much of the scene stands still."""

from __future__ import annotations

import tempfile
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from kling.condition.camera import Trajectory
from kling.condition.poses import resample
from kling.errors import UserError

FEWEST = 0.5  # of the frames that must be placed; the others are interpolated


def colmap_path(video: Tensor, intrinsics: Tensor, scale: int) -> Trajectory | None:
    """The path of a clip (T, H, W, 3) uint8 whose intrinsics (T, 4) are known, in units of its own; None where colmap finds none.

    Frames are enlarged by `scale`, and brought to the first one's intrinsics if those change. Raises `UserError` without pycolmap.
    """
    try:
        import pycolmap
    except ImportError:
        raise UserError("structure from motion needs pycolmap: pip install 'kling[colmap]', or leave --colmap out") from None
    pycolmap.logging.minloglevel = pycolmap.logging.Level.ERROR.value
    T, H, W, _ = video.shape
    size = (W * scale, H * scale)
    K = intrinsics.double().numpy() * [*size, *size]  # (T, 4) fx, fy, cx, cy in enlarged pixels
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "frames").mkdir()
        for t, frame in enumerate(video.numpy()):
            picture = cv2.resize(frame, size, interpolation=cv2.INTER_CUBIC)
            s = K[0, :2] / K[t, :2]
            to_first = np.array([[s[0], 0, K[0, 2] - s[0] * K[t, 2]], [0, s[1], K[0, 3] - s[1] * K[t, 3]]])
            if not np.allclose(K[0], K[t]):
                picture = cv2.warpAffine(picture, to_first, size, flags=cv2.INTER_CUBIC)
            cv2.imwrite(str(work / "frames" / f"{t:04d}.png"), picture[..., ::-1])
        camera = pycolmap.ImageReaderOptions(camera_model="PINHOLE", camera_params=",".join(f"{x:.9f}" for x in K[0]))
        database = work / "points.db"
        one = pycolmap.FeatureExtractionOptions(num_threads=1)
        pycolmap.extract_features(
            database, work / "frames", camera_mode=pycolmap.CameraMode.SINGLE, reader_options=camera, extraction_options=one
        )
        pycolmap.match_exhaustive(database)
        options = pycolmap.IncrementalPipelineOptions(ba_refine_focal_length=False, ba_refine_principal_point=False)
        models = pycolmap.incremental_mapping(database, work / "frames", work, options=options)
        model = max(models.values(), key=lambda m: m.num_reg_images(), default=None)
        if model is None or model.num_reg_images() < max(2, FEWEST * T):
            return None
        placed = sorted((int(image.name[:4]), image.cam_from_world().matrix()) for image in model.images.values() if image.has_pose)
    w2c = np.stack([matrix for _, matrix in placed])  # (n, 3, 4)
    Rᵀ = w2c[:, :, :3].transpose(0, 2, 1)
    c2w = torch.from_numpy(np.concatenate([Rᵀ, -Rᵀ @ w2c[:, :, 3:]], axis=-1))
    times = torch.tensor([float(t) for t, _ in placed], dtype=torch.float64)
    when = torch.arange(T, dtype=torch.float64).clamp(times[0], times[-1])
    path = resample(Trajectory(c2w, intrinsics[[t for t, _ in placed]].double()), times, when).relative()
    return Trajectory(path.c2w, intrinsics)
