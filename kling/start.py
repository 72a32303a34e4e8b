"""Where a training starts: a text encoder that was taught, or a model folder, ours or published ("Start from Wan").

What a folder says beside its weights (scheduler, sizes, guidance, licence) stays with what comes out of the training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import SchedulerMixin

from kling.cache import text_folder
from kling.dit import KlingTransformer3DModel
from kling.errors import UserError, unknown
from kling.flow.plain import shift_key
from kling.flow.scheduler import KlingFlowScheduler
from kling.hub.load import SETTINGS, find_folder, has_umt5, load, loaded
from kling.text import ByteTextEncoder
from kling.text.umt5 import UMT5TextEncoder
from kling.vae import AutoencoderKLKling

EXTRAS = ("num_kinds", "camera_channels", "camera_fold", "camera_downscale", "camera_residual_blocks")


@dataclass(frozen=True)
class Start:
    """A model folder that training starts from. settings: arguments of `KlingPipeline` beside the models; of them stays what the
    training does not change."""

    folder: Path
    settings: dict[str, Any]

    @property
    def published(self) -> bool:
        """Whether its prompts are umT5's, which is not trained."""
        return has_umt5(self.folder)

    def transformer(self, model: Mapping[str, Any]) -> KlingTransformer3DModel:
        """Its transformer with the conditions of `model` added; see `grow`."""
        return grow(self.folder / "transformer", model)

    def text(self, settings: Mapping[str, Any], cache: str | Path) -> ByteTextEncoder | UMT5TextEncoder:
        """Its text encoder. settings: what is asked of it; `UserError` if it is another one. cache: the latent cache."""
        if not self.published:
            text = loaded(self.folder, "text_encoder", ByteTextEncoder, torch_dtype=torch.float32)
            _check_text(text, settings, f"init_from {self.folder}")
            return text
        if settings:
            raise UserError(f"init_from {self.folder} reads prompts with umT5, which is not trained: leave text.{min(settings)} out")
        return UMT5TextEncoder(self.folder, cache=text_folder(cache))

    def scheduler(self, given: Mapping[str, Any]) -> SchedulerMixin:
        """Its own scheduler with the settings `given`; a published one takes a shift, and `density` is for training alone."""
        own = self.settings["scheduler"]
        if isinstance(own, KlingFlowScheduler):
            return new_scheduler({key: value for key, value in own.config.items() if not key.startswith("_")} | dict(given))
        for key in given:
            if key not in ("shift", "density"):
                raise UserError(f"scheduler.{key} is set, and init_from {self.folder} keeps its {type(own).__name__}: leave it out")
        return type(own).from_config(own.config, **({shift_key(own): given["shift"]} if "shift" in given else {}))


def open_start(path: str | Path, checkpoint: str | None = None) -> Start:
    """The start that a model folder or hub id is. checkpoint: the registry's name of it, where the files do not tell.

    Raises `UserError` if it is none, or one whose weights this training cannot train.
    """
    folder = find_folder(path)
    parts = load(folder, checkpoint=checkpoint, weights=False)
    return Start(folder, {key: parts[key] for key in (*SETTINGS, "scheduler") if key in parts})


def new_scheduler(settings: Mapping[str, Any]) -> KlingFlowScheduler:
    """Ours. Raises `UserError` for a setting that it does not have."""
    known = KlingFlowScheduler._get_init_keys(KlingFlowScheduler) - {"self"}
    for key in settings:
        if key not in known:
            raise unknown("key of scheduler", key, sorted(known))
    return KlingFlowScheduler(**settings)


def grow(folder: str | Path, model: Mapping[str, Any]) -> KlingTransformer3DModel:
    """The transformer of a folder with the conditions of `model` added to those it has: new inputs start at zero, so its output is
    unchanged. Raises `UserError` for a key that differs and is no condition, or that changes one which is trained already."""
    with torch.device("meta"):
        had = KlingTransformer3DModel.from_config(KlingTransformer3DModel.load_config(folder)).config
    changed = {}
    for key, value in model.items():
        if key not in had:
            raise unknown("key of model", key, [name for name in had if not name.startswith("_")])
        if had[key] == value or (key == "patch_size" and list(had[key]) == list(value)):
            continue
        if key not in EXTRAS:
            raise UserError(f"init_from {folder} has model.{key} = {had[key]!r}, not {value!r}: only {', '.join(EXTRAS)} can be added")
        if had["num_kinds"] if key == "num_kinds" else had["camera_channels"]:
            raise UserError(f"init_from {folder} was trained with model.{key} = {had[key]!r}: leave it as it is")
        changed[key] = value
    return KlingTransformer3DModel.from_pretrained(folder, torch_dtype=torch.float32, **changed)


def check_fit(vae: AutoencoderKLKling, transformer: KlingTransformer3DModel) -> None:
    """Raises `UserError` if the transformer does not make what the VAE decodes."""
    z, made = vae.config.z_dim, transformer.config.out_channels
    if z != made:
        raise UserError(f"the VAE has latents of {z} channels and the transformer makes {made}: give vae= the folder of its own VAE")


def taught_text(folder: str, settings: Mapping[str, Any]) -> ByteTextEncoder:
    """The text encoder that kling-train-text exported. Raises `UserError` if there is none, or `settings` ask for another one."""
    if not (Path(folder) / "config.json").is_file():
        raise UserError(f"text_from '{folder}' holds no text encoder: give the `export` folder of kling-train-text")
    text = ByteTextEncoder.from_pretrained(folder, torch_dtype=torch.float32)
    _check_text(text, settings, f"text_from {folder}")
    return text


def _check_text(text: ByteTextEncoder, settings: Mapping[str, Any], where: str) -> None:
    for key, value in settings.items():
        if key not in text.config:
            raise unknown("key of text", key, [name for name in text.config if not name.startswith("_")])
        if text.config[key] != value:
            raise UserError(f"{where} has text.{key} = {text.config[key]!r}, not {value!r}: leave it as it is")
