"""What a cache will hold: its settings, and the shards that follow from them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import accumulate, pairwise
from typing import Any

from kling.condition.state import MOST_REFERENCES
from kling.data.buckets import Bucket
from kling.data.source import SHOTS, ClipSource, DataConfig
from kling.data.world.storyboard import SHORTEST
from kling.errors import UserError


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
    shares: list[float] | None = None  # one for each of data.aspects; null: 3, 1 and 1 for three of them, else even ones
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
    return cfg.shares or ([3.0, 1.0, 1.0] if len(cfg.data.aspects) == 3 else [1.0] * len(cfg.data.aspects))


def plan_shards(cfg: CacheConfig, source: ClipSource) -> Iterator[Shard]:
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
