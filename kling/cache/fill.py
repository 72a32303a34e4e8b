"""Filling a latent cache: what is missing of its plan is read, encoded and written, shard by shard."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from itertools import islice
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset

from kling.cache.encode import encode_clips, first_frames
from kling.cache.plan import CacheConfig, Shard, plan_shards, settings_of
from kling.cache.store import INDEX, STAMPS, cache_keys, differences, file_state, packed_rows, read_index, read_stamps
from kling.condition.state import MOST_REFERENCES
from kling.data.clips import ClipSample
from kling.data.manifest import MissingClip
from kling.data.source import ClipSource, batches, check_data, packed, rendered, unpacked
from kling.errors import UserError
from kling.runtime.files import sha256, write_atomic, writing
from kling.text.encoder import prompt_bytes
from kling.vae import AutoencoderKLKling

UNRENDERED = 32  # clips that each worker has ready for a GPU, 10 kB each


def fill_cache(
    cfg: CacheConfig, vae: AutoencoderKLKling, rank: int = 0, ranks: int = 1, wait: Callable[[], None] = lambda: None,
    clip_tokens: Callable[[Tensor], Tensor] | None = None, precision: str = "fp32",
    hold: Callable[[], AbstractContextManager] = nullcontext, late: bool | None = None,
) -> Iterator[tuple[int, int]]:  # fmt: skip
    """Encode the missing shards; yields (clips done, clips in all) after every shard, counting the shards that exist already.

    Process `rank` of `ranks` takes every ranks-th missing shard; `wait` is a barrier for all of them.
    clip_tokens: a picture uint8 (H, W, 3) -> its CLIP tokens (i, e), for `cfg.image` and weights that take them.
    precision: fp32 or bf16. hold: keeps other runs from writing to the folder while shards are made. late: render the clips of the world
    shard by shard on the VAE's device, rather than one by one in the workers; None: if that device is a GPU.

    Raises `MissingClip` if a clip's file is gone, unless `cfg.skip_missing`; finished shards stay.
    """
    check_data(cfg.data)
    source = ClipSource(cfg.data, cfg.seed)
    plan, settings = list(plan_shards(cfg, source)), settings_of(cfg)
    tracked = source.manifest is not None and any(shot.tracks for shot in source.manifest.manifest.shots)
    places = cfg.references if source.manifest is None else MOST_REFERENCES * source.manifest.has_references
    late = source.manifest is None and (vae.device.type == "cuda" if late is None else late)

    writer = CacheWriter(cfg.out, cache_keys(vae, settings), settings, rank, cfg.verify, cfg.skip_missing)
    with hold() if any(shard not in writer for shard in plan) else nullcontext():
        writer.look()  # again: another run may have made some before this one locked the folder
        missing = [shard for shard in plan if shard not in writer]
        wait()  # all processes have listed the existing shards before one adds to them
        mine = missing[rank::ranks]
        total = sum(len(shard.numbers) for shard in plan)
        done = total - sum(len(shard.numbers) for shard in mine)
        yield done, total
        dataset = _Clips(source, mine, cfg.skip_missing, cfg.references, late)
        clips = batches(dataset, 0, len(dataset.places), cfg.workers, ahead=UNRENDERED if late else 2)
        for shard in mine:
            ends = sorted(T for T in set(cfg.data.frames) if 1 < T <= shard.bucket.frames)
            there = [(n, sample) for n, sample in zip(shard.numbers, islice(clips, len(shard.numbers)), strict=True) if sample is not None]
            tensors, rows, samples = {}, [], [sample for _, sample in there]
            samples = rendered([unpacked(sample) for sample in samples], vae.device) if late else samples
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


class CacheWriter:
    """Writes the shards of one process. A shard in the index with the right hash and contents is never made again.

    keys: see `cache_keys`; it writes the first. verify: compare all hashes, not only those of files that have changed since. lacking:
    accept shards in which clips are missing.
    """

    def __init__(
        self, folder: str | Path, keys: tuple[str, str], settings: dict[str, Any], rank: int = 0, verify: bool = False,
        lacking: bool = False,
    ) -> None:  # fmt: skip
        self.folder, self.keys, self.settings, self.own = Path(folder), keys, settings, f"index.{rank}.json"
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
            temporary = path.with_suffix(".tmp")  # one name: what a kill leaves is written over
            try:
                with writing(path):
                    temporary.touch()
                    mode = temporary.stat().st_mode  # follows the user's umask; safetensors replaces the file by one of mode 600
                    save_file(tensors | packed_rows(tensors, rows), temporary)
                    temporary.chmod(mode)
                    temporary.replace(path)
                    path.with_suffix(".json").unlink(missing_ok=True)  # rows of an older version of this shard
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
            if index["key"] not in self.keys:
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
            elif (there := file_state(self.folder / name)) and there[1] == entry["bytes"]:
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
        index = {"key": self.keys[0], "settings": self.settings, "shards": dict(sorted(shards.items()))}
        _write_if_new(self.folder / name, json.dumps(index, indent=1))


class _Clips(Dataset):
    """The clips of a list of shards in order, so that workers read them ahead. skip_missing: None for a clip whose file is gone.
    references: of each clip of the world. late: clips of the world that are not rendered yet, `packed`."""

    def __init__(self, source: ClipSource, shards: list[Shard], skip_missing: bool, references: int, late: bool) -> None:
        self.source, self.skip_missing, self.references, self.late = source, skip_missing, references, late
        self.places = [(shard.bucket, number, shard.split) for shard in shards for number in shard.numbers]

    def __getitem__(self, i: int) -> ClipSample | bytes | None:
        bucket, number, split = self.places[i]
        if not self.source.manifest:
            clip = self.source.unrendered(number, bucket.frames, bucket.aspect, split, self.references)
            return packed(clip) if self.late else rendered([clip])[0]
        try:
            return self.source.manifest.clip(bucket, number)
        except MissingClip as error:
            if self.skip_missing:
                return None
            raise MissingClip(f"{error}, or leave out what is gone with skip_missing=true") from None


def _write_if_new(path: Path, text: str) -> None:
    """Write a file unless it already holds `text`. Several trainings may start at once on a complete cache; then none of them writes."""
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_atomic(path, text)
