"""On a device other than the CPU: no tensor stays on the host by mistake, and the host does not wait for the device.

The device is simulated (`pretend.py`), so these tests run everywhere; `test_gpu.py` is for a real one.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pretend
import pytest
import torch
import workers
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from test_pipeline import H, W, movie, picture, tiny_pipeline

from kling import KlingFlowScheduler, KlingPipeline, KlingTransformer3DModel, Request
from kling.runtime.accelerator import StopSignal
from kling.runtime.device import multiply_in_tf32
from kling.sampling.machine import pick_device
from kling.text import ByteTextEncoder

ROOT = Path(__file__).parents[1]
train_dit = workers.train_dit
HOLE = np.zeros((H, W), np.float32)
HOLE[16:48, 32:80] = 1
BRUSH = [{"mask": HOLE.astype(np.uint8), "points": [(40.0, 30.0), (60.0, 40.0)]}]
WAN_UNIPC = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
TINY = {
    "num_attention_heads": 1, "attention_head_dim": 16, "out_channels": 4, "text_dim": 32, "freq_dim": 16, "ffn_dim": 32, "num_layers": 1,
}  # fmt: skip


def second_expert(pipe: KlingPipeline) -> None:
    torch.manual_seed(1)
    pipe.register_modules(transformer_2=KlingTransformer3DModel.from_config(pipe.transformer.config))
    pipe.register_to_config(boundary_ratio=0.6)


def extra_channels(pipe: KlingPipeline) -> None:
    torch.manual_seed(2)
    pipe.register_modules(transformer=KlingTransformer3DModel(in_channels=4 + 4 + 4, **TINY))
    pipe.groups = ("mask", "clean")


def few_steps(pipe: KlingPipeline) -> None:
    """A flow map beside the transformer, for mode fast."""
    torch.manual_seed(3)
    config = {key: value for key, value in pipe.transformer.config.items() if not key.startswith("_")}
    fast = KlingTransformer3DModel(**config | {"gate_value": 0.25})
    for p in fast.parameters():
        torch.nn.init.normal_(p, std=0.2)
    pipe.register_modules(transformer_fast=fast)


def changed(**scheduler: Any) -> Any:
    return lambda pipe: pipe.register_modules(scheduler=KlingFlowScheduler(**scheduler))


MODES: dict[str, tuple[dict[str, Any], Any]] = {
    "text": ({}, None),
    "one picture": ({"num_frames": 1}, None),
    "image": ({"image": picture()}, None),
    "last": ({"last_image": picture()}, None),
    "first and last": ({"image": picture(), "last_image": picture(1)}, None),
    "soft keyframe": ({"keyframes": [(picture(), 2, 0.7)]}, None),
    "loop": ({"loop": True}, None),
    "continuation": ({"video": movie(9)}, None),
    "hops": ({"num_frames": None, "extend_to": 2.5}, None),
    "inpaint": ({"video": movie(5), "mask": HOLE}, None),
    "restyle": ({"video": movie(5), "strength": 0.5}, None),
    "camera": ({"camera": "pan=5,zoom=2", "camera_guidance_scale": 2.0}, None),
    "camera at a keyframe": ({"camera": "dolly=3", "last_image": picture()}, None),
    "motion brush": ({"image": picture(), "tracks": BRUSH, "brush_guidance_scale": 2.0}, None),
    "motion brush and camera": ({"tracks": BRUSH, "camera": "pan=5", "camera_guidance_scale": 2.0}, None),
    "references": ({"references": [picture(), picture(1)], "image": picture(2)}, None),
    "shots": ({"num_frames": None, "shots": [("a ball", 0.5, "pan=5"), ("a cube", 0.6)]}, None),
    "noise on what is given": ({"image": picture(), "sigma_c": 0.1}, None),
    "frames one behind another": ({"frame_delay": 1}, None),
    "frames one behind another, one given": ({"frame_delay": 2, "image": picture()}, None),
    "guidance now and then": ({"guidance_every": 2, "guidance_interval": (0.1, 0.9)}, None),
    "guidance away from what is given": ({"image": picture(), "guidance_reach": 2.0}, None),
    "second order": ({"mode": "pro"}, None),
    "few steps": ({"mode": "fast", "num_inference_steps": None, "guidance_scale": None, "camera": "pan=5"}, few_steps),
    "few steps from a picture": ({"mode": "fast", "num_inference_steps": 2, "guidance_scale": None, "image": picture()}, few_steps),
    "fresh noise": ({"image": picture()}, changed(solver="renoise")),
    "UniPC": ({"image": picture()}, lambda pipe: pipe.register_modules(scheduler=UniPCMultistepScheduler(**WAN_UNIPC))),
    "UniPC, soft": (
        {"video": movie(5), "strength": 0.5},
        lambda pipe: pipe.register_modules(scheduler=UniPCMultistepScheduler(**WAN_UNIPC)),
    ),
    "another scheduler": ({}, lambda pipe: pipe.register_modules(scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))),
    "block by block": ({}, lambda pipe: pipe.register_to_config(block_frames=1)),
    "two experts": ({"camera": "pan=5"}, second_expert),
    "extra channels": ({"image": picture()}, extra_channels),
}  # fmt: skip

ABLE = [
    "text", "image", "last", "first_last", "keyframes", "continuation", "inpaint", "restyle", "camera", "text_to_image",
    "diffusion_forcing", "reference", "shots", "brush",
]  # fmt: skip


def in_mode(mode: str) -> tuple[KlingPipeline, str, dict[str, Any]]:
    """A small pipeline that can do it, the prompt and the other fields of a request."""
    fields, change = MODES[mode]
    pipe = tiny_pipeline(capabilities=ABLE)
    if change is not None:
        change(pipe)
    words = "" if "shots" in fields else "a ball"  # every shot has its own
    return pipe, words, {"num_frames": 5, "num_inference_steps": 3, "guidance_scale": 2.0, "seed": 1, **fields}


@pytest.mark.parametrize("mode", MODES)
def test_sampling_runs_on_the_device_and_no_step_waits(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Latents of every mode; frames of a clip, a picture and a video of several hops, since all others are decoded alike."""
    pipe, words, asked = in_mode(mode)
    want = pipe(words, output_type="latent", **asked).latents
    marks: list[int] = []
    with pretend.device(monkeypatch) as device:
        pipe.to(pretend.CUDA)

        def note(pipe: KlingPipeline, step: int, timestep: float, kwargs: dict) -> dict:
            marks.append(len(device.waits))
            return kwargs

        decoded = mode in ("text", "one picture", "hops")
        out = pipe(words, output_type="np" if decoded else "latent", callback_on_step_end=note, **asked)
        latents = out.latents.cpu()
    torch.testing.assert_close(latents, want, atol=2e-3, rtol=1e-3)
    assert not decoded or (out.frames.dtype == np.uint8 and out.frames.shape[-3:-1] == (H, W))
    hops = len(pipe.plan(Request(words, **asked)).hops)
    if hops == 1 and not asked.get("loop"):
        assert not device.since(marks[0]).keys() & {w for w in device.waits[: marks[-1]]}, device.since(marks[0])
        assert marks[-1] == marks[0], f"steps waited: {device.waits[marks[0] : marks[-1]]}"


