"""A small text encoder that trains together with the transformer.

    prompt --UTF-8--> bytes (b, s) --layers--> four bytes to a token --layers--> (b, l, e)

Bytes need no vocabulary and cover every language.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional as F

from kling.errors import UserError, unknown
from kling.runtime.device import upload

BEGIN = 256  # the token before the first byte; alone, it is the empty prompt
TOGETHER = 32  # prompts that are padded to one length
TOGETHER_CUDA = 512  # on a GPU padding costs less than the start of a group's two hundred kernels


def prompt_bytes(prompt: str) -> bytes:
    """The encoder's input for a prompt: UTF-8 bytes in normal form C, without outer spaces. Raises `UserError` for half a character."""
    try:
        return unicodedata.normalize("NFC", prompt).strip().encode()
    except UnicodeEncodeError:
        raise UserError(f"prompt {prompt!r} holds half a character (a lone surrogate): write it again") from None


def cut_prompt(prompt: str, max_bytes: int) -> str:
    """The beginning of a prompt, at most `max_bytes` bytes: whole words if it has spaces, else whole characters."""
    data = prompt_bytes(prompt)
    if len(data) <= max_bytes:
        return prompt
    kept = data[:max_bytes].decode(errors="ignore")
    words = kept.rpartition(" ")[0] if not data[len(kept.encode()) :].startswith(b" ") else kept
    return (words if len(words) > len(kept) // 2 else kept).strip()


class EncoderLayer(nn.Module):
    """Pre-norm attention over the whole prompt, then a feed-forward."""

    def __init__(self, dim: int, heads: int, ffn_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim)
        self.to_qkv = nn.Linear(dim, 3 * dim)
        self.to_out = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.ffn_in = nn.Linear(dim, ffn_dim)
        self.ffn_out = nn.Linear(ffn_dim, dim)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x (b, s, d), mask (b, 1, 1, s) True where a key may be attended to."""
        q, k, v = self.to_qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (b, heads, s, d / heads) each
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.to_out(attended.transpose(1, 2).flatten(2))
        return x + self.ffn_out(F.gelu(self.ffn_in(self.norm2(x)), approximate="tanh"))


class ByteTextEncoder(ModelMixin, ConfigMixin):
    """Prompts -> (b, num_tokens, out_dim), exactly 0 past a prompt's end, so that the other prompts of a batch do not change the result.

    Args:
        byte_dim, byte_layers: width and depth before bytes are merged into tokens.
        out_dim, token_layers: width and depth after that; out_dim is the transformer's `text_dim`.
        head_dim: channels of an attention head.
        fold: bytes per token.
        max_bytes: longest prompt.
    """

    @register_to_config
    def __init__(
        self,
        byte_dim: int = 128,
        byte_layers: int = 2,
        out_dim: int = 192,
        token_layers: int = 2,
        head_dim: int = 32,
        ffn_mult: int = 4,
        fold: int = 4,
        max_bytes: int = 255,
    ) -> None:
        super().__init__()
        for name, dim in (("byte_dim", byte_dim), ("out_dim", out_dim)):
            if dim % head_dim:
                raise UserError(f"{name} {dim}: give a multiple of head_dim {head_dim}")
        self.num_tokens = -(-(max_bytes + 1) // fold)  # including the begin token
        self.byte_embedding = nn.Embedding(257, byte_dim)
        self.position_embedding = nn.Embedding(self.num_tokens * fold, byte_dim)
        self.byte_blocks = nn.ModuleList(EncoderLayer(byte_dim, byte_dim // head_dim, ffn_mult * byte_dim) for _ in range(byte_layers))
        self.merge = nn.Linear(fold * byte_dim, out_dim)
        self.token_blocks = nn.ModuleList(EncoderLayer(out_dim, out_dim // head_dim, ffn_mult * out_dim) for _ in range(token_layers))
        self.norm = nn.LayerNorm(out_dim)
        self.initialize_weights()

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> tuple[dict, dict, dict]:
        """As in diffusers, but an unknown key is refused instead of ignored: another model's folder would give random weights."""
        known = cls._get_init_keys(cls) - {"self"}
        for key in config_dict:
            if key not in known and not key.startswith("_"):
                raise unknown("text encoder config key", key, sorted(known))
        return super().extract_init_dict(config_dict, **kwargs)

    def initialize_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Embedding | nn.Linear):
                # embeddings start as large as what the layers add to them: at the usual std of 0.02 all prompts had nearly equal outputs
                nn.init.trunc_normal_(module.weight, std=0.5 if isinstance(module, nn.Embedding) else module.in_features**-0.5)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> (b, num_tokens, out_dim). Raises `UserError` for a prompt longer than `max_bytes`."""
        return self(*self.tokenize(prompts))

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, list[int]]:
        """Prompts -> byte ids (b, s) after the begin token, padded with 0 to the longest in whole tokens, and the b lengths."""
        rows = [[BEGIN, *self.as_bytes(prompt)] for prompt in prompts]
        lengths = [len(row) for row in rows]
        width = -(-max(lengths) // self.config.fold) * self.config.fold
        return upload(torch.tensor([row + [0] * (width - len(row)) for row in rows]), self.device), lengths

    def forward(self, ids: Tensor, lengths: list[int]) -> Tensor:
        """Byte ids (b, s) and b lengths -> (b, num_tokens, out_dim). Prompts of similar length run together: half a batch is padding."""
        most = TOGETHER_CUDA if ids.is_cuda else TOGETHER
        sizes, order = torch.tensor(lengths).sort()  # on the host, which splits the batch
        there, back, fold, parts = upload(order, ids.device), upload(order.argsort(), ids.device), self.config.fold, []
        rows = zip(ids[there].split(most), upload(sizes, ids.device).split(most), sizes.split(most), strict=True)
        for some, long, known in rows:
            width = -(-int(known[-1]) // fold) * fold
            parts.append(self._encode(some[:, :width], long))
        return torch.cat(parts)[back]

    def _encode(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """The same for prompts that are padded to one length."""
        b, s = ids.shape
        places = torch.arange(s, device=ids.device)
        seen = places < lengths[:, None]  # (b, s) not padding

        x = self.byte_embedding(ids) + self.position_embedding.weight[:s]  # (b, s, byte_dim)
        for block in self.byte_blocks:
            x = block(x, seen[:, None, None])
        x = (x * seen[..., None]).unflatten(1, (-1, self.config.fold)).flatten(2)  # (b, s / fold, fold · byte_dim)
        seen = seen[:, :: self.config.fold]  # a token is valid if its first byte is

        x = self.merge(x)
        for block in self.token_blocks:
            x = block(x, seen[:, None, None])
        x = self.norm(x) * seen[..., None]
        return F.pad(x, (0, 0, 0, self.num_tokens - x.shape[1]))

    def as_bytes(self, prompt: str) -> bytes:
        """What the encoder reads of a prompt. Raises `UserError` if it is longer than `max_bytes`."""
        data = prompt_bytes(prompt)
        if len(data) > self.config.max_bytes:
            most = self.config.max_bytes
            line = f"prompt of {len(data)} bytes is longer than this model reads ({most}): shorten it"
            raise UserError(line, code="prompt_too_long", n=len(data), most=most)
        return data
