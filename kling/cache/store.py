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
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kling.cameras.trajectory import Trajectory
from kling.config import flatten, is_a
from kling.data.buckets import Bucket
from kling.data.manifest import as_line
from kling.data.source import DataConfig
from kling.errors import UserError
from kling.runtime.files import parse_json, sha256
from kling.shapes import latent_frames
from kling.vae import AutoencoderKLKling

INDEX, STAMPS = "index.json", "stamps.json"
ROWS, ENDS, SUMS = "rows", "row_ends", "row_sums"  # in a shard, next to the tensors of its clips
ENCODING = ("encoder.", "quant_conv.")  # weights of a VAE that its latents depend on
OPEN = 1024  # shards that a reader keeps mapped
NAMED = 3  # clips that an error message names


def cache_keys(vae: AutoencoderKLKling, settings: dict[str, Any]) -> tuple[str, str]:
    """Hashes of everything that determines the encoding, settings and weights: a cache with another key is another cache. The first is over
    the part of the VAE that encodes, so that a cache outlives a tuned decoder; the second, over all of it, is that of older caches."""
    digest, older = (hashlib.sha256(json.dumps(settings, sort_keys=True).encode()) for _ in range(2))
    for name, tensor in sorted(vae.state_dict().items()):
        numbers = name.encode() + tensor.detach().float().contiguous().cpu().numpy().tobytes()
        older.update(numbers)
        if name.startswith(ENCODING):
            digest.update(numbers)
    return digest.hexdigest(), older.hexdigest()


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

    def first(self, n: int) -> LatentBatch:
        """Its first n clips."""
        return replace(self, **{name: value[:n] for name, value in vars(self).items() if isinstance(value, list | Tensor)})


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

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        index = read_index(self.folder / INDEX)
        self.key, self.settings, self.shards = index["key"], index["settings"], index["shards"]
        self.clips: dict[Bucket, Places] = {}
        self.storyboards: dict[Bucket, list[int]] = {}  # the numbers of the clips of several shots
        self._suspect: set[str] = set()  # shards whose modification time differs from the recorded one
        self._open: OrderedDict[str, _Shard] = OrderedDict()
        stamps = read_stamps(self.folder)
        for name, entry in self.shards.items():
            if not entry["clips"]:
                continue
            there = file_state(self.folder / name)
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
        return set(self._shard(next(iter(self.clips.values())).shards[0]).arrays)

    def check_vae(self, vae: AutoencoderKLKling) -> None:
        """Raises `UserError` unless the latents were made by this VAE."""
        if self.key not in cache_keys(vae, self.settings):
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
        f, places = latent_frames(frames), self.clips[bucket]
        rows, columns = [], {}
        for i in ids:
            shard, row = places[i]
            line, arrays = self._shard(shard).read(row)
            rows.append(line)
            for name, values in arrays.items():
                columns.setdefault(name, []).append(values[:, :, :f] if name in ("latents", "shown") else values)
        stacked = {name: torch.from_numpy(np.concatenate(column)) for name, column in columns.items()}
        known = (stacked["intrinsics"][:, 0, 0] > 0).tolist()
        paths = zip(stacked["c2w"][:, :frames].unbind(), stacked["intrinsics"][:, :frames].unbind(), known, strict=True)
        cameras = [Trajectory(c2w, k) if there else None for c2w, k, there in paths]
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
    """An open shard, mapped into memory and read row by row."""

    def __init__(self, path: Path, damaged: Callable[[str, str], UserError]) -> None:
        self.path, self.damaged = path, damaged
        try:
            with safe_open(path, framework="pt") as file:  # its tensors are views of the map, which they keep
                arrays = {name: file.get_tensor(name).numpy() for name in file.keys()}  # noqa: SIM118 - no dict
            self.text, ends, sums = (arrays.pop(name, None) for name in (ROWS, ENDS, SUMS))
            self.arrays = dict(sorted(arrays.items()))
            self.old_rows: list[dict] | None = None
            if self.text is None:  # an older cache
                self.old_rows = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
            else:
                self.ends, self.sums = [0, *ends.tolist()], sums.tolist()
        except (SafetensorError, OSError, ValueError) as error:
            raise damaged(path.name, f"cannot be read ({error})") from None

    def read(self, row: int) -> tuple[dict, dict[str, np.ndarray]]:
        """(row, its part of every tensor, with a first axis of 1) of a clip."""
        arrays = {name: values[row : row + 1] for name, values in self.arrays.items()}
        if self.old_rows is not None:
            return self.old_rows[row], arrays
        line = self._line(row)
        sum_ = zlib.crc32(line)
        for values in arrays.values():
            sum_ = zlib.crc32(values, sum_)
        if sum_ != self.sums[row]:
            raise self.damaged(self.path.name, f"has changed since it was written (clip {row})")
        return json.loads(line), arrays

    def all_rows(self) -> Iterator[dict]:
        """All rows, without the tensors."""
        if self.old_rows is not None:
            yield from self.old_rows
        else:
            yield from (json.loads(self._line(row)) for row in range(len(self.sums)))

    def _line(self, row: int) -> bytes:
        return self.text[self.ends[row] : self.ends[row + 1]].tobytes()


def checksum(tensors: Mapping[str, Tensor], line: bytes) -> int:
    """CRC-32 of one clip's tensors, in the order of their names, and of its line."""
    sum_ = zlib.crc32(line)
    for name in sorted(tensors):
        sum_ = zlib.crc32(tensors[name].contiguous().view(-1).view(torch.uint8).numpy(), sum_)
    return sum_


def packed_rows(tensors: Mapping[str, Tensor], rows: list[dict[str, Any]]) -> dict[str, Tensor]:
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


def file_state(path: Path) -> tuple[int, int] | None:
    """(modification time in ns, bytes); None if there is no such file."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size
