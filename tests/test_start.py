"""Training that starts from published weights: from a Wan folder to one that diffusers loads, in full and low-rank, nothing forgotten."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import tiny_wan
import torch
import workers
from diffusers import UniPCMultistepScheduler, WanPipeline
from kling_programs.sample.export import main as kling_export
from kling_programs.train import encode
from safetensors.torch import load_file

from kling import KlingPipeline, KlingTransformer3DModel
from kling.cache import LatentCache, captions_of
from kling.start import grow
from kling.text.umt5 import UMT5TextEncoder

train_dit = workers.train_dit
ROW = "wan2.1-t2v-1.3b"
FP32 = {"torch_dtype": torch.float32}
CAMERA = {"camera_channels": 24, "camera_fold": "pool", "camera_downscale": 1, "camera_residual_blocks": 0}


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_wan.saved("t2v", tmp_path_factory.mktemp("wan") / "tiny")


@pytest.fixture(scope="module")
def cache(wan: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five clips of the small world, encoded by the Wan folder's VAE and umT5."""
    out = tmp_path_factory.mktemp("cache") / "cache"
    words = ["configs/cache/world.yaml", "clips=5", "shard=3", "data.frames=[1,5]", "workers=0", "threads=1"]
    encode.main([*words, f"model={wan}", f"out={out}"])
    return out


def words(wan: Path, cache: Path, out: Path, *more: str) -> list[str]:
    return [
        "configs/dit/wan.yaml", f"init_from={wan}", f"checkpoint={ROW}", f"cache={cache}", f"out={out}", "frames=[5]", "batch=2",
        "workers=0", "threads=1", "mixed_precision=fp32", "warmup=0", "log_every=1", "steps=3", "ema=0", *more,
    ]  # fmt: skip


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def made(pipe: KlingPipeline, **fields: object) -> torch.Tensor:
    fields = {"size": "48x32", "num_frames": 5, "num_inference_steps": 2, "seed": 3, "output_type": "latent"} | fields
    return pipe("a red ball", **fields).latents


