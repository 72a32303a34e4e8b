"""What kling needs of diffusers that is not in its public interface, in one place: a new minor version may move it.

pyproject.toml therefore holds diffusers below the next minor version; to raise the ceiling, make this file import and run the tests.
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
