"""Decides whether a checkpoint may be sampled in bfloat16, by the difference between the same clips in float32 and bfloat16.

Noise and solver stay in float32, so only rounding differs, but many sampling steps can amplify it. So it is measured once per checkpoint,
when it is exported, and stored in its `model_index.json` as `sampling_dtype`; at run time only speed is measured.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from kling.data.world.scene import World
from kling.errors import UserError
from kling.runtime.files import write_atomic
from kling.sampling.pipeline import KlingPipeline
from kling.sampling.request import Request

CLIPS = 8
MIN_DB = 45.0  # PSNR from the mean squared error over all clips


def requests(pipe: KlingPipeline, clips: int = CLIPS) -> Iterator[Request]:
    """Prompts for scenes of the small world in both languages; every other one with its camera, if the model takes one."""
    world = World(0, pipe.config.max_frames, "16:9", split="heldout")
    for k in range(clips):
        scene = world.scene(k)
        camera = scene.axes if k % 2 and scene.axes and "camera" in pipe.config.capabilities else None
        yield Request(world.captions(scene)["en" if k % 4 < 2 else "zh"][0], camera=camera, num_frames=pipe.config.max_frames, seed=k)


def agreement(folder: str | Path, clips: int = CLIPS) -> Iterator[float]:
    """Mean squared error of each clip in bfloat16 against float32, relative to the full range (1 is black against white).

    If the folder has few-step weights for mode fast, of the worse mode.
    """
    exact, half = (KlingPipeline.from_pretrained(folder, torch_dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    if "text" not in exact.config.capabilities:
        raise UserError(f"model {folder} cannot make a video from text alone, which the precision check needs: leave that check out")
    for request in requests(exact, clips):
        apart = []
        for mode in ("std",) if exact.transformer_fast is None else ("std", "fast"):
            a, b = (pipe(request.replace(mode=mode)).frames.astype(np.float64) / 255 for pipe in (exact, half))
            apart.append(float(np.square(a - b).mean()))
        yield max(apart)


def psnr(errors: list[float]) -> float:
    """In dB, from the mean of the squared errors, so that a bad clip counts fully."""
    return -10 * math.log10(max(sum(errors) / len(errors), 1e-12))


def write_sampling_dtype(folder: str | Path, decibels: float) -> bool:
    """Write `sampling_dtype: bf16` into a model folder of ours if `decibels` reaches `MIN_DB`, else remove it. Returns which."""
    path = Path(folder) / "model_index.json"
    index = json.loads(path.read_text(encoding="utf-8"))
    index.pop("sampling_dtype", None)
    if decibels >= MIN_DB:
        index["sampling_dtype"] = "bf16"
    write_atomic(path, json.dumps(index, indent=2, sort_keys=True) + "\n")
    return decibels >= MIN_DB
