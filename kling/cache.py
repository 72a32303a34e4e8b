"""The latent cache: every clip encoded once, so that a transformer trains without the VAE and the renderer.

    cache/index.json            what it was made from (a key), and its shards with their sizes and SHA-256
    cache/00000.safetensors     latents (n, c, f, h, w) fp16, normalised; keyframes (n, K, c, h, w); camera
    cache/00000.json            captions and names

The encoding of a prefix is the prefix of the encoding, so one long encoding serves every shorter length. Lone frames that training
appends as keyframes are encoded on their own: the last frame of every length, and inner ones drawn once a clip.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset

from kling.condition.camera import Trajectory
from kling.data.source import ClipSample, ClipSource, DataConfig, batches, check_data
from kling.data.transforms import to_tensor
from kling.errors import UserError
from kling.runtime.checkpoint import write_atomic
from kling.shapes import latent_frames
from kling.vae import AutoencoderKLKling

INDEX = "index.json"
INNER = 2  # inner keyframes a clip, besides the ends


def cache_key(vae: AutoencoderKLKling, settings: dict[str, Any]) -> str:
    """Hash of the VAE's weights and of everything that decides what is encoded: another key is another cache."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()


def keyframe_times(index: int, ends: list[int], seed: int) -> list[int]:
    """Pixel frames of a clip that are encoded alone: the last of every length, then one drawn inside the first and the last length."""
    rng = random.Random(f"keyframes/{seed}/{index}")
    inner = [rng.randint(1, max(1, ends[i] - 2)) for i in (0, -1)]
    return [T - 1 for T in ends] + inner


class CacheWriter:
    """Writes shards one at a time. A shard that the index names, with the right hash, is never made again."""

    def __init__(self, folder: str | Path, key: str, settings: dict[str, Any]) -> None:
        self.folder, self.key, self.settings = Path(folder), key, settings
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cache {folder} cannot be written ({error.strerror}): choose another folder") from None
        self.shards: dict[str, dict[str, Any]] = {}
        if (self.folder / INDEX).is_file():
            index = json.loads((self.folder / INDEX).read_text(encoding="utf-8"))
            if index["key"] != key:
                raise UserError(f"cache {folder} was made with another VAE or other settings: choose another folder, or delete this one")
            self.shards = {name: entry for name, entry in index["shards"].items() if _whole(self.folder / name, entry)}

    def __contains__(self, name: str) -> bool:
        return name in self.shards

    def add(self, name: str, tensors: dict[str, Tensor], rows: list[dict[str, Any]], aspect: str) -> None:
        """Write one shard: `rows` holds captions and names of its clips."""
        path = self.folder / name
        temporary = path.with_suffix(".tmp")
        save_file(tensors, temporary)
        write_atomic(path.with_suffix(".json"), json.dumps(rows, ensure_ascii=False))
        temporary.replace(path)
        self.shards[name] = {"clips": len(rows), "aspect": aspect, "bytes": path.stat().st_size, "sha256": _sha256(path)}
        index = {"key": self.key, "settings": self.settings, "shards": dict(sorted(self.shards.items()))}
        write_atomic(self.folder / INDEX, json.dumps(index, indent=1))


@dataclass
class CacheConfig:
    """What a cache is made of.

    out: its folder. vae: a VAE folder, or empty for the shipped one. clips: how many, shared out over `data.aspects` by `shares`.
    data.frames: the lengths that training will use; the longest is encoded. shard: clips in a file.
    """

    out: str = "runs/cache"
    vae: str = ""
    clips: int = 1000
    shares: list[float] = field(default_factory=lambda: [3, 1, 1])
    shard: int = 50
    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    workers: int = 1
    threads: int | None = None


