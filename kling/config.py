"""dataclass <-> yaml, small and strict.

A program states its settings as one dataclass with defaults. A yaml file changes some of them, `base:` names a parent file (relative to
the child) that is read first, and command-line words `a.b=c` come last:

    cfg = load_config(TrainConfig, "configs/dit/small.yaml", ["steps=100", "model.num_layers=2", "betas=[0.9,0.99]"])

Nested dataclasses merge key by key, `dict[str, Any]` fields too (free-form model settings); lists are replaced. An unknown key, a value of
the wrong type and a required key without a value raise a `UserError` that says which file or word it came from. `${other}` is the value of
another key. A file may not read the environment with `${oc.env:NAME}`, because presets are passed on to others; the command line may, and
KLING_ALLOW_ENV=1 allows it for files too.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import inspect
import math
import os
import re
import sys
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from kling.errors import UserError, unknown

T = TypeVar("T")

LARGEST = 1_000_000  # size of a layer of a model
DEEPEST, MOST = 50, 100_000  # limits of a config: nesting depth, number of values; aliases of aliases (`*a`) can expand to billions
ALLOW_ENV = "KLING_ALLOW_ENV"
# What other trainers (diffusers, transformers, kohya, musubi, DeepSpeed) call our keys, where the spelling is too different to guess from.
MEANT = {
    "lr": ("learning_rate", "base_lr", "max_lr", "peak_lr", "unet_lr", "transformer_lr"),
    "steps": ("max_train_steps", "max_steps", "num_train_steps", "train_steps", "num_steps", "total_steps", "iterations", "max_iterations",
              "num_train_epochs", "max_train_epochs", "num_epochs", "epochs"),
    "batch": ("train_batch_size", "batch_size", "per_device_train_batch_size", "micro_batch_size", "train_micro_batch_size_per_gpu", "bs"),
    "gradient_accumulation": ("gradient_accumulation_steps", "grad_accum", "accumulation_steps", "accumulate_grad_batches"),
    "warmup": ("lr_warmup_steps", "warmup_steps", "num_warmup_steps", "lr_warmup"),
    "schedule": ("lr_scheduler", "lr_scheduler_type", "lr_schedule"),
    "floor": ("lr_min_ratio", "min_lr_ratio", "lr_scheduler_min_lr_ratio", "min_lr"),
    "weight_decay": ("adam_weight_decay", "wd"),
    "betas": ("adam_beta1", "adam_beta2", "adam_betas", "beta1", "beta2"),
    "clip_grad": ("max_grad_norm", "grad_clip", "clip_grad_norm", "gradient_clipping", "gradient_clip_val"),
    "ema": ("ema_decay", "use_ema", "ema_rate"),
    "optimizer": ("optimizer_type", "optim", "opt", "use_8bit_adam"),
    "out": ("output_dir", "out_dir", "output", "save_dir", "work_dir", "logging_dir", "project_dir", "outdir"),
    "save_every": ("checkpointing_steps", "save_steps", "save_interval", "save_every_n_steps", "checkpoint_every", "ckpt_every"),
    "keep_last": ("checkpoints_total_limit", "save_total_limit", "max_checkpoints"),
    "log_every": ("logging_steps", "log_interval", "log_freq", "print_freq"),
    "validation.every": ("validation_steps", "eval_steps", "eval_interval", "eval_every", "val_every"),
    "eval_every": ("validation_steps", "eval_steps", "eval_interval", "val_every"),
    "samples": ("validation_prompts", "validation_prompt", "sample_prompts"),
    "sample_every": ("sample_every_n_steps", "sample_steps", "validation_steps"),
    "trackers": ("report_to", "log_with", "tracker", "wandb", "tensorboard"),
    "activation_checkpointing": ("gradient_checkpointing", "use_gradient_checkpointing", "grad_checkpoint"),
    "mixed_precision": ("precision", "dtype", "bf16", "fp16", "torch_dtype", "amp"),
    "compile": ("torch_compile", "use_compile"),
    "workers": ("dataloader_num_workers", "num_workers", "max_data_loader_n_workers"),
    "seed": ("random_seed", "global_seed", "manual_seed"),
    "init_from": ("pretrained_model_name_or_path", "pretrained_model", "model_path", "pretrained", "ckpt_dir", "resume_from_checkpoint",
                  "transformer_path", "ckpt", "weights", "load_from"),
    "lora.rank": ("rank", "lora_rank", "network_dim", "lora_r"),
    "lora.alpha": ("alpha", "lora_alpha", "network_alpha"),
    "lora.targets": ("target_modules", "lora_target_modules", "lora_layers"),
    "text_drop": ("caption_dropout", "caption_dropout_rate", "proportion_empty_prompts", "uncond_prob", "cfg_dropout", "text_dropout"),
    "frames": ("num_frames", "max_num_frames", "target_frames", "video_sample_n_frames", "sample_n_frames", "n_frames", "clip_length"),
    "source": ("dataset", "dataset_path", "data_dir", "train_data_dir", "instance_data_root", "data_root", "data_path",
                    "dataset_config", "train_data_meta", "instance_data_dir", "dataset_name", "data", "manifest", "path"),
    "fps": ("target_fps", "frame_rate"),
    "reader": ("video_backend", "video_reader", "decoder"),
    "encode": ("dataset", "dataset_path", "data_dir", "train_data_dir", "instance_data_root", "data_root", "data_path"),
    "cache": ("cache_dir", "latents_dir", "latent_cache", "cache_directory"),
    "scheduler": ("flow_shift", "shift", "timestep_sampling", "weighting_scheme", "discrete_flow_shift"),
    "clips": ("num_clips", "num_videos", "n_clips", "samples", "max_train_samples"),
    "shard": ("shard_size", "samples_per_shard"),
    "height": ("H", "video_height"),
    "width": ("W", "video_width"),
    "memory": ("vram", "gpu_memory"),
    "gpus": ("num_gpus", "nproc", "num_processes", "world_size", "n_gpus"),
    "node": ("gpus_per_node", "nproc_per_node", "num_gpus_per_node"),
}  # fmt: skip

# What settings of these names can be, in whatever program: outside, a run fails at some later step, or trains without a word for nothing.
RANGES = (
    ("steps save_every log_every eval_every eval_clips shard max_frames clips spatial_factor", 1, math.inf),
    ("batch gradient_accumulation group groups updates checks critic_updates counts num_inference_steps frames examples", 1, 100_000),
    ("guidance_scale camera_guidance_scale brush_guidance_scale reference_guidance_scale guidance_reach", 0, math.inf),
    ("rank", 0, 10_000),
    ("threads num_layers quantiles", 1, 1000),
    ("workers processes byte_layers token_layers num_res_blocks camera_residual_blocks", 0, 1000),
    ("warmup sample_every keep_every keep_last every watchdog perceptual", 0, math.inf),
    ("weight_decay", 0, 1000),
    ("text_drop camera_drop reference_drop floor", 0, 1),
    ("shares lr_of seed", 0, math.inf),
    ("ema betas", 0, math.nextafter(1, 0)),  # of 1 the average never leaves the first weights, which the export would hold
    ("shift", 0.001, 1000),
    ("lr", math.ulp(0), 1000),
    ("clip_grad temperature fps scale", math.ulp(0), math.inf),
)
RANGE = {name: (least, most) for names, least, most in RANGES for name in names.split()}

# Presets lie next to the package: in the repository, and in an installed wheel.
PRESETS = (Path(__file__).parents[1] / "configs", Path(__file__).parents[1] / "kling_programs" / "configs")


def load_config(cls: type[T], path: str | Path | None = None, overrides: Sequence[str] = ()) -> T:
    """An instance of the dataclass `cls`: its defaults, then the chain of base files, then the file, then the overrides.

    `path` is a file, or the name of a preset (`configs/dit/small.yaml` or `dit/small.yaml`) that is looked up beside the package.
    Raises `UserError` for a missing file, an unknown key, a wrong type or a required key without a value.
    """
    from omegaconf import OmegaConf  # half a second: a program's --help lists presets without it
    from omegaconf.errors import OmegaConfBaseException

    layers = [] if path is None else _chain(find_config(path))
    layers += [(f"override '{word}'", _override(word)) for word in overrides]

    cfg = OmegaConf.structured(cls)
    for where, values in layers:
        for key, value, hint in _leaves(cls, values, where):
            try:
                if value == {} and not dataclasses.is_dataclass(hint) and OmegaConf.select(cfg, key):
                    raise UserError(f"{key} = {{}} in {where} would change nothing: set each of its keys, such as {key}.NAME=0")
                OmegaConf.update(cfg, key, value, merge=True)
            except OmegaConfBaseException as error:
                raise UserError(f"{key} = {value!r} in {where}: expected {_spell(hint)} ({_first_line(error)})") from None
            try:
                set_to = OmegaConf.select(cfg, key, throw_on_missing=False)
            except OmegaConfBaseException:  # an interpolation; what it names may come with a later layer
                continue
            _check_range(key, set_to, where)

    try:
        if missing := sorted(OmegaConf.missing_keys(cfg)):
            raise UserError(f"config key '{missing[0]}' has no value: set it in the config file or pass {missing[0]}=...")
        return typing.cast(T, OmegaConf.to_object(cfg))
    except OmegaConfBaseException as error:  # an interpolation ${...} that names nothing
        raise UserError(f"config of {cls.__name__}: {_first_line(error)}") from None


def _check_range(key: str, value: Any, where: str, name: str = "") -> None:
    """Refuse a number that is none, and one that no setting of this name can be, in lists and dicts too; and a run without a folder.

    name: of the setting in `RANGE`, if it is not the last part of the key.
    """
    name = name or key.rpartition(".")[2]
    if isinstance(value, Mapping):
        for inside, one in value.items():
            _check_range(f"{key}.{inside}", one, where, name if name in RANGE else "")
        return
    if isinstance(value, Sequence) and not isinstance(value, str):
        for one in value:
            _check_range(key, one, where, name)
        return
    if key == "out" and value == "":
        raise UserError(f"out is empty in {where}: name a folder")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    least, most = RANGE.get(name, (-math.inf, math.inf))
    if math.isnan(value) or not least <= value <= most or (math.isinf(value) and math.isinf(most) and least > -math.inf):
        upper = "below 1" if 0 < 1 - most < 1e-9 else most
        if least == -math.inf:
            wanted = "a number"
        elif least == math.ulp(0):
            wanted = "a number above 0" + (f", at most {upper}" if most < math.inf else "")
        else:
            wanted = f"{least} or more" if most == math.inf else f"{least} to {upper}"
        raise UserError(f"{key} = {value} in {where}: give {wanted}")


def built(cls: type[T], settings: Mapping[str, Any], where: str) -> T:
    """A model `cls` of free-form settings. Raises `UserError` for a key that its constructor lacks, a value of the wrong type or range, and
    for sizes that do not go together. where: the name of these settings, such as "model".

    A whole number may be 0 only where the default is 0, or if it counts layers.
    """
    parameters, hints = inspect.signature(cls).parameters, typing.get_type_hints(inspect.unwrap(cls.__init__))
    for key, value in settings.items():
        if key not in parameters:
            raise unknown("key", f"{where}.{key}", [f"{where}.{name}" for name in parameters])
        if not is_a(value, hints[key]):
            raise UserError(f"{where}.{key} = {value!r:.60}: expected {_spell(hints[key])}")
        whole, least = int in (hints[key], *typing.get_args(hints[key])), int(parameters[key].default != 0)
        least = 0 if key.endswith(("_layers", "_blocks")) else least
        for size in value if isinstance(value, list | tuple) and whole else [value]:
            if isinstance(size, bool) or not isinstance(size, int | float):
                continue
            if size < 0 or (whole and not least <= size <= LARGEST):
                wanted = f"{least} to {LARGEST}" if whole else "a number of 0 or more"
                raise UserError(f"{where}.{key} = {value!r:.60}: give {wanted}")
    try:
        return cls(**settings)
    except (TypeError, ValueError, ArithmeticError, RuntimeError, IndexError) as error:
        if isinstance(error, UserError):
            raise
        said = ", ".join(f"{key}={value}" for key, value in settings.items())
        raise UserError(f"{where}: no {cls.__name__} can be built of {said} ({_first_line(error)}): change these sizes") from error


def is_a(value: Any, hint: Any) -> bool:
    """Whether a value of yaml or JSON is of an annotated type: a list stands for a tuple, a whole number for a finite float."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(is_a(value, one) for one in inner)
    if origin is tuple and inner[-1] is not ...:
        return isinstance(value, list | tuple) and len(value) == len(inner) and all(map(is_a, value, inner))
    if origin in (list, tuple, collections.abc.Sequence):
        return isinstance(value, list | tuple) and all(is_a(x, inner[0]) for x in value)
    if origin is dict:
        return isinstance(value, dict)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    return isinstance(value, hint) and not (hint is int and isinstance(value, bool))


