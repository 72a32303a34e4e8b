"""The latent cache: every clip encoded once, so that a transformer trains without the VAE and the decoders.

    cache/index.json            what it was made from (a key), and its shards with their sizes and SHA-256; there when all are
    cache/index.0.json          the shards that process 0 has made so far
    cache/00000.safetensors     latents (n, c, f, h, w) fp16, normalised; keyframes (n, K, c, h, w); camera; for image-to-video weights also
                                shown (n, c, f, h, w), the first frame before nothing but grey, and seen (n, i, e), CLIP's tokens of it
    cache/00000.json            captions and names
    cache/text/                 umT5's embeddings of the captions, a file each, for published weights

The encoding of a prefix is the prefix of the encoding, so one long encoding serves every shorter length. Lone frames that training
appends as keyframes are encoded on their own: the last frame of every length, and inner ones drawn once a clip. A shard holds clips of one
shape. What decides its contents is hashed: a shard that is damaged, or whose clips have changed, is made anew and never read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset

from kling.cache.encode import encode_clips, first_frames
from kling.cameras.trajectory import Trajectory
from kling.data.buckets import Bucket
from kling.data.clips import ClipSample
from kling.data.source import ClipSource, DataConfig, batches, check_data
from kling.errors import UserError
from kling.runtime.files import sha256, write_atomic
from kling.shapes import latent_frames
from kling.vae import AutoencoderKLKling

INDEX = "index.json"


def cache_key(vae: AutoencoderKLKling, settings: dict[str, Any]) -> str:
    """Hash of the VAE's weights and of everything that decides what is encoded: another key is another cache."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()


@dataclass
class CacheConfig:
    """What a cache is made of.

    out: its folder. vae: a VAE folder, or empty for that of `model`, or the shipped one. model: published weights that will be trained,
    whose umT5 reads the captions; empty for our own text encoder, which reads them in training. image: keep also what image-to-video
    weights are shown of a first frame. clips: how many of the endless world, shared out over `data.aspects` by `shares`; a manifest is
    encoded whole. data.frames: the lengths that training will use; of the world the longest is encoded, of a manifest's shot the longest
    that it fills. shorter: how many other clips of the world of each shorter length, {1: 9000} for pictures, which cost little and show
    much. shard: clips in a file.
    """

    out: str = "runs/cache"
    vae: str = ""
    model: str = ""
    image: bool = False
    clips: int | None = None
    shorter: dict[int, int] = field(default_factory=dict)
    shares: list[float] | None = None  # one for each of data.aspects; null shares out evenly
    shard: int = 50
    seed: int = 0  # of the world's scenes and of what is drawn from a manifest
    data: DataConfig = field(default_factory=DataConfig)
    workers: int = 1  # processes that read clips, for each encoding process
    threads: int | None = None  # CPU threads inside an operation, null is all cores


@dataclass(frozen=True)
class Shard:
    """What one file of the cache is to hold: the clips `numbers` of a bucket."""

    name: str
    bucket: Bucket
    numbers: list[int]
    digest: str  # of everything that decides which clips these are


