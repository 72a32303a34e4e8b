"""The start of a training: a pre-trained text encoder, or a model folder, ours or published ("Start from Wan").

A folder's settings beside its weights (scheduler, sizes, guidance, licence) are kept in the trained model.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import SchedulerMixin

from kling.cache.fill import fill_cache
from kling.cache.plan import CacheConfig, settings_of
from kling.cache.store import INDEX, NAMED, LatentCache, differences, read_index
from kling.condition.concat import concat_groups
from kling.condition.state import KEYFRAME, NUMBERED
from kling.condition.tasks import keyframe_share
from kling.config import built, is_a, load_config
from kling.dit import KlingTransformer3DModel
from kling.errors import UserError, unknown
from kling.flow.diffusers_scheduler import shift_key
from kling.flow.solvers import KlingFlowScheduler
from kling.hub.clip import load_image_encoder
from kling.hub.load import SETTINGS, find_folder, has_umt5, load, loaded
from kling.runtime.accelerator import EXIT_STOPPED, Accelerator, StopSignal
from kling.runtime.files import sha256, write_atomic
from kling.runtime.lock import locked
from kling.sampling.pipeline import ASSETS
from kling.sampling.request import Request
from kling.text import ByteTextEncoder
from kling.text.encoder import prompt_bytes
from kling.text.umt5 import UMT5TextEncoder
from kling.vae import AutoencoderKLKling

# keys of the transformer's config that a training may add to a model: inputs that start at zero
EXTRAS = ("in_channels", "num_kinds", "camera_channels", "camera_fold", "camera_downscale", "camera_residual_blocks", "track_channels")
EXTRAS += ("gate_value",)
READ = "read"  # file in a cache's text folder that records that umT5 has encoded all captions
SHIPPED = "shipped"  # name in presets for the model that comes with the package, wherever it is installed
LONG_CAPTIONS = ("refuse", "cut")
EXPERT_FOLDERS = {"": "transformer", "high": "transformer", "low": "transformer_2"}  # expert -> its folder


@dataclass(frozen=True)
class Start:
    """A model folder that training starts from.

    settings: arguments of `KlingPipeline` other than the models; those that the training does not change are kept.
    expert: of two, the one to train, "high" or "low"; empty if there is only one.
    """

    folder: Path
    settings: dict[str, Any]
    expert: str = ""

    @property
    def published(self) -> bool:
        """Whether its prompts are encoded by umT5, which is not trained."""
        return has_umt5(self.folder)

    @property
    def within(self) -> tuple[float, float]:
        """The noise levels to train: those at which sampling uses this expert."""
        boundary = self.settings.get("boundary_ratio")
        return {"": (0.0, 1.0), "high": (boundary, 1.0), "low": (0.0, boundary)}[self.expert]

    def transformer(self, model: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> KlingTransformer3DModel:
        """The transformer to train, with the conditions of `model` added; see `grow`."""
        return grow(self.folder / EXPERT_FOLDERS[self.expert], model, dtype)

    def other_models(self, trained: KlingTransformer3DModel) -> dict[str, Any]:
        """The other models of a pipeline with a trained transformer, except VAE and text encoder: the other expert, and CLIP."""
        parts = {EXPERT_FOLDERS[self.expert]: trained}
        if self.expert:
            other = next(name for name in EXPERT_FOLDERS.values() if name != EXPERT_FOLDERS[self.expert])
            parts[other] = loaded(self.folder, other, KlingTransformer3DModel, torch_dtype=torch.bfloat16).to(trained.device)
        if (self.folder / "image_encoder").is_dir():
            parts |= load_image_encoder(self.folder)
            parts["image_encoder"].to(trained.device)
        return parts

    def text(self, settings: Mapping[str, Any], cache: str | Path) -> ByteTextEncoder | UMT5TextEncoder:
        """Its text encoder. settings: the requested ones; `UserError` if they differ. cache: the latent cache."""
        if not self.published:
            text = loaded(self.folder, "text_encoder", ByteTextEncoder, torch_dtype=torch.float32)
            _check_text(text, settings, f"model {self.folder}")
            return text
        if settings:
            raise UserError(f"model {self.folder} encodes prompts with umT5, which is not trained: leave text.{min(settings)} out")
        return UMT5TextEncoder(self.folder, cache=text_folder(cache), cut=True)

    def prompts(self, requests: Sequence[Request]) -> set[str]:
        """What sampling these requests encodes: the prompts of all shots, and the negative ones, which may be the folder's own."""
        own = (self.settings.get("defaults") or {}).get("negative_prompt", "")
        negative = {own if request.negative_prompt is None else request.negative_prompt for request in requests}
        return negative.union(*(request.prompts for request in requests))

    def scheduler(self, given: Mapping[str, Any]) -> SchedulerMixin:
        """Its own scheduler with the settings `given`; a published one takes a shift, and `density` is for training only."""
        own = self.settings["scheduler"]
        if isinstance(own, KlingFlowScheduler):
            return new_scheduler({key: value for key, value in own.config.items() if not key.startswith("_")} | dict(given))
        for key in given:
            if key not in ("shift", "density"):
                raise UserError(f"scheduler.{key} is set, and model {self.folder} keeps its {type(own).__name__}: leave it out")
        if not is_a(shift := given.get("shift", 1.0), float):
            raise UserError(f"scheduler.shift = {shift!r}: give a number above 0")
        return type(own).from_config(own.config, **({shift_key(own): given["shift"]} if "shift" in given else {}))


