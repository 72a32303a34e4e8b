"""How a pipeline runs on this machine: where its weights lie, how small, which attention, what steps may reuse. All of it is diffusers'.

Nothing here changes what is computed, but for two that say so: fp8 rounds the weights, and a step cache skips work that it guesses.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, FirstBlockCacheConfig, MagCacheConfig, TaylorSeerCacheConfig

from kling.errors import UserError, unknown

OFFLOADS = ("model", "group")
ATTENTIONS = {  # ours -> diffusers', and whether it runs on a CPU
    "native": ("native", True),
    "math": ("_native_math", True),
    "cudnn": ("_native_cudnn", False),
    "flex": ("flex", False),
    "xformers": ("xformers", False),
    "flash": ("flash", False),
    "flash3": ("_flash_3", False),
    "sage": ("sage", False),
}
BRANCHES = [r"blocks\.\d+\.(attn1|attn2|ffn)"]  # what TaylorSeer predicts; diffusers' own patterns match nothing in a Wan block
CACHES = ("first-block", "mag", "taylorseer")


@dataclass(frozen=True)
class Machine:
    """What can be asked for.

    offload: "model" keeps one part at a time on the device, "group" one block at a time. fp8: transformers stored in 8 bits.
    attention: a name of `ATTENTIONS`. cache: "first-block=THRESHOLD", "mag=RATIOS.json[:THRESHOLD]" or "taylorseer=INTERVAL".
    context_parallel: devices that share the tokens of one clip. compile: `torch.compile` of the transformer's block, once for all of them.
    """

    offload: str | None = None
    fp8: bool = False
    attention: str | None = None
    cache: str | None = None
    context_parallel: int = 1
    compile: bool = False

    def __post_init__(self) -> None:
        if self.offload is not None and self.offload not in OFFLOADS:
            raise unknown("offload", self.offload, OFFLOADS)
        if self.attention is not None and self.attention not in ATTENTIONS:
            raise unknown("attention", self.attention, ATTENTIONS)
        if self.cache is not None and self.cache.split("=")[0] not in CACHES:
            raise unknown("cache", self.cache, [f"{name}=…" for name in CACHES])


def pick_device(name: str | None) -> torch.device:
    """The asked device, by default CUDA if there is one. Raises `UserError` if it is not there."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
        return device
    except (RuntimeError, AssertionError) as error:  # how torch says that it has no such device
        raise UserError(f"device '{name}' cannot be used ({str(error).splitlines()[0]}): try --device cpu") from None


def set_up(pipe: Any, machine: Machine, device: torch.device, steps: int) -> None:
    """Put a pipeline to work as asked. steps: of one walk, which MagCache needs. Raises `UserError` for what cannot be had here."""
    if machine.attention is not None:
        set_attention(pipe.experts, machine.attention, device)
    if machine.fp8:
        for model in pipe.experts:
            model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=model.dtype)
    if machine.cache is not None:
        set_cache(pipe, machine.cache, steps)
    if machine.context_parallel > 1:
        device = join_processes(machine.context_parallel, device)
    place(pipe, machine.offload, device)
    if machine.context_parallel > 1:
        share_tokens(pipe.experts, machine.context_parallel)
    if machine.compile:
        for model in pipe.experts:
            model.compile_repeated_blocks()


def place(pipe: Any, offload: str | None, device: torch.device) -> None:
    """Move the weights to the device, or leave them in main memory to come when they are needed."""
    if offload is not None and device.type == "cpu":
        raise UserError(f"--offload {offload} moves weights to an accelerator and back, and the device is the CPU: leave it out")
    if offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif offload == "group":
        stream = device.type == "cuda"
        for model in pipe.experts:
            model.enable_group_offload(device, offload_type="block_level", num_blocks_per_group=1, use_stream=stream)
        for part in (pipe.vae, pipe.image_encoder):
            if part is not None:
                part.to(device)
    else:
        pipe.to(device)


def set_attention(models: list[Any], name: str, device: torch.device) -> None:
    """Choose the kernel of all attention layers."""
    backend, on_cpu = ATTENTIONS[name]
    if device.type == "cpu" and not on_cpu:
        raise UserError(f"--attention {name} needs a CUDA device, and this is the CPU: use native")
    for model in models:
        try:
            model.set_attention_backend(backend)
        except (RuntimeError, ImportError, ValueError) as error:
            raise UserError(f"--attention {name} cannot be used ({str(error).strip().splitlines()[0]})") from None


def set_cache(pipe: Any, text: str, steps: int) -> None:
    """Let steps reuse what earlier ones computed; each expert has a cache of its own."""
    if pipe.config.get("block_frames"):
        raise UserError(f"--cache {text} reuses passes over the whole clip, and these weights make it block by block: leave it out")
    for model in pipe.experts:
        model.enable_cache(cache_config(text, steps, lambda model=model: model))


def cache_config(text: str, steps: int, model: Callable[[], Any]) -> Any:
    """`NAME=VALUE` as diffusers' configuration; see `Machine`."""
    name, _, value = text.partition("=")
    try:
        if name == "first-block":
            return FirstBlockCacheConfig(threshold=float(value or 0.1))
        if name == "taylorseer":
            dtype = next(model().parameters()).dtype
            return TaylorSeerCacheConfig(cache_interval=int(value or 5), taylor_factors_dtype=dtype, cache_identifiers=BRANCHES)
        path, _, threshold = value.partition(":")
        return MagCacheConfig(threshold=float(threshold or 0.06), num_inference_steps=steps, mag_ratios=read_ratios(path))
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"--cache {text}: write a number after the =, as in {name}={'5' if name == 'taylorseer' else '0.1'}") from None


def read_ratios(path: str) -> list[float]:
    """MagCache's ratios of residual sizes, one a step: a JSON list that a calibration of these weights gave."""
    try:
        ratios = json.loads(Path(path).read_text(encoding="utf-8"))
        return [float(ratio) for ratio in ratios]
    except (OSError, ValueError, TypeError):
        raise UserError(
            f"--cache mag needs the ratios of these weights, and '{path}' is no JSON list of numbers: write mag=RATIOS.json, "
            "from diffusers' MagCacheConfig(calibrate=True), or use first-block"
        ) from None


def join_processes(count: int, device: torch.device) -> torch.device:
    """Join the processes that torchrun started, one a device; returns this one's device."""
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != count:
        raise UserError(
            f"--context-parallel {count} needs {count} processes and this is one of {started}: "
            f"start it with torchrun --nproc-per-node {count} -m kling_programs.sample.generate …"
        )
    if device.type == "cpu":
        raise UserError(f"--context-parallel {count} shares a clip between CUDA devices, and this is the CPU: leave it out")
    device = torch.device(device.type, int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl")
    return device


def share_tokens(models: list[Any], count: int) -> None:
    """Split every clip's tokens over the joined processes (DeepSpeed-Ulysses: attention exchanges heads)."""
    for model in models:
        heads = model.config.num_attention_heads
        if heads % count:
            raise UserError(f"--context-parallel {count} splits heads, and this model has {heads}: give a number that divides them")
        model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=count))
