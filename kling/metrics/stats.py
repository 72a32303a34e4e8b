"""Confidence intervals of numbers measured on n samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Z95 = 1.959964


def wilson(hits: int, n: int, z: float = Z95) -> tuple[float, float]:
    """95 % interval of a rate (Wilson 1927), which stays inside [0, 1] and is valid at 0 and n hits. (0, 1) for n = 0.

    >>> [round(x, 3) for x in wilson(9, 10)]
    [0.596, 0.982]
    """
    if n == 0:
        return 0.0, 1.0
    rate, z2 = hits / n, z * z / n
    middle = (rate + z2 / 2) / (1 + z2)
    half = z / (1 + z2) * math.sqrt(rate * (1 - rate) / n + z2 / (4 * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def row_means(x: Tensor) -> Tensor:
    """(draws, n) -> (draws,)"""
    return x.mean(dim=1)


def row_medians(x: Tensor) -> Tensor:
    """(draws, n) -> (draws,); for an even n the mean of the two middle values."""
    return x.quantile(0.5, dim=1)


def bootstrap(values: Sequence[Any], seed: int = 0, draws: int = 2000, of: Callable[[Tensor], Tensor] = row_means) -> tuple[float, float]:
    """95 % percentile interval of the mean, or of another statistic `of` rows, by resampling with a fixed seed; nan for no values. They are
    numbers, or pairs of them."""
    if not values:
        return math.nan, math.nan
    x = torch.tensor(values, dtype=torch.float64)
    picks = torch.randint(len(x), (draws, len(x)), generator=torch.Generator().manual_seed(seed))
    low, high = of(x[picks]).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def rate(hits: Sequence[bool]) -> dict[str, float]:
    """A share of `hits` as an entry of a report: value, low, high, n."""
    low, high = wilson(sum(hits), len(hits))
    return {"value": sum(hits) / len(hits) if hits else math.nan, "low": low, "high": high, "n": len(hits)}


def mean(values: Sequence[float]) -> dict[str, float]:
    """A mean as an entry of a report: value, low, high, n."""
    low, high = bootstrap(values)
    return {"value": sum(values) / len(values) if values else math.nan, "low": low, "high": high, "n": len(values)}
