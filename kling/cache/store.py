"""The latent cache: every clip encoded once, so that a transformer trains without the VAE and the decoders.

    cache/index.json            the settings it was made from (as a key), and its shards with sizes and SHA-256; written when all are done
    cache/index.0.json          the shards that process 0 has made so far
    cache/stamps.json           the modification time of each shard when it last matched the index
    cache/00000.safetensors     latents (n, c, f, h, w) fp16, normalised; keyframes (n, K, c, h, w); camera; for image-to-video weights also
                                shown (n, c, f, h, w), the first frame followed by grey, and seen (n, i, e), its CLIP tokens;
                                tracks (n, 64, T, 3) of a manifest's clips that have some (the world's are computed);
                                references (n, R, c, h, w), pictures of their things, each encoded alone (a row says how many there are);
                                rows, row_ends, row_sums: for each clip a JSON line (name, captions), where it ends, the clip's checksum
    cache/text/                 umT5's embeddings of the captions, one file each, for published weights

The encoding of a prefix is the prefix of the encoding, so one long encoding serves every shorter length. Single frames that training
appends as keyframes are encoded separately: the last frame of every length, and inner ones drawn once per clip. A shard holds clips of one
shape. The shard's digest covers everything that determines its contents: a shard whose clips have changed is made again.

No file is read as a whole without need. A reader compares sizes and times when it opens the cache, a clip's checksum whenever it reads the
clip, and a shard's hash at the first read if its time differs from the recorded one; `kling-encode verify=true` compares all hashes. Older
caches, with their rows in 00000.json and no stamps, can still be read.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, fields
from itertools import accumulate, islice, pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset

from kling.cache.encode import encode_clips, first_frames
from kling.cameras.trajectory import Trajectory
from kling.condition.state import MOST_REFERENCES
from kling.config import flatten, is_a
from kling.data.buckets import Bucket
from kling.data.clips import ClipSample
from kling.data.manifest import MissingClip, as_line
from kling.data.source import SHOTS, ClipSource, DataConfig, batches, check_data
from kling.data.world.storyboard import SHORTEST
from kling.errors import UserError
from kling.runtime.files import parse_json, sha256, write_atomic, writing
from kling.shapes import latent_frames
from kling.text.encoder import prompt_bytes
from kling.vae import AutoencoderKLKling

INDEX, STAMPS = "index.json", "stamps.json"
ROWS, ENDS, SUMS = "rows", "row_ends", "row_sums"  # in a shard, next to the tensors of its clips
OPEN = 64  # shards that a reader keeps open
NAMED = 3  # clips that an error message names


def cache_key(vae: AutoencoderKLKling, settings: dict[str, Any]) -> str:
    """Hash of the VAE's weights and of everything else that determines the encoding: another key is another cache."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()


@dataclass
class CacheConfig:
    """The contents of a cache.

    out: its folder. vae: a VAE folder; empty for the VAE of `model`, or the shipped one. model: published weights that will be trained,
    whose umT5 encodes the captions; empty for our own text encoder, which runs during training. image: also store the first-frame inputs
    of image-to-video weights. clips: number of clips of the endless world, divided over `data.aspects` by `shares`; a manifest is encoded
    whole. data.frames: the lengths that training will use; for the world the longest is encoded, for a manifest's shot the longest that it
    fills. shorter: number of additional world clips of each shorter length, such as {1: 9000} for pictures, which are cheap and show much.
    paths: number of additional world clips of each length whose things follow paths that no word describes, for the motion brush.
    shots: number of additional world clips of each length that are storyboards: several shots of the same things.
    references: number of pictures of its things, 0 to 4, that are encoded beside every clip of the world, for training references; those of
    a manifest's clips are always.
    shard: clips per file. mixed_precision: of the VAE: auto (measured), bf16 or fp32; recorded with each shard.
    skip_missing: leave out clips whose files are gone, and count them. verify: compare every shard's hash, and remake those that differ.
    """

    out: str = "runs/cache"
    vae: str = ""
    model: str = ""
    image: bool = False
    clips: int | None = None
    shorter: dict[int, int] = field(default_factory=dict)
    paths: dict[int, int] = field(default_factory=dict)
    shots: dict[int, int] = field(default_factory=dict)
    references: int = 0
    shares: list[float] | None = None  # one for each of data.aspects; null divides evenly
    shard: int = 50
    seed: int = 0  # of the world's scenes and of random draws from a manifest
    data: DataConfig = field(default_factory=DataConfig)
    mixed_precision: str = "auto"
    skip_missing: bool = False
    verify: bool = False
    workers: int = 1  # processes that read clips, for each encoding process
    threads: int | None = None  # CPU threads per operation; null uses all cores


