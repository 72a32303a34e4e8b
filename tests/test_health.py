"""Updates that are not finite, hangs, clocks, and evaluation that must not change the training."""

from __future__ import annotations

import json
import math
import random
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import workers
from torch import Tensor

from kling import KlingPipeline
from kling.cache.batches import RankBatches
from kling.condition.tasks import TASKS
from kling.config import load_config
from kling.data.image import read_image
from kling.data.source import DataConfig
from kling.errors import UserError
from kling.flow.levels import draw_sigma
from kling.runtime.accelerator import StopSignal
from kling.runtime.checkpoint import load_latest
from kling.runtime.watchdog import Watchdog
from kling.training.ema import EMA
from kling.training.health import DeviceGuard, Guard
from kling.training.meter import StepClock, matmul_ceiling
from kling.training.optim import make_optimizer, optimizer_tensors
from kling.training.validation import Validation, held_out, level_quantiles, task_requests

train_dit = workers.train_dit


def test_the_guard_counts_rolls_back_once_and_stops(tmp_path: Path) -> None:
    guard = Guard(limit=3)
    assert guard.sound(1.0, 2.0) and not guard.sound(1.0, math.nan) and not guard.sound(math.inf)
    assert guard.sound(0.5) and (guard.skipped, guard.row) == (2, 0)
    batch = [{"place": 7, "clips": [3, 1]}]
    assert [guard.sound(math.nan) or guard.rollback(batch, tmp_path) for _ in range(3)] == [False, False, True]
    assert not any(guard.sound(math.nan) or guard.rollback(batch, tmp_path) for _ in range(2))
    guard.sound(math.nan)
    with pytest.raises(UserError, match="3 updates in a row .*bad-batch-00000.json"):
        guard.rollback(batch, tmp_path, rank=0)
    assert json.loads((tmp_path / "bad-batch-00000.json").read_text()) == batch


def test_the_device_guard_skips_updates_without_waiting_and_the_host_rolls_back_later(tmp_path: Path) -> None:
    guard, numbers = DeviceGuard(torch.device("cpu"), limit=3), torch.tensor([1.0, 2.0])
    bad = numbers.clone()
    bad[1] = math.nan
    assert [float(guard.judge(values.sum(), values[0])) for values in (numbers, bad, bad, numbers, bad, bad, bad, bad)] == [
        0,
        1,
        1,
        0,
        1,
        1,
        1,
        1,
    ]
    assert guard.row == 0 and not guard.rollback([], tmp_path), "it has not looked"
    guard.look(*guard.counts.tolist())
    assert (guard.row, guard.skipped) == (4, 6) and guard.rollback([], tmp_path)
    guard.judge(numbers.sum())
    guard.look(*guard.counts.tolist())
    assert (guard.row, guard.skipped) == (0, 6)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_skipped_update_on_the_device_changes_no_bit(name: str) -> None:
    def after(*updates: float | None) -> dict[str, Tensor]:
        """The state after updates that are judged (0, or 1: its gradients are not finite) or not (None)."""
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Embedding(4, 16), torch.nn.Linear(16, 24), torch.nn.LayerNorm(24))
        optimizer, average = make_optimizer(name, model, 1e-2, weight_decay=0.1), EMA(model, 0.9)
        for step, left_out in enumerate(updates):
            model(torch.arange(4)).square().mul(torch.arange(24)).sum().backward()
            for p in model.parameters():
                p.grad[0] *= math.nan if left_out else 1.0
            optimizer.found_inf = None if left_out is None else torch.tensor(left_out)
            optimizer.step()
            average.update(model, step, optimizer.found_inf)
            optimizer.zero_grad()
        state = {**dict(model.named_parameters()), **optimizer_tensors(optimizer, model)}
        return {key: t.detach() for key, t in state.items()} | {f"average/{key}": t for key, t in average.average.items()}

    once, left_out, twice = after(0.0), after(0.0, 1.0), after(0.0, 0.0)
    assert once.keys() == left_out.keys() and all(torch.equal(once[key], left_out[key]) for key in once)
    assert not any(torch.equal(once[key], twice[key]) for key in once)
    plain = after(None, None)
    assert all(torch.equal(plain[key], twice[key]) for key in plain if not key.startswith("average")), "nor does one that is only judged"
    torch.testing.assert_close(plain, twice)


