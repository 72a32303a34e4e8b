"""Flow maps: a second level in the network, its solver, published AnyFlow weights, and the mode that samples with few steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_wan
import torch
from diffusers import AnyFlowPipeline, AnyFlowTransformer3DModel, FlowMapEulerDiscreteScheduler
from kling_programs.sample import generate
from peft import LoraConfig
from test_dit import B, G, H, W, inputs, kling, wan
from torch import Tensor

from kling import KlingPipeline, KlingTransformer3DModel, Request
from kling.condition.state import Given, build_state
from kling.errors import UserError
from kling.flow.solvers import KlingFlowScheduler
from kling.flow.walk import walk
from kling.hub import load

GATE = {"gate_value": 0.25}


def anyflow(**config: object) -> AnyFlowTransformer3DModel:
    torch.manual_seed(5)
    small = {"num_attention_heads": 1, "attention_head_dim": 128, "text_dim": 32, "freq_dim": 32, "ffn_dim": 64, "num_layers": 2}
    return tiny_wan.randomised(AnyFlowTransformer3DModel(**small, in_channels=16, out_channels=16, **config))


def ours_of(theirs: AnyFlowTransformer3DModel) -> KlingTransformer3DModel:
    config = {key: value for key, value in theirs.config.items() if not key.startswith("_")}
    model = KlingTransformer3DModel(**config).eval()
    model.load_state_dict(theirs.state_dict())
    return model


def test_a_step_of_length_0_has_the_velocity_of_the_weights_it_began_with(tmp_path: Path) -> None:
    wan().save_pretrained(tmp_path)
    model = KlingTransformer3DModel.from_pretrained(tmp_path, **GATE)
    given = inputs()
    plain = kling()(**given).sample
    torch.testing.assert_close(model(**given).sample, plain, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(**given, sigma_next=given["sigma"]).sample, plain, atol=1e-5, rtol=1e-5)
    longer = model(**given, sigma_next=torch.zeros(B)).sample
    assert (longer - plain).abs().max() > 1e-3, "the end of a step is heard"


@pytest.mark.parametrize("kind", ["r", "t-r"])
def test_the_network_is_diffusers_anyflow(kind: str) -> None:
    theirs = anyflow(deltatime_type=kind)
    ours, text = ours_of(theirs), torch.randn(B, 5, 32)
    z, t = torch.randn(B, 16, 3, H, W), torch.rand(B, 3)
    r = t * torch.rand(B, 3)
    with torch.no_grad():
        want = theirs(z.transpose(1, 2), 1000 * t, 1000 * r, text).sample.transpose(1, 2)
        got = ours(z, t, text, sigma_next=r).sample
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)


def test_every_token_hears_its_own_end() -> None:
    """Samples, frames and tokens with levels of their own: each as if it stood alone with that level and end."""
    model = kling(wan())
    model = KlingTransformer3DModel(**{k: v for k, v in model.config.items() if not k.startswith("_")} | GATE).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    given = inputs(sigma=torch.tensor([[0.5] * G, [0.25] * G]))
    ends = torch.tensor([[0.5] * (G - 1) + [0.0], [0.125] * G])
    per_frame = model(**given, sigma_next=ends).sample
    h, w = H // 2, W // 2
    spelled = [x[:, :, None, None].expand(B, G, h, w).contiguous() for x in (given["sigma"], ends)]
    per_token = model(**(given | {"sigma": spelled[0]}), sigma_next=spelled[1]).sample
    torch.testing.assert_close(per_token, per_frame, atol=1e-5, rtol=1e-5)
    alone = model(**(inputs() | {"sigma": torch.full((B,), 0.25)}), sigma_next=torch.full((B,), 0.125)).sample
    torch.testing.assert_close(per_frame[1], alone[1], atol=1e-5, rtol=1e-5)
    assert (model(**given).sample - per_frame)[0].abs().max() > 1e-3


def test_a_state_gives_each_token_its_share_of_both_levels() -> None:
    state = build_state([Given(known=1), Given(hold=0.25)], torch.randn(2, 4, 3, 4, 4), None)
    level, end = torch.tensor([0.8, 0.4]), torch.tensor([0.2, 0.0])
    values, index, ends = state.levels(level, end)
    frames = state.mask[:, 0, :, 0, 0]  # (2, 3)
    index = index.expand(2, 3) if index.shape[1] == 1 else index
    assert torch.equal(values[index], frames * level[:, None]) and torch.equal(ends[index], frames * end[:, None])


def test_ends_are_refused_by_a_network_without_them() -> None:
    with pytest.raises(UserError, match="no flow map .*leave it out"):
        kling()(**inputs(), sigma_next=torch.zeros(B))
    with pytest.raises(UserError, match="give both alike"):
        kling()(**inputs(), sigma_next=torch.zeros(B, G))
    with pytest.raises(UserError, match="deltatime_type"):
        kling(**GATE, deltatime_type="s")


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_true_flow_map_arrives_in_any_number_of_steps(steps: int) -> None:
    """x0 ~ N(0, s²): the flow is known in closed form, and one step of its mean velocity is exact where Euler's is not."""
    s = 0.5
    state, noise = build_state([Given()], torch.zeros(1, 4, 3, 4, 4), None), torch.randn(1, 4, 3, 4, 4)

    def size(t: Tensor) -> Tensor:  # standard deviation of x_t = (1 - t) x0 + t eps
        return ((1 - t) ** 2 * s**2 + t**2).sqrt()

    def mean_velocity(z: Tensor, t: Tensor, r: Tensor, highest: float) -> Tensor:
        return z * (1 - size(r) / size(t)) / (t - r)

    def velocity(z: Tensor, t: Tensor, r: Tensor, highest: float) -> Tensor:
        return z * (t - (1 - t) * s**2) / size(t) ** 2

    ends = {}
    for name, predict in (("map", mean_velocity), ("euler", velocity)):
        scheduler = KlingFlowScheduler(solver="flow_map", num_inference_steps=steps)
        ends[name] = [*walk(state, scheduler, predict, noise, lambda i: None)][-1].z
    torch.testing.assert_close(ends["map"], s * noise, atol=1e-5, rtol=1e-5)
    assert (ends["euler"] - s * noise).abs().max() > 1e-2


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as nvidia published it: the classes of its own repository, and its training's keys in the config."""
    folder = tmp_path_factory.mktemp("anyflow")
    parts = {"tokenizer": tiny_wan.tokenizer(), "text_encoder": tiny_wan.text_encoder(), "vae": tiny_wan.vae(tiny_wan.VAE21)}
    pipe = AnyFlowPipeline(**parts, transformer=anyflow(), scheduler=FlowMapEulerDiscreteScheduler(shift=5.0))
    pipe.save_pretrained(folder)
    edits = {
        "model_index.json": {"_class_name": "WanAnyFlowPipeline"},
        "scheduler/scheduler_config.json": {"_class_name": "FlowMapDiscreteScheduler"},
        "transformer/config.json": {"_class_name": "FAR_Wan_Transformer3DModel", "init_far_model": False, "init_flowmap_model": True,
                                    "chunk_partition": None, "compressed_patch_size": [1, 4, 4], "full_chunk_limit": 3},
    }  # fmt: skip
    for name, changed in edits.items():
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    return folder


