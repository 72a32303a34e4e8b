"""What stays the same over the steps of one walk: the places of its tokens, and the keys and values of its text."""

from __future__ import annotations

from torch import Tensor

from kling.nn.attention import Kept


class WalkCache:
    """Given to every forward pass of a walk with the same text, positions and size; the first one fills it, the others read it.

    For sampling only: it is right as long as weights and text stay what they were. Costs 2 · l · d numbers a layer for l text tokens.
    """

    def __init__(self, layers: int) -> None:
        self.rotation: Tensor | None = None  # (b | 1, n, 1, head_dim / 2, 2)
        self.layers: list[Kept] = [{} for _ in range(layers)]
