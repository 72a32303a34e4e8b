"""Batches of a latent cache: their order, and the ones that each process takes."""

from __future__ import annotations

from torch.utils.data import Dataset

from kling.cache.store import LatentBatch, LatentCache
from kling.data.buckets import Epochs, cuts_of
from kling.errors import UserError
from kling.runtime.parallel import Layout


class LatentSteps(Dataset):
    """Batch of place p = step * ranks + rank, as a function of (seed, p) alone, in the order of `Epochs`.

    batch: clips of the largest shape that is drawn; of the others there are as many as make the same tokens. frames: lengths to draw from,
    a longer clip is cut. group: places in a row that share a shape. Raises `UserError` if a bucket is shorter than all lengths.
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
    """The batches that one process takes, in order: number k is place `first + k · ranks + rank` of the run's endless row of batches.

    So the row is walked once and in order whatever the number of processes and of accumulated micro-steps, also when they change.
    """

    def __init__(self, steps: Dataset, first: int, layout: Layout) -> None:
        self.steps, self.first, self.layout = steps, first, layout

    def place(self, k: int) -> int:
        return self.first + k * self.layout.ranks + self.layout.rank

    def __getitem__(self, k: int) -> LatentBatch:
        return self.steps[self.place(k)]
