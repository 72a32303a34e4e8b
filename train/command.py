"""Starts the programs of this folder. `--help` is answered from the source of their settings, before torch is imported."""

from __future__ import annotations

import ast
import importlib
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import kling
from kling.config import list_presets
from kling.errors import UserError, program


@dataclass(frozen=True)
class Program:
    """A program whose settings are one dataclass. presets: its folder of `configs/`."""

    module: str
    settings: str
    presets: str
    usage: str = "CONFIG.yaml [key=value ...]"


PROGRAMS = {
    "kling-train": Program("train_dit", "TrainDiTConfig", "dit"),
    "kling-distill": Program("distill", "DistillConfig", "distill"),
    "kling-align": Program("align", "AlignConfig", "align"),
    "kling-train-vae": Program("train_vae", "TrainVAEConfig", "vae"),
    "kling-train-text": Program("train_text", "TrainTextConfig", "text"),
    "kling-encode": Program("encode", "CacheConfig", "cache"),
    "kling-train-all": Program("train_all", "TrainAllConfig", "shipped.yaml"),
    "kling-plan": Program("plan", "PlanConfig", "dit", "configs/dit/PRESET.yaml [key=value ...]"),
}
KLING = Path(kling.__file__).parent


def run(name: str, argv: list[str] | None = None) -> None:
    """Print help at once; run everything else in the program's own file."""

    @program
    def main(argv: list[str]) -> None:
        if not helped(name, argv):
            importlib.import_module(f"kling_programs.train.{PROGRAMS[name].module}").main(argv)

    main(sys.argv[1:] if argv is None else argv)


train = partial(run, "kling-train")
distill = partial(run, "kling-distill")
align = partial(run, "kling-align")
train_vae = partial(run, "kling-train-vae")
train_text = partial(run, "kling-train-text")
encode = partial(run, "kling-encode")
train_all = partial(run, "kling-train-all")
plan = partial(run, "kling-plan")


def helped(name: str, argv: Sequence[str]) -> bool:
    """Print the help text if that was requested. Raises `UserError` if no argument was given."""
    if not argv:
        raise UserError(f"usage: {name} {PROGRAMS[name].usage} ({name} --help lists every key and preset)")
    if not {"-h", "--help"} & set(argv):
        check_preset(name, argv[0])
        return False
    try:
        print(help_text(name), flush=True)
    except BrokenPipeError:  # the reader, such as `| head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def check_preset(name: str, config: str) -> None:
    """Raises `UserError` for a shipped preset of another program, whose keys this one does not have."""
    preset = config.removeprefix("configs/")
    others = {p.presets: other for other, p in PROGRAMS.items() if p.presets != PROGRAMS[name].presets and other != "kling-plan"}
    owner = others.get(preset.split("/")[0])
    if owner and preset in list_presets():
        raise UserError(f"{config} is a preset of {owner}: {name} takes {PROGRAMS[name].usage} ({name} --help lists its presets)")


def help_text(name: str) -> str:
    """Usage, presets, and one line for each key: type, default, meaning and unit."""
    asked = PROGRAMS[name]
    file = Path(__file__).with_name(f"{asked.module}.py")
    keys = keys_of(file, asked.settings)
    widths = [min(40, max(len(column) for column in columns)) for columns in zip(*((k.name, k.kind, k.default) for k in keys), strict=True)]
    rows = [f"  {k.name:<{widths[0]}}  {k.kind:<{widths[1]}}  {k.default:<{widths[2]}}  {k.text}" for k in keys]
    presets = [f"configs/{preset}" for preset in list_presets() if preset.split("/")[0] == asked.presets]
    head = [f"usage: {name} {asked.usage}", "", ast.get_docstring(_parse(file)[0]), "", f"presets: {' '.join(presets)}"]
    return "\n".join([*head, "", "keys: type, default, meaning", *rows])


# --------------------------------------------------------------------------------------------------- settings, from their source


@dataclass(frozen=True)
class Key:
    """One setting, as the help text shows it."""

    name: str
    kind: str
    default: str
    text: str


