"""Reads the inputs of a `Request`, files and arrays, and fits them to the model's size, ready to encode."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from kling.cameras.axes import axes_trajectory, parse_axes
from kling.cameras.files import load_trajectory
from kling.cameras.trajectory import Trajectory
from kling.data.image import read_image, read_mask
from kling.data.transforms import contain, fit
from kling.errors import UserError
from kling.sampling.brush import Stroke, read_strokes, tracks_of
from kling.sampling.request import MAX_SECONDS, Movie, Picture, Request
from kling.sampling.shots import timeline
from kling.shapes import ASPECTS, aspect_size, clip_frames, nearest_aspect, nearest_frames, parse_size

DEFAULT_SECONDS = 5.0
DEFAULT_ASPECT = "16:9"
LAST = -1  # the frame number of a keyframe at the end, wherever that will be


@dataclass
class Inputs:
    """Everything given, at the clip's size: pictures (H, W, 3) uint8, video (T, H, W, 3) uint8, mask (H, W) with 1 where to generate.

    keyframes: (picture, pixel frame of the result, strength). They include the last frame, at `LAST`, and for a loop the first frame again,
    with picture None, since it may have to be generated first. encoded: latents (1, c, 1, h, w) of the references, once they are needed:
    all hops and videos of a request have the same. notes: remarks for the user, in whole lines.
    """

    height: int
    width: int
    image: Tensor | None = None
    keyframes: list[tuple[Tensor | None, int, float]] = field(default_factory=list)
    video: Tensor | None = None
    mask: Tensor | None = None
    control: Tensor | None = None
    strokes: list[Stroke] = field(default_factory=list)
    references: list[Tensor] = field(default_factory=list)
    encoded: list[Tensor] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def clip_size(request: Request, sizes: dict[str, tuple[int, int]] = ASPECTS) -> tuple[int, int]:
    """(H, W): the requested size or aspect, else the aspect nearest to the first picture given, else 16:9. sizes: the model's own."""
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
    """Pixel frames to generate: of all shots, or num_frames, else duration, else 5 s."""
    if request.shots is not None:
        times = timeline(request.storyboard, fps)
        if times.frames > MAX_SECONDS * fps + 1:
            seconds, most = f"{times.frames / fps:.0f}", f"{MAX_SECONDS:g}"
            raise UserError(f"shots of {seconds} s in all: give at most {most} s", code="shots_too_long", seconds=seconds, most=most)
        return times.frames
    return request.num_frames or clip_frames(request.duration or DEFAULT_SECONDS, fps)


def read_inputs(
    request: Request, frames: int, fps: float, longest: int, sizes: dict[str, tuple[int, int]] = ASPECTS, spatial: int = 8
) -> Inputs:
    """Open and fit all inputs of the request, before anything is computed. Raises `UserError` naming what cannot be used.

    frames: of the clip to generate. longest: frames of a clip that the model can restyle or fill at once. spatial: pixels of a latent.
    """
    H, W = clip_size(request, sizes)
    inputs = Inputs(H, W)
    if request.image is not None and not request.edited:
        inputs.image = fit(_picture(request.image), H, W)
    for picture, frame, strength in request.keyframes:
        inputs.keyframes.append((fit(_picture(picture), H, W), frame, strength))
    if request.last_image is not None:
        inputs.keyframes.append((fit(_picture(request.last_image), H, W), LAST, 1.0))
    if request.loop:
        inputs.keyframes.append((None, LAST, 1.0))
    if request.video is not None:
        count = _part(_length(request.video, fps), request, frames, fps, longest, inputs.notes) if request.edited else None
        inputs.video = _movie(request.video, fps, "video", (H, W), count, crop=request.outpaint is None)
    elif request.edited:  # a still picture
        if frames > 1:
            raise UserError(f"{request.edited} was given without a video to fill: give video, or image with num_frames=1 (--image-only)")
        inputs.video = _picture(request.image)[None]
    if request.outpaint is not None:
        inputs.video, inputs.mask = contain(inputs.video, H, W)
        if not (inputs.mask > 0.5).any():
            line = (
                f"outpaint {request.outpaint}: the given picture or video has that aspect already, so nothing is left to fill: give another"
            )
            raise UserError(line, code="nothing_to_fill", value=request.outpaint)
    elif inputs.video is not None:
        inputs.video = fit(inputs.video, H, W)
    if request.mask is not None:
        inputs.mask = _mask(request.mask, H, W)
        if not (inputs.mask > 0.5).any():
            raise UserError(
                "mask has no white area, so nothing would be generated: paint white what is to be filled", code="nothing_marked"
            )
    if request.tracks is not None:
        first = _movie_size(request.video) if request.video is not None else None
        first = tuple(_picture(request.image).shape[:2]) if request.image is not None else first
        inputs.strokes = read_strokes(tracks_of(request.tracks), (H, W), first, spatial)
    inputs.references = [contain(_picture(picture), H, W)[0] for picture in request.references]  # whole, whatever their aspect
    if request.control is not None:
        inputs.control = fit(_movie(request.control, fps, "control", (H, W)), H, W)
    return inputs


