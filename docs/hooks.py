"""Generates the pages of the site that are not in docs/: the home page, the file tree and the API reference.

The README is the home page. The file tree shows the first paragraph of every module's docstring. The API reference lets mkdocstrings
document every module of a room. `generated()` returns all of it by path, so that tests can check it without building the site.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PROGRAMS = {
    "train": "Training and data: one file, one program.",
    "sample": "Sampling, and the studio.",
    "eval": "Evaluation (one file per suite), and benches.",
}
TREE = """# The file tree

Made from the first paragraph of every module's docstring when this site is built.
A room imports only rooms above it in this list, which a test enforces.
The links lead to the API reference.
"""
COPIED = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "kling/assets/README.md": "shipped-model.md",
}


def rooms() -> list[str]:
    """The rooms of kling/ from the lowest up, in the order of tests/test_layout.py."""
    tree = ast.parse((ROOT / "tests" / "test_layout.py").read_text(encoding="utf-8"))
    (floors,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "FLOORS"
    )
    return [room for floor in floors for room in floor.split() if room != "__init__"]


def modules(room: str) -> list[Path]:
    """The files of a room: kling/errors.py, or all of kling/runtime/."""
    if (file := ROOT / "kling" / f"{room}.py").is_file():
        return [file]
    return sorted((ROOT / "kling" / room).rglob("*.py"), key=lambda path: (path.parent, path.name))


def summary(path: Path) -> str:
    """The first paragraph of a module's docstring as one line; empty if there is none."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split())


def dotted(path: Path) -> str:
    """kling/data/video.py -> kling.data.video, kling/data/__init__.py -> kling.data"""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def copied(name: str) -> str:
    """A file of the repository as a page: links into docs/ lose that folder, links to other copied files go to their pages."""
    return re.sub(r'(\]\(|src=")docs/', r"\1", to_pages((ROOT / name).read_text(encoding="utf-8")))


def to_pages(text: str, up: str = "") -> str:
    """The same text with links to copied files replaced by links to their pages. up: the text's path to the repository's root."""
    for source, page in (COPIED | {"LICENSE": "LICENSE.txt"}).items():
        text = text.replace(f"]({up}{source}", f"]({page}")
    return text


def tree() -> str:
    """The page of the file tree: every file with its purpose."""
    single = [path for room in rooms() for path in modules(room) if path.parent.name == "kling"]
    lines = [TREE, "## kling/", "", "Modules that all rooms may import.", "", *table(single)]
    for room in rooms():
        files = modules(room)
        if files[0] not in single:
            lines += [f"## kling/{room}/", "", summary(files[0]), "", *table(files)]
    for folder, title in PROGRAMS.items():
        files = sorted((ROOT / folder).rglob("*.py"), key=lambda path: (path.parent, path.name))
        lines += [f"## {folder}/", "", title, "", *table(files)]
    return "\n".join(lines)


def table(files: list[Path]) -> list[str]:
    """A row for each file: its path in its room, linked to the API reference if that has a page for it, and its purpose."""
    lines = ["| file | purpose |", "|---|---|"]
    for path in files:
        top, *inside = path.relative_to(ROOT).parts
        name = "/".join(inside[1:] if top == "kling" and len(inside) > 1 else inside)  # without the part in the heading
        page = f"reference/{Path(inside[0]).stem}.md#{dotted(path)}"
        shown = f"[`{name}`]({page})" if top == "kling" else " ".join(f"`{x}`" for x in (name, command(path)) if x)
        if path.name != "__init__.py":
            lines.append(f"| {shown} | {cell(summary(path))} |")
    return [*lines, ""]


def command(path: Path) -> str:
    """The command in a program's docstring; empty if there is none."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    shown = dict.fromkeys(re.findall(r"^\s*(kling-eval [a-z-]+|kling-[a-z-]+)", text, re.M))
    return next(iter(shown)) if len(shown) == 1 else next(iter(shown), "").split(" ")[0]


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def reference(room: str) -> str:
    """One page of the API reference."""
    lines = [f"# kling.{room}", ""]
    for path in modules(room):
        if path.name != "__init__.py" or room == "__init__":
            lines += [f"::: {dotted(path)}", ""]
    return "\n".join(lines)


def generated() -> dict[str, str]:
    """Path in the site -> Markdown."""
    pages = {page: copied(name) for name, page in COPIED.items()} | {"tree.md": tree()}
    return pages | {f"reference/{room}.md": reference(room) for room in rooms()}


# ------------------------------------------------------------------------------------------------------------- called by mkdocs


def on_config(config: Any) -> Any:
    config.nav.append({"API reference": [{room: f"reference/{room}.md"} for room in rooms()]})
    return config


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    for path, text in generated().items():
        files.append(File.generated(config, path, content=text))
    files.append(File.generated(config, "LICENSE.txt", abs_src_path=str(ROOT / "LICENSE")))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    return to_pages(markdown, "../")