def keys_of(file: Path, name: str, prefix: str = "", said: dict[str, str] | None = None) -> list[Key]:
    """The keys of the dataclass `name` that `file` defines or imports, including those of nested dataclasses; nothing is executed.

    A key's text is its sentence in the docstring ("steps: updates of the weights."), or the comment on its line. said: texts for these
    keys in the docstring of an outer dataclass ("data.frames: ...").
    """
    file, node = _find(file, name)
    fields = [s for s in node.body if isinstance(s, ast.AnnAssign) and isinstance(s.target, ast.Name)]
    texts = sentences(ast.get_docstring(node) or "", [s.target.id for s in fields]) | (said or {})
    lines = _parse(file)[1]
    keys = []
    for s in fields:
        own, kind, default = s.target.id, ast.unparse(s.annotation), s.value
        if isinstance(default, ast.Call) and getattr(default.func, "id", "") == "field":
            default = next(k.value.body if isinstance(k.value, ast.Lambda) else ast.Call(k.value, [], []) for k in default.keywords)
        if isinstance(default, ast.Call) and not default.args and getattr(default.func, "id", "") == kind:
            inner = {key.removeprefix(f"{own}."): text for key, text in texts.items() if key.startswith(f"{own}.")}
            keys += keys_of(file, kind, f"{prefix}{own}.", inner)
            continue
        comment = re.search(r"  # (.*)$", lines[s.end_lineno - 1])
        text = texts.get(own) or (comment[1] if comment else "")
        keys.append(Key(prefix + own, kind, "required" if default is None else shown(_value(file, default)), text))
    return keys


def sentences(doc: str, names: Sequence[str]) -> dict[str, str]:
    """Texts of keys in a docstring: "a: first. b, c: of both." -> {"a": "first", "b": "of both", "c": "of both"}."""
    one = rf"(?:{'|'.join(map(re.escape, names))})(?:\.\w+)*"
    start = re.compile(rf"(?:^|(?<=[.)] ))({one}(?:, {one})*): ")
    texts = {}
    for paragraph in re.split(r"\n\s*\n", doc):
        found = list(start.finditer(line := " ".join(paragraph.split())))
        for this, after in zip_longest(found, found[1:]):
            text = line[this.end() : after.start() if after else None].strip().removesuffix(".")
            texts |= dict.fromkeys(this[1].split(", "), text)
    return texts


def shown(value: Any) -> str:
    """A default as it would be written on a command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return f"[{','.join(map(shown, value))}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{k}: {shown(v)}" for k, v in value.items()) + "}"
    return str(value) if value != "" else '""'


def _value(file: Path, node: ast.expr) -> Any:
    """The value of an expression of literals, named constants, list() and dict()."""
    if isinstance(node, ast.Name):
        where, found = _find(file, node.id)
        return _value(where, found.value)
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("list", "dict"):
        return {"list": list, "dict": dict}[node.func.id](*(_value(file, one) for one in node.args))
    return ast.literal_eval(node)


_PARSED: dict[Path, tuple[ast.Module, list[str]]] = {}


def _parse(file: Path) -> tuple[ast.Module, list[str]]:
    if file not in _PARSED:
        text = file.read_text(encoding="utf-8")
        _PARSED[file] = ast.parse(text), text.split("\n")
    return _PARSED[file]


def _find(file: Path, name: str) -> tuple[Path, Any]:
    """The class or assignment of a name, and its file; follows imports from kling and from this folder."""
    for node in _parse(file)[0].body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return file, node
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return file, node
        if isinstance(node, ast.ImportFrom) and any((alias.asname or alias.name) == name for alias in node.names):
            package, *parts = node.module.split(".")
            place = KLING.joinpath(*parts) if package == "kling" else Path(__file__).parent.joinpath(*parts[1:])
            return _find(place / "__init__.py" if place.is_dir() else place.with_suffix(".py"), name)
    raise LookupError(f"{name} in {file}")
