"""How a pipeline runs on this machine: where its weights are, in which format, which attention, and what steps reuse; all by diffusers.

Nothing here changes the result, with three exceptions: fp8 rounds the weights, a step cache approximates the work that it skips, and
the VAE's tiles see less than the whole picture.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, FirstBlockCacheConfig, MagCacheConfig, TaylorSeerCacheConfig

from kling.errors import UserError, unknown
from kling.runtime.device import multiply_in_tf32
from kling.runtime.files import parse_json

OFFLOADS = ("model", "group")
ATTENTIONS = {  # our name -> diffusers' name, and whether it runs on a CPU
    "native": ("native", True),
    "math": ("_native_math", True),
    "cudnn": ("_native_cudnn", False),
    "flex": ("flex", False),
    "xformers": ("xformers", False),
    "flash": ("flash", False),
    "flash3": ("_flash_3", False),
    "sage": ("sage", False),
}
BRANCHES = [r"blocks\.\d+\.(attn1|attn2|ffn)"]  # the modules that TaylorSeer predicts; diffusers' patterns match nothing in a Wan block
CACHES = ("first-block", "mag", "taylorseer", "calibrate")
LEAST_VALUE = {"first-block": (float, 0.0), "taylorseer": (int, 1)}  # what stands behind the =
LEAST_TILE = 32  # pixels: the VAE's tiles overlap by a quarter, which must be a latent at least
HEAD_HOOK = "mag_cache_leader_block_hook"  # where diffusers keeps what MagCache measures


@dataclass(frozen=True)
class Machine:
    """The settings.

    offload: "model" keeps one model at a time on the device, "group" one block at a time. fp8: transformers stored in 8 bits.
    attention: a name of `ATTENTIONS`. cache: "first-block=THRESHOLD", "mag=RATIOS.json[:THRESHOLD]" or "taylorseer=INTERVAL"; or
    "calibrate=RATIOS.json", which skips nothing and writes the file that "mag" needs.
    context_parallel: number of devices that share the tokens of one clip. tiles: side in pixels of the squares that the VAE processes.
    compile: `torch.compile` of the transformer's blocks, once for all of them.
    """

    offload: str | None = None
    fp8: bool = False
    attention: str | None = None
    cache: str | None = None
    context_parallel: int = 1
    tiles: int | None = None
    compile: bool = False

    def __post_init__(self) -> None:
        if self.offload is not None and self.offload not in OFFLOADS:
            raise unknown("offload", self.offload, OFFLOADS)
        if self.attention is not None and self.attention not in ATTENTIONS:
            raise unknown("attention", self.attention, ATTENTIONS)
        if self.cache is not None and self.cache.split("=")[0] not in CACHES:
            raise unknown("cache", self.cache, [f"{name}=…" for name in CACHES])
        if self.context_parallel < 1:
            raise UserError(f"--context-parallel {self.context_parallel}: give at least 1")
        if self.tiles is not None and self.tiles < LEAST_TILE:
            raise UserError(f"--tiles {self.tiles}: give at least {LEAST_TILE} pixels")
        name, _, value = (self.cache or "").partition("=")
        if name in LEAST_VALUE and value:
            parse, least = LEAST_VALUE[name]
            try:
                if not least <= parse(value) < math.inf:
                    raise UserError(f"--cache {self.cache}: give at least {least:g}")
            except ValueError as error:
                if isinstance(error, UserError):
                    raise
                raise _no_number(self.cache) from None


def pick_device(name: str | None) -> torch.device:
    """The requested device, by default CUDA if there is one. Raises `UserError` if it is not available."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device).item()  # which a device without memory, such as meta, has not
        multiply_in_tf32()
        return device
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch raises any of them for a missing device
        raise UserError(f"device '{name}' cannot be used ({str(error).splitlines()[0]}): try --device cpu") from None


