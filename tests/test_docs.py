"""Checks the documentation: links have targets, and everything that it names exists. The site need not be built."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import pkgutil
import re
import shlex
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from kling_programs.eval.evaluate import SUITES

from kling.cameras.axes import MOVES, UNITS
from kling.config import find_config, load_config
from kling.data.world.captions import SUBJECTS, vocabulary

ROOT = Path(__file__).parents[1]
COMMANDS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
CONFIGS = {  # program -> (its module, the dataclass of its keys)
    "kling-train": ("train.train_dit", "TrainDiTConfig"),
    "kling-train-vae": ("train.train_vae", "TrainVAEConfig"),
    "kling-train-text": ("train.train_text", "TrainTextConfig"),
    "kling-distill": ("train.distill", "DistillConfig"),
    "kling-align": ("train.align", "AlignConfig"),
    "kling-train-all": ("train.train_all", "TrainAllConfig"),
    "kling-encode": ("train.encode", "CacheConfig"),
}
SCRIPTS = {"train/train_dit.py": "kling-train", "train/train_vae.py": "kling-train-vae", "train/encode.py": "kling-encode"}
DATA = ("scan", "report", "caption", "camera", "tracks")  # the commands of kling-data
THEIRS = {"--num_machines", "--machine_rank", "--main_process_ip", "--quick"}  # options of accelerate, and of kling-bench
MADE_UP = ("mine", "SIZE")  # placeholder names in examples


def _hooks() -> Any:
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


HOOKS = _hooks()
GENERATED = HOOKS.generated()
PAGES = {
    path: path.read_text(encoding="utf-8")
    for path in [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
}
# the log and the changelog describe the past: their links must work, but names may no longer exist
TOLD = {path: text for path, text in PAGES.items() if path.name not in ("LOG.md", "CHANGELOG.md")}
README = PAGES[ROOT / "README.md"]


def spans(text: str) -> list[str]:
    """The texts between backticks outside code blocks."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^(```.*?^```|(    |\t).*?)$", "", text, flags=re.M | re.S))


def lines(text: str) -> list[str]:
    """Lines of code: from code blocks, and between backticks; comments after `#` are removed."""
    blocks = [line for block in re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S) for line in block.splitlines()]
    blocks += re.findall(r"^    (\S.*)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    return [re.sub(r"\s#\s.*", "", line).strip() for line in [*blocks, *spans(text)]]


def calls(text: str) -> list[tuple[str, list[str]]]:
    """(program, words) for every line of code that calls one of our programs."""
    found = []
    for line in lines(text):
        try:
            words = [word for word in shlex.split(line.replace("\\|", "|")) if "…" not in word]
        except ValueError:  # an apostrophe: no command line
            continue
        while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            words = words[1:]
        starts = [k for k, word in enumerate(words) if word in SCRIPTS]
        if words and words[0].startswith("kling-"):
            found.append((words[0], words[1:]))
        elif starts:
            found.append((SCRIPTS[words[starts[0]]], words[starts[0] + 1 :]))
    return found


@cache
def help_of(program: str, *suite: str) -> str:
    """The output of a program's --help."""
    module, function = COMMANDS[program].split(":")
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out), contextlib.suppress(SystemExit):
        getattr(importlib.import_module(module), function)([*suite, "--help"])
    return out.getvalue()


def flags(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text))


def slug(heading: str) -> str:
    """The anchor that mkdocs and GitHub make for a heading."""
    plain = re.sub(r"[`*]|\[([^]]*)\]\([^)]*\)", r"\1", heading)
    return re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", plain.lower()).strip())


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_and_pictures_have_targets(page: Path) -> None:
    wrong = []
    for target in re.findall(r'\]\(([^)\s]+)\)|src="([^"]+)"', PAGES[page]):
        name, _, anchor = "".join(target).partition("#")
        if re.match(r"[a-z]+:", name):
            continue
        made = GENERATED.get(name) if page.parent.name == "docs" else None
        path = (page.parent / name) if name else page
        if made is None and not path.exists():
            wrong.append(f"{name} does not exist")
        elif anchor:
            text = made or path.read_text(encoding="utf-8")
            anchors = {slug(heading) for heading in re.findall(r"^#+ (.*)$", text, re.M)} | set(re.findall(r"^::: (\S+)$", text, re.M))
            if anchor not in anchors:
                wrong.append(f"{name} has no heading #{anchor}")
    assert not wrong, f"{page.relative_to(ROOT)}: {'; '.join(wrong)}"


