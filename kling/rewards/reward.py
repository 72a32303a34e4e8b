"""What a reward is, and the sum of several."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kling.errors import UserError, unknown
from kling.sampling.request import Request

Score = Callable[[Tensor, Sequence[Request], Sequence[Any]], Tensor]


@dataclass(frozen=True)
class Reward:
    """terms: names of what it measures. score(videos (b, T, H, W, 3) uint8 on the CPU, b requests, b truths) -> (b, terms), each in [0, 1]
    and more for better; NaN where a term does not apply to the request. A truth is None if nothing is known."""

    terms: tuple[str, ...]
    score: Score


class Judge:
    """Several rewards, of which some terms count. weights: by term. beside: further terms to measure, which do not count.

    Raises `UserError` for a term that no reward has, one that counts and is held out, and weights that are no numbers above 0.
    """

    def __init__(self, rewards: Sequence[Reward], weights: Mapping[str, float], beside: Iterable[str] = ()) -> None:
        known = [term for reward in rewards for term in reward.terms]
        self.weights, self.terms = dict(weights), (*weights, *beside)
        for term in self.terms:
            if term not in known:
                raise unknown("reward", term, known)
        for term, weight in weights.items():
            if not 0 < weight < math.inf:
                raise UserError(f"rewards.{term} = {weight:g}: give a number above 0, or leave it out")
        if not self.terms:
            raise UserError("rewards is empty: give a weight to at least one of " + ", ".join(known))
        if both := sorted(set(weights) & set(beside)):
            raise UserError(f"'{both[0]}' is in rewards and in checker: what checks must not be rewarded; leave it out of one")
        self._used = [reward for reward in rewards if set(reward.terms) & set(self.terms)]

    def __call__(self, videos: Tensor, requests: Sequence[Request], truths: Sequence[Any]) -> Tensor:
        """The terms of clips (b, T, H, W, 3) uint8, (b, terms) in the order of `terms`."""
        found = {}
        for reward in self._used:
            found |= dict(zip(reward.terms, reward.score(videos, requests, truths).float().unbind(dim=1), strict=True))
        return torch.stack([found[term] for term in self.terms], dim=1)

    def total(self, terms: Tensor) -> Tensor:
        """The weighted sum of those that count, (b, terms) -> (b,). Terms that do not apply to a request count as 0."""
        weights = torch.tensor([*self.weights.values()])
        return terms[:, : len(weights)].nan_to_num(0) @ weights
