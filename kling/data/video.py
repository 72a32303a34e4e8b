"""Video in and out, through PyAV alone.

    info = probe("cat.mp4")                                  # VideoInfo: what is in it, counted and not believed
    clip = read_video("cat.mp4", fps=8, num_frames=41)       # Clip: uint8 (T, H, W, 3), upright, square pixels, true colours
    with VideoWriter("out.mp4", fps=8) as out:               # frames as they come; the file appears whole or not at all
        out.write(frames)

Frames are picked by their time stamps: output frame i is the one nearest to start + i / fps, so a variable rate keeps its pace.
Every mistake in a file is a `UserError` of one line with the path.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, lru_cache, partial
from pathlib import Path

import av
import numpy as np
import torch
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation, VideoReformatter
from PIL import Image
from torch import Tensor

from kling.data.files import head, sniff, writing, written
from kling.data.transforms import Frames, check_size, fit
from kling.errors import UserError

EPS = 1e-6  # seconds; ties between two frames go to the earlier one whatever the rounding
MAX_GIB = 8  # of pixels that `read_video` holds at once
# Chroma at full resolution and accurate rounding, together: without either, swscale darkens each pass by 1 to 2 levels of 255.
TO_RGB = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.BITEXACT
MAX_GAP = 600  # seconds for which a frame may stand; a longer one is a time stamp gone wrong, and would be filled with copies
UNTAGGED = 2  # AVCOL_SPC_UNSPECIFIED
HDR = (ColorTrc.SMPTE2084, ColorTrc.ARIB_STD_B67)  # PQ and HLG (phones): mapped to BT.709 by swscale
COUNTED = ("avi", "mpeg", "h264", "hevc")  # containers that state few or no presentation times: frame i is shown at i / rate
WRITABLE = {".mp4": "mp4", ".mov": "mov", ".mkv": "matroska"}


@dataclass(frozen=True)
class VideoInfo:
    """What a file holds, as read: after rotation, with square pixels."""

    width: int
    height: int
    frames: int  # stored frames
    fps: float  # mean rate
    duration: float  # seconds, from the first frame to the end of the last
    rotation: int  # degrees counter-clockwise that reading applies
    codec: str
    pix_fmt: str
    origin: float | None = 0.0  # time stamp of the first frame, seconds; None where none are stored and frames are counted

    def count(self, fps: float, start: float = 0.0) -> int:
        """Frames that `read_video` gives at `fps` from `start`: up to half a stored frame past the last one."""
        end = self.duration - 0.5 / self.fps + EPS
        return max(0, math.floor((end - start) * fps) + 1)


@dataclass(frozen=True)
class Clip:
    """Frames and where they came from."""

    frames: Tensor  # uint8 (T, H, W, 3)
    fps: float
    source: str  # the path
    start: float  # seconds into the source
    times: tuple[float, ...]  # the stored time of each frame, seconds into the source


def probe(path: str | Path) -> VideoInfo:
    """Describe a video: its packets are counted and its first frame is decoded, so that a header cannot lie.

    Raises `UserError` for what is not a video, holds no frame, cannot be decoded, or is cut short.
    """
    path = Path(path)
    head(path)
    stat = path.stat()
    return _probe(path, stat.st_mtime_ns, stat.st_size)


def read_video(
    path: str | Path,
    *,
    fps: float | None = None,
    start: float = 0.0,
    num_frames: int | None = None,
    size: tuple[int, int] | None = None,
) -> Clip:
    """Read a video as uint8 frames (T, H, W, 3).

    fps         frames a second of the clip; default the file's own mean rate
    start       seconds into the video
    num_frames  exactly so many; default all that follow
    size        (H, W) to which frames are brought, covering it (`transforms.fit`)

    Raises `UserError` if the file is bad, has fewer frames than asked, or would not fit into memory.
    """
    path, info = Path(path), probe(path)
    fps, wanted, size = _ask(path, info, fps, start, num_frames, size)
    gib = wanted * math.prod(size) * 3 / 2**30
    if gib > MAX_GIB:
        raise UserError(f"{path}: {wanted} frames of {size[1]}x{size[0]} take {gib:.1f} GiB: give fewer frames or a smaller size")
    frames, times = torch.empty((wanted, *size, 3), dtype=torch.uint8), []
    for time, frame in _pick(path, info, fps, start, wanted, size):
        frames[len(times)] = frame
        times.append(time)
    return Clip(frames, float(fps), str(path), start, tuple(times))


def stream_video(
    path: str | Path,
    *,
    fps: float | None = None,
    start: float = 0.0,
    num_frames: int | None = None,
    size: tuple[int, int] | None = None,
) -> Iterator[Tensor]:
    """The frames of `read_video` one by one, uint8 (H, W, 3), in bounded memory. The same errors."""
    path, info = Path(path), probe(path)
    fps, wanted, size = _ask(path, info, fps, start, num_frames, size)
    return (frame for _, frame in _pick(path, info, fps, start, wanted, size))


def read_tail(path: str | Path, num_frames: int, fps: float, *, size: tuple[int, int] | None = None) -> Clip:
    """The last `num_frames` at `fps`, ending on the very last stored frame: what a continuation starts from."""
    info = probe(path)
    start = info.duration - 1 / info.fps - (num_frames - 1) / fps
    if start < -0.5 / info.fps - EPS:
        raise UserError(f"{path} is {info.duration:.2f} s long: {num_frames} frames at {fps:g} fps need {num_frames / fps:.2f} s")
    return read_video(path, fps=fps, start=max(0.0, start), num_frames=num_frames, size=size)


class VideoWriter:
    """Write frames as they come: H.264, yuv420p, BT.709 limited range, moov atom first. The same frames give the same bytes.

    A context manager: the file appears when the block ends well; if it raises, nothing is left behind.
    Raises `UserError` if the place cannot be written, the suffix is not .mp4, .mov or .mkv, a size is odd, or no frame came.
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
        # One thread: x264 cuts a frame by the number of threads, and the machine's would end up in the bytes.
        # Centred chroma, as swscale makes it: untagged it would be read as H.264's default, left, half a pixel off.
        options = {"crf": str(self.crf), "threads": "1", "x264-params": "chromaloc=1"}
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


