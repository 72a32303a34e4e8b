"""One layer of the transformer: self-attention over the whole clip, cross-attention to text, feed-forward."""

from __future__ import annotations

import torch
from diffusers.models.attention import FeedForward
from torch import Tensor, nn

from kling.dit.history import LayerHistory
from kling.nn.attention import Attention, Kept
from kling.nn.modulation import ModulatedNorm, Modulation, gate
from kling.nn.norm import LayerNorm
from kling.runtime.diffusers_internals import TransformerBlockMetadata, TransformerBlockRegistry


class KlingTransformerBlock(nn.Module):
    """Wan's block: adaLN from a vector shared by all blocks plus this block's own table; the text branch is not modulated."""

    def __init__(
        self,
        dim: int,
        ffn_dim: int,
        num_heads: int,
        qk_norm: bool = True,
        cross_attn_norm: bool = False,
        eps: float = 1e-6,
        added_kv_proj_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.norm1 = ModulatedNorm(dim, eps)
        self.attn1 = Attention(dim, num_heads, eps, qk_norm)
        self.norm2 = LayerNorm(dim, eps) if cross_attn_norm else nn.Identity()
        self.attn2 = Attention(dim, num_heads, eps, qk_norm, added_kv_proj_dim)
        self.norm3 = ModulatedNorm(dim, eps)
        self.ffn = FeedForward(dim, inner_dim=ffn_dim, activation_fn="gelu-approximate")
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def forward(
        self,
        hidden_states: Tensor,  # (b, n, d)
        encoder_hidden_states: Tensor,  # (b, l, d), of S shots (b · S, l, d)
        temb: Modulation,  # 6 vectors
        rotary_emb: Tensor,  # (b | 1, n, 1, head_dim / 2, 2)
        encoder_hidden_states_image: Tensor | None = None,  # (b, i, d)
        history: LayerHistory | None = None,
        kept: Kept | None = None,  # keys and values of the text, from an earlier step
        rows: Tensor | None = None,  # (b, G) row of the text of each frame, if it differs between shots
    ) -> Tensor:
        # `torch.compile` is applied to a call inside `forward`, so that hooks on `forward` (shards, offload, caches) stay outside it
        return self.layer(hidden_states, encoder_hidden_states, temb, rotary_emb, encoder_hidden_states_image, history, kept, rows)

    def layer(
        self,
        x: Tensor,
        text: Tensor,
        temb: Modulation,
        rotary_emb: Tensor,
        image: Tensor | None,
        history: LayerHistory | None,
        kept: Kept | None,
        rows: Tensor | None,
    ) -> Tensor:
        """The computation of `forward`: tokens (b, n, d) and text (b, l, d) -> tokens (b, n, d)."""
        temb = temb + self.scale_shift_table  # shift, scale and gate of attention, then of the feed-forward

        y = self.norm1(x, temb.vector(0), temb.vector(1))
        x = gate(x, self.attn1(y, rotary_emb=rotary_emb, history=history), temb.vector(2))

        y = self.norm2(x)
        x = x + self.attn2(y, text, encoder_hidden_states_image=image, kept=kept, rows=rows)

        y = self.norm3(x, temb.vector(3), temb.vector(4))
        return gate(x, self.ffn(y), temb.vector(5))


# step caches of diffusers (FirstBlockCache, MagCache, TaylorSeer) look up here what a block returns
TransformerBlockRegistry.register(
    KlingTransformerBlock, TransformerBlockMetadata(return_hidden_states_index=0, return_encoder_hidden_states_index=None)
)