@dataclass(frozen=True)
class Shard:
    """The planned contents of one file of the cache: the clips `numbers` of a bucket."""

    name: str
    bucket: Bucket
    numbers: list[int]
    digest: str  # of everything that determines which clips these are
    split: str = ""  # of the world, if not the training's


def fill_cache(
    cfg: CacheConfig, vae: AutoencoderKLKling, rank: int = 0, ranks: int = 1, wait: Callable[[], None] = lambda: None,
    clip_tokens: Callable[[Tensor], Tensor] | None = None, precision: str = "fp32",
    hold: Callable[[], AbstractContextManager] = nullcontext,
) -> Iterator[tuple[int, int]]:  # fmt: skip
    """Encode the missing shards; yields (clips done, clips in all) after every shard, counting the shards that exist already.

    Process `rank` of `ranks` takes every ranks-th missing shard; `wait` is a barrier for all of them.
    clip_tokens: a picture uint8 (H, W, 3) -> its CLIP tokens (i, e), for `cfg.image` and weights that take them.
    precision: fp32 or bf16. hold: keeps other runs from writing to the folder while shards are made.

    Raises `MissingClip` if a clip's file is gone, unless `cfg.skip_missing`; finished shards stay.
    """
    check_data(cfg.data)
    source = ClipSource(cfg.data, cfg.seed)
    plan, settings = list(_plan(cfg, source)), settings_of(cfg)
    tracked = source.manifest is not None and any(shot.tracks for shot in source.manifest.manifest.shots)
    places = cfg.references if source.manifest is None else MOST_REFERENCES * source.manifest.has_references
    key = cache_key(vae, settings)

    writer = CacheWriter(cfg.out, key, settings, rank, cfg.verify, cfg.skip_missing)
    with hold() if any(shard not in writer for shard in plan) else nullcontext():
        writer.look()  # again: another run may have made some before this one locked the folder
        missing = [shard for shard in plan if shard not in writer]
        wait()  # all processes have listed the existing shards before one adds to them
        mine = missing[rank::ranks]
        total = sum(len(shard.numbers) for shard in plan)
        done = total - sum(len(shard.numbers) for shard in mine)
        yield done, total
        clips = batches(_Clips(source, mine, cfg.skip_missing, cfg.references), 0, sum(len(shard.numbers) for shard in mine), cfg.workers)
        for shard in mine:
            ends = sorted(T for T in set(cfg.data.frames) if 1 < T <= shard.bucket.frames)
            there = [(n, sample) for n, sample in zip(shard.numbers, islice(clips, len(shard.numbers)), strict=True) if sample is not None]
            tensors, rows, samples = {}, [], [sample for _, sample in there]
            if samples:
                ids = [sample.name for sample in samples] if source.manifest else [n for n, _ in there]
                tensors, rows = encode_clips(vae, samples, ids, ends, cfg.seed, precision, tracked, places)
                tensors |= first_frames(vae, samples, clip_tokens, precision) if cfg.image else {}
            writer.add(shard, tensors, rows, precision)
            done += len(shard.numbers)
            yield done, total
        wait()
        if rank == 0:
            writer.finish(plan)
        wait()


