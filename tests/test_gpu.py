"""On a real CUDA device: training and resuming, every sampling mode, the VAE's stream, compiled blocks, low-rank weights, diffusers.

KLING_GPU_TESTS=cpu runs the same on the CPU, to check the tests themselves (`configs/gpu/first.sh --rehearse`).
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import tiny_wan
import torch
import workers
from test_device import MODES, in_mode
from test_pipeline import tiny_pipeline

from kling import KlingPipeline, KlingTransformer3DModel, Request
from kling.data.world.render import render
from kling.data.world.scene import World, take_of
from kling.runtime.checkpoint import load_latest
from kling.runtime.device import multiply_in_tf32

pytestmark = pytest.mark.gpu
DEVICE = torch.device(os.environ.get("KLING_GPU_TESTS", "cuda"))
train_dit = workers.train_dit


def waits(kind: str) -> None:
    """PyTorch's behaviour when the host would wait for the GPU: "default" or "error"."""
    if DEVICE.type == "cuda":
        torch.cuda.set_sync_debug_mode(kind)


@pytest.mark.parametrize("mode", MODES)
def test_sampling_matches_the_cpu_and_no_step_waits(mode: str) -> None:
    pipe, prompt, asked = in_mode(mode)
    want = pipe(prompt, output_type="latent", **asked).latents
    pipe.to(DEVICE)
    steps = pipe.plan(Request(prompt=prompt, **asked)).total_steps if not asked.get("loop") and mode != "hops" else 0

    def note(pipe: KlingPipeline, step: int, timestep: float, kwargs: dict[str, Any]) -> dict[str, Any]:
        waits("error" if step + 1 < steps else "default")  # from the first step on; after the last one the clip is read
        return kwargs

    try:
        found = pipe(prompt, output_type="latent", callback_on_step_end=note, **asked).latents.cpu()
    finally:
        waits("default")
    torch.testing.assert_close(found, want, atol=2e-2, rtol=1e-2)


def test_the_world_rendered_on_the_device_is_that_of_the_cpu_and_the_host_never_waits() -> None:
    """Also in TF32: it would move edges by whole pixels. Where a ray meets the edge of a cube, rounding decides which face it sees."""
    takes = [take_of(World(0, frames, "16:9").scene(i)) for frames in (1, 17, 41) for i in range(8)]
    want = render(takes, 64, 112)
    multiply_in_tf32()
    render(takes[:1], 64, 112, DEVICE)  # the first kernels are loaded
    try:
        waits("error")
        found = render(takes, 64, 112, DEVICE)
    finally:
        waits("default")
    off = (found.cpu().int() - want.int()).abs()
    assert (off > 1).float().mean() < 1e-4 and (off > 0).float().mean() < 1e-3


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return workers.debug_words(tmp_path_factory.mktemp("parts"), "batch=2", "save_every=2", "optimizer=muon", "watchdog=0")


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(run: Path) -> dict[str, torch.Tensor]:
    saved = load_latest(run)
    return {f"{name}/{key}": rows[key] for name, rows in saved.tensors.items() for key in rows}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_training_resumes_and_its_model_samples(precision: str, words: list[str], tmp_path: Path) -> None:
    """Atomic sums on a GPU have no fixed order, so results are equal up to rounding, not bit for bit."""
    words = [*words, f"mixed_precision={precision}", "schedule=constant"]
    train_dit.main([*words, "steps=4", f"out={tmp_path / 'whole'}"])
    for steps in (2, 4):
        train_dit.main([*words, f"steps={steps}", f"out={tmp_path / 'parts'}"])
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], atol=1e-2, rtol=1e-2)
    assert all(math.isfinite(line["loss"]) for line in metrics(tmp_path / "parts"))
    pipe = KlingPipeline.from_pretrained(tmp_path / "whole" / "export").to(DEVICE)
    assert pipe("a ball", camera="pan=3", num_frames=5, num_inference_steps=2).frames.shape[:2] == (1, 5)


@pytest.mark.skipif(DEVICE.type == "cpu", reason="compiling for a CPU is tested elsewhere")
def test_a_compiled_training_matches_a_plain_one(words: list[str], tmp_path: Path) -> None:
    for name, compiled in (("plain", "false"), ("compiled", "true")):
        train_dit.main([*words, "mixed_precision=fp32", "steps=3", f"compile={compiled}", f"out={tmp_path / name}"])
    for plain, compiled in zip(metrics(tmp_path / "plain"), metrics(tmp_path / "compiled"), strict=True):
        assert compiled["loss"] == pytest.approx(plain["loss"], rel=2e-2)


def test_low_rank_weights_are_trained_and_loaded(words: list[str], tmp_path: Path) -> None:
    pytest.importorskip("peft")
    train_dit.main([*words, "mixed_precision=fp32", "steps=1", f"out={tmp_path / 'base'}"])
    base = tmp_path / "base" / "export"
    train_dit.main([*words, "mixed_precision=fp32", "steps=2", f"init_from={base}", "lora.rank=2", f"out={tmp_path / 'lora'}"])
    pipe = KlingPipeline.from_pretrained(base, lora=[(str(tmp_path / "lora" / "lora"), 1.0)]).to(DEVICE)
    assert pipe("a ball", num_frames=5, num_inference_steps=1).frames.shape[1] == 5


def test_the_streamed_vae_equals_the_whole_one() -> None:
    vae = tiny_pipeline().vae.to(DEVICE)
    video = torch.rand(1, 3, 13, 64, 112, device=DEVICE) * 2 - 1
    with torch.no_grad():
        whole = vae.encode(video).latent_dist.mode()
        parts = torch.cat(list(vae.encode_stream([video[:, :, :5], video[:, :, 5:9], video[:, :, 9:]])), dim=2)
        torch.testing.assert_close(parts, whole, atol=1e-3, rtol=1e-3)
        decoded = torch.cat(list(vae.decode_stream(whole)), dim=2)
        torch.testing.assert_close(decoded, vae.decode(whole).sample, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(decoded.cpu(), vae.cpu().decode(whole.cpu()).sample, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize(("dtype", "compiled", "atol"), [("float32", False, 1e-3), ("bfloat16", False, 6e-2), ("float32", True, 1e-3)])
def test_the_transformer_equals_diffusers(dtype: str, compiled: bool, atol: float) -> None:
    if compiled and DEVICE.type == "cpu":
        pytest.skip("compiling for a CPU is tested elsewhere")
    multiply_in_tf32(False)
    theirs = tiny_wan.transformer()
    ours = KlingTransformer3DModel.from_config(dict(theirs.config)).eval()
    ours.load_state_dict(theirs.state_dict())
    kind = getattr(torch, dtype)
    for model in (ours, theirs):
        model.to(DEVICE, kind)
    if compiled:
        ours.compile_repeated_blocks()
    draw = torch.Generator().manual_seed(0)
    z, text = (torch.randn(shape, generator=draw).to(DEVICE, kind) for shape in ((1, 16, 3, 8, 8), (1, 7, 32)))
    with torch.no_grad():
        want = theirs(z, torch.tensor([500], device=DEVICE), text, return_dict=False)[0]
        found = ours(z, torch.tensor([0.5], device=DEVICE, dtype=torch.float64), text).sample
    torch.testing.assert_close(found.float(), want.float(), atol=atol, rtol=atol)
