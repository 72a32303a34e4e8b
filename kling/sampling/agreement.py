"""Whether a checkpoint may be sampled in bfloat16: the same clips in both types, and how far apart they come out.

Noise and solver stay in float32, so only roundings differ, but a walk of many steps may grow them. So it is measured once per checkpoint,
where it is exported, and written into its `model_index.json` as `sampling_dtype`; at run time only speed is measured.
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
MIN_DB = 45.0  # PSNR of the mean squared error over all clips


def requests(pipe: KlingPipeline, clips: int = CLIPS) -> Iterator[Request]:
    """Scenes of the small world in words, in both languages; every other one with its camera, where the model takes one."""
    world = World(0, pipe.config.max_frames, "16:9", split="heldout")
    for k in range(clips):
        scene = world.scene(k)
        camera = scene.axes if k % 2 and scene.axes and "camera" in pipe.config.capabilities else None
        yield Request(world.captions(scene)["en" if k % 4 < 2 else "zh"][0], camera=camera, num_frames=pipe.config.max_frames, seed=k)


def agreement(folder: str | Path, clips: int = CLIPS) -> Iterator[float]:
    """Mean squared error of each clip in bfloat16 against float32, in units of the whole range (1 is black against white)."""
    exact, fast = (KlingPipeline.from_pretrained(folder, torch_dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    if "text" not in exact.config.capabilities:
        raise UserError(f"model {folder} makes no video from words alone, which its precision is measured with: leave that out")
    for request in requests(exact, clips):
        a, b = (pipe(request).frames.astype(np.float64) / 255 for pipe in (exact, fast))
        yield float(np.square(a - b).mean())


def psnr(errors: list[float]) -> float:
    """In dB, of the mean of squared errors: a bad clip counts for what it is."""
    return -10 * math.log10(max(sum(errors) / len(errors), 1e-12))


def write_sampling_dtype(folder: str | Path, decibels: float) -> bool:
    """Write `sampling_dtype: bf16` into a model folder of ours if they reach `MIN_DB`, else take it out. Returns which."""
    path = Path(folder) / "model_index.json"
    index = json.loads(path.read_text(encoding="utf-8"))
    index.pop("sampling_dtype", None)
    if decibels >= MIN_DB:
        index["sampling_dtype"] = "bf16"
    write_atomic(path, json.dumps(index, indent=2, sort_keys=True) + "\n")
    return decibels >= MIN_DB