def settings_of(cfg: CacheConfig) -> dict[str, Any]:
    """All settings that determine the contents, except the VAE and the clips. Fields added later do not change the key at their default."""
    plain, always = asdict(DataConfig()), ("source", "frames", "aspects", "fps", "unconditional", "skip_bad")
    data = {name: value for name, value in asdict(cfg.data).items() if name in always or value != plain[name]}
    data.pop("reader", None)  # all readers return the same frames
    of_world = {"clips": cfg.clips, "shares": _shares(cfg)} if cfg.data.source == "world" else {}
    for name in ("shorter", "paths", "shots"):
        if cfg.data.source == "world" and (more := getattr(cfg, name)):
            of_world[name] = {str(frames): clips for frames, clips in more.items()}  # JSON turns keys into strings
    of_world |= {"references": cfg.references} if cfg.references else {}
    of_image = {"image": True} if cfg.image else {}
    return {"data": data, "seed": cfg.seed, "shard": cfg.shard, **of_world, **of_image}


def _shares(cfg: CacheConfig) -> list[float]:
    return cfg.shares or [3.0, 1.0, 1.0]


def _plan(cfg: CacheConfig, source: ClipSource) -> Iterator[Shard]:
    """The shards of a cache, in order. Raises `UserError` for settings that do not fit the source."""
    buckets: list[tuple[Bucket, range, str]] = []
    if source.manifest:
        if cfg.clips is not None or cfg.shares is not None or cfg.shorter or cfg.paths or cfg.shots or cfg.references:
            given = "clips, shorter, paths, shots, references and shares"
            raise UserError(f"{given} are for the world, and a manifest is encoded whole: leave them out")
        buckets = [(bucket, range(len(pieces)), "") for bucket, pieces in source.manifest.buckets.items()]
    else:
        if cfg.clips is None or len(_shares(cfg)) != len(cfg.data.aspects) or not sum(_shares(cfg)):
            raise UserError(
                f"clips {cfg.clips}, shares {_shares(cfg)} for aspects {cfg.data.aspects}: give clips, and all aspects a share, not all 0"
            )
        if not 0 <= cfg.references <= MOST_REFERENCES:
            raise UserError(f"references {cfg.references}: give the pictures of each clip, 0 to {MOST_REFERENCES}")
        longest = max(cfg.data.frames)
        if odd := [T for T in cfg.shorter if T not in cfg.data.frames or longest == T]:
            raise UserError(f"shorter has clips of {odd[0]} frames, data.frames is {cfg.data.frames}: name shorter ones of these")
        if odd := [T for T in cfg.paths if T not in cfg.data.frames or T == 1]:
            raise UserError(f"paths has clips of {odd[0]} frames, data.frames is {cfg.data.frames}: name some of these, longer than 1")
        if odd := [T for T in cfg.shots if T not in cfg.data.frames or T < SHORTEST]:
            remedy = f"name some of these, of {SHORTEST} frames or more"
            raise UserError(f"shots has clips of {odd[0]} frames, data.frames is {cfg.data.frames}: {remedy}")
        more = {"": cfg.shorter, "paths": cfg.paths, SHOTS: cfg.shots}
        shares, used = _shares(cfg), {split: dict.fromkeys(cfg.data.aspects, 0) for split in more}
        counts = [(longest, cfg.clips, ""), *((*count, split) for split, given in more.items() for count in given.items())]
        for frames, clips, split in counts:
            bounds = [0, *(round(clips * upto / sum(shares)) for upto in accumulate(shares))]  # rounded so that they sum to `clips`
            for aspect, n in zip(cfg.data.aspects, (end - begin for begin, end in pairwise(bounds)), strict=True):
                first = used[split][aspect]  # not the scenes of the longer clips
                buckets.append((Bucket(aspect, frames), range(first, first + n), split))
                used[split][aspect] += n
    place = 0
    for bucket, all_numbers, split in buckets:
        for first in range(0, len(all_numbers), cfg.shard):
            numbers = list(all_numbers[first : first + cfg.shard])
            what = [source.manifest.identity(bucket, i) for i in numbers] if source.manifest else numbers
            digest = hashlib.sha256(json.dumps([bucket, what, *([split] if split else [])]).encode()).hexdigest()
            yield Shard(f"{place:05d}.safetensors", bucket, numbers, digest, split)
            place += 1


