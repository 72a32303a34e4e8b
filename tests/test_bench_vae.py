"""kling-bench vae and vae-mem: both sides do the same work, and wrong results are not timed."""

from __future__ import annotations

import math

import pytest
import torch
from kling_programs.eval.benches import vae, vae_mem
from kling_programs.eval.benches.measure import Bench
from torch.utils.flop_counter import FlopCounterMode

TINY = vae.Case(4, torch.float32, {"decode": 1e-3, "encode": 1e6}, 16, 16, (5,))


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setattr(vae, "cases", lambda bench: [TINY])
    monkeypatch.setattr(Bench, "pairs", 1)
    monkeypatch.setattr("kling_programs.eval.benches.measure.QUIET", (0.0, math.inf))
    return Bench(torch.device("cpu"), quick=True, ceilings={"matmul fp32": 1e12})


def test_halves_are_checked_and_timed(bench: Bench) -> None:
    itself, encode, decode = vae.rows(bench)
    assert itself["peer"] == "itself" and "encode" in encode["case"] and "decode" in decode["case"]
    assert max(encode["error"], decode["error"]) < 1e-5 and min(encode["ratio"], decode["ratio"]) > 0
    assert (encode["verdict"], decode["verdict"]) == ("missed", "reached")


def test_wrong_weights_are_not_timed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = vae.Pair(TINY, bench)
    with torch.no_grad():
        pair.ours.decoder.conv_out.bias += 0.01
    monkeypatch.setattr(vae, "Pair", lambda case, bench: pair)
    _, encode, decode = vae.rows(bench)
    assert "ratio" in encode and "wrong" in decode and "ratio" not in decode


def test_flops_equal_those_of_a_real_pass() -> None:
    peer = vae.AutoencoderKLWan(**vae.config(4))
    with FlopCounterMode(display=False) as counter:
        vae.result(peer, "decode", torch.zeros(vae.shape("decode", 5, 16, 16)))
    assert vae.flops(4, "decode", 5, 16, 16) == pytest.approx(counter.get_total_flops(), rel=1e-3)  # CPU kernels hide attention's


def test_memory_is_judged_by_slope_and_peak(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vae_mem, "peak", lambda target, how, *_: 9 + 0.01 * how["frames"] if how["which"] == "ours" else how["frames"])
    rows = {row["case"]: row for row in vae_mem.rows(bench)}
    assert rows["decode MiB a frame"]["ours"] == pytest.approx(0.01) and rows["decode MiB a frame"]["peer's"] == pytest.approx(1)
    assert rows["decode 65 frames"]["verdict"] == rows["decode MiB a frame"]["verdict"] == "reached"


@pytest.mark.parametrize("which", ["ours", "diffusers"])
@pytest.mark.parametrize("half", vae.HALVES)
def test_memory_work_runs(half: str, which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vae_mem, "SIDE", 16)
    for run in getattr(vae_mem, half)(which, 13, "cpu"):
        run()
