"""Distillation into a flow map: its target in closed form, what the program keeps, and what it leaves behind."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path

import pretend
import pytest
import tiny_wan
import torch
import workers
from accelerate.state import AcceleratorState
from kling_programs.train import distill, distill_dmd, encode, students
from kling_programs.train.students import Guide
from test_generate import save_tiny
from test_saver import survives
from torch import Tensor

from kling import KlingPipeline, Request
from kling.cache.batches import LatentSteps
from kling.cache.store import LatentCache
from kling.condition.state import Given, build_state
from kling.condition.tasks import TASKS
from kling.condition.tracks import Tracks
from kling.config import load_config
from kling.dit import KlingTransformer3DModel
from kling.errors import UserError
from kling.flow.flow_map import composed_target, draw_steps, flow_map_target, whole_part
from kling.flow.levels import shift_sigma
from kling.flow.losses import flow_loss
from kling.flow.matching import matching_target
from kling.flow.solvers import KlingFlowScheduler
from kling.hub.load import dtype_of
from kling.runtime.accelerator import StopSignal
from kling.runtime.random import generator, noise_like
from kling.sampling.brush import Track
from kling.sampling.pipeline import load_vae
from kling.sampling.shots import Shot
from kling.training.examples import Drawing, Example, draw_example
from kling.training.loop import Loop
from kling.training.model import Trained
from kling.training.start import open_start

OTHERS = [name for name in TASKS if name not in ("text", "image")]

SEED = 3  # of a run whose batches differ in their passes
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


Toy = tuple[Tensor, Tensor, Tensor, Tensor, Callable[[Tensor, Tensor, Tensor], Tensor], Tensor]


@pytest.fixture(params=[False, True], ids=["free", "soft"])
def toy(request: pytest.FixtureRequest) -> Toy:
    """Levels t and r, mask, states, and of the toy the mean velocity u(z, t, r) and the velocity at t. Soft tokens are at a part m of the
    level: they move along the same paths, m times as slowly."""
    torch.manual_seed(0)
    t = torch.tensor([1.0, 0.999, 0.8, 0.5, 0.3, 0.3], dtype=torch.float64)
    r = torch.tensor([0.0, 0.5, 0.2, 0.499, 0.0, 0.3], dtype=torch.float64)
    state = build_state([Given(hold=0.4 if request.param else 0.0)] * 6, torch.randn(6, 4, 3, 4, 4, dtype=torch.float64), None)
    m, z = state.mask, torch.randn_like(state.clean)
    wide = lambda x: x.double().view(-1, 1, 1, 1, 1) * m  # noqa: E731
    return t, r, m, z, lambda z, t, r: mean_velocity(z, wide(t), wide(r)), velocity(z, wide(t))


def test_the_true_flow_map_is_where_the_target_leads(toy: Toy) -> None:
    t, r, m, z, u, v = toy
    torch.testing.assert_close(flow_map_target(u, z, v, t, r, m, delta=1e-4).double(), u(z, t, r), atol=2e-4, rtol=2e-3)


def test_a_composed_step_leads_to_the_true_flow_map(toy: Toy) -> None:
    """Its error falls with the square of the stride, since what follows the stride is exact; a stride over all of the step is Euler's."""
    t, r, m, z, u, v = toy
    errors = [(composed_target(u, z, v, t, r, m, 3.0, stride) - u(z, t, r)).abs().amax() for stride in (0.04, 0.02, 0.01)]
    assert errors[0] < 0.3 and all(0.2 < small / large < 0.32 for large, small in zip(errors, errors[1:], strict=False)), errors
    torch.testing.assert_close(composed_target(u, z, v, t, r, m, 3.0, 1.0), v)


def test_steps_of_a_grid_are_drawn_within_it() -> None:
    t, r = draw_steps(3000, 600, torch.Generator().manual_seed(0), "uniform", 5.0, counts=[4])
    grid = shift_sigma(torch.tensor([0, 0.25, 0.5, 0.75, 1.0]), 5.0)
    assert torch.equal(t[:600], r[:600])
    t, r = t[600:], r[600:]
    end = (r[:, None] - grid).abs().min(dim=1)
    assert bool((end.values < 1e-6).all()) and set(end.indices.tolist()) == {0, 1, 2, 3}
    start = grid[end.indices + 1]
    assert bool(((t > r) & (t <= start + 1e-6)).all())
    assert 0.28 < ((start - t).abs() < 1e-6).float().mean() < 0.39