class CacheWriter:
    """Writes the shards of one process. A shard in the index with the right hash and contents is never made again.

    verify: compare all hashes, not only those of files that have changed since. lacking: accept shards in which clips are missing.
    """

    def __init__(
        self, folder: str | Path, key: str, settings: dict[str, Any], rank: int = 0, verify: bool = False, lacking: bool = False
    ) -> None:
        self.folder, self.key, self.settings, self.own = Path(folder), key, settings, f"index.{rank}.json"
        self.verify, self.lacking = verify, lacking
        with writing(self.folder / INDEX):
            self.folder.mkdir(parents=True, exist_ok=True)
        self.stamps, self._hashes = read_stamps(self.folder), {}
        self.look()

    def look(self) -> None:
        """List the existing shards, made by any process."""
        self.found = self._whole(INDEX, "index.*.json")
        self.made = {name: entry for name, entry in self._entries(self.own).items() if name in self.found}

    def __contains__(self, shard: Shard) -> bool:
        entry = self.found.get(shard.name)
        if entry is None or entry.get("digest", shard.digest) != shard.digest:
            return False
        return entry["clips"] + (entry.get("missing", 0) if self.lacking else 0) == len(shard.numbers)

    def add(self, shard: Shard, tensors: dict[str, Tensor], rows: list[dict[str, Any]], precision: str = "fp32") -> None:
        """Write one shard: `rows` holds captions and names of its clips. A shard without clips has no file, only an entry."""
        path = self.folder / shard.name
        entry = {"clips": len(rows), "aspect": shard.bucket.aspect, "frames": shard.bucket.frames, "digest": shard.digest}
        if missing := len(shard.numbers) - len(rows):
            entry["missing"] = missing
        if storyboards := [i for i, row in enumerate(rows) if "shots" in row]:
            entry["shots"] = storyboards
        if rows:
            temporary = path.with_suffix(".tmp")
            try:
                with writing(path):
                    temporary.touch()
                    mode = temporary.stat().st_mode  # follows the user's umask; safetensors replaces the file by one of mode 600
                    save_file(tensors | _packed(tensors, rows), temporary)
                    temporary.chmod(mode)
                    temporary.replace(path)
                    path.with_suffix(".json").unlink(missing_ok=True)  # rows of an older version of this shard
            except SafetensorError as error:
                raise UserError(f"{path} cannot be written ({error}): free space there or choose another path") from None
            finally:
                temporary.unlink(missing_ok=True)
            longest = max((len(prompt_bytes(text)) for row in rows for text in row["captions"]), default=0)  # bytes
            entry |= {"bytes": path.stat().st_size, "sha256": sha256(path), "precision": precision, "longest": longest}
            self.stamps[shard.name] = path.stat().st_mtime_ns
        self.made[shard.name] = self.found[shard.name] = entry
        with writing(self.folder / self.own):
            own = {name: entry | {"mtime_ns": self.stamps[name]} if name in self.stamps else entry for name, entry in self.made.items()}
            self._write(self.own, own)

    def finish(self, plan: list[Shard]) -> None:
        """Merge the shards of all processes into the index, and delete shards that the plan no longer contains."""
        found = self.found | self._whole(INDEX, "index.*.json")
        if lost := [shard.name for shard in plan if shard.name not in found]:
            raise UserError(f"cache {self.folder}: {lost[0]} has changed since it was written: check the disk, and run kling-encode again")
        names = {shard.name for shard in plan}
        with writing(self.folder / INDEX):
            self._write(INDEX, {name: found[name] for name in sorted(names)})
        with suppress(OSError):  # an older cache on a read-only disk: its hashes are compared at every start
            _write_if_new(self.folder / STAMPS, json.dumps({name: self.stamps[name] for name in sorted(names & self.stamps.keys())}))
        for path in self.folder.glob("index.*.json"):
            path.unlink()
        for path in self.folder.glob("*.safetensors"):
            if path.name not in names:
                path.unlink()
                path.with_suffix(".json").unlink(missing_ok=True)

    def _entries(self, *indices: str) -> dict[str, dict[str, Any]]:
        """The shards listed in these indices; later entries win. Raises `UserError` for an index with other contents."""
        shards: dict[str, dict[str, Any]] = {}
        for path in (path for pattern in indices for path in sorted(self.folder.glob(pattern))):
            index = read_index(path)
            if index["key"] != self.key:
                raise UserError(f"cache {self.folder} was made {differences(index['settings'], self.settings)}: choose another folder")
            for name, entry in index["shards"].items():
                if "mtime_ns" in entry:
                    self.stamps[name] = entry.pop("mtime_ns")
            shards |= index["shards"]
        return shards

    def _whole(self, *indices: str) -> dict[str, dict[str, Any]]:
        """Those of the listed shards that are undamaged."""
        found = {}
        for name, entry in self._entries(*indices).items():
            if not entry["clips"]:
                found[name] = entry
            elif (there := _stat(self.folder / name)) and there[1] == entry["bytes"]:
                known = self.stamps.get(name) == there[0] and not self.verify
                if known or self._hash(name, there[0]) == entry["sha256"]:
                    found[name], self.stamps[name] = entry, there[0]
        return found

    def _hash(self, name: str, mtime_ns: int) -> str:
        """The hash of a shard, computed once per modification time."""
        if (name, mtime_ns) not in self._hashes:
            self._hashes[name, mtime_ns] = sha256(self.folder / name)
        return self._hashes[name, mtime_ns]

    def _write(self, name: str, shards: dict[str, dict[str, Any]]) -> None:
        index = {"key": self.key, "settings": self.settings, "shards": dict(sorted(shards.items()))}
        _write_if_new(self.folder / name, json.dumps(index, indent=1))


