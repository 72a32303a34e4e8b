from __future__ import annotations

import copy
import io
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from importlib import metadata
from pathlib import Path

import pytest
import torch
from torch import nn

import kling
from kling import KlingPipeline
from kling.errors import UserError
from kling.runtime import precision
from kling.runtime.accelerator import EXIT_STOPPED, StopSignal, make_accelerator
from kling.runtime.checkpoint import load, save
from kling.runtime.log import RunLog, duration, read_metrics
from kling.runtime.precision import describe, pick_precision
from kling.runtime.random import derive_seed, generator, noise_like, permutation
from kling.runtime.versions import versions
from kling.training.ema import EMA
from kling.training.meter import Meter
from kling.training.muon import orthogonal
from kling.training.optim import adamw, load_optimizer_tensors, lr_at, make_optimizer, muon, optimizer_tensors, set_lr


def small_model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 1))


# ---------------------------------------------------------------------------------------------------------------- random


def test_a_draw_depends_only_on_its_name() -> None:
    x = torch.zeros(3, 2, 5)
    torch.manual_seed(1)
    together = noise_like(x, 7, "noise", 12, [4, 9, 2])
    torch.manual_seed(2)
    state = torch.get_rng_state()
    alone = torch.cat([noise_like(x[:1], 7, "noise", 12, [i]) for i in (2, 9, 4)]).flip(0)
    assert torch.equal(together, alone), "batch order, batch size and the global generator change nothing"
    assert torch.equal(state, torch.get_rng_state()), "the global generator is not moved"

    others = [noise_like(x, 8, "noise", 12, [4, 9, 2]), noise_like(x, 7, "mask", 12, [4, 9, 2]), noise_like(x, 7, "noise", 13, [4, 9, 2])]
    assert not any(torch.equal(together, other) for other in others)
    assert noise_like(x.double(), 7, "noise", 12, [4, 9, 2]).dtype == torch.float64


def test_seeds_are_stable_and_spread() -> None:
    # Fixed values: if these numbers changed, every seed of every run would have another meaning.
    assert derive_seed(0, "noise", 1, 2) == 354556048
    assert derive_seed(1, "ab", "c") != derive_seed(1, "a", "bc")
    assert len({derive_seed(0, "x", i) for i in range(2000)}) == 2000
    draws = torch.cat([noise_like(torch.zeros(1, 64), 0, "n", s, [0]) for s in range(500)])
    assert abs(draws.mean()) < 0.02 and abs(draws.std() - 1) < 0.02
    correlation = torch.corrcoef(draws.T).fill_diagonal_(0)
    assert correlation.abs().max() < 0.25, "neighbouring steps are independent"


def test_permutation() -> None:
    assert sorted(permutation(50, 0, "epoch", 1)) == list(range(50))
    assert permutation(50, 0, "epoch", 1) == permutation(50, 0, "epoch", 1) != permutation(50, 0, "epoch", 2)
    assert generator(3, "a").initial_seed() == derive_seed(3, "a")


# ------------------------------------------------------------------------------------------------------------ optim, ema


def test_learning_rate_closed_form() -> None:
    rate = {s: lr_at(s, lr=1.0, warmup=10, steps=110, schedule="cosine", floor=0.1) for s in (0, 9, 10, 60, 110, 500)}
    assert rate == pytest.approx({0: 0.1, 9: 1.0, 10: 1.0, 60: 0.55, 110: 0.1, 500: 0.1})
    assert lr_at(10**9, lr=0.5, warmup=10) == 0.5
    assert lr_at(0, lr=0.5) == 0.5
    with pytest.raises(UserError, match="did you mean 'cosine'"):
        lr_at(0, lr=1, schedule="cosin")
    with pytest.raises(UserError, match="steps"):
        lr_at(1, lr=1, schedule="cosine")


