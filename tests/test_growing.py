"""Extensions of a trained model: low-rank adapters and new conditions; and recomputed activations, which change no result."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import workers
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from torch._dynamo.utils import counters
from torch._inductor import config as inductor

from kling import KlingPipeline
from kling.config import load_config
from kling.dit import KlingTransformer3DModel
from kling.errors import UserError
from kling.sampling.pipeline import ASSETS
from kling.training.model import set_checkpointing
from kling.training.start import grow

train_dit = workers.train_dit
SMALL = {"num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 2, "ffn_dim": 64, "text_dim": 32}
NO_TASKS = "tasks={text: 1, image: 0, continuation: 0, inpaint: 0, restyle: 0, last: 0, first_last: 0, keyframes: 0}"
CAMERA = {"camera_channels": 24, "camera_fold": "pool", "camera_downscale": 1, "camera_residual_blocks": 0}


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return workers.debug_words(tmp_path_factory.mktemp("parts"), "batch=2", "save_every=100")


@pytest.fixture(scope="module")
def base(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text-to-video model without a camera and without kinds."""
    out = tmp_path_factory.mktemp("base") / "run"
    train_dit.main([*words, "steps=3", NO_TASKS,
                    "model.num_kinds=0", "model.camera_channels=0", f"out={out}"])  # fmt: skip
    return out / "export"


def make(pipe: KlingPipeline, **fields) -> torch.Tensor:
    return pipe("a red ball", num_frames=5, num_inference_steps=1, seed=3, output_type="latent", **fields).latents


def test_lora_trains_few_weights_is_saved_for_diffusers_and_merges(words: list[str], base: Path, tmp_path: Path) -> None:
    lora = ["model.num_kinds=0", "model.camera_channels=0", "tasks={text: 1, first_last: 0, last: 0, keyframes: 0}", f"init_from={base}"]
    train_dit.main([*words, *lora, "lora.rank=2", "lora.merge=true", "lr=0.05", "warmup=0", "ema=0", "steps=2", f"out={tmp_path}"])
    saved = load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    assert all(key.startswith("transformer.blocks.") and ".lora_" in key for key in saved)
    assert {key.split(".")[-2] for key in saved} == {"lora_A", "lora_B"}
    checkpoint = load_file(tmp_path / "step-00000002" / "model.safetensors")
    assert len(checkpoint) == len(saved) and all("lora_" in key for key in checkpoint), "the frozen model is not saved again"

    plain, merged = KlingPipeline.from_pretrained(base), KlingPipeline.from_pretrained(tmp_path / "export")
    before = make(plain)
    plain.load_lora_weights(tmp_path / "lora")
    with_lora = make(plain)
    assert not torch.allclose(before, with_lora, atol=1e-3), "it has an effect"
    torch.testing.assert_close(make(merged), with_lora, atol=0.05, rtol=0.05)  # the export is bf16
    plain.fuse_lora()
    torch.testing.assert_close(make(plain), with_lora, atol=1e-4, rtol=1e-4)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "pytorch_lora_weights.bin").write_bytes(b"a pickle")
    with pytest.raises(UserError, match="pytorch_lora_weights.bin, a pickle"):
        KlingPipeline.from_pretrained(base).load_lora_weights(tmp_path / "bad")


@pytest.mark.slow
def test_lora_trains_the_same_in_shards(words: list[str], base: Path, tmp_path: Path) -> None:
    lora = ["model.num_kinds=0", "model.camera_channels=0", "tasks={text: 1, first_last: 0, last: 0, keyframes: 0}", f"init_from={base}"]
    words = [*words, *lora, "lora.rank=2", "lr=0.05", "warmup=0", "ema=0", "steps=2"]
    train_dit.main([*words, "gradient_accumulation=2", f"out={tmp_path / 'alone'}"])
    assert workers.run([*words, f"out={tmp_path / 'shards'}"], workers.environment("fsdp2", 2, dp_shard=2)) == [0, 0]
    a, b = (load_file(tmp_path / name / "lora" / "pytorch_lora_weights.safetensors") for name in ("alone", "shards"))
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-4, atol=1e-5, msg=key)