def fill_cache(cfg: CacheConfig, vae: AutoencoderKLKling) -> Iterator[tuple[int, int]]:
    """Encode what is not there yet; yields (clips done, clips in all) after every shard, the ones found included."""
    check_data(cfg.data)
    if len(cfg.shares) != len(cfg.data.aspects):
        raise UserError(f"shares {cfg.shares} for aspects {cfg.data.aspects}: give one number for each aspect")
    settings = {"data": asdict(cfg.data), "seed": cfg.seed, "clips": cfg.clips, "shares": cfg.shares, "shard": cfg.shard}
    writer = CacheWriter(cfg.out, cache_key(vae, settings), settings)
    plan: list[tuple[str, list[int]]] = []  # (aspect, indices) of every shard
    bounds = [0, *(round(cfg.clips * upto / sum(cfg.shares)) for upto in accumulate(cfg.shares))]  # rounded so that they sum to `clips`
    for aspect, (begin, end) in zip(cfg.data.aspects, pairwise(bounds), strict=True):
        indices = range(end - begin)
        plan += [(aspect, list(indices[i : i + cfg.shard])) for i in range(0, len(indices), cfg.shard)]
    names = [f"{i:05d}.safetensors" for i in range(len(plan))]
    total = sum(len(indices) for _, indices in plan)
    todo = [(name, aspect, indices) for name, (aspect, indices) in zip(names, plan, strict=True) if name not in writer]
    done = total - sum(len(indices) for _, _, indices in todo)
    yield done, total
    source = ClipSource(cfg.data, cfg.seed)
    ends = sorted(T for T in cfg.data.frames if T > 1)
    clips = batches(_Clips(source, max(cfg.data.frames), todo), 0, total - done, cfg.workers)
    for name, aspect, indices in todo:
        tensors, rows = encode_clips(vae, [next(clips) for _ in indices], indices, ends, cfg.seed)
        writer.add(name, tensors, rows, aspect)
        done += len(indices)
        yield done, total


class _Clips(Dataset):
    """The clips of a list of shards, one after another, so that workers make them ahead."""

    def __init__(self, source: ClipSource, frames: int, shards: list[tuple[str, str, list[int]]]) -> None:
        self.source, self.frames = source, frames
        self.places = [(index, aspect) for _, aspect, indices in shards for index in indices]

    def __getitem__(self, i: int) -> ClipSample:
        index, aspect = self.places[i]
        return self.source.clip(index, self.frames, aspect)