def test_a_hang_report_shows_the_stack(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def here_it_hangs() -> None:
        time.sleep(0.5)

    with Watchdog(tmp_path, rank=3, seconds=0.2):
        here_it_hangs()
    assert "here_it_hangs" in (tmp_path / "hang-00003.txt").read_text() and "hang-00003" in capsys.readouterr().err
    with Watchdog(tmp_path, rank=4, seconds=60) as watchdog:
        watchdog.beat()
    assert not (tmp_path / "hang-00004.txt").exists(), "a sound run leaves nothing"


def test_the_clock_accounts_for_all_time() -> None:
    clock, began = StepClock(torch.device("cpu")), time.perf_counter()
    for _ in range(2):
        time.sleep(0.02)
        clock.lap("data")
        time.sleep(0.01)
        clock.lap("forward")
    found = clock.take()
    assert found["time/data"] >= 0.04 and found["time/forward"] >= 0.02
    assert (
        found["time/step"] == pytest.approx(found["time/data"] + found["time/forward"])
        and found["time/step"] <= time.perf_counter() - began
    )
    assert clock.take() == {"time/step": 0}


def test_the_ceiling_is_a_speed() -> None:
    assert 1e8 < matmul_ceiling(torch.device("cpu"), torch.float32, seconds=0.01) < 1e14


@pytest.mark.parametrize("density", ["logit_normal", "uniform"])
def test_validation_levels_are_quantiles_of_the_training_density(density: str) -> None:
    drawn = draw_sigma((20000,), torch.Generator().manual_seed(0), density, shift=3.0)
    levels = level_quantiles(4, density, 3.0)
    torch.testing.assert_close(levels, torch.quantile(drawn, torch.tensor([0.125, 0.375, 0.625, 0.875])), atol=0.02, rtol=0)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return workers.debug_words(tmp_path_factory.mktemp("parts"), "batch=1", "save_every=2")


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(run: Path) -> dict[str, Tensor]:
    saved = load_latest(run)
    assert saved is not None
    return {f"{name}/{key}": rows[key] for name, rows in saved.tensors.items() for key in rows}


def test_validation_and_samples_leave_training_bit_equal(words: list[str], tmp_path: Path) -> None:
    watched = ["validation.every=1", "validation.clips=2", "validation.quantiles=2", "sample_every=2",
               "samples=[{prompt: a ball, num_frames: 5, num_inference_steps: 1}]"]  # fmt: skip
    state = torch.get_rng_state()
    train_dit.main([*words, "steps=4", f"out={tmp_path / 'plain'}"])
    plain = torch.get_rng_state()
    torch.set_rng_state(state)
    train_dit.main([*words, "steps=4", *watched, f"out={tmp_path / 'watched'}"])
    assert torch.equal(plain, torch.get_rng_state())
    a, b = weights(tmp_path / "plain"), weights(tmp_path / "watched")
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    losses = [line for line in metrics(tmp_path / "watched") if "validation/loss" in line]
    assert [line["step"] for line in losses] == [1, 2, 3, 4] and len([key for key in losses[0] if key.startswith("validation/sigma")]) == 2
    *_, line = lines = metrics(tmp_path / "plain")
    assert line["tokens"] == round(sum(line["tokens/s"] * line["time/step"] for line in lines)) > 0
    assert {"time/data", "time/forward", "time/backward", "time/optimizer", "tokens/s", "mfu", "memory/peak_gib", "skipped"} <= line.keys()


def test_a_run_in_parts_equals_the_whole_run(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two resumes in one epoch, 0, 1 and 2 workers, unrelated random draws in every step: the same clips, noise, weights and rates."""
    for name in ("Loop", "flow_loss"):
        monkeypatch.setattr(train_dit, name, getattr(train_dit, name))
    workers.record(0)
    words = [*words, "warmup=2", "lr=0.01", "floor=0.1"]
    monkeypatch.setenv("SEEN", str(tmp_path / "straight"))
    train_dit.main([*words, "steps=6", f"out={tmp_path / 'whole'}"])

    real = train_dit.flow_loss
    train_dit.flow_loss = lambda *args: (torch.rand(3), random.random(), np.random.rand(), real(*args))[-1]
    monkeypatch.setenv("SEEN", str(tmp_path / "parts"))
    for stop, count in ((2, 1), (4, 2), (6, 0)):
        saved = load_latest(tmp_path / "run")
        assert saved is None or saved.step == stop - 2
        monkeypatch.setattr(StopSignal, "seen", lambda *_, at=stop: at < 6 and len(metrics(tmp_path / "run")) >= at)
        try:
            train_dit.main([*words, "steps=6", f"workers={count}", f"out={tmp_path / 'run'}"])
        except SystemExit as end:
            assert end.code == 143 and stop < 6
    assert workers.recorded(tmp_path / "straight") == workers.recorded(tmp_path / "parts")
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "run")
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    closed = [0.005, 0.01, *(0.01 * (0.1 + 0.9 * (1 + math.cos(math.pi * (s - 2) / 4)) / 2) for s in range(2, 6))]
    assert [line["lr"] for line in metrics(tmp_path / "run")] == pytest.approx(closed, rel=1e-12)


def test_a_sample_of_every_task(words: list[str], tmp_path: Path) -> None:
    """A request made for a task is recognised as that task, and a video is drawn for each."""
    clip = held_out(Validation(clips=1), DataConfig(), 17)[0]
    pipe = KlingPipeline.from_pretrained()
    assert {name: pipe.plan(request).task for name, request in zip(TASKS, task_requests(clip, TASKS), strict=True)} == {n: n for n in TASKS}
    assert all(pipe.plan(request).frames == 17 for request in task_requests(clip, TASKS))
    words = [*words, "scheduler.num_inference_steps=1", "sample_tasks=true", "samples=[{prompt: a ball, num_frames: 5, aspect: '1:1'}]"]
    train_dit.main([*words, "sample_every=1", "steps=1", f"out={tmp_path}"])
    shown = sum(weight > 0 for weight in load_config(train_dit.TrainDiTConfig, words[0]).tasks.values())
    assert shown == 8 and read_image(tmp_path / "samples" / "00000001.png").shape == (80 + 8 * 64, 6 * 112, 3)


def poison(monkeypatch: pytest.MonkeyPatch, when) -> None:
    """Make losses not finite in the calls that `when` selects (1-based)."""
    real, calls = train_dit.flow_loss, iter(range(1, 10**6))
    monkeypatch.setattr(train_dit, "flow_loss", lambda *args: real(*args) * (math.nan if when(next(calls)) else 1.0))


def test_a_step_that_is_not_finite_changes_nothing(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, lambda call: call == 3)
    train_dit.main([*words, "steps=2", f"out={tmp_path}"])
    before = weights(tmp_path)
    train_dit.main([*words, "steps=3", f"out={tmp_path}"])
    after = weights(tmp_path)
    assert all(torch.equal(before[key], after[key]) for key in before), "weights, average and optimizer stand still"
    assert [line["skipped"] for line in metrics(tmp_path)] == [0, 0, 1] and metrics(tmp_path)[-1]["loss"] is None


def test_five_bad_updates_in_a_row_roll_back_once(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, lambda call: 3 <= call <= 7)  # after the save of step 2, five updates are lost
    train_dit.main([*words, "steps=8", "save_every=2", f"out={tmp_path}"])
    assert [line["step"] for line in metrics(tmp_path)] == list(range(1, 9))
    assert all(torch.isfinite(t).all() for t in weights(tmp_path).values()), "it was a passing fault: nothing is left of it"
    assert load_latest(tmp_path).meta["places"] == 8 + 5, "the clips that were met then are not met again"


def test_five_bad_updates_are_noticed_when_the_log_is_read(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, lambda call: 3 <= call <= 9)
    train_dit.main([*words, "steps=12", "save_every=2", "log_every=4", f"out={tmp_path}"])
    assert [line["step"] for line in metrics(tmp_path)] == list(range(1, 13))
    assert load_latest(tmp_path).meta["places"] > 12 and all(torch.isfinite(t).all() for t in weights(tmp_path).values())


def test_a_rollback_rewinds_the_weights_and_keeps_the_place(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clips at places 2 to 6 give NaN whenever they are drawn. The run continues after them, like one that never drew them."""
    bad, met = range(2, 7), []
    monkeypatch.setattr(train_dit, "Loop", train_dit.Loop)
    workers.watch(lambda data, place, noise: met.append(place))
    loss = train_dit.flow_loss
    monkeypatch.setattr(train_dit, "flow_loss", lambda *args: loss(*args) * (math.nan if met[-1] in bad else 1.0))
    train_dit.main([*words, "steps=8", "log_every=1", f"out={tmp_path / 'back'}"])
    assert met == list(range(13)), "five places are lost and none is met twice"
    assert [line["step"] for line in metrics(tmp_path / "back")] == list(range(1, 9))

    place = RankBatches.place
    monkeypatch.setattr(RankBatches, "place", lambda feed, k: (n := place(feed, k)) + (5 if n >= 2 else 0))
    train_dit.main([*words, "steps=8", f"out={tmp_path / 'without'}"])
    a, b = weights(tmp_path / "without"), weights(tmp_path / "back")
    assert all(torch.equal(a[key], b[key]) for key in a), "nothing is left of them"


def test_five_more_bad_updates_stop_the_run_and_name_the_clips(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    poison(monkeypatch, lambda call: call > 2)
    with pytest.raises(SystemExit) as stopped:
        train_dit.main([*words, "steps=20", "save_every=2", f"out={tmp_path}"])
    assert stopped.value.code == 2 and "5 updates in a row were not finite" in capsys.readouterr().err
    (bad,) = json.loads((tmp_path / "bad-batch-00000.json").read_text())
    assert bad["place"] >= 2 and [name.split("/")[0] for name in bad["clips"]] == ["world"]
    assert all(torch.isfinite(t).all() for t in weights(tmp_path).values())