def test_steps_are_drawn_in_the_asked_shares() -> None:
    t, r = draw_steps(400, 200, torch.Generator().manual_seed(0), "uniform", 5.0, to_clean=0.5)
    assert torch.equal(t[:200], r[:200]) and bool((r[200:300] == 0).all())
    free = (t[300:] > r[300:]) & (r[300:] > 0)
    assert bool(free.all()) and bool((t <= 1).all())
    assert t[200:].mean() > t[:200].mean(), "the larger of two draws"


@pytest.mark.parametrize("b", [1, 2, 3])
def test_shares_of_small_batches_are_kept_over_many(b: int) -> None:
    """Rounding to the nearest, the published preset's batch of 1 would never have a step of length 0, nor one to level 0."""
    counts = [whole_part(b, 0.25, generator(0, "plain", place)) for place in range(400)]
    assert sum(counts) / (400 * b) == pytest.approx(0.25, abs=0.05) and set(counts) == {0, 1}
    ends = torch.cat([draw_steps(b, 0, generator(0, "sigma", place), "uniform", 5.0, to_clean=0.5)[1] for place in range(400)])
    assert float((ends == 0).float().mean()) == pytest.approx(0.5, abs=0.07)
    assert [whole_part(b, share, generator(0, "plain", 0)) for share in (0, 1)] == [0, b]


# ---- distribution matching ----


def test_matching_leads_to_the_teacher_s_distribution() -> None:
    """A student x0 = m + s eps whose teacher is N(0, S²), with exact predictions of both: its mean goes to 0 and its deviation to S."""
    torch.manual_seed(0)
    m, s = torch.tensor(1.5, requires_grad=True), torch.tensor(1.2, requires_grad=True)
    optimizer = torch.optim.Adam([m, s], lr=0.02)
    mask = torch.ones(64, 1, 1, 4, 4)
    for _ in range(300):
        x0 = m + s * torch.randn(64, 4, 1, 4, 4)
        t = 0.02 + 0.96 * torch.rand(64, 1, 1, 1, 1)
        z = (1 - t) * x0.detach() + t * torch.randn_like(x0)

        def mean_of_clean(mean: Tensor, deviation: Tensor, t: Tensor = t, z: Tensor = z) -> Tensor:  # E[x0 | z]
            gain = (1 - t) * deviation**2 / ((1 - t) ** 2 * deviation**2 + t**2)
            return mean + gain * (z - (1 - t) * mean)

        fake, real = mean_of_clean(m.detach(), s.detach()), mean_of_clean(torch.tensor(0.0), torch.tensor(S))
        loss = 0.5 * flow_loss(x0, matching_target(x0, fake, real, mask), mask).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert abs(m.item()) < 0.05 and s.abs().item() == pytest.approx(S, abs=0.06)


def test_the_gradient_of_matching_has_one_size_and_leaves_given_elements_out() -> None:
    x0 = torch.randn(2, 4, 3, 4, 4, requires_grad=True)
    fake, real = torch.randn(2, 4, 3, 4, 4), torch.randn(2, 4, 3, 4, 4)
    mask = torch.ones(2, 1, 3, 4, 4)
    mask[1, :, 0] = 0
    (0.5 * flow_loss(x0, matching_target(x0, fake, real, mask), mask)).sum().backward()
    given = (x0 - real).abs()[1, :, 1:].mean()
    want = (fake - real)[1, :, 1:] / given / (4 * 2 * 16)  # of the mean over channels and unknown elements
    torch.testing.assert_close(x0.grad[1, :, 1:], want.detach())
    assert bool((x0.grad[1, :, 0] == 0).all())
    far = matching_target(x0, 10 * fake, 10 * real, mask)  # ten times as far apart, where the sample is near in comparison
    assert (far - x0).abs().mean() < 3 * (matching_target(x0, fake, real, mask) - x0).abs().mean()


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[1])


