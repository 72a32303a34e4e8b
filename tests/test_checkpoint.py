"""A checkpoint is complete or absent, whatever happens while it is written."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from kling.config import save_config
from kling.errors import UserError
from kling.runtime import checkpoint, files
from kling.runtime.checkpoint import check_same_config, load, load_latest, save
from kling.runtime.random import noise_like
from kling.training.ema import EMA
from kling.training.optim import adamw, load_optimizer_tensors, lr_at, optimizer_tensors, set_lr


def small_model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 1))


def weights(value: float) -> dict[str, dict[str, Tensor]]:
    return {"model": {"w": torch.full((3, 2), value), "b": torch.tensor(value)}, "ema": {"w": torch.zeros(3, 2)}}


def test_save_and_load(tmp_path: Path) -> None:
    assert load_latest(tmp_path) is None
    for step in (5, 10, 15):
        path = save(tmp_path, step, weights(step), {"text": "狗", "step": step}, keep_last=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000010", "step-00000015"]
    assert (tmp_path / "latest").read_text().strip() == "step-00000015" == path.name
    found = load_latest(tmp_path)
    assert found is not None and (found.step, found.meta, found.path) == (15, {"text": "狗", "step": 15}, path)
    assert torch.equal(found.tensors["model"]["w"], torch.full((3, 2), 15.0))
    assert found.tensors["model"]["b"].shape == ()
    assert list(load(path, ["ema"]).tensors) == ["ema"]
    with pytest.raises(UserError, match="has no 'teacher': it holds ema, model"):
        load(path, ["teacher"])
    with pytest.raises(UserError, match="does not exist"):
        load(tmp_path / "step-00000099")


def test_the_same_step_again_replaces(tmp_path: Path) -> None:
    save(tmp_path, 5, weights(1))
    path = save(tmp_path, 5, weights(2), keep_last=1)
    assert load(path).tensors["model"]["b"] == 2
    assert [p.name for p in tmp_path.glob("step-*")] == [path.name]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


DAMAGE = {
    "model.safetensors is missing": lambda p: (p / "model.safetensors").unlink(),
    "model.safetensors has .* bytes": lambda p: (p / "model.safetensors").write_bytes(b"short"),
    "SHA-256 of model.safetensors is not": lambda p: flip(p / "model.safetensors"),
    "SHA-256 of meta.json is not": lambda p: flip(p / "meta.json"),
    "manifest.json is missing": lambda p: (p / "manifest.json").unlink(),
    "manifest.json is not readable": lambda p: (p / "manifest.json").write_text('{"step"'),
}


@pytest.mark.parametrize("reason", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_previous_one_is_used(reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, 1, weights(1))
    bad = save(tmp_path, 2, weights(2))
    DAMAGE[reason](bad)
    with pytest.raises(UserError, match=f"step-00000002 .*{reason}"):
        load(bad)
    found = load_latest(tmp_path)
    assert found is not None and found.step == 1
    assert "step-00000002" in caplog.text and reason.split()[0] in caplog.text

    save(tmp_path, 2, weights(3))  # the run continues and writes the step again
    assert load_latest(tmp_path).step == 2  # type: ignore[union-attr]


def test_no_intact_checkpoint_is_an_error_and_not_a_fresh_start(tmp_path: Path) -> None:
    flip(save(tmp_path, 1, weights(1)) / "model.safetensors")
    with pytest.raises(UserError, match="no intact checkpoint"):
        load_latest(tmp_path)


def test_intact_folders_are_kept_over_those_of_an_abandoned_continuation(tmp_path: Path) -> None:
    save(tmp_path, 10, weights(1))
    flip(save(tmp_path, 20, weights(2)) / "model.safetensors")
    save(tmp_path, 15, weights(3), keep_last=2)  # resumed from 10, stopped at 15
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000010", "step-00000015"]
    assert load_latest(tmp_path).step == 15  # type: ignore[union-attr]


class Killed(BaseException):
    """Raised to simulate a kill at this point."""


@pytest.mark.parametrize("same_step", [False, True])
def test_a_kill_at_any_moment_leaves_an_intact_checkpoint(same_step: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupt `save` before its first, second, ... change of the disk until it completes; an intact checkpoint exists every time."""
    count, limit = 0, 0

    def guarded(function):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count > limit:
                raise Killed
            return function(*args, **kwargs)

        return call

    old, new = 1, 1 if same_step else 2
    real = [(checkpoint, "save_file"), (checkpoint, "verify"), (checkpoint, "sync_to_disk"), (files, "sync_to_disk"), (files.os, "replace")]
    moved = {"rename": Path.rename, "replace": Path.replace, "write_text": Path.write_text, "mkdir": Path.mkdir}
    seen: set[float] = set()
    for limit in range(100):  # noqa: B007 - read by `guarded`
        run = tmp_path / str(limit)
        save(run, old, weights(10))
        count = 0
        with monkeypatch.context() as patch:
            for module, key in real:
                patch.setattr(module, key, guarded(getattr(module, key)))
            for key, function in moved.items():
                patch.setattr(Path, key, guarded(function))
            patch.setattr(shutil, "rmtree", guarded(shutil.rmtree))
            try:
                save(run, new, weights(20), keep_last=1)
                finished = True
            except Killed:
                finished = False
        found = load_latest(run)
        assert found is not None
        seen.add(found.tensors["model"]["b"].item())
        save(run, 3, weights(30), keep_last=1)  # the remains do not disturb the next save
        assert load_latest(run).step == 3  # type: ignore[union-attr]
        assert [p.name for p in run.glob("step-*")] == ["step-00000003"]
        if finished:
            break
    assert finished and limit > 10 and seen == {10.0, 20.0}


