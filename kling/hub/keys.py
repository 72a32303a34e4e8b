"""Parameter names: the original ones of the Wan repositories <-> ours (which are diffusers').

Every rule is a pair and is applied in both directions, so that exporting restores the names of the import.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

# ---- transformer: each original name is rewritten piece by piece ----

TRANSFORMER = (
    ("time_embedding.0.", "condition_embedder.time_embedder.linear_1."),
    ("time_embedding.2.", "condition_embedder.time_embedder.linear_2."),
    ("text_embedding.0.", "condition_embedder.text_embedder.linear_1."),
    ("text_embedding.2.", "condition_embedder.text_embedder.linear_2."),
    ("time_projection.1.", "condition_embedder.time_proj."),
    ("img_emb.emb_pos", "condition_embedder.image_embedder.pos_embed"),
    ("img_emb.proj.0.", "condition_embedder.image_embedder.norm1."),
    ("img_emb.proj.1.", "condition_embedder.image_embedder.ff.net.0.proj."),
    ("img_emb.proj.3.", "condition_embedder.image_embedder.ff.net.2."),
    ("img_emb.proj.4.", "condition_embedder.image_embedder.norm2."),
    ("head.head.", "proj_out."),
)
BLOCK = (
    ("self_attn.q.", "attn1.to_q."), ("self_attn.k.", "attn1.to_k."), ("self_attn.v.", "attn1.to_v."), ("self_attn.o.", "attn1.to_out.0."),
    ("self_attn.norm_q.", "attn1.norm_q."), ("self_attn.norm_k.", "attn1.norm_k."),
    ("cross_attn.q.", "attn2.to_q."), ("cross_attn.k.", "attn2.to_k."), ("cross_attn.v.", "attn2.to_v."),
    ("cross_attn.o.", "attn2.to_out.0."), ("cross_attn.norm_q.", "attn2.norm_q."), ("cross_attn.norm_k.", "attn2.norm_k."),
    ("cross_attn.k_img.", "attn2.add_k_proj."), ("cross_attn.v_img.", "attn2.add_v_proj."),
    ("cross_attn.norm_k_img.", "attn2.norm_added_k."),
    ("ffn.0.", "ffn.net.0.proj."), ("ffn.2.", "ffn.net.2."),
    ("norm3.", "norm2."), ("norm2.", "norm3."),  # the original numbers them 1, 3, 2 in order of use
    ("modulation", "scale_shift_table"),
)  # fmt: skip
# of repackaged and training checkpoints
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model._fsdp_wrapped_module.", "model.", "module.")


def transformer_name(original: str) -> str:
    """The original name of a transformer's parameter -> ours. Names without a rule are returned unchanged."""
    if found := re.fullmatch(r"(blocks\.\d+\.)(.*)", original):
        return found[1] + _first(BLOCK, found[2])
    return "scale_shift_table" if original == "head.modulation" else _first(TRANSFORMER, original)


def original_transformer_name(ours: str) -> str:
    """Inverse of `transformer_name`."""
    if found := re.fullmatch(r"(blocks\.\d+\.)(.*)", ours):
        return found[1] + _first(_turned(BLOCK), found[2])
    return "head.modulation" if ours == "scale_shift_table" else _first(_turned(TRANSFORMER), ours)


# ---- VAE ----

VAE = (
    ("encoder.conv1.", "encoder.conv_in."), ("decoder.conv1.", "decoder.conv_in."),
    ("encoder.head.0.", "encoder.norm_out."), ("decoder.head.0.", "decoder.norm_out."),
    ("encoder.head.2.", "encoder.conv_out."), ("decoder.head.2.", "decoder.conv_out."),
    ("encoder.middle.0.", "encoder.mid_block.resnets.0."), ("decoder.middle.0.", "decoder.mid_block.resnets.0."),
    ("encoder.middle.1.", "encoder.mid_block.attentions.0."), ("decoder.middle.1.", "decoder.mid_block.attentions.0."),
    ("encoder.middle.2.", "encoder.mid_block.resnets.1."), ("decoder.middle.2.", "decoder.mid_block.resnets.1."),
    ("conv1.", "quant_conv."), ("conv2.", "post_quant_conv."),
)  # fmt: skip
RESIDUAL = (
    ("residual.0.", "norm1."), ("residual.2.", "conv1."), ("residual.3.", "norm2."), ("residual.6.", "conv2."),
    ("shortcut.", "conv_shortcut."),
)  # fmt: skip


