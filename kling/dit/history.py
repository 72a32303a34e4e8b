"""The memory of a block-causal model: the keys and values of earlier frames' tokens, for each layer."""

from __future__ import annotations

import torch
from torch import Tensor


class LayerHistory:
    """Keys and values (b, n, heads, head_dim) of one layer, rotated to their positions in time."""

    def __init__(self) -> None:
        self.past: tuple[Tensor, Tensor] | None = None
        self.keep = False

    def join(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Past and present, concatenated along the tokens. If `keep` is set, the present is added to the past."""
        if self.past is not None:
            key, value = torch.cat([self.past[0], key], dim=1), torch.cat([self.past[1], value], dim=1)
        if self.keep:
            self.past = key, value
        return key, value


class History:
    """One entry per layer: read in every forward pass that gets it, and extended in passes with `keep`."""

    def __init__(self, layers: int) -> None:
        self.layers = [LayerHistory() for _ in range(layers)]

    def keep(self, keep: bool) -> None:
        for layer in self.layers:
            layer.keep = keep
