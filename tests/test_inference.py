"""Machine settings: offload, fp8, attention, caches and shared tokens, from the command line to the model; and the memory estimate."""

from __future__ import annotations

import json
import re
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_wan
import torch
from kling_programs.sample import generate
from safetensors.torch import save_file

from kling import AutoencoderKLKling, KlingPipeline, KlingTransformer3DModel, Request
from kling.errors import UserError
from kling.sampling.machine import Machine, read_ratios, set_up, share_tokens, write_ratios
from kling.sampling.memory import advice, estimate

ROW = "wan2.1-t2v-1.3b"
CPU = torch.device("cpu")
SHORT = {"num_frames": 5, "size": "48x32", "num_inference_steps": 4, "output_type": "latent"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_wan.saved("t2v", tmp_path_factory.mktemp("wan"))


def fresh(folder: Path) -> KlingPipeline:
    return KlingPipeline.from_pretrained(folder, checkpoint=ROW, torch_dtype=torch.float32)


@pytest.fixture(scope="module")
def plain(folder: Path) -> torch.Tensor:
    return fresh(folder)("a ball", **SHORT).latents


def ratios(path: Path, value: float) -> str:
    path.write_text(json.dumps([[value] * 4]))
    return str(path)


# ---- step caches ----


@pytest.mark.parametrize("cache", ["first-block=0", "taylorseer=1", "mag={ratios}:0"])
def test_a_cache_at_threshold_0_changes_nothing(cache: str, folder: Path, plain: torch.Tensor, tmp_path: Path) -> None:
    pipe = fresh(folder)
    set_up(pipe, Machine(cache=cache.format(ratios=ratios(tmp_path / "r.json", 0.5))), CPU, steps=4)
    assert torch.equal(pipe("a ball", **SHORT).latents, plain)


@pytest.mark.parametrize("cache", ["first-block=1e9", "taylorseer=4", "mag={ratios}:1e9"])
def test_a_cache_skips_work_and_is_reset_between_videos(cache: str, folder: Path, plain: torch.Tensor, tmp_path: Path) -> None:
    pipe = fresh(folder)
    set_up(pipe, Machine(cache=cache.format(ratios=ratios(tmp_path / "r.json", 1.0))), CPU, steps=4)
    calls: list[int] = []
    layer = pipe.transformer.blocks[1].attn1.to_q
    layer.register_forward_hook(lambda *_: calls.append(1))
    steps = SHORT | {"num_inference_steps": 8}
    first = pipe("a ball", **steps).latents
    assert 0 < len(calls) < 16, "8 steps with guidance"
    assert torch.equal(pipe("a ball", **steps).latents, first)


@pytest.mark.parametrize("layout", ["t2v", "t2v-a14b"])
def test_calibration_measures_the_ratios_for_mag(layout: str, tmp_path: Path) -> None:
    """The ratios of the blocks' contributions, against hooks of our own; and `mag` accepts the file."""
    pipe = KlingPipeline.from_pretrained(
        tiny_wan.saved(layout, tmp_path / "wan"), checkpoint="wan2.2-t2v-a14b" if "a14b" in layout else ROW, torch_dtype=torch.float32
    )
    added: list[list[torch.Tensor]] = [[] for _ in pipe.experts]
    for number, model in enumerate(pipe.experts):
        enters: list[torch.Tensor] = []
        model.blocks[0].register_forward_pre_hook(lambda _, args, enters=enters: enters.append(args[0]))
        model.blocks[-1].register_forward_hook(lambda _, args, out, number=number, enters=enters: added[number].append(out - enters[-1]))
    machine = Machine(cache=f"calibrate={tmp_path / 'ratios.json'}")
    set_up(pipe, machine, CPU, steps=6)
    steps = SHORT | {"num_inference_steps": 6}
    pipe("a ball", **steps)
    rows = json.loads(write_ratios(pipe, machine.cache).read_text())
    assert len(rows) == len(pipe.experts) and sum(map(len, rows)) == 6
    for row, residuals in zip(rows, added, strict=True):
        sizes = [r.norm(dim=-1) for r in residuals[::2]]  # with guidance, every other pass is of the prompt
        expected = [1.0] + [float((b / (a + 1e-8)).mean()) for a, b in zip(sizes, sizes[1:], strict=False)]
        assert row == pytest.approx(expected, rel=1e-4)
    again = KlingPipeline.from_pretrained(
        tmp_path / "wan", checkpoint="wan2.2-t2v-a14b" if "a14b" in layout else ROW, torch_dtype=torch.float32
    )
    set_up(again, Machine(cache=f"mag={tmp_path / 'ratios.json'}:1e9"), CPU, steps=6)
    assert again("a ball", **steps).latents.isfinite().all()
    with pytest.raises(UserError, match=f"ratios of {len(rows)} experts and this model has {3 - len(rows)}"):
        read_ratios(str(tmp_path / "ratios.json"), 3 - len(rows))


# ---- attention, fp8, offload, context parallelism ----


def test_attention_and_fp8_reach_every_layer(folder: Path, plain: torch.Tensor) -> None:
    pipe = fresh(folder)
    set_up(pipe, Machine(attention="math", fp8=True), CPU, steps=4)
    assert all(block.attn1.processor._attention_backend == "_native_math" for block in pipe.transformer.blocks)
    assert pipe.transformer.blocks[0].ffn.net[2].weight.dtype == torch.float8_e4m3fn
    rounded = pipe("a ball", **SHORT).latents
    assert 0 < (rounded - plain).norm() < 0.3 * plain.norm()


def test_every_block_is_compiled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []
    plain = fresh(folder)("a ball", **SHORT).latents  # with the attention of the last test, which is still diffusers' default
    monkeypatch.setattr(torch, "compile", lambda call, *_, **__: calls.append(call) or call)  # compiling would take a minute on a core
    pipe = fresh(folder)
    set_up(pipe, Machine(compile=True), CPU, steps=4)
    assert len(calls) == len(pipe.transformer.blocks) and torch.equal(pipe("a ball", **SHORT).latents, plain)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": "xformers"}, "--attention xformers needs a CUDA device.*native"),
        ({"attention": "sage"}, "needs a CUDA device"),
        ({"attention": "xformer"}, "did you mean 'xformers'"),
        ({"offload": "model"}, "--offload model.*CPU: leave it out"),
        ({"offload": "blocks"}, "offload 'blocks'.*model, group"),
        ({"cache": "teacache=1"}, "cache 'teacache=1'"),
        ({"cache": "first-block=x"}, "write a number after the =, as in first-block=0.1"),
        ({"cache": "mag=0.1"}, "needs the ratios of these weights.*--cache calibrate=ratios.json"),
        ({"cache": "calibrate"}, "say where to write the ratios"),
        ({"cache": "first-block=nan"}, "give at least 0"),
        ({"cache": "taylorseer=0"}, "give at least 1"),
        ({"tiles": 7}, "--tiles 7: give at least 32"),
        ({"context_parallel": 0}, "--context-parallel 0: give at least 1"),
        ({"context_parallel": 2}, "needs 2 processes and this is one of 1: start it with torchrun"),
    ],
)
def test_unavailable_options_are_refused(options: dict, message: str, folder: Path) -> None:
    with pytest.raises(UserError, match=message) as error:
        set_up(fresh(folder), Machine(**options), CPU, steps=4)
    assert "\n" not in str(error.value)