@torch.no_grad()
def encode_clips(
    vae: AutoencoderKLKling, clips: list[ClipSample], indices: list[int], ends: list[int], seed: int
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """The tensors and rows of one shard, from clips of the longest length. `ends`: the lengths whose last frame training may append."""
    latents, lone, at, c2w, intrinsics, rows = [], [], [], [], [], []
    for index, clip in zip(indices, clips, strict=True):
        video = to_tensor(clip.video)[None].to(vae.device)  # (1, 3, T, H, W)
        times = keyframe_times(index, ends, seed)
        frames = video[:, :, times].transpose(0, 2)  # (K, 3, 1, H, W)
        latents.append(vae.normalize(vae.encode(video).latent_dist.mode())[0])  # (c, f, h, w)
        lone.append(vae.normalize(vae.encode(frames).latent_dist.mode())[:, :, 0])  # (K, c, h, w)
        at.append(torch.tensor(times))
        camera = clip.trajectory
        T = max(ends)
        c2w.append(camera.c2w if camera else torch.zeros(T, 3, 4))
        intrinsics.append(camera.intrinsics if camera else torch.zeros(T, 4))  # zero focal length: no camera known
        rows.append({"name": clip.name, "captions": clip.captions})
    tensors = {
        "latents": torch.stack(latents).half(),
        "keyframes": torch.stack(lone).half(),
        "keyframe_times": torch.stack(at),
        "c2w": torch.stack(c2w),
        "intrinsics": torch.stack(intrinsics),
    }
    return {name: t.cpu().contiguous() for name, t in tensors.items()}, rows


@dataclass(frozen=True)
class LatentBatch:
    """A batch of one shape, cut to one length. `times` are the pixel frames of the lone `keyframes`; `cameras` is None where unknown."""

    ids: list[int]
    latents: Tensor  # (b, c, f, h, w)
    keyframes: Tensor  # (b, K, c, h, w)
    times: Tensor  # (b, K)
    captions: list[list[str]]
    cameras: list[Trajectory | None]


class LatentCache:
    """Reads a cache; shards stay memory-mapped. Raises `UserError` if there is none, or a shard is damaged."""

    def __init__(self, folder: str | Path, key: str | None = None) -> None:
        self.folder = Path(folder)
        try:
            index = json.loads((self.folder / INDEX).read_text(encoding="utf-8"))
        except OSError:
            raise UserError(f"latent cache {folder} does not exist: make it with kling-encode") from None
        except ValueError:
            raise UserError(f"latent cache {folder} is damaged: {INDEX} is not readable; delete the folder and run kling-encode") from None
        if key is not None and index["key"] != key:
            raise UserError(f"latent cache {folder} was made with another VAE or other settings: delete it and run kling-encode")
        self.settings = index["settings"]
        self.clips: dict[str, list[tuple[str, int]]] = {}  # aspect -> (shard, row)
        self._rows: dict[str, list[dict]] = {}
        for name, entry in index["shards"].items():
            if not _whole(self.folder / name, entry):
                raise UserError(f"latent cache {folder} is damaged: {name} has changed since it was written; run kling-encode to remake it")
            self.clips.setdefault(entry["aspect"], []).extend((name, row) for row in range(entry["clips"]))
            self._rows[name] = json.loads((self.folder / name).with_suffix(".json").read_text(encoding="utf-8"))
        self._open: dict[str, Any] = {}

    def __len__(self) -> int:
        return sum(len(places) for places in self.clips.values())

    def batch(self, aspect: str, ids: list[int], frames: int) -> LatentBatch:
        """The clips `ids` of an aspect, their first `frames` pixel frames."""
        f = latent_frames(frames)
        columns: dict[str, list[Tensor]] = {name: [] for name in ("latents", "keyframes", "keyframe_times", "c2w", "intrinsics")}
        captions = []
        for i in ids:
            shard, row = self.clips[aspect][i]
            file = self._shard(shard)
            for name, column in columns.items():
                part = file.get_slice(name)
                column.append(part[row, :, :f] if name == "latents" else part[row])
            captions.append(self._rows[shard][row]["captions"])
        stacked = {name: torch.stack(column) for name, column in columns.items()}
        cameras = [
            Trajectory(c2w[:frames], k[:frames]) if float(k[0, 0]) > 0 else None
            for c2w, k in zip(stacked["c2w"], stacked["intrinsics"], strict=True)
        ]
        return LatentBatch(ids, stacked["latents"].float(), stacked["keyframes"].float(), stacked["keyframe_times"], captions, cameras)

    def _shard(self, name: str) -> Any:
        if name not in self._open:
            self._open[name] = safe_open(self.folder / name, framework="pt")
        return self._open[name]


class LatentSteps(Dataset):
    """Batch of place p = step * ranks + rank, as a function of (seed, p) alone.

    An epoch cuts every aspect's shuffled clips into batches and shuffles these; a last short batch is filled from the start of its own
    order, so every clip is used in every epoch, however small its bucket.
    """

    def __init__(self, cache: LatentCache, batch: int, frames: list[int], seed: int) -> None:
        self.cache, self.size, self.frames, self.seed = cache, batch, frames, seed
        self.per_epoch = sum(-(-len(places) // batch) for places in cache.clips.values())
        self._epoch: tuple[int, list[tuple[str, list[int]]]] = (-1, [])

    def __getitem__(self, place: int) -> LatentBatch:
        epoch, i = divmod(place, self.per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = epoch, list(self._plan(epoch))
        aspect, ids = self._epoch[1][i]
        frames = random.Random(f"frames/{self.seed}/{place}").choice(self.frames)
        return self.cache.batch(aspect, ids, frames)

    def _plan(self, epoch: int) -> Iterator[tuple[str, list[int]]]:
        rng = random.Random(f"epoch/{self.seed}/{epoch}")
        plan = []
        for aspect, places in self.cache.clips.items():
            order = rng.sample(range(len(places)), len(places))
            order += (order * self.size)[: -len(order) % self.size]
            plan += [(aspect, order[i : i + self.size]) for i in range(0, len(order), self.size)]
        rng.shuffle(plan)
        return iter(plan)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _whole(path: Path, entry: dict[str, Any]) -> bool:
    return path.is_file() and path.stat().st_size == entry["bytes"] and _sha256(path) == entry["sha256"]
