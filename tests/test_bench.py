"""kling-bench: its rules, on work with known time, error and memory."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from kling_programs.eval import bench as program
from kling_programs.eval.benches import machine, measure
from kling_programs.eval.benches.machine import Seconds
from kling_programs.eval.benches.measure import Bench, Check, poison
from kling_programs.eval.benches.memory import peak, slope

CPU = torch.device("cpu")


def spin(seconds: float) -> None:
    """Use the processor for this long."""
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


TARGET = """
import numpy as np

def take(mib):
    return lambda: None, lambda: np.ones(mib * 2**17)
"""


# ---- ratios ----


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run takes the (wall, processor) seconds that it returns."""
    monkeypatch.setattr(measure, "clock", lambda run, device, repeat=1: Seconds(*run()))


def test_the_clock_distinguishes_processor_time_from_waiting() -> None:
    time.sleep(0.5)  # threads of torch that an earlier test left spinning would count as this process's
    seconds = machine.clock(lambda: (spin(0.02), time.sleep(0.1)), CPU, repeat=2)
    assert seconds.cpu == pytest.approx(0.02, rel=0.1) and seconds.wall >= 0.12


def test_a_ratio_is_the_median_of_the_peers_time_over_ours(told: None) -> None:
    bench = Bench(CPU, ceilings={"matmul fp32": 1e9})
    theirs = iter([0.05, 0.05, 0.04, 0.05, 0.05, 0.9, 0.05, 0.06, 0.05])  # two to warm up, then seven pairs
    row = bench.compare("told", lambda: (1.0, 0.02), lambda: (1.0, next(theirs)), name="slow", flops=1e7, goal=2.0)
    assert row["ratio"] == pytest.approx(2.5) and 2.0 <= row["low"] <= 2.5 <= row["high"] <= 3.0
    assert row["ours ms"] == pytest.approx(20) and row["peer ms"] == pytest.approx(50) and row["wall ratio"] == 1
    assert row["GF/s"] == pytest.approx(0.5) and row["peer GF/s"] == pytest.approx(0.2) and row["% of ceiling"] == pytest.approx(50)
    assert row["verdict"] == "reached" and bench.judge(1.9, 2.0)["verdict"] == "missed"
    assert bench.judge(1.9, 2.0, at_most=True) == {"goal": "<= 2", "verdict": "reached"}


def test_runs_alternate(told: None) -> None:
    order: list[str] = []

    def run(name: str):
        return lambda: (order.append(name), (1.0, 1.0))[1]

    Bench(CPU, quick=True).compare("order", run("a"), run("b"))
    assert "".join(order) == "aabb" + "abbaab", "warmed up first"


def test_processor_time_is_judged_unless_other_processes_do_the_work(told: None) -> None:
    bench, ours, peer = Bench(CPU, quick=True), lambda: (0.03, 0.02), lambda: (0.3, 0.02)
    assert bench.compare("busy", ours, peer)["ratio"] == 1
    assert bench.compare("busy", ours, peer, wall=True)["ratio"] == 10
    assert Bench(CPU, quick=True, threads=2).compare("busy", ours, peer)["ratio"] == 10


def test_a_noisy_machine_is_not_judged(told: None) -> None:
    bench, lengths = Bench(CPU, quick=True), iter([1, 1, 1, 1, 2, 3, 3, 2, 2, 3])  # four to warm up, then a b, b a, a b
    row = bench.same("told", lambda: (1.0, next(lengths)))
    assert row["ratio"] == 1.5 and bench.noisy and "noisy" in row["verdict"]
    assert bench.judge(100.0, 1.0)["verdict"] == "not judged: noisy"


def test_bf16_goals_need_a_processor_with_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "bf16_is_fast", lambda device: False)
    assert "not faster" in Bench(CPU).judge(2.0, 1.0, torch.bfloat16)["verdict"]
    monkeypatch.setattr(measure, "bf16_is_fast", lambda device: True)
    assert Bench(CPU).judge(2.0, 1.0, torch.bfloat16)["verdict"] == "reached"


# ---- gates ----


