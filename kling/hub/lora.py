"""Loads LoRAs in the namings of many trainers, for the transformer or the second expert.

A key is PREFIX + LAYER + SUFFIX. The layer has our name or the original repository's, with dots or (kohya, musubi) with underscores:

    lora_A.weight, lora_B.weight; lora_down, lora_up; lora.down, lora.up; lora_A.ADAPTER.weight (peft, DiffSynth)    ΔW = alpha / r · B A
    alpha                            a number; without one it is r, or the value in peft's settings
    diff, diff_b; w_norm, b_norm     of distilled LoRAs: the full ΔW and Δb of a layer or a norm
    lora_B.bias                      of peft's lora_bias: Δb = alpha / r · bias

peft loads low-rank parts, full differences are added to the weights. Prefixes: those of peft, DiffSynth, ComfyUI, diffusers, musubi.
"""

from __future__ import annotations

import logging
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from kling.errors import UserError
from kling.hub.files import read_tensors, weight_files
from kling.hub.keys import original_transformer_name
from kling.runtime.files import parse_json

log = logging.getLogger(__name__)

PREFIXES = (
    "base_model.model.", "model.diffusion_model.", "diffusion_model.", "pipe.dit.", "pipe.dit2.", "dit.", "transformer.", "transformer_2.",
    "model.", "module.", "unet.", "lora_unet__", "lora_unet_", "lora_transformer_",
)  # fmt: skip
SUFFIX = re.compile(
    r"\.(?:(?P<down>lora_A|lora_down|lora\.down|lora_linear_layer\.down)(?:\.(?P<a>\w+))?\.weight"
    r"|(?P<up>lora_B|lora_up|lora\.up|lora_linear_layer\.up)(?:\.(?P<b>\w+))?\.weight"
    r"|(?P<up_bias>lora_B|lora_up)(?:\.(?P<c>\w+))?\.bias|(?P<alpha>alpha)|(?P<weight>diff|w_norm)|(?P<bias>diff_b|b_norm))$"
)
METHODS = {"dora": "DoRA", "lora_magnitude": "DoRA", "hada_": "LoHa", "lokr_": "LoKr", "oft_": "OFT", "lora_mid": "LoCon with a core"}
Given = str | Path | Mapping[str, Tensor]
SHOWN = 3  # keys that a message names


@dataclass
class Layer:
    """The tensors of one layer in a file."""

    down: Tensor | None = None  # (r, in), or of a convolution
    up: Tensor | None = None  # (out, r)
    up_bias: Tensor | None = None  # (out,)
    alpha: Tensor | None = None  # ()
    weight: Tensor | None = None  # full difference, of the weight's shape
    bias: Tensor | None = None
    keys: list[str] = field(default_factory=list)


def add_loras(pipe: Any, loras: Sequence[tuple[str, float]], second: bool = False) -> None:
    """Load (file, scale) pairs, which add up. second: into the low-noise expert. Tensors without a layer in the model are logged.

    Raises `UserError` if peft is missing, or if a file is damaged, for another method, or not for this model.
    """
    names = {}
    for number, (path, scale) in enumerate(loras):
        name = f"{'low' if second else 'high'}{number}"
        if add_lora(pipe, path, second, name, scale):
            names[name] = scale
    if names:
        _expert(pipe, second).set_adapters(list(names), list(names.values()))


def add_lora(pipe: Any, lora: Given, second: bool = False, name: str | None = None, scale: float = 1.0) -> bool:
    """Load one LoRA, a file or its tensors, and return whether this made an adapter, which has no scale yet.

    name: of the adapter; by default diffusers chooses one. scale: of the full differences, which are added to the weights at once.
    Raises `UserError` as `add_loras` does, and for a name in use.
    """
    model = _expert(pipe, second)
    if find_spec("peft") is None:
        raise UserError("a LoRA needs peft: pip install 'kling[lora]'")
    if name in getattr(model, "peft_config", {}):
        raise UserError(f"there is an adapter '{name}' already: give another adapter_name, or delete_adapters('{name}') first")
    layers = read_lora(lora, model, second)
    low = {k: v for k, layer in layers.items() for k, v in _low_rank(k, layer).items()}
    if low:
        pipe.load_lora_into_transformer(low, transformer=model, adapter_name=name, _pipeline=pipe)
    for layer_name, layer in layers.items():
        _add_whole(model, layer_name, layer, scale)
    return bool(low)


def _expert(pipe: Any, second: bool) -> nn.Module:
    model = pipe.transformer_2 if second else pipe.transformer
    if model is None:
        raise UserError("a LoRA was given for the second expert, and this model has one only: leave it out")
    return model


def read_lora(path: Given, model: nn.Module, second: bool = False) -> dict[str, Layer]:
    """Layers of a LoRA by our names, with `up` multiplied by alpha / r. second: the second expert's part of a file for both.

    path: of the file, or its tensors by their keys. Layers that `model` lacks are left out, and named in one line of the log. Raises
    `UserError` for a file that is incomplete, fits nowhere, or is for another method.
    """
    tensors, settings = (path, {}) if isinstance(path, Mapping) else (read_tensors(path), _settings(weight_files(path)[0]))
    path = "the LoRA given" if isinstance(path, Mapping) else path
    if both := [key for key in tensors if key.startswith("transformer_2.")]:
        tensors = {key: tensors[key] for key in (both if second else tensors.keys() - set(both))}
    layers, unknown = _parts(path, tensors)
    known = _names(model)
    found: dict[str, Layer] = {}
    for given, layer in layers.items():
        name = known.get(given)
        if name is None or not _has(model, name, layer):
            unknown += layer.keys
        elif name in found:
            raise UserError(f"{path} holds {name} twice, as {found[name].keys[0]} and {layer.keys[0]}: get a file with one of them")
        else:
            found[name] = layer
    if not found:
        raise UserError(f"{path} is no LoRA that fits this model: it holds {_listed(unknown)}, and the model has no such layer")
    if unknown:
        log.warning("%s: %d of its %d tensors are not used, the model has no such layer: %s", path, *_share(unknown, tensors))
    for name, layer in found.items():
        _check(path, model, name, layer)
        if layer.up is not None:
            scale = _scale(name, layer, settings)
            layer.up = (layer.up if layer.up.dtype.itemsize > 1 else layer.up.to(torch.bfloat16)) * scale
            layer.up_bias = None if layer.up_bias is None else layer.up_bias * scale
    return found


# ------------------------------------------------------------------------------------------------------------------------ names


def _parts(path: str | Path, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Layer], list[str]]:
    """(the tensors of each layer, by the file's name without prefixes; keys that belong to no layer)."""
    layers: dict[str, Layer] = defaultdict(Layer)
    unknown = []
    for key, tensor in sorted(tensors.items()):
        if method := next((name for mark, name in METHODS.items() if mark in key), None):
            raise UserError(f"{path} is a {method} ({key}), which is not supported: get a LoRA, or merge it into the model and give that")
        suffix = SUFFIX.search(key)
        if suffix is None:
            unknown.append(key)
            continue
        (part,) = (part for part in ("down", "up", "up_bias", "alpha", "weight", "bias") if suffix[part])
        layer = layers[_without_prefix(key[: suffix.start()])]
        if getattr(layer, part) is not None:
            raise UserError(f"{path} holds two adapters, as {layer.keys[0]} and {key}: give a file with one")
        setattr(layer, part, tensor)
        layer.keys.append(key)
    return dict(layers), unknown


def _without_prefix(name: str) -> str:
    while prefix := next((prefix for prefix in PREFIXES if name.startswith(prefix)), ""):
        name = name.removeprefix(prefix)
    return name


def _names(model: nn.Module) -> dict[str, str]:
    """All names of a layer, or of a parameter outside layers, in other namings -> our name."""
    ours = dict.fromkeys(_plain(name).rpartition(".")[0] for name, _ in model.named_parameters())  # layers
    ours |= dict.fromkeys(_plain(name) for name, _ in model.named_parameters())  # and tables outside torch's layers
    known: dict[str, str] = {}
    for dotted in filter(None, ours):
        for name in (dotted, original_transformer_name(f"{dotted}.").removesuffix("."), original_transformer_name(dotted)):
            known.setdefault(name, dotted)
            known.setdefault(name.replace(".", "_"), dotted)
    return known


def _plain(name: str) -> str:
    """A parameter's name without the parts added by an adapter."""
    return name.replace(".base_layer.", ".")


def _parameter(model: nn.Module, name: str) -> nn.Parameter | None:
    layer, _, last = name.rpartition(".")
    for place in (name, f"{layer}.base_layer.{last}"):
        try:
            return model.get_parameter(place)
        except AttributeError:
            continue
    return None


def _targets(model: nn.Module, name: str) -> tuple[nn.Parameter | None, nn.Parameter | None]:
    """The weight (or the parameter itself) and the bias to which a layer's differences are added."""
    weight = _parameter(model, f"{name}.weight")
    return (weight if weight is not None else _parameter(model, name)), _parameter(model, f"{name}.bias")