class _Clips(Dataset):
    """The clips of a list of shards in order, so that workers read them ahead. skip_missing: None for a clip whose file is gone.
    references: of each clip of the world."""

    def __init__(self, source: ClipSource, shards: list[Shard], skip_missing: bool = False, references: int = 0) -> None:
        self.source, self.skip_missing, self.references = source, skip_missing, references
        self.places = [(shard.bucket, number, shard.split) for shard in shards for number in shard.numbers]

    def __getitem__(self, i: int) -> ClipSample | None:
        bucket, number, split = self.places[i]
        if not self.source.manifest:
            return self.source.clip(number, bucket.frames, bucket.aspect, split, self.references)
        try:
            return self.source.manifest.clip(bucket, number)
        except MissingClip as error:
            if self.skip_missing:
                return None
            raise MissingClip(f"{error}, or leave out what is gone with skip_missing=true") from None


@dataclass(frozen=True)
class LatentBatch:
    """A batch of one shape, cut to one length. `times` are the pixel frames of the single `keyframes`. `cameras` has None for an unknown
    camera; `shown` and `seen` are None if the cache was made without `image`."""

    ids: list[int]
    latents: Tensor  # (b, c, f, h, w)
    keyframes: Tensor  # (b, K, c, h, w)
    times: Tensor  # (b, K)
    captions: list[list[str]]
    weights: list[list[float]]  # of the captions: how often each is used
    cameras: list[Trajectory | None]
    shown: Tensor | None = None  # (b, c, f, h, w)
    seen: Tensor | None = None  # (b, i, e)
    names: list[str] = field(default_factory=list)
    whole: int = 0  # pixel frames of the clips before they were cut
    tracks: Tensor | None = None  # (b, n, T, 3) x, y and 1 where it is there; None if the cache has none
    shots: list[list[tuple[int, int]] | None] = field(default_factory=list)  # as in `ClipSample`, of the shots that begin in these frames
    references: Tensor | None = None  # (b, R, c, h, w) pictures of the clips' things; None if the cache has none
    pictured: list[int] = field(default_factory=list)  # how many of these each clip has


