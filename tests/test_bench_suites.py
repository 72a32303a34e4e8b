"""The suites of kling-bench at a small size: both sides do the same work, and wrong results are not timed."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pretend
import pytest
import torch
from kling_programs.eval.benches import dit, sampler, serve, train, video
from kling_programs.eval.benches.measure import Bench
from kling_programs.eval.benches.plot import plot

from kling import Request

CPU = torch.device("cpu")
TINY = dit.Size("tiny", 2, 16, 2, 48)


@pytest.fixture
def bench() -> Bench:
    return Bench(CPU, quick=True, ceilings={"matmul fp32": 1e12})


def test_both_transformers_compute_the_same(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dit, "plans", lambda bench: [dit.SizePlan(TINY, torch.float32, (256,), (256,))])
    monkeypatch.setattr(dit, "peak", lambda target, arguments, device: 2.0 * arguments["tokens"])
    rows = list(dit.rows(bench))
    timed = [row for row in rows if "ours ms" in row]
    assert [row["case"].split()[1] for row in timed] == ["forward", "forward"] and not any("wrong" in row for row in rows)
    assert all(row["error"] < 1e-5 and row["GF/s"] > 0 and row["line"] for row in timed)
    assert rows[-1]["ours MiB a 1000 tokens"] == pytest.approx(2000)


def test_a_transformer_with_other_weights_is_wrong(bench: Bench) -> None:
    pair = dit.Pair(TINY, torch.float32, CPU, seed=0)
    with torch.no_grad():
        pair.ours.proj_out.weight.mul_(1.001)
    assert all("wrong" in check.row for check in pair.check(256))


def test_bf16_keeps_what_models_keep_in_fp32() -> None:
    pair = dit.Pair(TINY, torch.bfloat16, CPU, seed=0)
    for model in (pair.ours, pair.peer):
        dtypes = {name: p.dtype for name, p in model.named_parameters()}
        assert dtypes["blocks.0.attn1.to_q.weight"] == torch.bfloat16 and dtypes["scale_shift_table"] == torch.float32
    assert not any("wrong" in check.row for check in pair.check(256))


@pytest.mark.parametrize("solver", ["euler", "unipc"])
def test_both_sampling_loops_compute_the_same(solver: str, bench: Bench) -> None:
    *_, row = sampler.overhead(bench, "tiny", (2, 3, 4, 4), solver)
    assert row["error"] < 1e-6 and row["peer error"] < 1e-6 and row["ours ms a step"] > 0


def test_step_caches_are_compared_with_a_full_run_on_the_same_device(monkeypatch: pytest.MonkeyPatch) -> None:
    placed, frames = [], np.zeros((1, 5, 16, 16, 3), np.uint8)

    class Pipe:
        def to(self, device: torch.device) -> Pipe:
            placed.append(device)
            return self

        def setting(self, name: str) -> int:
            return 20

        def __call__(self, request: Request) -> SimpleNamespace:
            return SimpleNamespace(frames=frames)

    monkeypatch.setattr(sampler.KlingPipeline, "from_pretrained", Pipe)
    monkeypatch.setattr(sampler, "set_up", lambda pipe, machine, device, steps: pipe.to(device))
    bench = Bench(torch.device("cuda"), quick=True)
    bench.compare = lambda *_, **__: {}
    rows = list(sampler.caches(bench))
    assert rows and placed == [bench.device] * (1 + len(rows))


def test_checkpointing_is_measured_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(train, "MODEL", {"num_attention_heads": 1, "attention_head_dim": 16, "num_layers": 1, "ffn_dim": 32})
    monkeypatch.setattr(train, "peak", lambda target, arguments, device="cpu": asked.append((arguments["device"], device)) or 2.0)
    monkeypatch.setattr(train, "checkpointed", lambda what, tokens, device: asked.append(device) or [lambda: None] * 2)
    with pretend.device(monkeypatch):
        list(train.checkpointing(Bench(pretend.CUDA, quick=True)))
    assert asked == ["cuda"] * 3 + [("cuda", "cuda")] * 3


def test_a_step_of_its_own_process_runs_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "MODEL", {"num_attention_heads": 1, "attention_head_dim": 16, "num_layers": 1, "ffn_dim": 32})
    with pretend.device(monkeypatch):
        warm_up, _ = train.checkpointed("none", 256, "cuda:0")
        warm_up()  # raises if a tensor stayed on the CPU


def test_clips_of_all_readers_are_the_same_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "SECONDS", 4)
    video.make_video(tmp_path / "a.mp4", 180, 12)
    ours, plain = video.reading(tmp_path / "a.mp4", "pyav", 2)(), video.plain_reading(tmp_path / "a.mp4", 2)()
    assert "wrong" not in video.same_frames("a", "plain", ours, plain)
    late = [clip.roll(1, dims=1) for clip in plain]
    assert "wrong" in video.same_frames("a", "late", ours, late)


@pytest.mark.slow
@pytest.mark.timeout(1500)  # two models are loaded, which takes minutes on a crowded core
def test_a_server_is_measured_by_what_it_made(bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("fastapi")
    monkeypatch.setattr(serve, "WORKERS", (1,))
    monkeypatch.setattr(serve, "TASK", {"prompt": "a red ball", "num_frames": 5, "num_inference_steps": 1})
    began = time.monotonic()
    (row,) = serve.rows(bench)
    assert row["case"] == "1 worker, 4 tasks of 5 frames" and "wrong" not in row
    assert 60 * 4 / (time.monotonic() - began) < row["ours tasks/min"] and 0 < row["busy %"] <= 100 and row["cpu s"] > 0
    assert plot([row, row | {"size": 2}], tmp_path / "plot.png") and (tmp_path / "plot.png").stat().st_size > 10_000
