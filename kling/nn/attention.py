"""Multi-head attention with RMS-normalised queries and keys, on whichever attention backend diffusers has been told to use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from diffusers.models.attention import AttentionModuleMixin
from torch import Tensor, nn

from kling.nn.norm import RMSNorm
from kling.nn.rope import rotate
from kling.runtime.diffusers_internals import dispatch_attention_fn


class KeyValues(Protocol):
    """Keys and values (b, n, heads, head_dim) of earlier tokens, attended to in addition to the present ones."""

    def join(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]: ...


class Kept:
    """Keys and values that are the same in all steps of a walk, by the name of their source. Not a dict: diffusers' offloading hooks
    pass copies of the dicts that a block is called with, and what the block put into a copy would be lost."""

    def __init__(self) -> None:
        self.pairs: dict[str, tuple[Tensor, Tensor]] = {}


def once(kept: Kept | None, name: str, make: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The result of `make`, computed once per name if there is a `Kept` to hold it."""
    if kept is None:
        return make()
    if name not in kept.pairs:
        kept.pairs[name] = make()
    return kept.pairs[name]


MOST_KEYS = 2048  # beyond it the scores no longer stay in the cache of a core, and PyTorch's kernel catches up


def by_products(query: Tensor, key: Tensor) -> bool:
    """Whether attention runs as product, softmax, product: in bf16 on a CPU, up to `MOST_KEYS` keys.

    Measured on avx512_bf16 (2026-11-27), 16 clips of 308 tokens, 4 heads of 64: forward and backward 41 ms against 81 ms of PyTorch's
    kernel, whose backward computes in fp32; gradients are 6e-3 from fp32 (5e-3 with PyTorch's). In fp32 that kernel is faster (73 against
    186 ms). This is a fixed rule, not a timing at run time: replay and resume are exact only if the same inputs give the same bits in
    every process.
    """
    return query.device.type == "cpu" and query.dtype == torch.bfloat16 and key.shape[1] <= MOST_KEYS


def attend_by_products(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(Q Kᵀ / √d) V of (b, n, heads, head_dim) and (b, m, heads, head_dim) -> (b, n, heads · head_dim)."""
    b, n, heads, width = query.shape
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query * width**-0.5, key, value))  # (b · heads, n | m, head_dim)
    weights = torch.bmm(q, k.transpose(1, 2)).softmax(-1)  # (b · heads, n, m)
    return torch.bmm(weights, v).unflatten(0, (b, heads)).transpose(1, 2).flatten(2)  # (b, n, heads · head_dim)


class AttentionProcessor:
    """Computes an `Attention`; diffusers sets the backend and the context-parallel configuration here."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,  # (b, n, d)
        encoder_hidden_states: Tensor | None = None,  # (b, l, d), None for self-attention
        rotary_emb: Tensor | None = None,  # (b | 1, n, 1, head_dim / 2, 2)
        encoder_hidden_states_image: Tensor | None = None,  # (b, i, added_kv_proj_dim)
        history: KeyValues | None = None,
        kept: Kept | None = None,  # caches the text's keys and values; not for self-attention, whose tokens change
        rows: Tensor | None = None,  # (b, G) row of the text of each frame, for b · S texts; None: sample i has text i
    ) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        # context-parallel attention exchanges keys between devices; text is whole on each of them
        parallel = self._parallel_config if encoder_hidden_states is None else None

        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))  # (b, n, heads, head_dim)
        key, value = once(kept, "text", lambda: self.keys_values(attn, context, attn.to_k, attn.norm_k, attn.to_v))
        if rotary_emb is not None:
            query, key = rotate(query, rotary_emb), rotate(key, rotary_emb)
        if history is not None:
            key, value = history.join(key, value)
        out = self.attend(query, key, value, parallel) if rows is None else self.attend_by_frame(query, key, value, rows)

        if encoder_hidden_states_image is not None:
            layers = attn.add_k_proj, attn.norm_added_k, attn.add_v_proj
            key, value = once(kept, "image", lambda: self.keys_values(attn, encoder_hidden_states_image, *layers))
            out = out + self.attend(query, key, value, None)

        for layer in attn.to_out:
            out = layer(out)
        return out

    @staticmethod
    def keys_values(attn: Attention, context: Tensor, to_k: nn.Module, norm_k: nn.Module, to_v: nn.Module) -> tuple[Tensor, Tensor]:
        """Of tokens (b, l, ·), each (b, l, heads, head_dim)."""
        return norm_k(to_k(context)).unflatten(2, (attn.heads, -1)), to_v(context).unflatten(2, (attn.heads, -1))

    def attend_by_frame(self, query: Tensor, key: Tensor, value: Tensor, rows: Tensor) -> Tensor:
        """Every frame attends to its own text: queries (b, n, heads, head_dim), keys and values (b · S, l, heads, head_dim) of all texts,
        rows (b, G). Frames become samples, so any backend does it, and no mask is needed."""
        b, frames = rows.shape
        query = query.unflatten(1, (frames, -1)).flatten(0, 1)  # (b · G, n / G, heads, head_dim)
        key, value = (x.index_select(0, rows.flatten()) for x in (key, value))  # (b · G, l, heads, head_dim)
        return self.attend(query, key, value, None).unflatten(0, (b, frames)).flatten(1, 2)  # (b, n, d)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, parallel_config: object | None) -> Tensor:
        if parallel_config is None and self._attention_backend is None and by_products(query, key):
            return attend_by_products(query, key, value)
        out = dispatch_attention_fn(query, key, value, backend=self._attention_backend, parallel_config=parallel_config)
        return out.flatten(2, 3).type_as(query)  # (b, n, d)


class Attention(nn.Module, AttentionModuleMixin):
    """Self-attention, or cross-attention to text and, with `added_kv_proj_dim`, to image tokens. Parameter names are Wan's."""

    _default_processor_cls = AttentionProcessor
    _available_processors = [AttentionProcessor]
    _supports_qkv_fusion = False

    def __init__(self, dim: int, heads: int, eps: float = 1e-6, qk_norm: bool = True, added_kv_proj_dim: int | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim), nn.Dropout(0.0)])
        self.norm_q = RMSNorm(dim, eps) if qk_norm else nn.Identity()
        self.norm_k = RMSNorm(dim, eps) if qk_norm else nn.Identity()
        if added_kv_proj_dim is not None:
            self.add_k_proj = nn.Linear(added_kv_proj_dim, dim)
            self.add_v_proj = nn.Linear(added_kv_proj_dim, dim)
            self.norm_added_k = RMSNorm(dim, eps)
        self.set_processor(AttentionProcessor())

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        rotary_emb: Tensor | None = None,
        encoder_hidden_states_image: Tensor | None = None,
        history: KeyValues | None = None,
        kept: Kept | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        image = encoder_hidden_states_image
        return self.processor(self, hidden_states, encoder_hidden_states, rotary_emb, image, history, kept, rows)