@contextmanager
def stopped_after(steps: int) -> Iterator[None]:
    """SIGTERM to this process after an update, as a cluster sends it."""
    update = Loop.update

    def then_stop(self: Loop, *args: object, **kwargs: object) -> None:
        if self.done + 1 == steps:
            os.kill(os.getpid(), signal.SIGTERM)
        update(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "update", then_stop)
        yield


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, and a cache of its latents."""
    folder = tmp_path_factory.mktemp("teacher")
    save_tiny(folder / "model", ["text", "image", "camera"])
    encode.main(["configs/cache/debug.yaml", f"vae={folder / 'model' / 'vae'}", f"out={folder / 'cache'}", "clips=6", "workers=0"])
    return folder


def arguments(teacher: Path, out: Path, *settings: str) -> list[str]:
    given = [f"out={out}", f"teacher={teacher / 'model'}", f"cache={teacher / 'cache'}", "encode=", "long_captions=cut", "sample_every=0"]
    tasks = ["tasks.text=1", "tasks.image=1", *(f"tasks.{name}=0" for name in OTHERS)]
    return ["configs/distill/debug.yaml", *given, *tasks, "batch=4", "mixed_precision=fp32", "workers=0", "log_every=1", *settings]


def run(teacher: Path, out: Path, *settings: str) -> list[dict]:
    distill.main(arguments(teacher, out, *settings))
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def save_able(folder: Path, capabilities: list[str]) -> None:
    """The tiny model of `save_tiny` with inputs for tracks and references, guided on both."""
    save_tiny(folder, [*capabilities, "brush", "reference", "shots"])
    pipe = KlingPipeline.from_pretrained(folder)
    config = {name: value for name, value in pipe.transformer.config.items() if not name.startswith("_")}
    torch.manual_seed(1)
    grown = KlingTransformer3DModel(**config | {"track_channels": 5, "num_kinds": 8})
    for parameter in grown.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    pipe.register_modules(transformer=grown)
    pipe.scheduler = KlingFlowScheduler(num_inference_steps=2, brush_guidance_scale=3.0, reference_guidance_scale=2.0)
    pipe.save_pretrained(folder)


@pytest.fixture(scope="module")
def able(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `teacher`, with the brush, references and shots."""
    folder = tmp_path_factory.mktemp("able")
    save_able(folder / "model", ["text", "image", "camera"])
    more = ["clips=6", "references=2", "shots={17: 2}", "workers=0"]
    encode.main(["configs/cache/debug.yaml", f"vae={folder / 'model' / 'vae'}", f"out={folder / 'cache'}", *more])
    return folder


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(("flow_map.plain=0.5",), id="flow_map"),
        pytest.param(("method=dmd", "dmd.critic_updates=1", "dmd.critic_lr=1e-3", "lr=1e-3"), id="dmd", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(("config", "sizes"), [pytest.param("ddp", {}, marks=pytest.mark.slow), ("fsdp2", {"dp_shard": 2})])
def test_two_processes_are_one_with_twice_the_micro_steps(
    able: Path, tmp_path: Path, config: str, sizes: dict[str, int], method: tuple[str, ...]
) -> None:
    """Real ones, over gloo; in shards too, of which every process needs every pass: here one batch of two has references, and one has steps
    of length 0 alone."""
    places = [(2 * i, 2 * i + 1) for i in range(3)]
    pictured, still = Drawing(SEED, {}, 0, 0, reference=0.5).references, partial(whole_part, 1, 0.5)
    assert any(bool(pictured(a)) != bool(pictured(b)) for a, b in places)
    assert any(still(generator(SEED, "plain", a)) != still(generator(SEED, "plain", b)) for a, b in places)
    settings = ("steps=3", "guidance_scale=3", "camera_guidance_scale=2", "batch=1", "group=1", "threads=1", f"seed={SEED}", *method)
    settings = (*settings, "brush=0.5", "reference=0.5")
    alone = run(able, tmp_path / "one", *settings, "gradient_accumulation=2")
    words = arguments(able, tmp_path / "two", *settings)
    assert workers.run(words, workers.environment(config, 2, **sizes)) == [0, 0]
    both = [json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    told = [[[line[key] for key in line if key.endswith(name)][0] for line in (*both, *alone)] for name in ("loss", "grad_norm")]
    for values, close in zip(told, (1e-4, 1e-3), strict=True):
        assert values[:3] == pytest.approx(values[3:], rel=close)
    gate = None if "method=dmd" in method else 0.25
    assert KlingPipeline.from_pretrained(tmp_path / "two" / "export").transformer.config.gate_value == gate


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(("guidance_scale=3", "camera_guidance_scale=2"), id="flow_map"),
        pytest.param(("method=dmd", "dmd.critic_updates=1"), id="dmd", marks=pytest.mark.slow),
    ],
)
def test_an_update_runs_on_the_device_and_waits_only_for_the_log(
    teacher: Path, tmp_path: Path, method: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a training, tests/test_device.py: one copy of the logged numbers every second update, and no other."""
    AcceleratorState._reset_state(reset_partial_state=True)  # the cache of the teacher was made on the CPU
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "cuda:0")
    marks: list[int] = []
    with pretend.device(monkeypatch) as device:
        for module in (distill, distill_dmd):
            monkeypatch.setattr(module, "publish", lambda *_: None)
            monkeypatch.setattr(module, "matmul_ceiling", lambda *_: 1e12)
        monkeypatch.setattr(StopSignal, "seen", lambda *_: marks.append(len(device.waits)))
        distill.main(arguments(teacher, tmp_path, *method, "steps=4", "log_every=2", "save_every=100", "batch=2"))
    waited = [device.waits[a:b] for a, b in pairwise(marks)]  # from the end of an update to that of the next
    assert [len(what) for what in waited] == [1, 0, 1], waited
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 4 and all(math.isfinite(value) for line in lines for key, value in line.items() if key.endswith("loss"))


def weights(folder: Path, part: str = "transformer") -> bytes:
    return (folder / "export" / part / "diffusion_pytorch_model.safetensors").read_bytes()


def weights_of(folder: Path) -> bytes:
    return (folder / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()


@pytest.mark.parametrize("velocity", ["teacher", pytest.param("data", marks=pytest.mark.slow)])
def test_a_distillation_resumes_to_the_bit_and_its_export_takes_one_pass_a_step(teacher: Path, tmp_path: Path, velocity: str) -> None:
    settings = ("save_every=2", f"flow_map.velocity={velocity}", "guidance_scale=3", "camera_guidance_scale=2")
    straight = run(teacher, tmp_path / "a", "steps=4", *settings)
    with pytest.raises(SystemExit), stopped_after(2):
        run(teacher, tmp_path / "b", "steps=4", *settings)
    again = run(teacher, tmp_path / "b", "steps=4", *settings)
    assert [line["loss"] for line in again] == [line["loss"] for line in straight]
    assert weights(tmp_path / "a") == weights(tmp_path / "b")

    pipe = KlingPipeline.from_pretrained(tmp_path / "a" / "export")
    passes: list[int] = []
    pipe.transformer.register_forward_hook(lambda *_: passes.append(1))
    request = Request("a red ball", num_frames=5, camera="pan=5", size="32x32")
    plan = pipe.plan(request)
    assert (plan.solver, plan.num_inference_steps, plan.guidance_scale, plan.camera_guidance_scale) == ("flow_map", 4, 1.0, 1.0)
    pipe(request)
    assert len(passes) == 4


def test_beside_exports_the_teacher_unchanged_with_the_student(teacher: Path, tmp_path: Path) -> None:
    run(teacher, tmp_path, "steps=1", "beside=true")
    made, own = KlingPipeline.from_pretrained(tmp_path / "export"), KlingPipeline.from_pretrained(teacher / "model")
    assert made.transformer_fast.config.gate_value == 0.25
    assert made.plan(Request("a ball", mode="fast", num_frames=5)).num_inference_steps == 4
    exported, theirs = made.transformer.state_dict(), own.transformer.state_dict()
    assert exported.keys() == theirs.keys()
    stored = {name: t.to(dtype_of(name, own.transformer, torch.bfloat16)).float() for name, t in theirs.items()}
    assert all(torch.equal(exported[name], stored[name]) for name in theirs)


@pytest.mark.parametrize("beside", [True, False], ids=["beside", "alone"])
def test_an_export_takes_the_controls_that_were_distilled(able: Path, tmp_path: Path, beside: bool) -> None:
    """Not all that its weights have an input for, which is what its teacher knows."""
    run(able, tmp_path, "steps=1", "brush=0.5", f"beside={str(beside).lower()}")
    pipe = KlingPipeline.from_pretrained(tmp_path / "export", weights=False)
    asked = {"num_frames": 17, "size": "32x32", "mode": "fast" if beside else "std"}
    pipe.plan(Request("a ball", tracks=[Track(None, ((5.0, 5.0), (20.0, 9.0)))], **asked))
    picture = torch.zeros(32, 32, 3, dtype=torch.uint8).numpy()
    shots = [Shot("a ball", 1.0), Shot("a cube", 1.0)]
    for request in (Request("the first thing", references=[picture], **asked), Request(shots=shots, size="32x32", mode=asked["mode"])):
        with pytest.raises(UserError, match="not distilled for" if beside else "not trained for"):
            pipe.plan(request)
        if beside:
            pipe.plan(request.replace(mode="std"))


def test_a_sample_of_what_is_not_distilled_is_refused_before_the_first_update(able: Path, tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        run(able, tmp_path, "steps=1", "sample_every=1", "samples=[{prompt: a ball, num_frames: 5, tracks: [{points: [[5, 5], [9, 9]]}]}]")
    assert ended.value.code == 2 and "not trained for 'brush'" in capsys.readouterr().err and not (tmp_path / "metrics.jsonl").exists()


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Wan as it is published, and a cache of its own latents and embeddings."""
    folder = tmp_path_factory.mktemp("wan")
    tiny_wan.saved("t2v", folder / "model")
    words = ["clips=4", "shard=2", "data.frames=[1,5]", "workers=0", "threads=1", "mixed_precision=fp32"]
    encode.main(["configs/cache/debug.yaml", f"model={folder / 'model'}", f"out={folder / 'cache'}", *words])
    return folder


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside"])
def test_published_weights_are_distilled_by_their_preset(wan: Path, tmp_path: Path, beside: bool) -> None:
    """Two updates of configs/distill/wan-1.3b.yaml; the export loads, and a step of the student is one pass."""
    words = [f"teacher={wan / 'model'}", "checkpoint=wan2.1-t2v-1.3b", f"cache={wan / 'cache'}", f"out={tmp_path}", "frames=[5]"]
    words += ["steps=2", "warmup=0", "gradient_accumulation=2", "lora.rank=2", "mixed_precision=fp32", "workers=0", "threads=1"]
    distill.main(["configs/distill/wan-1.3b.yaml", *words, "num_inference_steps=3", f"beside={str(beside).lower()}"])
    pipe = KlingPipeline.from_pretrained(tmp_path / "export", torch_dtype=torch.float32)
    student, passes = pipe.transformer_fast if beside else pipe.transformer, []
    student.register_forward_hook(lambda *_: passes.append(1))
    assert student.config.gate_value == 0.25 and pipe.experts[0].config.gate_value == (None if beside else 0.25)
    request = Request("a ball", num_frames=5, size="48x32", mode="fast" if beside else "std")
    plan = pipe.plan(request)
    assert (plan.solver, plan.num_inference_steps, plan.guidance_scale) == ("flow_map", 3, 1.0)
    assert pipe(request).frames.shape == (1, 5, 32, 48, 3) and len(passes) == 3
    if beside:
        assert pipe.plan(request.replace(mode="std")).guidance_scale > 1


def test_the_student_begins_as_the_teacher(teacher: Path, tmp_path: Path) -> None:
    """Without guidance and with steps of length 0 alone there is nothing to learn; with guidance there is."""
    alone = run(teacher, tmp_path / "a", "steps=1", "flow_map.plain=1", "guidance_scale=1", "camera_guidance_scale=1")
    guided = run(teacher, tmp_path / "b", "steps=1", "flow_map.plain=1", "guidance_scale=3", "camera_guidance_scale=1")
    assert alone[0]["loss"] < 1e-8 < 1e-5 < guided[0]["loss"]


@pytest.fixture(scope="module")
def stories(teacher: Path) -> Path:
    """A cache of three clips and four storyboards."""
    folder = teacher / "stories"
    encode.main(["configs/cache/debug.yaml", f"vae={teacher / 'model' / 'vae'}", f"out={folder}", "clips=3", "shots={17: 4}", "workers=0"])
    return folder


@pytest.mark.parametrize("shots", [0.0, 1.0])
def test_data_with_steps_of_length_0_is_plain_training(teacher: Path, stories: Path, tmp_path: Path, shots: float) -> None:
    """The loss of the first step, against kling-train's formula computed here from the teacher; also of clips of several shots."""
    plain = ("flow_map.velocity=data", "guidance_scale=1", "camera_guidance_scale=1", "group=1", f"cache={stories}", f"shots={shots}")
    line = run(teacher, tmp_path, "steps=1", "flow_map.plain=1", *plain)[0]
    start = open_start(teacher / "model")
    model, vae = Trained(start.transformer({}), start.text({}, "")), load_vae(str(teacher / "model"))
    data = LatentSteps(LatentCache(stories), 4, [17], 0, 1, shots)
    batch = data[0]
    example = draw_example(Drawing(0, {"text": 1, "image": 1}, 0.05, 0.4, 1, 63), batch, 0, model.transformer.config, vae.spatial_factor)
    scheduler = start.settings["scheduler"].config
    t, _ = draw_steps(len(batch.ids), len(batch.ids), generator(0, "sigma", 0), scheduler["density"], scheduler["shift"])
    noise = noise_like(example.state.clean, 0, "noise", 0, range(len(batch.ids)))
    with torch.no_grad():
        v = model(example, example.state.noised(t, noise), t, model.words(example.prompts))
    error = ((v - (noise - example.state.clean)) ** 2).mean(1, keepdim=True) * example.state.mask
    losses = error.flatten(1).sum(1) / example.state.mask.flatten(1).sum(1)
    assert line["loss"] == pytest.approx(float(losses.mean()), rel=1e-5)
    mixed = run(teacher, tmp_path / "mixed", "steps=1", *plain)[0]  # also steps of some length
    assert mixed["loss"] > 0


def test_the_brush_and_references_are_guided_too() -> None:
    """The guided velocity of a network that only adds what it is given, written out here."""
    draw = torch.Generator().manual_seed(0)
    clean, lone, words = torch.randn(2, 4, 3, 4, 6, generator=draw), torch.randn(2, 4, 1, 4, 6, generator=draw), torch.ones(2, 5, 8)
    here = Tracks(torch.full((1, 9, 2), 0.5), torch.ones(1, 9, dtype=torch.bool), torch.zeros(1, dtype=torch.long))
    state = build_state([Given(references=1)] * 2, clean, lone, tracks=[here, None])
    example, guide = Example(state, ["", ""], None, torch.zeros(2, dtype=torch.bool)), object.__new__(Guide)
    guide.scale, guide.camera_scale, guide.brush, guide.reference, guide.reach, guide.sharded = 3.0, 1.0, 4.0, 2.0, 0.0, False

    def net(shown: Example, z: torch.Tensor, words: tuple[torch.Tensor]) -> torch.Tensor:
        maps = shown.state.tracks.abs().sum((1, 2, 3, 4))
        return torch.ones_like(z) * (words[0].sum((1, 2)) + 10 * maps + 100 * z[:, :, -1].abs().sum((1, 2, 3)))[:, None, None, None, None]

    v = guide(net, example, clean := torch.cat([clean, lone], dim=2), words, torch.zeros(2, 5, 8))
    text, maps, picture = 40.0, 10 * state.tracks.abs().sum((1, 2, 3, 4)), 100 * clean[:, :, -1].abs().sum((1, 2, 3))
    assert maps[0] > 0 == maps[1]
    asked = text + maps + picture + (3 - 1) * text + (4 - 1) * maps + (2 - 1) * picture
    assert torch.allclose(v[:, 0, 0, 0, 0], asked)


@pytest.mark.parametrize("camera", [True, False])
@pytest.mark.parametrize("given", [True, False], ids=["given", "predicted"])
def test_the_passes_of_guidance_are_counted(camera: bool, given: bool) -> None:
    """With all scales, against the calls of a network; without tracks, references or a camera those cost nothing."""
    guide, calls = object.__new__(Guide), []
    guide.scale, guide.camera_scale, guide.brush, guide.reference, guide.reach, guide.sharded = 3.0, 2.0, 4.0, 2.0, 0.0, False
    clean, here = torch.zeros(1, 4, 3, 4, 6), Tracks(torch.full((1, 9, 2), 0.5), torch.ones(1, 9, dtype=torch.bool), torch.zeros(1).long())
    for references, tracks in ((0, None), (1, [here])):
        state = build_state([Given(references=references)], clean, clean[:, :, :1] if references else None, tracks=tracks)
        example = Example(state, [""], torch.zeros(1) if camera else None, torch.ones(1, dtype=torch.bool))
        calls.clear()
        z = torch.zeros_like(state.clean)
        net = lambda shown, z, words: calls.append(1) or torch.zeros_like(z)  # noqa: E731
        guide(net, example, z, torch.zeros(1, 5, 8), torch.zeros(1, 5, 8), z if given else None)
        assert guide.passes(example) - given == len(calls)


def test_a_batch_of_one_clip_has_steps_of_length_0(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of them, as of larger batches."""
    drawn: list[int] = []
    monkeypatch.setattr(distill, "draw_steps", lambda b, plain, *rest: drawn.append(plain) or draw_steps(b, plain, *rest))
    run(teacher, tmp_path, "steps=16", "batch=1", "guidance_scale=1", "camera_guidance_scale=1", "save_every=100")
    assert len(drawn) == 16 and 1 <= sum(drawn) <= 8 and set(drawn) == {0, 1}


def test_a_pass_whose_change_is_0_is_made_only_where_others_need_it(able: Path) -> None:
    """A student that sees no tracks or references needs no pass without them; one of sharded weights needs those of the other processes."""
    start, said = open_start(able / "model"), ["configs/distill/debug.yaml", f"teacher={able / 'model'}"]
    with_map = build_state([Given()], torch.zeros(1, 4, 3, 4, 6), None, tracks=[None])  # as of every batch for weights that take tracks

    def scales(sharded: bool, *settings: str) -> dict[str, float]:
        return Guide(load_config(students.DistillConfig, said[0], [*said[1:], *settings]), start, sharded).without(with_map)

    assert scales(False) == scales(True) == {"no tracks": 1, "no references": 1}
    assert scales(False, "brush=0.2", "reference=0.2") == {"no tracks": 3, "no references": 1}
    assert scales(True, "brush=0.2", "reference=0.2") == {"no tracks": 3, "no references": 2}
    assert scales(True, "brush=0.2", "brush_guidance_scale=5") == {"no tracks": 5, "no references": 1}


MATCHING = ("method=dmd", "dmd.critic_updates=2", "dmd.critic_lr=1e-3", "lr=1e-3", "num_inference_steps=3", "guidance_scale=3")


def test_matching_alone_makes_nothing_for_mode_fast(teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Refused before the first update: mode fast takes flow maps."""
    with pytest.raises(SystemExit) as ended:
        run(teacher, tmp_path, "steps=1", "beside=true", *MATCHING)
    assert ended.value.code == 2 and "beside: mode fast takes a flow map, and dmd alone makes none" in capsys.readouterr().err
    assert not (tmp_path / "metrics.jsonl").exists()


def test_matching_resumes_to_the_bit_and_its_export_goes_to_clean_and_back(teacher: Path, tmp_path: Path) -> None:
    """Stopped after an update of the critic: both networks and their optimizers go on. Every third update is the student's."""
    straight = run(teacher, tmp_path / "a", "steps=6", "save_every=2", *MATCHING)
    with pytest.raises(SystemExit), stopped_after(4):
        run(teacher, tmp_path / "b", "steps=6", "save_every=2", *MATCHING)
    again = run(teacher, tmp_path / "b", "steps=6", "save_every=2", *MATCHING)
    turns = [next(key for key in line if key.endswith("/loss")) for line in straight]
    assert turns == ["critic/loss", "critic/loss", "student/loss"] * 2
    assert [line[key] for line, key in zip(again, turns, strict=True)] == [line[key] for line, key in zip(straight, turns, strict=True)]
    assert weights(tmp_path / "a") == weights(tmp_path / "b") != weights_of(teacher / "model")
    assert all(line["motion"] > 0 for line in straight)
    pipe = KlingPipeline.from_pretrained(tmp_path / "a" / "export")
    plan = pipe.plan(Request("a red ball", num_frames=5, size="32x32"))
    assert (plan.solver, plan.num_inference_steps, plan.guidance_scale) == ("renoise", 3, 1.0)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("method", [(), MATCHING], ids=["flow_map", "dmd"])
def test_a_repeatedly_killed_run_ends_as_if_uninterrupted(teacher: Path, tmp_path: Path, method: tuple[str, ...]) -> None:
    survives(3, arguments(teacher, tmp_path, "steps=12", "save_every=2", "threads=1", *method), tmp_path)


def test_a_student_of_an_earlier_teacher_goes_on_with_a_new_one(teacher: Path, tmp_path: Path) -> None:
    """It keeps its own weights, and takes from the new teacher what it lacks: here a camera."""
    run(teacher, tmp_path / "old", "steps=2", "beside=true", "lr=1e-2")
    export = tmp_path / "old" / "export"
    cfg = load_config(students.DistillConfig, "configs/distill/debug.yaml", [f"student={export}", f"teacher={teacher / 'model'}"])
    old = KlingPipeline.from_pretrained(export).transformer_fast.state_dict()
    built = students.build(cfg, open_start(teacher / "model")).transformer.state_dict()
    assert built.keys() == old.keys() and all(torch.equal(built[name], old[name].float()) for name in old)
    bare = KlingPipeline.from_pretrained(export)
    config = {k: v for k, v in bare.transformer_fast.config.items() if not k.startswith("_")}
    smaller = type(bare.transformer_fast)(**config | {"camera_channels": 0})
    smaller.save_pretrained(tmp_path / "bare" / "transformer")
    cfg.student = str(tmp_path / "bare")
    grown = students.build(cfg, open_start(teacher / "model")).transformer.state_dict()
    own, theirs = smaller.state_dict(), KlingPipeline.from_pretrained(teacher / "model").transformer.state_dict()
    assert own.keys() < grown.keys() and all(torch.equal(grown[name], own[name].float()) for name in own)
    assert all(torch.equal(grown[name], theirs[name].float()) for name in grown.keys() - own.keys())
    cfg.student = str(teacher / "model")
    with pytest.raises(UserError, match="has gate_value None"):
        students.build(cfg, open_start(teacher / "model"))


def test_matching_goes_on_from_a_flow_map(teacher: Path, tmp_path: Path) -> None:
    run(teacher, tmp_path / "map", "steps=1", "beside=true")
    run(teacher, tmp_path / "dmd", "steps=3", f"student={tmp_path / 'map' / 'export'}", *MATCHING)
    pipe = KlingPipeline.from_pretrained(tmp_path / "dmd" / "export")
    assert pipe.transformer.config.gate_value == 0.25 and pipe.plan(Request("a ball", num_frames=5)).solver == "flow_map"


@pytest.mark.parametrize("method", ["flow_map", "dmd"])
def test_low_rank_roles_on_shared_weights_are_networks_of_their_own(teacher: Path, tmp_path: Path, monkeypatch, method: str) -> None:
    """The same run with one copy of the frozen weights, and with a copy for each network."""
    settings = ("steps=3", "lora.rank=2", *(MATCHING if method == "dmd" else ()))
    shared = run(teacher, tmp_path / "a", *settings)
    adapt, seen = students.adapted, []

    def apart(cfg: object, model: Trained, _: Trained | None) -> Trained:
        seen.append(model)
        return adapt(cfg, model, None)

    for module in (students, distill_dmd):
        monkeypatch.setattr(module, "adapted", apart)
    own = run(teacher, tmp_path / "b", *settings)
    key = {"dmd": "grad_norm", "flow_map": "loss"}[method]
    told = [[value for name, value in line.items() if name.endswith(key)] for line in (*shared, *own)]
    assert told[:3] == told[3:] and len(seen) == {"dmd": 3, "flow_map": 2}[method]
    assert weights(tmp_path / "a") == weights(tmp_path / "b")


def test_low_rank_networks_hold_one_copy_of_the_frozen_weights(teacher: Path) -> None:
    cfg = load_config(students.DistillConfig, "configs/distill/debug.yaml", ["lora.rank=2", f"teacher={teacher / 'model'}"])
    start = open_start(teacher / "model")
    base = Trained(start.transformer({}), None).requires_grad_(False)
    student = students.build(cfg, start, base)
    places = {p.data_ptr() for p in base.parameters()}
    own = {name: p for name, p in student.named_parameters() if p.data_ptr() not in places}
    assert all(p.requires_grad for p in own.values()) and any("lora_A" in name for name in own) and len(own) < len(places)


@pytest.mark.parametrize(
    ("setting", "said"),
    [("flow_map.velocity=flow", "velocity"), ("flow_map.plain=2", "plain 2: give a share"), ("flow_map.delta=0", "delta 0"),
     ("flow_map.counts=[4,0]", "s = 0"), ("tasks.walk=1", "task"), ("teacher=nowhere", "nowhere"), ("method=adm", "did you mean 'dmd'"),
     ("lora.merge=true", "lora.merge"), ("num_inference_steps=9", "sampled with 1 to 8"),
     ("brush_guidance_scale=4", "brush_guidance_scale 4 is set, and brush is 0"),
     ("reference_guidance_scale=2", "reference_guidance_scale 2 is set, and reference is 0"),
     ("dmd.critic_updates=2", "dmd.critic_updates belongs to method dmd, and this run's is flow_map")],
)  # fmt: skip
def test_mistakes_get_one_line(tmp_path: Path, setting: str, said: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as end:
        distill.main(["configs/distill/debug.yaml", f"out={tmp_path}", setting])
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert end.value.code == 2 and line.startswith("error: ") and said in line
