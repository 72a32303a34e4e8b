"""Exports weights in the layouts and with the names that other tools read; the tensors themselves are unchanged.

diffusers    model_index.json, transformer/, transformer_2/, vae/, scheduler/ ...: what `WanPipeline.from_pretrained` loads
original     diffusion_pytorch_model*.safetensors and config.json (or high_noise_model/ and low_noise_model/), Wan_VAE.safetensors:
             the repositories of Wan-Video, ComfyUI and the trainers built on them
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler, SchedulerMixin, UniPCMultistepScheduler, WanTransformer3DModel
from huggingface_hub import save_torch_state_dict
from torch import Tensor

from kling.condition.concat import concat_groups
from kling.errors import UserError, unknown
from kling.flow.solvers import KlingFlowScheduler
from kling.hub.detect import transformer_config, transformer_names
from kling.hub.files import read_shapes, read_tensors
from kling.hub.keys import original_transformer_name, original_vae_name
from kling.hub.load import OURS, has, load_scheduler, read_index
from kling.runtime.files import parse_object, writing, written_folder

NAMINGS = ("diffusers", "original")
EXPERTS = {"transformer": "high_noise_model", "transformer_2": "low_noise_model"}
COPIED = {"text_encoder": "UMT5EncoderModel", "image_encoder": "CLIPVisionModel", "image_processor": "CLIPImageProcessor"}
SHARD = "5GB"


def export_weights(source: str | Path, target: str | Path, naming: str = "diffusers") -> list[Path]:
    """Write a pipeline folder, or a single transformer, for other tools; returns the files. The target is written atomically.

    Raises `UserError` if the target exists, or if the weights have parts that the naming cannot express.
    """
    source, target = Path(source), Path(target)
    if naming not in NAMINGS:
        raise unknown("naming", naming, NAMINGS)
    if target.exists():
        raise UserError(f"{target} exists already: choose another path")
    with written_folder(target, replace=False) as folder:
        if not (source / "model_index.json").is_file():
            _transformer(source, folder, naming)
        elif naming == "diffusers":
            _diffusers(source, folder)
        else:
            _original(source, folder)
    return sorted(path for path in target.rglob("*") if path.is_file())


def _diffusers(source: Path, target: Path) -> None:
    index = read_index(source)
    if not (source / "tokenizer").is_dir():
        raise UserError(f"{source} has a text encoder of its own, which no Wan pipeline knows: train on umT5 embeddings to export it")
    out: dict[str, Any] = {"boundary_ratio": index.get("boundary_ratio"), "expand_timesteps": index.get("expand_timesteps", False)}
    for name in EXPERTS:
        if has(index, name):
            _transformer(source / name, target / name, "diffusers")
            out[name] = ["diffusers", "WanTransformer3DModel"]
    config = _config(source / "transformer")
    groups = concat_groups(config["in_channels"], config["out_channels"])
    if index["_class_name"] == OURS:  # what we do (given frames replace latents) is called expanded timesteps in diffusers
        out["expand_timesteps"] = not groups and "image" in index["capabilities"]
    shutil.copytree(source / "vae", target / "vae")
    _write_json(target / "vae" / "config.json", _config(source / "vae") | {"_class_name": "AutoencoderKLWan"})
    out["vae"] = ["diffusers", "AutoencoderKLWan"]
    tokenizer = _config(source / "tokenizer", "tokenizer_config.json")["tokenizer_class"]
    for name, kind in {**COPIED, "tokenizer": tokenizer}.items():
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name)
            out[name] = ["transformers", kind]
    scheduler = published_scheduler(load_scheduler(source))
    scheduler.save_pretrained(target / "scheduler")
    out["scheduler"] = ["diffusers", type(scheduler).__name__]
    kind = index["_class_name"] if index["_class_name"] != OURS else "WanImageToVideoPipeline" if groups else "WanPipeline"
    _write_json(target / "model_index.json", {"_class_name": kind, "_diffusers_version": index.get("_diffusers_version")} | out)


def _original(source: Path, target: Path) -> None:
    index = read_index(source)
    two = has(index, "transformer_2")
    for name, folder in EXPERTS.items():
        if has(index, name):
            _transformer(source / name, target / folder if two else target, "original")
    config = _config(source / "vae")
    depth, nested = config.get("num_res_blocks", 2), config.get("is_residual", False)
    _write_tensors(read_tensors(source / "vae"), target, lambda name: original_vae_name(name, depth, nested), "Wan_VAE")


def _transformer(source: Path, target: Path, naming: str) -> None:
    """Write one transformer, read from either naming."""
    names = transformer_names(read_shapes(source))
    config = _config(source) if (source / "config.json").is_file() else {}
    if "num_layers" not in config or "attention_head_dim" not in config:
        config = transformer_config({names[name]: shape for name, shape in read_shapes(source).items()}, str(source))
    if any("delta_embedder" in name for name in names.values()):
        raise UserError(f"{source} is a flow map, and no Wan pipeline tells it where a step ends: use it in its own folder format")
    tensors = {names[name]: tensor for name, tensor in read_tensors(source).items()}
    if naming == "original":
        _write_tensors(tensors, target, original_transformer_name)
        _write_json(target / "config.json", original_config(config))
        return
    if extra := sorted(
        {name.split(".")[0] for name in tensors if name.startswith(("kind_embedding", "control_adapter", "track_embedding"))}
    ):
        raise UserError(f"{source} holds {', '.join(extra)}, which diffusers' Wan does not have: use it in its own folder format")
    known = WanTransformer3DModel._get_init_keys(WanTransformer3DModel)
    _write_tensors(tensors, target, str)
    published = {key: value for key, value in config.items() if key in known}
    _write_json(target / "config.json", {"_class_name": "WanTransformer3DModel"} | published)


def original_config(config: dict[str, Any]) -> dict[str, Any]:
    """The config.json of the original repositories."""
    dim = config["num_attention_heads"] * config["attention_head_dim"]
    image, ends = config.get("image_dim"), config.get("pos_embed_seq_len")
    z = config["out_channels"]
    kind = "flf2v" if ends else "i2v" if config["in_channels"] > z else "ti2v" if z == 48 else "t2v"
    keys = {"model_type": kind, "dim": dim, "num_heads": config["num_attention_heads"], "in_dim": config["in_channels"], "out_dim": z}
    keys |= {key: config[key] for key in ("ffn_dim", "freq_dim", "num_layers")}
    keys |= {"eps": config.get("eps", 1e-6), "text_len": 512}
    keys |= {"add_control_adapter": True, "in_dim_control_adapter": config["camera_channels"]} if config.get("camera_channels") else {}
    return keys | ({"add_img_emb": True} if image else {})


def published_scheduler(scheduler: SchedulerMixin) -> SchedulerMixin:
    """The scheduler for other tools: the same one, or the diffusers scheduler nearest to ours.

    "renoise" is exactly the stochastic Euler sampling of `FlowMatchEulerDiscreteScheduler`; "euler" is its deterministic form.
    """
    if not isinstance(scheduler, KlingFlowScheduler):
        return scheduler
    shift, solver = scheduler.config.shift, scheduler.config.solver
    if solver == "adams":
        return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    return FlowMatchEulerDiscreteScheduler(shift=shift, stochastic_sampling=solver == "renoise")


def _config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    try:
        return parse_object((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(f"{folder} has no readable {name}: get it again") from None


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_tensors(tensors: dict[str, Tensor], folder: Path, rename: Callable[[str], str], stem: str = "diffusion_pytorch_model") -> None:
    """Write renamed tensors, in shards with an index if there are many."""
    folder.mkdir(parents=True, exist_ok=True)
    renamed = {rename(name): tensor for name, tensor in tensors.items()}
    with writing(folder):
        save_torch_state_dict(renamed, folder, filename_pattern=f"{stem}{{suffix}}.safetensors", max_shard_size=SHARD)
