"""Loading: a Wan folder in diffusers layout, a hub id, or single files with such a folder -> the arguments of a `KlingPipeline`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import SchedulerMixin

from kling.dit import KlingTransformer3DModel
from kling.errors import UserError
from kling.flow.diffusers_scheduler import shift_key
from kling.flow.solvers import KlingFlowScheduler
from kling.hub.clip import load_image_encoder
from kling.hub.detect import build_of, transformer_config, transformer_names
from kling.hub.files import PICKLES, read_shapes, read_tensors
from kling.hub.keys import strip_prefix, vae_name
from kling.hub.registry import CHECKPOINTS, PublishedCheckpoint, by_build, by_name
from kling.runtime.files import parse_object
from kling.runtime.precision import bf16_is_fast
from kling.text.encoder import ByteTextEncoder
from kling.text.umt5 import UMT5TextEncoder
from kling.vae import AutoencoderKLKling

OURS = "KlingPipeline"
SETTINGS = ("capabilities", "fps", "max_frames", "sizes", "boundary_ratio", "block_frames", "defaults", "licence", "vocabulary")
SETTINGS += ("track_writing",)
WAN_PIPELINES = ("WanPipeline", "WanImageToVideoPipeline", "AnyFlowPipeline", "WanAnyFlowPipeline")  # the last: as published
FLOW_MAPS = ("FlowMapEulerDiscreteScheduler", "FlowMapDiscreteScheduler")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
PUBLISHED = ["*.json", "*.safetensors", "*.txt", "*.model"]  # no pickles


def find_folder(path: str | Path, weights: bool = True) -> Path:
    """A folder on disk, or the snapshot of a hub id, downloaded if necessary. Raises `UserError` if it is neither.

    weights: False leaves the weights out, which is enough for planning.
    """
    folder = Path(path)
    if folder.exists() or not HUB_ID.fullmatch(str(path)):
        return folder
    from huggingface_hub import snapshot_download

    try:
        patterns = [pattern for pattern in PUBLISHED if weights or "safetensors" not in pattern] + ["*.safetensors.index.json"]
        return Path(snapshot_download(str(path), allow_patterns=patterns))
    except Exception as error:  # many classes, of several packages
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"model '{path}' is no folder here and cannot be had from the hub ({reason}): check name and network") from None


def find_file(path: str | Path, name: str | None, usual: str, **hub: Any) -> Path:
    """A file, one of a folder, or one of a repository of the hub, downloaded if need be. Raises `UserError` if there is none.

    name: which of several. Without it, the `usual` one, or the folder itself where that is absent. hub: keywords of `hf_hub_download`.
    """
    place = Path(path)
    if not place.exists() and place.suffix not in (".safetensors", *PICKLES) and HUB_ID.fullmatch(str(path)):
        from huggingface_hub import hf_hub_download

        try:
            return Path(hf_hub_download(str(path), name or usual, **hub))
        except Exception as error:  # many classes, of several packages
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"'{path}' is no file here and cannot be had from the hub ({reason}): check name and network") from None
    if hub:
        raise UserError(f"{next(iter(hub))} is for what comes from the hub, and '{path}' does not: leave it out")
    if not place.is_dir():
        return place
    file = place / (name or usual)
    if name and not file.is_file():
        raise UserError(f"'{path}' holds no {name}: check weight_name")
    return file if file.is_file() else place


def read_index(folder: Path) -> dict[str, Any]:
    """The model_index.json of a pipeline folder."""
    try:
        return parse_object((folder / "model_index.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"model folder '{folder}' does not exist or holds no model_index.json: give a folder that kling-train exported, "
            "or published weights in diffusers layout"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"model folder '{folder}' is damaged: model_index.json is not readable ({error})") from None


def load(
    folder: Path,
    dtype: torch.dtype | None = None,
    checkpoint: str | None = None,
    transformer: str | Path | None = None,
    transformer_2: str | Path | None = None,
    vae: str | Path | None = None,
    weights: bool = True,
    text_cache: str | Path | None = None,
    transformer_fast: bool = True,
) -> dict[str, Any]:
    """Every argument of `KlingPipeline` from a folder of ours, or a Wan folder in diffusers layout.

    transformer, transformer_2, vae: files or folders of safetensors, in either naming, that replace the folder's own.
    checkpoint: the registry's name of the weights, if it cannot be told from the files.
    dtype: of the transformers and the text encoder, by default fp32 for ours and bf16 for Wan's, whose VAE runs in fp32 in any case.
    weights: False builds everything without them, on the meta device, which is enough for planning.
    text_cache: a folder for umT5's embeddings of prompts.
    transformer_fast: False leaves out the few-step weights, for a program that makes nothing in mode fast.
    """
    index = read_index(folder)
    kind = index.get("_class_name")
    if kind not in (OURS, *WAN_PIPELINES):
        raise UserError(f"{folder} is made for {kind}, which is not supported: give one for {', '.join((OURS, *WAN_PIPELINES))}")
    wan = kind != OURS
    dtype = dtype or (torch.bfloat16 if wan else torch.float32)
    parts: dict[str, Any] = {}
    for name, given in {"transformer": transformer, "transformer_2": transformer_2}.items():
        if given is not None:
            parts[name] = load_transformer(given, dtype, weights)
        elif name == "transformer" or (has(index, name) and transformer is None):
            parts[name] = loaded(folder, name, KlingTransformer3DModel, weights, torch_dtype=dtype)
    if not wan and transformer_fast and has(index, "transformer_fast") and transformer is None:
        parts["transformer_fast"] = loaded(folder, "transformer_fast", KlingTransformer3DModel, weights, torch_dtype=dtype)
    precise = torch.float32 if wan else dtype
    if vae is None or not weights:
        parts["vae"] = loaded(folder, "vae", AutoencoderKLKling, weights, torch_dtype=precise)
    else:
        parts["vae"] = load_vae_file(vae, folder)
    if wan or has_umt5(folder):
        parts["text_encoder"] = UMT5TextEncoder(folder, dtype, cache=text_cache)
    elif text_cache is not None:
        raise UserError(f"text_cache {text_cache} is for umT5, and {folder} has a small text encoder of its own: leave it out")
    else:
        parts["text_encoder"] = loaded(folder, "text_encoder", ByteTextEncoder, weights, torch_dtype=dtype)
    if weights and has(index, "image_encoder"):
        parts |= load_image_encoder(folder)
    elif weights and parts["transformer"].config.image_dim is not None:
        raise UserError(
            f"this transformer sees pictures through CLIP, and {folder} has no image_encoder: give the folder of a Wan 2.1 I2V model"
        )
    parts["scheduler"] = load_scheduler(folder)
    if not wan and checkpoint is None and transformer is None:
        return parts | {key: index[key] for key in (*SETTINGS, "sampling_dtype", "fast") if key in index}

    experts = "transformer_2" in parts
    boundary = index.get("boundary_ratio") if experts else None
    row = find_row(folder, parts["transformer"], experts, checkpoint, replaced=transformer is not None)
    if transformer is not None:  # the folder's own settings describe the weights that it contains
        parts["scheduler"] = scheduler_of(row, parts["scheduler"])
        boundary = row.boundary
    return parts | settings_of(row, boundary)


def sampling_dtype(folder: Path, device_type: str) -> torch.dtype | None:
    """The dtype in which programs sample a model folder of ours: bfloat16 if the checkpoint allows it (`sampling_dtype`) and this device is
    faster with it; None is `load`'s default. A training that starts from the folder drops the setting: its weights are measured again."""
    allowed = read_index(folder).get("sampling_dtype") == "bf16"
    return torch.bfloat16 if allowed and bf16_is_fast(device_type) else None