def test_requests_are_sampled_together_on_the_device_and_no_step_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a scoring on a GPU does: words, a first picture, cameras, tracks, references and shots, in batches of one shape."""
    pipe = tiny_pipeline(capabilities=["text", "image", "camera", "brush", "reference", "shots"])
    settings = {"num_frames": 5, "num_inference_steps": 3, "guidance_scale": 2.0}
    story = {"num_frames": None, "shots": [("a ball", 0.5, "pan=5"), ("a cube", 0.6)]}
    kinds = [{}, {"camera": "pan=5"}, {"image": picture(), "tracks": BRUSH}, {"references": [picture()]}, story]
    words = ["a ball", "a cube"]
    asked = [Request("" if "shots" in kind else word, **settings | kind, seed=3) for kind in kinds for word in words]
    want, marks = pipe.together(asked), []
    step = KlingFlowScheduler.step
    with pretend.device(monkeypatch) as device:
        monkeypatch.setattr(KlingFlowScheduler, "step", lambda *a, **b: (marks.append(len(device.waits)), step(*a, **b))[1])
        pipe.to(pretend.CUDA)
        made = pipe.together(asked)
    assert all(int((a.int() - b.int()).abs().max()) <= 1 for a, b in zip(made, want, strict=True))
    walks = [marks[i : i + 3] for i in range(0, len(marks), 3)]
    assert len(walks) == len(kinds) and all(walk[0] == walk[-1] for walk in walks), device.waits


def test_prompts_run_in_few_groups_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A group's two hundred small kernels take as long for 32 prompts as for 512."""
    encoder, groups = ByteTextEncoder(byte_dim=32, out_dim=48, head_dim=16, max_bytes=63), []
    prompts = ["a" * (37 * i % 60) for i in range(600)]
    monkeypatch.setattr(encoder, "_encode", lambda *a, plain=encoder._encode: (groups.append(len(a[0])), plain(*a))[1])
    with torch.no_grad():
        want = encoder.encode(prompts)
        there = len(groups)
        with pretend.device(monkeypatch):
            found = encoder.to(pretend.CUDA).encode(prompts).cpu()
    torch.testing.assert_close(found, want, atol=1e-4, rtol=1e-4)
    assert groups[there:] == [512, 88] and there == 19


