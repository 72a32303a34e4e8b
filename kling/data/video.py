"""Reading and writing videos with PyAV only.

    info = probe("cat.mp4")                                  # VideoInfo: the contents, counted instead of read from the header
    clip = read_video("cat.mp4", fps=8, num_frames=41)       # Clip: uint8 (T, H, W, 3), upright, square pixels, correct colours
    with VideoWriter("out.mp4", fps=8) as out:               # takes frames as they are made; writes the file atomically
        out.write(frames)

Frames are picked by their time stamps: output frame i is the one nearest to start + i / fps, so a video of variable rate keeps its speed.
Every fault of a file is a `UserError` of one line with the path.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import av
import numpy as np
import torch
from av.video.reformatter import ColorRange, Colorspace
from PIL import Image
from torch import Tensor

from kling.data.decode import TO_RGB, pick, probe
from kling.data.info import VideoInfo, frame_rate
from kling.data.transforms import Frames, check_size
from kling.errors import UserError
from kling.runtime.files import Member, Source, as_source, writing, written

MAX_GIB = 8  # limit of the pixels that `read_video` holds at once
WRITABLE = {".mp4": "mp4", ".mov": "mov", ".mkv": "matroska"}


@dataclass(frozen=True)
class Clip:
    """Frames and where they came from."""

    frames: Tensor  # uint8 (T, H, W, 3)
    fps: float
    source: str  # the path
    start: float  # seconds into the source
    times: tuple[float, ...]  # the stored time of each frame, seconds into the source


def read_video(
    path: str | Path | Member,
    *,
    fps: float | None = None,
    start: float = 0.0,
    num_frames: int | None = None,
    size: tuple[int, int] | None = None,
    max_gib: float | None = None,
) -> Clip:
    """Read a video as uint8 frames (T, H, W, 3).

    fps         frames a second of the clip; default the file's mean rate
    start       seconds into the video
    num_frames  exactly this many; default all that follow
    size        (H, W) that the frames are fitted to, covering it (`transforms.fit`)
    max_gib     limit of their pixels; default `MAX_GIB`

    Raises `UserError` if the file is bad, has fewer frames than requested, or would not fit into memory.
    """
    path, info = as_source(path), probe(path)
    fps, wanted, size = _ask(path, info, fps, start, num_frames, size)
    gib, max_gib = wanted * math.prod(size) * 3 / 2**30, MAX_GIB if max_gib is None else max_gib
    if gib > max_gib:
        held = f"{gib:.1f} GiB, more than the {max_gib:g} that are held at once"
        raise UserError(f"{path}: {wanted} frames of {size[1]}x{size[0]} take {held}: give fewer frames or a smaller size")
    frames, times = torch.empty((wanted, *size, 3), dtype=torch.uint8), []
    for time, frame in pick(path, info, [start + i / fps for i in range(wanted)], size):
        frames[len(times)] = frame
        times.append(time)
    return Clip(frames, float(fps), str(path), start, tuple(times))


def stream_video(
    path: str | Path | Member,
    *,
    fps: float | None = None,
    start: float = 0.0,
    num_frames: int | None = None,
    size: tuple[int, int] | None = None,
) -> Iterator[Tensor]:
    """The frames of `read_video` one by one, uint8 (H, W, 3), in bounded memory. The same errors."""
    path, info = as_source(path), probe(path)
    fps, wanted, size = _ask(path, info, fps, start, num_frames, size)
    return (frame for _, frame in pick(path, info, [start + i / fps for i in range(wanted)], size))


class VideoWriter:
    """Write frames as they come: H.264, yuv420p, BT.709 limited range, moov atom first. The same frames give the same bytes.

    A context manager: the file appears when the block succeeds; if it raises, nothing is left behind.
    Raises `UserError` if the path cannot be written, the suffix is not .mp4, .mov or .mkv, a size is odd, or there is no frame.
    """

    def __init__(self, path: str | Path, fps: float, *, crf: int = 17) -> None:
        self.path, self.crf, self.frames = Path(path), crf, 0
        if self.path.suffix.lower() not in WRITABLE:
            raise UserError(f"cannot write video {self.path}: end its name in {', '.join(WRITABLE)}")
        self.rate = frame_rate(fps)
        self.stream: av.VideoStream | None = None

    def __enter__(self) -> VideoWriter:
        with ExitStack() as stack:  # undone in reverse: the container is closed, then the file is moved or deleted
            temporary = stack.enter_context(written(self.path))
            # bitexact: no creation time, no library version, no random segment id
            container = WRITABLE[self.path.suffix.lower()]
            options = {"fflags": "+bitexact"} | ({} if container == "matroska" else {"movflags": "+faststart"})
            with writing(self.path):
                self.container = av.open(f"file:{temporary.absolute()}", "w", format=container, options=options)
            stack.push(self._finish)
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self.stack.__exit__(*error)

    def write(self, frames: Frames) -> None:
        """Append uint8 frames (T, H, W, 3), or one (H, W, 3)."""
        pixels = np.asarray(frames)
        if pixels.dtype != np.uint8 or pixels.ndim not in (3, 4) or pixels.shape[-1] != 3:
            raise ValueError(f"expected uint8 frames (T, H, W, 3), got {pixels.dtype} {pixels.shape}")
        for picture in pixels.reshape(-1, *pixels.shape[-3:]):
            if self.stream is None:
                self._begin(*picture.shape[:2])
            if picture.shape[:2] != (self.stream.height, self.stream.width):
                raise ValueError(f"frame {self.frames} is {picture.shape[:2]}, the first was {(self.stream.height, self.stream.width)}")
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame = frame.reformat(
                format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG, interpolation=TO_RGB, threads=1
            )
            frame.pts, frame.time_base = self.frames, 1 / self.rate
            with writing(self.path):
                self.container.mux(self.stream.encode(frame))
            self.frames += 1

    def _begin(self, height: int, width: int) -> None:
        if height % 2 or width % 2:
            raise UserError(f"size {width}x{height} is odd, which H.264 cannot store: use {width + width % 2}x{height + height % 2}")
        # One thread: x264 divides a frame by the number of threads, so the file would depend on the machine.
        # Centred chroma, as swscale makes it: untagged, it would be read as H.264's default, left, half a pixel off.
        options = {"crf": str(self.crf), "threads": "1", "x264-params": "chromaloc=1" + same_everywhere()}
        self.stream = self.container.add_stream("libx264", rate=self.rate, options=options)
        self.stream.width, self.stream.height, self.stream.pix_fmt = width, height, "yuv420p"
        context = self.stream.codec_context
        context.time_base = 1 / self.rate
        context.colorspace = context.color_primaries = context.color_trc = 1  # BT.709
        context.color_range = ColorRange.MPEG

    def _finish(self, failure: type[BaseException] | None, *_: object) -> None:
        if failure is not None:
            with suppress(OSError):  # the file is about to be deleted
                self.container.close()
            return
        with writing(self.path), self.container:
            if self.stream is None:
                raise UserError(f"no frame was written to {self.path}: a video needs at least one")
            self.container.mux(self.stream.encode())


@cache
def same_everywhere() -> str:
    """Options for the same bytes on every run. x264's AVX-512 code encodes the same frames differently from one run to the next, at most
    sizes of a small model; its AVX2 code does not, and every CPU with AVX-512 has AVX2. Empty on other CPUs, where AVX2 may be missing."""
    supported = getattr(torch.cpu, "_is_avx512_supported", lambda: torch.backends.cpu.get_cpu_capability() == "AVX512")
    return ":asm=avx2" if supported() else ""


def write_video(path: str | Path, frames: Frames, fps: float, *, crf: int = 17) -> None:
    """Write uint8 (T, H, W, 3) as a video (see `VideoWriter`)."""
    with VideoWriter(path, fps, crf=crf) as out:
        out.write(frames)


def write_gif(path: str | Path, frames: Frames, fps: float) -> None:
    """Write uint8 (T, H, W, 3) as an endless GIF. GIF delays are in 1/100 s: they alternate so that the mean rate is right."""
    pictures = [Image.fromarray(frame) for frame in np.asarray(frames)]
    if not pictures:
        raise UserError(f"no frame to write to {path}: a GIF needs at least one")
    ticks = [round(100 * t / frame_rate(fps)) for t in range(len(pictures) + 1)]
    delays = [10 * (b - a) for a, b in zip(ticks, ticks[1:], strict=False)]  # milliseconds
    with written(path) as temporary, writing(Path(path)):
        pictures[0].save(temporary, format="GIF", save_all=True, append_images=pictures[1:], duration=delays, loop=0)


def _ask(
    path: Source, info: VideoInfo, fps: float | None, start: float, num_frames: int | None, size: tuple[int, int] | None
) -> tuple[float, int, tuple[int, int]]:
    """Check the arguments and fill in defaults: (fps, number of frames, (H, W))."""
    fps = info.fps if fps is None else float(frame_rate(fps))
    size = size or (info.height, info.width)
    check_size(*size)
    if not (math.isfinite(start) and start >= 0):
        raise UserError(f"start {start} s: give 0 or more seconds")
    if num_frames is not None and num_frames < 1:
        raise UserError(f"num_frames {num_frames}: give at least 1")
    there = info.count(fps, start)
    if there < (num_frames or 1):
        gives = f"{path} ({info.duration:.2f} s) gives {there} frames at {fps:g} fps from {start:g} s on"
        raise UserError(f"{gives}, {num_frames or 1} needed: give a longer video or ask for fewer")
    return fps, num_frames or there, size
