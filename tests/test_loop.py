"""The loop that every training shares, on a program of a few lines: what is kept, what comes back, and how it ends."""

from __future__ import annotations

import json
import math
import signal
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from kling.config import to_dict
from kling.errors import UserError
from kling.runtime.accelerator import StopSignal
from kling.runtime.checkpoint import load_latest
from kling.runtime.log import Later
from kling.runtime.saver import Saver
from kling.training import loop
from kling.training.ema import EMA
from kling.training.health import Guard
from kling.training.loop import Loop, run_tensors
from kling.training.meter import Meter
from kling.training.optim import adamw, set_lr


@dataclass
class Settings:
    out: str = ""
    steps: int = 8
    seed: int = 0
    lr: float = 0.1
    warmup: int = 3
    schedule: str = "cosine"
    floor: float = 0.1
    save_every: int = 2
    keep_last: int = 2
    log_every: int = 1
    gradient_accumulation: int = 1
    mixed_precision: str = "fp32"
    trackers: list[str] = field(default_factory=list)
    workers: int = 0
    threads: int | None = 1


class Rows(torch.utils.data.Dataset):
    def __getitem__(self, place: int) -> Tensor:
        return torch.randn(3, 4, generator=torch.Generator().manual_seed(place))

    def names(self, place: int) -> list[str]:
        return [f"row {place}"]


@dataclass
class Told:
    """What a program saw of its loop."""

    places: list[int] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    due: list[int] = field(default_factory=list)