def _part(there: int, request: Request, frames: int, fps: float, longest: int, notes: list[str]) -> int:
    """How many frames of a given video of `there` frames are changed at once: the requested number, else as many as the model takes."""
    whole, what = nearest_frames(there)[0] if there else 0, request.edited
    most = min(whole, longest)
    if request.num_frames is None and request.duration is None:
        if most < there:
            notes.append(f"{what} changes the first {most} of the video's {there} frames: this model takes 1 + 4k of them, up to {longest}")
        return most
    if request.duration is not None and request.duration * fps <= there:  # rounding to whole latents may have made it longer
        frames = min(frames, whole)
    if frames > most:
        why = f"the video has {there}" if whole < frames else f"this model changes {longest} at once"
        raise UserError(f"{what} of {frames} frames was asked for, but {why}: ask for {most}, or leave duration and num_frames out")
    return frames


def paste(frames: Tensor, video: Tensor, mask: Tensor, feather: int) -> Tensor:
    """The generated frames inside the mask, and the given video everywhere else, pixel for pixel.

    frames, video (T, H, W, 3) uint8, mask (H, W) with 1 where to generate. The generated part fades in over `feather` pixels inside its
    border, because the latent grid is coarser than the mask, and decoding also changes the kept parts.
    """
    hole = (mask > 0.5).numpy().astype(np.uint8)
    if hole.all():
        return frames
    inside = cv2.distanceTransform(hole, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)  # (H, W) pixels to the nearest kept one
    share = torch.from_numpy(inside / (feather + 1)).clamp(0, 1)[..., None]  # (H, W, 1)
    return torch.lerp(video.float(), frames.float(), share).round_().to(torch.uint8)


def read_camera(camera: str | dict[str, float] | Trajectory | None, scale: float, frames: int, H: int, W: int) -> Trajectory | None:
    """A requested trajectory over `frames` frames, its translation multiplied by `scale`; None if none was requested."""
    if camera is None:
        return None
    if isinstance(camera, Trajectory):
        if len(camera) != frames:
            raise UserError(f"camera of {len(camera)} poses for a clip of {frames} frames: give one pose a frame")
        return camera.relative().scaled(scale)
    if isinstance(camera, str) and os.path.isfile(camera):
        try:
            return load_trajectory(camera, frames, (H, W)).scaled(scale)
        except UserError as error:
            raise UserError(str(error), code="camera_file", why=str(error).removeprefix("camera file ")) from None
    axes = parse_axes(camera) if isinstance(camera, str) else camera
    return axes_trajectory(axes, frames, H, W).scaled(scale)


def _picture(picture: Picture) -> Tensor:
    if isinstance(picture, str | Path):
        return read_image(picture)
    picture = _array(picture, "image")
    if picture.dtype != torch.uint8 or picture.ndim != 3 or picture.shape[-1] != 3:
        raise UserError(f"image of type {picture.dtype} and shape {tuple(picture.shape)}: give uint8 (H, W, 3) or a file")
    return picture