def test_lora_mistakes(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        train_dit.main([*words, "lora.rank=2", f"out={tmp_path}"])
    assert "lora.rank is set but not init_from" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train_dit.main([*words, "compile=true", "activation_checkpointing=selective", f"out={tmp_path}"])
    assert "none or full" in capsys.readouterr().err


def test_a_grown_model_computes_the_same_until_it_is_trained(words: list[str], base: Path, tmp_path: Path) -> None:
    had = KlingTransformer3DModel.from_pretrained(base / "transformer")
    grown = grow(base / "transformer", {"num_kinds": 2, **CAMERA})
    assert had.kind_embedding is None and had.control_adapter is None and grown.config.num_kinds == 2
    z, sigma, text = torch.randn(1, 16, 2, 4, 6), torch.tensor([0.6]), torch.randn(1, 4, grown.config.text_dim)
    with torch.no_grad():
        expected = had(z, sigma, text).sample
        given = grown(z, sigma, text, kinds=torch.tensor([[0, 1]]), camera=torch.randn(1, 24, 2, 4, 6)).sample
    assert torch.equal(expected, given)

    train_dit.main([*words, "steps=2", f"init_from={base}", "model.num_kinds=2", "camera_drop=0", f"out={tmp_path}"])
    pipe = KlingPipeline.from_pretrained(tmp_path / "export")
    assert {"image", "first_last", "camera"} <= set(pipe.config.capabilities)
    assert pipe.transformer.control_adapter.conv.weight.abs().max() > 0, "the new inputs learn"
    with pytest.raises(UserError, match="model.num_layers = 2, not 3: only in_channels, num_kinds"):
        grow(base / "transformer", {"num_layers": 3})
    assert grow(tmp_path / "export" / "transformer", {"num_kinds": 1}).config.num_kinds == 2, "fewer kinds need no smaller table"


@pytest.mark.parametrize("preset", ["own", "world", "world-brush", "world-controls"])
def test_the_small_presets_go_on_from_the_shipped_model(preset: str) -> None:
    cfg = load_config(train_dit.TrainDiTConfig, f"dit/{preset}.yaml")
    had, weights = load_file(ASSETS / "transformer" / SAFETENSORS_WEIGHTS_NAME), grow(ASSETS / "transformer", cfg.model).state_dict()
    assert weights.keys() == had.keys() and all(torch.equal(weights[name], had[name].float()) for name in had)


@pytest.mark.parametrize("what", ["selective", "full"])
def test_recomputed_activations_give_the_same_gradients(what: str) -> None:
    torch.manual_seed(0)
    model = KlingTransformer3DModel(**SMALL)
    torch.nn.init.normal_(model.proj_out.weight)
    torch.nn.init.normal_(model.condition_embedder.time_proj.weight, std=0.1)
    z, sigma, text = torch.randn(1, 16, 2, 4, 6), torch.tensor([0.6]), torch.randn(1, 4, 32)
    gradients = []
    for mode in ("none", what):
        set_checkpointing(model, mode)
        model.zero_grad()
        model(z, sigma, text).sample.square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, grad in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], grad, msg=name)
    with pytest.raises(UserError, match="did you mean 'selective'"):
        set_checkpointing(model, "selectiv")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_compiled_blocks_train_as_eager_ones_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiles C++, with clips of one shape: each further shape would take most of a minute of a core."""
    monkeypatch.setattr(inductor, "compile_threads", 1)  # no pool of processes, each of which would import torch first
    words = workers.debug_words(tmp_path, "batch=2", "steps=3", NO_TASKS)
    (tmp_path / "encode.yaml").write_text("{clips: 6, shares: [1], shard: 3, workers: 0, data: {frames: [1, 5], aspects: ['16:9']}}")
    graphs = counters["stats"]["unique_graphs"]
    for name, extra in (("eager", []), ("compiled", ["compile=true"])):
        train_dit.main([*words, *extra, f"out={tmp_path / name}"])
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("eager", "compiled")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert counters["stats"]["unique_graphs"] > graphs, "something was compiled"