def test_vectors_do_not_decay() -> None:
    model = small_model()
    model[0].bias.requires_grad_(False)
    optimizer = adamw(model, lr=0.1, weight_decay=0.5)
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert {n: decay.get(id(p)) for n, p in model.named_parameters()} == {
        "0.weight": 0.5,
        "0.bias": None,
        "1.weight": 0.0,
        "1.bias": 0.0,
        "2.weight": 0.5,
        "2.bias": 0.0,
    }
    set_lr(optimizer, 0.25)
    assert {g["lr"] for g in optimizer.param_groups} == {0.25}
    with pytest.raises(UserError, match="nothing to train"):
        adamw(model.requires_grad_(False), lr=1)


KEPT = (  # what multiplies no input, of everything that the shipped configurations train
    r"bias|gamma|.*scale_shift_table|kind_embedding\.weight|byte_embedding\.weight|position_embedding\.weight"
    r"|norm[^.]*\.weight|norm_[a-z_]+\.weight|.*_norm\.weight"
)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_only_what_multiplies_inputs_decays(name: str) -> None:
    """Every parameter of the shipped transformer, text encoder and VAE: a step without a gradient shrinks the matrices and kernels of
    layers and leaves embeddings, tables, gains and biases as they are, bit for bit."""
    pipe, decayed = KlingPipeline.from_pretrained(), set()
    for model in (pipe.transformer, pipe.text_encoder, pipe.vae):
        optimizer = make_optimizer(name, model, 0.1, weight_decay=0.5)
        for p in model.parameters():
            p.data = torch.ones_like(p, dtype=torch.float32)
            p.grad = torch.zeros_like(p)
        optimizer.step()
        for key, p in model.named_parameters():
            kept = re.search(rf"(^|\.)({KEPT})$", key)
            torch.testing.assert_close(p, torch.full_like(p, 1.0 if kept else 0.95), rtol=0, atol=0 if kept else 1e-6, msg=key)
            decayed |= set() if kept else {key.split(".")[-2]}
    assert {"to_q", "proj_out", "patch_embedding", "time_proj", "conv_in", "merge", "conv"} <= decayed


def test_a_run_that_decayed_tables_goes_on_without(tmp_path: Path) -> None:
    """AdamW once decayed everything but vectors: such a run's state fits, and its moments are taken over."""
    torch.manual_seed(0)
    old = nn.ModuleDict({"words": nn.Embedding(5, 8), "layer": nn.Linear(8, 4)})
    matrices, vectors = ([p for p in old.parameters() if (p.ndim > 1) == many] for many in (True, False))
    before = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}], lr=1e-2)
    old["layer"](old["words"](torch.arange(5))).square().sum().backward()
    before.step()
    save(tmp_path, 1, {"optimizer": optimizer_tensors(before, old)})
    state = load(tmp_path / "step-00000001").tensors["optimizer"]
    after = adamw(old, 1e-2, weight_decay=0.1)
    load_optimizer_tensors(after, old, state)
    assert optimizer_tensors(after, old).keys() == optimizer_tensors(before, old).keys()
    assert all(torch.equal(value, optimizer_tensors(before, old)[key]) for key, value in optimizer_tensors(after, old).items())
    assert {id(p): g["weight_decay"] for g in after.param_groups for p in g["params"]}[id(old["words"].weight)] == 0


