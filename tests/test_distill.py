"""Distillation into a flow map: its target in closed form, what the program keeps, and what it leaves behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kling import KlingPipeline, Request
from kling.condition.state import Given, build_state
from kling.flow.flow_map import draw_steps, flow_map_target

S = 0.5  # deviation of the data of the toy, x0 ~ N(0, S²), whose flow and flow map are known


def size(t: Tensor) -> Tensor:
    """Standard deviation of x_t = (1 - t) x0 + t eps."""
    return ((1 - t) ** 2 * S**2 + t**2).sqrt()


def velocity(z: Tensor, t: Tensor) -> Tensor:
    return z * (t - (1 - t) * S**2) / size(t) ** 2


def mean_velocity(z: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """(x_t - x_r) / (t - r), where x_r = x_t size(r) / size(t)."""
    far = (t - r).abs() > 1e-6
    return torch.where(far, z * (1 - size(r) / size(t)) / torch.where(far, t - r, 1.0), velocity(z, t))


@pytest.mark.parametrize("soft", [False, True])
def test_the_true_flow_map_is_where_the_target_leads(soft: bool) -> None:
    """Also for tokens that are at a part m of the level: they move along the same paths, m times as slowly."""
    torch.manual_seed(0)
    t = torch.tensor([1.0, 0.999, 0.8, 0.5, 0.3, 0.3], dtype=torch.float64)
    r = torch.tensor([0.0, 0.5, 0.2, 0.499, 0.0, 0.3], dtype=torch.float64)
    state = build_state([Given(hold=0.4 if soft else 0.0)] * 6, torch.randn(6, 4, 3, 4, 4, dtype=torch.float64), None)
    m, z = state.mask, torch.randn_like(state.clean)
    wide = lambda x: x.double().view(-1, 1, 1, 1, 1) * m  # noqa: E731
    u = lambda z, t, r: mean_velocity(z, wide(t), wide(r))  # noqa: E731
    target = flow_map_target(u, z, velocity(z, wide(t)), t, r, m, delta=1e-4)
    torch.testing.assert_close(target.double(), u(z, t, r), atol=2e-4, rtol=2e-3)


def test_steps_are_drawn_in_the_asked_shares() -> None:
    t, r = draw_steps(400, 200, torch.Generator().manual_seed(0), "uniform", 5.0, to_clean=0.5)
    assert torch.equal(t[:200], r[:200]) and bool((r[200:300] == 0).all())
    free = (t[300:] > r[300:]) & (r[300:] > 0)
    assert bool(free.all()) and bool((t <= 1).all())
    assert t[200:].mean() > t[:200].mean(), "the larger of two draws"


def run(out: Path, *settings: str, teacher: str = "shipped") -> list[dict]:
    command = [sys.executable, "-m", "kling_programs.train.distill", "configs/distill/debug.yaml", f"out={out}", f"teacher={teacher}"]
    common = ["cache=" + str(out.parent / "cache"), "batch=2", "sample_every=0", "mixed_precision=fp32", "workers=0", "log_every=1"]
    done = subprocess.run([*command, *common, *settings], cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> bytes:
    return (folder / "export" / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()


def test_a_distillation_resumes_to_the_bit_and_its_export_takes_one_pass_a_step(tmp_path: Path) -> None:
    straight = run(tmp_path / "a", "steps=4", "save_every=2")
    half = run(tmp_path / "b", "steps=2", "save_every=2", "schedule=constant")
    assert [line["loss"] for line in straight[:1]] == [line["loss"] for line in half[:1]]
    run(tmp_path / "c", "steps=4", "save_every=2")
    assert weights(tmp_path / "a") == weights(tmp_path / "c"), "every draw follows from the seed"

    pipe = KlingPipeline.from_pretrained(tmp_path / "a" / "export")
    passes: list[int] = []
    pipe.transformer.register_forward_hook(lambda *_: passes.append(1))
    plan = pipe.plan(Request("a red ball", num_frames=5, camera="pan=5"))
    assert (plan.solver, plan.num_inference_steps, plan.guidance_scale, plan.camera_guidance_scale) == ("flow_map", 4, 1.0, 1.0)
    pipe("a red ball", num_frames=5, camera="pan=5")
    assert len(passes) == 4


def test_with_the_students_own_weights_beside_the_teacher_is_the_teacher(tmp_path: Path) -> None:
    run(tmp_path / "a", "steps=1", "beside=true")
    made, shipped = KlingPipeline.from_pretrained(tmp_path / "a" / "export"), KlingPipeline.from_pretrained()
    assert made.transformer_fast is not None and made.plan(Request("a ball", mode="fast")).num_inference_steps == 4
    own, theirs = made.transformer.state_dict(), shipped.transformer.state_dict()
    assert all(torch.equal(own[name], theirs[name]) for name in theirs)


def test_a_step_of_length_0_at_the_start_has_no_loss(tmp_path: Path) -> None:
    """The student starts as the teacher: without guidance and with steps of length 0 only, nothing is to be learned."""
    lines = run(tmp_path / "a", "steps=1", "plain=1", "guidance_scale=1", "camera_guidance_scale=1")
    assert lines[0]["loss"] < 1e-8