def has(index: dict[str, Any], name: str) -> bool:
    """Whether a pipeline folder lists this part."""
    return bool(index.get(name) and index[name][0])


def has_umt5(folder: Path) -> bool:
    """Whether prompts are encoded by umT5: our own encoder has no tokenizer."""
    return (folder / "tokenizer").is_dir()


def settings_of(row: PublishedCheckpoint, boundary: float | None) -> dict[str, Any]:
    """The settings of a pipeline from a registry row."""
    return {
        "capabilities": list(row.capabilities),
        "fps": row.fps,
        "max_frames": row.frames,
        "sizes": row.sizes,
        "boundary_ratio": boundary,
        "block_frames": row.block,
        "licence": row.licence,
        "track_writing": row.tracks or None,
        "defaults": {"num_inference_steps": row.steps, "guidance_scale": list(row.guidance), "negative_prompt": row.negative},
    }


def find_row(folder: Path, model: KlingTransformer3DModel, experts: bool, checkpoint: str | None, replaced: bool) -> PublishedCheckpoint:
    """The registry's row: the requested one, else the one of the folder's name, else the only one with this build."""
    if checkpoint is not None:
        return by_name(checkpoint)
    if not replaced:
        for row in CHECKPOINTS:
            if row.repo.split("/")[1] in (folder.name, *(part.split("--")[-1] for part in folder.parts)):
                return row
    return by_build(build_of(model.config), experts, plain=not replaced)


