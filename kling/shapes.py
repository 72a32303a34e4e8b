"""The letters of the shapes, and all arithmetic between pixels, latents and tokens: no other file writes these factors as literals.

    video    (b, 3, T, H, W) in [-1, 1]     T = 1 + 4k
    latents  (b, c, f, h, w)                f = 1 + k
    tokens   (b, n, d)                      n = f * h/ph * w/pw
    text     (b, l, e)

Pixel frame 0 is latent frame 0 on its own; pixel frames 4j-3 … 4j are latent frame j >= 1.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from kling.errors import UserError, unknown

TEMPORAL = 4  # pixel frames in each latent frame after the first; every published Wan VAE and ours

# (H, W) of the small world. Larger models multiply these or state their own sizes in their config.
ASPECTS: dict[str, tuple[int, int]] = {"16:9": (64, 112), "9:16": (112, 64), "1:1": (80, 80)}


def legal_frames(T: int) -> bool:
    """True if `T` pixel frames encode without remainder: T = 1 + 4k."""
    return T >= 1 and (T - 1) % TEMPORAL == 0


def nearest_frames(T: int) -> tuple[int, int]:
    """The legal frame counts at or below and at or above `T`."""
    below = 1 + TEMPORAL * max(0, (T - 1) // TEMPORAL)
    return below, below if below == T else below + TEMPORAL


def latent_frames(T: int) -> int:
    """f = 1 + (T - 1) / 4. Raises `UserError` with the nearest legal counts if T is not 1 + 4k."""
    if not legal_frames(T):
        below, above = nearest_frames(T)
        raise UserError(f"{T} frames cannot be encoded (a clip has 1 + 4k frames): use {below} or {above}")
    return 1 + (T - 1) // TEMPORAL


def pixel_frames(f: int) -> int:
    """T = 1 + 4 (f - 1)."""
    return 1 + TEMPORAL * (f - 1)


def latent_of_frame(t: int) -> int:
    """The latent frame that holds pixel frame t."""
    return (t + TEMPORAL - 1) // TEMPORAL


def first_frame(j: int) -> int:
    """The first pixel frame of latent frame j."""
    return 0 if j == 0 else TEMPORAL * j - TEMPORAL + 1


def frame_position(t: int) -> float:
    """Temporal RoPE position, in latent frames, of a single pixel frame t: the centre of latent j >= 1 lies at pixel 4j - 1.5.

    Latent 0 holds pixel frame 0 alone, so frame 0 sits at 0 exactly.
    """
    return 0.0 if t == 0 else (t + 1.5) / TEMPORAL


def check_lengths(frames: Sequence[int]) -> None:
    """Raises `UserError` unless these are lengths of clips in pixel frames, and at least one."""
    if not frames:
        raise UserError("frames is empty: give at least one length, such as [17]")
    for T in frames:
        latent_frames(T)


def position_frame(p: float) -> int:
    """The pixel frame whose `frame_position` is p."""
    return 0 if p == 0 else round(TEMPORAL * p - 1.5)


def clip_frames(seconds: float, fps: float) -> int:
    """Frames of a clip of about `seconds`: 1 + the multiple of 4 nearest to seconds * fps (5 s at 8 fps = 41)."""
    if seconds <= 0:
        raise UserError(f"duration {seconds} s: give a positive number of seconds")
    return 1 + TEMPORAL * max(0, round(seconds * fps / TEMPORAL))


def latent_size(H: int, W: int, spatial: int, patch: int = 1) -> tuple[int, int]:
    """(h, w) of the latents of an (H, W) frame. Raises `UserError` unless the size divides into latents and whole patches."""
    unit = spatial * patch
    if H % unit or W % unit or H <= 0 or W <= 0:
        near = tuple(max(unit, round(x / unit) * unit) for x in (H, W))
        raise UserError(f"size {W}x{H} does not divide into patches of {unit} pixels: use {near[1]}x{near[0]}")
    return H // spatial, W // spatial


def token_grid(f: int, h: int, w: int, patch: tuple[int, int, int]) -> tuple[int, int, int]:
    """Tokens along time, height and width for latents (f, h, w)."""
    return f // patch[0], h // patch[1], w // patch[2]


def aspect_size(aspect: str, scale: int = 1, sizes: dict[str, tuple[int, int]] = ASPECTS) -> tuple[int, int]:
    """(H, W) of a named aspect, times an integer scale. Raises `UserError` for an unknown name."""
    if aspect not in sizes:
        raise unknown("aspect", aspect, sizes)
    H, W = sizes[aspect]
    return H * scale, W * scale


def parse_size(text: str) -> tuple[int, int]:
    """`832x480` (width x height) -> (H, W) = (480, 832). Raises `UserError` if it reads otherwise."""
    if not (found := re.fullmatch(r"(\d+)x(\d+)", text)) or not int(found[1]) or not int(found[2]):
        raise UserError(f"size '{text}': write it as WIDTHxHEIGHT, such as 832x480")
    return int(found[2]), int(found[1])


def nearest_aspect(H: int, W: int) -> str:
    """The named aspect whose ratio is closest to W / H (in log ratio)."""
    import math

    return min(ASPECTS, key=lambda a: abs(math.log((ASPECTS[a][1] / ASPECTS[a][0]) / (W / H))))