def vae_name(original: str, depth: int = 2) -> str:
    """The original name of a VAE's parameter -> ours; `depth` is the config's `num_res_blocks`.

    Wan 2.1 numbers the decoder's blocks consecutively (depth + 1 residual ones and an upsampler per level); Wan 2.2 nests them.
    """
    level = depth + 2
    if found := re.fullmatch(r"encoder\.downsamples\.(\d+)\.downsamples\.(\d+)\.(.*)", original):  # Wan 2.2
        part = f"resnets.{found[2]}" if int(found[2]) < depth else "downsampler"
        return f"encoder.down_blocks.{found[1]}.{part}.{_first(RESIDUAL, found[3])}"
    if found := re.fullmatch(r"decoder\.upsamples\.(\d+)\.upsamples\.(\d+)\.(.*)", original):
        part = f"resnets.{found[2]}" if int(found[2]) <= depth else "upsampler"
        return f"decoder.up_blocks.{found[1]}.{part}.{_first(RESIDUAL, found[3])}"
    if found := re.fullmatch(r"encoder\.downsamples\.(\d+)\.(.*)", original):  # Wan 2.1
        return f"encoder.down_blocks.{found[1]}.{_first(RESIDUAL, found[2])}"
    if found := re.fullmatch(r"decoder\.upsamples\.(\d+)\.(.*)", original):
        i, j = divmod(int(found[1]), level)
        part = f"resnets.{j}" if j <= depth else "upsamplers.0"
        return f"decoder.up_blocks.{i}.{part}.{_first(RESIDUAL, found[2])}"
    head = _first(VAE, original)
    prefix, middle, rest = head.partition(".mid_block.")
    if not middle:
        return head
    block, number, name = rest.split(".", 2)
    return f"{prefix}.mid_block.{block}.{number}.{_first(RESIDUAL, name)}"


def original_vae_name(ours: str, depth: int = 2, nested: bool = False) -> str:
    """Inverse of `vae_name`. `nested`: the Wan 2.2 type (`is_residual`)."""
    residual = _turned(RESIDUAL)
    if found := re.fullmatch(r"encoder\.down_blocks\.(\d+)\.(?:resnets\.(\d+)|downsampler)\.(.*)", ours):
        return f"encoder.downsamples.{found[1]}.downsamples.{found[2] or depth}.{_first(residual, found[3])}"
    if found := re.fullmatch(r"decoder\.up_blocks\.(\d+)\.(?:resnets\.(\d+)|upsamplers\.0|upsampler)\.(.*)", ours):
        i, j = int(found[1]), int(found[2] or depth + 1)
        place = f"{i}.upsamples.{j}" if nested else str(i * (depth + 2) + j)
        return f"decoder.upsamples.{place}.{_first(residual, found[3])}"
    if found := re.fullmatch(r"encoder\.down_blocks\.(\d+)\.(.*)", ours):
        return f"encoder.downsamples.{found[1]}.{_first(residual, found[2])}"
    if found := re.fullmatch(r"(.*\.mid_block\.resnets\.\d\.)(.*)", ours):
        ours = found[1] + _first(residual, found[2])
    return _first(_turned(VAE), ours)


# ---- used by both ----


def strip_prefix(names: Iterable[str]) -> str:
    """The prefix that all names share, out of those that repackaging adds; often empty."""
    names = list(names)
    return next((prefix for prefix in PREFIXES if names and all(name.startswith(prefix) for name in names)), "")


def _turned(rules: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
    return tuple((b, a) for a, b in rules)


def _first(rules: tuple[tuple[str, str], ...], name: str) -> str:
    """Rewrite the start of a name by the first rule that matches."""
    return next((new + name.removeprefix(old) for old, new in rules if name.startswith(old)), name)