def open_start(path: str | Path, checkpoint: str | None = None, expert: str | None = "") -> Start:
    """The start from a model folder, a hub id, or the shipped model (`SHIPPED`).

    checkpoint: its name in the registry, if the files do not tell. expert: None for a program that trains no model of two experts.

    Raises `UserError` if it is none of these, if it has two experts and `expert` is not set, or if `expert` is set without need.
    """
    folder = ASSETS if path == SHIPPED else find_folder(path)
    parts = load(folder, checkpoint=checkpoint, weights=False)
    two, choices = "transformer_2" in parts, [name for name in EXPERT_FOLDERS if name]
    if two and expert is None:
        raise UserError(f"model {folder} has two experts, which this program does not train: give a model with one transformer")
    if two and expert not in choices:
        boundary = parts["boundary_ratio"]
        raise UserError(f"model {folder} has two experts: give expert=high to train levels above {boundary}, or expert=low")
    if expert and not two:
        raise UserError(f"expert={expert} is set, and model {folder} has one transformer: leave it out")
    return Start(folder, {key: parts[key] for key in (*SETTINGS, "scheduler") if key in parts}, expert or "")


def complete_cache(cache: str, preset: str, vae: AutoencoderKLKling, stop: StopSignal, accelerator: Accelerator) -> None:
    """Fill the latent cache if it is missing or unfinished, each process its share; without a preset it is used as kling-encode left it.

    Finished shards are kept, so a signal may stop it after any of them.
    """
    if not preset:
        return
    settings = load_config(CacheConfig, preset, [f"out={cache}"])
    check_is_made_so(settings)
    rank, ranks, wait = accelerator.process_index, accelerator.num_processes, accelerator.wait_for_everyone
    precision = "bf16" if accelerator.mixed_precision == "bf16" else "fp32"
    hold = partial(locked, cache, "cache", accelerator)
    for done, total_clips in fill_cache(settings, vae, rank, ranks, wait, precision=precision, hold=hold):
        if accelerator.is_main_process:
            print(f"latent cache {cache}: {done}/{total_clips} clips", file=sys.stderr)
        if stop and done < total_clips:
            raise SystemExit(EXIT_STOPPED)