def write_video(path: str | Path, frames: Frames, fps: float, *, crf: int = 17) -> None:
    """Write uint8 (T, H, W, 3) as a video (see `VideoWriter`)."""
    with VideoWriter(path, fps, crf=crf) as out:
        out.write(frames)


def write_gif(path: str | Path, frames: Frames, fps: float) -> None:
    """Write uint8 (T, H, W, 3) as an endless GIF. Its clock ticks 100 times a second: delays alternate so that the mean rate is right."""
    pictures = [Image.fromarray(frame) for frame in np.asarray(frames)]
    if not pictures:
        raise UserError(f"no frame to write to {path}: a GIF needs at least one")
    ticks = [round(100 * t / frame_rate(fps)) for t in range(len(pictures) + 1)]
    delays = [10 * (b - a) for a, b in zip(ticks, ticks[1:], strict=False)]  # milliseconds
    with written(path) as temporary, writing(Path(path)):
        pictures[0].save(temporary, format="GIF", save_all=True, append_images=pictures[1:], duration=delays, loop=0)


# ---------------------------------------------------------------------------------------------------------------- decoding


@contextmanager
def _open(path: Path) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """The container, its demuxer forced by the contents, and its first moving stream."""
    demuxer, kind = sniff(head(path))
    if demuxer is None:
        remedy = "give it as an image" if kind.endswith("image") else "give an mp4, mov, webm, mkv, avi or gif"
        raise UserError(f"{path} is not a video: it holds {kind} ({remedy})")
    # Titles in Latin-1 or rotten tags are no reason to refuse the pictures.
    with _damage(path), av.open(f"file:{path.absolute()}", format=demuxer, metadata_errors="replace") as container:
        moving = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
        if not len(container.streams):
            raise UserError(f"{path} is damaged or incomplete (no stream in it): download or export it again")
        if not moving:
            others = ", ".join(sorted({s.type for s in container.streams}))
            raise UserError(f"{path} has no video stream, only {others}: give a file with a moving picture")
        moving[0].thread_type = "AUTO"
        yield container, moving[0]


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except (av.FFmpegError, OSError) as error:
        raise UserError(f"{path} is damaged or incomplete ({error.strerror}): download or export it again") from None


@lru_cache(maxsize=4096)
def _probe(path: Path, mtime_ns: int, size: int) -> VideoInfo:
    with _open(path) as (container, stream):
        packets = [(p.pts, p.is_discard, p.is_corrupt) for p in container.demux(stream) if p.size]
        expected = max(len(packets), len(stream.index_entries))  # an mp4 lists its frames ahead; elsewhere the list is shorter
        whole = [pts for pts, discard, corrupt in packets if not discard and not corrupt]
        missing = expected - sum(not corrupt for *_, corrupt in packets)
        fps = float(stream.average_rate or stream.guessed_rate or 25)
        timed = container.format.name not in COUNTED and None not in whole
        times = sorted(float(pts * stream.time_base) for pts in whole) if timed else []
    if not whole:
        raise UserError(f"{path} holds no whole frame: download or export it again")
    if missing:
        raise UserError(f"{path} is cut short ({missing} of {expected} frames are missing): download or export it again")
    span = times[-1] - times[0] if timed else (len(whole) - 1) / fps
    gap = max((b - a for a, b in zip(times, times[1:], strict=False)), default=0)
    if gap > MAX_GAP:
        raise UserError(f"{path} has time stamps that jump by {gap:.0f} s: put them right with ffmpeg -i IN -vf setpts=N/FR/TB OUT")
    if timed and span > 0 and abs(span * fps - (len(whole) - 1)) > 0.5:  # a variable rate, or a header that is wrong about it
        fps = (len(whole) - 1) / span
    with _open(path) as (container, stream):
        first = next(container.decode(stream), None)
        if first is None:
            raise UserError(f"{path} holds no frame that can be decoded: export it again")
        H, W = _picture(first, stream.sample_aspect_ratio, VideoReformatter(), path).shape[:2]
        codec = stream.codec_context.name
    origin = times[0] if timed else None
    return VideoInfo(W, H, len(whole), fps, span + 1 / fps, first.rotation, codec, first.format.name, origin)