class Places(Sequence[tuple[str, int]]):
    """(shard, row) of each clip of a bucket, computed from the shards' lengths only."""

    def __init__(self) -> None:
        self.shards: list[str] = []
        self.ends: list[int] = []

    def add(self, shard: str, clips: int) -> None:
        self.shards.append(shard)
        self.ends.append(len(self) + clips)

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, i: int) -> tuple[str, int]:  # type: ignore[override]
        if not 0 <= i < len(self):
            raise IndexError(i)
        k = bisect_right(self.ends, i)
        return self.shards[k], i - (self.ends[k - 1] if k else 0)


class LatentCache:
    """Reads a cache; shards stay memory-mapped. Raises `UserError` if there is none, if a shard is missing or has another size, and, when
    reading a clip, if it differs from what was written."""

    def __init__(self, folder: str | Path, key: str | None = None) -> None:
        self.folder = Path(folder)
        index = read_index(self.folder / INDEX)
        if key is not None and index["key"] != key:
            raise UserError(f"latent cache {folder} was made with another VAE or other settings: choose another folder")
        self.key, self.settings, self.shards = index["key"], index["settings"], index["shards"]
        self.clips: dict[Bucket, Places] = {}
        self.storyboards: dict[Bucket, list[int]] = {}  # the numbers of the clips of several shots
        self._suspect: set[str] = set()  # shards whose modification time differs from the recorded one
        self._open: OrderedDict[str, _Shard] = OrderedDict()
        stamps = read_stamps(self.folder)
        for name, entry in self.shards.items():
            if not entry["clips"]:
                continue
            there = _stat(self.folder / name)
            if there is None or there[1] != entry["bytes"]:
                raise self._damaged(name, "is missing" if there is None else f"has {there[1]} bytes, not {entry['bytes']}")
            if stamps.get(name) != there[0]:
                self._suspect.add(name)
            bucket = Bucket(entry["aspect"], entry.get("frames", max(self.settings["data"]["frames"])))
            places = self.clips.setdefault(bucket, Places())
            if entry.get("shots"):
                self.storyboards.setdefault(bucket, []).extend(len(places) + i for i in entry["shots"])
            places.add(name, entry["clips"])
        if not self.clips:
            raise UserError(f"latent cache {folder} holds no clip: see what kling-encode left out")

    def __len__(self) -> int:
        return sum(len(places) for places in self.clips.values())

    @property
    def missing(self) -> int:
        """Number of clips that were left out because their files were gone."""
        return sum(entry.get("missing", 0) for entry in self.shards.values())

    @property
    def data(self) -> DataConfig:
        """The data that it was made of. Raises `UserError` for a cache of a later version."""
        if odd := sorted(self.settings["data"].keys() - {field.name for field in fields(DataConfig)}):
            raise UserError(f"latent cache {self.folder} was made with data.{odd[0]}, which this version does not know: use a later one")
        return DataConfig(**self.settings["data"])

    @property
    def holds(self) -> set[str]:
        """The names of the tensors stored for every clip."""
        return set(self._shard(next(iter(self.clips.values())).shards[0]).names)

    def check_vae(self, vae: AutoencoderKLKling) -> None:
        """Raises `UserError` unless the latents were made by this VAE."""
        if cache_key(vae, self.settings) != self.key:
            raise UserError(f"latent cache {self.folder} was made with another VAE: give that one with vae=, or make the cache again")

    def check_lengths(self, frames: Iterable[int]) -> None:
        """Raises `UserError` if the last frame of one of these lengths is not stored: only those of the cache's lengths are."""
        made = self.settings["data"]["frames"]
        if odd := sorted({T for T in frames if T > 1} - set(made)):
            raise UserError(
                f"frames {odd[0]} with tasks that append a keyframe, and latent cache {self.folder} keeps last frames of {made} only: "
                "train on these lengths, leave out the tasks last, first_last and keyframes, or make a cache with data.frames of yours"
            )

    def long_captions(self, max_bytes: int) -> Iterator[tuple[str, list[str]]]:
        """(name, captions) of the clips in shards with a caption longer than `max_bytes`, or whose entry does not state the longest."""
        for name, entry in self.shards.items():
            if entry["clips"] and entry.get("longest", max_bytes + 1) > max_bytes:
                yield from ((row["name"], row["captions"]) for row in self._shard(name).all_rows())

    def captions(self) -> Iterator[str]:
        """Every caption, with repetitions."""
        for name, entry in self.shards.items():
            if entry["clips"]:
                yield from (caption for row in self._shard(name).all_rows() for caption in row["captions"])

    def batch(self, bucket: Bucket, ids: list[int], frames: int) -> LatentBatch:
        """The clips `ids` of a bucket, cut to their first `frames` pixel frames. Raises `UserError` for a damaged clip."""
        f = latent_frames(frames)
        rows, columns = [], {}
        for i in ids:
            row, tensors = self._shard(self.clips[bucket][i][0]).read(self.clips[bucket][i][1])
            rows.append(row)
            for name, t in tensors.items():
                columns.setdefault(name, []).append(t[:, :f] if name in ("latents", "shown") else t)
        stacked = {name: torch.stack(column) for name, column in columns.items()}
        cameras = [
            Trajectory(c2w[:frames], k[:frames]) if float(k[0, 0]) > 0 else None
            for c2w, k in zip(stacked["c2w"], stacked["intrinsics"], strict=True)
        ]
        lone = stacked["keyframes"].float(), stacked["keyframe_times"]
        first = {name: stacked[name].float() for name in ("shown", "seen") if name in stacked}
        first |= {"tracks": stacked["tracks"][:, :, :frames].float()} if "tracks" in stacked else {}
        if "references" in stacked:
            first |= {"references": stacked["references"].float(), "pictured": [row["references"] for row in rows]}
        captions, names = [row["captions"] for row in rows], [row["name"] for row in rows]
        weights = [row.get("weights", [1.0] * len(row["captions"])) for row in rows]
        first |= {"shots": [[(j, n) for j, n in row.get("shots", ()) if j < f] or None for row in rows]}
        return LatentBatch(ids, stacked["latents"].float(), *lone, captions, weights, cameras, **first, names=names, whole=bucket.frames)

    def _shard(self, name: str) -> _Shard:
        if name in self._open:
            self._open.move_to_end(name)
        else:
            if name in self._suspect:
                if sha256(self.folder / name) != self.shards[name]["sha256"]:
                    raise self._damaged(name, "has changed since it was written")
                self._suspect.discard(name)
            self._open[name] = _Shard(self.folder / name, self._damaged)
            if len(self._open) > OPEN:
                self._open.popitem(last=False)
        return self._open[name]

    def _damaged(self, name: str, what: str) -> UserError:
        return UserError(f"latent cache {self.folder} is damaged: {name} {what}; run kling-encode with verify=true to remake it")