def test_training_steps_wait_only_for_the_log(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With all tasks, keyframes and cameras, and both optimizers: one copy of the logged numbers every second step, and no other."""
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "cuda:0")
    words = workers.debug_words(tmp_path, "batch=2", "save_every=100", "log_every=2", "steps=6", "optimizer=muon", "watchdog=0")
    marks: list[int] = []
    with pretend.device(monkeypatch) as device:
        monkeypatch.setattr(train_dit, "publish", lambda *_: None)
        monkeypatch.setattr(train_dit, "matmul_ceiling", lambda *_: 1e12)
        monkeypatch.setattr(StopSignal, "seen", lambda *_: marks.append(len(device.waits)))
        train_dit.main([*words, f"out={tmp_path / 'run'}"])
    waited = [device.waits[a:b] for a, b in pairwise(marks)]  # from the end of a step to that of the next
    assert [len(what) for what in waited[:-1]] == [1, 0, 1, 0], waited
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 7)) and all(math.isfinite(line["loss"]) for line in lines)


WITHOUT = """
import importlib, sys
for name in ("av", "decord", "gradio"):
    sys.modules[name] = None  # as if it were not installed
for name in sys.argv[1:]:
    importlib.import_module(f"kling_programs.{name}")
from kling.data.source import ClipSource, DataConfig
assert ClipSource(DataConfig()).clip(0, 5, "1:1").video.shape == (5, 80, 80, 3)
"""
BENCHES = [f"eval.benches.{name}" for name in ("dit", "attn", "vae", "vae_mem", "sampler", "train", "scaling")]


@pytest.mark.slow
def test_the_world_training_its_evaluation_and_benches_need_no_decoder_and_no_demo() -> None:
    """A machine with a GPU and no network has none of these packages (configs/gpu/first.sh; tests/test_layout.py reads the imports)."""
    programs = ["train.train_dit", "train.train_vae", "train.train_text", "train.encode", "eval.world", "eval.bench", *BENCHES]
    subprocess.run([sys.executable, "-c", WITHOUT, *programs], check=True)


def test_one_function_sets_the_rounding_of_products_and_convolutions_on_cuda() -> None:
    files = [path for folder in ("kling", "train", "sample", "eval") for path in (ROOT / folder).rglob("*.py")]
    places = [path.relative_to(ROOT).as_posix() for path in files if "allow_tf32" in path.read_text(encoding="utf-8")]
    assert places == ["kling/runtime/device.py"]
    multiply_in_tf32(False)
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
    pick_device("cpu")
    assert torch.backends.cudnn.allow_tf32 and torch.backends.cuda.matmul.allow_tf32


def test_the_vae_s_kernels_are_channels_last_like_its_clips(monkeypatch: pytest.MonkeyPatch) -> None:
    vae = tiny_pipeline().vae
    with pretend.device(monkeypatch):
        kernels = [p for p in vae.to(pretend.CUDA).parameters() if p.ndim == 5]
        assert kernels and all(p.is_contiguous(memory_format=torch.channels_last_3d) for p in kernels)


@pytest.mark.slow
@pytest.mark.timeout(1600)
def test_the_gpu_script_runs_in_a_rehearsal(tmp_path: Path) -> None:
    """The script for a machine with a GPU, at a small size: every stage succeeds, and leaves at most 8 files of 15 MB."""
    env = os.environ | {"PYTHON": sys.executable, "OUT": str(tmp_path / "out"), "WORK": str(tmp_path / "work"), "WHEELS": str(tmp_path)}
    subprocess.run(["bash", str(ROOT / "configs" / "gpu" / "first.sh"), "--rehearse"], env=env, check=True)
    stages = [json.loads(line) for line in (tmp_path / "out" / "stages.jsonl").read_text().splitlines()]
    assert sorted(s["stage"] for s in stages) == sorted(["machine", "tests", "encode", "pace", "train", "student", "scores", "bench"])
    assert all(stage["code"] == 0 or (stage["stage"], stage["code"]) == ("bench", 143) for stage in stages), stages  # 143: out of time
    files = list((tmp_path / "out").iterdir())
    assert len(files) <= 8 and all(file.stat().st_size <= 15e6 for file in files)
    assert {"eval.tar.gz", "metrics.jsonl.gz", "weights.tar.aa", "fast.tar.aa", "logs.tar.gz"} <= {file.name for file in files}
