"""One run on any distribution over processes: the same losses, gradients, weights and order of data. Real processes, over gloo."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import workers
from safetensors import safe_open
from torch import Tensor

from kling.cache.batches import LatentSteps, RankBatches
from kling.cache.store import LatentCache
from kling.data.source import batches
from kling.dit import KlingTransformer3DModel
from kling.errors import UserError
from kling.runtime.accelerator import make_accelerator
from kling.runtime.parallel import Layout, check_draws, split_sequence
from kling.sampling.request import Request
from kling.training.examples import check_divides
from kling.vae import AutoencoderKLKling
from tests.test_pipeline import tiny_pipeline

STEPS = 5
NO_TASKS = "tasks={text: 1, image: 0, continuation: 0, inpaint: 0, restyle: 0, last: 0, first_last: 0, keyframes: 0}"
WATCHED = ["validation.every=1", "validation.clips=2", "validation.quantiles=1", "sample_every=2",
           "samples=[{prompt: a ball, num_frames: 5, num_inference_steps: 1}]"]  # fmt: skip


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A training with a tiny VAE and cache, with every task, cameras, and clips of one and of two latent frames."""
    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    AutoencoderKLKling(**workers.TINY_VAE).save_pretrained(folder / "vae")
    (folder / "encode.yaml").write_text(
        "{clips: 12, shares: [2, 1], shard: 6, workers: 0, data: {frames: [1, 5], aspects: ['16:9', '9:16']}}"
    )
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
    """Everything in the newest checkpoint, with the rows of several files joined in order: an independent reader of the format."""
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
    ("config", "ranks", "micro", "sizes", "extra"),
    [
        pytest.param("ddp", 2, 2, {}, [], id="ddp-2x2", marks=pytest.mark.slow),
        pytest.param("ddp", 4, 1, {}, [], id="ddp-4x1", marks=pytest.mark.slow),
        pytest.param("fsdp2", 2, 2, {"dp_shard": 2}, ["trackers=[tensorboard]"], id="fsdp2-2x2"),
        pytest.param("hsdp", 4, 1, {"dp_replicate": 2, "dp_shard": 2}, [], id="hsdp-4x1", marks=pytest.mark.slow),
        pytest.param("fsdp2_cp", 2, 4, {"dp_shard": 1, "cp": 2}, [], id="ulysses-2"),
        pytest.param("fsdp2_cp", 2, 4, {"dp_shard": 1, "cp": 2}, ["context_parallel=ring"], id="ring-2"),
        pytest.param("fsdp2_cp", 4, 2, {"dp_shard": 2, "cp": 2}, [], id="fsdp2-ulysses-2x2", marks=pytest.mark.slow),
    ],
)
def test_processes_and_accumulation_change_nothing(
    config: str, ranks: int, micro: int, sizes: dict[str, int], extra: list[str], words: list[str], alone: Path, tmp_path: Path
) -> None:
    """Ring attention uses a flash attention for CPUs that the test provides. A tracker stays open until the end."""
    env = workers.environment(config, ranks, **sizes)
    first = workers.ring_on_cpu if "context_parallel=ring" in extra else None
    words = [*words, *extra, f"out={tmp_path}", f"steps={STEPS}", f"gradient_accumulation={micro}"]
    assert workers.run(words, env, first=first) == [0] * ranks
    assert_same_run(tmp_path, alone)
    assert (tmp_path / "export" / "model_index.json").is_file()
    assert bool(list(tmp_path.rglob("events.out.tfevents.*"))) == ("trackers=[tensorboard]" in extra)
    sharded = list((tmp_path / f"step-{STEPS:08d}").glob("model.00001.safetensors"))
    assert bool(sharded) == (config != "ddp"), "a sharded run writes each process's rows"


def seen(path: Path) -> list[list[list]]:
    """The lines that each process has written to SEEN.<rank>, by process."""
    return [[json.loads(line) for line in file.read_text().splitlines()] for file in sorted(path.parent.glob(f"{path.name}.*"))]


