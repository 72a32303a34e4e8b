"""Batches of one shape each: clips are sorted by aspect and length, and batches of all shapes have about the same number of tokens.

The batch at a place is a pure function of (seed, place). With place = step * ranks + rank, the order of clips does not depend on the
number of workers and processes, and a run that is resumed on more or fewer of them continues the same order.

A step waits for its slowest process. So `group` consecutive places have the same shape: if the number of processes divides `group`, all
processes have equal work in every step, whatever the lengths and however few clips are in a batch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from kling.shapes import aspect_size, latent_frames

K = TypeVar("K", bound=Hashable)
PADDING = 0.1  # share of an epoch's batches, at most about, that only fill up groups and batches


class Bucket(NamedTuple):
    """Clips of one shape."""

    aspect: str
    frames: int  # pixel frames

    def __str__(self) -> str:
        return f"{self.aspect} x {self.frames}"

    @property
    def volume(self) -> int:
        """Latent frames times pixels; proportional to the number of tokens for any patch size."""
        H, W = aspect_size(self.aspect)
        return latent_frames(self.frames) * H * W


@dataclass(frozen=True)
class Cut:
    """One shape into which clips of a bucket are cut: the first `frames` pixel frames, `size` clips per batch, for `share` of the clips."""

    frames: int
    size: int
    share: float


def cuts_of(buckets: Sequence[Bucket], batch: int, frames: Sequence[int] | None = None) -> dict[Bucket, list[Cut]]:
    """The cuts of each bucket: whole clips, or the lengths `frames`, each as often as it is listed, up to the bucket's own length.

    A batch holds `batch` clips of the largest shape, and more clips of smaller shapes so that the number of tokens is the same. A bucket
    shorter than all lengths has no cut.
    """
    lengths = {bucket: [T for T in frames if bucket.frames >= T] if frames is not None else [bucket.frames] for bucket in buckets}
    shapes = {bucket: {T: Bucket(bucket.aspect, T).volume for T in sorted(set(lengths[bucket]))} for bucket in buckets}
    budget = batch * max((volume for volumes in shapes.values() for volume in volumes.values()), default=0)
    return {
        bucket: [Cut(T, max(1, budget // volume), lengths[bucket].count(T) / len(lengths[bucket])) for T, volume in volumes.items()]
        for bucket, volumes in shapes.items()
    }


class Epochs(Generic[K]):
    """The endless order of batches over buckets of `items[key]` clips, cut by `cuts[key]`, in groups of `group` batches of one shape.

    An epoch uses all clips `rounds` times: once if that fills whole groups of batches with little padding, more often if there are few
    clips. The groups of all shapes are shuffled, and each takes the next clips of its bucket, which is reshuffled in every round. So every
    clip is used in every epoch, and the clips of a bucket are used equally often, up to a difference of one (`uses`).
    """

    def __init__(self, items: Mapping[K, int], cuts: Mapping[K, Sequence[Cut]], seed: int, group: int = 1) -> None:
        self.items, self.cuts, self.seed, self.group = dict(items), {key: list(cuts[key]) for key in items}, seed, group
        self.shapes = [(key, cut) for key in self.items for cut in self.cuts[key]]
        exact = [self.items[key] * cut.share / cut.size / group for key, cut in self.shapes]  # groups that each shape needs for one round
        self.rounds = math.ceil(len(self.shapes) / 2 / PADDING / sum(exact))
        self.counts = [max(1, round(self.rounds * groups)) for groups in exact]
        for key, n in self.items.items():
            mine = [i for i, (other, _) in enumerate(self.shapes) if other == key]
            common = max(mine, key=lambda i: exact[i])
            lacking = self.rounds * n - sum(self._clips(i) for i in mine)
            self.counts[common] += max(0, -(-lacking // (self.shapes[common][1].size * group)))
        self.per_epoch = sum(self.counts) * group
        self._epoch: tuple[int, _Plan | None] = (-1, None)

    def __getitem__(self, place: int) -> tuple[int, K, int, list[int]]:
        """(round, bucket, pixel frames, clip numbers in the bucket) of the batch at a place."""
        epoch, i = divmod(place, self.per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = epoch, self._plan(epoch)
        plan = self._epoch[1]
        group, within = divmod(i, self.group)
        shape = int(plan.shapes[group])
        key, cut = self.shapes[shape]
        first = int(plan.starts[group]) + within * cut.size
        return (
            epoch * self.rounds + first // self.items[key],
            key,
            cut.frames,
            plan.clips[key].take(range(first, first + cut.size)).tolist(),
        )

    def uses(self) -> dict[K, tuple[int, int]]:
        """(least, most) times that a clip of each bucket is used in an epoch."""
        slots = {key: sum(self._clips(i) for i, (other, _) in enumerate(self.shapes) if other == key) for key in self.items}
        return {key: (slots[key] // n, -(-slots[key] // n)) for key, n in self.items.items()}

    def report(self) -> str:
        """One line per bucket: clips, batches, and how often a clip is used in an epoch."""
        lines = []
        for key, (least, most) in self.uses().items():
            often = f"{least}" if least == most else f"{least} or {most}"
            mine = [(self.counts[i] * self.group, cut) for i, (other, cut) in enumerate(self.shapes) if other == key]
            cuts = ", ".join(f"{count} batches of {cut.size} x {cut.frames} frames" for count, cut in mine)
            lines.append(f"{key}: {self.items[key]} clips in {cuts}, each clip {often} times an epoch")
        return "\n".join(lines)

    def _clips(self, i: int) -> int:
        """Clips that shape `i` takes in an epoch, with repetition."""
        return self.counts[i] * self.group * self.shapes[i][1].size

    def _plan(self, epoch: int) -> _Plan:
        order = _shuffled(f"epoch/{self.seed}/{epoch}", sum(self.counts))
        shapes = np.repeat(np.arange(len(self.shapes), dtype=np.int32), self.counts)[order]  # (groups,)
        starts, clips = np.zeros(len(shapes), np.int64), {}
        for key, n in self.items.items():
            taken = np.array([cut.size * self.group if other == key else 0 for other, cut in self.shapes])[shapes]  # (groups,)
            after = np.cumsum(taken)
            starts += np.where(taken > 0, after - taken, 0)
            rounds = (_shuffled(f"clips/{self.seed}/{epoch}/{key}/{i}", n) for i in range(-(-int(after[-1]) // n)))
            clips[key] = np.concatenate(list(rounds))
        return _Plan(shapes, starts, clips)


@dataclass(frozen=True)
class _Plan:
    """An epoch: shape and first clip of each group (groups,), and the clips of each bucket in the order in which groups take them."""

    shapes: np.ndarray
    starts: np.ndarray
    clips: dict[Hashable, np.ndarray]


def _shuffled(name: str, n: int) -> np.ndarray:
    """A permutation of 0 … n - 1 seeded by `name`. It uses RandomState, whose streams never change (NEP 19), unlike Generator's."""
    words = np.frombuffer(hashlib.sha256(name.encode()).digest(), np.uint32)
    return np.random.RandomState(words).permutation(n).astype(np.uint32)