def read_preset(path: str | Path) -> dict[str, Any]:
    """All settings of a preset and its bases, merged, whichever program the preset is for."""
    from omegaconf import OmegaConf

    merged = OmegaConf.merge(*(OmegaConf.create(values) for _, values in _chain(find_config(path))))
    return typing.cast(dict[str, Any], OmegaConf.to_container(merged))


def to_dict(cfg: Any) -> dict[str, Any]:
    """Plain nested dicts, lists and scalars of a config instance."""
    return typing.cast(dict[str, Any], _plain(dataclasses.asdict(cfg)))


def save_config(cfg: Any, path: str | Path) -> None:
    """Write `cfg` as yaml, such that `load_config(type(cfg), path)` gives an equal instance."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.dump(to_dict(cfg), Dumper=_Dumper, sort_keys=False, allow_unicode=True), encoding="utf-8")


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a yaml file ({} if it is empty). Raises `UserError` naming the file, and the line of a syntax error."""
    try:
        values = _parse(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"config '{path}' does not exist: check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = "it is no UTF-8: save it as that" if isinstance(error, UnicodeDecodeError) else f"{error.strerror}: check the path"
        raise UserError(f"config '{path}' cannot be read, {reason}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" line {mark.line + 1}" if mark else ""
        raise UserError(f"config '{path}'{place} is not yaml: {getattr(error, 'problem', None) or _first_line(error)}") from None
    except (RecursionError, ValueError, TypeError) as error:
        reason = "it is nested thousands of levels deep" if isinstance(error, RecursionError) else _first_line(error)
        raise UserError(f"config '{path}' cannot be used: {reason}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"config '{path}' holds a {type(values).__name__}: write `key: value` lines")
    return values


def find_config(path: str | Path) -> Path:
    """The file at `path`, or the preset of that name. Raises `UserError` with the nearest preset."""
    path = Path(path)
    if path.is_file():
        return path
    name = Path(*path.parts[1:]) if path.parts[:1] == ("configs",) else path
    for folder in PRESETS:
        if (folder / name).is_file():
            return folder / name
    if path.is_dir():
        raise UserError(f"config '{path}' is a folder: give a file in it")
    presets = list_presets()
    raise unknown("config", path, presets) if presets else UserError(f"config '{path}' does not exist: check the path")


def list_presets() -> list[str]:
    """Names of the presets that come with the package, such as `dit/small.yaml`."""
    return sorted({str(p.relative_to(folder)) for folder in PRESETS if folder.is_dir() for p in folder.rglob("*.yaml")})


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; lists and empty dicts stay values."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


# ---------------------------------------------------------------------------------------------------------------- layers


def _chain(path: Path, seen: tuple[Path, ...] = ()) -> list[tuple[str, dict[str, Any]]]:
    """[(file, values)] from the oldest `base:` to `path` itself."""
    if path.resolve() in seen:
        raise UserError(f"config '{path}' is its own base: remove one `base:` of {', '.join(p.name for p in seen)}")
    values = read_yaml(path)
    for text in _texts(values):
        if re.search(r"\$\{.*:", text, re.DOTALL) and os.environ.get(ALLOW_ENV) != "1":
            raise UserError(f"{text!r} in {path} reads more than this file, such as your environment: write it out, or set {ALLOW_ENV}=1")
    base = values.pop("base", None)
    if base is None:
        return [(str(path), values)]
    if not isinstance(base, str):
        raise UserError(f"base = {base!r} in {path}: expected one file name")
    parent = path.parent / base
    if not parent.is_file():
        raise UserError(f"base '{base}' of {path} does not exist: looked for {parent}")
    return [*_chain(parent, (*seen, path.resolve())), (str(path), values)]


def _override(word: str) -> dict[str, Any]:
    """'a.b=c' (or '--a.b=c') -> {"a": {"b": c}}. c is parsed as yaml, and taken as plain text where it is not valid yaml or a sentence with
    a colon (`prompt=a dog: red`)."""
    key, equals, text = word.removeprefix("--").partition("=")
    names = key.strip().split(".")
    if not equals or not all(names):
        raise UserError(f"override '{word}' is not key=value: write for example steps=1000 or model.num_layers=4")
    try:
        value = _parse(text)
    except yaml.YAMLError:
        value = text
    except (RecursionError, ValueError, TypeError) as error:
        raise UserError(f"override '{word[:60]}…' cannot be used ({_first_line(error)[:100]}): write plain values") from None
    if (isinstance(value, dict) and not text.lstrip().startswith("{")) or (value is None and text.strip().lower() not in ("null", "~")):
        value = text
    for name in reversed(names):
        value = {name: value}
    return typing.cast(dict[str, Any], value)


def _leaves(cls: type, values: dict[str, Any], where: str, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, value, type hint) of everything that `values` sets, walking down nested dataclasses and no further."""
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls) if f.init]
    for name, value in values.items():
        if name not in names:
            meant = _meant(cls, name)
            raise unknown(f"key in {where}:", f"{prefix}{name}", [prefix + n for n in names], meant and prefix + meant)
        if dataclasses.is_dataclass(hints[name]) and isinstance(value, dict) and value:
            yield from _leaves(hints[name], value, where, f"{prefix}{name}.")
        else:
            yield prefix + name, value, hints[name]


def _meant(cls: type, name: str) -> str:
    """The key of `cls` that other trainers call `name`; "" if there is none."""
    ours = [key for key, theirs in MEANT.items() if name.lower().replace("-", "_") in theirs]
    inside = [part for part, hint in typing.get_type_hints(cls).items() if ours and dataclasses.is_dataclass(hint)]
    return next((key for key in [*ours, *(f"{part}.{key}" for part in inside for key in ours)] if _has_key(cls, key)), "")


def _has_key(cls: type, dotted: str) -> bool:
    first, _, rest = dotted.partition(".")
    if first not in {f.name for f in dataclasses.fields(cls)}:
        return False
    inner = typing.get_type_hints(cls)[first]
    return not rest or (dataclasses.is_dataclass(inner) and _has_key(inner, rest))


def _parse(text: str) -> Any:
    """Parse yaml text. Raises YAMLError for invalid yaml, ValueError (or RecursionError) for values too large or nested too deep."""
    depth = 0
    for bracket in re.findall(r"[\[\]{}]", text):  # the parser takes seconds before its stack overflows
        depth += 1 if bracket in "[{" else -1
        if depth > 10 * DEEPEST:
            raise ValueError("it is nested thousands of levels deep")
    return _plainly(yaml.load(text, _Loader))


def _plainly(value: Any) -> Any:
    """Return `value`. Raises ValueError if it is larger or deeper than a config needs: later steps recurse, and expand aliases."""
    level, count = [value], 0
    for _ in range(DEEPEST):
        count += len(level)
        if count > MOST:
            raise ValueError(f"it holds more than {MOST} values")
        if any(isinstance(x, int) and abs(x) >= 2**63 for x in level):
            raise ValueError("it holds an integer beyond 64 bits")
        level = [x for one in level if isinstance(one, dict | list) for x in (one.values() if isinstance(one, dict) else one)]
        if not level:
            return value
    raise ValueError(f"it is nested more than {DEEPEST} levels deep")


def _texts(value: Any) -> Iterator[str]:
    """Every string in a value that `_plainly` has accepted."""
    for x in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _texts(x)
    if isinstance(value, str):
        yield value


def _spell(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


# ------------------------------------------------------------------------------------------------------------------ yaml


class _Loader(yaml.SafeLoader):
    """Yaml 1.2 scalars, no repeated keys: in yaml 1.1 `16:9` is 969, `1e-4` is text, `no` is false and 010 is 8."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"'{key.value}' is given twice", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)

    def construct_int(self, node: yaml.ScalarNode) -> int:
        return int(node.value)

    def construct_float(self, node: yaml.ScalarNode) -> float:
        return float(node.value.replace(".inf", "inf").replace(".nan", "nan"))


class _Dumper(yaml.SafeDumper):
    """Quotes exactly the strings that `_Loader` would read as another type."""


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_float)


def _resolvers(rules: Iterable[tuple[str, str, str]]) -> dict[str | None, list[tuple[str, re.Pattern[str]]]]:
    table: dict[str | None, list[tuple[str, re.Pattern[str]]]] = {}
    for tag, pattern, first in rules:
        for letter in first or [""]:
            table.setdefault(letter, []).append((f"tag:yaml.org,2002:{tag}", re.compile(f"^(?:{pattern})$")))
    return table


_Loader.yaml_implicit_resolvers = _Dumper.yaml_implicit_resolvers = _resolvers(
    [
        ("null", "~|null|Null|NULL", "~nN"),
        ("null", "", ""),
        ("bool", "true|True|TRUE|false|False|FALSE", "tTfF"),
        ("int", "[-+]?(?:0|[1-9][0-9]*)", "-+0123456789"),
        ("float", r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan", "-+.0123456789"),
        ("merge", "<<", "<"),
    ]
)