def test_gradients_stay_sharded_between_micro_steps(words: list[str], tmp_path: Path) -> None:
    """With accelerate's code for FSDP2, which without `sync_each_batch` keeps whole gradients until the last micro-step. All cameras and
    kinds are drawn, because a step without them would have no gradients for these."""
    words = [*words, f"out={tmp_path / 'run'}", "steps=1", "gradient_accumulation=3", "camera_drop=0", NO_TASKS]
    env = workers.environment("fsdp2", 2, dp_shard=2) | {"SEEN": str(tmp_path / "seen")}
    assert workers.run(words, env, first=workers.watch_gradients) == [0, 0]
    assert seen(tmp_path / "seen") == [[[True, False, 0.5, 0.5], [True, False, 0.5, 0.5], [True, True, 0.5, 0.5]]] * 2


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_options_of_the_presets_change_nothing_with_shards(words: list[str], tmp_path: Path) -> None:
    """Recomputed activations in compiled blocks of sharded weights, for every task and two shapes, with validation and samples, in few
    graphs. They are traced and differentiated but not compiled to C++, which is independent of processes (tests/test_growing.py)."""
    words = [*words, *WATCHED, f"steps={STEPS}"]
    workers.train_dit.main([*words, f"out={tmp_path / 'alone'}", "gradient_accumulation=2"])
    words = [*words, f"out={tmp_path / 'shards'}", "activation_checkpointing=full", "compile=true"]
    env = workers.environment("fsdp2", 2, dp_shard=2) | {"SEEN": str(tmp_path / "seen")}
    assert workers.run(words, env, first=workers.trace_only) == [0, 0]
    assert all(1 <= len(graphs) <= 4 for graphs in seen(tmp_path / "seen")) and len(seen(tmp_path / "seen")) == 2
    for name in ("alone", "shards"):
        lines = [line for line in metrics(tmp_path / name) if "validation/loss" not in line]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert_same_run(tmp_path / "shards", tmp_path / "alone")


def test_bf16_shards_train_as_bf16_alone(words: list[str], tmp_path: Path) -> None:
    """Sharded weights are cast by FSDP, whole ones by autocast: the same up to rounding in bf16. With validation and samples."""
    words = [*words, "steps=3", "mixed_precision=bf16", *WATCHED]
    workers.train_dit.main([*words, f"out={tmp_path / 'alone'}", "gradient_accumulation=2"])
    env = workers.environment("fsdp2", 2, dp_shard=2) | {"SEEN": str(tmp_path / "seen")}
    assert workers.run([*words, f"out={tmp_path / 'shards'}"], env, first=workers.watch_levels) == [0, 0]
    for key in ("loss", "validation/loss"):
        losses = [[line[key] for line in metrics(tmp_path / name) if key in line] for name in ("alone", "shards")]
        assert len(losses[0]) == 3 and losses[1] == pytest.approx(losses[0], rel=0.01)
    assert (tmp_path / "shards" / "samples" / "00000003.png").is_file()
    assert {dtype for lines in seen(tmp_path / "seen") for line in lines for dtype in line} == {"torch.float32"}


@pytest.mark.parametrize(
    "fsdp",
    [
        {"fsdp_reshard_after_forward": False},
        pytest.param({"fsdp_transformer_layer_cls_to_wrap": "ByteTextEncoder"}, marks=pytest.mark.slow),
    ],
    ids=["not resharded", "blocks not cut"],
)
def test_gathered_averages_are_not_used_for_training(fsdp: dict, words: list[str], alone: Path, tmp_path: Path) -> None:
    """If FSDP keeps gathered weights after a forward pass, validation and samples must not change later steps."""
    env = workers.environment("fsdp2", 2, fsdp, dp_shard=2)
    assert workers.run([*words, *WATCHED, f"out={tmp_path}", f"steps={STEPS}", "gradient_accumulation=2"], env) == [0, 0]
    lines = [line for line in metrics(tmp_path) if "validation/loss" not in line]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert_same_run(tmp_path, alone)


def test_fp16_is_refused_for_training(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for program in (workers.train_dit, workers.train_vae):
        with pytest.raises(SystemExit) as end:
            preset = words[0] if program is workers.train_dit else "configs/vae/debug.yaml"
            program.main([preset, "mixed_precision=fp16", f"out={tmp_path}"])
        assert end.value.code == 2 and "fp16 is for sampling: train in bf16" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_gradients_exchanged_in_bf16_are_rounded_ones(words: list[str], alone: Path, tmp_path: Path) -> None:
    words = [*words, f"out={tmp_path}", "steps=1", "gradient_accumulation=2", "bf16_reduction=true"]
    assert workers.run(words, workers.environment("fsdp2", 2, dp_shard=2)) == [0, 0]
    ours, theirs = metrics(tmp_path)[0], metrics(alone)[0]
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-2) and ours["grad_norm"] != pytest.approx(
        theirs["grad_norm"], rel=1e-6
    )


