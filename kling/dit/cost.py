"""Floating-point operations of a pass through the transformer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def forward_flops(config: Mapping[str, Any], tokens: int, text_tokens: int) -> float:
    """Operations of one clip of n tokens and l text tokens, two for each multiply-add.

    L layers of width d and feed-forward width f: L (12 n d² + 4 n d f + 4 l d² + 4 n² d + 4 n l d), the matrix products only; the
    embeddings, norms and the head are below 1 %. A training step is three times this; recomputed activations are not counted.
    """
    n, l = tokens, text_tokens
    d, f = config["num_attention_heads"] * config["attention_head_dim"], config["ffn_dim"]
    return float(config["num_layers"]) * (12 * n * d * d + 4 * n * d * f + 4 * l * d * d + 4 * n * n * d + 4 * n * l * d)
