"""dataclass <-> yaml, small and strict.

A program states its settings as one dataclass with defaults. A yaml file changes some of them, `base:` names a parent file (relative to
the child) that is read first, and command-line words `a.b=c` come last:

    cfg = load_config(TrainConfig, "configs/dit/small.yaml", ["steps=100", "model.num_layers=2", "betas=[0.9,0.99]"])

Nested dataclasses merge key by key, `dict[str, Any]` fields too (free-form model settings), lists are replaced. A key that the dataclass
does not have, a value of the wrong type and a required key that nobody gave are `UserError`s which say where they came from.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kling.errors import UserError, unknown

T = TypeVar("T")

# Presets lie next to the package: in the repository, and in an installed wheel.
PRESETS = (Path(__file__).parents[1] / "configs", Path(__file__).parents[1] / "kling_programs" / "configs")


def load_config(cls: type[T], path: str | Path | None = None, overrides: Sequence[str] = ()) -> T:
    """An instance of the dataclass `cls`: its defaults, then the file's chain of bases, then the file, then the overrides.

    `path` is a file, or the name of a preset (`configs/dit/small.yaml` or `dit/small.yaml`) that is looked up beside the package.
    Raises `UserError` for a missing file, an unknown key, a wrong type or a required key without a value.
    """
    layers = [] if path is None else _chain(find_config(path))
    layers += [(f"override '{word}'", _override(word)) for word in overrides]

    cfg = OmegaConf.structured(cls)
    for where, values in layers:
        for key, value, hint in _leaves(cls, values, where):
            try:
                if OmegaConf.select(cfg, key) is None and (inner := _dataclass_in(hint)) and isinstance(value, dict):
                    OmegaConf.update(cfg, key, OmegaConf.structured(inner))
                OmegaConf.update(cfg, key, value, merge=True)
            except OmegaConfBaseException as error:
                raise UserError(f"{key} = {value!r} in {where}: expected {_spell(hint)} ({_first_line(error)})") from None

    try:
        if missing := sorted(OmegaConf.missing_keys(cfg)):
            raise UserError(f"config key '{missing[0]}' has no value: set it in the config file or pass {missing[0]}=...")
        return typing.cast(T, OmegaConf.to_object(cfg))
    except OmegaConfBaseException as error:  # an interpolation ${...} that names nothing
        raise UserError(f"config of {cls.__name__}: {_first_line(error)}") from None


def read_preset(path: str | Path) -> dict[str, Any]:
    """Everything that a preset and its bases set, merged, whatever program it is for."""
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
        values = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise UserError(f"config '{path}' does not exist: check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config '{path}' cannot be read: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" line {mark.line + 1}" if mark else ""
        raise UserError(f"config '{path}'{place} is not yaml: {getattr(error, 'problem', None) or _first_line(error)}") from None
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
    """'a.b=c' (or '--a.b=c') -> {"a": {"b": c}}, where c is read as yaml, and as plain text where it is not meant as yaml
    (`prompt=a dog: #1`)."""
    key, equals, text = word.removeprefix("--").partition("=")
    names = key.strip().split(".")
    if not equals or not all(names):
        raise UserError(f"override '{word}' is not key=value: write for example steps=1000 or model.num_layers=4")
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError:
        value = text
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
            raise unknown(f"key in {where}:", f"{prefix}{name}", [prefix + n for n in names])
        inner = _dataclass_in(hints[name])
        if inner is not None and isinstance(value, dict) and value:
            # An optional part that is None until now starts from its defaults, so it is yielded as a whole first.
            if type(None) in typing.get_args(hints[name]):
                yield prefix + name, {}, hints[name]
            yield from _leaves(inner, value, where, f"{prefix}{name}.")
        else:
            yield prefix + name, value, hints[name]


def _dataclass_in(hint: Any) -> type | None:
    """The dataclass of `D` or `D | None`, else None."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return next((o for o in options if isinstance(o, type) and dataclasses.is_dataclass(o)), None)


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
        keys = [key.value for key, _ in node.value]
        for i, key in enumerate(keys):
            if key in keys[:i]:
                raise yaml.constructor.ConstructorError(None, None, f"'{key}' is given twice", node.value[i][0].start_mark)
        return super().construct_mapping(node, deep)

    def construct_int(self, node: yaml.ScalarNode) -> int:
        return int(node.value)

    def construct_float(self, node: yaml.ScalarNode) -> float:
        return float(node.value.replace(".inf", "inf").replace(".nan", "nan"))


class _Dumper(yaml.SafeDumper):
    """Quotes exactly the texts that `_Loader` would read as something else."""


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