@pytest.mark.parametrize(
    ("config", "sizes"),
    [("fsdp2", {"dp_shard": 2}), pytest.param("hsdp", {"dp_replicate": 2, "dp_shard": 2}, marks=pytest.mark.slow)],
    ids=["fsdp2", "hsdp"],
)
def test_muon_orthogonalises_each_matrix_on_one_process(
    config: str, sizes: dict[str, int], words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sharded matrices are processed whole, with the result of one process; each once, and about equally many on every process."""
    ranks = math.prod(sizes.values())
    words = [*words, "optimizer=muon", f"steps={STEPS}"]
    monkeypatch.setenv("SEEN", str(tmp_path / "one"))
    monkeypatch.setattr(workers.muon, "orthogonal", workers.muon.orthogonal)
    workers.count_turned(0)
    workers.train_dit.main([*words, f"out={tmp_path / 'alone'}", f"gradient_accumulation={ranks}"])
    env = workers.environment(config, ranks, **sizes) | {"SEEN": str(tmp_path / "all")}
    assert workers.run([*words, f"out={tmp_path / 'cut'}"], env, first=workers.count_turned) == [0] * ranks
    assert_same_run(tmp_path / "cut", tmp_path / "alone")

    def turned(lines: list[list]) -> Counter:
        return sum((Counter({tuple(shape): count}) for count, *shape in lines), Counter())

    shares = [turned(lines) for lines in seen(tmp_path / "all")]
    assert sum(shares, Counter()) == turned(seen(tmp_path / "one")[0])
    counts = [share.total() for share in shares]
    assert len(counts) == ranks and max(counts) - min(counts) <= STEPS


def test_a_run_resumes_with_another_number_of_processes(
    words: list[str], alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1 -> 2 sharded -> 4 -> 1, with samples and validation while sharded: every batch of the sequence is used once, with the same noise,
    and losses and gradients are the same."""
    seen = tmp_path / "seen"
    straight = [*words, f"steps={STEPS}", "gradient_accumulation=4", f"out={tmp_path / 'straight-run'}"]
    words = [*words, f"out={tmp_path / 'run'}", "validation.every=3", "validation.clips=3", "validation.quantiles=2", "sample_every=3",
             "samples=[{prompt: a ball, num_frames: 5, num_inference_steps: 1}]"]  # fmt: skip
    monkeypatch.setenv("SEEN", str(seen))
    monkeypatch.setattr(workers.train_dit, "Loop", workers.train_dit.Loop)
    workers.record(0)
    workers.train_dit.main([*words, "steps=2", "gradient_accumulation=4"])
    for steps, config, ranks, sizes in ((3, "fsdp2", 2, {"dp_shard": 2}), (4, "ddp", 4, {})):
        env = workers.environment(config, ranks, **sizes) | {"SEEN": str(seen)}
        assert workers.run([*words, f"steps={steps}", f"gradient_accumulation={4 // ranks}"], env, first=workers.record) == [0] * ranks
    workers.train_dit.main([*words, f"steps={STEPS}", "gradient_accumulation=4"])
    lines = [line for line in metrics(tmp_path / "run") if "validation/loss" not in line]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert_same_run(tmp_path / "run", alone)
    assert (tmp_path / "run" / "samples" / "00000003.png").is_file()

    several = workers.recorded(seen)
    assert [place for place, *_ in several] == list(range(4 * STEPS)), "none lost, none repeated"
    monkeypatch.setenv("SEEN", str(tmp_path / "straight"))
    workers.train_dit.main(straight)
    assert several == workers.recorded(tmp_path / "straight"), "the same clips and noise"


# ---------------------------------------------------------------------------------- the trouble of one is the business of all


def test_all_processes_agree_on_a_loss_that_is_not_finite_on_one(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five updates in a row fail on process 1: both processes skip them, go back to one checkpoint, and do not draw those clips again."""
    words = [*words, "save_every=2", "steps=8"]
    place = RankBatches.place
    monkeypatch.setattr(RankBatches, "place", lambda feed, k: (n := place(feed, k)) + (10 if n >= 4 else 0))
    workers.train_dit.main([*words, f"out={tmp_path / 'alone'}", "gradient_accumulation=2"])
    monkeypatch.undo()
    assert workers.run([*words, f"out={tmp_path / 'two'}"], workers.environment("ddp", 2), first=workers.poison_the_second) == [0, 0]
    assert [line["step"] for line in metrics(tmp_path / "two")] == [*range(1, 9)]
    a, b = weights(tmp_path / "alone"), weights(tmp_path / "two")
    assert a.keys() == b.keys() and all(torch.allclose(a[key], b[key], rtol=1e-4, atol=1e-6) for key in a)
    assert metrics(tmp_path / "two")[-1]["skipped"] == 5


def test_a_hang_of_one_process_shows_the_stacks_of_all(words: list[str], tmp_path: Path) -> None:
    words = [*words, "steps=2", "watchdog=2", f"out={tmp_path}"]
    assert workers.run(words, workers.environment("ddp", 2), first=workers.stall_the_second) == [0, 0]
    waiting, stalled = ((tmp_path / f"hang-{rank:05d}.txt").read_text() for rank in (0, 1))
    assert "in stalled" in stalled and "in stalled" not in waiting and "train_dit.py" in waiting


def test_a_signal_to_one_process_in_validation_saves_on_all_and_exits_143(words: list[str], tmp_path: Path) -> None:
    words = [*words, "steps=1000", "validation.every=1", "validation.clips=3", "validation.quantiles=2", f"out={tmp_path}"]
    env = workers.environment("fsdp2", 2, dp_shard=2)
    assert workers.run(words, env, first=workers.signal_in_validation) == [143, 143]
    assert (tmp_path / "latest").read_text() == "step-00000002\n", "the step after the signal"
    assert len([line for line in metrics(tmp_path) if "validation/loss" in line]) == 1


def test_indivisible_shapes_are_refused_before_training(
    words: list[str], alone: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    data = LatentSteps(LatentCache(next(word for word in words if word.startswith("cache="))[6:]), 2, [5], 0)
    model = KlingTransformer3DModel(num_attention_heads=2, attention_head_dim=32, num_layers=1, ffn_dim=64)
    check_divides(data, {"text": 1.0, "last": 1.0}, model, split=4)
    with pytest.raises(UserError, match=r"84 tokens \(16:9 of 5 frames and a keyframe\) do not divide over cp_size = 8"):
        check_divides(data, {"text": 1.0, "last": 1.0}, model, split=8)
    accelerator = make_accelerator(tmp_path, mixed_precision="fp32")
    with pytest.raises(UserError, match="2 attention heads do not divide over 3"):
        split_sequence(model, Layout(0, 1, 3), accelerator)
    with pytest.raises(UserError, match="ring needs flash attention, so a GPU"):
        split_sequence(model, Layout(0, 1, 3), accelerator, "ring")


class Numbers(torch.utils.data.Dataset):
    def __getitem__(self, i: int) -> Tensor:
        return torch.tensor(i)


def test_every_place_is_used_once_and_in_order_whatever_the_processes() -> None:
    seen, first = [], 0
    for ranks, micro, steps in ((1, 4, 2), (2, 2, 3), (4, 1, 2), (1, 4, 1)):
        rows = [[int(x) for x in batches(RankBatches(Numbers(), first, Layout(rank, ranks)), 0, steps * micro, 0)] for rank in range(ranks)]
        seen += [place for together in zip(*rows, strict=True) for place in together]
        first += ranks * micro * steps
    assert seen == list(range(32))


def test_workers_change_nothing() -> None:
    feed = RankBatches(Numbers(), 7, Layout(1, 2))
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


def test_a_sample_whose_tokens_do_not_divide_is_refused_before_it_is_made() -> None:
    """In training, and in kling-sample on several processes; hops and appended frames are counted."""
    pipe = tiny_pipeline()
    words = {"prompt": "a ball", "num_frames": 5, "size": "112x64"}  # 2 latent frames of 4 x 7 tokens
    last = np.zeros((64, 112, 3), np.uint8)
    for split, fields, fine in ((1, words, True), (8, words, True), (16, words, False), (8, words | {"last_image": last}, False)):
        pipe.transformer._parallel_config = SimpleNamespace(context_parallel_config=SimpleNamespace(ulysses_degree=split, ring_degree=1))
        if fine:
            pipe.plan(Request(**fields))
        else:
            with pytest.raises(UserError, match=rf"tokens \(. latent frames of 14x8\) do not divide over the {split} processes"):
                pipe.plan(Request(**fields))
