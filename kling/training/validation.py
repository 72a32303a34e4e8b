"""Validation of a transformer on held-out clips: a loss at fixed levels, and a video of every task."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kling.cache.store import LatentBatch
from kling.condition.state import Given, build_state
from kling.condition.tasks import TASKS
from kling.data.clips import ClipSample
from kling.data.image import write_png
from kling.data.source import ClipSource, DataConfig
from kling.data.strip import strip
from kling.data.transforms import to_tensor
from kling.errors import UserError
from kling.flow.levels import density_ppf, truncate_density
from kling.flow.losses import flow_loss
from kling.flow.path import velocity
from kling.runtime.device import upload
from kling.runtime.parallel import Layout
from kling.runtime.random import noise_like
from kling.sampling.pipeline import KlingPipeline
from kling.sampling.request import Request
from kling.training.examples import Example, as_extra_channels, batch_cameras
from kling.training.model import Trained
from kling.vae import AutoencoderKLKling


@dataclass
class Validation:
    """The loss on held-out clips, every `every` updates (0: never): the same clips, noise and levels each time.

    every: updates between measurements, 0 is never. clips: how many.
    source: a folder of held-out videos; empty for the held-out scenes of the small world. quantiles: levels, as quantiles of the
    training density, so that each represents an equal share of training.
    """

    every: int = 0
    clips: int = 8
    source: str = ""
    quantiles: int = 4


def held_out(cfg: Validation, data: DataConfig, frames: int) -> list[ClipSample]:
    """`cfg.clips` clips of `frames` pixel frames that are not used for training, over the aspects of the training data `data`.

    Raises `UserError` if the data is a folder or a manifest without held-out clips, and `source` is empty.
    """
    if data.source != "world" and not cfg.source and not data.holdout:
        raise UserError("nothing is held out: set validation.source to videos that are not trained on, or keep some with data.holdout")
    source = ClipSource(replace(data, source=cfg.source or data.source), split="heldout")
    return [source.clip(i, frames, data.aspects[i % len(data.aspects)]) for i in range(cfg.clips)]


@torch.no_grad()
def encode(clips: list[ClipSample], vae: AutoencoderKLKling) -> list[LatentBatch]:
    """The same clips as input of the transformer, one per batch."""
    batches = []
    for i, clip in enumerate(clips):
        z = vae.normalize(vae.encode(to_tensor(clip.video)[None].to(vae.device)).latent_dist.mode()).cpu()  # (1, c, f, h, w)
        batches.append(LatentBatch([i], z, z[:, None, :, 0], torch.zeros(1, 1), [clip.captions], [[1.0]], [clip.trajectory]))
    return batches


def level_quantiles(count: int, density: str, shift: float, within: tuple[float, float] = (0.0, 1.0)) -> Tensor:
    """(count,) levels in the middle of equal shares of the training density: its quantiles (i + ½) / count."""
    return truncate_density(density_ppf((torch.arange(count) + 0.5) / count, density, shift), within, density, shift)


@torch.no_grad()
def validation_loss(
    run: Callable[[Example, Tensor, Tensor], Tensor],
    clips: list[LatentBatch],
    levels: Tensor,
    layout: Layout,
    model: Trained,
    vae: AutoencoderKLKling,
    device: torch.device,
) -> Tensor:
    """Sum of the losses at each level and the number of clips, (2, levels), for the clips of this process.

    run(example, level, noise) -> velocity. All processes make the same number of passes, as sharded weights require.
    """
    sums, config = torch.zeros(2, len(levels), device=device), model.transformer.config
    for i in range(-(-len(clips) // layout.ranks)):
        mine = i * layout.ranks + layout.rank
        batch = clips[mine % len(clips)]
        given = [Given()]
        state = build_state(given, batch.latents, None, tuple(config.patch_size))
        has_camera = torch.tensor([batch.cameras[0] is not None])
        example = Example(state, [batch.captions[0][0]], batch_cameras(batch, given, config, vae.spatial_factor), has_camera)
        example = as_extra_channels(example, batch, given, config).to(device)
        for q, level in enumerate(levels):
            noise = noise_like(example.state.clean, 0, "validation", q, batch.ids)
            v = run(example, upload(level[None], device), noise)  # (1, c, f, h, w)
            loss = flow_loss(v, velocity(example.state.clean, noise), example.state.mask)  # (1,)
            sums[:, q] += torch.stack([loss[0], torch.ones_like(loss[0])]) * (mine < len(clips))
    return sums


def task_requests(clip: ClipSample, tasks: Iterable[str]) -> list[Request]:
    """One request per task, as a user would make it with the clip's caption and the frames that the task gives."""
    T, H, W, _ = clip.video.shape
    video = torch.as_tensor(clip.video).numpy()
    return [
        Request(**{"prompt": clip.captions[0], "size": f"{W}x{H}", "num_frames": T, **TASKS[task][2](video)})  # type: ignore[arg-type]
        for task in tasks
    ]


def sample_requests(rows: list[dict[str, Any]]) -> list[Request]:
    """The requests of a config's `samples:`. Raises `UserError` with the number of the one that is none."""
    asked = []
    for number, row in enumerate(rows, 1):
        try:
            asked.append(Request(**{str(name): value for name, value in row.items()}))
        except UserError as error:
            raise UserError(f"samples, entry {number}: {error}") from None
    return asked


def check_samples(pipe: KlingPipeline, requests: list[Request]) -> None:
    """Raises `UserError` with the number of the first one that the model cannot make: before a training, not hours into it."""
    for number, request in enumerate(requests, 1):
        try:
            pipe.plan(request)
        except UserError as error:
            raise UserError(f"sample {number} of {len(requests)}: {error}") from None


def draw_samples(pipe: KlingPipeline, requests: list[Request], picture: Path | None) -> None:
    """Run every request, and write a picture with a row of six frames for each. picture: None on a process that only takes part."""
    rows = []
    pipe.transformer.eval()
    for request in requests:
        rows.append(pipe(request).frames[0])  # (T, H, W, 3)
    pipe.transformer.train()
    if picture is not None:
        picture.parent.mkdir(parents=True, exist_ok=True)
        write_png(picture, strip(rows, gap=0).numpy())
