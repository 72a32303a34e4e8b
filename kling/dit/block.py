"""One layer of the transformer: self-attention over the whole clip, cross-attention to text, feed-forward."""

from __future__ import annotations

import torch
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.models.attention import FeedForward
from torch import Tensor, nn

from kling.dit.history import LayerHistory
from kling.nn.attention import Attention
from kling.nn.modulation import Modulation, gate, modulate
from kling.nn.norm import LayerNorm


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
        self.norm1 = LayerNorm(dim, eps, elementwise_affine=False)
        self.attn1 = Attention(dim, num_heads, eps, qk_norm)
        self.norm2 = LayerNorm(dim, eps) if cross_attn_norm else nn.Identity()
        self.attn2 = Attention(dim, num_heads, eps, qk_norm, added_kv_proj_dim)
        self.norm3 = LayerNorm(dim, eps, elementwise_affine=False)
        self.ffn = FeedForward(dim, inner_dim=ffn_dim, activation_fn="gelu-approximate")
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def forward(
        self,
        hidden_states: Tensor,  # (b, n, d)
        encoder_hidden_states: Tensor,  # (b, l, d)
        temb: Modulation,  # 6 vectors
        rotary_emb: Tensor,  # (b | 1, n, 1, head_dim / 2) complex
        encoder_hidden_states_image: Tensor | None = None,  # (b, i, d)
        history: LayerHistory | None = None,
    ) -> Tensor:
        x, dtype = hidden_states, hidden_states.dtype
        temb = temb + self.scale_shift_table  # shift, scale and gate of attention, then of the feed-forward

        y = modulate(self.norm1(x.float()), temb.vector(0), temb.vector(1)).to(dtype)
        x = gate(x.float(), self.attn1(y, rotary_emb=rotary_emb, history=history).float(), temb.vector(2)).to(dtype)

        y = self.norm2(x)
        x = x + self.attn2(y, encoder_hidden_states, encoder_hidden_states_image=encoder_hidden_states_image)

        y = modulate(self.norm3(x.float()), temb.vector(3), temb.vector(4)).to(dtype)
        return gate(x.float(), self.ffn(y).float(), temb.vector(5)).to(dtype)


# step caches of diffusers (FirstBlockCache, MagCache, TaylorSeer) look up here what a block returns
TransformerBlockRegistry.register(
    KlingTransformerBlock, TransformerBlockMetadata(return_hidden_states_index=0, return_encoder_hidden_states_index=None)
)