def _mask(mask: Picture, H: int, W: int) -> Tensor:
    if isinstance(mask, str | Path):
        return read_mask(mask, H, W)
    pixels = _array(mask, "mask")
    if pixels.ndim != 2 or not pixels.numel():
        raise UserError(f"mask of shape {tuple(pixels.shape)}: give (H, W) from 0 to 1 (or uint8 to 255), or a file")
    pixels = pixels.float() / (255 if pixels.dtype == torch.uint8 and pixels.max() > 1 else 1)
    return fit(pixels, H, W).clamp(0, 1)


def _movie_size(video: Movie) -> tuple[int, int]:
    if isinstance(video, str | Path):
        from kling.data.video import probe  # imported here because only a given video needs a decoder

        info = probe(video)
        return info.height, info.width
    return tuple(_clip(video, "video").shape[1:3])


def _array(value: object, name: str) -> Tensor:
    """A tensor from anything that NumPy understands: an array, a tensor, a PIL picture or a list of them."""
    try:
        return torch.as_tensor(np.require(value, requirements="W"))
    except (TypeError, ValueError, RuntimeError):
        raise UserError(f"{name} of type {type(value).__name__} holds no pixels: give uint8 (H, W, 3), frames of it, or a file") from None


def _clip(movie: Movie, name: str) -> Tensor:
    """A video given as an array, uint8 (T, H, W, 3)."""
    frames = _array(movie, name)
    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not len(frames):
        raise UserError(f"{name} of type {frames.dtype} and shape {tuple(frames.shape)}: give uint8 (T, H, W, 3) or a file")
    return frames


def read_clip(path: str | Path, fps: float, frames: int, size: tuple[int, int]) -> Tensor:
    """The first `frames` frames of a video file, (T, H, W, 3) uint8 at a size (H, W). Raises `UserError` if it is shorter."""
    clip = _movie(path, fps, "video", size, frames)
    if len(clip) < frames:
        raise UserError(f"{path} has {len(clip)} frames at {fps:g} fps, and {frames} are asked for: give a longer video, or fewer frames")
    return fit(clip[:frames], *size)


def _length(movie: Movie, fps: float) -> int:
    """Number of frames of a given video at the model's frame rate, without decoding it."""
    from kling.data.video import probe

    return probe(movie).count(fps) if isinstance(movie, str | Path) else len(_clip(movie, "video"))


def _movie(movie: Movie, fps: float, name: str, size: tuple[int, int], count: int | None = None, crop: bool = True) -> Tensor:
    """A given video at the model's frame rate, uint8 (T, h, w, 3). Of a file only the frames used are decoded, and scaled while reading.

    size (H, W) will be covered, or with crop=False be filled by the whole picture; no picture is kept larger than that needs.
    count: number of first frames; None takes all. Raises `UserError` for more than `MAX_SECONDS`: time stamps can turn few frames into
    many, so the frames are counted after resampling and before decoding.
    """
    if isinstance(movie, str | Path):
        from kling.data.video import probe, read_video

        info = probe(movie)
        if (count or info.count(fps)) > MAX_SECONDS * fps + 1:
            line = f"{name} {movie} lasts {info.duration:.0f} s: give at most {MAX_SECONDS:g} s, such as its beginning with "
            line += f"ffmpeg -i IN -t {MAX_SECONDS:g} OUT"
            raise UserError(line, code="video_too_long", file=movie, seconds=f"{info.duration:.0f}", most=f"{MAX_SECONDS:g}")
        scale = (max if crop else min)(size[0] / info.height, size[1] / info.width)
        small = size if crop else (max(1, round(info.height * scale)), max(1, round(info.width * scale)))
        return read_video(movie, fps=fps, num_frames=count or None, size=small if scale < 1 else None).frames
    return _clip(movie, name)[:count]
