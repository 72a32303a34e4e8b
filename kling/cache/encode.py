"""Encodes clips into the tensors of one shard of the latent cache."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kling.condition.tracks import Tracks
from kling.data.clips import ClipSample
from kling.data.transforms import to_batch
from kling.runtime.device import upload
from kling.vae import AutoencoderKLKling
from kling.vae.model import PIXELS_PER_PASS

TRACKS = 64  # of a clip at most
LASTING = 4  # frames that a track must be there
GPU_PASS = 16  # times as many pixels together on a GPU, which a small VAE would leave waiting for its next kernel


def keyframe_times(clip: int | str, ends: list[int], seed: int) -> list[int]:
    """Pixel frames of a clip that are encoded alone: the last of every length, then a random one inside the first and the last length."""
    rng = random.Random(f"keyframes/{seed}/{clip}")
    inner = [rng.randint(1, max(1, ends[i] - 2)) for i in (0, -1)] if ends else []
    return [T - 1 for T in ends] + inner


@torch.no_grad()
def encode_videos(vae: AutoencoderKLKling, video: Tensor, precision: str = "fp32", known: int | None = None) -> Tensor:
    """Videos of one shape, uint8 (n, T, H, W, 3) -> latents (n, c, f, h, w), normalised, fp32 on the CPU, as many per pass as fit.

    They are copied to the device as uint8. precision: fp32, or bf16 by autocast. known: number of first frames to encode; the rest is grey.
    """
    latents, device = [], vae.device
    pixels = PIXELS_PER_PASS * (GPU_PASS if device.type == "cuda" else 1)
    for part in video.split(max(1, pixels // video[0, ..., 0].numel())):
        x = to_batch(part.to(device))  # (b, 3, T, H, W)
        if known is not None:
            x[:, :, known:] = 0
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            mean = vae.encode(x).latent_dist.mode()  # (b, c, f, h, w)
        latents.append(vae.normalize(mean.float()))
    return torch.cat(latents).cpu()  # once for all: each copy waits for the device


def encode_clips(
    vae: AutoencoderKLKling, clips: list[ClipSample], ids: list[Any], ends: list[int], seed: int, precision: str = "fp32",
    tracked: bool = False, references: int = 0,
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:  # fmt: skip
    """The tensors and rows of one shard. ids: of its clips, for random draws. ends: the lengths whose last frame training may append.
    tracked: store tracks. references: places for encoded pictures of each clip's things; a row says how many it has."""
    video = together(clips)
    n, T, H, W, _ = video.shape
    times = torch.tensor([keyframe_times(name, ends, seed) for name in ids], dtype=torch.long)  # (n, K)
    latents = encode_videos(vae, video, precision)  # (n, c, f, h, w)
    lone = latents.new_zeros(n, 0, *latents[0, :, 0].shape)
    if times.numel():
        which = upload(torch.arange(n)[:, None] * T + times, video.device).flatten()  # (nK,)
        frames = video.flatten(0, 1)[which][:, None]  # (nK, 1, H, W, 3)
        lone = encode_videos(vae, frames, precision)[:, :, 0].unflatten(0, tuple(times.shape))  # (n, K, c, h, w)
    cameras = [clip.trajectory for clip in clips]
    tensors = {
        "latents": latents.half(),
        "keyframes": lone.half(),
        "keyframe_times": times,
        "c2w": torch.stack([camera.c2w if camera else torch.zeros(T, 3, 4) for camera in cameras]),
        # a focal length of 0 means: camera unknown
        "intrinsics": torch.stack([camera.intrinsics if camera else torch.zeros(T, 4) for camera in cameras]),
    }
    if tracked:
        tensors["tracks"] = torch.stack([packed_tracks(clip.tracks, T, name, seed) for clip, name in zip(clips, ids, strict=True)])
    rows = [{"name": c.name, "captions": c.captions, "weights": c.weights or [1.0] * len(c.captions)} for c in clips]
    rows = [row | ({"shots": clip.shots} if clip.shots else {}) for row, clip in zip(rows, clips, strict=True)]
    if references:
        tensors["references"] = encode_references(vae, clips, references, lone, precision).half()
        rows = [row | {"references": len(clip.references)} for row, clip in zip(rows, clips, strict=True)]
    return {name: t.contiguous() for name, t in tensors.items()}, rows


def encode_references(vae: AutoencoderKLKling, clips: list[ClipSample], places: int, like: Tensor, precision: str) -> Tensor:
    """Each picture encoded alone, (n, places, c, h, w); 0 where a clip has none. like: (n, ·, c, h, w)."""
    latents = like.new_zeros(len(clips), places, *like.shape[2:])
    where = [(i, k) for i, clip in enumerate(clips) for k in range(len(clip.references))]
    if where:
        pictures = torch.stack([torch.as_tensor(clips[i].references[k]) for i, k in where])[:, None]  # (m, 1, H, W, 3)
        latents[tuple(torch.tensor(where).T)] = encode_videos(vae, pictures, precision)[:, :, 0]
    return latents


def packed_tracks(tracks: Tracks | None, T: int, clip: int | str, seed: int) -> Tensor:
    """Up to `TRACKS` of a clip's tracks as (TRACKS, T, 3) fp16: x, y, and 1 where it is there. A random choice of those that last."""
    packed = torch.zeros(TRACKS, T, 3, dtype=torch.float16)
    if tracks is not None:
        lasting = (tracks.there.sum(1) >= min(T, LASTING)).nonzero().flatten().tolist()
        chosen = sorted(random.Random(f"tracks/{seed}/{clip}").sample(lasting, min(TRACKS, len(lasting))))
        packed[: len(chosen), :, :2] = tracks.points[chosen].clamp(-1, 2).half()
        packed[: len(chosen), :, 2] = tracks.there[chosen].half()
    return packed


def together(clips: list[ClipSample]) -> Tensor:
    """The videos of clips of one shape, uint8 (n, T, H, W, 3)."""
    return torch.stack([torch.as_tensor(clip.video) for clip in clips])


@torch.no_grad()
def first_frames(
    vae: AutoencoderKLKling, clips: list[ClipSample], clip_tokens: Callable[[Tensor], Tensor] | None, precision: str = "fp32"
) -> dict[str, Tensor]:
    """The inputs of image-to-video weights for each clip: `shown` (n, c, f, h, w), the encoding of its first frame followed by grey frames,
    and `seen` (n, i, e), CLIP's tokens of that frame, from `clip_tokens` (which takes a picture uint8 (H, W, 3))."""
    tensors = {"shown": encode_videos(vae, together(clips), precision, known=1)}
    if clip_tokens is not None:
        tensors["seen"] = torch.stack([clip_tokens(torch.as_tensor(clip.video[0]).cpu()) for clip in clips])
    return {name: t.half().cpu().contiguous() for name, t in tensors.items()}
