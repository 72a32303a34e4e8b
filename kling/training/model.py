"""The trained module, and which of its activations are kept for the backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from kling.dit import KlingTransformer3DModel
from kling.errors import unknown
from kling.nn.modulation import Levels
from kling.text import ByteTextEncoder
from kling.text.umt5 import UMT5TextEncoder
from kling.training.examples import Example

# names of operations, without their overload; the name of any library's attention contains the word
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "linear", "matmul", "_scaled_mm", "_grouped_mm", "_addmm_activation", "convolution")
CHECKPOINTING = ("none", "selective", "full")


class Trained(nn.Module):
    """The transformer and our text encoder as one module, so that one wrapper serves both on several processes. umT5 is not part of it:
    its embeddings come from the cache. Without a text encoder `forward` takes embeddings."""

    def __init__(self, transformer: KlingTransformer3DModel, text_encoder: ByteTextEncoder | UMT5TextEncoder | None) -> None:
        super().__init__()
        self.transformer, self.text_encoder = transformer, text_encoder

    def words(self, prompts: Sequence[str]) -> tuple[Tensor] | tuple[Tensor, list[int]]:
        """The input of `forward` for prompts: byte ids (b, s) and b lengths, or umT5's embeddings (b, l, e)."""
        if isinstance(self.text_encoder, UMT5TextEncoder):
            return (self.text_encoder.encode(prompts, self.transformer.device).float(),)
        return self.text_encoder.tokenize(prompts)

    def forward(
        self,
        example: Example,
        z: Tensor,
        level: Tensor,
        words: tuple[Tensor] | tuple[Tensor, list[int]],
        end: Tensor | None = None,
        exact: bool = False,
    ) -> Tensor:
        """Velocity of z (b, c, G, h, w) at levels (b,); of a flow map its mean until the levels `end` (b,). exact: without autocast."""
        text = words[0] if len(words) == 1 else self.text_encoder(*words)  # (b, l, e)
        state = example.state
        with torch.autocast(z.device.type, enabled=False) if exact else nullcontext():
            return self._velocity(example, z, state.levels(level, end), text)

    def _velocity(self, example: Example, z: Tensor, levels: Levels, text: Tensor) -> Tensor:
        state = example.state
        return self.transformer(
            z if example.concat is None else torch.cat([z, example.concat], dim=1),
            levels,
            text,
            positions=state.position,
            kinds=state.kind,
            camera=example.cameras,
            camera_mask=example.has_camera,
            tracks=state.tracks,
            shots=state.shot,
            encoder_hidden_states_image=example.seen,
        ).sample  # (b, c, G, h, w)


def set_checkpointing(transformer: KlingTransformer3DModel, what: str) -> None:
    """Choose the activations of a block that are recomputed in the backward pass: none, all cheap ones (selective), or all (full).

    selective keeps the results of matrix products and attention, and recomputes norms, gates and activations.
    """
    if what not in CHECKPOINTING:
        raise unknown("activation_checkpointing", what, CHECKPOINTING)
    if what == "none":
        return
    contexts = {"context_fn": partial(create_selective_checkpoint_contexts, _keep_products)} if what == "selective" else {}
    transformer.enable_gradient_checkpointing(partial(_checkpoint, contexts))


def _checkpoint(contexts: dict[str, Any], block: nn.Module, *args: Any) -> Tensor:
    return checkpoint(block, *args, use_reentrant=False, **contexts)


def _keep_products(_: Any, op: Any, *__: Any, **___: Any) -> CheckpointPolicy:
    name = str(op)  # namespace.name.overload
    keep = "".join(name.split(".")[1:2]) in PRODUCTS or any(part in name for part in ("attention", "attn", "scaled_dot_product"))
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE
