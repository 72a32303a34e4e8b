"""Identifies weights from the names and shapes of their tensors only."""

from __future__ import annotations

import re
from math import prod
from typing import Any

import torch

from kling.dit import KlingTransformer3DModel
from kling.errors import UserError
from kling.hub.files import Shapes
from kling.hub.keys import strip_prefix, transformer_name
from kling.hub.registry import Build

HEAD_DIM = 128  # of every published Wan model; the number of heads cannot be derived from the shapes
RAY_PIXELS = 8  # side, in pixels, of the cell that the published camera adapters fold
# modules that this toolkit does not have, and the models that have them
FOREIGN = {
    "vace_": "VACE weights, which are not supported yet",
    "motion_encoder": "Animate weights, which are not supported yet",
    "face_adapter": "Animate weights, which are not supported yet",
    "ref_conv": "Fun Control weights with reference images (V1.1), which are not supported yet",
    "lora_": "a LoRA, not a model: give it as a LoRA",
    "encoder.block.": "a text encoder, not a transformer",
    "decoder.": "a VAE, not a transformer",
}


def transformer_names(shapes: Shapes) -> dict[str, str]:
    """Name in the file -> our name, for original and diffusers naming, with any prefix from repackaging removed."""
    prefix = strip_prefix(shapes)
    original = any(".self_attn." in name for name in shapes)  # "norm2" is a different layer in each naming
    bare = {name: name.removeprefix(prefix) for name in shapes}
    return {name: transformer_name(short) if original else short for name, short in bare.items()}


def transformer_config(shapes: Shapes, source: str) -> dict[str, Any]:
    """The config of the transformer whose tensors (under our names) have these shapes. `source` names the file in errors.

    Raises `UserError` with the unexpected names if it is no known transformer, or not a complete one.
    """
    for sign, whose in FOREIGN.items():
        if any(name.startswith(sign) or f".{sign}" in name for name in shapes):
            raise UserError(f"{source} holds {whose}")
    try:
        config = _read_config(shapes)
    except KeyError as missing:
        odd = ", ".join(sorted(shapes)[:5])
        raise UserError(f"{source} is no Wan transformer: it has no {missing}, but {odd} and {max(0, len(shapes) - 5)} more") from None
    check_shapes(shapes, config, source)
    return config


def check_shapes(shapes: Shapes, config: dict[str, Any], source: str) -> None:
    """Raises `UserError` with the list of wrong names unless these are the tensors of a transformer with this config."""
    with torch.device("meta"):
        model = KlingTransformer3DModel(**config)
    expected = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    ignored = KlingTransformer3DModel._keys_to_ignore_on_load_unexpected
    surplus = sorted(name for name in shapes.keys() - expected.keys() if not any(sign in name for sign in ignored))
    lacking = sorted(expected.keys() - shapes.keys())
    other = sorted(name for name in shapes.keys() & expected.keys() if shapes[name] != expected[name])
    odd = [f"unknown {name}" for name in surplus] + [f"missing {name}" for name in lacking]
    odd += [f"{name} is {shapes[name]}, not {expected[name]}" for name in other]
    if odd:
        more = f" and {len(odd) - 12} more" if len(odd) > 12 else ""
        raise UserError(f"{source} is not a transformer that this toolkit knows: {'; '.join(odd[:12])}{more}")


def _read_config(shapes: Shapes) -> dict[str, Any]:
    dim, in_channels, *patch = shapes["patch_embedding.weight"]
    config = {
        "patch_size": tuple(patch),
        "num_attention_heads": max(1, dim // HEAD_DIM),
        "attention_head_dim": min(dim, HEAD_DIM),
        "in_channels": in_channels,
        "out_channels": shapes["proj_out.weight"][0] // prod(patch),
        "text_dim": shapes["condition_embedder.text_embedder.linear_1.weight"][1],
        "freq_dim": shapes["condition_embedder.time_embedder.linear_1.weight"][1],
        "ffn_dim": shapes["blocks.0.ffn.net.0.proj.weight"][0],
        "num_layers": len({name.split(".")[1] for name in shapes if re.match(r"blocks\.\d+\.", name)}),
        "cross_attn_norm": "blocks.0.norm2.weight" in shapes,
    }
    if "condition_embedder.image_embedder.norm1.weight" in shapes:
        config["image_dim"] = shapes["condition_embedder.image_embedder.norm1.weight"][0]
        config["added_kv_proj_dim"] = shapes["blocks.0.attn2.add_k_proj.weight"][1]
    if "condition_embedder.image_embedder.pos_embed" in shapes:
        config["pos_embed_seq_len"] = shapes["condition_embedder.image_embedder.pos_embed"][1]
    if "control_adapter.conv.weight" in shapes:
        blocks = {name.split(".")[2] for name in shapes if name.startswith("control_adapter.residual_blocks.")}
        config |= {
            "camera_channels": shapes["control_adapter.conv.weight"][1] // RAY_PIXELS**2,
            "camera_downscale": RAY_PIXELS,
            "camera_residual_blocks": len(blocks),
        }
    if "condition_embedder.delta_embedder.linear_1.weight" in shapes:  # the gate is in no tensor; every published flow map has this one
        config |= {"gate_value": 0.25, "deltatime_type": "r"}
    if "kind_embedding.weight" in shapes:
        config["num_kinds"] = shapes["kind_embedding.weight"][0]
    if "track_embedding.weight" in shapes:
        config["track_channels"] = shapes["track_embedding.weight"][1]
    return config


def build_of(config: dict[str, Any]) -> Build:
    """The registry's `Build` of a transformer's config."""
    z = config["out_channels"]
    return Build(
        dim=config["num_attention_heads"] * config["attention_head_dim"],
        layers=config["num_layers"],
        z=z,
        extra=config["in_channels"] - z,
        image=config.get("image_dim") is not None,
        ends=config.get("pos_embed_seq_len") is not None,
        camera=bool(config.get("camera_channels")),
        flow_map=config.get("gate_value") is not None,
    )
