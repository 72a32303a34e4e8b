"""Clips to the tensors of one shard of the latent cache."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kling.data.clips import ClipSample
from kling.data.transforms import to_tensor
from kling.vae import AutoencoderKLKling


def keyframe_times(clip: int | str, ends: list[int], seed: int) -> list[int]:
    """Pixel frames of a clip that are encoded alone: the last of every length, then one drawn inside the first and the last length."""
    rng = random.Random(f"keyframes/{seed}/{clip}")
    inner = [rng.randint(1, max(1, ends[i] - 2)) for i in (0, -1)] if ends else []
    return [T - 1 for T in ends] + inner


@torch.no_grad()
def encode_clips(
    vae: AutoencoderKLKling, clips: list[ClipSample], ids: list[Any], ends: list[int], seed: int
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """The tensors and rows of one shard. ids: of its clips, for the draws. ends: the lengths whose last frame training may append."""
    latents, lone, at, c2w, intrinsics, rows = [], [], [], [], [], []
    for name, clip in zip(ids, clips, strict=True):
        video = to_tensor(clip.video)[None].to(vae.device)  # (1, 3, T, H, W)
        times = keyframe_times(name, ends, seed)
        frames = video[:, :, times].transpose(0, 2)  # (K, 3, 1, H, W)
        latents.append(vae.normalize(vae.encode(video).latent_dist.mode())[0])  # (c, f, h, w)
        single = (
            vae.normalize(vae.encode(frames).latent_dist.mode())[:, :, 0] if times else latents[-1].new_zeros(0, *latents[-1][:, 0].shape)
        )
        lone.append(single)  # (K, c, h, w)
        at.append(torch.tensor(times, dtype=torch.long))
        camera, T = clip.trajectory, len(clip.video)
        c2w.append(camera.c2w if camera else torch.zeros(T, 3, 4))
        intrinsics.append(camera.intrinsics if camera else torch.zeros(T, 4))  # zero focal length: no camera known
        rows.append({"name": clip.name, "captions": clip.captions, "weights": clip.weights or [1.0] * len(clip.captions)})
    tensors = {
        "latents": torch.stack(latents).half(),
        "keyframes": torch.stack(lone).half(),
        "keyframe_times": torch.stack(at),
        "c2w": torch.stack(c2w),
        "intrinsics": torch.stack(intrinsics),
    }
    return {name: t.cpu().contiguous() for name, t in tensors.items()}, rows


@torch.no_grad()
def first_frames(vae: AutoencoderKLKling, clips: list[ClipSample], clip_tokens: Callable[[Tensor], Tensor] | None) -> dict[str, Tensor]:
    """What image-to-video weights are shown of each clip: its first frame before nothing but grey, encoded, `shown` (n, c, f, h, w); and
    what `clip_tokens` makes of the picture uint8 (H, W, 3), CLIP's tokens `seen` (n, i, e)."""
    shown = []
    for clip in clips:
        video = to_tensor(clip.video)[None].to(vae.device)  # (1, 3, T, H, W)
        video[:, :, 1:] = 0
        shown.append(vae.normalize(vae.encode(video).latent_dist.mode())[0])
    tensors = {"shown": torch.stack(shown)}
    if clip_tokens is not None:
        tensors["seen"] = torch.stack([clip_tokens(torch.as_tensor(clip.video[0])) for clip in clips])
    return {name: t.half().cpu() for name, t in tensors.items()}
