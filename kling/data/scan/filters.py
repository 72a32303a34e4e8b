"""Selects the clips worth training on, by thresholds on a scan's measurements. All are off by default; dropped clips are counted.

kling-data scan CATS --filters configs/data/filters.yaml --out manifest.jsonl
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from dataclasses import dataclass

from kling.data.manifest import Bad, Shot
from kling.data.scan.measure import distance
from kling.errors import UserError

BANDS = 8  # bytes of a hash: two hashes that differ in fewer bits than there are bytes have at least one byte in common


@dataclass
class Filters:
    """A clip is dropped at the first threshold that it violates. Units are those of `measure`; a picture has no duration and no motion.

    duplicate: two clips whose hashes differ in at most so many of 64 bits (at most 7) count as the same clip; the first one is kept.
    """

    min_seconds: float | None = None
    max_seconds: float | None = None
    min_side: int | None = None  # short side in pixels
    min_motion: float | None = None  # below: frozen
    max_motion: float | None = None
    max_shake: float | None = None
    min_sharpness: float | None = None  # below: blurred
    max_dark: float | None = None
    max_letterbox: float | None = None
    max_text: float | None = None  # text overlaid on the picture
    duplicate: int | None = None


# (reason, measured value, name of the threshold, +1 for a minimum and -1 for a maximum, applies to pictures)
RULES = (
    ("too short", lambda s: s.seconds, "min_seconds", 1, False),
    ("too long", lambda s: s.seconds, "max_seconds", -1, False),
    ("too small", lambda s: min(s.video.width, s.video.height), "min_side", 1, True),
    ("near black", lambda s: s.measures.get("dark"), "max_dark", -1, True),
    ("letterbox", lambda s: s.measures.get("letterbox"), "max_letterbox", -1, True),
    ("text overlay", lambda s: s.measures.get("text"), "max_text", -1, False),
    ("blurred", lambda s: s.measures.get("sharpness"), "min_sharpness", 1, True),
    ("frozen", lambda s: s.measures.get("motion"), "min_motion", 1, False),
    ("too fast", lambda s: s.measures.get("motion"), "max_motion", -1, False),
    ("shaken", lambda s: s.measures.get("shake"), "max_shake", -1, False),
)
DUPLICATE = "near-duplicate"


def sift(shots: list[Shot], filters: Filters) -> tuple[list[Shot], list[Bad]]:
    """(kept, dropped), both in the original order."""
    kept, dropped = [], []
    twins = _Twins(filters.duplicate)
    for shot in shots:
        reason, detail = broken_rule(shot, filters) or twins.of(shot) or ("", "")
        if reason:
            dropped.append(Bad(shot.path, reason, detail, shot.bytes, shot.mtime_ns, shot.start, dataclasses.asdict(shot)))
        else:
            kept.append(shot)
    return kept, dropped


def broken_rule(shot: Shot, filters: Filters) -> tuple[str, str] | None:
    """(reason, detail) of the first threshold that a clip violates."""
    for reason, measure, name, sign, pictures in RULES:
        limit, value = getattr(filters, name), measure(shot)
        if limit is not None and value is not None and (pictures or not shot.is_image) and sign * (value - limit) < 0:
            return reason, f"{value:.4g}, {name} is {limit:g}"
    return None


class _Twins:
    """The clips kept so far, indexed by each byte of their middle hash."""

    def __init__(self, bits: int | None) -> None:
        if bits is not None and not 0 <= bits < BANDS:
            raise UserError(f"duplicate {bits}: give 0 to {BANDS - 1} bits of 64")
        self.bits = bits
        self._bands: dict[tuple[int, str], list[Shot]] = defaultdict(list)

    def of(self, shot: Shot) -> tuple[str, str] | None:
        """(reason, detail) if the clip is near one that was kept; otherwise the clip is added."""
        if self.bits is None or "hashes" not in shot.measures:
            return None
        hashes = shot.measures["hashes"]
        bands = [(i, hashes[1][2 * i : 2 * i + 2]) for i in range(BANDS)]
        for other in {id(one): one for band in bands for one in self._bands[band]}.values():
            if other.is_image == shot.is_image and (apart := distance(hashes, other.measures["hashes"])) <= self.bits:
                return DUPLICATE, f"{apart} bits from {other.name}, duplicate is {self.bits}"
        for band in bands:
            self._bands[band].append(shot)
        return None
