"""The command lines: fast help, without importing slow libraries, and hints for names from other tools."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import resource
import subprocess
import sys

import pytest
from kling_programs.eval import certify, vae
from kling_programs.sample.generate import parse
from kling_programs.train.train_dit import TrainDiTConfig as TrainConfig

from kling import Request
from kling.config import load_config
from kling.data.source import DataConfig
from kling.errors import NAMES, UserError, unknown

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


@pytest.mark.parametrize("program", ["sample.generate", "sample.export", "sample.demo", "eval.evaluate", "eval.bench"])
def test_help_is_fast(program: str) -> None:
    """In less than a second of processor time, without importing anything slow."""
    code = f"""
import sys
from kling_programs.{program} import main
try:
    main(["--help"])
except SystemExit as stop:
    assert not stop.code
assert not (slow := set({SLOW}) & set(sys.modules)), slow
"""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) > 5 and resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 1