def set_up(pipe: Any, machine: Machine, device: torch.device, steps: int) -> None:
    """Apply the settings to a pipeline. steps: of one sampling run, for MagCache. Raises `UserError` if a setting cannot be used here."""
    if machine.attention is not None:
        set_attention(pipe.transformers, machine.attention, device)
    if machine.fp8:
        for model in pipe.transformers:
            model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=model.dtype)
    if machine.cache is not None:
        set_cache(pipe, machine.cache, steps)
    if machine.tiles is not None:
        s = pipe.vae.spatial_factor
        pipe.vae.enable_tiling(machine.tiles, machine.tiles // 4 // s * s)
    if machine.context_parallel > 1:
        device = join_processes(machine.context_parallel, device)
    place(pipe, machine.offload, device)
    if machine.context_parallel > 1:
        share_tokens(pipe.transformers, machine.context_parallel)
    if machine.compile:
        for model in pipe.transformers:
            model.compile_repeated_blocks()


def place(pipe: Any, offload: str | None, device: torch.device) -> None:
    """Move the weights to the device, or keep them in main memory and move them when needed."""
    if offload is not None and device.type == "cpu":
        raise UserError(f"--offload {offload} moves weights to an accelerator and back, and the device is the CPU: leave it out")
    if offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif offload == "group":
        stream = device.type == "cuda"
        for model in pipe.transformers:
            model.enable_group_offload(device, offload_type="block_level", num_blocks_per_group=1, use_stream=stream)
        for part in (pipe.vae, pipe.image_encoder):
            if part is not None:
                part.to(device)
    else:
        pipe.to(device)


def set_attention(models: list[Any], name: str, device: torch.device) -> None:
    """Choose the implementation of all attention layers."""
    backend, on_cpu = ATTENTIONS[name]
    if device.type == "cpu" and not on_cpu:
        raise UserError(f"--attention {name} needs a CUDA device, and this is the CPU: use native")
    for model in models:
        try:
            model.set_attention_backend(backend)
        except (RuntimeError, ImportError, ValueError) as error:
            raise UserError(f"--attention {name} cannot be used ({str(error).strip().splitlines()[0]})") from None


def set_cache(pipe: Any, text: str, steps: int) -> None:
    """Let steps reuse results of earlier ones; each expert has a cache of its own."""
    if pipe.config.get("block_frames"):
        raise UserError(f"--cache {text} reuses passes over the whole clip, and these weights make it block by block: leave it out")
    for number, model in enumerate(pipe.experts):
        model.enable_cache(cache_config(text, steps, model, number, len(pipe.experts)))
        if text.startswith("calibrate"):
            model.mag_ratios = {}
            model.register_forward_hook(note_ratios)


def cache_config(text: str, steps: int, model: Any, number: int, experts: int) -> Any:
    """`NAME=VALUE` as diffusers' configuration for expert `number` of `experts`; see `Machine`."""
    name, _, value = text.partition("=")
    try:
        if name == "first-block":
            return FirstBlockCacheConfig(threshold=float(value or 0.1))
        if name == "taylorseer":
            dtype = next(model.parameters()).dtype
            return TaylorSeerCacheConfig(cache_interval=int(value or 5), taylor_factors_dtype=dtype, cache_identifiers=BRANCHES)
        if name == "calibrate":
            if not value:
                raise UserError("--cache calibrate: say where to write the ratios, as in calibrate=ratios.json")
            return MagCacheConfig(calibrate=True, num_inference_steps=steps + 1)  # one more: at the last step it would delete them
        path, _, threshold = value.partition(":")
        ratios = read_ratios(path, experts)[number]
        own = steps if experts == 1 else len(ratios)  # with two experts, each has as many steps as were calibrated
        return MagCacheConfig(threshold=float(threshold or 0.06), num_inference_steps=own, mag_ratios=ratios)
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise _no_number(text) from None


def _no_number(text: str) -> UserError:
    name = text.partition("=")[0]
    return UserError(f"--cache {text}: write a number after the =, as in {name}={'5' if name == 'taylorseer' else '0.1'}")


def read_ratios(path: str, experts: int) -> list[list[float]]:
    """MagCache's ratios of residual sizes from `write_ratios`: a list for each expert with one ratio per step."""
    try:
        rows = [[float(ratio) for ratio in row] for row in parse_json(Path(path).read_text(encoding="utf-8"))]
        if not all(math.isfinite(ratio) for row in rows for ratio in row):
            raise ValueError
    except (OSError, ValueError, TypeError, OverflowError):
        raise UserError(
            f"--cache mag needs the ratios of these weights, and '{path}' is no JSON with a list of numbers for each expert: "
            "make it once with --cache calibrate=ratios.json, or use first-block"
        ) from None
    if len(rows) != experts or not all(rows):
        raise UserError(f"--cache mag: '{path}' holds the ratios of {len(rows)} experts and this model has {experts}: calibrate it")
    return rows


def note_ratios(model: Any, *_: Any) -> None:
    """After every pass: save diffusers' measurements of this sampling run so far, which it deletes at the end."""
    states = model.blocks[0]._diffusers_hook.get_hook(HEAD_HOOK).state_manager
    model.mag_ratios[states.context.name] = list(states.get_state().calibration_ratios)


def write_ratios(pipe: Any, text: str) -> Path:
    """After sampling with `calibrate=PATH`: write, for each expert and step, the size of what the blocks add to the prompt's tokens,
    relative to the previous step (MagCache: Ma et al. 2025, arXiv 2506.09045)."""
    path = Path(text.partition("=")[2])
    rows = [model.mag_ratios.get("prompt", []) for model in pipe.experts]
    if not all(rows):
        raise UserError("--cache calibrate: one of the experts had no step: take more with --num-inference-steps")
    try:
        path.write_text(json.dumps(rows), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): the ratios are {rows}") from None
    return path


def join_processes(count: int, device: torch.device) -> torch.device:
    """Join the processes that torchrun started, one per device; returns this process's device."""
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
