"""Checks plans: operations against torch's own count, memory against torch's allocations and a process's memory."""

from __future__ import annotations

import ctypes
import importlib.util
import math
import re
import resource
import shlex
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
import workers
from accelerate.commands.launch import launch_command_parser
from diffusers import AutoencoderKLWan
from kling_programs.train import students
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy
from torch.utils.flop_counter import FlopCounterMode

from kling.config import load_config, read_preset
from kling.dit import KlingTransformer3DModel
from kling.dit.cost import forward_flops
from kling.dit.memory import LiveBytes, StepMemory, step_memory
from kling.errors import UserError
from kling.nn.modulation import Levels
from kling.training.ema import EMA, Follower
from kling.training.lora import Lora, add_lora
from kling.training.model import Trained, _keep_products, set_checkpointing
from kling.training.optim import adamw
from kling.vae import AutoencoderKLKling

from plan import (  # isort: skip - train/, which `workers` puts on the path
    METHODS, Part, PlanConfig, advice, layouts, level_runs, main, on_each_gpu, on_the_host, report, set_up,
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def each_step_is_traced_once() -> Iterator[None]:
    """Plans that differ in their GPUs alone share the traces of their steps, which take nearly all the time."""
    plan, known = sys.modules["plan"], {}

    def traced(config: dict, latents: tuple[int, ...], tokens: int, checkpointing: partial, *rest: object) -> StepMemory:
        key = repr((config, latents, tokens, checkpointing.keywords, rest))
        return known[key] if key in known else known.setdefault(key, step_memory(config, latents, tokens, checkpointing, *rest))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "step_memory", traced)
        yield


SMALL = {"num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 6, "ffn_dim": 128, "text_dim": 32}


@pytest.mark.parametrize(("name", "billions"), [("0.1b", 0.12), ("1.3b", 1.4), ("5b", 5.0), ("14b", 14.3)])
def test_a_preset_has_the_size_of_its_name(name: str, billions: float) -> None:
    cfg = load_config(workers.train_dit.TrainDiTConfig, f"dit/{name}.yaml")
    with torch.device("meta"):
        one, two = (KlingTransformer3DModel(**{**cfg.model, "num_layers": n, "text_dim": cfg.text["out_dim"]}) for n in (1, 2))
    one, two = (sum(p.numel() for p in model.parameters()) for model in (one, two))
    assert one + (cfg.model["num_layers"] - 1) * (two - one) == pytest.approx(billions * 1e9, rel=0.03)


@pytest.mark.parametrize(("name", "channels", "factor"), [("16x8x8", 16, 8), ("48x16x16", 48, 16)])
def test_a_vae_preset_has_the_shape_of_its_name(name: str, channels: int, factor: int) -> None:
    cfg = load_config(workers.train_vae.TrainVAEConfig, f"vae/{name}.yaml")
    with torch.device("meta"):
        ours, theirs = AutoencoderKLKling(**cfg.model), AutoencoderKLWan(**cfg.model)
    assert ours.spatial_factor == factor and ours.quant_conv.out_channels == 2 * channels
    assert {key: t.shape for key, t in ours.state_dict().items()} == {key: t.shape for key, t in theirs.state_dict().items()}, "Wan's own"


def test_operations_are_those_that_torch_counts() -> None:
    model = KlingTransformer3DModel(**{**SMALL, "num_attention_heads": 4, "attention_head_dim": 64, "ffn_dim": 1024})
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randn(1, 16, 4, 8, 8), torch.tensor([0.5]), torch.randn(1, 8, 32))
    assert forward_flops(model.config, tokens=4 * 16, text_tokens=8) == pytest.approx(counter.get_total_flops(), rel=0.06)


def test_live_bytes() -> None:
    with LiveBytes() as counter:
        a = torch.zeros(1000)
        b = a + 1
        del a
        c = b.view(10, 100)  # no new memory
        del b
    assert counter.peak == 8000 and counter.live == 4000 and c.shape == (10, 100)


@pytest.mark.parametrize("what", ["none", "selective", "full"])
def test_depth_is_extrapolated_exactly(what: str) -> None:
    shape = (1, 16, 2, 4, 6)
    six = step_memory(SMALL, shape, 4, partial(set_checkpointing, what=what), bf16=False)
    with torch.device("cpu"):
        model = KlingTransformer3DModel(**SMALL).train()
    set_checkpointing(model, what)
    with LiveBytes() as counter:  # real tensors, all six layers
        model(torch.zeros(shape), torch.zeros(1), torch.zeros(1, 4, 32)).sample.square().mean().backward()
    assert six.parameters == sum(p.numel() for p in model.parameters())
    assert six.peak == pytest.approx(counter.peak, rel=0.03)