@pytest.mark.parametrize("fast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (16, 8, 3, 3, 3)])
def test_muon_steps_along_the_nearest_orthogonal_matrix(shape: tuple[int, ...], fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step against singular vectors from LAPACK: same directions, all singular values about one, and AdamW's size."""
    monkeypatch.setattr("kling.training.muon.bf16_is_fast", lambda device: fast)
    p = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    before, grad = p.detach().clone(), torch.randn(shape, generator=torch.Generator().manual_seed(1))
    grad[: len(grad) // 2] *= 0.2  # weak directions
    model = nn.Module()
    model.weight, p.grad = p, grad
    muon(model, lr=0.1, weight_decay=0.5).step()
    u, _, vh = torch.linalg.svd(grad.flatten(1), full_matrices=False)
    along = u.T @ ((1 - 0.1 * 0.5) * before - p.detach()).flatten(1) @ vh.T  # u diag(along) vh is the step
    along = along / (0.1 * 0.2 * max(grad.flatten(1).shape) ** 0.5)
    values = along.diagonal()
    assert (along - values.diag()).abs().max() < (0.05 if fast else 1e-3) and values.min() > 0.7 and values.max() < 1.3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_four_rounds_equalise_singular_values_over_two_and_a_half_decades(dtype: torch.dtype) -> None:
    """A matrix with singular vectors from a QR decomposition and values from 1e-8 to 1: those over 0.003 of its norm end near 1, none
    beyond, and the vectors stay."""
    draw = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(96, 96, dtype=torch.float64, generator=draw))[0] for _ in range(2))
    values = torch.logspace(-8, 0, 96, dtype=torch.float64)
    turned = u.T @ orthogonal((u * values @ v.T)[None].to(dtype))[0].double() @ v
    ends = turned.diagonal()
    assert (turned - ends.diag()).abs().max() < (0.1 if dtype == torch.bfloat16 else 1e-4)
    assert ends[values >= 0.003 * values.norm()].min() > 0.7 and ends.max() < 1.3


def test_muon_treats_matrices_of_one_shape_together_as_alone() -> None:
    """Three matrices of one shape in one optimizer step give the same as each in its own, and momentum tensors are not reallocated."""

    def stepped(grads: list[torch.Tensor]) -> list[torch.Tensor]:
        model = nn.ModuleList(nn.Linear(24, 16, bias=False) for _ in grads)
        weights = [nn.init.zeros_(layer.weight) for layer in model]
        optimizer = muon(model, lr=0.1)
        for _ in range(2):
            for p, grad in zip(weights, grads, strict=True):
                p.grad = grad.clone()
            optimizer.step()
            kept = [optimizer.state[p]["momentum"].data_ptr() for p in weights]
        assert kept == [optimizer.state[p]["momentum"].data_ptr() for p in weights]
        return [p.detach() for p in weights]

    grads = [torch.randn(16, 24, generator=torch.Generator().manual_seed(k)) for k in range(3)]
    for together, grad in zip(stepped(grads), grads, strict=True):
        torch.testing.assert_close(together, stepped([grad])[0], atol=2e-3, rtol=0)


def test_muon_is_adamw_where_there_is_no_matrix(tmp_path: Path) -> None:
    """Vectors, narrow matrices and embeddings step as torch's own AdamW; its momentum is saved and comes back."""

    def made() -> nn.Module:
        torch.manual_seed(0)
        return nn.ModuleDict({"words": nn.Embedding(30, 8), "wide": nn.Linear(8, 16), "narrow": nn.Linear(16, 2)})

    def grads(model: nn.Module, step: int) -> None:
        for k, p in enumerate(model.parameters()):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * step + k))

    ours, theirs, again = made(), made(), made()
    optimizer, plain = (
        muon(ours, lr=1e-2, weight_decay=0.1),
        torch.optim.AdamW(theirs.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    )
    for step in range(3):
        grads(ours, step), grads(theirs, step)
        optimizer.step(), plain.step()
        if step == 1:
            again.load_state_dict(ours.state_dict())
            second = muon(again, lr=1e-2, weight_decay=0.1)
            save(tmp_path, 2, {"optimizer": optimizer_tensors(optimizer, ours)})
            state = load(tmp_path / "step-00000002").tensors["optimizer"]
            load_optimizer_tensors(second, again, state)
    assert {key.rpartition("/")[2] for key in state if key.startswith("wide.weight")} == {"momentum"}
    for name, p in ours.named_parameters():
        assert torch.equal(p, theirs.get_parameter(name)) == (name != "wide.weight"), name
    grads(again, 2), second.step()
    assert all(torch.equal(p, again.get_parameter(name)) for name, p in ours.named_parameters())
    with pytest.raises(UserError, match="did you mean 'muon'"):
        make_optimizer("muom", made(), 1e-3)


def test_ema_is_the_average_and_swap_restores_the_weights(tmp_path: Path) -> None:
    model = small_model().to(torch.bfloat16)
    ema = EMA(model, decay=0.9)
    expected = model[0].weight.detach().float().clone()
    for step in range(30):
        with torch.no_grad():
            model[0].weight.add_(0.125)
        d = min(0.9, (1 + step) / (10 + step))
        expected = d * expected + (1 - d) * model[0].weight.detach().float()
        ema.update(model, step)
    assert ema.state_dict()["0.weight"].dtype == torch.float32
    torch.testing.assert_close(ema.state_dict()["0.weight"], expected)

    own = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="inside"), ema.swap(model):
        assert torch.equal(model[0].weight, expected.to(torch.bfloat16))
        raise RuntimeError("inside")
    assert all(torch.equal(v, own[k]) for k, v in model.state_dict().items())

    other = EMA(small_model(), decay=0.9)
    state = load(save(tmp_path, 1, {"ema": ema.state_dict(), "less": {k: v for k, v in ema.state_dict().items() if k != "2.bias"}})).tensors
    other.load_state_dict(state["ema"])
    assert torch.equal(other.state_dict()["0.weight"], ema.state_dict()["0.weight"])
    with pytest.raises(UserError, match="EMA weight '2.bias' is not in the checkpoint"):
        other.load_state_dict(state["less"])
    with pytest.raises(UserError, match="decay 1"):
        EMA(model, decay=1)


