"""What stays the same over the steps of one walk: the places of its tokens, its camera, and the keys and values of its text."""

from __future__ import annotations

from torch import Tensor

from kling.nn.attention import Kept


class WalkCache:
    """Given to every forward pass of a walk with the same text, camera, positions and size; the first one fills it, the others read it.

    For sampling only: it is right as long as weights, text and camera stay what they were. `still` holds "rotation" (b | 1, n, 1,
    head_dim / 2, 2) and "camera" (b, n, d), what the rays add to the tokens. text: keep its keys and values too, 2 · l · d numbers a
    layer for l text tokens. beside: the cache of another text in the same walk, with which this one shares `still`.
    """

    def __init__(self, layers: int, text: bool = True, beside: WalkCache | None = None) -> None:
        self.still: dict[str, Tensor] = {} if beside is None else beside.still
        self.layers: list[Kept | None] = [Kept() if text else None for _ in range(layers)]
