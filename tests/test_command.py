"""The command lines: fast help, without importing slow libraries, and hints for names from other tools."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import resource
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from kling_programs.eval import cases, certify, evaluate, options, vae
from kling_programs.sample.generate import parse
from kling_programs.train.data import parser as data_parser
from kling_programs.train.train_dit import TrainDiTConfig as TrainConfig

from kling import Request
from kling.config import load_config
from kling.data.source import DataConfig
from kling.errors import NAMES, UserError, unknown
from kling.metrics import features
from kling.sampling.pipeline import ASSETS
from kling.sampling.request import MODES

SLOW = ("torch", "numpy", "diffusers", "transformers", "av", "cv2", "gradio", "omegaconf")


@pytest.mark.parametrize(
    ("words", "size"), [(["--sizes", "112x64,48x32"], [(64, 112), (32, 48)]), (["--size", "832x480"], (480, 832))], ids=["certify", "vae"]
)
def test_sizes_are_width_times_height_everywhere(words: list[str], size: object) -> None:
    """(H, W) internally, as everywhere in the library."""
    program = certify if words[0] == "--sizes" else vae
    args = program.parse([*words, "--out", "o", *([] if program is certify else ["FOLDER"])])
    assert vars(args)[words[0][2:]] == size
    with pytest.raises(UserError, match="write it as WIDTHxHEIGHT"):
        program.parse([words[0], "64", "--out", "o", *([] if program is certify else ["FOLDER"])])


# Names in diffusers, ComfyUI, Wan's scripts and other trainers, and our names for them.
ELSEWHERE = {
    "--steps": "--num-inference-steps",
    "--sample_steps": "--num-inference-steps",
    "--cfg": "--guidance-scale",
    "--sample_guide_scale": "--guidance-scale",
    "--sampler": "--solver",
    "--neg": "--negative-prompt",
    "--width": "--size', as WIDTHxHEIGHT",
    "--end-image": "--last-image",
    "--frame_num": "--num-frames",
    "--num_frames": "--num-frames",
    "--ckpt_dir": "--model",
    "--denoise": "--strength', which is 1 - denoise",
    "--save_file": "--output",
    "--lastimage": "--last-image",
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_names_of_other_tools_are_recognised(name: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"unknown option '{name}' (did you mean '{ELSEWHERE[name]}")):
        parse(["a ball", name, "20"])


def test_names_of_other_tools_are_recognised_in_python_and_in_configs() -> None:
    for name, ours in {"generator": "seed', a whole number", "steps": "num_inference_steps", "end_image": "last_image"}.items():
        with pytest.raises(UserError, match=re.escape(f"unknown field '{name}' (did you mean '{ours}")):
            Request("a ball", **{name: 1})
    with pytest.raises(UserError, match="'learning_rate' .did you mean 'lr'"):
        load_config(TrainConfig, None, ["learning_rate=1e-4"])
    assert "did you mean 'dit/small.yaml'" in str(unknown("config", "dit/smal.yaml", ["dit/base.yaml", "dit/small.yaml"]))
    assert "did you mean" not in str(unknown("suite", "zzzz", ["vae", "dit"]))


def test_every_name_in_a_hint_exists() -> None:
    """Otherwise the hint would never be shown."""
    options = {option.lstrip("-").replace("-", "_") for option in re.findall(r"--[a-z0-9-]+", options_of(parse))}
    fields = {field.name for cls in (Request, TrainConfig, DataConfig) for field in dataclasses.fields(cls)}
    assert not (strange := [ours for ours in NAMES if not set(ours.split()) & (options | fields)]), strange


def options_of(parse) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        parse(["--help"])
    return out.getvalue()


SCRIPTS = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
WITH_COMMANDS = {"kling-eval": tuple(evaluate.SUITES), "kling-data": ("scan", "report", "caption", "camera", "tracks")}
ALL = [(program, *more) for program in SCRIPTS for more in ((), *((command,) for command in WITH_COMMANDS.get(program, ())))]


@pytest.mark.parametrize("words", ALL, ids=" ".join)
def test_help_is_fast(words: tuple[str, ...]) -> None:
    """Of every program and command: in under a second of processor time, with nothing imported that a loaded machine would wait for."""
    module, function = SCRIPTS[words[0]].split(":")
    code = f"""
import sys
from {module} import {function} as main
try:
    main([*{words[1:]}, "--help"])
except SystemExit as stop:
    assert not stop.code
assert not (slow := set({SLOW}) & set(sys.modules)), slow
"""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) > 5 and resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 1


def test_no_command_is_left_out_of_the_test_of_help() -> None:
    assert set(WITH_COMMANDS["kling-data"]) == set(data_parser()._subparsers._group_actions[0].choices)
    named = {re.match(r"kling-eval ([a-z-]+)", line)[1] for line in evaluate.__doc__.splitlines() if line.startswith("kling-eval ")}
    assert named == set(WITH_COMMANDS["kling-eval"])


def test_what_the_help_of_a_suite_names_is_what_the_library_has() -> None:
    assert (tuple(cases.TASKS), tuple(features.SOURCES), MODES) == (options.TASKS, options.NETWORKS, options.MODES)
    assert (options.FVD_FRAMES, options.MOVES, options.CARD.parent) == (features.FVD_FRAMES, len(certify.MOVES), ASSETS)
