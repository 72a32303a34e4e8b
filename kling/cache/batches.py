"""Batches of a latent cache: their order, and the batches that each process takes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from torch.utils.data import Dataset

from kling.cache.store import LatentBatch, LatentCache
from kling.data.buckets import Epochs, cuts_of
from kling.errors import UserError
from kling.runtime.parallel import Layout


class LatentSteps(Dataset):
    """The batch at place p = step * ranks + rank, a function of (seed, p) only, in the order of `Epochs`.

    batch: clips of the largest shape drawn; smaller shapes have more clips, for the same number of tokens. frames: lengths to draw from; a
    longer clip is cut. group: consecutive places of the same shape. shots: share of the clips of a shape that are storyboards, where the
    cache has some; 0 leaves them out. Raises `UserError` if a bucket is shorter than all lengths.
    """

    def __init__(self, cache: LatentCache, batch: int, frames: list[int], seed: int, group: int = 1, shots: float = 0.0) -> None:
        self.cache, self.frames, self.seed = cache, frames, seed
        for bucket in cache.clips:
            if bucket.frames < min(frames):
                raise UserError(
                    f"latent cache {cache.folder} holds clips of {bucket.frames} frames, frames is {frames}: add {bucket.frames}"
                )
        self.numbers = {bucket: mixed(len(places), cache.storyboards.get(bucket, []), shots) for bucket, places in cache.clips.items()}
        items = {bucket: len(numbers) for bucket, numbers in self.numbers.items() if len(numbers)}
        if not items:
            raise UserError(f"latent cache {cache.folder} holds storyboards only: set shots, the share of them, or encode other clips too")
        self.epochs = Epochs(items, cuts_of(list(items), batch, frames), seed, group)
        self.per_epoch = self.epochs.per_epoch

    def __getitem__(self, place: int) -> LatentBatch:
        _, bucket, frames, ids = self.epochs[place]
        return self.cache.batch(bucket, [int(self.numbers[bucket][i]) for i in ids], frames)

    def names(self, place: int) -> list[str]:
        return self[place].names


def mixed(clips: int, storyboards: Sequence[int], share: float) -> Sequence[int]:
    """The numbers of a bucket's clips, with repetitions so that `share` of them are of `storyboards`, and every one is there."""
    if not storyboards:
        return range(clips)
    stories = np.asarray(storyboards, np.uint32)
    others = np.delete(np.arange(clips, dtype=np.uint32), stories)
    if share in (0, 1) or not len(others):
        return others if share == 0 else stories
    each = len(others) * share / (1 - share)  # storyboards for every round of the others
    rounds = max(1, math.ceil(len(stories) / each))
    return np.concatenate([np.tile(others, rounds), np.resize(stories, max(1, round(rounds * each)))])


class RankBatches(Dataset):
    """The batches that one process takes, in order: number k is place `first + k · ranks + rank` of the run's endless sequence of batches.

    So the sequence is used once and in order for any number of processes and of accumulated micro-steps, even if these change.
    """

    def __init__(self, steps: Dataset, first: int, layout: Layout) -> None:
        self.steps, self.first, self.layout = steps, first, layout

    def place(self, k: int) -> int:
        return self.first + k * self.layout.ranks + self.layout.rank

    def __getitem__(self, k: int) -> LatentBatch:
        return self.steps[self.place(k)]
