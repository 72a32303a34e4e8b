"""--help shows every key of the real settings with its default and a description, in less than a second and without torch."""

from __future__ import annotations

import importlib
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from kling_programs.train import command

from kling.config import MEANT, _meant, _override, flatten, list_presets, load_config, to_dict
from kling.errors import UserError

PROGRAMS = sorted(command.PROGRAMS)
SCRIPTS = Path(sys.executable).parent


def settings(name: str) -> type:
    asked = command.PROGRAMS[name]
    return getattr(importlib.import_module(f"kling_programs.train.{asked.module}"), asked.settings)


def keys(name: str) -> list[command.Key]:
    asked = command.PROGRAMS[name]
    return command.keys_of(Path(command.__file__).with_name(f"{asked.module}.py"), asked.settings)


@pytest.mark.parametrize("name", PROGRAMS)
def test_settings_read_from_the_source_equal_the_real_ones(name: str) -> None:
    """Keys and defaults in order; the defaults in a form that the command line accepts."""
    told, cls = keys(name), settings(name)
    free = tuple(key.name for key in told if key.kind.startswith(("dict", "list[dict")))
    true = {key: value for key, value in flatten(to_dict(cls())).items() if not (f"{key}.").startswith(tuple(f"{name}." for name in free))}
    assert [key.name for key in told if key.name not in free] == list(true)
    assert {f.name for f in fields(cls) if "dict" in str(f.type)} <= set(free)
    for key in told:
        if key.name in true:
            assert _override(f"x={key.default}" if key.default != '""' else "x=")["x"] == true[key.name], key
    again = load_config(cls, None, [f"{key.name}={key.default}" for key in told if key.default != '""' and key.kind != "float"])
    assert to_dict(again) == to_dict(cls())


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_key_has_a_line(name: str) -> None:
    silent = [key.name for key in keys(name) if len(key.text) < 5]
    assert not silent, f"say in the docstring what they are and in which unit: {silent}"
    assert all("\n" not in key.text for key in keys(name))


@pytest.mark.parametrize("name", PROGRAMS)
def test_no_precision_is_offered_that_is_refused(name: str) -> None:
    """Of fp16: its loss scaler is not supported."""
    assert not [key.name for key in keys(name) if key.name.endswith("mixed_precision") and "fp16" in key.text]


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_needs_no_torch_and_names_every_preset(name: str) -> None:
    words = f"import sys; from kling_programs.train import command; command.run('{name}', ['--help']); print('torch' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, check=True, timeout=60).stdout
    assert said.endswith("False\n") and f"usage: {name} " in said
    for key in keys(name):
        assert f"\n  {key.name} " in said
    for preset in list_presets():
        assert (f"configs/{preset}" in said.split("keys:")[0].split("presets:")[1].split()) == (
            preset.split("/")[0] == command.PROGRAMS[name].presets
        )


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_installed_program_and_its_file_both_answer(name: str, capsys: pytest.CaptureFixture) -> None:
    module = importlib.import_module(f"kling_programs.train.{command.PROGRAMS[name].module}")
    module.main(["-h"])
    assert f"usage: {name} " in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        module.main([])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and f"{name} --help" in error


def test_a_closed_pipe_is_no_error() -> None:
    words = [sys.executable, "-c", "from kling_programs.train import command; command.train(['--help'])"]
    program = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    program.stdout.close()
    assert program.stderr.read() == "" and program.wait(60) == 0


def test_names_of_other_trainers_lead_to_existing_keys() -> None:
    found = set()
    for name in PROGRAMS:
        known = {key.name for key in keys(name)} | {f.name for f in fields(settings(name))}
        for ours, theirs in MEANT.items():
            for word in theirs:
                assert (meant := _meant(settings(name), word)) in {"", *known}, (name, word, meant)
                found |= {ours} if meant.endswith(ours) else set()
    assert found == set(MEANT), "a hint that no program can give is dead"
    for name, word, key in (("kling-train", "learning_rate", "lr"), ("kling-train", "rank", "lora.rank"),
                            ("kling-train-vae", "num_frames", "data.frames"), ("kling-encode", "data_dir", "data.source")):  # fmt: skip
        with pytest.raises(UserError, match=f"'{word}' \\(did you mean '{key}'"):
            load_config(settings(name), None, [f"{word}=1"])