def test_heads_must_divide_and_blocks_take_no_cache(folder: Path) -> None:
    pipe = fresh(folder)
    with pytest.raises(UserError, match="splits heads, and this model has 1"):
        share_tokens(pipe.experts, 2)
    pipe.register_to_config(block_frames=3)
    with pytest.raises(UserError, match="block by block"):
        set_up(pipe, Machine(cache="first-block=0.1"), CPU, steps=4)


# ---- from the command line ----


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = 0
    try:
        generate.main(list(argv))
    except SystemExit as stop:
        code = stop.code
    out = capsys.readouterr()
    return code, out.out, out.err


def test_kling_sample_accepts_all_machine_options(folder: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    key = "diffusion_model.blocks.0.self_attn.q"
    save_file({f"{key}.lora_down.weight": torch.randn(4, 128), f"{key}.lora_up.weight": torch.randn(128, 4)}, tmp_path / "l.safetensors")
    seen: dict[str, object] = {}

    def look(pipe: KlingPipeline, *args: object) -> None:
        seen.update(cache=pipe.transformer._cache_config, backend=pipe.transformer.blocks[0].attn1.processor._attention_backend)
        seen.update(tiles=pipe.vae.tiles.size, lora=pipe.get_active_adapters(), stored=pipe.transformer.blocks[0].attn1.to_k.weight.dtype)

    sample = generate.sample
    monkeypatch.setattr(generate, "sample", lambda pipe, *args: look(pipe) or sample(pipe, *args))
    argv = ["a ball", "--model", str(folder), "--checkpoint", ROW, "--dtype", "fp32", "--size", "48x32", "--num-frames", "5"]
    argv += ["--num-inference-steps", "2", "--seed", "1", "--output", str(tmp_path / "a.mp4"), "--device", "cpu"]
    extra = ["--lora", f"{tmp_path / 'l.safetensors'}:0.5", "--attention", "math", "--cache", "first-block=0.2", "--fp8"]
    extra += ["--text-cache", str(tmp_path / "text"), "--tiles", "32"]
    code, out, err = run(capsys, *argv, *extra)
    assert code == 0, err
    assert seen["lora"] == ["high0"] and seen["backend"] == "_native_math" and seen["cache"].threshold == 0.2
    assert seen["tiles"] == 32
    assert seen["stored"] == torch.float8_e4m3fn and (tmp_path / "a.mp4").stat().st_size > 0
    record = json.loads((tmp_path / "a.mp4.json").read_text())
    assert str(tmp_path / "l.safetensors") in record["model"]["sha256"]
    assert len(list((tmp_path / "text").rglob("*.safetensors"))) == 2, "the prompt's embedding and the negative one's"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--offload", "group"], "--offload group"),
        (["--attention", "flash"], "needs a CUDA device"),
        (["--tiles", "100"], "tiles of 100.*multiples of 8"),
        (["--dtype", "int8"], "dtype 'int8'.*fp32, bf16, fp16"),
        (["--checkpoint", "wan"], "unknown checkpoint 'wan'"),
        (["--transformer", "none.safetensors"], "none.safetensors' do not exist"),
        (["--lora", "none.safetensors:0.5"], "none.safetensors' do not exist"),
        (["--control", "none.mp4"], "none.mp4 does not exist"),
        (["--size", "480"], "size '480'.*832x480"),
        (["--size", "50x32"], "size 50x32 does not divide.*48x32"),
        (["--frame-delay", "1"], "not trained for 'diffusion_forcing'"),
    ],
)
def test_kling_sample_refuses_in_one_line(argv: list[str], message: str, folder: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint = [] if "--checkpoint" in argv else ["--checkpoint", ROW]
    code, _, err = run(capsys, "a", "--model", str(folder), *checkpoint, "--num-frames", "5", "--device", "cpu", *argv)
    lines = [line for line in err.splitlines() if not line.startswith("precision ")]
    assert code == 2 and len(lines) == 1 and re.search(message, err), err
    assert not list(tmp_path.glob("out/*"))


# ---- the estimate ----


@pytest.fixture(scope="module")
def large(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a 14B model, without its weights."""
    place = tmp_path_factory.mktemp("14b")
    for part in ("vae", "transformer", "scheduler", "tokenizer", "text_encoder"):
        (place / part).mkdir()
        for file in (folder / part).glob("*.json"):
            (place / part / file.name).write_text(file.read_text())
    (place / "model_index.json").write_text((folder / "model_index.json").read_text())
    config = place / "transformer" / "config.json"
    published = {"num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824, "text_dim": 4096, "freq_dim": 256}
    config.write_text(json.dumps(json.loads(config.read_text()) | published))
    return place


def test_a_dry_run_needs_no_weights_and_names_the_setting_that_fits(large: Path) -> None:
    pipe = KlingPipeline.from_pretrained(large, weights=False)
    plan = pipe.plan(Request("a"))
    assert plan.tokens == 21 * 45 * 80 and (plan.height, plan.width) == (720, 1280)  # the registry's row of the 14B model
    memory = estimate(pipe, plan, Machine())
    assert memory.transformer == pytest.approx(2 * 14.29e9, rel=0.01), "14.3 billion numbers of two bytes"
    assert estimate(pipe, plan, Machine(fp8=True)).transformer == pytest.approx(14.3e9, rel=0.02)
    gib = 2**30
    assert advice(pipe, plan, Machine(), 80 * gib) == "fits"
    needs = [advice(pipe, plan, Machine(), room * gib) for room in (24, 14, 1)]
    assert "--fp8 would" in needs[0] and "--offload" in needs[1] and "with any offloading" in needs[2]
    peaks = [estimate(pipe, plan, Machine(offload=way)).peak for way in (None, "model", "group")]
    assert peaks[0] >= peaks[1] > peaks[2]
    assert estimate(pipe, plan, Machine(context_parallel=4)).activations == pytest.approx(memory.activations / 4, rel=0.01)


def test_tiles_are_advised_where_decoding_is_what_does_not_fit(large: Path) -> None:
    pipe = KlingPipeline.from_pretrained(large, weights=False)
    with torch.device("meta"):
        pipe.vae = AutoencoderKLKling()
    plan = pipe.plan(Request("a"))
    whole, tiled = (estimate(pipe, plan, Machine(tiles=tiles)).decoding for tiles in (None, 256))
    assert whole > 20 * 2**30 and tiled == pytest.approx(whole * 256**2 / (720 * 1280))
    assert advice(pipe, plan, Machine(), 20 * 2**30).startswith("does not fit; --offload group --tiles 256 would")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rule_for_activations_agrees_with_the_profiler(dtype: torch.dtype, tmp_path: Path) -> None:
    from torch.profiler import ProfilerActivity, profile

    config = {"num_attention_heads": 1, "attention_head_dim": 128, "text_dim": 32, "freq_dim": 32, "ffn_dim": 512, "num_layers": 2}
    model = KlingTransformer3DModel(**config).to(dtype).eval()
    model.set_attention_backend("native")  # a choice holds for the whole process, and another test may have made one
    z, text = torch.randn(1, 16, 2, 32, 32, dtype=dtype), torch.randn(1, 16, 32, dtype=dtype)
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        model(z, torch.tensor([0.5]), text)
    trace.export_chrome_trace(str(tmp_path / "trace.json"))
    events = [event for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"] if event.get("name") == "[memory]"]
    peak = max(accumulate(event["args"]["Bytes"] for event in sorted(events, key=lambda event: event["ts"])))
    pipe = SimpleNamespace(experts=[model], transformer=model, vae=AutoencoderKLKling(base_dim=4), text_encoder=model)
    plan = SimpleNamespace(tokens=512, height=16, width=16)
    assert estimate(pipe, plan, Machine()).activations == pytest.approx(peak, rel=0.15)


def test_kling_sample_prints_the_estimate(folder: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, "a", "--model", str(folder), "--checkpoint", ROW, "--dry-run", "--device", "cpu", "--seed", "1")
    assert code == 0, err
    assert re.search(r"weights +transformer \d+ MiB, VAE", out)
    assert re.search(r"room +.* free on cpu: (fits|does not fit)", out)
    assert "Apache-2.0" in out and not list(tmp_path.iterdir())


@pytest.mark.gpu
@pytest.mark.parametrize("offload", ["model", "group"])
def test_offloading_changes_nothing(offload: str, folder: Path) -> None:
    device, pipe = torch.device("cuda"), fresh(folder)
    set_up(pipe, Machine(), device, steps=4)
    expected = pipe("a ball", **SHORT).latents.cpu()
    moved = fresh(folder)
    set_up(moved, Machine(offload=offload), device, steps=4)
    torch.testing.assert_close(moved("a ball", **SHORT).latents.cpu(), expected, atol=1e-4, rtol=1e-4)