class _Shard:
    """An open shard, read row by row."""

    def __init__(self, path: Path, damaged: Callable[[str, str], UserError]) -> None:
        self.path, self.damaged = path, damaged
        try:
            self.file = safe_open(path, framework="pt")
            there = set(self.file.keys())
            self.names = sorted(there - {ROWS, ENDS, SUMS})
            self.slices = {name: self.file.get_slice(name) for name in (*self.names, *({ROWS} & there))}
            self.old_rows: list[dict] | None = None
            if ROWS in there:
                self.ends, self.sums = [0, *self.file.get_tensor(ENDS).tolist()], self.file.get_tensor(SUMS).tolist()
            else:  # an older cache
                self.old_rows = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        except (SafetensorError, OSError, ValueError) as error:
            raise damaged(path.name, f"cannot be read ({error})") from None

    def read(self, row: int) -> tuple[dict, dict[str, Tensor]]:
        """(row, tensors) of a clip."""
        tensors = {name: self.slices[name][row] for name in self.names}
        if self.old_rows is not None:
            return self.old_rows[row], tensors
        line = self._line(row)
        if checksum(tensors, line) != self.sums[row]:
            raise self.damaged(self.path.name, f"has changed since it was written (clip {row})")
        return json.loads(line), tensors

    def all_rows(self) -> Iterator[dict]:
        """All rows, without the tensors."""
        if self.old_rows is not None:
            yield from self.old_rows
        else:
            yield from (json.loads(self._line(row)) for row in range(len(self.sums)))

    def _line(self, row: int) -> bytes:
        return self.slices[ROWS][self.ends[row] : self.ends[row + 1]].numpy().tobytes()