def _has(model: nn.Module, name: str, layer: Layer) -> bool:
    """Whether the model has everything that the file changes."""
    weight, bias = _targets(model, name)
    needs_weight = any(part is not None for part in (layer.down, layer.up, layer.weight, layer.alpha))
    needs_bias = any(part is not None for part in (layer.bias, layer.up_bias))
    return (weight is not None or not needs_weight) and (bias is not None or not needs_bias)


# ------------------------------------------------------------------------------------------------------------------------ values


def _check(path: str | Path, model: nn.Module, name: str, layer: Layer) -> None:
    """Raise `UserError` for an incomplete layer, a wrong shape, or values that are not finite."""
    if (layer.down is None) != (layer.up is None):
        has, lacks = ("first", "second") if layer.up is None else ("second", "first")
        raise UserError(f"{path} is incomplete: of {name} it has the {has} matrix ({layer.keys[0]}) and not the {lacks}: get it again")
    if layer.down is None and (layer.alpha is not None or layer.up_bias is not None):
        raise UserError(f"{path} is incomplete: of {name} it has {layer.keys[0]} and no matrices: get it again")
    for key, tensor in vars(layer).items():
        if isinstance(tensor, Tensor) and not (tensor.is_floating_point() and tensor.float().isfinite().all()):
            kind = "NaN or infinity" if tensor.is_floating_point() else f"{tensor.dtype} numbers".removeprefix("torch.")
            raise UserError(f"{path} holds {kind} in {name} ({key}): get it again")
    weight, bias = _targets(model, name)
    if layer.down is not None:
        given = (layer.up.shape[0], *layer.down.shape[1:])
        if given != tuple(weight.shape) or layer.up.shape[1] != layer.down.shape[0]:
            raise UserError(f"{path} is no LoRA that fits this model: {name} is {_size(weight.shape)}, the file's {_size(given)}")
    for difference, target in ((layer.weight, weight), (layer.bias, bias), (layer.up_bias, bias)):
        if difference is not None and difference.shape != target.shape and difference.shape != target.squeeze().shape:
            sizes = f"{name} is {_size(target.shape)}, the file's {_size(difference.shape)}"
            raise UserError(f"{path} is no LoRA that fits this model: {sizes}")


def _settings(file: Path) -> dict[str, Any]:
    """peft's settings, from the file's header (diffusers) or a JSON beside it (peft); {} if there are none."""
    try:
        with safe_open(file, framework="pt") as opened:
            text = (opened.metadata() or {}).get("lora_adapter_metadata")
        if text is None and file.name == "adapter_model.safetensors" and (beside := file.with_name("adapter_config.json")).is_file():
            text = beside.read_text(encoding="utf-8")
        values = parse_json(text) if text else {}
        return {key.removeprefix("transformer."): value for key, value in values.items()}
    except (SafetensorError, OSError, ValueError, AttributeError) as error:
        raise UserError(f"{file}: its peft settings cannot be read ({error}): get it again") from None


def _scale(name: str, layer: Layer, settings: Mapping[str, Any]) -> float:
    """alpha / r, or alpha / √r if the settings say so."""
    if settings.get("use_dora"):
        raise UserError(f"{name} is a DoRA by its settings, which is not supported: get a LoRA")
    rank = layer.down.shape[0]
    patterns = settings.get("alpha_pattern") or {}
    fits = (value for key, value in patterns.items() if f".{name}".endswith("." + key.strip("^$")))
    own = next(fits, settings.get("lora_alpha", rank))
    alpha = own if layer.alpha is None else layer.alpha.item()
    if not isinstance(alpha, int | float):
        raise UserError(f"{name} has the alpha {alpha!r} in its peft settings: give a number")
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _low_rank(name: str, layer: Layer) -> dict[str, Tensor]:
    """A layer's matrices with diffusers' names."""
    if layer.down is None:
        return {}
    return {f"transformer.{name}.lora_A.weight": layer.down.to(layer.up.dtype), f"transformer.{name}.lora_B.weight": layer.up}


@torch.no_grad()
def _add_whole(model: nn.Module, name: str, layer: Layer, scale: float) -> None:
    """Add full differences, which are no product of two matrices, to the weights."""
    weight, bias = _targets(model, name)
    for difference, target in ((layer.weight, weight), (layer.bias, bias), (layer.up_bias, bias)):
        if difference is not None:
            change = scale * difference.to(target.device, torch.float32).reshape(target.shape)
            target.copy_(target.float() + change)


def _size(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _listed(keys: Sequence[str]) -> str:
    return ", ".join(sorted(keys)[:SHOWN]) + (f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else "")


def _share(unused: Sequence[str], tensors: Mapping[str, Tensor]) -> tuple[int, int, str]:
    return len(unused), len(tensors), _listed(unused)
