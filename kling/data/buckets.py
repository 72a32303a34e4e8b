"""Batches of one shape each: clips sorted by aspect and length, as many in a batch as make the same number of tokens.

The batch at a place is a pure function of (seed, place). With place = step * ranks + rank, the order of clips is the same whatever the
number of workers and processes, and a run that is resumed, on more or fewer of them, goes on in it.
"""

from __future__ import annotations

import random
from collections.abc import Hashable, Mapping
from typing import Generic, NamedTuple, TypeVar

from kling.shapes import aspect_size, latent_frames

K = TypeVar("K", bound=Hashable)


class Bucket(NamedTuple):
    """Clips of one shape."""

    aspect: str
    frames: int  # pixel frames

    def __str__(self) -> str:
        return f"{self.aspect} x {self.frames}"

    @property
    def volume(self) -> int:
        """Latent frames times pixels: what tokens are proportional to, whatever the model's patches."""
        H, W = aspect_size(self.aspect)
        return latent_frames(self.frames) * H * W


def batch_sizes(buckets: list[Bucket], batch: int, largest: Bucket | None = None) -> dict[Bucket, int]:
    """Clips in a batch of each bucket: `batch` of the largest, and of the others as many as fit into its tokens."""
    budget = batch * (largest or max(buckets, key=lambda bucket: bucket.volume)).volume
    return {bucket: max(1, budget // bucket.volume) for bucket in buckets}


class Epochs(Generic[K]):
    """The endless order of batches over buckets of `items[key]` clips, `sizes[key]` in a batch.

    An epoch shuffles every bucket, cuts it into batches and shuffles these. A last short batch is filled from the start of its own
    bucket's order: every clip is used in every epoch, however small its bucket, and some of them twice or more (`uses`).
    """

    def __init__(self, items: Mapping[K, int], sizes: Mapping[K, int], seed: int) -> None:
        self.items, self.sizes, self.seed = dict(items), dict(sizes), seed
        self.per_epoch = sum(-(-n // self.sizes[key]) for key, n in self.items.items())
        self._epoch: tuple[int, list[tuple[K, list[int]]]] = (-1, [])

    def __getitem__(self, place: int) -> tuple[int, K, list[int]]:
        """(epoch, bucket, numbers of the clips in it) of the batch at a place."""
        epoch, i = divmod(place, self.per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = epoch, self._plan(epoch)
        return epoch, *self._epoch[1][i]

    def uses(self) -> dict[K, tuple[int, int]]:
        """(least, most) times that a clip of each bucket is used in an epoch."""
        slots = {key: -(-n // self.sizes[key]) * self.sizes[key] for key, n in self.items.items()}
        return {key: (slots[key] // n, -(-slots[key] // n)) for key, n in self.items.items()}

    def report(self) -> str:
        """One line a bucket: clips, batches, and how often a clip is used in an epoch."""
        lines = []
        for key, (least, most) in self.uses().items():
            n, size = self.items[key], self.sizes[key]
            often = f"{least}" if least == most else f"{least} or {most}"
            lines.append(f"{key}: {n} clips in {-(-n // size)} batches of {size}, each clip {often} times an epoch")
        return "\n".join(lines)

    def _plan(self, epoch: int) -> list[tuple[K, list[int]]]:
        rng = random.Random(f"epoch/{self.seed}/{epoch}")
        plan = []
        for key, n in self.items.items():
            size = self.sizes[key]
            order = rng.sample(range(n), n)
            order += (order * size)[: -n % size]
            plan += [(key, order[i : i + size]) for i in range(0, len(order), size)]
        rng.shuffle(plan)
        return plan
