"""Splits clips and latents into the chunks of a stream.

A stream starts with 1 + 4j frames (1 + j latents) and continues with any multiple of 4 (any number of latents). `StreamState` is what is
kept between two chunks; pass the same one to every call of a stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from kling.errors import UserError
from kling.nn.conv import StreamState
from kling.shapes import TEMPORAL, latent_frames, pixel_frames

__all__ = ["StreamState", "chunk_latents", "in_chunks", "split_latents", "split_video"]


def chunk_latents(T: int, started: bool) -> int:
    """Latent frames from a chunk of T pixel frames. Raises `UserError` if it does not end with a latent frame's last pixel frame."""
    if not started:
        return latent_frames(T)
    if T % TEMPORAL or T == 0:
        near = max(TEMPORAL, TEMPORAL * round(T / TEMPORAL))
        raise UserError(f"a stream cannot go on with {T} frames (chunks after the first have a multiple of {TEMPORAL}): use {near}")
    return T // TEMPORAL


def split_latents(latents: Tensor, hop: int) -> Iterator[Tensor]:
    """Chunks of `hop` latent frames, the last one shorter: (b, c, f, h, w) -> (b, c, <=hop, h, w) each."""
    for start in range(0, latents.shape[2], hop):
        yield latents[:, :, start : start + hop]


def split_video(video: Tensor, hop: int, started: bool = False) -> Iterator[Tensor]:
    """Chunks of `hop` latent frames' worth of pixel frames, the last one shorter: (b, 3, T, H, W) -> (b, 3, t, H, W) each.

    Raises `UserError` if T is no legal count for the start of a stream or, if `started`, for its continuation.
    """
    chunk_latents(video.shape[2], started)
    head = 0 if started else pixel_frames(hop)
    if head:
        yield video[:, :, :head]
    if video.shape[2] > head:
        yield from video[:, :, head:].split(TEMPORAL * hop, dim=2)


def in_chunks(half: Callable[[Tensor, StreamState | None], Tensor], chunks: Iterable[Tensor], state: StreamState | None) -> Tensor:
    """Run one half of the VAE over the chunks and join its outputs in time. Without a state, the chunks are a whole stream."""
    chunks = list(chunks)
    if len(chunks) == 1:
        return half(chunks[0], state)
    state = state or StreamState()
    return torch.cat([half(chunk, state) for chunk in chunks], dim=2)
