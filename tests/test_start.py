"""Training from published weights: from a Wan folder to one that diffusers loads, full and low-rank, with all settings kept."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_wan
import torch
import workers
from accelerate.state import AcceleratorState
from diffusers import UniPCMultistepScheduler, WanImageToVideoPipeline, WanPipeline
from kling_programs.sample.export import main as kling_export
from kling_programs.train import encode
from PIL import Image
from safetensors.torch import load_file

from kling import KlingPipeline, KlingTransformer3DModel
from kling.cache.store import LatentCache
from kling.condition.state import Given, build_state
from kling.data.source import ClipSource, DataConfig
from kling.data.video import write_video
from kling.text.umt5 import UMT5TextEncoder
from kling.training.examples import Example, as_extra_channels
from kling.training.start import captions_of, grow

train_dit = workers.train_dit
ROW, I2V = "wan2.1-t2v-1.3b", "wan2.1-i2v-14b-480p"
FP32 = {"torch_dtype": torch.float32}
CAMERA = {"camera_channels": 24, "camera_fold": "pool", "camera_downscale": 1, "camera_residual_blocks": 0}


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_wan.saved("t2v", tmp_path_factory.mktemp("wan") / "tiny")


@pytest.fixture(scope="module")
def cache(wan: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five clips of the small world, encoded with the Wan folder's VAE and umT5."""
    return encoded(wan, tmp_path_factory.mktemp("cache") / "cache", "clips=5", "shard=3")


def encoded(wan: Path, out: Path, *more: str) -> Path:
    words = ["configs/cache/debug.yaml", "data.frames=[1,5]", "workers=0", "threads=1"]
    encode.main([*words, f"model={wan}", f"out={out}", *more])
    AcceleratorState._reset_state(reset_partial_state=True)  # the training that follows chooses its own precision
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