def test_levels_of_tokens_are_counted() -> None:
    """If parts of frames are given, each token has its own gates: more is kept, as much as with real tensors."""
    shape, model, found = (1, 16, 2, 4, 6), KlingTransformer3DModel(**SMALL).train(), {}
    for runs in (1, 2, 12):
        levels, counter = Levels(torch.rand(2), torch.arange(runs)[None] % 2) if runs > 1 else torch.rand(1), LiveBytes()
        hooks = [p.register_post_accumulate_grad_hook(counter.note_gradient) for p in model.parameters()]
        with counter:
            model(torch.zeros(shape), levels, torch.zeros(1, 4, 32)).sample.square().mean().backward()
        for hook in hooks:
            hook.remove()
        model.zero_grad()
        found[runs] = step_memory(SMALL, shape, 4, bf16=False, runs=runs).activations
        assert found[runs] == pytest.approx(counter.activations, rel=0.03)
    vector = 4 * SMALL["num_attention_heads"] * SMALL["attention_head_dim"]
    assert found[12] - found[1] > 3 * SMALL["num_layers"] * 11 * vector, "of the six vectors that a block takes, most are kept"
    for tasks, runs in (({"text": 1}, 1), ({"text": 1, "restyle": 1}, 1), ({"image": 1}, 5), ({"last": 1}, 5), ({"inpaint": 0.1}, 40),
                        ({"text": 1, "inpaint": 0}, 1)):  # fmt: skip
        assert level_runs(tasks, (5, 2, 4)) == runs