def test_the_cache_holds_the_embeddings_that_wan_would_compute(wan: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    captions = captions_of(cache)
    assert "" in captions and len(captions) > 8 and any("球" in c or "方块" in c for c in captions), "both languages, and none"
    assert len(list((cache / "text").rglob("*.safetensors"))) == len(captions)
    text = UMT5TextEncoder(wan, cache=cache / "text")
    monkeypatch.setattr(text, "_load", lambda device: pytest.fail("everything is on disk"))
    theirs = WanPipeline.from_pretrained(wan, torch_dtype=torch.bfloat16)
    for caption in ("", captions[5]):
        expected, _ = theirs.encode_prompt(caption, do_classifier_free_guidance=False, max_sequence_length=512)
        ours = text.encode([caption])
        assert (ours - expected).norm() < 1e-2 * expected.norm(), "they differ by roundings of bf16"
        assert ours.shape == (1, 512, 32) and not ours[:, len(caption) + 1 :].any(), "one token a letter here, an end, and zeros"
    batch = next(iter(LatentCache(cache).clips))
    latents = LatentCache(cache).batch(batch, [0], 5).latents
    assert latents.shape == (1, 16, 2, *latents.shape[3:])


def test_every_weight_trained_and_given_back(wan: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A Wan folder -> kling-train -> our folder -> kling-export -> diffusers, with the scheduler, the VAE and umT5 as they were."""
    samples = "samples=[{prompt: a red ball, size: 48x32, num_frames: 5, num_inference_steps: 1}]"
    train_dit.main([*words(wan, cache, tmp_path / "run", "lora.rank=0", "lr=1e-3", samples, "sample_every=3")])
    assert len(list((tmp_path / "run" / "samples").glob("*.png"))) == 1
    pipe = KlingPipeline.from_pretrained(tmp_path / "run" / "export", **FP32)
    row = KlingPipeline.from_pretrained(wan, checkpoint=ROW, **FP32)
    assert isinstance(pipe.scheduler, UniPCMultistepScheduler) and pipe.scheduler.config.flow_shift == 3.0
    for name in ("fps", "sizes", "defaults", "licence", "max_frames"):
        assert json.dumps(pipe.config[name]) == json.dumps(row.config[name]), name
    assert set(pipe.config.capabilities) == set(row.config.capabilities)
    assert (made(pipe) - made(row)).abs().max() > 1e-3, "it has learned something"
    for part in ("vae", "text_encoder"):
        before, after = weights(wan / part), weights(tmp_path / "run" / "export" / part)
        assert before.keys() == after.keys() and all(torch.equal(after[name], t) for name, t in before.items()), part

    kling_export([str(tmp_path / "run" / "export"), str(tmp_path / "diffusers")])
    theirs = WanPipeline.from_pretrained(tmp_path / "diffusers")
    theirs.set_progress_bar_config(disable=True)
    assert theirs.scheduler.config.flow_shift == 3.0 and not theirs.config.expand_timesteps
    noise = torch.randn(1, 16, 2, 4, 6, generator=torch.Generator().manual_seed(0))
    options = {"num_frames": 5, "num_inference_steps": 2, "output_type": "latent"}
    negative = pipe.setting("negative_prompt")
    expected = theirs("a red ball", negative, height=32, width=48, guidance_scale=6.0, latents=noise, **options).frames
    torch.testing.assert_close(pipe("a red ball", size="48x32", latents=noise, **options).latents, expected, atol=1e-4, rtol=0)
    assert theirs.transformer.blocks[0].attn1.to_q.weight.dtype == torch.float32 and "text embeddings" in capsys.readouterr().err


def test_low_rank_weights_have_the_same_effect_in_diffusers(wan: Path, cache: Path, tmp_path: Path) -> None:
    train_dit.main([*words(wan, cache, tmp_path, "lora.rank=2", "lora.alpha=4", "lr=0.05")])
    assert not (tmp_path / "export").exists(), "the model itself has not changed"
    pipe, theirs = KlingPipeline.from_pretrained(wan, checkpoint=ROW, **FP32), WanPipeline.from_pretrained(wan)
    plain = made(pipe)
    pipe.load_lora_weights(tmp_path / "lora")
    theirs.load_lora_weights(tmp_path / "lora")
    z, text = torch.randn(1, 16, 2, 4, 6), torch.randn(1, 7, 32)
    with torch.no_grad():
        a = pipe.transformer(z, torch.tensor([0.5], dtype=torch.float64), text).sample
        b = theirs.transformer(z, torch.tensor([500]), text).sample
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert (made(pipe) - plain).abs().max() > 1e-3


def test_conditions_grow_onto_wan_and_learn(wan: Path, cache: Path, tmp_path: Path) -> None:
    """First frame, keyframes and camera on text-to-video weights: nothing changes until they are trained."""
    had = KlingTransformer3DModel.from_pretrained(wan / "transformer")
    grown = grow(wan / "transformer", {"num_kinds": 2, **CAMERA})
    z, sigma, text = torch.randn(1, 16, 2, 4, 6), torch.tensor([0.6]), torch.randn(1, 4, 32)
    with torch.no_grad():
        given = grown(z, sigma, text, kinds=torch.tensor([[0, 1]]), camera=torch.randn(1, 24, 2, 4, 6)).sample
        assert torch.equal(had(z, sigma, text).sample, given)
    extras = ["lora.rank=0", "lr=1e-3", "model.num_kinds=2", *(f"model.{key}={value}" for key, value in CAMERA.items()), "camera_drop=0"]
    train_dit.main([*words(wan, cache, tmp_path, *extras, "tasks={text: 1, image: 1, keyframes: 2}")])
    pipe = KlingPipeline.from_pretrained(tmp_path / "export", **FP32)
    assert {"text", "image", "keyframes", "camera"} <= set(pipe.config.capabilities)
    assert pipe.transformer.control_adapter.conv.weight.abs().max() > 0 and pipe.transformer.kind_embedding.weight.abs().max() > 0
    image = torch.randint(0, 256, (32, 48, 3), dtype=torch.uint8).numpy()
    assert (made(pipe, image=image, camera="pan=5") - made(pipe, image=image)).abs().max() > 0


def test_resuming_is_exact(wan: Path, cache: Path, tmp_path: Path) -> None:
    train_dit.main([*words(wan, cache, tmp_path / "whole", "lora.rank=2", "steps=4", "save_every=2")])
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for name in ("step-00000004", "lora"):
        shutil.rmtree(tmp_path / "cut" / name)
    (tmp_path / "cut" / "latest").write_text("step-00000002")
    train_dit.main([*words(wan, cache, tmp_path / "cut", "lora.rank=2", "steps=4", "save_every=2")])
    whole, cut = (weights(tmp_path / name / "lora") for name in ("whole", "cut"))
    assert whole.keys() == cut.keys() and all(torch.equal(whole[name], cut[name]) for name in whole)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["text.byte_dim=32"], "umT5, which is not trained: leave text.byte_dim out"),
        (["scheduler.solver=euler"], "scheduler.solver is set.*keeps its UniPCMultistepScheduler"),
        (["model.num_layers=3"], "model.num_layers = 2, not 3"),
        (["model.num_kind=2"], "unknown key of model 'num_kind'.*'num_kinds'"),
        (["vae=kling/assets"], "made with another VAE"),
        (["checkpoint=wan2.1-t2v"], "unknown checkpoint 'wan2.1-t2v'"),
        (["init_from=null"], "set but not init_from"),
    ],
)
def test_mistakes_are_one_line(more: list[str], message: str, wan: Path, cache: Path, tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        train_dit.main([*words(wan, cache, tmp_path, *more)])
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and re.search(message, lines[-1]), lines
