"""Training a model from scratch with one command: its stages, their order, resuming, and failures of a stage."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from kling_programs.train import train_all
from kling_programs.train.students import DistillConfig
from kling_programs.train.train_dit import TrainDiTConfig
from kling_programs.train.train_text import TrainTextConfig
from kling_programs.train.train_vae import TrainVAEConfig

from kling.cache.plan import CacheConfig
from kling.config import load_config

CONFIGS = {"train_vae": TrainVAEConfig, "train_text": TrainTextConfig, "train_dit": TrainDiTConfig, "encode": CacheConfig}
CONFIGS["distill"] = DistillConfig


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands of the stages; each only writes an export."""
    commands: list[list[str]] = []

    def run(command: list[str], title: str) -> None:
        commands.append(command)
        out = next(word for word in command if word.startswith("out=")).removeprefix("out=")
        (Path(out) / "export").mkdir(parents=True, exist_ok=True)
        (Path(out) / "export" / "weights").write_text(title)

    monkeypatch.setattr(train_all, "run", run)
    return commands


def settings(command: list[str]) -> object:
    """The configuration that a stage's program would read."""
    name = next(word for word in command if word.startswith("kling_programs")).rpartition(".")[2]
    at = command.index(f"kling_programs.train.{name}")
    return load_config(CONFIGS[name], command[at + 1], command[at + 2 :])


def test_the_shipped_stages_use_results_of_earlier_ones(tmp_path: Path, started: list[list[str]], capsys) -> None:
    train_all.main(["configs/shipped.yaml", f"out={tmp_path}", "scale=0.01"])
    made: set[str] = set()
    encoded: dict[str, str] = {}  # cache -> the VAE that made it
    for command in started:
        cfg = settings(command)
        if isinstance(cfg, CacheConfig):
            encoded[cfg.out] = cfg.vae
        elif (cache := getattr(cfg, "cache", "")) in encoded:
            assert cfg.vae == encoded[cache], "an export holds its VAE in bf16, which is another one for the cache"
        used = [getattr(cfg, key, None) for key in ("init_from", "teacher", "vae", "text_from", "cache")]
        for path in filter(None, used):
            assert Path(path).relative_to(tmp_path).parts[0] in made, command
        made.add(Path(cfg.out).name)
        if steps := getattr(cfg, "steps", None):
            assert 1 <= steps <= 40
        elif "cache" in cfg.out:
            assert 1 <= cfg.clips <= 150 and all(count <= 50 for count in cfg.shorter.values())
    assert (tmp_path / "model" / "weights").read_text().endswith("student") and len(started) == len(made)
    assert f"kling-export {tmp_path / 'model'} --measure-bf16" in capsys.readouterr().out.splitlines()[-1]


def test_the_same_command_resumes_and_another_recipe_is_refused(tmp_path: Path, started: list[list[str]], monkeypatch, capsys) -> None:
    first = ["configs/shipped.yaml", f"out={tmp_path}", "scale=0.01"]
    train_all.main(first)
    everything = len(started)
    stages = json.loads((tmp_path / "stages.json").read_text())
    del stages["clips"], stages["cache"], stages["student"]
    (tmp_path / "stages.json").write_text(json.dumps(stages))
    train_all.main([*first, "processes=2", "threads=1"])
    assert [Path(settings(command).out).name for command in started[everything:]] == ["cache", "clips", "student"]
    assert "torch.distributed.run" in started[-1] and [settings(command).batch for command in started[-2:]] == [8, 4]
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    train_all.main([first[0], f"out={moved}", "scale=0.01"])
    assert len(started) == everything + 3
    with pytest.raises(SystemExit, match="2"):
        train_all.main([first[0], f"out={moved}", "scale=0.01", "stages.text.lr=0.5"])
    assert "stage 'text' done with" in (error := capsys.readouterr().err) and "lr=0.5" in error


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("stages.clips.program=trian", "unknown program of stage 'clips' 'trian' (did you mean 'train'?)"),
        ("stages.vae-images.init_from=clips/export", "put stage 'clips' before"),
        ("stages.more.program=train", "stage 'more' has no preset"),
        ("stages.text.preset=text/wold.yaml", "did you mean 'text/world.yaml'"),
        ("stages.clips.step=5", "stage 'clips': unknown key in override 'step=5': 'step' (did you mean 'steps'?)"),
        ("stages.clips.lr=fast", "stage 'clips': lr = 'fast'"),
        ("stages.clips.program=[train]", "unknown program of stage 'clips'"),
        ("stages.model={program: train, preset: dit/debug.yaml}", "stage 'model' cannot have that name"),
        ("stages={'../x': {program: train, preset: dit/debug.yaml}}", "stage '../x' cannot have that name"),
        ("model=clip/export", "model 'clip/export' begins with no stage's name"),
        ("model=", "model '' begins with no stage's name"),
        ("scale=.inf", "scale = inf"),
        ("scale=0", "scale = 0.0"),
        ("processes=-1", "processes = -1"),
    ],
)
def test_mistakes_are_reported_before_anything_runs(word: str, message: str, tmp_path: Path, started: list[list[str]], capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        train_all.main(["configs/shipped.yaml", f"out={tmp_path}", word])
    assert message in capsys.readouterr().err and not started


@pytest.mark.parametrize("text", ["{", "[1]", '{"text": {}}', "[" * 9999])
def test_a_damaged_list_of_finished_stages_is_told(text: str, tmp_path: Path, started: list[list[str]], capsys) -> None:
    (tmp_path / "stages.json").write_text(text)
    with pytest.raises(SystemExit, match="2"):
        train_all.main(["configs/shipped.yaml", f"out={tmp_path}"])
    assert "stages.json is damaged" in capsys.readouterr().err and not started


def test_a_model_that_no_stage_made_is_told_and_the_old_one_stays(tmp_path: Path, started: list[list[str]], capsys) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").write_text("precious")
    with pytest.raises(SystemExit, match="2"):
        train_all.main(["configs/shipped.yaml", f"out={tmp_path}", "scale=0.01", "model=clips/exports"])
    assert "model 'clips/exports' is no folder" in capsys.readouterr().err and (tmp_path / "model" / "old").read_text() == "precious"


CHILD = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit({})); print('up', flush=True); time.sleep(60)"


def test_a_signal_reaches_the_stage_and_a_failure_names_it(capfd: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="3"):
        train_all.run([sys.executable, "-c", "raise SystemExit(3)"], "stage 1 of 2, words")
    assert "stage 1 of 2, words ended with exit code 3" in capfd.readouterr().err
    parent = f"from kling_programs.train.train_all import run; run([{sys.executable!r}, '-c', {CHILD.format(143)!r}], 'stage 2')"
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "up\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143 and "stage 2: stopped; run the same command to continue" in errors


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_stage_at_a_hundredth_and_a_clip_from_the_result(tmp_path: Path) -> None:
    train_all.main(["configs/shipped.yaml", f"out={tmp_path}", "scale=0.01", "threads=1"])
    sample = ["-m", "kling_programs.sample.generate", "a red ball rolls left on grass", "--model", str(tmp_path / "model")]
    sample += ["--num-inference-steps", "2", "--output", str(tmp_path / "clip.mp4")]
    subprocess.run([sys.executable, *sample], check=True)
    assert (tmp_path / "clip.mp4").stat().st_size > 1000
