"""Measurements on a clip's pixels, made once while a scan decodes it, so that filters can be changed later without decoding again.

motion      median speed of the picture's points, % of the long side per second (DIS optical flow); 0 is frozen
shake       how unsteady the camera is: deviation of the whole picture's acceleration, % of the long side
sharpness   median variance of the Laplacian, levels², at 320 pixels; below about 30 is blurred
dark        share of the time in which 95 of 100 pixels are near black
letterbox   share of the picture under black bars
text        share of the picture under lines of text that do not move for half a second or more: subtitles, logos, time codes
hashes      three 64-bit perceptual hashes (DCT of 32x32 grey pixels), from the beginning, the middle and the end
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

RATE = 8.0  # sampled pictures per second
SIDE = 320  # pixels of their long side
BLACK = 28  # levels: video black is 16, plus noise
STROKE = 5  # pixels; strokes of text are thinner
CONTRAST = 60  # levels by which a stroke differs from its surroundings
STEADY = 24  # levels by which a stroke may change from one look to the next
WINDOW = (25, 5)  # pixels, width and height: about five letters
STROKES = 0.1  # minimum number of strokes that begin per pixel of a line of text
STANDS = 4  # number of samples in which it must not move


@dataclass(frozen=True)
class Look:
    """One sampled frame."""

    time: float  # seconds
    sharpness: float
    dark: bool
    rows: np.ndarray  # (H,) brightest level of each row, at its 98th percentile
    columns: np.ndarray  # (W,)
    thumbnail: np.ndarray  # uint8 (32, 32)
    speed: float | None  # % of the long side per second, since the previous sample
    shift: tuple[float, float] | None  # of the whole picture, % of the long side
    text: float  # share of the picture under lines of text


class ShotMeter:
    """Measures a video while a scan decodes it, sampling `RATE` frames per second."""

    def __init__(self) -> None:
        self.looks: list[Look] = []
        self._grey: np.ndarray | None = None
        self._strokes = [Strokes(cv2.MORPH_TOPHAT), Strokes(cv2.MORPH_BLACKHAT)]  # bright text, dark text
        self._flow = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_ULTRAFAST)

    def due(self, time: float) -> bool:
        return not self.looks or time >= self.looks[-1].time + 1 / RATE - 1e-6

    def see(self, time: float, frame: np.ndarray) -> None:
        """Take a frame, uint8 (H, W, 3), with a long side of about `SIDE`."""
        grey = cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2GRAY)
        speed = shift = None
        before = self._grey if self._grey is not None and self._grey.shape == grey.shape else None
        if before is not None and min(grey.shape) >= 16:
            flow = self._flow.calc(before, grey, None) * (100 / max(grey.shape))  # (H, W, 2), % of the long side
            gap = max(time - self.looks[-1].time, 1e-3)
            speed = float(np.linalg.norm(flow, axis=-1).mean()) / gap
            shift = tuple(float(np.median(flow[..., i])) for i in (0, 1))
        self._grey = grey
        self.looks.append(
            Look(
                time,
                float(cv2.Laplacian(grey, cv2.CV_64F).var()),
                bool(np.percentile(grey, 95) < BLACK),
                np.percentile(grey, 98, axis=1),
                np.percentile(grey, 98, axis=0),
                cv2.resize(grey, (32, 32), interpolation=cv2.INTER_AREA),
                speed,
                shift,
                max(lines_of(strokes.standing(grey, before)) for strokes in self._strokes),
            )
        )

    def summary(self, start: float, end: float) -> dict[str, Any]:
        """The measurements of the time range [start, end)."""
        looks = [look for look in self.looks if start <= look.time < end] or [min(self.looks, key=lambda look: abs(look.time - start))]
        moving = [look for look in looks[1:] if look.speed is not None]
        measures: dict[str, Any] = {
            "sharpness": float(np.median([look.sharpness for look in looks])),
            "dark": float(np.mean([look.dark for look in looks])),
            "letterbox": _bars([look.rows for look in looks], [look.columns for look in looks]),
        }
        if len(looks) >= STANDS:
            measures["text"] = float(np.mean([look.text for look in looks[STANDS - 1 :]]))
        if moving:
            measures["motion"] = float(np.median([look.speed for look in moving]))
        if len(moving) > 2:
            measures["shake"] = float(np.diff([look.shift for look in moving], axis=0).std(0).max())
        measures = {name: round(value, 4) for name, value in measures.items()}
        return measures | {"hashes": [_hash(looks[int(part * len(looks))].thumbnail) for part in (1 / 6, 1 / 2, 5 / 6)]}


def distance(a: Sequence[str], b: Sequence[str]) -> int:
    """The largest number of bits, of 64, in which two clips' hashes of the same moment differ."""
    return max((int(x, 16) ^ int(y, 16)).bit_count() for x, y in zip(a, b, strict=True))


class Strokes:
    """Thin strokes that do not move: kind is OpenCV's top hat for bright ones, black hat for dark ones."""

    def __init__(self, kind: int) -> None:
        self.kind = kind
        self._age = np.zeros((), np.int32)  # (H, W) number of samples in which a pixel has been the same stroke

    def standing(self, grey: np.ndarray, before: np.ndarray | None) -> np.ndarray:
        """Where strokes have not moved for `STANDS` samples, bool (H, W). before: the previous sample, of the same size."""
        stroke = cv2.morphologyEx(grey, self.kind, np.ones((STROKE, STROKE), np.uint8)) >= CONTRAST
        if before is None:
            self._age = stroke.astype(np.int32)
        else:
            self._age = np.where(cv2.absdiff(grey, before) <= STEADY, self._age + 1, 1) * stroke
        return self._age >= STANDS


def lines_of(strokes: np.ndarray) -> float:
    """Share of a picture (H, W bool) in which many strokes begin side by side, in regions that are wider than high."""
    begins = np.zeros(strokes.shape, np.float32)
    begins[:, 1:] = strokes[:, 1:] & ~strokes[:, :-1]
    dense = cv2.boxFilter(begins, -1, WINDOW, borderType=cv2.BORDER_CONSTANT) >= STROKES
    regions = cv2.connectedComponentsWithStats(dense.astype(np.uint8))[2][1:]  # x, y, width, height, area of each
    return sum(int(area) for _, _, w, h, area in regions if w >= 2 * h and h >= 4 and area >= w * h / 2) / strokes.size


def _bars(rows: list[np.ndarray], columns: list[np.ndarray]) -> float:
    """The share of the picture outside the rows and columns that are bright at some time; 1 if none ever is."""
    kept = 1.0
    for levels in (rows, columns):
        lit = np.flatnonzero(np.max(levels, axis=0) >= BLACK)
        kept *= (lit[-1] - lit[0] + 1) / len(levels[0]) if len(lit) else 0.0
    return 1 - kept


def _hash(thumbnail: np.ndarray) -> str:
    """64 bits: which of the lowest 8x8 cosine coefficients are above their median. For a flat picture, its grey level."""
    coefficients = cv2.dct(thumbnail.astype(np.float32))[:8, :8].flatten()
    if np.abs(coefficients[1:]).max() < 1:
        return f"{round(float(thumbnail.mean())):016x}"
    bits = coefficients > np.median(coefficients)
    return f"{int(''.join('01'[int(bit)] for bit in bits), 2):016x}"
