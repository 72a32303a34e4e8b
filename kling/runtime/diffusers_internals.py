"""The parts of diffusers that kling uses although they are not public, in one file: a new minor version may move them.

Therefore pyproject.toml pins diffusers below the next minor version; to raise the pin, make this file import and run the tests.
"""

from __future__ import annotations

from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from diffusers.models.attention_dispatch import dispatch_attention_fn

__all__ = [
    "ContextParallelInput",
    "ContextParallelOutput",
    "TransformerBlockMetadata",
    "TransformerBlockRegistry",
    "dispatch_attention_fn",
]
