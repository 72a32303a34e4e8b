"""The clips that a policy is aligned on: rounds of groups, each group several clips of one request with their rewards.

    out/rollouts/ROUND-PLACE/GROUP.safetensors      latents (k, c, F, h, w) fp32, terms (k, ·) of the rewards, speed (k or 2,), diversity ()

A round's clips are all made before its first update, by one policy, and stay on the disk until no checkpoint needs them: a run that goes on
in the middle of a round finds the very clips that it had. PLACE counts batches and never repeats, and seeds follow from it: where a
rollback goes to an earlier round, that gets new clips; within a round the clips stay, with other noise. rollouts/run.txt tells which run
they are of: settings and first weights.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Dataset

from kling.cameras.trajectory import Cameras
from kling.config import flatten
from kling.dit import KlingTransformer3DModel
from kling.errors import UserError
from kling.metrics.pixel import diversity
from kling.rewards.pixels import speed, speed_of
from kling.rewards.reward import Judge
from kling.runtime.checkpoint import MAY_CHANGE, step_of
from kling.runtime.device import upload
from kling.runtime.files import ends_hash, write_atomic, written
from kling.runtime.random import derive_seed, permutation
from kling.sampling.batches import Asked
from kling.sampling.inputs import read_clip
from kling.sampling.pipeline import KlingPipeline, ray_grid
from kling.sampling.plan import Plan
from kling.sampling.request import Request
from kling.sampling.rows import request_rows
from kling.training.examples import Example

ROLLOUTS = "rollouts"
SLIPPED, FALLEN = 0.85, 0.75  # of its first check: below them, a checker says that the policy got worse, three times or twice
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
    """Clips of one request, as they are stored, and as pixels (k, T, H, W, 3) uint8. Their speeds are those of two clips where no term
    has measured it: its optical flow takes as long as a third of a clip."""
    latents = pipe.sample_group(asked, seeds)
    videos = pipe.decode(latents, asked.plan.hops[0].cuts)
    terms = judge(videos, [request] * len(seeds), [truth] * len(seeds))
    known = "magnitude" in judge.terms
    stored = {
        "latents": latents.float().cpu().contiguous(),
        "terms": terms,
        "speed": speed_of(terms[:, judge.terms.index("magnitude")]) if known else torch.tensor([speed(video) for video in videos[:2]]),
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


def forget(out: Path, updates: int, keep_last: int) -> None:
    """Delete the rounds before the one of the oldest checkpoint that a run may go back to. updates: of a round. keep_last: as in `Saver`;
    older checkpoints are kept to look at."""
    steps = sorted(step_of(path) for path in out.glob("step-*") if path.name.removeprefix("step-").isdigit())
    for folder in (out / ROLLOUTS).glob("*-*"):
        if steps and int(folder.name.split("-")[0]) < steps[-keep_last:][0] // updates:
            shutil.rmtree(folder, ignore_errors=True)


def belong(out: Path, config: dict[str, Any], named: Sequence[Path]) -> None:
    """Delete clips that another run left in the folder: with other settings, or with other contents of the files and folders that they
    name, such as the first weights, a reward model or the requests."""
    settings = {key: value for key, value in flatten(config).items() if key.split(".")[0] not in MAY_CHANGE}
    files = [path for top in named for path in (top, *sorted(top.rglob("*"))) if path.is_file()]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode() + ends_hash(files)).hexdigest()
    mark = out / ROLLOUTS / "run.txt"
    if not mark.is_file() or mark.read_text(encoding="utf-8") != digest:
        shutil.rmtree(mark.parent, ignore_errors=True)
        with written(mark) as temporary:
            temporary.write_text(digest, encoding="utf-8")


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


def seeds_of(seed: int, index: int, count: int, place: int = 0) -> list[int]:
    """The seeds of the clips of request number `index` in the round that begins at `place`."""
    return [derive_seed(seed, "rollout", place, index, i) for i in range(count)]


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


def left_out(
    example: Example, words: Tensor, asked: Asked, share: float, g: torch.Generator, pairs: list[int]
) -> tuple[Example, Tensor, Tensor]:
    """The clips of `example_of` of which a share has no text, camera, tracks or references, where guidance of the roll-outs leaves these
    out: the network answers them too, and nothing that it learns from rewards tells it how. pairs: clips of the same number are treated
    alike.

    Returns the example, its text, and (b,) True for these clips. Without guidance there are none.
    """
    device, plan, signals, state = words.device, asked.plan, asked.signals, example.state
    guided = {
        "text": "negative" in signals.text,
        "camera": signals.camera is not None and plan.camera_guidance_scale != 1,
        "tracks": asked.state.tracks is not None and plan.brush_guidance_scale != 1,
        "references": state.references > 0 and plan.reference_guidance_scale != 1,
    }
    names = [name for name, there in guided.items() if there]
    draw = (torch.rand(len(pairs), generator=g)[pairs] / share * len(names)).long()  # a place in `names`, or beyond: nothing is left out
    which = {name: upload(draw == i, device) for i, name in enumerate(names)}
    if "text" in which:
        several = words.view(len(pairs), -1, *words.shape[1:])  # (b, S, l, e)
        words = torch.where(which["text"].view(-1, 1, 1, 1), signals.text["negative"].to(words), several).flatten(0, 1)
    if "camera" in which:
        shown = example.has_camera  # (b,) or (b, G)
        example = replace(example, has_camera=shown & ~which["camera"].view(-1, *[1] * (shown.ndim - 1)))
    if "tracks" in which:
        state = replace(state, tracks=state.tracks.masked_fill(which["tracks"].view(-1, 1, 1, 1, 1), 0))
    if "references" in which:
        blank = state.without_references(state.clean)
        state = replace(state, clean=torch.where(which["references"].view(-1, 1, 1, 1, 1), blank, state.clean))
    return replace(example, state=state), words, upload(draw < len(names), device)


def check_even(pipe: KlingPipeline, requests: Sequence[Request], ranks: int) -> None:
    """Raises `UserError` if requests that `ranks` processes answer at once, in order, need different numbers of passes: of sharded weights
    every process needs every pass of every other."""
    for first in range(0, len(requests), ranks):
        beside = requests[first : first + ranks]
        one, *others = (_passes(request, pipe.plan(request)) for request in beside)
        for request, other in zip(beside[1:], others, strict=True):
            if other != one:
                raise UserError(
                    f"'{beside[0].prompt[:40]}' and '{request.prompt[:40]}' are sampled at once, with different steps or guidance, which "
                    "sharded weights cannot: give all requests the same (of the small world, asks of one kind), guidance scales of 1, or "
                    "take DDP"
                )


def _passes(request: Request, plan: Plan) -> tuple[Any, ...]:
    """What decides how many passes a request takes."""
    cameras = [request.camera, *(shot.camera for shot in request.storyboard)]
    guided = (
        plan.guidance_scale != 1,
        any(camera is not None for camera in cameras) and plan.camera_guidance_scale != 1,
        plan.brush_guidance_scale != 1,
        plan.reference_guidance_scale != 1,
    )
    return plan.num_inference_steps, plan.solver, plan.guidance_interval, plan.guidance_every, *guided


def read_checks(path: Path, step: int) -> dict[int, dict[str, float]]:
    """The checks made until a step; later ones belong to lost work. A term that no request has is NaN, null in the file."""
    if not path.is_file():
        return {}
    rows = json.loads(path.read_text(encoding="utf-8"))
    return {int(s): {name: math.nan if x is None else x for name, x in row.items()} for s, row in rows.items() if int(s) <= step}


def write_checks(path: Path, checks: dict[int, dict[str, float]]) -> None:
    """As `read_checks` reads them."""
    plain = {s: {name: x if math.isfinite(x) else None for name, x in row.items()} for s, row in checks.items()}
    write_atomic(path, json.dumps(plain))


def history(checks: dict[int, dict[str, float]]) -> dict[int, float]:
    """The checker at every step at which it had a value."""
    return {s: x for s in sorted(checks) if math.isfinite(x := checks[s]["check/checker"])}


def passed(checks: list[float]) -> bool:
    """Whether the last check is no worse than `SLIPPED` of the first."""
    return not checks or checks[-1] >= SLIPPED * checks[0]


def falls(checks: list[float]) -> bool:
    """Whether the last two checks are below `FALLEN` of the first of all, or three fell in a row, all below `SLIPPED` of it.

    A few held-out requests jitter: of runs of 13 checks whose policy does not change, with a deviation of 8 %, one in a hundred falls so;
    every seventh has three falls in a row that end below 0.9.
    """
    if len(checks) < 3:
        return False
    first, last = checks[0], checks[-4:]
    slowly = len(last) == 4 and all(b < a for a, b in pairwise(last)) and last[1] < SLIPPED * first
    return slowly or max(checks[-2:]) < FALLEN * first
