"""Exports the model folder at the end of a training."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from kling.runtime.files import written_folder
from kling.sampling.pipeline import KlingPipeline
from kling.text.umt5 import UMT5TextEncoder


def save_pipeline(pipe: KlingPipeline, folder: Path) -> None:
    """Write a folder for `KlingPipeline.from_pretrained`, atomically: trained weights in bf16, except those that must stay fp32.

    For published weights the encoders are copied, and the VAE keeps its precision, because they were not trained.
    """
    with written_folder(folder) as temporary:
        _write(pipe, temporary)


def _write(pipe: KlingPipeline, temporary: Path) -> None:
    published = isinstance(pipe.text_encoder, UMT5TextEncoder)
    for name in ("text_encoder", "image_encoder", "image_processor") if published else ():
        if (part := getattr(pipe, name)) is not None:
            part.save_pretrained(temporary if name == "text_encoder" else temporary / name)
    for name in ("vae", "transformer", *(("transformer_2",) if published else ("text_encoder",)), "transformer_fast"):
        if (part := getattr(pipe, name)) is None:
            continue
        part.save_config(temporary / name)
        _forget_origin(temporary / name / "config.json")
        dtype = torch.float32 if published and name == "vae" else torch.bfloat16
        exact = set(part._keep_in_fp32_modules or ())
        weights = {
            key: t.detach().to("cpu", torch.float32 if exact & set(key.split(".")) else dtype).contiguous()
            for key, t in part.state_dict().items()
        }
        save_file(weights, temporary / name / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    pipe.scheduler.save_pretrained(temporary / "scheduler")
    pipe.save_config(temporary)


def _forget_origin(config: Path) -> None:
    """Remove the path of the weights that training started from: others do not have that folder."""
    settings = json.loads(config.read_text())
    settings.pop("_name_or_path", None)
    config.write_text(json.dumps(settings, indent=2) + "\n")