def checksum(tensors: Mapping[str, Tensor], line: bytes) -> int:
    """CRC-32 of one clip's tensors, in the order of their names, and of its line."""
    sum_ = zlib.crc32(line)
    for name in sorted(tensors):
        sum_ = zlib.crc32(tensors[name].contiguous().view(-1).view(torch.uint8).numpy(), sum_)
    return sum_


def _packed(tensors: Mapping[str, Tensor], rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """The additional tensors of a shard: the rows of its clips as JSON lines, where each ends, and the clips' checksums."""
    lines = [as_line(row) for row in rows]
    sums = [checksum({name: t[i] for name, t in tensors.items()}, line) for i, line in enumerate(lines)]
    text = torch.frombuffer(bytearray(b"".join(lines)), dtype=torch.uint8)
    return {ROWS: text, ENDS: torch.tensor(list(accumulate(map(len, lines)))), SUMS: torch.tensor(sums)}


def differences(was: dict[str, Any], now: dict[str, Any]) -> str:
    """The difference between a cache's settings and others, in words for an error message."""
    a, b = flatten(was), flatten(now)
    changed = [f"{key} {a.get(key, 'absent')!r}, now {b.get(key, 'absent')!r}" for key in sorted(a | b) if a.get(key) != b.get(key)]
    return f"with other settings ({'; '.join(changed)})" if changed else "with another VAE"


def read_index(path: Path) -> dict[str, Any]:
    """Read an index. Raises `UserError` if it is missing or invalid."""
    try:
        index = parse_json(path.read_text(encoding="utf-8"))
        for entry in index["shards"].values():
            if entry["clips"] and not (is_a(entry["bytes"], int) and is_a(entry["aspect"], str) and is_a(entry["sha256"], str)):
                raise ValueError
        if not is_a(index["settings"]["data"]["frames"], list[int]):
            raise ValueError
        return {name: index[name] for name in ("key", "settings", "shards")}
    except OSError:
        raise UserError(f"latent cache {path.parent} does not exist: make it with kling-encode") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"latent cache {path.parent} is damaged: {path.name} is not readable; delete it and run kling-encode") from None


def read_stamps(folder: Path) -> dict[str, int]:
    """Modification time of each shard when it last matched the index, in ns; {} if none is recorded."""
    try:
        stamps = json.loads((folder / STAMPS).read_text(encoding="utf-8"))
        return stamps if isinstance(stamps, dict) else {}
    except (OSError, ValueError):
        return {}


def _write_if_new(path: Path, text: str) -> None:
    """Write a file unless it already holds `text`. Several trainings may start at once on a complete cache; then none of them writes."""
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_atomic(path, text)


def _stat(path: Path) -> tuple[int, int] | None:
    """(modification time in ns, bytes); None if there is no such file."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size
