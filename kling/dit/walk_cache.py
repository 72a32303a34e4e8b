"""Values that are the same in all steps of a walk: rotations of its tokens, camera, tracks, and the keys and values of its text."""

from __future__ import annotations

from torch import Tensor

from kling.nn.attention import Kept


class WalkCache:
    """Passed to all forward passes of a walk with the same text, camera, positions and size; the first one fills it, the others read it.

    For sampling only: it is valid as long as weights, text, camera and tracks are unchanged. `still` has "rotation" (b | 1, n, 1,
    head_dim / 2, 2), and "camera" and "tracks" (b, n, d) each, which are added to the tokens. text: also keep its keys and values,
    2 · l · d numbers per layer for l text tokens. beside: the cache of another text in the same walk, whose `still` is shared.
    """

    def __init__(self, layers: int, text: bool = True, beside: WalkCache | None = None) -> None:
        self.still: dict[str, Tensor] = {} if beside is None else beside.still
        self.layers: list[Kept | None] = [Kept() if text else None for _ in range(layers)]
