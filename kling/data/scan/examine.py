"""Examines one file: decodes it from end to end, counts its frames instead of trusting the header, splits it into shots, measures them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from itertools import groupby, pairwise

import numpy as np

from kling.data.decode import VideoInfo, open_video, picture, probe
from kling.data.image import read_image
from kling.data.manifest import IMAGE, Shot
from kling.data.scan.measure import SIDE, ShotMeter
from kling.data.transforms import fit
from kling.errors import UserError
from kling.runtime.files import Source, head, member_of, sha256, sniff, stamp

# The reason under which an error is counted, by a part of its message.
REASONS = (
    ("is empty", "empty"),
    ("does not exist", "missing"),
    ("has no video stream", "no video"),
    ("is not a video", "not a video"),
    ("cut short", "cut short"),
    ("took longer", "too slow"),
    ("was meant for", "stretch"),
    ("is a folder", "not a file"),
    ("is a pipe", "not a file"),
    ("time stamps that jump", "time stamps"),
    ("caption", "caption file"),
    ("camera", "camera file"),
    ("damaged", "damaged"),
    ("no whole frame", "damaged"),
    ("no frame that can be decoded", "damaged"),
)


def reason_of(complaint: str) -> str:
    """The reason under which an error message is counted."""
    return next((reason for phrase, reason in REASONS if phrase in complaint), "unreadable")


def examine(
    source: Source,
    path: str,
    *,
    split: bool = False,
    start: float | None = None,
    end: float | None = None,
    per_minute: float = 20.0,
    announce: Callable[[float], None] = lambda budget: None,
) -> list[Shot]:
    """The clips of one file, without captions: one for each shot, or one for the whole file (or for its part start … end, in seconds).

    per_minute: time limit in seconds for decoding a minute of video. announce: called with the time limit of the whole file, once its
    length is known. Raises `UserError` for a file that cannot be used.
    """
    clock = time.monotonic()
    demuxer, kind = sniff(head(source))
    mtime_ns, size = stamp(source)
    if demuxer is None and kind.endswith("image"):
        return [_image(source, path, kind, mtime_ns, size)]
    info = probe(source)
    budget = per_minute * max(1.0, info.duration / 60)
    announce(budget)
    times, meter, cuts = _decode_all(source, info, split, clock + budget)
    begin, last = 0.0, times[-1] + 1 / info.fps
    info = dataclasses.replace(info, frames=len(times), duration=last)
    if start is not None or end is not None:
        begin, last = start or 0.0, min(last, end or last)
        if not begin < last:
            raise UserError(f"{source} is {info.duration:.2f} s long: it is not the file that {start} … {end} s was meant for")
    shot = Shot(path, info, size, mtime_ns, sha256(source), member=member_of(source))
    edges = [begin, *(cut for cut in cuts if begin < cut < last), last]
    return [
        dataclasses.replace(
            shot,
            start=round(a, 6),
            end=round(b, 6),
            video=dataclasses.replace(info, keyframes=tuple(key for key in info.keyframes if a < key < b)),
            clock=clock_of([t for t in times if a <= t < b]),
            measures=meter.summary(a, b),
        )
        for a, b in pairwise(edges)
    ]


def _image(source: Source, path: str, kind: str, mtime_ns: int, size: int) -> Shot:
    pixels, meter = read_image(source), ShotMeter()
    H, W = pixels.shape[:2]
    meter.see(0.0, fit(pixels, *_small(H, W)).numpy())
    info = VideoInfo(W, H, 1, 1.0, 0.0, 0, kind.split()[1].lower(), "rgb24", container=IMAGE)
    return Shot(path, info, size, mtime_ns, sha256(source), member=member_of(source), measures=meter.summary(0.0, 1.0))


def _decode_all(source: Source, info: VideoInfo, split: bool, deadline: float) -> tuple[list[float], ShotMeter, list[float]]:
    """(time of every frame, the measurements, times of the cuts). Raises `UserError` at the first damage, or after the deadline."""
    times: list[float] = []
    meter, cuts = ShotMeter(), CutDetector(info.fps) if split else None
    size = _small(info.height, info.width)
    with open_video(source, threads=1) as (container, stream):
        for index, frame in enumerate(container.decode(stream)):
            if time.monotonic() > deadline:
                raise UserError(
                    f"{source} took longer to decode than it may ({index} of {info.frames} frames): scan it with more --seconds-per-minute"
                )
            if info.origin is not None and frame.time is None:
                raise UserError(f"{source} is damaged (frame {index} has no time stamp): download or export it again")
            at = index / info.fps if info.origin is None else frame.time - info.origin
            if cuts or frame.is_corrupt or meter.due(at):
                small = picture(frame, stream.sample_aspect_ratio, source, size)  # raises for a corrupt frame
                if cuts:
                    cuts.see(at, small)
                if meter.due(at):
                    meter.see(at, small)
            times.append(at)
    if len(times) < info.frames:
        raise UserError(f"{source} is damaged ({info.frames - len(times)} of {info.frames} frames cannot be decoded): export it again")
    return sorted(times), meter, cuts.found if cuts else []


def _small(H: int, W: int) -> tuple[int, int]:
    """The size at which pictures are measured."""
    scale = min(1.0, SIDE / max(H, W))
    return max(2, round(H * scale)), max(2, round(W * scale))


class CutDetector:
    """PySceneDetect's content detector, applied to the frames decoded here."""

    def __init__(self, fps: float) -> None:
        try:
            from scenedetect import ContentDetector, FrameTimecode
        except ImportError:
            raise UserError("splitting into shots needs PySceneDetect: pip install 'kling[shots]', or scan without --shots") from None
        self._detector, self._timecode, self._fps = ContentDetector(min_scene_len=max(1, round(fps / 2))), FrameTimecode, fps
        self._times: list[float] = []
        self.found: list[float] = []  # the time of the first frame after each cut

    def see(self, time: float, frame: np.ndarray) -> None:
        here = self._timecode(len(self._times), self._fps)
        self._times.append(time)
        self.found += [self._times[cut.frame_num] for cut in self._detector.process_frame(here, np.ascontiguousarray(frame[..., ::-1]))]


def clock_of(times: list[float]) -> tuple[float, tuple[tuple[float, int], ...]] | None:
    """(first, (step, repetitions) …): all time stamps, as one step if the rate is constant to a millisecond, else in microseconds.

    >>> clock_of([0.0, 0.5, 1.0, 2.0])
    (0.0, ((0.5, 2), (1.0, 1)))
    """
    if not times:
        return None
    mean = (times[-1] - times[0]) / max(1, len(times) - 1)
    if all(abs(t - times[0] - i * mean) < 1e-3 for i, t in enumerate(times)):
        return round(times[0], 6), ((mean, len(times) - 1),)
    steps = [round(b - a, 6) for a, b in pairwise(times)]
    return round(times[0], 6), tuple((step, len(list(run))) for step, run in groupby(steps))