def test_what_the_host_needs() -> None:
    """A run on one process copies weights, average and moments before writing them; the export holds one model, and its bf16 copy."""
    step = step_memory(SMALL, CLIP, 8, bf16=False)
    model = KlingTransformer3DModel(**SMALL)
    average = EMA(model)
    held = [*model.parameters(), *average.state_dict().values()] * 2  # AdamW's two moments are as large as these two
    assert on_the_host(step, 1)[0] == sum(t.numel() * t.element_size() for t in held)
    assert on_the_host(step, 4, moments=1) == (on_the_host(step, 1)[0] * 3 // 16, 6 * step.parameters)


def test_a_plan(capsys: pytest.CaptureFixture) -> None:
    main(["configs/dit/debug.yaml", "gpus=8", "memory=80", "tflops=800", "height=64", "width=112"])
    text = capsys.readouterr().out
    assert "140 tokens" in text and "recommended    ddp, activation_checkpointing=none" in text
    assert "precision      bf16" in text and "as given by tflops=" in text
    main(["configs/dit/debug.yaml", "gpus=1", "memory=0.001", "tflops=800", "height=64", "width=112"])
    assert "nothing fits: the smallest layout needs 0.0" in capsys.readouterr().out
    for words, message in (
        (["configs/vae/world.yaml"], "is a preset of kling-train-vae: kling-plan takes configs/dit/PRESET.yaml"),
        (["configs/dit/debug.yaml", "height=100"], "does not divide"),
        (["configs/dit/debug.yaml", "mfu=40"], "an mfu of at most 1"),
        (["configs/dit/debug.yaml", "gpus=12"], "not full machines"),
        (["configs/dit/debug.yaml", "tflops=-1"], "give positive numbers"),
        (["configs/dit/debug.yaml", "tflops=1", "lora.rank=4", "lora.half=true", "bf16=false"], "computes in fp32"),
        (["configs/dit/debug.yaml", "tflops=1", "lora.rank=4", "lora.targets=[to_x]"], "matches no layer"),
        ([], "usage: kling-plan"),
    ):
        with pytest.raises(SystemExit):
            main(words)
        assert message in capsys.readouterr().err


def launched(words: list[str]) -> tuple[Path, list[str]]:
    """(configuration of accelerate, arguments of kling-train) from a recommended command, parsed by accelerate's own parser."""
    assert words[:2] == ["accelerate", "launch"]
    given = launch_command_parser().parse_args(words[2:])
    assert given.module and importlib.util.find_spec(given.training_script)
    return Path(given.config_file), given.training_script_args


@pytest.mark.parametrize("preset", ["configs/dit/debug.yaml", "dit/0.1b.yaml"])
@pytest.mark.parametrize("gpus", [1, 4, 8, 16])
def test_every_recommended_command_runs_unchanged(preset: str, gpus: int) -> None:
    config = PlanConfig(gpus=gpus, tflops=800)
    for layout, shards, split, what in layouts(config.gpus, config.node):
        lines = advice(layout, shards, split, what, Part(1e9, 1e9, 1e9, 1e9, 2e9), config, read_preset(preset), preset)
        words = shlex.split(lines[1])
        if gpus == 1:
            assert words.pop(0) == "kling-train"
        else:
            file, words = launched(words)
            assert file.is_file() and file.stem == layout.split()[0] != "cpu"
            sizes = [int(n) for n in re.findall(r"(?:dp_replicate|dp_shard|cp)_size (\d+)", lines[1])]
            assert math.prod(sizes) == (1 if file.stem == "ddp" else gpus)
        cfg = load_config(workers.train_dit.TrainDiTConfig, words[0], words[1:])
        assert cfg.batch <= 256 and cfg.activation_checkpointing == what and not (cfg.compile and what == "selective")


def test_assumptions_are_printed(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """The source of TFLOP/s and size; and memory is planned in the dtype that is measured."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    measured = []
    monkeypatch.setattr(sys.modules["plan"], "matmul_ceiling", lambda device, dtype: measured.append(dtype) or 1e12)
    for fast, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr("kling.runtime.precision.bf16_is_fast", lambda device, fast=fast: fast)
        main(["dit/debug.yaml", "gpus=1"])
        text, said = capsys.readouterr()
        assert said.startswith(f"precision {'bf16' if fast else 'fp32'} (") and said.endswith(" GFLOP/s)\n")
        assert f"precision      {'bf16' if fast else 'fp32'}" in text and measured.pop() is dtype
        assert "this machine's CPU" in text and "give tflops= of yours" in text and "112x64 (of cache/debug.yaml)" in text
        assert "cpu.yaml" not in text
    main(["dit/debug.yaml", "gpus=1", "width=224", "height=128", "tflops=1"])
    said = capsys.readouterr()
    assert "224x128 (as given)" in said.out and not said.err, "the speeds of this machine say nothing of given GPUs"
    report_of = report({**read_preset("dit/debug.yaml"), "encode": ""}, PlanConfig(gpus=1, tflops=1))
    assert any("832x480 (assumed" in line for line in report_of)


def test_recommended_options_are_accepted_by_training() -> None:
    """Selective checkpointing and compile cannot be combined, so the command for a preset that compiles says so."""
    preset, seen = read_preset("configs/dit/0.1b.yaml"), set()
    assert preset["compile"]
    for compiled in (True, False):
        for memory in (2, 2.5, 3, 3.5, 80):
            config = PlanConfig(gpus=1, tflops=100, height=64, width=112, memory=memory)
            last = report(preset | {"compile": compiled}, config)[-1]
            selective = "activation_checkpointing=selective" in last
            seen.add(selective)
            assert last.endswith("compile=false") == (selective and compiled), last
    assert seen == {True, False}


def test_muon_has_half_the_state_of_adamw() -> None:
    step = step_memory(MEASURED, CLIP, 8, bf16=False)
    adamw, muon = (on_each_gpu(step, 1, 1, 1, moments) for moments in (2, 1))
    assert adamw.optimizer == 2 * muon.optimizer == 8 * step.parameters
    with pytest.raises(UserError, match="did you mean 'muon'"):
        report({**read_preset("configs/dit/debug.yaml"), "optimizer": "muom"}, PlanConfig())


def made(method: str, lora: Lora) -> tuple[list[nn.Module], list[nn.Module], list[Follower]]:
    """(frozen networks, trained ones, averages and copies) as the program of a method makes them on one process that computes in bf16."""
    cfg = students.DistillConfig(lora=lora, method="dmd")  # which has no embedding of the end of a step
    torch.manual_seed(0)
    config = {**SMALL, "num_layers": 4}
    weights = KlingTransformer3DModel(**config).state_dict()

    def network(dtype: torch.dtype) -> Trained:
        transformer = KlingTransformer3DModel(**config)
        transformer.load_state_dict(weights)
        return Trained(transformer.to(dtype), None)

    if method in ("train", "align"):
        model = network(students.frozen_dtype(cfg))
        if lora.rank:
            add_lora(model, lora)
        return [], [model], [EMA(model), *(Follower(model) for _ in range(2 if method == "align" else 0))]
    half = lora.half or not lora.rank  # as in `students.prepare`
    teacher = network(torch.bfloat16 if half else torch.float32).requires_grad_(False)
    trained = [students.adapted(cfg, network(students.frozen_dtype(cfg)), teacher) for _ in range(2 if method == "dmd" else 1)]
    return [teacher], trained, [EMA(trained[0])]


@pytest.mark.parametrize("lora", [Lora(), Lora(rank=4), Lora(rank=4, half=True)], ids=["whole", "low-rank", "half"])
def test_what_a_method_holds_is_what_its_program_makes(lora: Lora) -> None:
    """Bytes of the networks that the training code itself builds, counted by storage: weights that are shared count once."""
    near = 0.02 if lora.half else 1e-6  # norms stay in fp32 beside bf16 weights
    step = step_memory({**SMALL, "num_layers": 4}, CLIP, 8, partial(set_up, what="none", lora=lora))
    for method in ("train", "distill", "dmd", "align"):
        frozen, trained, averages = made(method, lora)
        nets = [*frozen, *trained]
        storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for net in nets for p in net.parameters()}
        numbers = [sum(p.numel() for p in net.parameters() if p.requires_grad) for net in trained]
        held = sum(t.numel() * t.element_size() for copy in averages for t in copy.state_dict().values())
        one, four = (on_each_gpu(step, 1, n, 1, method=method, frozen=2 if lora.half else 4, bf16=True) for n in (1, 4))
        assert one.weights == pytest.approx(sum(storages.values()), rel=near)
        assert (one.gradients, one.optimizer, one.average) == (4 * numbers[0], 8 * sum(numbers), held)
        assert (four.gradients, four.optimizer, four.average) == (one.gradients / 4, one.optimizer / 4, one.average / 4)
        alone = sum(p.numel() * p.element_size() for net in nets for p in net.parameters())  # a shard of each network is its own
        assert four.weights - 2 * 4 * step.block == pytest.approx(alone / 4, rel=near)


def test_low_rank_weights_keep_as_much_as_real_tensors() -> None:
    lora, shape, model, counter = Lora(rank=4), (1, 16, 2, 4, 6), KlingTransformer3DModel(**SMALL).train(), LiveBytes()
    set_up(model, "none", lora)
    for p in model.parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(counter.note_gradient)
    with counter:
        model(torch.zeros(shape), torch.rand(1), torch.zeros(1, 4, 32)).sample.square().mean().backward()
    step = step_memory(SMALL, shape, 4, partial(set_up, what="none", lora=lora), bf16=False)
    assert step.trained == 4 * 4 * 2 * 64 * SMALL["num_layers"] * 2  # A and B of four layers, in both attentions
    assert step.parameters - step.trained == sum(p.numel() for p in KlingTransformer3DModel(**SMALL).parameters())
    assert step.activations == pytest.approx(counter.activations, rel=0.03) and step.peak == pytest.approx(counter.peak, rel=0.03)


def test_a_low_rank_plan_recommends_a_low_rank_training() -> None:
    part, preset, lora = Part(1e9, 1e9, 1e9, 1e9, 2e9), "dit/debug.yaml", Lora(rank=4, half=True)
    config = PlanConfig(gpus=1, tflops=800, lora=lora)
    program, *words = shlex.split(advice("one GPU", 1, 1, "none", part, config, read_preset(preset), preset)[1])
    cfg = load_config(workers.train_dit.TrainDiTConfig, words[0], words[1:])
    assert program == "kling-train" and cfg.lora == lora and cfg.init_from == "MODEL"
    of_dmd = advice("one GPU", 1, 1, "none", part, PlanConfig(method="dmd", gpus=1, lora=lora), read_preset(preset), preset)[1]
    assert "kling-distill method=dmd" in of_dmd and "lora.rank=4" in of_dmd


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("name", "gpus", "billions"), [("1.3b", 1, 1.42), ("14b", 8, 14.27)])
def test_large_models_with_every_method(name: str, gpus: int, billions: float) -> None:
    """81 frames of 480x832. A teacher takes 2 bytes of a weight and is cut like the rest; the critic 12, since it and the
    student have gradients in turn; low-rank weights take little beside the frozen networks, of 2 bytes each."""
    model, total = {"text_dim": 1024, **read_preset(f"dit/{name}.yaml")["model"]}, {}
    for lora in (Lora(), Lora(rank=64, half=True)):
        step = step_memory(model, (1, 16, 21, 60, 104), 128, partial(set_up, what="full", lora=lora))
        for method in ("train", "distill", "dmd", "align"):
            part = on_each_gpu(step, 1, gpus, 1, method=method, frozen=2, bf16=True)
            total[method, lora.rank] = part.total / 2**30
    print({key: round(value, 1) for key, value in total.items()})
    each = billions * 1e9 / gpus / 2**30  # GiB that a byte of every weight takes
    for method, size in (("distill", 2), ("dmd", 2 + 12), ("align", 8)):
        assert total[method, 0] - total["train", 0] == pytest.approx(size * each, rel=0.03)
    assert all(total[method, 64] < total[method, 0] for method in METHODS)


def test_a_plan_of_an_alignment_has_no_command_of_a_training(capsys: pytest.CaptureFixture) -> None:
    main(["configs/dit/debug.yaml", "gpus=1", "memory=80", "tflops=800", "height=64", "width=112", "method=align"])
    text = capsys.readouterr().out
    assert "for kling-align" in text and "kling-train" not in text
    with pytest.raises(SystemExit):
        main(["configs/dit/debug.yaml", "method=rl"])
    assert "unknown method 'rl'" in capsys.readouterr().err


def test_selective_checkpointing_keeps_products_and_attention_of_every_backend() -> None:
    """All of torch's attention kernels and products by name, and those of libraries; norms, gates and activations are recomputed."""
    attention = [name for name in dir(torch.ops.aten) if "attention" in name and "backward" not in name]
    assert len(attention) >= 5
    names = [f"aten.{name}.default" for name in attention]
    names += [f"aten.{name}.default" for name in ("mm", "addmm", "bmm", "baddbmm", "linear", "_scaled_mm", "convolution")]
    names += ["flash_attn._flash_attn_forward.default", "_diffusers_flash_attn_3.forward.default", "sageattention.sageattn.default",
              "xformers.efficient_attention_forward_cutlass.default", "flex_attention"]  # fmt: skip
    kept = {name: _keep_products(None, name) == CheckpointPolicy.MUST_SAVE for name in names}
    assert all(kept.values()), kept
    for name in (
        "add.Tensor",
        "mul.Tensor",
        "addcmul.default",
        "gelu.default",
        "native_layer_norm.default",
        "_softmax.default",
        "_to_copy.default",
    ):
        assert _keep_products(None, f"aten.{name}") == CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.slow
def test_a_14b_plan_on_a_laptop(capsys: pytest.CaptureFixture) -> None:
    main(["configs/dit/14b.yaml", "gpus=64", "memory=80", "tflops=800", "mfu=0.4"])
    text = capsys.readouterr().out
    assert "14.27" in text.splitlines()[0] and "32760 tokens" in text and "TFLOP a clip" in text
    assert "recommended    fsdp2, activation_checkpointing=full" in text


def peak_of_a_run(what: str, pipe) -> None:
    """A real step with optimizer and average in a new process: bytes of resident memory above those at the start."""
    torch.set_num_threads(1)
    ctypes.CDLL(None).mallopt(-3, 65536)  # M_MMAP_THRESHOLD: freed memory is returned, as a GPU's allocator reuses it
    torch.zeros(64, 64) @ torch.zeros(64, 64)
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    model = KlingTransformer3DModel(**MEASURED).train()
    set_checkpointing(model, what)
    optimizer = adamw(model, 1e-3)
    ema = EMA(model)
    for step in range(2):  # the moments are there from the second on
        model(torch.zeros(CLIP), torch.zeros(1), torch.zeros(1, 8, 32)).sample.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update(model, step)
    pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)


MEASURED = {"num_attention_heads": 6, "attention_head_dim": 64, "num_layers": 6, "ffn_dim": 1536, "text_dim": 32}
CLIP = (1, 16, 5, 32, 32)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["none", "full"])
def test_the_estimate_is_within_15_percent_of_a_run(what: str) -> None:
    ours, theirs = workers.PROCESSES.Pipe()
    process = workers.PROCESSES.Process(target=peak_of_a_run, args=(what, theirs))
    process.start()
    measured = ours.recv()
    process.join()
    estimate = on_each_gpu(step_memory(MEASURED, CLIP, 8, partial(set_checkpointing, what=what), bf16=False), 1, 1, 1).total
    print(f"{what}: measured {measured / 2**20:.0f} MiB, estimated {estimate / 2**20:.0f} MiB ({estimate / measured - 1:+.1%})")
    assert estimate == pytest.approx(measured, rel=0.15)
