"""Counter-based randomness: a draw is a function of (seed, purpose, step, sample id) only.

No global generator is read or advanced, so that process count, batch order, accumulation, workers and resuming change no draw, and no
generator state has to be saved. All draws are made on the CPU in fp32 and then moved: every device gets the same numbers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import torch
from torch import Tensor

from kling.runtime.device import upload


def derive_seed(seed: int, *ids: int | str) -> int:
    """A 32-bit seed from `seed` and a name such as ("noise", step, sample).

    Stable across processes and Python versions (unlike `hash`). It has 32 bits because torch's CPU generator ignores the rest of a seed:
    among 65 536 names a collision is about as likely as not; it repeats one draw of a training and biases nothing.
    """
    name = json.dumps([int(seed), *(i if isinstance(i, str) else int(i) for i in ids)])
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "little")


def generator(seed: int, *ids: int | str) -> torch.Generator:
    """A CPU generator for one purpose: `generator(cfg.seed, "mask", step, sample_id)`."""
    return torch.Generator().manual_seed(derive_seed(seed, *ids))


def noise_like(x: Tensor, seed: int, purpose: str, step: int, samples: Sequence[int]) -> Tensor:
    """Normal noise of x's shape, device and dtype; row i depends on (seed, purpose, step, samples[i]) only. x (b, ...)"""
    rows = [torch.randn(x.shape[1:], generator=generator(seed, purpose, step, s)) for s in _of_batch(samples, x)]
    return upload(torch.stack(rows).to(x.dtype), x.device)


def permutation(n: int, seed: int, *ids: int | str) -> list[int]:
    """A shuffled range(n), for example the order of an epoch: `permutation(len(data), cfg.seed, "epoch", epoch)`."""
    return torch.randperm(n, generator=generator(seed, *ids)).tolist()


def _of_batch(samples: Sequence[int], x: Tensor) -> Sequence[int]:
    if len(samples) != x.shape[0]:
        raise ValueError(f"{len(samples)} sample ids for a batch of {x.shape[0]}")
    return samples