def test_a_wrong_result_is_not_timed() -> None:
    exact = torch.randn(1000, dtype=torch.float64)
    rounded = exact.float()
    assert "wrong" not in Check(rounded, rounded, exact).row
    assert "wrong" not in Check(rounded * (1 + 9e-6), rounded, exact).row, "1e-5 is always allowed in fp32"
    assert "wrong" not in Check(rounded * 1.0025, rounded * 1.001, exact).row, "three times the peer's error"
    assert "wrong" in Check(rounded * 1.0035, rounded * 1.001, exact).row
    row = Bench(CPU).compare("wrong", lambda: pytest.fail("was run"), lambda: None, check=Check(rounded * 1.01, rounded, exact))
    assert "wrong" in row and "ours ms" not in row
    assert "wrong" in Check(torch.full_like(rounded, torch.nan), rounded, exact).row


def test_an_unwritten_result_contains_poison() -> None:
    like = torch.zeros(1000)  # small enough that the allocator soon returns the same memory
    poison(like)
    assert torch.stack([torch.empty_like(like) for _ in range(256)]).isnan().any()


# ---- memory ----


def test_memory_is_measured_in_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "memory_target.py").write_text(TARGET)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert peak("memory_target:take", {"mib": 100}) == pytest.approx(100, abs=5)
    with pytest.raises(RuntimeError, match="no_such"):
        peak("memory_target:no_such", {})


def test_slope_is_least_squares() -> None:
    x, y = np.arange(5.0), np.array([1.0, 3.1, 4.9, 7.2, 8.8])
    assert slope(x.tolist(), y.tolist()) == pytest.approx(np.polyfit(x, y, 1)[0])


# ---- the machine and the program ----


def test_what_is_recorded() -> None:
    found = machine.describe(CPU, None, 5)
    assert found["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0] and found["seed"] == 5
    assert set(found["flags"]) <= set(machine.FLAGS) and found["commit"] != ""


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["vea"], "suite 'vea'.*did you mean 'vae'"),
        (["dit", "--threads", "0"], "--threads 0"),
        (["dit", "--core", "4096"], "--core 4096: this process may use"),
        (["dit", "--device", "cuda:99"], "cannot be used"),
        (["dit", "--device", "meta"], "cannot be used"),
        (["dit", "--threads", "1000000"], "--threads 1000000: give at most"),
        (["dit", "--core", "-1"], "--core -1"),
        (["dit", "--core", "0", "--threads", "2"], "--core 0 is for a single thread"),
        (["dit", "--seed", "99999999999999999999999999"], "--seed"),
        (["dit", "--json", "x.png"], "end the name in .json"),
        (["dit", "--json", "/dev/null/x.json"], "is a file, where a folder is needed"),
    ],
)
def test_mistakes_are_one_line(argv: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        program.main(argv)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1
    assert __import__("re").search(message, err), err


def test_a_suite_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def rows(bench: Bench):
        for n in (1, 2):
            row = bench.compare("spin", lambda: spin(0.001), lambda: spin(0.002), name="slow", check=Check(*torch.ones(3, 4)))
            yield row | {"axis": "tokens", "size": n, "line": "spin"}
        yield {"case": "bad"} | Check(torch.ones(2), torch.zeros(2), torch.zeros(2)).row

    monkeypatch.setattr(program, "rows_of", lambda suite, bench: rows(bench))
    monkeypatch.setattr(machine, "ceilings", lambda device, quick: {"matmul fp32": 1e9})
    with pytest.raises(SystemExit) as stop:
        program.main(["dit", "--quick", "--json", str(tmp_path / "b.json")])
    assert stop.value.code == 3, "a wrong result"
    report = json.loads((tmp_path / "b.json").read_text())
    assert [row["suite"] for row in report["rows"]] == ["dit"] * 3 and report["machine"]["versions"]["torch"]
    assert (tmp_path / "b.png").read_bytes()[:4] == b"\x89PNG"
    said = capsys.readouterr()
    assert "ratio" in said.out and said.err.startswith("precision ") and " GFLOP/s)" in said.err.splitlines()[0]
