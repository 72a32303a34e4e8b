"""Converts a video's primaries to sRGB. swscale, which decodes, handles matrices, ranges and HDR, but does not convert primaries."""

from __future__ import annotations

from functools import cache

import numpy as np

BT2020, DISPLAY_P3 = 9, 12  # of the primaries of ITU-T H.273

# Linear light to linear light of BT.709, both with white D65. BT.2020: ITU-R BT.2087-0; P3: SMPTE EG 432-1 through XYZ.
TO_709 = {
    BT2020: ((1.6605, -0.5876, -0.0728), (-0.1246, 1.1329, -0.0083), (-0.0182, -0.1006, 1.1187)),
    DISPLAY_P3: ((1.2249, -0.2249, 0.0), (-0.0421, 1.0421, 0.0), (-0.0196, -0.0786, 1.0983)),
}
# Primaries that players show unchanged: BT.709, unspecified, and those of standard television, which are similar.
SHOWN_AS_THEY_ARE = (0, 1, 2, 5, 6, 7, 22)
OTHERS = {4: "BT.470 M", 8: "film", 10: "XYZ (SMPTE ST 428)", 11: "DCI-P3"}
HDR = {16: "PQ", 18: "HLG"}  # transfers of phones and films: mapped to BT.709 by swscale
STEPS = 4095  # entries of the table back to 8 bits: at least one for each level in the steepest part of the curve


def to_srgb(pixels: np.ndarray, primaries: int) -> np.ndarray:
    """uint8 (..., 3) with other primaries to sRGB: 3x3 in linear light; colours outside are clipped, as for pictures with a profile."""
    matrix = TO_709.get(primaries)
    if matrix is None:
        return pixels
    linear, levels = _tables()
    light = linear[pixels] @ np.asarray(matrix, np.float32).T
    return levels[(light.clip(0, 1) * STEPS + 0.5).astype(np.uint16)]


def remark(primaries: int, transfer: int) -> str:
    """A note on colours that are not read as intended; empty if there are none."""
    if transfer in HDR:
        return f"HDR ({HDR[transfer]}): its brightness is brought to the range of sRGB"
    if primaries in TO_709 or primaries in SHOWN_AS_THEY_ARE:
        return ""
    return f"of the primaries {OTHERS.get(primaries, f'number {primaries}')}: its colours are read as if they were BT.709's"


@cache
def _tables() -> tuple[np.ndarray, np.ndarray]:
    """sRGB's curve: level -> linear light (256,) float32, and linear light in `STEPS` -> level."""
    x = np.arange(256) / 255
    y = np.arange(STEPS + 1) / STEPS
    linear = np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)
    curve = np.where(y <= 0.0031308, 12.92 * y, 1.055 * y ** (1 / 2.4) - 0.055)
    return linear.astype(np.float32), (255 * curve + 0.5).astype(np.uint8)
