"""The structure of the package (docs: the file tree): which room may import which, and forbidden imports and calls."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAMS = ("train", "sample", "eval")
SHIPPED = sorted(p for folder in ("kling", *PROGRAMS) for p in (ROOT / folder).rglob("*.py"))
LIBRARY = [p for p in SHIPPED if p.is_relative_to(ROOT / "kling")]

# A room imports itself and the rooms above it. Rooms on one line do not import each other.
FLOORS = (
    "errors",
    "shapes config",
    "runtime",
    "nn",
    "cameras",
    "condition",
    "flow",
    "data",
    "vae text dit",
    "hub",
    "cache",
    "metrics",
    "sampling",
    "rewards",
    "training",
    "__init__",
)
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms.split()}


def room(path: Path) -> str:
    """kling/vae/model.py -> vae, kling/shapes.py -> shapes"""
    return path.relative_to(ROOT / "kling").with_suffix("").parts[0]


def module(path: Path) -> str:
    """kling/vae/model.py -> kling.vae.model, kling/vae/__init__.py -> kling.vae"""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def imports(path: Path) -> list[tuple[int, str]]:
    """(line, dotted name) of every import in a file, at any level; relative ones made absolute."""
    package = path.relative_to(ROOT).with_suffix("").parts
    found = []
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = ".".join([*package[: len(package) - node.level], *filter(None, [node.module])]) if node.level else node.module
            found += [(node.lineno, f"{start}.{alias.name}") for alias in node.names]
    return found


def calls(path: Path) -> Iterator[tuple[ast.Call, str]]:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            yield node, ast.unparse(node.func)


def at(path: Path, line: int) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


def test_rooms_import_only_the_rooms_above_them() -> None:
    assert {room(path) for path in LIBRARY} == set(LEVEL), "give every room a place in FLOORS"
    wrong = []
    for path in LIBRARY:
        for line, target in imports(path):
            head, other, *_ = [*target.split("."), ""]
            below = head == "kling" and other in LEVEL and other != room(path) and LEVEL[other] >= LEVEL[room(path)]
            if below or head in ("kling_programs", *PROGRAMS):
                wrong.append(f"{at(path, line)} imports {target}")
    assert not wrong, "\n".join(wrong)


def test_there_are_no_import_cycles() -> None:
    modules = {module(path): path for path in LIBRARY}
    graph = {
        name: {name_of for _, target in imports(path) for name_of in (target, target.rpartition(".")[0]) if name_of in modules} - {name}
        for name, path in modules.items()
        if name != "kling"
    }
    for needed in graph.values():
        needed.discard("kling")  # its names are imported when they are first used
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def imported_at_once(path: Path) -> Iterator[str]:
    """Dotted names that are imported when the file is: not those in functions, and not those for type checkers."""
    nodes = list(tree(path).body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif not isinstance(node, ast.FunctionDef) and not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            nodes += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt | ast.ExceptHandler)]


def test_a_training_its_evaluation_and_benches_need_no_decoder_and_no_demo() -> None:
    """A machine with a GPU and no network has none of these packages (configs/gpu/first.sh; tests/test_device.py tries it)."""
    modules = {module(path): path for path in LIBRARY}
    modules |= {f"kling_programs.{module(path)}": path for path in SHIPPED if path not in LIBRARY}
    benches = [f"eval.benches.{name}" for name in ("dit", "attn", "vae", "vae_mem", "sampler", "train", "scaling")]
    programs = ["train.train_dit", "train.train_vae", "train.train_text", "train.encode", "eval.world", "eval.bench", *benches]
    reached = {f"kling_programs.{name}": "the command line" for name in programs}  # name: who imports it
    todo, wrong = list(reached), []
    while todo:
        name = todo.pop()
        for target in imported_at_once(modules[name]):
            if target.split(".")[0] in ("av", "decord", "gradio"):
                wrong.append(f"{name} imports {target}, and is itself imported by {reached[name]}")
            for place in (target, *(target.rsplit(".", n)[0] for n in range(1, target.count(".") + 1))):
                if place in modules and place not in reached:
                    reached[place] = name
                    todo.append(place)
    assert len(reached) > 50 and not wrong, "\n".join(wrong)


def test_forbidden_imports() -> None:
    """Only one module imports accelerate; no pickle; nothing outside the base dependencies; argparse only in programs."""
    never = ("pickle", "dill", "cloudpickle", "torchvision", "timm", "lpips", "open_clip")
    wrong = []
    for path in SHIPPED:
        library = path in LIBRARY
        for line, target in imports(path):
            head = target.split(".")[0]
            if head in never or target in ("torch.load", "torch.save"):
                wrong.append(f"{at(path, line)} imports {target}")
            if head == "accelerate" and not (library and room(path) == "runtime"):
                wrong.append(f"{at(path, line)} imports accelerate: only kling/runtime does")
            if head == "argparse" and library:
                wrong.append(f"{at(path, line)} imports argparse: command lines belong to the programs")
    assert not wrong, "\n".join(wrong)


def test_forbidden_calls() -> None:
    """Nothing pickles, and the library does not print."""
    wrong = []
    for path in SHIPPED:
        for node, call in calls(path):
            if call in ("torch.load", "torch.save", "pickle.load", "pickle.dump"):
                wrong.append(f"{at(path, node.lineno)} calls {call}")
            if call == "print" and path in LIBRARY and not any(k.arg == "file" for k in node.keywords):
                wrong.append(f"{at(path, node.lineno)} prints")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=" ".join)
def test_ruff(command: list[str]) -> None:
    pytest.importorskip("ruff")
    result = subprocess.run([sys.executable, "-m", "ruff", *command, str(ROOT)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