def check_is_made_so(cfg: CacheConfig) -> None:
    """Raises `UserError` if the cache is complete and was made with other settings than these, for example by the user."""
    if (Path(cfg.out) / INDEX).is_file():
        was, now = read_index(Path(cfg.out) / INDEX)["settings"], settings_of(cfg)
        if was != now:
            raise UserError(
                f"latent cache {cfg.out} was made {differences(was, now)}, and the preset `encode` would complete it: "
                "set encode= to train on it unchanged (configs/dit/own.yaml does), or give another cache="
            )


def complete_text(text: UMT5TextEncoder, cache: str, prompts: Sequence[str], device: torch.device, stop: StopSignal) -> None:
    """Encode the captions of a cache, the empty prompt and `prompts` with umT5, before a transformer is loaded on the device.

    kling-encode has encoded the captions already if it was given the model.
    """
    known = () if is_read(cache, text) else captions_of(cache)
    for done, new in text.learn(sorted({"", *known, *prompts}), device):
        print(f"text embeddings {text_folder(cache)}: {done}/{new}", file=sys.stderr)
        if stop and done < new:
            raise SystemExit(EXIT_STOPPED)


def text_folder(cache: str | Path) -> Path:
    """The folder of umT5's embeddings in a cache."""
    return Path(cache) / "text"


def captions_of(folder: str | Path) -> list[str]:
    """All different captions of a finished cache, sorted, and the empty one, which replaces a prompt that is left out."""
    return sorted({"", *LatentCache(folder).captions()})


def mark_read(cache: str | Path, text: UMT5TextEncoder) -> None:
    """Record that umT5 has encoded all captions now in the cache, so that a training need not check each of them."""
    write_atomic(text_folder(cache) / READ, _read_by(cache, text))


def is_read(cache: str | Path, text: UMT5TextEncoder) -> bool:
    """Whether that was recorded for the present contents of this cache and for this umT5."""
    path = text_folder(cache) / READ
    return path.is_file() and path.read_text(encoding="utf-8") == _read_by(cache, text)


def _read_by(cache: str | Path, text: UMT5TextEncoder) -> str:
    return f"{sha256(Path(cache) / INDEX)} {text.identity}\n"


def check_captions(encoder: ByteTextEncoder | UMT5TextEncoder, cache: LatentCache, long_captions: str) -> int | None:
    """The number of bytes to cut prompts to, also those that training words anew, which no cache holds. None for umT5, which cuts by
    itself, as in Wan's own pipelines, and logs it.

    Raises `UserError` that names the clips with captions too long for our encoder, unless they are to be cut.
    """
    if not isinstance(encoder, ByteTextEncoder):
        return None
    most = encoder.config.max_bytes
    if long_captions != "cut":
        refuse_long(cache.long_captions(most), most, f"latent cache {cache.folder}")
    return most


def refuse_long(clips: Iterable[tuple[str, Sequence[str]]], most: int, where: str) -> None:
    """Raises `UserError` that names the clips (name, captions) with a caption of more than `most` bytes."""
    sizes = ((name, max((len(prompt_bytes(text)) for text in captions), default=0)) for name, captions in clips)
    if found := [(name, size) for name, size in sizes if size > most]:
        named = ", ".join(f"{name}: {size}" for name, size in found[:NAMED]) + (", …" if len(found) > NAMED else "")
        raise UserError(
            f"{len(found)} clips of {where} have a caption longer than the {most} bytes that this text encoder reads ({named} bytes): "
            "shorten them (and run kling-encode again), or set long_captions=cut"
        )


def new_scheduler(settings: Mapping[str, Any]) -> KlingFlowScheduler:
    """Our scheduler. Raises `UserError` for a setting that is unknown or of the wrong kind."""
    return built(KlingFlowScheduler, settings, "scheduler")