def test_published_flow_maps_load_and_walk_as_in_diffusers(published: Path) -> None:
    pipe = KlingPipeline.from_pretrained(published, checkpoint="anyflow-1.3b", torch_dtype=torch.float32)
    fields = {"prompt": "a ball", "num_frames": 9, "size": f"{8 * W}x{8 * H}"}
    plan = pipe.plan(Request(**fields))
    assert (plan.solver, plan.num_inference_steps, plan.guidance_scale, plan.shift) == ("flow_map", 4, 1.0, 5.0)
    noise = torch.randn(1, 16, 3, H, W)
    out = pipe(**fields, latents=noise, output_type="latent").latents

    theirs, text = anyflow(), pipe.text_encoder.encode(["a ball"])
    scheduler = FlowMapEulerDiscreteScheduler(shift=5.0)
    scheduler.set_timesteps(4)
    z = noise.transpose(1, 2)
    with torch.no_grad():
        for i, t in enumerate(scheduler.timesteps):
            r = 1000 * scheduler.sigmas[i + 1]
            v = theirs(z, t.expand(1, 3).float(), r.expand(1, 3).float(), text).sample
            z = scheduler.step(v, t, z, r, return_dict=False)[0]
    torch.testing.assert_close(out, z.transpose(1, 2), atol=1e-4, rtol=1e-3)


def test_causal_anyflow_is_refused(published: Path, tmp_path: Path) -> None:
    config = json.loads((published / "transformer" / "config.json").read_text())
    with pytest.raises(UserError, match="causal AnyFlow .*not supported"):
        KlingTransformer3DModel.from_config(config | {"init_far_model": True})


# ---- mode fast ----


