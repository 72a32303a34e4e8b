"""One run, however it lies on processes: the same losses, gradients, weights and order of data. Real processes, over gloo."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import workers
from safetensors import safe_open
from torch import Tensor

from kling.data.source import batches
from kling.errors import UserError
from kling.runtime.accelerator import make_accelerator
from kling.runtime.parallel import Layout, check_draws
from kling.training import Places
from kling.vae import AutoencoderKLKling

STEPS = 5


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A training whose VAE and cache cost nothing, with every task, cameras, and clips of one and of two latent frames."""
    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    AutoencoderKLKling(**workers.TINY_VAE).save_pretrained(folder / "vae")
    (folder / "encode.yaml").write_text("{clips: 12, shard: 6, workers: 0, data: {frames: [1, 5]}}")
    return [
        "configs/dit/debug.yaml", "frames=[5]", "max_frames=5", "batch=2", "camera_drop=0.2", "workers=0", "log_every=1", "save_every=100",
        "sample_every=0", "samples=[]", "schedule=constant", "mixed_precision=fp32", "threads=1",
        f"vae={folder / 'vae'}", f"cache={folder / 'cache'}",
        f"encode={folder / 'encode.yaml'}",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def alone(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference: one process, four micro-steps to an update."""
    out = tmp_path_factory.mktemp("alone") / "run"
    workers.train_dit.main([*words, f"out={out}", f"steps={STEPS}", "gradient_accumulation=4"])
    return out


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(run: Path) -> dict[str, Tensor]:
    """Everything in the newest checkpoint, rows of several files joined in their order: an independent reading of the format."""
    found: dict[str, list[Tensor]] = {}
    for path in sorted((run / (run / "latest").read_text().strip()).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a dict
                found.setdefault(f"{path.name.split('.')[0]}/{key}", []).append(file.get_tensor(key))
    return {key: torch.cat(parts) if len(parts) > 1 else parts[0] for key, parts in found.items()}


def assert_same_run(run: Path, reference: Path, rtol: float = 1e-5) -> None:
    ours, theirs = metrics(run), metrics(reference)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs] == list(range(1, STEPS + 1))
    for line, other in zip(ours, theirs, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=rtol) and line["grad_norm"] == pytest.approx(other["grad_norm"], rel=rtol)
    a, b = weights(run), weights(reference)
    assert a.keys() == b.keys()
    for key in a:
        if key.endswith("exp_avg"):  # a running mean of the gradients, parameter by parameter
            assert (a[key] - b[key]).norm() <= rtol * b[key].norm() + 1e-12, key


@pytest.mark.parametrize(
    ("config", "ranks", "micro", "sizes"),
    [
        pytest.param("ddp", 2, 2, {}, id="ddp-2x2"),
        pytest.param("ddp", 4, 1, {}, id="ddp-4x1", marks=pytest.mark.slow),
        pytest.param("fsdp2", 2, 2, {"dp_shard": 2}, id="fsdp2-2x2"),
        pytest.param("hsdp", 4, 1, {"dp_replicate": 2, "dp_shard": 2}, id="hsdp-4x1", marks=pytest.mark.slow),
        pytest.param("fsdp2_cp", 2, 4, {"dp_shard": 1, "cp": 2}, id="context-2"),
        pytest.param("fsdp2_cp", 4, 2, {"dp_shard": 2, "cp": 2}, id="fsdp2-context-2x2", marks=pytest.mark.slow),
    ],
)
def test_processes_and_accumulation_change_nothing(
    config: str, ranks: int, micro: int, sizes: dict[str, int], words: list[str], alone: Path, tmp_path: Path
) -> None:
    env = workers.environment(config, ranks, **sizes)
    assert workers.run([*words, f"out={tmp_path}", f"steps={STEPS}", f"gradient_accumulation={micro}"], env) == [0] * ranks
    assert_same_run(tmp_path, alone)
    assert (tmp_path / "export" / "model_index.json").is_file()
    sharded = list((tmp_path / f"step-{STEPS:08d}").glob("model.00001.safetensors"))
    assert bool(sharded) == (config != "ddp"), "a sharded run writes each process's rows"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_gradients_exchanged_in_bf16_are_those_rounded(words: list[str], alone: Path, tmp_path: Path) -> None:
    words = [*words, f"out={tmp_path}", "steps=1", "gradient_accumulation=2", "bf16_reduction=true"]
    assert workers.run(words, workers.environment("fsdp2", 2, dp_shard=2), timeout=600) == [0, 0]
    ours, theirs = metrics(tmp_path)[0], metrics(alone)[0]
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-2) and ours["grad_norm"] != pytest.approx(
        theirs["grad_norm"], rel=1e-6
    )


def test_muon_turns_whole_matrices_when_their_rows_are_cut(words: list[str], tmp_path: Path) -> None:
    words = [*words, "optimizer=muon", f"steps={STEPS}"]
    workers.train_dit.main([*words, f"out={tmp_path / 'alone'}", "gradient_accumulation=2"])
    assert workers.run([*words, f"out={tmp_path / 'cut'}"], workers.environment("fsdp2", 2, dp_shard=2)) == [0, 0]
    assert_same_run(tmp_path / "cut", tmp_path / "alone")


def test_a_run_goes_on_with_another_number_of_processes(words: list[str], alone: Path, tmp_path: Path) -> None:
    """1 -> 2 sharded -> 1, resharded on the way, with samples and validation while sharded."""
    words = [*words, f"out={tmp_path}"]
    extra = ["validation.every=3", "validation.clips=3", "validation.quantiles=2", "sample_every=3",
             "samples=[{prompt: a ball, num_frames: 5, num_inference_steps: 1}]"]  # fmt: skip
    workers.train_dit.main([*words, *extra, "steps=2", "gradient_accumulation=4"])
    env = workers.environment("fsdp2", 2, dp_shard=2)
    assert workers.run([*words, *extra, "steps=3", "gradient_accumulation=2"], env) == [0, 0]
    workers.train_dit.main([*words, *extra, f"steps={STEPS}", "gradient_accumulation=4"])
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics(tmp_path) if "validation/loss" not in line))
    assert_same_run(tmp_path, alone)
    assert (tmp_path / "samples" / "00000003.png").is_file()


class Numbers(torch.utils.data.Dataset):
    def __getitem__(self, i: int) -> Tensor:
        return torch.tensor(i)


def test_every_place_is_used_once_and_in_order_whatever_the_processes() -> None:
    seen, first = [], 0
    for ranks, micro, steps in ((1, 4, 2), (2, 2, 3), (4, 1, 2), (1, 4, 1)):
        rows = [[int(x) for x in batches(Places(Numbers(), first, Layout(rank, ranks)), 0, steps * micro, 0)] for rank in range(ranks)]
        seen += [place for together in zip(*rows, strict=True) for place in together]
        first += ranks * micro * steps
    assert seen == list(range(32))


def test_workers_change_nothing() -> None:
    feed = Places(Numbers(), 7, Layout(1, 2))
    rows = [[int(x) for x in batches(feed, 0, 6, workers)] for workers in (0, 1, 2)]
    assert rows[0] == rows[1] == rows[2] == [8, 10, 12, 14, 16, 18]


def test_draws_are_checked_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = make_accelerator(tmp_path, mixed_precision="fp32")
    check_draws(accelerator, Layout(), torch.arange(3.0))
    for layout, second, fine in (
        (Layout(0, 2, 1), 1.0, True),
        (Layout(0, 2, 1), 0.0, False),
        (Layout(0, 1, 2), 0.0, True),
        (Layout(0, 1, 2), 1.0, False),
    ):
        monkeypatch.setattr(accelerator, "gather", lambda mine, second=second: torch.cat([mine, mine + second]))
        if fine:
            check_draws(accelerator, layout, torch.arange(3.0))
        else:
            with pytest.raises(UserError, match="same"):
                check_draws(accelerator, layout, torch.arange(3.0))