@pytest.mark.slow
def test_a_real_kill(tmp_path: Path) -> None:
    code = (
        "import sys, torch\nfrom kling.runtime.checkpoint import save\n"
        "for s in range(1, 10**6): save(sys.argv[1], s, {'model': {'w': torch.full((200000,), float(s))}})"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
    while not (tmp_path / "step-00000005").exists():
        time.sleep(0.01)
    process.kill()
    process.wait()
    found = load_latest(tmp_path)
    assert found is not None and (found.tensors["model"]["w"] == found.step).all()


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1, weights(1))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError, match="step-00000002 was not written .No space left on device"):
        save(tmp_path, 2, weights(2), keep_last=1)
    assert [p.name for p in tmp_path.glob("step-*")] == ["step-00000001"]
    assert load_latest(tmp_path).step == 1  # type: ignore[union-attr]


def test_a_run_keeps_its_settings(tmp_path: Path) -> None:
    inner = dataclasses.make_dataclass("Inner", [("dim", int, 8)])
    model = dataclasses.field(default_factory=inner)
    outer = dataclasses.make_dataclass("Outer", [("steps", int, 10), ("seed", int, 1), ("model", inner, model)])
    check_same_config(tmp_path, {"anything": 1})
    save_config(outer(), tmp_path / "config.yaml")
    check_same_config(tmp_path, {"steps": 99, "seed": 1, "model": {"dim": 8}})
    with pytest.raises(UserError, match="model.dim 8 -> 16; seed 1 -> 2; restore them"):
        check_same_config(tmp_path, {"steps": 99, "seed": 2, "model": {"dim": 16}})


def train(model: nn.Module, optimizer: torch.optim.Optimizer, ema: EMA, steps: range) -> None:
    for step in steps:
        set_lr(optimizer, lr_at(step, lr=1e-2, warmup=3, steps=10, schedule="cosine"))
        x = noise_like(torch.zeros(4, 4), 0, "data", step, range(4))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update(model, step)


def test_a_resumed_run_is_the_same_run_bit_for_bit(tmp_path: Path) -> None:
    straight = small_model()
    straight_optimizer, straight_ema = adamw(straight, 1e-2), EMA(straight)
    train(straight, straight_optimizer, straight_ema, range(10))

    first = small_model()
    optimizer, ema = adamw(first, 1e-2), EMA(first)
    train(first, optimizer, ema, range(5))
    groups = {"model": first.state_dict(), "optimizer": optimizer_tensors(optimizer, first), "ema": ema.state_dict()}
    save(tmp_path, 5, groups)

    found = load_latest(tmp_path)
    assert found is not None
    second = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 1))
    optimizer, ema = adamw(second, 1.0), EMA(second)
    second.load_state_dict(found.tensors["model"])
    load_optimizer_tensors(optimizer, second, found.tensors["optimizer"])
    ema.load_state_dict(found.tensors["ema"])
    train(second, optimizer, ema, range(found.step, 10))

    for name, value in straight.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
        assert torch.equal(straight_ema.state_dict()[name], ema.state_dict()[name]), name
    for name, value in optimizer_tensors(straight_optimizer, straight).items():
        assert torch.equal(value, optimizer_tensors(optimizer, second)[name]), name

    wide = nn.Sequential(nn.Linear(4, 8))
    with pytest.raises(UserError, match="fits no parameter"):
        load_optimizer_tensors(adamw(wide, 1), wide, found.tensors["optimizer"])