@pytest.fixture(scope="module")
def with_fast(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped model with an untrained few-step map beside it: its own weights, and a gate."""
    folder = tmp_path_factory.mktemp("fast")
    pipe = KlingPipeline.from_pretrained()
    (folder / "plain").mkdir()
    pipe.transformer.save_pretrained(folder / "plain")
    fast = KlingTransformer3DModel.from_pretrained(folder / "plain", **GATE)
    parts = {name: getattr(pipe, name) for name in ("vae", "transformer", "text_encoder", "scheduler")}
    kept = {name: pipe.config[name] for name in ("capabilities", "fps", "max_frames")}
    KlingPipeline(**parts, **kept, transformer_fast=fast, fast={"num_inference_steps": 4}).save_pretrained(folder / "model")
    return folder / "model"


def test_fast_takes_four_steps_of_one_pass_each(with_fast: Path) -> None:
    pipe = KlingPipeline.from_pretrained(with_fast)
    passes: list[str] = []
    pipe.transformer.register_forward_hook(lambda *_: passes.append("std"))
    pipe.transformer_fast.register_forward_hook(lambda *_: passes.append("fast"))
    request = Request("a red ball rolls left on grass", num_frames=5, camera="pan=5", mode="fast", seed=3)
    plan = pipe.plan(request)
    assert (plan.num_inference_steps, plan.solver, plan.guidance_scale, plan.camera_guidance_scale) == (4, "flow_map", 1.0, 1.0)
    assert plan.shift == pipe.plan(request.replace(mode="std")).shift
    frames = pipe(request).frames
    assert passes == ["fast"] * 4 and frames.shape[1] == 5
    passes.clear()
    pipe(request.replace(mode="std", num_inference_steps=2, guidance_scale=1.0, camera_guidance_scale=1.0))
    assert passes == ["std"] * 2


@pytest.mark.parametrize(
    ("field", "value"),
    [("negative_prompt", "dark"), ("guidance_scale", 4.0), ("camera_guidance_scale", 2.0), ("guidance_reach", 3.0), ("guidance_every", 2),
     ("guidance_interval", (0.2, 0.9)), ("solver", "adams"), ("num_inference_steps", 9)],
)  # fmt: skip
def test_what_a_flow_map_has_no_use_for_is_refused_by_name(with_fast: Path, field: str, value: object) -> None:
    pipe = KlingPipeline.from_pretrained(with_fast, weights=False)
    with pytest.raises(UserError, match=rf"{field}.*(leave it out|mode std)"):
        pipe.plan(Request("a ball", num_frames=5, mode="fast", **{field: value}))


def test_few_step_weights_are_read_for_mode_fast_alone(with_fast: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    whole = load.loaded
    monkeypatch.setattr(load, "loaded", lambda folder, name, *rest, **how: (read.append(name), whole(folder, name, *rest, **how))[1])
    words = ["a ball", "--model", str(with_fast), "--num-frames", "5", "--num-inference-steps", "2", "--seed", "1"]
    for mode in ("std", "fast"):
        read.clear()
        generate.main([*words, "--mode", mode, "--output", str(tmp_path / f"{mode}.mp4")])
        assert read.count("transformer") == 1 and read.count("transformer_fast") == (mode == "fast")
    assert KlingPipeline.from_pretrained(with_fast, weights=False).transformer_fast is not None, "everyone else has both"


@pytest.mark.parametrize("given", [["--lora", "a.safetensors"], ["--cache", "first-block=0.1"]])
def test_what_would_change_other_weights_is_refused_beside_fast(with_fast: Path, given: list[str], tmp_path: Path, capsys) -> None:
    words = ["a ball", "--mode", "fast", "--num-frames", "5", "--model", str(with_fast), "--output", str(tmp_path / "a.mp4")]
    (tmp_path / "a.safetensors").write_bytes(b"")
    given = [str(tmp_path / word) if word.endswith(".safetensors") else word for word in given]
    with pytest.raises(SystemExit) as end:
        generate.main([*words, *given, "--dry-run"])
    assert end.value.code == 2 and f"{given[0]} works on the transformer" in capsys.readouterr().err


def test_a_lora_from_python_is_refused_beside_fast(with_fast: Path) -> None:
    pipe = KlingPipeline.from_pretrained(with_fast)
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(UserError, match="mode fast: the LoRA changes the transformer"):
        pipe.plan(Request("a ball", num_frames=5, mode="fast"))


def test_fast_needs_few_step_weights_and_its_solver_too() -> None:
    pipe = KlingPipeline.from_pretrained(weights=False)
    pipe.register_modules(transformer_fast=None)  # whatever is shipped
    with pytest.raises(UserError, match="mode fast: this model has no few-step weights .*kling-distill"):
        pipe.plan(Request("a ball", mode="fast"))
    with pytest.raises(UserError, match="solver flow_map: these weights were not distilled for it"):
        pipe.plan(Request("a ball", solver="flow_map"))
