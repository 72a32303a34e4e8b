"""The training programs on their debug presets: they learn, resume exactly, refuse changed settings, and export a model that samples."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "train")]
import encode  # noqa: E402
import train_dit  # noqa: E402
import train_text  # noqa: E402
import train_vae  # noqa: E402

from kling import KlingPipeline  # noqa: E402
from kling.cache.batches import LatentSteps  # noqa: E402
from kling.cache.store import LatentCache  # noqa: E402
from kling.config import load_config  # noqa: E402
from kling.data.video import write_video  # noqa: E402
from kling.sampling.pipeline import load_vae  # noqa: E402

VAE = [
    "configs/vae/debug.yaml",
    "model.base_dim=4",
    "model.decoder_base_dim=4",
    "model.dim_mult=[1,1,1]",
    "schedule=constant",
    "batch=1",
    "data.frames=[5]",
    "eval_clips=1",
    "workers=0",
    "log_every=1",
    "save_every=2",
    "eval_every=4",
    "mixed_precision=fp32",
]
CACHE = ["configs/cache/debug.yaml", "clips=8", "shard=3", "data.frames=[1,5]", "workers=0"]
DIT = [
    "configs/dit/debug.yaml", "frames=[5]", "max_frames=5", "workers=0", "log_every=1", "save_every=2", "sample_every=4",
    "samples=[{prompt: a ball, num_frames: 5}]", "mixed_precision=fp32",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def in_the_repository():
    import os

    before = os.getcwd()
    os.chdir(ROOT)
    yield
    os.chdir(before)


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("vae") / "run"
    train_vae.main([*VAE, f"out={out}", "steps=4"])
    return out


@pytest.fixture(scope="module")
def cache(vae, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("cache") / "cache"
    encode.main([*CACHE, f"vae={vae / 'export'}", f"out={out}"])
    return out


def train(vae: Path, cache: Path, out: Path, *words: str) -> None:
    preset = out.parent / "encode.yaml"
    preset.write_text("\n".join(["clips: 8", "shard: 3", "workers: 0", "data: {frames: [1, 5]}"]), encoding="utf-8")
    train_dit.main([*DIT, f"vae={vae / 'export'}", f"cache={cache}", f"encode={preset}", f"out={out}", *words])


def weights(run: Path) -> dict[str, torch.Tensor]:
    folder = run / (run / "latest").read_text().strip()
    return {f"{file.stem}/{name}": t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_resumed_vae_run_is_bit_equal(vae, tmp_path):
    train_vae.main([*VAE, f"out={tmp_path}", "steps=2"])
    torch.rand(5)  # an unrelated draw changes nothing
    train_vae.main([*VAE, f"out={tmp_path}", "steps=4"])
    assert_same(weights(vae), weights(tmp_path))


def test_the_vae_is_exported_with_measured_statistics(vae):
    config = json.loads((vae / "export" / "config.json").read_text())
    assert len(config["latents_std"]) == config["z_dim"] and min(config["latents_std"]) > 0 and any(config["latents_mean"])
    assert list((vae / "samples").glob("*.png"))
    lines = [json.loads(line) for line in (vae / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]


def test_statistics_are_those_of_the_latents_that_are_exported(vae, tmp_path):
    """quant_conv makes the latents too, here twice as large: only with both parts frozen do they stay."""
    cfg, before = load_config(train_vae.TrainVAEConfig, vae / "config.yaml"), json.loads((vae / "export" / "config.json").read_text())
    for freeze, times in ((["encoder"], 2), (["encoder", "quant_conv"], 1)):
        model = load_vae(str(vae / "export"))
        for parameter in model.quant_conv.parameters():
            parameter.data *= times
        train_vae.save_vae(model, replace(cfg, freeze=freeze), tmp_path)
        after = json.loads((tmp_path / "config.json").read_text())
        for name in ("latents_mean", "latents_std"):
            assert after[name] == pytest.approx([times * x for x in before[name]], rel=0.01, abs=1e-4)


def test_other_settings_in_the_same_folder_are_refused(vae, capsys):
    with pytest.raises(SystemExit) as stop:
        train_vae.main([*VAE, f"out={vae}", "steps=4", "lr=0.5"])
    assert stop.value.code == 2 and "lr" in capsys.readouterr().err


def test_a_config_typo_is_refused_with_the_nearest_key(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train_dit.main([*DIT, f"out={tmp_path}", "stepz=3"])
    assert stop.value.code == 2 and "did you mean 'steps'" in capsys.readouterr().err


def test_a_cache_is_complete_resumable_and_tied_to_its_vae(vae, cache, tmp_path, capsys):
    before = {p.name: p.stat().st_mtime_ns for p in cache.glob("*.safetensors")}
    damaged = cache / "00001.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(Exception, match="00001"):
        LatentCache(cache)
    encode.main([*CACHE, f"vae={vae / 'export'}", f"out={cache}"])
    after = {p.name: p.stat().st_mtime_ns for p in cache.glob("*.safetensors")}
    assert [name for name in before if before[name] != after[name]] == ["00001.safetensors"]
    assert len(LatentCache(cache)) == 8
    with pytest.raises(SystemExit):
        encode.main([*CACHE, f"vae={vae / 'export'}", f"out={cache}", "seed=1"])
    assert "with other settings (seed 0, now 1)" in capsys.readouterr().err


def test_an_epoch_uses_every_clip_however_small_its_bucket(cache):
    steps = LatentSteps(LatentCache(cache), batch=2, frames=[5], seed=0)
    for epoch in range(2):
        seen = set()
        for place in range(epoch * steps.per_epoch, (epoch + 1) * steps.per_epoch):
            batch = steps[place]
            seen |= {(tuple(batch.latents.shape[3:]), i) for i in batch.ids}
        assert len(seen) == 8


def test_a_resumed_dit_run_is_bit_equal_and_its_model_samples(vae, cache, tmp_path):
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    train(vae, cache, straight, "steps=4", "schedule=constant")
    train(vae, cache, stopped, "steps=2", "schedule=constant")
    torch.rand(5)  # an unrelated draw changes nothing
    train(vae, cache, stopped, "steps=4", "schedule=constant")
    assert_same(weights(straight), weights(stopped))
    pipe = KlingPipeline.from_pretrained(straight / "export")
    frames = pipe("a red ball", camera="pan=3", num_frames=5, num_inference_steps=2).frames
    assert frames.shape == (1, 5, 64, 112, 3)
    average, exact = weights(straight), ("time_embedder", "scale_shift_table", "norm2")
    for name, t in load_file(straight / "export" / "transformer" / "diffusion_pytorch_model.safetensors").items():
        dtype = torch.float32 if any(part in name for part in exact) else torch.bfloat16
        assert t.dtype == dtype and torch.equal(t, average[f"ema/transformer.{name}"].to(dtype)), name
    assert (straight / "samples" / "00000004.png").is_file()


def test_a_sample_that_the_model_cannot_make_is_refused_before_the_first_update(vae, cache, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        samples = "samples=[{prompt: a ball, num_frames: 5}, {prompt: a ball, num_frames: 5, camera: pan=5}]"
        train(vae, cache, tmp_path / "run", "steps=2", "model.camera_channels=0", samples, "sample_every=1")
    assert end.value.code == 2 and "sample 2 of 2: this model was not trained for 'camera'" in capsys.readouterr().err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_frozen_part_stays_and_a_run_with_one_resumes_exactly(vae, cache, tmp_path):
    """lr_of: 0 means no gradient, no state of the optimizer and no place in a checkpoint; the export holds the part as it began."""
    whole, parts, none = tmp_path / "whole", tmp_path / "parts", tmp_path / "none"
    frozen = ["lr_of={text_encoder: 0, transformer.proj_out: 0.0, transformer: 2}", "schedule=constant", "sample_every=0"]
    train(vae, cache, whole, "steps=4", *frozen)
    train(vae, cache, parts, "steps=2", *frozen)
    torch.rand(5)  # an unrelated draw changes nothing
    train(vae, cache, parts, "steps=4", *frozen)
    assert_same(weights(whole), weights(parts))
    held = {name.split(".")[0] for name in weights(whole)}
    assert held == {"model/transformer", "ema/transformer", "optimizer/transformer"}
    assert not any("proj_out" in name for name in weights(whole)), "the longer name counts"
    train(vae, cache, none, "steps=1", "lr=1e-30", "ema=0", "schedule=constant", "sample_every=0")  # the weights as all of these began
    for folder, file in (("text_encoder", "diffusion_pytorch_model"), ("transformer", "diffusion_pytorch_model")):
        began, made = (load_file(run / "export" / folder / f"{file}.safetensors") for run in (none, parts))
        same = {name for name in began if torch.equal(began[name], made[name])}
        assert same >= set(began) if folder == "text_encoder" else "patch_embedding.weight" not in same

    from kling_programs.sample.studio import runs  # the page builds a run's model anew, and finds only what was trained in a checkpoint

    shown = runs.pipeline_of(parts, "step-00000004", "cpu")
    exported = load_file(parts / "export" / "text_encoder" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(t.to(exported[name].dtype), exported[name]) for name, t in shown.text_encoder.state_dict().items())


def test_freezing_everything_is_refused(vae, cache, tmp_path, capsys):
    for words, said in (("{transformer: 0, text_encoder: 0}", "leave one part above 0"), ("{text_encoder: -1}", "lr_of.text_encoder = -1")):
        with pytest.raises(SystemExit) as end:
            train(vae, cache, tmp_path / "run", "steps=1", f"lr_of={words}")
        assert end.value.code == 2 and said in capsys.readouterr().err


def test_a_text_encoder_learns_phrasings_resumes_exactly_and_starts_a_transformer(vae, cache, tmp_path):
    words = ["configs/text/world.yaml", "text={byte_dim: 32, byte_layers: 1, out_dim: 32, token_layers: 1}", "batch=16", "lr=3e-3"]
    words += ["warmup=5", "schedule=constant", "mixed_precision=fp32", "workers=0", "log_every=1", "save_every=20"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_text.main([*words, f"out={whole}", "steps=60"])
    for steps in (40, 60):
        train_text.main([*words, f"out={parts}", f"steps={steps}"])
    assert_same(weights(whole), weights(parts))

    losses = [row["loss"] for row in map(json.loads, (whole / "metrics.jsonl").read_text().splitlines())]
    assert np.mean(losses[-10:]) < min(np.mean(losses[:10]), np.log(16)) - 0.3  # log 16: it cannot tell 16 clips apart

    train(vae, cache, tmp_path / "dit", "steps=1", f"text_from={whole / 'export'}", "sample_every=0")
    with pytest.raises(SystemExit):
        train(vae, cache, tmp_path / "other", "steps=1", f"text_from={whole / 'export'}", "text.byte_layers=2")
    taught = load_file(whole / "export" / "diffusion_pytorch_model.safetensors")
    start = weights(tmp_path / "dit")
    name = "byte_embedding.weight"
    moved = (start[f"model/text_encoder.{name}"] - taught[name]).abs().max()
    assert moved < 0.01 < (taught[name] - taught[name].roll(1, 0)).abs().max()  # its weights, one small step on


def test_a_text_encoder_leaves_out_what_is_not_finite(tmp_path, monkeypatch):
    """One update first, whose loss alone is not finite, then five in a row, after which it goes back and takes other captions."""
    real, calls = train_text.agreement_loss, iter(range(1, 100))

    def poisoned(*args):
        loss, found = real(*args)
        return loss * (float("nan") if next(calls) in (2, 5, 6, 7, 8, 9) else 1.0), found

    monkeypatch.setattr(train_text, "agreement_loss", poisoned)
    words = ["configs/text/world.yaml", "text={byte_dim: 32, byte_layers: 1, out_dim: 32, token_layers: 1}", "batch=4", "workers=0"]
    train_text.main([*words, "mixed_precision=fp32", "log_every=1", "save_every=4", "steps=10", f"out={tmp_path}"])
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 11)) and lines[1]["loss"] is None and lines[-1]["skipped"] == 6
    folder = tmp_path / (tmp_path / "latest").read_text().strip()
    assert json.loads((folder / "meta.json").read_text())["places"] == 15
    assert all(torch.isfinite(value).all() for value in weights(tmp_path).values())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["text_from=nowhere"], "'nowhere' holds no text encoder"),
        (["text_from=nowhere", "init_from=kling/assets"], "leave one out"),
    ],
)
def test_an_unsuitable_text_encoder_is_refused(vae, cache, tmp_path, capsys, words, message):
    with pytest.raises(SystemExit) as end:
        train(vae, cache, tmp_path / "run", "steps=1", *words)
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_a_folder_of_videos_trains_a_vae(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (12, 64, 112, 3), dtype=np.uint8)
    (tmp_path / "videos").mkdir()
    write_video(tmp_path / "videos" / "a.mp4", frames, 8)
    (tmp_path / "videos" / "a.txt").write_text("noise", encoding="utf-8")
    train_vae.main([*VAE, f"out={tmp_path / 'run'}", "steps=1", f"data.source={tmp_path / 'videos'}", "data.aspects=['16:9']"])
    assert (tmp_path / "run" / "export" / "config.json").is_file()
