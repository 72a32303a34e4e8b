"""What pip and make provide: the right packages and programs, no unwanted dependency, and prompts passed on unchanged."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import kling

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FOLDERS = {name: ROOT / folder for name, folder in PROJECT["tool"]["setuptools"]["package-dir"].items()}
BASE = [Requirement(text) for text in PROJECT["project"]["dependencies"]]
EXTRAS = [Requirement(text) for texts in PROJECT["project"]["optional-dependencies"].values() for text in texts]
BOUNDED = ("diffusers",)  # we use private parts of it, which may change with a minor version
PINS = {
    canonicalize_name(pin.name): pin
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
    for pin in [Requirement(line)]
}


def test_every_room_is_packaged() -> None:
    rooms = {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "kling").rglob("*.py")}
    listed = {p for p in PROJECT["tool"]["setuptools"]["packages"] if p.split(".")[0] == "kling"}
    assert listed == rooms, "pyproject.toml [tool.setuptools] packages"


@pytest.mark.parametrize("command", PROJECT["project"]["scripts"])
def test_every_command_has_its_program(command: str) -> None:
    module, function = PROJECT["project"]["scripts"][command].split(":")
    package, _, stem = module.rpartition(".")
    tree = ast.parse((FOLDERS[package] / f"{stem}.py").read_text(encoding="utf-8"))
    defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert function in defined | {node.targets[0].id for node in tree.body if isinstance(node, ast.Assign)}


def test_ranges_pins_and_what_is_installed_agree() -> None:
    for requirement in BASE + EXTRAS:
        name = canonicalize_name(requirement.name)
        if name == "kling" or (requirement.marker and not requirement.marker.evaluate()):
            continue
        assert requirement.specifier, f"{name} needs a floor"
        signs = {s.operator for s in requirement.specifier}
        assert signs == {">="} or (name in BOUNDED and signs == {">=", "<"}), f"{name}: a range, so that what is installed stays"
        if name in ("xformers", "setuptools"):  # chosen by the CUDA build of torch, and by the interpreter
            continue
        assert name in PINS, f"constraints.txt does not pin {name}"
        assert requirement.specifier.contains(next(iter(PINS[name].specifier)).version)
        try:
            assert requirement.specifier.contains(metadata.version(name)), f"{name} {metadata.version(name)} is installed"
        except metadata.PackageNotFoundError:
            assert requirement in EXTRAS


def test_base_closure_is_clean() -> None:
    """torchvision, when installed with another torch build, breaks transformers: no base dependency may install it."""
    seen: set[str] = set()
    queue = [requirement.name for requirement in BASE]
    while queue:
        name = canonicalize_name(queue.pop())
        if name in seen:
            continue
        seen.add(name)
        try:
            needs = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        queue += [r.name for r in map(Requirement, needs) if r.marker is None or r.marker.evaluate({"extra": ""})]
    assert {"torch", "diffusers", "omegaconf"} <= seen
    assert not seen & {"torchvision", "timm", "lpips", "open-clip-torch", "xformers", "gradio", "wandb"}


def test_version_and_license() -> None:
    version = PROJECT["project"]["version"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert kling.__version__ == citation["version"] == version
    assert f"## {version} ({citation['date-released']})" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8") and PROJECT["project"]["license"] == "Apache-2.0"


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_make_passes_the_prompt_on_unchanged(tmp_path: Path) -> None:
    program = tmp_path / ".venv" / "bin" / "kling-sample"
    program.parent.mkdir(parents=True)
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$@" > args\n')
    program.chmod(0o755)
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("bin/python", ".installed", ".installed-dev"):
        (tmp_path / ".venv" / name).touch()

    prompt = """it's a "red" ball; $5 $(HOME) `id` # 一只狗 在草地上"""
    clean = {k: v for k, v in os.environ.items() if k not in ("PROMPT", "MAKEFLAGS", "MAKELEVEL")}
    for arguments, extra in ([f"PROMPT={prompt}"], {}), ([], {"PROMPT": prompt}):
        subprocess.run(["make", "-s", "sample", *arguments], cwd=tmp_path, env=clean | extra, check=True, timeout=60)
        assert prompt in (tmp_path / "args").read_text(encoding="utf-8").splitlines()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel, built from nothing but what belongs to it."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("kling", "train", "sample", "eval", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder), str(source)]
    subprocess.run(pip, check=True, capture_output=True)
    return next(folder.glob("kling-*.whl"))


@pytest.mark.slow
def test_wheel(wheel: Path) -> None:
    """The wheel contains the library, the programs and the presets, and has no top-level names but kling and kling_programs."""
    names = set(zipfile.ZipFile(wheel).namelist())

    assert {name.split("/")[0].split("-")[0] for name in names} == {"kling", "kling_programs"}
    for top, target in (("kling", "kling"), *((p, f"kling_programs/{p}") for p in ("train", "sample", "eval", "configs"))):
        files = [p for p in (ROOT / top).rglob("*") if p.is_file() and p.suffix in (".py", ".yaml", ".safetensors", ".json")]
        missing = [p for p in files if f"{target}/{p.relative_to(ROOT / top)}" not in names]
        assert not missing, f"not in the wheel: {missing[0]}"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_installed_wheel_samples_and_trains_outside_a_checkout(wheel: Path, tmp_path: Path) -> None:
    """A bare environment has nothing of this project but the wheel; other packages are those of this interpreter."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "env")], check=True)
    programs = tmp_path / "env" / "bin"
    pip = [sys.executable, "-m", "pip", "-q", "--python", str(programs / "python"), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(pip, check=True)
    (site,) = (tmp_path / "env").glob("lib/python*/site-packages/kling")
    others = [path for path in sys.path if Path(path).name == "site-packages"]
    (site.parent / "others.pth").write_text("\n".join(others))  # their own .pth files, such as one of this checkout, are not read
    work = tmp_path / "work"
    work.mkdir()
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}

    def run(program: str, *words: str) -> str:
        done = subprocess.run([str(programs / program), *words], cwd=work, env=clean, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert run("python", "-c", "import kling; print(kling.__file__, kling.__version__)").split() == [
        str(site / "__init__.py"), PROJECT["project"]["version"],
    ]  # fmt: skip
    run("kling-sample", "a red ball rolls left on grass", "--num-frames", "17", "--num-inference-steps", "2", "--output", "ball.mp4")
    run("kling-train", "configs/dit/debug.yaml", "out=run", "steps=2", "sample_every=0")
    run("kling-sample", "a red ball", "--model", "run/export", "--num-frames", "17", "--num-inference-steps", "2", "--output", "mine.mp4")
    assert {path.name for path in work.glob("*.mp4")} == {"ball.mp4", "mine.mp4"}