def loaded(folder: Path, name: str, part: type, weights: bool = True, **kwargs: Any) -> Any:
    """One part of a pipeline folder, or without weights. Raises `UserError` of one line if it is missing or damaged."""
    if name != "scheduler":  # diffusers falls back to a pickle
        kwargs["use_safetensors"] = True
    try:
        if not weights:
            with torch.device("meta"):
                return in_dtype(part.from_config(part.load_config(folder / name)), kwargs["torch_dtype"])
        return part.from_pretrained(folder / name, **kwargs)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"model {folder} is incomplete: {name} cannot be loaded ({reason})") from None


def dtype_of(name: str, model: torch.nn.Module, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a model in `dtype` stores a parameter: float32 in the parts that the model lists."""
    exact = getattr(model, "_keep_in_fp32_modules", None) or ()
    return torch.float32 if set(exact) & set(name.split(".")) else dtype


def in_dtype(model: torch.nn.Module, dtype: torch.dtype) -> Any:
    """The same model as `from_pretrained(torch_dtype=dtype)` returns; `.to(dtype)` would also cast the parts that stay fp32, and warn."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype_of(name, model, dtype))
    return model


def load_transformer(path: str | Path, dtype: torch.dtype = torch.float32, weights: bool = True) -> KlingTransformer3DModel:
    """A transformer from safetensors only, in original or diffusers naming; its config follows from the shapes.

    Raises `UserError` with the unexpected names for anything else.
    """
    shapes = read_shapes(path)
    names = transformer_names(shapes)
    config = transformer_config({names[name]: shape for name, shape in shapes.items()}, str(path))
    with torch.device("meta"):
        model = KlingTransformer3DModel(**config)
    if not weights:
        return in_dtype(model, dtype)
    tensors = {}
    for name, tensor in read_tensors(path).items():
        tensors[names[name]] = tensor.to(dtype_of(names[name], model, dtype))
    ignored = KlingTransformer3DModel._keys_to_ignore_on_load_unexpected
    tensors = {name: tensor for name, tensor in tensors.items() if not any(sign in name for sign in ignored)}
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def load_vae_file(path: str | Path, folder: Path) -> AutoencoderKLKling:
    """A VAE from safetensors in original or diffusers naming. Its config is the folder's: the latents' statistics are in no tensor."""
    config = AutoencoderKLKling.load_config(folder / "vae")
    with torch.device("meta"):
        model = AutoencoderKLKling.from_config(config)
    tensors = read_tensors(path)
    prefix = strip_prefix(tensors)
    tensors = {vae_name(name.removeprefix(prefix), model.config.num_res_blocks): t.float() for name, t in tensors.items()}
    expected = model.state_dict()
    odd = sorted(tensors.keys() ^ expected.keys()) + [n for n in tensors.keys() & expected.keys() if tensors[n].shape != expected[n].shape]
    if odd:
        raise UserError(f"{path} is not the VAE that {folder}/vae/config.json describes: {', '.join(odd[:12])} differ")
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def load_scheduler(folder: Path) -> SchedulerMixin:
    """The folder's own scheduler: ours, or any of diffusers' flow schedulers."""
    try:
        config = parse_object((folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(f"model {folder} is incomplete: scheduler/scheduler_config.json is missing or not readable") from None
    name = config.get("_class_name")
    if name == KlingFlowScheduler.__name__:
        return loaded(folder, "scheduler", KlingFlowScheduler)
    if name in FLOW_MAPS:
        return KlingFlowScheduler(shift=config.get("shift", 1.0), solver="flow_map", num_inference_steps=4, guidance_scale=1.0)
    kind = getattr(diffusers, str(name), None)
    flow = name == "FlowMatchEulerDiscreteScheduler" or config.get("use_flow_sigmas")
    if kind is None or not flow:
        raise UserError(f"scheduler {name} of {folder} does not use flow-matching noise levels: use UniPCMultistepScheduler")
    return loaded(folder, "scheduler", kind)


def scheduler_of(row: PublishedCheckpoint, own: SchedulerMixin) -> SchedulerMixin:
    """The scheduler that a row's authors sample with, based on the folder's own."""
    if row.sampler != "unipc":
        return KlingFlowScheduler(shift=row.shift, solver=row.sampler, num_inference_steps=row.steps, guidance_scale=row.guidance[0])
    return type(own).from_config(own.config, **{shift_key(own): row.shift})
