"""Decoding with PyAV: what a video file contains, and its frames by time stamp, upright, with square pixels and correct colours."""

from __future__ import annotations

import logging
import math
import threading
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from functools import cache, lru_cache, partial
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import torch
from av.video.reformatter import ColorPrimaries, Colorspace, ColorTrc, Interpolation, VideoReformatter
from torch import Tensor

from kling.data.colour import HDR, remark, to_srgb
from kling.data.info import EPS, UNTAGGED, VideoInfo
from kling.data.transforms import cover_size, crop, fit
from kling.errors import UserError
from kling.runtime.files import Member, Source, as_source, head, sniff, stamp, url

log = logging.getLogger(__name__)

# Chroma at full resolution and accurate rounding, together: without either, swscale darkens each pass by 1 to 2 levels of 255.
TO_RGB = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.BITEXACT
TO_SMALL_RGB = Interpolation.AREA | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.BITEXACT
MAX_GAP = 600  # seconds that one frame may be shown; a longer gap is a wrong time stamp, and would be filled with copies
JUMP = 1.0  # seconds: if a key frame is at least so far ahead of the last picked frame, opening the file again saves decoding
COUNTED = ("avi", "mpeg", "h264", "hevc")  # containers with few or no presentation times: frame i is shown at i / rate


def probe(path: str | Path | Member) -> VideoInfo:
    """Describe a video. Its packets are counted and its first frame is decoded, because headers may be wrong.

    Raises `UserError` for a file that is not a video, holds no frame, cannot be decoded, or is cut short.
    """
    source = as_source(path)
    head(source)
    return _probe(source, *stamp(source))


def pick(
    source: Source, info: VideoInfo, times: Sequence[float], size: tuple[int, int], threads: int = 0
) -> Iterator[tuple[float, Tensor]]:
    """(stored time, frame uint8 (H, W, 3)) of the stored frame nearest to each of `times`, in seconds, which must not decrease.

    The frame covers size (H, W) (`transforms.fit`). threads: of the decoder, 0 for one per core.
    """
    for run in _runs(times, info.keyframes):
        found = 0
        for time, frame in _nearest(_decode(source, info, run, size, threads), run, 0.5 / info.fps):
            yield time, frame()
            found += 1
        if found < len(run):
            line = f"{source} is damaged {run[found]:.2f} s in ({found} of {len(run)} frames read): download or export it again"
            raise UserError(line, code="damaged_video", file=source)


@contextmanager
def open_video(source: Source, threads: int = 0, **options: str) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """The container, opened with the demuxer of its contents, and its first moving stream. `options` go to the decoder."""
    demuxer, kind = sniff(head(source))
    if demuxer is None:
        remedy = "give it as an image" if kind.endswith("image") else "give an mp4, mov, webm, mkv, avi or gif"
        raise UserError(f"{source} is not a video: it holds {kind} ({remedy})", code="not_a_video", file=source, kind=kind)
    # Titles in Latin-1 or broken tags are no reason to refuse the pictures.
    with damage(source), av.open(url(source), format=demuxer, metadata_errors="replace") as container:
        moving = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
        if not len(container.streams):
            line = f"{source} is damaged or incomplete (no stream in it): download or export it again"
            raise UserError(line, code="damaged_video", file=source)
        if not moving:
            others = ", ".join(sorted({s.type for s in container.streams}))
            line = f"{source} has no video stream, only {others}: give a file with a moving picture"
            raise UserError(line, code="no_picture", file=source)
        moving[0].thread_type = "AUTO"
        moving[0].codec_context.thread_count = threads
        moving[0].codec_context.options = options
        yield container, moving[0]


@contextmanager
def damage(source: Source) -> Iterator[None]:
    """Turn FFmpeg's errors into a `UserError`."""
    try:
        yield
    except UserError:
        raise
    except (av.FFmpegError, OSError) as error:
        line = f"{source} is damaged or incomplete ({error.strerror}): download or export it again"
        raise UserError(line, code="damaged_video", file=source) from None


