"""The clips that a policy is aligned on: rounds of groups, each group several clips of one request with their rewards.

    out/rollouts/ROUND-PLACE/GROUP.safetensors      latents (k, c, F, h, w) fp32, terms (k, ·) of the rewards, speed (k,), diversity ()

A round's clips are all made before its first update, by one policy, and stay on the disk until no checkpoint needs them: a run that goes on
in the middle of a round finds the very clips that it had. PLACE counts batches and never repeats, so a rollback makes new clips.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Dataset

from kling.cameras.trajectory import Cameras
from kling.dit import KlingTransformer3DModel
from kling.errors import UserError
from kling.metrics.pixel import diversity
from kling.rewards.pixels import speed
from kling.rewards.reward import Judge
from kling.runtime.checkpoint import step_of
from kling.runtime.files import written
from kling.runtime.random import derive_seed, permutation
from kling.sampling.batches import Asked
from kling.sampling.inputs import read_clip
from kling.sampling.pipeline import KlingPipeline, ray_grid
from kling.sampling.request import Request
from kling.sampling.rows import request_rows
from kling.training.examples import Example

ROLLOUTS = "rollouts"
Asking = Callable[[int], tuple[dict[str, Any], Any]]  # index -> fields of a request, and its truth or None


class Group(NamedTuple):
    """Clips of one request: latents (k, c, F, h, w), and rewards (k,)."""

    asked: Asked
    latents: Tensor
    rewards: Tensor


class Places(Dataset):
    """Batches of a run whose clips are made while it runs: only their places are known beforehand."""

    def __getitem__(self, place: int) -> int:
        return place

    def names(self, place: int) -> list[str]:
        return [f"place {place}"]


class RequestFile:
    """Requests from a jsonl file, cyclically: each line the fields of a `Request`, and for pairs also `win` and `lose`, paths of videos
    relative to the file. held: how many of the first lines are kept for checks."""

    def __init__(self, path: str | Path, held: int = 0, heldout: bool = False, pairs: bool = False) -> None:
        self.path = Path(path)
        rows = [self._checked(number, row, pairs) for number, row in request_rows(self.path)]
        self.rows = rows[:held] if heldout else rows[held:]
        if not self.rows:
            raise UserError(
                f"requests {path} has {len(rows)} lines, and {held} are held out for checks: give more lines, or set checks lower"
            )

    def _checked(self, number: int, row: dict[str, Any], pairs: bool) -> dict[str, Any]:
        for key in ("win", "lose") if pairs else ():
            if not isinstance(row.get(key), str) or not os.path.isfile(row[key]):
                raise UserError(f"{self.path} line {number}: {key} {row.get(key)!r:.200} is no file: give the path of a video")
        asked = {key: value for key, value in row.items() if key not in ("win", "lose")}
        try:
            Request(**asked)
        except UserError as error:
            raise UserError(f"{self.path} line {number}: {error}") from None
        return row if pairs else asked

    def __call__(self, index: int) -> tuple[dict[str, Any], None]:
        return dict(self.rows[index % len(self.rows)]), None


def make_group(
    pipe: KlingPipeline, asked: Asked, request: Request, truth: Any, judge: Judge, seeds: list[int]
) -> tuple[dict[str, Tensor], Tensor]:
    """Clips of one request, as they are stored, and as pixels (k, T, H, W, 3) uint8."""
    latents = pipe.sample_group(asked, seeds)
    videos = pipe.decode(latents)
    stored = {
        "latents": latents.float().cpu().contiguous(),
        "terms": judge(videos, [request] * len(seeds), [truth] * len(seeds)),
        "speed": torch.tensor([speed(video) for video in videos]),
        "diversity": torch.tensor(diversity(videos)),
    }
    return stored, videos


def read_pair(pipe: KlingPipeline, asked: Asked, fields: Mapping[str, Any]) -> dict[str, Tensor]:
    """A given pair of clips, encoded as a group of two: the better one has the reward 1."""
    plan = asked.plan
    clips = [read_clip(fields[key], plan.fps, plan.hops[0].frames, (plan.height, plan.width)) for key in ("win", "lose")]
    latents = torch.cat([pipe.encode(clip) for clip in clips]).contiguous()
    speeds = torch.tensor([speed(clip) for clip in clips])
    return {
        "latents": latents,
        "terms": torch.tensor([[1.0], [0.0]]),
        "speed": speeds,
        "diversity": torch.tensor(diversity(torch.stack(clips))),
    }


def cached(path: Path, make: Callable[[], dict[str, Tensor]], again: bool = False) -> dict[str, Tensor]:
    """The tensors of a file, made if it does not exist yet, or `again`. Raises `UserError` if it is damaged."""
    if again or not path.is_file():
        made = make()
        with written(path) as temporary:
            save_file(made, temporary)
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}): delete it, and its clips are made again") from None


def round_folder(out: Path, number: int, place: int, begins: bool) -> Path:
    """The folder of a round. place: batches used so far. begins: this is its first update; else it is the newest of that number."""
    folder = out / ROLLOUTS / f"{number:06d}-{place:08d}"
    found = sorted((out / ROLLOUTS).glob(f"{number:06d}-*"))
    return folder if begins or not found else found[-1]


def start_of(folder: Path) -> int:
    """The place at which a round begins."""
    return int(folder.name.split("-")[1])


def forget(out: Path, updates: int) -> None:
    """Delete the rounds before the one of the oldest checkpoint. updates: of a round."""
    steps = [step_of(path) for path in out.glob("step-*") if path.name.removeprefix("step-").isdigit()]
    for folder in (out / ROLLOUTS).glob("*-*"):
        if steps and int(folder.name.split("-")[0]) < min(steps) // updates:
            shutil.rmtree(folder, ignore_errors=True)


def chunk(groups: list[Group], size: int, seed: int, number: int, turn: int, pairs: bool) -> tuple[Group, list[int]]:
    """The clips of micro-step `turn` of round `number`: a group, and the indices of `size` of its clips. All clips are used once, in random
    order, before one is used again. pairs: instead the best and the worst, the second best and the second worst, …"""
    parts = 1 if pairs else len(groups[0].rewards) // size
    epoch, place = divmod(turn, parts * len(groups))
    which, part = divmod(permutation(parts * len(groups), seed, "order", number, epoch)[place], parts)
    group = groups[which]
    if pairs:
        best = group.rewards.argsort(descending=True, stable=True).tolist()
        return group, [i for j in range(size // 2) for i in (best[j], best[-1 - j])]
    order = permutation(len(group.rewards), seed, "clips", number, epoch, which)
    return group, order[part * size : (part + 1) * size]


def seeds_of(seed: int, index: int, count: int) -> list[int]:
    """The seeds of the clips of request number `index`."""
    return [derive_seed(seed, "rollout", index, i) for i in range(count)]


def example_of(asked: Asked, latents: Tensor, transformer: KlingTransformer3DModel, pipe: KlingPipeline) -> tuple[Example, Tensor]:
    """Clips (b, c, F, h, w) of one request as training takes them, and its text (b, l, e), all on its device."""
    b, signals, plan = len(latents), asked.signals.repeated(len(latents)), asked.plan
    state = asked.state.repeated(b)
    clean = torch.cat([latents.to(state.clean), state.clean[:, :, state.frames :]], dim=2)  # (b, c, G, h, w), appended frames as given
    maps = state.tracks  # every process uses every parameter in every step, also where nothing has tracks or a camera
    if maps is None and (c := transformer.config.track_channels):
        maps = clean.new_zeros(b, c, *clean.shape[2:])
    runs, state = state._runs, replace(state, clean=clean, tracks=maps)
    state.__dict__["_runs"] = runs
    cameras = signals.camera
    if cameras is None and transformer.config.camera_channels:
        T, device = plan.hops[0].frames, clean.device
        still = torch.eye(3, 4, device=device).expand(b, T, 3, 4), torch.tensor([1.0, 1.0, 0.5, 0.5], device=device).expand(b, T, 4)
        lone = torch.zeros(b, state.position.shape[1] - state.frames, dtype=torch.long, device=device)
        cameras = Cameras(*still, ray_grid(transformer, pipe.vae, plan.height, plan.width), lone)
    shown = torch.full((b,), signals.camera is not None, device=clean.device) if signals.camera_mask is None else signals.camera_mask
    example = Example(state, [], cameras if transformer.config.camera_channels else None, shown, signals.concat, signals.image)
    return example, signals.text["prompt"].float()


def falls(checks: list[float], times: int = 3) -> bool:
    """Whether the last `times` checks are each lower than the one before, and all lower than the first of all."""
    last = checks[-times - 1 :]
    return len(last) > times and all(b < a for a, b in zip(last, last[1:], strict=False)) and max(last[1:]) < checks[0]
