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
from kling.sampling.request import MAX_SECONDS, Movie, Picture, Request
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
                f"keyframe at frame {frame} lies beyond the clip's last frame {frames - 1}: give a smaller frame or a longer duration",
                code="keyframe_beyond",
                frame=frame,
                last=frames - 1,
            )
        inputs.keyframes.append((fit(_picture(picture), H, W), frame, strength))
    if request.last_image is not None:
        inputs.keyframes.append((fit(_picture(request.last_image), H, W), frames - 1, 1.0))
    if request.video is not None:
        whole = request.strength is None and request.mask is None and request.outpaint is None  # continued
        if request.outpaint is not None:
            inputs.video, inputs.mask = contain(_movie(request.video, fps, "video", (H, W), longest, crop=False), H, W)
        else:
            inputs.video = fit(_movie(request.video, fps, "video", (H, W), None if whole else longest), H, W)
    if request.control is not None:
        inputs.control = fit(_movie(request.control, fps, "control", (H, W)), H, W)
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
        try:
            return load_trajectory(camera, frames, (H, W)).scaled(request.camera_scale)
        except UserError as error:
            raise UserError(str(error), code="camera_file", why=str(error).removeprefix("camera file ")) from None
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


def _movie(movie: Movie, fps: float, name: str, size: tuple[int, int], longest: int | None = None, crop: bool = True) -> Tensor:
    """A given video at the model's frame rate, uint8 (T, h, w, 3); of a file no more is decoded than is used, and scaled as it is read.

    size (H, W) will be covered, or with crop=False be filled by the whole picture; this brings no picture above what that takes.
    longest: a clip of at most so many frames, 1 + 4k; None takes all. Raises `UserError` for more than `MAX_SECONDS` of them: time stamps
    make many frames of few, so they are counted after resampling and before anything is decoded.
    """
    if isinstance(movie, str | Path):
        info = probe(movie)
        count = info.count(fps)
        if longest is not None and count:
            count = min(nearest_frames(count)[0], longest)
        if count > MAX_SECONDS * fps:
            raise UserError(
                f"{name} {movie} lasts {info.duration:.0f} s: give at most {MAX_SECONDS:g} s, such as its beginning with "
                f"ffmpeg -i IN -t {MAX_SECONDS:g} OUT",
                code="video_too_long",
                file=movie,
                seconds=f"{info.duration:.0f}",
                most=f"{MAX_SECONDS:g}",
            )
        scale = (max if crop else min)(size[0] / info.height, size[1] / info.width)
        small = size if crop else (max(1, round(info.height * scale)), max(1, round(info.width * scale)))
        return read_video(movie, fps=fps, num_frames=count or None, size=small if scale < 1 else None).frames
    frames = torch.as_tensor(np.asarray(movie))
    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not len(frames):
        raise UserError(f"{name} of type {frames.dtype} and shape {tuple(frames.shape)}: give uint8 (T, H, W, 3) or a file")
    return frames if longest is None else frames[: min(nearest_frames(len(frames))[0], longest)]
