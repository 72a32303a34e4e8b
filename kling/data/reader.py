"""One interface over three decoders: frames of a video by their times.

    reader = open_reader("cat.mp4")                        # pyav: reads everything
    frames = reader.at([0.0, 0.125, 0.25], size=(64, 112))   # uint8 (3, 64, 112, 3): the stored frames nearest to these seconds

decord and torchcodec read plain files only (`not_plain`): H.264 at a constant rate, upright, with square 8-bit pixels and a common colour
matrix. decord returns wrong frames from damaged files without an error, so the file must have passed `kling-data scan` first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from kling.data.colour import TO_709
from kling.data.info import EPS, UNTAGGED, VideoInfo
from kling.data.transforms import fit
from kling.errors import UserError, unknown
from kling.runtime.files import Member, Source, as_source, url

KNOWN = (1, 5, 6)  # AVColorSpace: BT.709, BT.470BG, SMPTE 170M


class Reader(Protocol):
    """Frames of one video."""

    info: VideoInfo

    def at(self, times: Sequence[float], size: tuple[int, int] | None = None) -> Tensor:
        """uint8 (n, H, W, 3): the stored frame nearest to each of `times` (seconds from the first frame, ascending), covering `size`.

        Raises `UserError` if the file is damaged, or ends half a frame or more before the last time.
        """


class PyAVReader:
    """Reads everything that FFmpeg reads; the only reader that handles rotation, non-square pixels, variable rates and damage."""

    def __init__(self, source: Source, info: VideoInfo, threads: int = 0) -> None:
        self.source, self.info, self.threads = source, info, threads

    def at(self, times: Sequence[float], size: tuple[int, int] | None = None) -> Tensor:
        from kling.data.decode import pick  # imported here because the small world needs no decoder

        size = size or (self.info.height, self.info.width)
        frames = torch.empty((len(times), *size, 3), dtype=torch.uint8)
        for i, (_, frame) in enumerate(pick(self.source, self.info, times, size, self.threads)):
            frames[i] = frame
        return frames


class _PlainReader:
    """A decoder that addresses frames by number: times are converted to indices."""

    def __init__(self, source: Source, info: VideoInfo, threads: int = 0) -> None:
        if why := not_plain(info):
            raise UserError(f"{source} needs reader pyav: {why}")
        self.source, self.info = source, info
        try:
            self._open(source, threads)
        except ImportError as error:
            raise UserError(f"reader {self.name} is not installed ({error}): pip install 'kling[{self.name}]', or use pyav") from None
        except RuntimeError as error:  # the only error of decord and torchcodec
            raise UserError(f"{source} cannot be opened by {self.name} ({str(error).splitlines()[0]}): use reader pyav") from None

    def at(self, times: Sequence[float], size: tuple[int, int] | None = None) -> Tensor:
        # of two equally near frames the earlier one is taken
        places = [max(0, math.ceil(time * self.info.fps - 0.5 - EPS * self.info.fps)) for time in times]
        if places[-1] >= self.info.frames:
            raise UserError(f"{self.source} has {self.info.frames} frames: none is near {times[-1]:.2f} s")
        frames = self._frames(places)
        return frames if size is None else fit(frames, *size)


class DecordReader(_PlainReader):
    name = "decord"

    def _open(self, source: Source, threads: int) -> None:
        import decord

        self.video = decord.VideoReader(url(source) if isinstance(source, Member) else str(source), num_threads=threads)

    def _frames(self, places: list[int]) -> Tensor:
        return torch.from_numpy(self.video.get_batch(places).asnumpy())


class TorchcodecReader(_PlainReader):
    name = "torchcodec"

    def _open(self, source: Source, threads: int) -> None:
        try:
            from torchcodec.decoders import VideoDecoder
        except RuntimeError as error:  # FFmpeg's shared libraries are missing, or built for another torch
            raise ImportError(str(error).splitlines()[0]) from None
        if isinstance(source, Member):
            raise UserError(f"{source} is inside a tar, which torchcodec does not read: use reader pyav or decord")
        self.video = VideoDecoder(str(source), dimension_order="NHWC", num_ffmpeg_threads=threads or 1)

    def _frames(self, places: list[int]) -> Tensor:
        return self.video.get_frames_at(places).data


READERS = {"pyav": PyAVReader, "decord": DecordReader, "torchcodec": TorchcodecReader}


def open_reader(path: str | Path | Member, backend: str = "auto", info: VideoInfo | None = None, threads: int = 0) -> Reader:
    """A reader of one file. info: what a scan found (otherwise the file is probed). threads: 0 for one per core.

    auto is pyav: it is faster than decord and torchcodec on the files that these can read (`kling-bench video`), and the only one that
    detects damage. Raises `UserError` for a file that the backend must not read.
    """
    if backend not in ("auto", *READERS):
        raise unknown("reader", backend, ["auto", *READERS])
    from kling.data.decode import probe  # imported here because the small world needs no decoder

    source = as_source(path)
    return READERS["pyav" if backend == "auto" else backend](source, info or probe(source), threads)


def not_plain(info: VideoInfo) -> str | None:
    """The reason why decord and torchcodec must not read a file, or None if they may."""
    if info.codec != "h264" or info.pix_fmt != "yuv420p" or info.container not in ("mov", "matroska"):
        return f"it is {info.codec} {info.pix_fmt} in {info.container}, not h264 yuv420p in mp4 or mkv"
    if info.vfr:
        return "its rate varies"
    if info.rotation % 360 or abs(info.pixel_aspect - 1) > 1e-6:
        return "it is rotated, or its pixels are not square"
    if info.matrix not in KNOWN and not (info.matrix == UNTAGGED and info.height < 720):
        return "its colour matrix is not one that every decoder reads alike"
    if info.primaries in TO_709:
        return "its colours are not those of BT.709"
    return None
