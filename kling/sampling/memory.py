"""Estimates the memory of a request on the device before anything is loaded: weights exactly, activations by a rule checked in tests."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from kling.sampling.machine import Machine
from kling.sampling.plan import Plan
from kling.text.umt5 import UMT5TextEncoder

# Peak bytes of a transformer block per token, in multiples of the width. Measured with PyTorch's memory profiler on the CPU (fp32: 48,
# bf16: 30 with a feed-forward four times as wide): fp32 copies around a modulation, the residual stream, and both sides of the GELU.
FP32_COPIES, STREAM, GELU = 3, 1, 2
# The same for attention, which is larger if the feed-forward is narrow: queries, keys, values and two more, and the pair being rotated.
ROTATED, NUMBERS = 4, 5
# Feature maps at full frame size that the VAE's decoder holds, counting smaller ones and the stream's state (measured 11.6 for the Wan 2.1
# type and 15.1 for the 2.2 one, fp32), while it decodes four frames.
MAPS, FRAMES = 16, 4
TILES = 256  # pixels: the size that `advice` suggests


@dataclass(frozen=True)
class Memory:
    """Bytes on the device of the text encoder, transformer(s) and VAE, with their activations; they do not run at the same time.

    Without offloading all weights stay on the device together, except umT5's, which are freed.
    """

    text: int
    transformer: int
    activations: int
    vae: int
    decoding: int
    offload: str | None = None
    block: int = 0  # of a transformer: the most that group offloading keeps

    @property
    def peak(self) -> int:
        if self.offload is None:
            resident = self.transformer + self.vae
            return max(resident + self.text, resident + self.activations, resident + self.decoding)
        moving = self.transformer if self.offload == "model" else self.vae + 2 * self.block
        others = 0 if self.offload == "model" else self.vae
        return max(self.text + others, moving + self.activations, self.vae + self.decoding)


def estimate(pipe: Any, plan: Plan, machine: Machine) -> Memory:
    """Estimate one request; `pipe` may be on the meta device."""
    experts, config = pipe.transformers, pipe.transformer.config
    number = torch.finfo(pipe.transformer.dtype).bits // 8
    dim = config.num_attention_heads * config.attention_head_dim
    tokens = -(-plan.tokens // machine.context_parallel)
    feed_forward = dim * (4 * FP32_COPIES + number * STREAM) + config.ffn_dim * number * GELU
    attention = dim * (4 * ROTATED + number * NUMBERS)
    wide = pipe.vae.config.decoder_base_dim or pipe.vae.config.base_dim
    patch = pipe.vae.config.patch_size or 1
    side = machine.tiles or max(plan.height, plan.width)
    pixels = min(plan.height, side) * min(plan.width, side) // patch**2 * FRAMES
    stored = 1 if machine.fp8 else None
    weights = [_bytes(model, stored) for model in experts]
    return Memory(
        text=_text_bytes(pipe.text_encoder),
        transformer=max(weights) if machine.offload == "model" else sum(weights),
        activations=tokens * max(feed_forward, attention),
        vae=_bytes(pipe.vae),
        decoding=pixels * wide * MAPS * (torch.finfo(pipe.vae.dtype).bits // 8),
        offload=machine.offload,
        block=max(_bytes(model.blocks[0], stored) for model in experts),
    )


def advice(pipe: Any, plan: Plan, machine: Machine, room: int, room_is_main: bool = False) -> str:
    """The first setting, from the fastest to the smallest, with which the request fits into `room` bytes; or that none does."""
    if estimate(pipe, plan, machine).peak <= room:
        return "fits"
    ways = [
        replace(machine, offload=offload, fp8=fp8, tiles=tiles)
        for tiles in (machine.tiles, machine.tiles or TILES)
        for offload in (None, "model", "group")
        for fp8 in (machine.fp8, True)
    ]
    if room_is_main:  # no other memory to offload weights to
        ways = [way for way in ways if way.offload is None]
    for way in ways:
        if (memory := estimate(pipe, plan, way)).peak <= room:
            flags = [f"--offload {way.offload}"] * (way.offload is not None) + ["--fp8"] * way.fp8
            flags += [f"--tiles {way.tiles}"] * (way.tiles is not None)
            return f"does not fit; {' '.join(flags)} would, with {size(memory.peak)}"
    return "does not fit with any offloading: ask for fewer frames or a smaller --size, or share it with --context-parallel"


def report(pipe: Any, plan: Plan, machine: Machine, device: torch.device) -> dict[str, str]:
    """The estimate in words, as a dry run prints it."""
    memory, room = estimate(pipe, plan, machine), free_memory(device)
    working = f"{size(memory.activations)} while sampling, {size(memory.decoding)} while decoding"
    return {
        "weights": f"transformer {size(memory.transformer)}, VAE {size(memory.vae)}, text {size(memory.text)}",
        "memory": f"about {size(memory.peak)} at most, of it {working}",
        "room": f"{size(room)} free on {device}: {advice(pipe, plan, machine, room, device.type == 'cpu')}",
    }


def free_memory(device: torch.device) -> int:
    """Free bytes on the device."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def size(count: int) -> str:
    """Bytes in readable units."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def _bytes(module: torch.nn.Module, stored: int | None = None) -> int:
    """Bytes of a module's parameters; matrices take `stored` bytes per number if given, as with layerwise casting."""
    return sum(p.numel() * (stored if stored and p.ndim > 1 else p.element_size()) for p in module.parameters())


def _text_bytes(encoder: Any) -> int:
    if not isinstance(encoder, UMT5TextEncoder):
        return _bytes(encoder)
    folder = Path(encoder.folder, "text_encoder")
    for index in folder.glob("*.safetensors.index.json"):  # available before the shards are
        return int(json.loads(index.read_text(encoding="utf-8"))["metadata"]["total_size"])
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