# ----------------------------------------------------------------------------------------------------------- accelerator


def test_precision_follows_the_measured_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for fp32, bf16, taken in ((100e9, 129e9, "fp32"), (100e9, 131e9, "bf16"), (69e9, 492e9, "bf16"), (53e9, 0.9e9, "fp32")):
        monkeypatch.setattr(precision, "speeds", lambda _, found=(fp32, bf16): precision.Speeds(*found))
        assert pick_precision("auto") == taken
    assert pick_precision("bf16") == "bf16"  # what is asked for by name is taken as it is
    assert describe("bf16") == "precision bf16 (1 against 53 GFLOP/s)"


def test_the_measured_speed_matches_a_timed_product() -> None:
    """Against a product timed here: on the same machine, so within a factor of four under any load."""
    measured = precision.speeds("cpu")
    assert precision.speeds("cpu") is measured  # once per process
    for dtype, found in ((torch.float32, measured.fp32), (torch.bfloat16, measured.bf16)):
        a, b = torch.ones(1024, 256, dtype=dtype), torch.ones(256, 768, dtype=dtype)
        best = math.inf
        for _ in range(8):
            started = time.process_time()
            a @ b
            best = min(best, (time.process_time() - started) / torch.get_num_threads())
        assert 0.25 < found * best / (2 * 1024 * 256 * 768) < 4


def test_consecutive_programs_have_their_own_precision(tmp_path: Path) -> None:
    """In one process, as kling-train-all and these tests run them: accelerate alone would refuse the second."""
    for name, found in (("fp32", "no"), ("bf16", "bf16"), ("fp32", "no")):
        assert make_accelerator(tmp_path, mixed_precision=name).mixed_precision == found


def test_precision_names_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="fp16.*CUDA"):
        pick_precision("fp16")
    with pytest.raises(UserError, match="unknown mixed_precision 'bf61' .did you mean 'bf16'"):
        pick_precision("bf61")


