"""Camera poses by pycolmap's structure from motion, an optional extra: slow, and best if much of the scene is static."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from kling.cameras.poses import inverse, resample
from kling.cameras.trajectory import Trajectory
from kling.errors import UserError
from kling.metrics.camera.rotation import WIDTH, CameraEstimate

FEWEST_UNKNOWN, FEWEST_KNOWN = (
    0.3,
    0.5,
)  # minimum share of frames that must be registered, by whether the intrinsics are known; the others are interpolated


def estimate_colmap(frames: Tensor, fps: float) -> CameraEstimate:
    """The path of a clip (T, H, W, 3) uint8 with one unknown focal length, at an arbitrary scale.

    Frames that were not registered are interpolated, and not counted as registered. Raises `UserError` if pycolmap is missing, or finds no
    model with at least `FEWEST_UNKNOWN` of the frames.
    """
    pycolmap = _pycolmap("estimating cameras by structure from motion needs pycolmap: pip install 'kling[colmap]', or use rotation")
    T, H, W, _ = frames.shape
    reading = pycolmap.ImageReaderOptions(camera_model="SIMPLE_PINHOLE")
    model = _reconstructed(pycolmap, list(frames.numpy()), pycolmap.match_sequential, {"reader_options": reading}, {})
    count = 0 if model is None else model.num_reg_images()
    if model is None or count < max(2, FEWEST_UNKNOWN * T):
        raise UserError(f"colmap placed {count} of {T} frames: the camera moves too little, or the scene too much; try rotation")
    found = _placed(model)
    K = np.stack([image.camera.calibration_matrix() for _, image in found])
    intrinsics = torch.from_numpy(np.stack([K[:, 0, 0] / W, K[:, 1, 1] / H, K[:, 0, 2] / W, K[:, 1, 2] / H], axis=-1))
    path = _path(found, intrinsics, T)
    error = float(model.compute_mean_reprojection_error()) * WIDTH / W
    return CameraEstimate(Trajectory(path.c2w.float(), path.intrinsics.float()), fps, len(found) / T, error)


def colmap_path(video: Tensor, intrinsics: Tensor, scale: int) -> Trajectory | None:
    """The path of a clip (T, H, W, 3) uint8 with known intrinsics (T, 4), at an arbitrary scale; None if colmap finds none.

    Frames are enlarged by `scale`, and warped to the first frame's intrinsics if they change. Raises `UserError` without pycolmap.
    """
    pycolmap = _pycolmap("structure from motion needs pycolmap: pip install 'kling[colmap]', or leave --colmap out")
    T, H, W, _ = video.shape
    size = (W * scale, H * scale)
    K = intrinsics.double().numpy() * [*size, *size]  # (T, 4) fx, fy, cx, cy in enlarged pixels
    pictures = []
    for t, frame in enumerate(video.numpy()):
        picture = cv2.resize(frame, size, interpolation=cv2.INTER_CUBIC)
        s = K[0, :2] / K[t, :2]
        to_first = np.array([[s[0], 0, K[0, 2] - s[0] * K[t, 2]], [0, s[1], K[0, 3] - s[1] * K[t, 3]]])
        if not np.allclose(K[0], K[t]):
            picture = cv2.warpAffine(picture, to_first, size, flags=cv2.INTER_CUBIC)
        pictures.append(picture)
    camera = pycolmap.ImageReaderOptions(camera_model="PINHOLE", camera_params=",".join(f"{x:.9f}" for x in K[0]))
    one = pycolmap.FeatureExtractionOptions(num_threads=1)
    options = pycolmap.IncrementalPipelineOptions(ba_refine_focal_length=False, ba_refine_principal_point=False)
    extraction = {"reader_options": camera, "extraction_options": one}
    model = _reconstructed(pycolmap, pictures, pycolmap.match_exhaustive, extraction, {"options": options})
    if model is None or model.num_reg_images() < max(2, FEWEST_KNOWN * T):
        return None
    found = _placed(model)
    path = _path(found, intrinsics[[t for t, _ in found]].double(), T)
    return Trajectory(path.c2w, intrinsics)


def _pycolmap(missing: str) -> Any:
    """The pycolmap module with its log turned down. Raises `UserError(missing)` if it is not installed."""
    try:
        import pycolmap
    except ImportError:
        raise UserError(missing) from None
    pycolmap.logging.minloglevel = pycolmap.logging.Level.ERROR.value
    return pycolmap


def _reconstructed(pycolmap: Any, pictures: Sequence[np.ndarray], match: Any, extraction: dict[str, Any], mapping: dict[str, Any]) -> Any:
    """The model with the most registered pictures (H, W, 3), which one camera took; None if there is none."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "frames").mkdir()
        for t, picture in enumerate(pictures):
            cv2.imwrite(str(work / "frames" / f"{t:06d}.png"), picture[..., ::-1])
        database = work / "points.db"
        pycolmap.extract_features(database, work / "frames", camera_mode=pycolmap.CameraMode.SINGLE, **extraction)
        match(database)
        models = pycolmap.incremental_mapping(database, work / "frames", work, **mapping)
        return max(models.values(), key=lambda m: m.num_reg_images(), default=None)


def _placed(model: Any) -> list[tuple[int, Any]]:
    """(frame, image) of every picture that has a pose, in order."""
    return sorted(((int(image.name[:6]), image) for image in model.images.values() if image.has_pose), key=lambda pair: pair[0])


def _path(found: list[tuple[int, Any]], intrinsics: Tensor, T: int) -> Trajectory:
    """A pose for each of T frames, relative to frame 0: interpolated between registered frames, and constant beyond them."""
    w2c = np.stack([image.cam_from_world().matrix() for _, image in found])  # (n, 3, 4)
    times = torch.tensor([float(t) for t, _ in found], dtype=torch.float64)
    when = torch.arange(T, dtype=torch.float64).clamp(times[0], times[-1])
    return resample(Trajectory(inverse(torch.from_numpy(w2c)), intrinsics), times, when).relative()