def test_the_cache_has_the_embeddings_of_the_wan_pipeline(wan: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_full_training_exports_to_diffusers(wan: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A Wan folder -> kling-train -> our folder -> kling-export -> diffusers, with scheduler, VAE and umT5 unchanged."""
    samples = "samples=[{prompt: a red ball, size: 48x32, num_frames: 5, num_inference_steps: 1}]"
    train_dit.main([*words(wan, cache, tmp_path / "run", "lora.rank=0", "lr=1e-3", samples, "sample_every=3")])
    assert len(list((tmp_path / "run" / "samples").glob("*.png"))) == 1
    pipe = KlingPipeline.from_pretrained(tmp_path / "run" / "export", **FP32)
    row = KlingPipeline.from_pretrained(wan, checkpoint=ROW, **FP32)
    assert isinstance(pipe.scheduler, UniPCMultistepScheduler) and pipe.scheduler.config.flow_shift == 3.0
    for name in ("fps", "sizes", "defaults", "licence", "max_frames"):
        assert json.dumps(pipe.config[name], sort_keys=True) == json.dumps(row.config[name], sort_keys=True), name
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


@pytest.mark.parametrize("half", [False, pytest.param(True, marks=pytest.mark.slow)])  # few CPUs multiply bf16
def test_low_rank_weights_have_the_same_effect_in_diffusers(half: bool, wan: Path, cache: Path, tmp_path: Path) -> None:
    extra = ["lora.half=true", "mixed_precision=bf16"] if half else []
    train_dit.main([*words(wan, cache, tmp_path, "lora.rank=2", "lora.alpha=4", "lr=0.05", *extra)])
    assert all(t.dtype == torch.float32 for t in weights(tmp_path / "lora").values()), "what is trained is fp32 always"
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
    """First frame, keyframes and camera on text-to-video weights: the output is unchanged until they are trained."""
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


def test_image_weights_get_the_inputs_of_their_original_pipeline(tmp_path: Path) -> None:
    """The extra channels and CLIP's tokens of a training example, against those of diffusers' image pipeline for the same frame."""
    wan = tiny_wan.saved("i2v", tmp_path / "wan")
    clips = ["clips=2", "shard=2", "data.aspects=['16:9']", "shares=[1]"]
    cache = LatentCache(encoded(wan, tmp_path / "cache", *clips, "image=true", "mixed_precision=fp32"))
    bucket = next(iter(cache.clips))
    batch = cache.batch(bucket, [0, 1], 5)
    source = ClipSource(DataConfig(frames=[1, 5], aspects=["16:9"]), seed=0)
    theirs = WanImageToVideoPipeline.from_pretrained(wan)
    model = KlingTransformer3DModel.from_pretrained(wan / "transformer")
    given = [Given(known=1), Given()]
    state = build_state(given, batch.latents, None)
    example = as_extra_channels(Example(state, ["", ""], None, torch.zeros(2, dtype=torch.bool)), batch, given, model.config)
    frame = Image.fromarray(np.asarray(source.clip(0, 5, "16:9").video[0]))
    H, W = frame.height, frame.width
    pixels = theirs.video_processor.preprocess(frame, height=H, width=W)
    with torch.no_grad():
        _, condition = theirs.prepare_latents(pixels, 1, 16, H, W, 5, torch.float32, torch.device("cpu"), torch.Generator())
        seen = theirs.encode_image(frame)
    torch.testing.assert_close(example.concat[:1], condition, atol=2e-3, rtol=2e-3)  # fp16 in the cache
    torch.testing.assert_close(example.seen[:1], seen, atol=2e-3, rtol=2e-3)
    assert not example.concat[1].any() and not example.seen[1].any(), "nothing given, nothing shown"
    assert example.state.mask.all() and torch.equal(example.state.clean, batch.latents), "all of the clip is made, the first frame too"

    train_dit.main(
        [*words(wan, cache.folder, tmp_path / "run", "lora.rank=0", "lr=1e-3", "tasks={image: 1, text: 1}", "checkpoint=" + I2V)]
    )
    pipe = KlingPipeline.from_pretrained(tmp_path / "run" / "export", **FP32)
    out = pipe("a ball", image=np.asarray(frame), size="48x32", num_frames=5, num_inference_steps=1, output_type="latent").latents
    assert out.isfinite().all() and pipe.image_encoder is not None and pipe.config.capabilities[0] == "image"
    moved = (pipe.transformer.patch_embedding.weight - model.patch_embedding.weight).abs().amax((0, 2, 3, 4))
    assert (moved > 1e-4).all(), "every input channel is trained"


def test_one_of_two_experts_is_trained_at_its_own_levels(cache: Path, tmp_path: Path) -> None:
    wan = tiny_wan.saved("t2v-a14b", tmp_path / "wan")
    a14b = ["checkpoint=wan2.2-t2v-a14b", "lora.rank=0", "lr=1e-3", "expert=low", "steps=2", "batch=4"]
    train_dit.main([*words(wan, cache, tmp_path / "run", *a14b)])
    for part, changed in (("transformer", False), ("transformer_2", True)):
        before, after = weights(wan / part), weights(tmp_path / "run" / "export" / part)
        assert torch.equal(before["proj_out.weight"].bfloat16(), after["proj_out.weight"]) != changed, part
    levels = [line for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines() if "loss/" in line]
    assert levels and KlingPipeline.from_pretrained(tmp_path / "run" / "export", **FP32).config.boundary_ratio == 0.875


def test_channels_grow_onto_text_weights(wan: Path, cache: Path, tmp_path: Path) -> None:
    """The channel group of Fun Camera on weights without it: it starts at zero, and learns from the first frames in the cache."""
    train_dit.main([*words(wan, cache, tmp_path, "lora.rank=0", "lr=1e-3", "model.in_channels=32", "tasks={image: 1, continuation: 1}")])
    had = KlingTransformer3DModel.from_pretrained(wan / "transformer")
    pipe = KlingPipeline.from_pretrained(tmp_path / "export", **FP32)
    assert had.config.in_channels == 16 and pipe.groups == ("first",)
    assert pipe.transformer.patch_embedding.weight[:, 16:].abs().amax() > 0
    image = torch.randint(0, 256, (32, 48, 3), dtype=torch.uint8).numpy()
    assert (made(pipe, image=image) - made(pipe)).abs().max() > 0


def test_resuming_is_exact(wan: Path, cache: Path, tmp_path: Path) -> None:
    train_dit.main([*words(wan, cache, tmp_path / "whole", "lora.rank=2", "steps=4", "save_every=2")])
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for name in ("step-00000004", "lora"):
        shutil.rmtree(tmp_path / "cut" / name)
    (tmp_path / "cut" / "latest").write_text("step-00000002")
    train_dit.main([*words(wan, cache, tmp_path / "cut", "lora.rank=2", "steps=4", "save_every=2")])
    whole, cut = (weights(tmp_path / name / "lora") for name in ("whole", "cut"))
    assert whole.keys() == cut.keys() and all(torch.equal(whole[name], cut[name]) for name in whole)


@pytest.mark.parametrize("few", [False, True], ids=["published", "few-step"])
def test_umt5_reads_all_words_of_samples_before_the_transformer(
    wan: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few: bool
) -> None:
    """Shots and negative prompts too: later it would be loaded beside the transformer. An export for few steps has no negative prompt."""
    if few:
        pipe = KlingPipeline.from_pretrained(wan, checkpoint=ROW, **FP32)
        pipe.register_to_config(defaults=None)
        pipe.save_pretrained(tmp_path / "few")
    samples = "samples=[{shots: [{prompt: a ball, seconds: 1}, {prompt: a cube, seconds: 1}]}, {prompt: a cone, negative_prompt: ugly}]"
    read: list[str] = []

    def then_stop(text: object, folder: object, prompts: list[str], *rest: object) -> None:
        read.extend(prompts)
        raise SystemExit

    monkeypatch.setattr(train_dit, "complete_text", then_stop)
    start = [f"init_from={tmp_path / 'few'}", "checkpoint=null", f"vae={wan}"] if few else []
    with pytest.raises(SystemExit):
        train_dit.main([*words(wan, cache, tmp_path / "run", *start, "sample_every=1", samples)])
    own = "" if few else KlingPipeline.from_pretrained(wan, checkpoint=ROW, weights=False).setting("negative_prompt")
    assert set(read) == {"a ball", "a cube", "a cone", "ugly", own}


@pytest.mark.slow
def test_own_videos_through_both_presets(wan: Path, tmp_path: Path) -> None:
    """Two mp4s with captions in two languages -> kling-encode -> kling-train, as in docs/own-videos.md, at a small size."""
    (tmp_path / "cats").mkdir()
    for name, caption in (("a", "a red ball"), ("b", "一个红色的球")):
        write_video(tmp_path / "cats" / f"{name}.mp4", np.random.default_rng(0).integers(0, 255, (24, 64, 112, 3), dtype=np.uint8), 16)
        (tmp_path / "cats" / f"{name}.txt").write_text(caption, encoding="utf-8")
    source = [f"data.source={tmp_path / 'cats'}", "data.frames=[5]", "data.scale=1", "workers=0", "threads=1"]
    encode.main(["configs/cache/wan.yaml", *source, f"model={wan}", f"out={tmp_path / 'cache'}"])
    assert captions_of(tmp_path / "cache") == ["", "a red ball", "一个红色的球"]
    train_dit.main([*words(wan, tmp_path / "cache", tmp_path / "run", "lora.rank=2", "steps=2")])
    assert (tmp_path / "run" / "lora" / "pytorch_lora_weights.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("config", ["fsdp2", "ddp"])
def test_two_processes_train_like_one(config: str, wan: Path, cache: Path, tmp_path: Path) -> None:
    full = ["lora.rank=0", "lr=1e-3", "steps=2"]
    train_dit.main([*words(wan, cache, tmp_path / "one", *full, "gradient_accumulation=2")])
    env = workers.environment(config, 2, **({"dp_shard": 2} if config == "fsdp2" else {}))
    assert workers.run(words(wan, cache, tmp_path / "two", *full), env) == [0, 0]
    one, two = ([json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()] for run in ("one", "two"))
    assert [line["loss"] for line in one] == pytest.approx([line["loss"] for line in two], rel=1e-5)
    assert (tmp_path / "two" / "export" / "tokenizer").is_dir()


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
        (["lora.half=true"], "does not compute in it: set mixed_precision=bf16"),
        (["expert=low"], "one transformer: leave it out"),
        (["model.in_channels=33"], "33 input channels"),
        (["model.in_channels=36", "tasks={image: 1}"], "holds none: kling-encode with image=true"),
        (["model.in_channels=32", "tasks={keyframes: 1}"], "cannot learn tasks.keyframes so: text, image, continuation"),
    ],
)
def test_mistakes_are_one_line(more: list[str], message: str, wan: Path, cache: Path, tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        train_dit.main([*words(wan, cache, tmp_path, *more)])
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and re.search(message, lines[-1]), lines