def picture(
    frame: av.VideoFrame,
    pixel_aspect: Fraction | None,
    source: Source,
    size: tuple[int, int] | None = None,
    hdr: bool = True,
) -> np.ndarray:
    """uint8 (H, W, 3) as a player shows it: matrix, range and primaries as tagged, transparency on white, square pixels, upright.

    The picture covers size (H, W); None keeps its own size. If that makes it smaller, the decoder's scaler shrinks it while converting to
    RGB, a third of the work of converting every pixel first. hdr: False leaves HDR's brightness as it is, where only the shape matters.
    """
    if frame.is_corrupt:
        line = f"{source} is damaged at time stamp {frame.time} s: download or export it again"
        raise UserError(line, code="damaged_video", file=source)
    # Pixels are squared by stretching the short side, so that nothing is lost.
    aspect = pixel_aspect if pixel_aspect and 1 / 4 <= pixel_aspect <= 4 else Fraction(1)  # beyond that the header is damaged
    width, height = round(frame.width * max(1, aspect)), round(frame.height / min(1, aspect))
    turned, flip_y, flip_x = _turn(frame)
    small = None
    if size is not None:
        small = cover_size(*((width, height) if turned else (height, width)), *size)
        small = small[::-1] if turned else small
    untagged = frame.colorspace == UNTAGGED
    mapped = hdr and frame.color_trc in HDR
    tone_map = {"dst_color_trc": ColorTrc.BT709, "dst_color_primaries": ColorPrimaries.BT709} if mapped else {}
    alpha = any(component.is_alpha for component in frame.format.components)
    direct = small is not None and not alpha and small[0] < frame.height and small[1] < frame.width
    to = (small[1], small[0]) if direct else (width, height)
    tags = (frame.colorspace, frame.color_range, frame.color_primaries, frame.color_trc)
    scaler = _scaler(threading.get_ident(), (frame.width, frame.height), to, frame.format.name, tags, mapped)
    pixels = scaler.reformat(
        frame,
        *to,
        "rgba" if alpha else "rgb24",
        # Players read untagged video as BT.601 when it is small and as BT.709 when it is HD.
        src_colorspace=(Colorspace.ITU709 if frame.height >= 720 else Colorspace.ITU601) if untagged else None,
        interpolation=TO_SMALL_RGB if direct else TO_RGB,
        threads=1,
        **tone_map,
    ).to_ndarray()
    if not mapped:
        pixels = np.concatenate([to_srgb(pixels[..., :3], frame.color_primaries), pixels[..., 3:]], axis=-1)
    if alpha:
        opacity = pixels[..., 3:].astype(np.uint16)
        pixels = ((pixels[..., :3] * opacity + 255 * (255 - opacity) + 127) // 255).astype(np.uint8)
    if turned:
        pixels = pixels.swapaxes(0, 1)
    pixels = pixels[:: -1 if flip_y else 1, :: -1 if flip_x else 1]
    return pixels if size is None else crop(pixels, *size) if direct else np.asarray(fit(pixels, *size))


@lru_cache(maxsize=16)
def _scaler(thread: int, *frames: object) -> VideoReformatter:
    """One thread's converter of such frames. It outlives the file, because swscale computes for seconds before the first HDR frame."""
    return VideoReformatter()


def _turn(frame: av.VideoFrame) -> tuple[bool, bool, bool]:
    """The steps that make a frame upright: (swap the axes first, then flip y, then flip x)."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return False, False, False
    # x' = ax + cy, y' = bx + dy, y downwards
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()
    return (True, b < 0, c < 0) if abs(b) > abs(a) else (False, d < 0, a < 0)


@lru_cache(maxsize=4096)
def _probe(source: Source, mtime_ns: int, size: int) -> VideoInfo:
    with open_video(source) as (container, stream):
        packets = [(p.pts, p.is_keyframe, p.is_discard, p.is_corrupt) for p in container.demux(stream) if p.size]
        expected = max(len(packets), len(stream.index_entries))  # an mp4 lists all its frames; in other formats the list is shorter
        whole = [(pts, key) for pts, key, discard, corrupt in packets if not discard and not corrupt]
        missing = expected - sum(not corrupt for *_, corrupt in packets)
        fps = float(stream.average_rate or stream.guessed_rate or 25)
        timed = container.format.name not in COUNTED and all(pts is not None for pts, _ in whole)
        times = sorted(float(pts * stream.time_base) for pts, _ in whole) if timed else []
        keys = sorted(float(pts * stream.time_base) - times[0] for pts, key in whole if key) if timed else []
        demuxer, promised = container.format.name, _promised(stream)
    if not whole:
        raise UserError(f"{source} holds no whole frame: download or export it again", code="no_whole_frame", file=source)
    if missing:
        line = f"{source} is cut short ({missing} of {expected} frames are missing): download or export it again"
        raise UserError(line, code="cut_short", file=source)
    span = times[-1] - times[0] if timed else (len(whole) - 1) / fps
    steps = [b - a for a, b in pairwise(times)] or [span / max(1, len(whole) - 1)]
    if max(steps) > MAX_GAP:
        seconds = f"{max(steps):.0f}"
        line = f"{source} has time stamps that jump by {seconds} s: put them right with ffmpeg -i IN -vf setpts=N/FR/TB OUT"
        raise UserError(line, code="time_jumps", file=source, seconds=seconds)
    if timed and span > 0 and abs(span * fps - (len(whole) - 1)) > 0.5:  # a variable rate, or a wrong rate in the header
        fps = (len(whole) - 1) / span
    if promised and timed and times[-1] + 1.5 / fps + 0.1 < promised:
        line = f"{source} is cut short ({times[-1]:.2f} of {promised:.2f} s are there): download or export it again"
        raise UserError(line, code="cut_short", file=source)
    with open_video(source) as (container, stream):
        first = next(container.decode(stream), None)
        if first is None:
            raise UserError(f"{source} holds no frame that can be decoded: export it again", code="no_whole_frame", file=source)
        H, W = picture(first, stream.sample_aspect_ratio, source, hdr=False).shape[:2]
        if said := remark(first.color_primaries, first.color_trc):
            log.warning("%s is %s", source, said)
        codec, aspect = stream.codec_context.name, float(stream.sample_aspect_ratio or 1)
    return VideoInfo(
        W,
        H,
        len(whole),
        fps,
        span + 1 / fps,
        first.rotation,
        codec,
        first.format.name,
        origin=times[0] if timed else None,
        gap=max(steps),
        vfr=max(steps) - min(steps) > 0.1 / fps + 2e-3,  # Matroska rounds to milliseconds
        pixel_aspect=aspect,
        matrix=first.colorspace,
        primaries=first.color_primaries,
        container=demuxer,
        keyframes=_thinned(keys),
    )


def _thinned(keys: Sequence[float]) -> tuple[float, ...]:
    """The key-frame times, ascending, that are at least `JUMP` after the previous one kept."""
    kept: list[float] = []
    for key in keys:
        if not kept or key >= kept[-1] + JUMP:
            kept.append(round(key, 6))
    return tuple(kept)


def _promised(stream: av.VideoStream) -> float:
    """The duration in seconds that Matroska states for its stream (0 if none): the only sign that such a file was cut."""
    try:
        hours, minutes, seconds = stream.metadata.get("DURATION", "0:0:0").split(":")
        return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    except ValueError:
        return 0.0


Stamped = tuple[float, Callable[[], Tensor]]  # seconds since the first frame, and a function that converts its picture


def _runs(times: Sequence[float], keyframes: Sequence[float]) -> list[list[float]]:
    """`times` split into runs wherever a key frame lets the decoder skip `JUMP` seconds or more.

    >>> _runs([0.0, 0.5, 30.0, 31.5], keyframes=[0.0, 10.0, 20.0, 31.0])
    [[0.0, 0.5], [30.0, 31.5]]
    """
    runs = [[times[0]]]
    for before, after in pairwise(times):
        place = bisect_right(keyframes, after)
        if place and keyframes[place - 1] >= before + JUMP:
            runs.append([])
        runs[-1].append(after)
    return runs


def _nearest(frames: Iterable[Stamped], times: Sequence[float], tail: float) -> Iterator[Stamped]:
    """The frame nearest to each of `times`; the last one also for times up to `tail` seconds later. Fewer if the frames end earlier."""
    done, before = 0, None
    for now in frames:
        while before and done < len(times) and times[done] <= (before[0] + now[0]) / 2 + EPS:
            yield before
            done += 1
        if done == len(times):
            return
        before = now
    while before and done < len(times) and times[done] <= before[0] + tail + EPS:
        yield before
        done += 1


def _decode(source: Source, info: VideoInfo, times: Sequence[float], size: tuple[int, int], threads: int) -> Iterator[Stamped]:
    """Every frame that may be the nearest to one of `times`, and some between them, in order of time."""
    start = times[0]
    for seek in (start > 0 and info.origin is not None, False):  # without seeking, if the seek lands after `start` or fails
        with open_video(source, threads) as (container, stream):
            wanted, reach = list(times), math.inf
            if info.origin is not None:
                wanted, reach = [info.origin + time for time in times], max(info.gap, 1 / info.fps) / 2 + 2 * EPS
            if seek:
                container.seek(int(wanted[0] / stream.time_base), stream=stream)
            last = -math.inf
            for index, frame in enumerate(_frames(container, stream, wanted, reach)):
                if info.origin is None:
                    time = index / info.fps
                elif frame.time is None:
                    line = f"{source} is damaged (frame {index} has no time stamp): download or export it again"
                    raise UserError(line, code="damaged_video", file=source)
                else:
                    time = frame.time - info.origin
                if seek and index == 0 and time > start + EPS:
                    break
                if time > last:
                    # cached: at a higher rate than the video's, the same frame is used more than once
                    yield time, cache(partial(_tensor, frame, stream.sample_aspect_ratio, source, size))
                    last = time
        if last > -math.inf:
            return


def _frames(
    container: av.container.InputContainer, stream: av.VideoStream, wanted: Sequence[float], reach: float
) -> Iterator[av.VideoFrame]:
    """The frames from here on. Non-reference frames shown more than `reach` seconds from all times in `wanted` are skipped."""
    for packet in container.demux(stream):
        idle = packet.pts is not None and not _near(float(packet.pts * stream.time_base), wanted, reach)
        stream.codec_context.skip_frame = "NONREF" if idle else "DEFAULT"
        yield from packet.decode()


def _near(time: float, wanted: Sequence[float], reach: float) -> bool:
    place = bisect_left(wanted, time - reach)
    return place < len(wanted) and wanted[place] <= time + reach


def _tensor(*args: object) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(picture(*args)))