@pytest.mark.parametrize("page", TOLD, ids=lambda path: path.name)
def test_commands_and_their_options_exist(page: Path) -> None:
    wrong = []
    for program, words in calls(TOLD[page]):
        if program not in COMMANDS:
            wrong.append(f"there is no {program}")
            continue
        suites = words[:1] if program in ("kling-eval", "kling-data") and words and not words[0].startswith("-") else []
        known = help_of(program, *suites)
        if suites and f"usage: {program} {suites[0]}" not in known:
            wrong.append(f"{program} has no {suites[0]}")
        wrong += [f"{program} has no {flag}" for flag in flags(" ".join(words)) if flag not in flags(known) | {"--help"}]
        if program in CONFIGS and words and words[0].endswith(".yaml") and Path(words[0]).stem not in MADE_UP:
            module, name = CONFIGS[program]
            cls = getattr(importlib.import_module(f"kling_programs.{module}"), name)
            load_config(cls, words[0], [word for word in words[1:] if "=" in word])  # raises for a key that is not there
    parts = [*((program,) for program in COMMANDS), *(("kling-eval", suite) for suite in SUITES), *(("kling-data", c) for c in DATA)]
    everything = "".join(help_of(*part) for part in parts)
    alone = {flag for span in spans(TOLD[page]) if span.startswith("--") for flag in flags(span)}
    wrong += [f"no program has {flag}" for flag in alone - flags(everything) - THEIRS]
    assert not wrong, f"{page.relative_to(ROOT)}: {'; '.join(sorted(set(wrong)))}"


@pytest.mark.parametrize("page", TOLD, ids=lambda path: path.name)
def test_names_files_and_presets_exist(page: Path) -> None:
    text, wrong = TOLD[page], []
    for name in set(re.findall(r"\bkling(?:\.[A-Za-z_]\w*)+", text)):
        try:
            pkgutil.resolve_name(name)
        except (ImportError, AttributeError) as error:
            wrong.append(f"{name}: {error}")
    for preset in set(re.findall(r"configs/[a-z]+/[\w.-]+\.yaml", text)):
        if Path(preset).stem not in MADE_UP:
            find_config(preset)
    for span in spans(text):
        if re.fullmatch(r"(kling|train|sample|eval|configs|tests|docs)/[\w./-]*", span) and not (ROOT / span).exists():
            wrong.append(f"{span} does not exist")
    assert not wrong, f"{page.relative_to(ROOT)}: {'; '.join(wrong)}"


def test_every_file_of_the_tree_has_a_description() -> None:
    silent = [line for line in GENERATED["tree.md"].splitlines() if re.search(r"\.py`.*\|\s*\|$", line)]
    assert not silent, "no docstring: " + "; ".join(silent)
    named = set(re.findall(r"\(reference/\w+\.md#([\w.]+)\)", GENERATED["tree.md"]))
    assert named == {HOOKS.dotted(p) for p in (ROOT / "kling").rglob("*.py") if p.name != "__init__.py"}


def test_the_camera_table_states_the_units() -> None:
    table = PAGES[ROOT / "docs" / "controls.md"]
    for name, (amount, unit) in UNITS.items():
        said = "half the focal length" if name == "zoom" else f"{amount:g}{'°' if 'degrees' in unit else ' m'}"
        assert re.search(rf"^\| `{name}` \|[^|]*\| {re.escape(said)} \|", table, re.M), f"{name}: {said}"
    assert all(f"`{move}`" in table for move in MOVES)


def test_the_vocabulary_is_the_worlds() -> None:
    """Every colour, solid, motion and ground of the captions stands in the table, by its first phrase in both languages, and no other."""
    said = PAGES[ROOT / "docs" / "first-video.md"].partition("## What the shipped model understands")[2]
    rows = dict(re.findall(r"^\| (\w+) \| (.*) \|$", said, re.M))
    words = {SUBJECTS[subject][0]: " · ".join(f"{row[1][0]} {row[2][0]}" for row in vocabulary()[subject]) for subject in SUBJECTS}
    assert rows == {subject: words[subject] for subject in rows} and words.keys() - rows == {"camera"}


@pytest.mark.slow
def test_the_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kling import KlingPipeline

    monkeypatch.chdir(tmp_path)
    code = re.search(r"```python\n(.*?)```", README, re.S)[1]
    scope: dict[str, Any] = {}
    exec(compile(code, "README", "exec"), scope)  # noqa: S102 - our own text
    assert scope["out"].frames.shape == (1, 41, 64, 112, 3)
    assert (tmp_path / "out" / "ball.mp4").stat().st_size > 0
    assert KlingPipeline.from_pretrained(tmp_path / "out" / "model").config.fps == 8


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(ROOT / "mkdocs.yml"), "-d", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stdout + result.stderr
    assert 'id="kling.flow.solvers.adams"' in (tmp_path / "reference" / "flow.html").read_text(encoding="utf-8")
    assert "solvers.py" in (tmp_path / "tree.html").read_text(encoding="utf-8")
