"""Facts about a video file, and frame rates. It needs no decoder, so the small world and training on it never load one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from kling.errors import UserError

EPS = 1e-6  # seconds; of two equally near frames the earlier one is taken, whatever the rounding
UNTAGGED = 2  # AVCOL_SPC_UNSPECIFIED
PLAYED = {"mov": ("h264", "vp9", "av1", "libdav1d"), "matroska": ("vp8", "vp9", "av1", "libdav1d")}  # by every browser, in 8 bits of 4:2:0


@dataclass(frozen=True)
class VideoInfo:
    """The contents of a file. Width and height are as read: after rotation, with square pixels."""

    width: int
    height: int
    frames: int  # stored frames
    fps: float  # mean rate
    duration: float  # seconds, from the first frame to the end of the last
    rotation: int  # degrees counter-clockwise that reading applies
    codec: str
    pix_fmt: str
    origin: float | None = 0.0  # time stamp of the first frame, seconds; None if the file stores none and frames are counted
    gap: float = 0.0  # longest time from one frame to the next, seconds; 0 for a single frame
    vfr: bool = False  # the rate varies
    pixel_aspect: float = 1.0  # width of a stored pixel over its height
    matrix: int = UNTAGGED  # AVColorSpace
    primaries: int = UNTAGGED  # AVColorPrimaries, 2 of which is unspecified too
    container: str = ""  # FFmpeg's demuxer
    keyframes: tuple[float, ...] = ()  # times of key frames that are `JUMP` or more apart, seconds

    @property
    def plays_in_browsers(self) -> bool:
        return self.codec in PLAYED.get(self.container, ()) and self.pix_fmt in ("yuv420p", "yuvj420p")

    def count(self, fps: float, start: float = 0.0) -> int:
        """Number of frames that `read_video` gives at `fps` from `start`: up to half a stored frame past the last one."""
        end = self.duration - 0.5 / self.fps + EPS
        return max(0, math.floor((end - start) * fps) + 1)


def frame_rate(fps: float) -> Fraction:
    """Frames a second as a fraction; 23.976 and 29.97 become 24000/1001 and 30000/1001, which they abbreviate."""
    if isinstance(fps, bool) or not isinstance(fps, int | float | Fraction) or not math.isfinite(fps) or fps <= 0:
        raise UserError(f"fps {fps}: give a positive number of frames a second")
    if not 1e-3 <= fps <= 1e4:
        raise UserError(f"fps {fps:g}: give from 0.001 to 10000 frames a second, more or less no file can say")
    ntsc = Fraction(1000 * round(fps * 1.001), 1001)
    return ntsc if abs(ntsc - Fraction(fps)) < 2e-4 * fps else Fraction(fps).limit_denominator(1001)
