"""The README is true: its tree is the tree, its names exist, its python runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kling.cameras.axes import MOVES, UNITS
from kling.config import find_config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_tree_is_the_tree():
    tree = README.split("## The tree")[1].split("\n## ")[0]
    listed, folder = set(), ""
    for line in tree.splitlines():
        if found := re.match(r"( {4,6})(\S+)", line):
            name = found[2]
            folder = name if name == "kling/" else folder if len(found[1]) == 6 else ""
            listed.add(name if name.startswith(folder) and folder else folder + name)
    tops = (ROOT / top for top in ("kling", "train", "sample", "eval"))
    files = {str(p.relative_to(ROOT)) for top in tops for p in top.rglob("*.py") if p.name != "__init__.py"}
    assert {name for name in listed if name.endswith(".py")} == files


def test_presets_and_links_exist():
    for preset in re.findall(r"configs/[a-z-]+/[a-z-]+\.yaml", README):
        assert find_config(preset)
    for link in re.findall(r"\]\(([^)#h][^)]*)\)", README):
        assert (ROOT / link).exists(), link


def test_the_camera_table_states_the_units():
    for name in UNITS:
        assert f"| `{name}` |" in README
    for move in MOVES:
        assert move in README


@pytest.mark.slow
def test_the_python_runs(monkeypatch):
    code = re.search(r"```python\n(.*?)```", README, re.S)[1]
    scope: dict = {}
    exec(compile(code, "README", "exec"), scope)  # noqa: S102 - our own text
    assert scope["out"].frames.shape == (1, 41, 64, 112, 3)
