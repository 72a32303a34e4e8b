"""Batches of a latent cache: their order, and the batches that each process takes."""

from __future__ import annotations

from torch.utils.data import Dataset

from kling.cache.store import LatentBatch, LatentCache
from kling.data.buckets import Epochs, cuts_of
from kling.errors import UserError
from kling.runtime.parallel import Layout


class LatentSteps(Dataset):
    """The batch at place p = step * ranks + rank, a function of (seed, p) only, in the order of `Epochs`.

    batch: clips of the largest shape drawn; smaller shapes have more clips, for the same number of tokens. frames: lengths to draw from; a
    longer clip is cut. group: consecutive places of the same shape. Raises `UserError` if a bucket is shorter than all lengths.
    """

    def __init__(self, cache: LatentCache, batch: int, frames: list[int], seed: int, group: int = 1) -> None:
        self.cache, self.frames, self.seed = cache, frames, seed
        for bucket in cache.clips:
            if bucket.frames < min(frames):
                raise UserError(
                    f"latent cache {cache.folder} holds clips of {bucket.frames} frames, frames is {frames}: add {bucket.frames}"
                )
        items = {bucket: len(places) for bucket, places in cache.clips.items()}
        self.epochs = Epochs(items, cuts_of(list(items), batch, frames), seed, group)
        self.per_epoch = self.epochs.per_epoch

    def __getitem__(self, place: int) -> LatentBatch:
        _, bucket, frames, ids = self.epochs[place]
        return self.cache.batch(bucket, ids, frames)

    def names(self, place: int) -> list[str]:
        return self[place].names


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