def test_accelerator_mistakes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown tracker 'wandbb' .did you mean 'wandb'"):
        make_accelerator(tmp_path, trackers=["wandbb"])
    with pytest.raises(UserError, match="gradient_accumulation 0"):
        make_accelerator(tmp_path, gradient_accumulation=0)
    with pytest.raises(UserError, match="bf16_reduction on a CPU needs sharded weights"):
        make_accelerator(tmp_path, bf16_reduction=True)


def test_gradient_accumulation_steps_once_per_group(tmp_path: Path) -> None:
    accelerator = make_accelerator(tmp_path, mixed_precision="fp32", gradient_accumulation=3)
    model = small_model()
    model, optimizer = accelerator.prepare(model, adamw(model, 1e-2))
    stepped = []
    for _ in range(6):
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.ones(2, 4)).mean())
            optimizer.step()
            optimizer.zero_grad()
            stepped.append(accelerator.sync_gradients)
    assert stepped == [False, False, True] * 2
    assert all(state["step"] == 2 for state in optimizer.state.values())


@pytest.mark.parametrize("number", StopSignal.SIGNALS)
def test_a_signal_becomes_a_flag_and_the_handlers_are_restored(number: signal.Signals, tmp_path: Path) -> None:
    accelerator = make_accelerator(tmp_path, mixed_precision="fp32")
    before = {s: signal.getsignal(s) for s in StopSignal.SIGNALS}
    with StopSignal() as stop:
        assert not stop and not stop.seen(accelerator)
        os.kill(os.getpid(), number)
        assert stop and stop.name == number.name and stop.seen(accelerator)
        assert signal.getsignal(number) == before[number], "a second signal acts as usual"
    assert {s: signal.getsignal(s) for s in StopSignal.SIGNALS} == before
    assert EXIT_STOPPED == 143


def test_a_signal_sent_twice_at_once_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """coreutils' timeout sends it to the process and to its group; the second would have ended a run that was about to save."""
    usual: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: usual.append(number))
    try:
        with StopSignal() as stop:
            again = threading.Timer(StopSignal.AT_ONCE / 3, os.kill, (os.getpid(), signal.SIGTERM))
            again.start()
            os.kill(os.getpid(), signal.SIGTERM)
            again.join()
            assert stop and not usual
            os.kill(os.getpid(), signal.SIGTERM)
            assert usual == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


TWO_PROCESSES = """
import os, signal, sys, time, torch
from kling.runtime.accelerator import StopSignal, make_accelerator
from kling.training.optim import adamw
accelerator = make_accelerator(sys.argv[1], mixed_precision="fp32")
model = torch.nn.Linear(3, 1)
model, optimizer = accelerator.prepare(model, adamw(model, 1e-2))
with StopSignal() as stop:
    stop.EVERY = 1
    for step in range(100):
        accelerator.backward(model(torch.full((2, 3), float(accelerator.process_index))).square().mean())
        optimizer.step()
        optimizer.zero_grad()
        time.sleep(0.1 * (accelerator.process_index == 0))  # of unequal speed
        if step == 3 and accelerator.process_index == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        if stop.seen(accelerator):
            break
open(f"{sys.argv[1]}/{accelerator.process_index}", "w").write(f"{step} {accelerator.unwrap_model(model).weight.tolist()}")
"""


