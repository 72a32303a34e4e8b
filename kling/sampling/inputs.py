"""From files and arrays to pictures of the model's size: what a `Request` points at, made ready to encode."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kling.cameras.axes import axes_trajectory, parse_axes
from kling.cameras.files import load_trajectory
from kling.cameras.trajectory import Trajectory
from kling.data.image import read_image, read_mask
from kling.data.transforms import contain, fit
from kling.data.video import probe, read_video
from kling.errors import UserError
from kling.sampling.request import Movie, Picture, Request
from kling.shapes import ASPECTS, aspect_size, clip_frames, nearest_aspect, nearest_frames, parse_size

DEFAULT_SECONDS = 5.0
DEFAULT_ASPECT = "16:9"


@dataclass
class Inputs:
    """Everything given, at the clip's size: pictures (H, W, 3) uint8, video (T, H, W, 3) uint8, mask (H, W) with 1 where to generate."""

    height: int
    width: int
    image: Tensor | None = None
    keyframes: list[tuple[Tensor, int, float]] = field(default_factory=list)  # the last frame included
    video: Tensor | None = None
    mask: Tensor | None = None
    control: Tensor | None = None


def clip_size(request: Request, sizes: dict[str, tuple[int, int]] = ASPECTS) -> tuple[int, int]:
    """(H, W): the size or aspect asked for, else the aspect nearest to the first picture given, else 16:9. sizes: the model's own."""
    if request.size is not None:
        return parse_size(request.size)
    if request.aspect or request.outpaint:
        return aspect_size(request.outpaint or request.aspect, sizes=sizes)
    for movie in (request.video, request.control):
        if movie is not None:
            return aspect_size(nearest_aspect(*_movie_size(movie)), sizes=sizes)
    pictures = [request.image, request.last_image, *(picture for picture, _, _ in request.keyframes)]
    for picture in pictures:
        if picture is not None:
            return aspect_size(nearest_aspect(*_picture(picture).shape[:2]), sizes=sizes)
    return aspect_size(DEFAULT_ASPECT, sizes=sizes)


def asked_frames(request: Request, fps: float) -> int:
    """Pixel frames to make: num_frames, else duration, else 5 s."""
    return request.num_frames or clip_frames(request.duration or DEFAULT_SECONDS, fps)


def read_inputs(request: Request, frames: int, fps: float, longest: int, sizes: dict[str, tuple[int, int]] = ASPECTS) -> Inputs:
    """Open and fit everything the request points at, before anything is computed. Raises `UserError` naming what cannot be used.

    frames: of the clip to make. longest: frames of a clip that the model can restyle or fill at once.
    """
    H, W = clip_size(request, sizes)
    inputs = Inputs(H, W)
    if request.image is not None:
        inputs.image = fit(_picture(request.image), H, W)
    for picture, frame, strength in request.keyframes:
        if frame >= frames:
            raise UserError(
                f"keyframe at frame {frame} lies beyond the clip's last frame {frames - 1}: give a smaller frame or a longer duration"
            )
        inputs.keyframes.append((fit(_picture(picture), H, W), frame, strength))
    if request.last_image is not None:
        inputs.keyframes.append((fit(_picture(request.last_image), H, W), frames - 1, 1.0))
    if request.video is not None:
        inputs.video = _movie(request.video, fps, "video")
        if request.outpaint is not None:
            inputs.video, inputs.mask = contain(inputs.video, H, W)
        else:
            inputs.video = fit(inputs.video, H, W)
        if request.strength is not None or request.mask is not None or request.outpaint is not None:
            inputs.video = inputs.video[: min(nearest_frames(len(inputs.video))[0], longest)]
    if request.control is not None:
        inputs.control = fit(_movie(request.control, fps, "control"), H, W)
        if len(inputs.control) < frames:
            raise UserError(f"control of {len(inputs.control)} frames for a clip of {frames}: give a longer one, or ask for fewer frames")
    if request.mask is not None:
        inputs.mask = _mask(request.mask, H, W)
        if inputs.video is None:  # filling a still picture
            if frames > 1 or inputs.image is None:
                raise UserError("mask was given without a video to fill: give video, or image with num_frames=1")
            inputs.video, inputs.image = inputs.image[None], None
    return inputs


def read_camera(request: Request, frames: int, H: int, W: int) -> Trajectory | None:
    """The asked trajectory over `frames` frames, translation scaled by `camera_scale`; None if no camera was asked for."""
    camera = request.camera
    if camera is None:
        return None
    if isinstance(camera, Trajectory):
        if len(camera) != frames:
            raise UserError(f"camera of {len(camera)} poses for a clip of {frames} frames: give one pose a frame")
        return camera.relative().scaled(request.camera_scale)
    if isinstance(camera, str) and os.path.isfile(camera):
        return load_trajectory(camera, frames, (H, W)).scaled(request.camera_scale)
    axes = parse_axes(camera) if isinstance(camera, str) else camera
    return axes_trajectory(axes, frames, H, W).scaled(request.camera_scale)


def _picture(picture: Picture) -> Tensor:
    if isinstance(picture, str | Path):
        return read_image(picture)
    picture = torch.as_tensor(np.asarray(picture))
    if picture.dtype != torch.uint8 or picture.ndim != 3 or picture.shape[-1] != 3:
        raise UserError(f"image of type {picture.dtype} and shape {tuple(picture.shape)}: give uint8 (H, W, 3) or a file")
    return picture


def _mask(mask: Picture, H: int, W: int) -> Tensor:
    if isinstance(mask, str | Path):
        return read_mask(mask, H, W)
    return fit(torch.as_tensor(np.asarray(mask)).float(), H, W).clamp(0, 1)


def _movie_size(video: Movie) -> tuple[int, int]:
    if isinstance(video, str | Path):
        info = probe(video)
        return info.height, info.width
    return np.asarray(video).shape[1:3]


def _movie(movie: Movie, fps: float, name: str) -> Tensor:
    """A given video at the model's frame rate."""
    if isinstance(movie, str | Path):
        return read_video(movie, fps=fps).frames
    frames = torch.as_tensor(np.asarray(movie))
    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not len(frames):
        raise UserError(f"{name} of type {frames.dtype} and shape {tuple(frames.shape)}: give uint8 (T, H, W, 3) or a file")
    return frames