def grow(folder: str | Path, model: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> KlingTransformer3DModel:
    """The transformer of a folder with the conditions of `model` added: new inputs start at zero, so its output is unchanged. A table that
    has more kinds of frames stays. Raises `UserError` for a key that differs and is no condition, or that changes a trained condition."""
    with torch.device("meta"):
        had = KlingTransformer3DModel.from_config(KlingTransformer3DModel.load_config(folder)).config
    changed = {}
    for key, value in model.items():
        if key not in had:
            raise unknown("key of model", key, [name for name in had if not name.startswith("_")])
        if had[key] == value or (isinstance(value, list | tuple) and tuple(had[key]) == tuple(value)):
            continue
        if key == "num_kinds" and had[key] > value:
            continue
        if key not in EXTRAS:
            raise UserError(f"model {folder} has model.{key} = {had[key]!r}, not {value!r}: only {', '.join(EXTRAS)} can be added")
        there = {name: had[name] for name in ("track_channels", "gate_value")}
        there |= {"num_kinds": False, "in_channels": had["in_channels"] > had["out_channels"]}
        if there.get(key, had["camera_channels"]):
            raise UserError(f"model {folder} was trained with model.{key} = {had[key]!r}: leave it unchanged")
        changed[key] = value
    wider = {key: changed.pop(key) for key in ("in_channels", "num_kinds") if key in changed and had[key]}
    grown = loaded(Path(folder).parent, Path(folder).name, KlingTransformer3DModel, torch_dtype=dtype, **changed)
    return widen(grown, **wider) if wider else grown


def widen(model: KlingTransformer3DModel, in_channels: int | None = None, num_kinds: int | None = None) -> KlingTransformer3DModel:
    """The same transformer with more input channels, or more kinds of frames, whose weights are 0: the start for training them."""
    config = {key: value for key, value in model.config.items() if not key.startswith("_")}
    config |= {"in_channels": in_channels or config["in_channels"], "num_kinds": num_kinds or config["num_kinds"]}
    concat_groups(config["in_channels"], config["out_channels"])  # raises for an unknown layout
    with torch.device("meta"):
        wide = KlingTransformer3DModel(**config)
    state = dict(model.state_dict())
    for name in ("patch_embedding.weight", "kind_embedding.weight"):  # (d, c, pt, ph, pw), (kinds, d)
        if (weight := state.get(name)) is not None:
            larger = weight.new_zeros(wide.get_parameter(name).shape)
            larger[tuple(map(slice, weight.shape))] = weight
            state[name] = larger
    wide.load_state_dict(state, assign=True)
    return wide.train(model.training)


def check_fit(vae: AutoencoderKLKling, transformer: KlingTransformer3DModel, tasks: Mapping[str, float], cache: LatentCache) -> None:
    """Raises `UserError` if the transformer and the VAE have different latents, or the tasks need inputs that the transformer lacks."""
    config, z = transformer.config, vae.config.z_dim
    if z != config.out_channels:
        raise UserError(f"the VAE has latents of {z} channels and the transformer makes {config.out_channels}: give vae= its own VAE")
    if not (groups := concat_groups(config.in_channels, z)):
        if keyframe_share(tasks) and config.num_kinds <= KEYFRAME:
            lone = next(name for name, weight in tasks.items() if weight > 0 and keyframe_share({name: weight}))
            line = f"tasks.{lone} appends a keyframe, and this model knows {config.num_kinds} kinds of frames"
            raise UserError(f"{line}: set model.num_kinds={KEYFRAME + 1}, or tasks.{lone}=0")
        return
    if "control" in groups or config.pos_embed_seq_len:
        what = "a control video" if "control" in groups else "both ends"
        raise UserError(f"these weights take {what} as extra channels, which no latent cache holds: start from T2V, I2V or TI2V weights")
    able = ("text", "image", "continuation") if groups == ("first",) else ("text", "image")
    lacks = {name for name, needed in {"shown": "clean" in groups, "seen": config.image_dim is not None}.items() if needed} - cache.holds
    for task in (name for name, weight in tasks.items() if weight > 0):
        if task not in able:
            raise UserError(f"these weights take what is given as extra channels, and cannot learn tasks.{task} so: {', '.join(able)} only")
        if task != "text" and lacks:
            raise UserError(f"tasks.{task} shows these weights a first frame, and {cache.folder} holds none: kling-encode with image=true")


def check_brush(share: float, transformer: KlingTransformer3DModel, cache: LatentCache) -> None:
    """Raises `UserError` unless the transformer can learn tracks, and the clips of the cache have some, if a share of clips is to."""
    if not 0 <= share <= 1:
        raise UserError(f"brush {share:g}: give the share of clips with tracks, from 0 to 1")
    channels, z = transformer.config.track_channels, transformer.config.out_channels
    if channels not in (0, z + 1):
        raise UserError(f"model.track_channels {channels} for latents of {z} channels: give {z + 1}, or 0 for a model without tracks")
    if share and not channels:
        raise UserError(f"brush {share:g} is set, and this model has no input for tracks: set model.track_channels={z + 1}, or brush=0")
    if share and cache.settings["data"]["source"] != "world" and "tracks" not in cache.holds:
        remedy = "run kling-data tracks and encode them again, or set brush=0"
        raise UserError(f"brush {share:g} is set, and the clips of latent cache {cache.folder} have no tracks: {remedy}")


def check_shots(share: float, transformer: KlingTransformer3DModel, cache: LatentCache, split: int = 1) -> None:
    """Raises `UserError` unless the transformer can learn clips of several shots, and the cache has some, if a share of clips is to be.

    split: processes that share a batch.
    """
    if not 0 <= share <= 1:
        raise UserError(f"shots {share:g}: give the share of clips that are storyboards, from 0 to 1")
    if share and not cache.storyboards:
        raise UserError(f"shots {share:g} is set, and latent cache {cache.folder} has no storyboards: set shots in its preset, or shots=0")
    if share and concat_groups(transformer.config.in_channels, transformer.config.out_channels):
        raise UserError(f"shots {share:g} is set, and these weights take what is given as extra channels, which know no cut: set shots=0")
    if share and split > 1:
        raise UserError(
            f"shots {share:g} is set, and the frames of several shots cannot be shared between devices: set cp_size 1, or shots=0"
        )


def check_reference(share: float, transformer: KlingTransformer3DModel, cache: LatentCache) -> None:
    """Raises `UserError` unless the transformer can learn references, and the cache has some, if a share of batches is to have them."""
    if not 0 <= share <= 1:
        raise UserError(f"reference {share:g}: give the share of batches with references, from 0 to 1")
    if not share:
        return
    if transformer.config.num_kinds <= max(NUMBERED):
        raise UserError(
            f"reference {share:g} is set, and this model knows {transformer.config.num_kinds} kinds of frames: set "
            f"model.num_kinds={max(NUMBERED) + 1}, or reference=0"
        )
    if concat_groups(transformer.config.in_channels, transformer.config.out_channels):
        raise UserError(f"reference {share:g} is set, and these weights take what is given as extra channels, which have no place for one")
    if "references" not in cache.holds:
        world = cache.settings["data"]["source"] == "world"
        remedy = "make one with references=4" if world else "name some in the manifest and encode it again"
        raise UserError(f"reference {share:g} is set, and latent cache {cache.folder} holds no references: {remedy}, or set reference=0")


def taught_text(folder: str, settings: Mapping[str, Any]) -> ByteTextEncoder:
    """The text encoder exported by kling-train-text. Raises `UserError` if there is none, or if `settings` differ."""
    if not (Path(folder) / "config.json").is_file():
        raise UserError(f"text_from '{folder}' holds no text encoder: give the `export` folder of kling-train-text")
    text = loaded(Path(folder).parent, Path(folder).name, ByteTextEncoder, torch_dtype=torch.float32)
    _check_text(text, settings, f"text_from {folder}")
    return text


def _check_text(text: ByteTextEncoder, settings: Mapping[str, Any], where: str) -> None:
    for key, value in settings.items():
        if key not in text.config:
            raise unknown("key of text", key, [name for name in text.config if not name.startswith("_")])
        if text.config[key] != value:
            raise UserError(f"{where} has text.{key} = {text.config[key]!r}, not {value!r}: leave it unchanged")