@pytest.mark.slow
def test_two_processes_train_one_model_and_stop_together(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(TWO_PROCESSES)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([*command, str(tmp_path / "program.py"), str(tmp_path)], env=env, check=True, capture_output=True)
    first, second = (tmp_path / "0").read_text(), (tmp_path / "1").read_text()
    assert first == second and 3 <= int(first.split()[0]) <= 20, "a second after the signal"


# ------------------------------------------------------------------------------------------------------------------- log


def test_metrics_survive_a_resume(tmp_path: Path) -> None:
    with RunLog(tmp_path, 10, log_every=4, stream=io.StringIO()) as log:
        for step in range(1, 8):
            log.log(step, {"loss": torch.tensor(float(step))})
    path = tmp_path / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"step": 8, "lo')  # killed while writing
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3, 4, 5, 6, 7]

    with RunLog(tmp_path, 10, start=5, stream=io.StringIO()) as log:
        for step in range(6, 11):
            log.log(step, {"loss": float(step), "broken": math.nan})
    lines = read_metrics(path)
    assert [line["step"] for line in lines] == list(range(1, 11)) == [line["loss"] for line in lines]
    assert lines[-1]["broken"] is None and all(json.loads(text) for text in path.read_text().splitlines())


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, terminal = io.StringIO(), Terminal()
    for stream in (plain, terminal):
        clock = itertools.count(0, 10)  # each look at the clock is 10 s later
        monkeypatch.setattr("kling.runtime.log.time.monotonic", lambda clock=clock: next(clock))
        with RunLog(tmp_path, 40, log_every=10, stream=stream) as log:
            for step in range(1, 41):
                parts = {"loss/sigma_0.00-0.25": 0.25, "loss/sigma_0.75-1.00": 0.75}
                log.log(step, {"loss": 0.5, "tokens": 1_234_567 * step, **parts}, clips=2)
    assert plain.getvalue().splitlines()[0] == "step 10/40 · loss 0.5 · tokens 12.35M · by σ 0.25 0.75 · 2 clips/s · ETA 30s"
    assert len(plain.getvalue().splitlines()) == 4
    assert terminal.getvalue().count("\n") == 1 and terminal.getvalue().count("\r") == 4
    assert (duration(3723), duration(75), duration(9)) == ("1h02m", "1m15s", "9s")


def test_losses_are_means_over_micro_steps_in_all_and_by_sigma(tmp_path: Path) -> None:
    accelerator, meter = make_accelerator(tmp_path, mixed_precision="fp32"), Meter(torch.device("cpu"), ceiling=100.0)
    meter.add(torch.tensor([0.1, 0.2]), torch.tensor([1.0, 3.0]), tokens=10, flops=50)
    meter.add(torch.tensor([0.6, 1.0]), torch.tensor([5.0, 7.0]), tokens=10, flops=50)
    sums = meter.sums(accelerator)
    assert sums[:, -1].tolist() == [0, 20] and not meter.sums(accelerator).any()
    assert Meter.means(sums.flatten().tolist()) == {
        "loss": 4,
        "loss/sigma_0.00-0.25": 2,
        "loss/sigma_0.50-0.75": 5,
        "loss/sigma_0.75-1.00": 7,
    }
    meter.lap("forward")
    found = meter.close(batches=2, processes=4)(80.0)  # summed over four processes, of which two share each clip
    assert found["tokens"] == 40 and found["tokens/s"] == pytest.approx(40 / found["time/step"])
    assert found["mfu"] == pytest.approx(200 / found["time/step"] / 400)
    assert found["time/forward"] == found["time/step"] and meter.close()(0)["tokens/s"] == 0


@pytest.mark.slow
def test_trackers_offline(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    pytest.importorskip("tensorboard")
    accelerator = make_accelerator(tmp_path, mixed_precision="fp32", trackers=["tensorboard", "wandb"])
    with RunLog(tmp_path, 2, accelerator=accelerator, config={"a": {"b": [1, 2]}, "c": None, "lr": 0.1}, stream=io.StringIO()) as log:
        for step in (1, 2):
            log.log(step, {"loss": 1.0})
    assert list(tmp_path.rglob("events.out.tfevents.*")) and list(tmp_path.rglob("offline-run-*"))
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2


def test_sources_on_a_path_without_an_installation_have_their_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without a network, to which only the sources were carried: a training there ended at its first checkpoint."""

    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    assert versions("no-such-package") == {"no-such-package": "absent"}
    monkeypatch.setattr(metadata, "version", missing)
    assert versions("kling", "torch") == {"kling": kling.__version__, "torch": "absent"}