def _ask(
    path: Path, info: VideoInfo, fps: float | None, start: float, num_frames: int | None, size: tuple[int, int] | None
) -> tuple[float, int, tuple[int, int]]:
    """Check a request: (fps, number of frames, (H, W))."""
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


def _pick(path: Path, info: VideoInfo, fps: float, start: float, wanted: int, size: tuple[int, int]) -> Iterator[tuple[float, Tensor]]:
    """(stored time, frame (H, W, 3)) of the stored frame nearest to start + i / fps, for each i < wanted."""
    done, before = 0, None
    for now in _decode(path, info, start):
        while before and done < wanted and start + done / fps <= (before[0] + now[0]) / 2 + EPS:
            yield before[0], fit(before[1](), *size)
            done += 1
        if done == wanted:
            return
        before = now
    while before and done < wanted and start + done / fps <= before[0] + 0.5 / info.fps + EPS:
        yield before[0], fit(before[1](), *size)
        done += 1
    if done < wanted:
        raise UserError(f"{path} is damaged {start + done / fps:.2f} s in ({done} of {wanted} frames read): download or export it again")


def _decode(path: Path, info: VideoInfo, start: float) -> Iterator[tuple[float, Callable[[], np.ndarray]]]:
    """(seconds since the first frame, how to get its picture), times rising, beginning at or before `start`."""
    for seek in (start > 0 and info.origin is not None, False):  # again from the top if the first lands beyond `start`, or nowhere
        with _open(path) as (container, stream):
            if seek:
                container.seek(int((info.origin + start) / stream.time_base), stream=stream)
            scaler, last = VideoReformatter(), -math.inf
            for index, frame in enumerate(container.decode(stream)):
                if info.origin is None:
                    time = index / info.fps
                elif frame.time is None:
                    raise UserError(f"{path} is damaged (frame {index} has no time stamp): download or export it again")
                else:
                    time = frame.time - info.origin
                if seek and index == 0 and time > start + EPS:
                    break
                if time > last:
                    # cached: a slow video shows the same frame more than once
                    yield time, cache(partial(_picture, frame, stream.sample_aspect_ratio, scaler, path))
                    last = time
        if last > -math.inf:
            return


def _picture(frame: av.VideoFrame, pixel_aspect: Fraction | None, scaler: VideoReformatter, path: Path) -> np.ndarray:
    """uint8 (H, W, 3) as a player shows it: matrix and range as tagged, laid on white, square pixels, upright."""
    if frame.is_corrupt:
        raise UserError(f"{path} is damaged at time stamp {frame.time} s: download or export it again")
    # Pixels are squared by stretching the short side, so that nothing is lost.
    aspect = pixel_aspect if pixel_aspect and 1 / 4 <= pixel_aspect <= 4 else Fraction(1)  # beyond that, a damaged header
    width, height = round(frame.width * max(1, aspect)), round(frame.height / min(1, aspect))
    untagged = frame.colorspace == UNTAGGED
    tone_map = {"dst_color_trc": ColorTrc.BT709, "dst_color_primaries": ColorPrimaries.BT709} if frame.color_trc in HDR else {}
    alpha = any(component.is_alpha for component in frame.format.components)
    pixels = scaler.reformat(
        frame,
        width,
        height,
        "rgba" if alpha else "rgb24",
        # Players read untagged video as BT.601 when it is small and as BT.709 when it is HD.
        src_colorspace=(Colorspace.ITU709 if frame.height >= 720 else Colorspace.ITU601) if untagged else None,
        interpolation=TO_RGB,
        threads=1,
        **tone_map,
    ).to_ndarray()
    if alpha:
        opacity = pixels[..., 3:].astype(np.uint16)
        pixels = ((pixels[..., :3] * opacity + 255 * (255 - opacity) + 127) // 255).astype(np.uint8)
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return pixels
    # x' = ax + cy, y' = bx + dy, y downwards
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()
    if abs(b) > abs(a):  # a quarter turn
        pixels, a, d = pixels.swapaxes(0, 1), c, b
    return pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


def frame_rate(fps: float) -> Fraction:
    """Frames a second as a fraction; 23.976 and 29.97 become the 24000/1001 and 30000/1001 that they stand for."""
    if isinstance(fps, bool) or not isinstance(fps, int | float | Fraction) or not math.isfinite(fps) or fps <= 0:
        raise UserError(f"fps {fps}: give a positive number of frames a second")
    ntsc = Fraction(1000 * round(fps * 1.001), 1001)
    return ntsc if abs(ntsc - Fraction(fps)) < 2e-4 * fps else Fraction(fps).limit_denominator(1001)
