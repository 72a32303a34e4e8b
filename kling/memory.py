"""What a request will need on the device, before anything is loaded there: weights by arithmetic, activations by a rule that tests check."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from kling.plan import Plan
from kling.runtime.inference import Machine
from kling.text.umt5 import UMT5TextEncoder

# Bytes alive at the worst moment of a transformer block, a token: the stream, its fp32 copies around a modulation, then queries, keys and
# values with the fp32 pair that is being rotated; or the feed-forward's two widest tensors. In multiples of the width, and of a number's size.
FP32_COPIES = 3
NUMBERS = 5
WIDEST = 2
# Of a frame at full size in the VAE's decoder: feature maps alive at once, while four frames are made at a time.
MAPS = 5
FRAMES = 4


@dataclass(frozen=True)
class Memory:
    """Bytes on the device: text encoder, transformer(s), VAE, each with what it computes; they do not run at the same time.

    Without offloading all the weights lie there together, but umT5's, which are freed.
    """

    text: int
    transformer: int
    activations: int
    vae: int
    decoding: int
    offload: str | None = None
    block: int = 0  # of a transformer, the most that group offloading keeps

    @property
    def peak(self) -> int:
        if self.offload is None:
            resident = self.transformer + self.vae
            return max(resident + self.text, resident + self.activations, resident + self.decoding)
        moving = self.transformer if self.offload == "model" else self.vae + 2 * self.block
        others = 0 if self.offload == "model" else self.vae
        return max(self.text + others, moving + self.activations, self.vae + self.decoding)


def estimate(pipe: Any, plan: Plan, machine: Machine) -> Memory:
    """Of one request; `pipe` may be on the meta device."""
    experts, config = pipe.experts, pipe.transformer.config
    number = torch.finfo(pipe.transformer.dtype).bits // 8
    dim = config.num_attention_heads * config.attention_head_dim
    tokens = -(-plan.tokens // machine.context_parallel)
    per_token = dim * (4 * FP32_COPIES + number * NUMBERS) + config.ffn_dim * number * WIDEST
    wide = pipe.vae.config.decoder_base_dim or pipe.vae.config.base_dim
    patch = pipe.vae.config.patch_size or 1
    pixels = plan.height * plan.width // patch**2 * FRAMES
    size = 1 if machine.fp8 else None
    weights = [_bytes(model, size) for model in experts]
    return Memory(
        text=_text_bytes(pipe.text_encoder),
        transformer=max(weights) if machine.offload == "model" else sum(weights),
        activations=tokens * per_token,
        vae=_bytes(pipe.vae),
        decoding=pixels * wide * MAPS * (torch.finfo(pipe.vae.dtype).bits // 8),
        offload=machine.offload,
        block=max(_bytes(model.blocks[0], size) for model in experts),
    )


def advice(pipe: Any, plan: Plan, machine: Machine, room: int) -> str:
    """The first setting, from the fastest to the smallest, with which the request fits in `room` bytes; or that none does."""
    if estimate(pipe, plan, machine).peak <= room:
        return "fits"
    ways = [replace(machine, offload=offload, fp8=fp8) for offload in (None, "model", "group") for fp8 in (machine.fp8, True)]
    for way in ways:
        if (memory := estimate(pipe, plan, way)).peak <= room:
            flags = [f"--offload {way.offload}"] * (way.offload is not None) + ["--fp8"] * way.fp8
            return f"does not fit; {' '.join(flags)} would, with {memory.peak / 2**30:.1f} GiB"
    return "does not fit, whatever is offloaded: ask for fewer frames or a smaller --size, or share it with --context-parallel"


def _bytes(module: torch.nn.Module, size: int | None = None) -> int:
    """Of parameters; large ones in `size` bytes each if given, as layerwise casting stores them."""
    return sum(p.numel() * (size if size and p.ndim > 1 else p.element_size()) for p in module.parameters())


def _text_bytes(encoder: Any) -> int:
    if isinstance(encoder, UMT5TextEncoder):
        return sum(file.stat().st_size for file in Path(encoder.folder, "text_encoder").glob("*.safetensors"))
    return _bytes(encoder)