def fill_cache(
    cfg: CacheConfig, vae: AutoencoderKLKling, rank: int = 0, ranks: int = 1, wait: Callable[[], None] = lambda: None,
    clip_tokens: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[tuple[int, int]]:  # fmt: skip
    """Encode what is not there yet; yields (clips done, clips in all) after every shard, the ones found included.

    Process `rank` of `ranks` takes every ranks-th of the missing shards; `wait` returns when all of them have come to it.
    clip_tokens: a picture uint8 (H, W, 3) -> CLIP's tokens of it (i, e), for `cfg.image` and weights that take them.
    """
    check_data(cfg.data)
    source = ClipSource(cfg.data, cfg.seed)
    plan = list(_plan(cfg, source))
    writer = CacheWriter(cfg.out, cache_key(vae, settings_of(cfg)), settings_of(cfg), rank)
    wait()  # everyone has seen what was there before anyone adds to it
    missing = [shard for shard in plan if shard not in writer]
    mine = missing[rank::ranks]
    total = sum(len(shard.numbers) for shard in plan)
    done = total - sum(len(shard.numbers) for shard in mine)
    yield done, total
    clips = batches(_Clips(source, mine), 0, sum(len(shard.numbers) for shard in mine), cfg.workers)
    for shard in mine:
        ends = sorted(T for T in set(cfg.data.frames) if 1 < T <= shard.bucket.frames)
        samples = [next(clips) for _ in shard.numbers]
        ids = [sample.name for sample in samples] if source.manifest else shard.numbers
        tensors, rows = encode_clips(vae, samples, ids, ends, cfg.seed)
        writer.add(shard, tensors | (first_frames(vae, samples, clip_tokens) if cfg.image else {}), rows)
        done += len(shard.numbers)
        yield done, total
    wait()
    if rank == 0:
        writer.finish(plan)
    wait()


def settings_of(cfg: CacheConfig) -> dict[str, Any]:
    """What decides the contents besides the VAE and the clips' own. A later field changes no key while it stands at its default."""
    plain, always = asdict(DataConfig()), ("source", "frames", "aspects", "fps", "unconditional", "skip_bad")
    data = {name: value for name, value in asdict(cfg.data).items() if name in always or value != plain[name]}
    data.pop("reader", None)  # all readers give the same frames
    of_world = {"clips": cfg.clips, "shares": _shares(cfg)} if cfg.data.source == "world" else {}
    if cfg.data.source == "world" and cfg.shorter:
        of_world["shorter"] = {str(frames): clips for frames, clips in cfg.shorter.items()}  # as JSON gives it back
    of_image = {"image": True} if cfg.image else {}
    return {"data": data, "seed": cfg.seed, "shard": cfg.shard, **of_world, **of_image}


def _shares(cfg: CacheConfig) -> list[float]:
    return cfg.shares or [3.0, 1.0, 1.0]


def _plan(cfg: CacheConfig, source: ClipSource) -> Iterator[Shard]:
    """The shards of a cache, in order. Raises `UserError` for settings that do not fit the source."""
    buckets: list[tuple[Bucket, range]] = []
    if source.manifest:
        if cfg.clips is not None or cfg.shares is not None or cfg.shorter:
            raise UserError("clips, shorter and shares are for the world, and a manifest is encoded whole: leave them out")
        buckets = [(bucket, range(len(pieces))) for bucket, pieces in source.manifest.buckets.items()]
    else:
        if cfg.clips is None or len(_shares(cfg)) != len(cfg.data.aspects):
            raise UserError(
                f"clips {cfg.clips}, shares {_shares(cfg)} for aspects {cfg.data.aspects}: give the first, and a share for each aspect"
            )
        longest, used = max(cfg.data.frames), dict.fromkeys(cfg.data.aspects, 0)
        if odd := [T for T in cfg.shorter if T not in cfg.data.frames or longest == T]:
            raise UserError(f"shorter has clips of {odd[0]} frames, data.frames is {cfg.data.frames}: name shorter ones of these")
        for frames, clips in {longest: cfg.clips, **cfg.shorter}.items():
            shares = _shares(cfg)
            bounds = [0, *(round(clips * upto / sum(shares)) for upto in accumulate(shares))]  # rounded so that they sum to `clips`
            for aspect, n in zip(cfg.data.aspects, (end - begin for begin, end in pairwise(bounds)), strict=True):
                buckets.append((Bucket(aspect, frames), range(used[aspect], used[aspect] + n)))  # other scenes than the longer ones'
                used[aspect] += n
    place = 0
    for bucket, all_numbers in buckets:
        for first in range(0, len(all_numbers), cfg.shard):
            numbers = list(all_numbers[first : first + cfg.shard])
            what = [source.manifest.identity(bucket, i) for i in numbers] if source.manifest else numbers
            digest = hashlib.sha256(json.dumps([bucket, what]).encode()).hexdigest()
            yield Shard(f"{place:05d}.safetensors", bucket, numbers, digest)
            place += 1


class CacheWriter:
    """Writes the shards of one process. A shard that an index names, with the right hash and contents, is never made again."""

    def __init__(self, folder: str | Path, key: str, settings: dict[str, Any], rank: int = 0) -> None:
        self.folder, self.key, self.settings, self.own = Path(folder), key, settings, f"index.{rank}.json"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cache {folder} cannot be written ({error.strerror}): choose another folder") from None
        self.found = self._whole(INDEX, "index.*.json")
        self.made = self._whole(self.own)

    def __contains__(self, shard: Shard) -> bool:
        entry = self.found.get(shard.name)
        return entry is not None and entry["clips"] == len(shard.numbers) and entry.get("digest", shard.digest) == shard.digest

    def add(self, shard: Shard, tensors: dict[str, Tensor], rows: list[dict[str, Any]]) -> None:
        """Write one shard: `rows` holds captions and names of its clips."""
        path = self.folder / shard.name
        temporary = path.with_suffix(".tmp")
        save_file(tensors, temporary)
        write_atomic(path.with_suffix(".json"), json.dumps(rows, ensure_ascii=False))
        temporary.replace(path)
        shape = {"aspect": shard.bucket.aspect, "frames": shard.bucket.frames, "digest": shard.digest}
        self.made[shard.name] = {"clips": len(rows), **shape, "bytes": path.stat().st_size, "sha256": sha256(path)}
        self._write(self.own, self.made)

    def finish(self, plan: list[Shard]) -> None:
        """Gather what all processes have made into the index; shards that the plan no longer has are deleted."""
        found = self._whole(INDEX, "index.*.json")
        self._write(INDEX, {shard.name: found[shard.name] for shard in plan})
        for path in self.folder.glob("index.*.json"):
            path.unlink()
        names = {shard.name for shard in plan}
        for path in self.folder.glob("*.safetensors"):
            if path.name not in names:
                path.unlink()
                path.with_suffix(".json").unlink(missing_ok=True)

    def _whole(self, *indices: str) -> dict[str, dict[str, Any]]:
        """The undamaged shards that these indices name; the last word counts."""
        shards: dict[str, dict[str, Any]] = {}
        for path in (path for pattern in indices for path in sorted(self.folder.glob(pattern))):
            index = json.loads(path.read_text(encoding="utf-8"))
            if index["key"] != self.key:
                where = f"cache {self.folder} was made with another VAE or other settings"
                raise UserError(f"{where}: choose another folder, or delete this one")
            shards |= {name: entry for name, entry in index["shards"].items() if _whole(self.folder / name, entry)}
        return shards

    def _write(self, name: str, shards: dict[str, dict[str, Any]]) -> None:
        index = {"key": self.key, "settings": self.settings, "shards": dict(sorted(shards.items()))}
        text, path = json.dumps(index, indent=1), self.folder / name
        if not path.is_file() or path.read_text(encoding="utf-8") != text:  # several trainings may start at once on a cache that is whole
            write_atomic(path, text)


class _Clips(Dataset):
    """The clips of a list of shards, one after another, so that workers make them ahead."""

    def __init__(self, source: ClipSource, shards: list[Shard]) -> None:
        self.source = source
        self.places = [(shard.bucket, number) for shard in shards for number in shard.numbers]

    def __getitem__(self, i: int) -> ClipSample:
        bucket, number = self.places[i]
        if self.source.manifest:
            return self.source.manifest.clip(bucket, number)
        return self.source.clip(number, bucket.frames, bucket.aspect)


@dataclass(frozen=True)
class LatentBatch:
    """A batch of one shape, cut to one length. `times` are the pixel frames of the lone `keyframes`; `cameras` is None where unknown,
    `shown` and `seen` where the cache was made without `image`."""

    ids: list[int]
    latents: Tensor  # (b, c, f, h, w)
    keyframes: Tensor  # (b, K, c, h, w)
    times: Tensor  # (b, K)
    captions: list[list[str]]
    weights: list[list[float]]  # of the captions: how often each is taken
    cameras: list[Trajectory | None]
    shown: Tensor | None = None  # (b, c, f, h, w)
    seen: Tensor | None = None  # (b, i, e)
    names: list[str] = field(default_factory=list)


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
        self.key, self.settings = index["key"], index["settings"]
        self.clips: dict[Bucket, list[tuple[str, int]]] = {}  # -> (shard, row)
        self._rows: dict[str, list[dict]] = {}
        for name, entry in index["shards"].items():
            if not _whole(self.folder / name, entry):
                raise UserError(f"latent cache {folder} is damaged: {name} has changed since it was written; run kling-encode to remake it")
            bucket = Bucket(entry["aspect"], entry.get("frames", max(self.settings["data"]["frames"])))
            self.clips.setdefault(bucket, []).extend((name, row) for row in range(entry["clips"]))
            self._rows[name] = json.loads((self.folder / name).with_suffix(".json").read_text(encoding="utf-8"))
        self._open: dict[str, Any] = {}

    def __len__(self) -> int:
        return sum(len(places) for places in self.clips.values())

    @property
    def holds(self) -> set[str]:
        """Names of what is kept of every clip."""
        return set(self._shard(next(iter(self._rows))).keys())

    def check_vae(self, vae: AutoencoderKLKling) -> None:
        """Raises `UserError` unless these are latents of this VAE."""
        if cache_key(vae, self.settings) != self.key:
            raise UserError(f"latent cache {self.folder} was made with another VAE: give that one with vae=, or make the cache anew")

    def batch(self, bucket: Bucket, ids: list[int], frames: int) -> LatentBatch:
        """The clips `ids` of a bucket, their first `frames` pixel frames."""
        f = latent_frames(frames)
        columns: dict[str, list[Tensor]] = {}
        captions, weights, names = [], [], []
        for i in ids:
            shard, row = self.clips[bucket][i]
            file = self._shard(shard)
            for name in file.keys():  # noqa: SIM118 - no dict
                part = file.get_slice(name)
                columns.setdefault(name, []).append(part[row, :, :f] if name in ("latents", "shown") else part[row])
            captions.append(self._rows[shard][row]["captions"])
            names.append(self._rows[shard][row]["name"])
            weights.append(self._rows[shard][row].get("weights", [1.0] * len(captions[-1])))
        stacked = {name: torch.stack(column) for name, column in columns.items()}
        cameras = [
            Trajectory(c2w[:frames], k[:frames]) if float(k[0, 0]) > 0 else None
            for c2w, k in zip(stacked["c2w"], stacked["intrinsics"], strict=True)
        ]
        lone = stacked["keyframes"].float(), stacked["keyframe_times"]
        first = {name: stacked[name].float() for name in ("shown", "seen") if name in stacked}
        return LatentBatch(ids, stacked["latents"].float(), *lone, captions, weights, cameras, **first, names=names)

    def _shard(self, name: str) -> Any:
        if name not in self._open:
            self._open[name] = safe_open(self.folder / name, framework="pt")
        return self._open[name]


def _whole(path: Path, entry: dict[str, Any]) -> bool:
    return path.is_file() and path.stat().st_size == entry["bytes"] and sha256(path) == entry["sha256"]