def made(seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Linear(4, 4)
    return model, adamw(model, 0.1)


def program(bad: range = range(0), fault: int = -1, every: int = 3, **settings: object) -> Told:
    """Two models of their own that learn to give back what they get. bad: places whose loss is not finite. fault: a place at which the
    program itself fails."""
    cfg, told = Settings(**settings), Told()
    with Loop(cfg) as loop:
        (model, optimizer), (other, other_optimizer) = made(), made(1)
        model, optimizer, other, other_optimizer = loop.accelerator.prepare(model, optimizer, other, other_optimizer)
        ema, guard, meter = EMA(model, 0.9), Guard(), Meter(torch.device("cpu"), 1.0)
        loop.resume(model, optimizer, ema, other_=(other, other_optimizer))
        for place, x in loop.batches(Rows(), guard, meter):
            told.places.append(place)
            if place == fault:
                raise RuntimeError("of the program")
            with loop.accelerator.accumulate(model, other):
                loss = sum((net(x) - x).square().mean() for net in (model, other)) * (math.nan if place in bad else 1.0)
                loop.accelerator.backward(loss)
            meter.lap("forward")
            meter.add(torch.tensor([0.5]), loss.detach().view(1), tokens_at(place), 1.0)
            if not loop.accelerator.sync_gradients:
                continue
            told.rates.append(loop.lr(cfg.lr))
            for each in (optimizer, other_optimizer):
                set_lr(each, told.rates[-1])
            if guard.sound(float(loss.detach())):
                optimizer.step(), other_optimizer.step()
                ema.update(model, loop.done)
            optimizer.zero_grad(), other_optimizer.zero_grad()
            numbers, speed = meter.sums(loop.accelerator).flatten(), meter.close()
            loop.update(Later(numbers, lambda found, speed=speed: {"loss": found[2], **speed(found[-1])}), clips=3)
            if loop.due(every):
                told.due.append(loop.done)
                loop.log({"eval/loss": 1.0})
        loop.finish(Path(cfg.out) / "export")
    return told


def tokens_at(place: int) -> int:
    """The tokens of a batch."""
    return 10 + place


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(run: Path) -> dict[str, Tensor]:
    saved = load_latest(run)
    assert saved is not None
    return {f"{name}/{key}": rows[key] for name, rows in saved.tensors.items() for key in rows}


def assert_same(a: Path, b: Path) -> None:
    ours, theirs = weights(a), weights(b)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_run_that_is_stopped_is_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after updates 3 and 4, with two micro-steps to an update: places, rates, losses, both models and the average."""
    whole = program(out=str(tmp_path / "whole"), gradient_accumulation=2)
    assert whole.places == list(range(16)) and whole.due == [3, 6, 8]
    seen, parts = iter([False, False, True, True, *[False] * 9]), []
    monkeypatch.setattr(StopSignal, "seen", lambda *_: next(seen))
    for _ in range(2):
        with pytest.raises(SystemExit) as stopped:
            program(out=str(tmp_path / "parts"), gradient_accumulation=2)
        assert stopped.value.code == 143
        parts.append(load_latest(tmp_path / "parts").step)
    rest = program(out=str(tmp_path / "parts"), gradient_accumulation=2)
    assert parts == [3, 4] and rest.places == list(range(8, 16)) and rest.rates == whole.rates[4:]
    assert_same(tmp_path / "whole", tmp_path / "parts")
    told = [[(line["loss"], line["tokens"]) for line in lines(tmp_path / name) if "loss" in line] for name in ("whole", "parts")]
    assert told[0] == told[1] and [tokens for _, tokens in told[0]] == [sum(map(tokens_at, range(2 * i))) for i in range(1, 9)]
    assert {key.split("/")[0] for key in weights(tmp_path / "parts")} == {"model", "optimizer", "ema", "other_model", "other_optimizer"}


def test_what_is_unsound_is_gone_with_its_places(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Five updates in a row: back to update 2, on with place 7, and nothing is due where it goes back. Five again: the clips are named."""
    told = program(bad=range(2, 7), every=7, out=str(tmp_path / "run"))
    assert told.places == list(range(13)) and told.due == [7, 8], "update 7 was the fifth of them at first"
    assert [line["step"] for line in lines(tmp_path / "run") if "loss" in line] == list(range(1, 9))
    assert load_latest(tmp_path / "run").meta["places"] == 13
    told = [line["tokens"] for line in lines(tmp_path / "run") if "tokens" in line]
    assert told[-1] == sum(map(tokens_at, [0, 1, *range(7, 13)])), "of the updates that the weights have had"
    with pytest.raises(UserError, match="bad-batch-00000.json"):
        program(bad=range(2, 99), out=str(tmp_path / "stopped"))
    assert json.loads((tmp_path / "stopped" / "bad-batch-00000.json").read_text()) == [{"place": 11, "clips": ["row 11"]}]


def test_an_error_of_the_program_loses_no_line_and_no_folder(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="of the program"):
        program(fault=5, log_every=100, save_every=100, out=str(tmp_path))
    assert [line["step"] for line in lines(tmp_path) if "loss" in line] == [1, 2, 3, 4, 5]
    assert program(log_every=100, save_every=100, out=str(tmp_path)).places == list(range(8)), "from the start: nothing was saved"


def test_a_checkpoint_from_before_places_and_tokens_were_kept_goes_on(tmp_path: Path) -> None:
    (model, optimizer), (other, other_optimizer) = made(), made(1)
    tensors = run_tensors(model, optimizer, EMA(model)) | run_tensors(other, other_optimizer, prefix="other_")
    saver = Saver(tmp_path)
    saver.save(3, tensors, {"config": to_dict(Settings())})
    saver.wait()
    log = [{"step": step, "tokens/s": 100.0 * step, "time/step": 0.3} for step in range(1, 5)]  # the fourth is not in the checkpoint
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (*log, {"step": 3, "eval/loss": 1.0})))
    assert program(gradient_accumulation=2, out=str(tmp_path)).places == list(range(6, 16))
    assert [line["tokens"] for line in lines(tmp_path) if "tokens" in line][0] == 30 + 60 + 90 + tokens_at(6) + tokens_at(7)


def test_other_settings_and_a_second_run_are_refused(tmp_path: Path) -> None:
    program(out=str(tmp_path), steps=1)
    with pytest.raises(UserError, match="lr 0.1 -> 0.2"):
        program(out=str(tmp_path), lr=0.2)
    told = program(out=str(tmp_path), steps=1, every=0)
    assert told.places == [] and lines(tmp_path)[-1]["step"] == 1


def test_an_error_before_the_first_update_frees_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the last of those that are found on the way in; the signals mean what they did before."""

    def refuse(_: object) -> None:
        raise UserError("9 processes do not divide")

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch, pytest.raises(UserError, match="do not divide"):
        patch.setattr(loop, "lay_out", refuse)
        program(out=str(tmp_path), steps=1)
    assert signal.getsignal(signal.SIGTERM) is before
    assert program(out=str(tmp_path), steps=1).places == [0]
