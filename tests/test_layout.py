"""The plan of the house (README, "Where things are"): who may import whom, and what the rooms must not contain."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAMS = ("train", "sample", "eval")
FILES = sorted(p for folder in ("kling", *PROGRAMS, "tests") for p in (ROOT / folder).rglob("*.py"))
LIBRARY = [p for p in FILES if p.is_relative_to(ROOT / "kling")]
SHIPPED = [p for p in FILES if not p.is_relative_to(ROOT / "tests")]

# A file imports lower levels, or its own room. `errors` is the ground that every level-0 file stands on.
LEVELS = {"errors": -1, "shapes": 0, "config": 0, "nn": 1, "condition": 1, "data": 2, "flow": 2, "metrics": 2, "runtime": 2, "request": 2}
LEVELS |= {
    "vae": 3,
    "text": 3,
    "dit": 3,
    "inputs": 3,
    "record": 3,
    "hub": 4,
    "encoding": 4,
    "cache": 5,
    "plan": 4,
    "sampling": 5,
    "memory": 5,
    "pipeline": 6,
}
LEVELS |= {"start": 7, "training": 7, "__init__": 7, "validation": 8}


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def room(path: Path) -> str:
    """kling/vae/model.py -> vae, kling/shapes.py -> shapes"""
    return path.relative_to(ROOT / "kling").with_suffix("").parts[0]


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import in a file, wherever it stands; relative ones made absolute."""
    package = path.relative_to(ROOT).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = ".".join([*package[: len(package) - node.level], *filter(None, [node.module])]) if node.level else node.module
            yield from ((node.lineno, f"{start}.{alias.name}") for alias in node.names)


@pytest.mark.parametrize("path", LIBRARY, ids=name)
def test_a_file_imports_lower_levels_only(path: Path) -> None:
    assert room(path) in LEVELS, f"{name(path)}: give the room a level in LEVELS"
    for line, target in imports(path):
        head, *rest = target.split(".")
        assert head not in ("kling_programs", *PROGRAMS), f"{name(path)}:{line} imports a program: {target}"
        if head == "kling" and rest and rest[0] != room(path) and rest[0] in LEVELS:
            assert LEVELS[rest[0]] < LEVELS[room(path)], f"{name(path)}:{line} imports {target}, which is not below it"


@pytest.mark.parametrize("path", SHIPPED, ids=name)
def test_forbidden_imports(path: Path) -> None:
    """One door to accelerate; no pickle anywhere; nothing that is not in the base dependencies at the top of the library."""
    for line, target in imports(path):
        head = target.split(".")[0]
        if head == "accelerate":
            assert room(path) == "runtime" if path in LIBRARY else False, f"{name(path)}:{line}: only kling/runtime imports accelerate"
        assert head not in ("pickle", "dill", "cloudpickle"), f"{name(path)}:{line} imports {head}"
        assert target not in ("torch.load", "torch.save"), f"{name(path)}:{line} pickles"
        assert head not in ("torchvision", "timm", "lpips", "open_clip"), f"{name(path)}:{line}: {head} must not be needed"
        assert head != "argparse" or path not in LIBRARY, f"{name(path)}:{line}: command lines belong to the programs"


@pytest.mark.parametrize("path", SHIPPED, ids=name)
def test_forbidden_calls(path: Path) -> None:
    """The library writes nothing to stdout, and nobody pickles."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        call = ast.unparse(node.func)
        assert call not in ("torch.load", "torch.save", "pickle.load", "pickle.dump"), f"{name(path)}:{node.lineno} calls {call}"
        if call == "print" and path in LIBRARY:
            assert any(k.arg == "file" for k in node.keywords), f"{name(path)}:{node.lineno} prints"


@pytest.mark.parametrize("path", FILES, ids=name)
def test_no_file_is_long(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= 400, f"{name(path)} has {lines} lines: split it"


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=" ".join)
def test_ruff(command: list[str]) -> None:
    pytest.importorskip("ruff")
    result = subprocess.run([sys.executable, "-m", "ruff", *command, str(ROOT)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
