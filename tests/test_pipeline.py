"""The pipeline with a tiny random model: every task, the plan, seeds, continuation, and refusals."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler

from kling import AutoencoderKLKling, ByteTextEncoder, KlingFlowScheduler, KlingPipeline, KlingTransformer3DModel, Request
from kling.cameras.axes import axes_trajectory
from kling.condition.tasks import TASKS
from kling.errors import UserError
from kling.flow.diffusers_scheduler import DiffusersWalk
from kling.sampling import pipeline as pipeline_file

H, W = 64, 112
SHORT = {"num_frames": 5, "num_inference_steps": 2}


def tiny_pipeline(**kwargs) -> KlingPipeline:
    torch.manual_seed(0)
    vae = AutoencoderKLKling(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1], num_res_blocks=1, temperal_downsample=[True, True], patch_size=2,
        in_channels=12, out_channels=12, scale_factor_spatial=8, latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    dit = KlingTransformer3DModel(
        num_attention_heads=1, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=32, freq_dim=16, ffn_dim=32,
        num_layers=1, num_kinds=8, camera_channels=24, camera_fold="pool", camera_downscale=1, camera_residual_blocks=0,
        track_channels=5,
    )  # fmt: skip
    for p in dit.parameters():  # nothing may be zero, otherwise some input would not affect the output
        torch.nn.init.normal_(p, std=0.2)
    text = ByteTextEncoder(byte_dim=32, byte_layers=1, out_dim=32, token_layers=1)
    able = [*TASKS, "camera", "brush", "reference", "text_to_image"]
    pipe = KlingPipeline(vae, dit, text, KlingFlowScheduler(num_inference_steps=2), **{"capabilities": able, "max_frames": 17, **kwargs})
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe() -> KlingPipeline:
    return tiny_pipeline()


def picture(seed: int = 0, h: int = 90, w: int = 160) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)


def movie(frames: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, H, W, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("fields", "task", "frames"),
    [
        ({"num_frames": 1}, "text_to_image", 1),
        ({}, "text", 5),
        ({"image": picture()}, "image", 5),
        ({"last_image": picture()}, "last", 5),
        ({"image": picture(), "last_image": picture(1)}, "first_last", 5),
        ({"keyframes": [(picture(), 2, 0.7)]}, "keyframes", 5),
        ({"loop": True}, "first_last", 5),
        ({"video": movie(9)}, "continuation", 9 + 4),
        ({"video": movie(6), "mask": np.eye(64, 112, dtype=np.float32)}, "inpaint", 5),
        ({"video": movie(5), "outpaint": "9:16"}, "inpaint", 5),
        ({"video": movie(5), "strength": 0.5}, "restyle", 5),
        ({"image": picture(), "camera": "pan=5"}, "image", 5),
        ({"video": movie(9), "camera": {"dolly": 5}}, "continuation", 13),
    ],
)
def test_the_task_follows_from_what_is_given(pipe, fields, task, frames):
    request = Request("a red ball", **{**SHORT, **fields})
    plan = pipe.plan(request)
    out = pipe(request)
    assert plan.task == task and plan.frames == frames
    aspect = (112, 64) if request.outpaint else (H, W)
    assert out.frames.shape == (1, frames, *aspect, 3) and out.frames.dtype == np.uint8


def test_a_seed_gives_the_same_video_alone_in_a_batch_and_in_any_order(pipe):
    torch.rand(3)
    batch = pipe("a cube", seed=5, num_videos=2, **SHORT)
    second = pipe("a cube", seed=6, **SHORT)
    first = pipe("a cube", seed=5, **SHORT)
    assert np.array_equal(batch.frames[0], first.frames[0]) and np.array_equal(batch.frames[1], second.frames[0])
    assert not np.array_equal(first.frames, second.frames)


def test_a_given_first_frame_is_the_vae_s_own_reconstruction(pipe):
    from kling.data.transforms import fit

    image = picture()
    out = pipe("a ball", image=image, **SHORT)
    expected = pipe.decode(pipe.encode(fit(torch.from_numpy(image), H, W)[None]))[0, 0].numpy()
    assert np.abs(out.frames[0, 0].astype(int) - expected.astype(int)).max() <= 1


def test_a_continued_video_keeps_its_frames(pipe):
    video = movie(10)
    out = pipe("on", video=video, **SHORT).frames[0]
    assert np.array_equal(out[:10], video) and len(out) == 14


def test_a_continuation_is_what_was_sampled_from_its_fifth_frame_on(pipe):
    asked = {"video": movie(9), "num_frames": 9, "seed": 2}
    out = pipe("on", **asked).frames[0]  # 9 given frames, 8 new ones
    decoded = pipe.decode(pipe("on", **asked, output_type="latent").latents)[0].numpy()
    assert len(out) == 17 and np.array_equal(out[13:], decoded[13:])


def test_long_clips_are_made_in_hops(pipe):
    plan = pipe.plan(Request(num_frames=41))
    assert [hop.frames for hop in plan.hops] == [17, 17, 17, 17] and plan.frames == 41 and plan.total_steps == 8
    assert [hop.start for hop in plan.hops] == [0, 8, 16, 24]
    assert pipe.plan(Request(extend_to=6.0)).frames == 49


@pytest.mark.parametrize("field", ["prompt", "camera", "image", "last_image", "negative_prompt"])
def test_every_input_reaches_the_output(pipe, field):
    base = {"prompt": "a", "negative_prompt": "b", "camera": "pan=2", "image": picture(0), "last_image": picture(1)}
    other = {"prompt": "z", "negative_prompt": "y", "camera": "pan=-9", "image": picture(2), "last_image": picture(3)}
    a = pipe(Request(**base, **SHORT), output_type="latent").latents
    b = pipe(Request(**{**base, field: other[field]}, **SHORT), output_type="latent").latents
    assert not torch.equal(a[:, :, 1], b[:, :, 1])


def test_camera_guidance_defaults_to_the_checkpoint_s(pipe):
    """And costs nothing without a camera."""
    fields, scheduler = {"prompt": "a", "num_frames": 5, "seed": 1}, pipe.scheduler
    plain, hard = (pipe(**fields, camera="pan=5", camera_guidance_scale=scale).frames for scale in (1.0, 4.0))
    still = pipe(**fields).frames
    assert np.abs(plain - hard.astype(float)).max() > 0
    pipe.scheduler = KlingFlowScheduler(num_inference_steps=2, camera_guidance_scale=4.0)
    try:
        assert np.array_equal(pipe(**fields, camera="pan=5").frames, hard)
        assert np.array_equal(pipe(**fields, camera="pan=5", camera_guidance_scale=1.0).frames, plain)
        assert np.array_equal(pipe(**fields).frames, still)
    finally:
        pipe.scheduler = scheduler


def test_modes_differ(pipe):
    std, pro = pipe.plan(Request()), pipe.plan(Request(mode="pro"))
    assert pro.num_inference_steps == 2 * std.num_inference_steps and (std.solver, pro.solver) == ("euler", "adams")


def test_saved_and_loaded_it_is_the_same(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    again = KlingPipeline.from_pretrained(tmp_path)
    assert again.config.capabilities == pipe.config.capabilities and again.config.max_frames == 17
    for name in ("vae", "transformer", "text_encoder"):
        torch.testing.assert_close(getattr(again, name).state_dict(), getattr(pipe, name).state_dict(), rtol=0, atol=0)
        for parameter in getattr(again, name).parameters():  # products round by the alignment of their weights, which a file does not keep
            parameter.data = parameter.data.clone()
    a, b = pipe("a ball", **SHORT).frames, again("a ball", **SHORT).frames
    assert np.array_equal(a, b)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_frames": 40}, "40 frames.*37 or 41"),
        ({"aspect": "16x9"}, "16x9.*16:9"),
        ({"mode": "hq"}, "hq"),
        ({"camera": "pam=3"}, "pam.*pan"),
        ({"camera": "pan=11"}, r"pan=11.*\[-10, 10\]"),
        ({"keyframes": [(picture(), 5, 1.0)], "num_frames": 5}, "frame 5.*last frame 4"),
        ({"strength": 0.5}, "strength.*video"),
        ({"duration": -1.0}, "duration"),
        ({"duration": 5.0, "num_frames": 41}, "both"),
        ({"prompt": "x" * 300}, "bytes"),
        ({"camera": axes_trajectory({}, 9, H, W), "num_frames": 5}, "9 poses.*5 frames"),
    ],
)
def test_bad_requests_are_refused_in_one_line(pipe, fields, message):
    with pytest.raises(UserError, match=message) as error:
        pipe(Request(**{"num_inference_steps": 1, **fields}))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("fields", "name"), [({"image": picture()}, "image"), ({"camera": "pan=1"}, "camera"), ({"video": movie(5)}, "continuation")]
)
def test_untrained_tasks_are_refused_by_name(fields, name):
    with pytest.raises(UserError, match=f"not trained for '{name}'"):
        tiny_pipeline(capabilities=["text"]).plan(Request(**fields))


def test_a_missing_or_half_written_model_is_refused(pipe, tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        KlingPipeline.from_pretrained(tmp_path / "nowhere")
    pipe.save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"half")
    with pytest.raises(UserError, match="transformer"):
        KlingPipeline.from_pretrained(tmp_path / "m")


WAN = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}


@pytest.mark.parametrize(
    ("fields", "solver"),
    [
        ({}, "UniPCMultistepScheduler"),
        ({"image": picture()}, "UniPCMultistepScheduler"),
        ({"video": movie(5), "strength": 1.0}, "UniPCMultistepScheduler"),
        ({"sigma_c": 0.1}, "UniPCMultistepScheduler"),  # of nothing
        ({"image": picture(), "sigma_c": 0.1}, "adams"),
        ({"keyframes": [(picture(), 2, 0.7)]}, "adams"),
        ({"video": movie(5), "strength": 0.5}, "adams"),
        ({"frame_delay": 1}, "adams"),
    ],
)
def test_the_planned_scheduler_is_the_one_used(fields, solver, monkeypatch):
    pipe = tiny_pipeline(capabilities=[*TASKS, "diffusion_forcing"], defaults={"guidance_scale": 1.0})
    pipe.register_modules(scheduler=UniPCMultistepScheduler(**WAN))
    walked = []
    for walk in (DiffusersWalk, KlingFlowScheduler):
        step = walk.step
        monkeypatch.setattr(walk, "step", lambda self, *args, step=step, **kwargs: (walked.append(self), step(self, *args, **kwargs))[1])
    request = Request(prompt="a ball", **({} if "video" in fields else {"num_frames": 5}), num_inference_steps=2, **fields)
    plan = pipe.plan(request)
    assert plan.solver == solver and len(plan.notes) == (solver == "adams")
    pipe(request, output_type="latent")
    names = {walk._solver if isinstance(walk, KlingFlowScheduler) else type(walk.scheduler).__name__ for walk in walked}
    assert names == {solver}


def test_a_solver_can_be_chosen(pipe):
    """In any mode; the settings record which one was used."""
    frames = {name: pipe("a ball", solver=name, num_frames=5, num_inference_steps=3).frames for name in ("euler", "adams", "renoise")}
    assert np.array_equal(frames["euler"], pipe("a ball", num_frames=5, num_inference_steps=3).frames)
    assert not np.array_equal(frames["euler"], frames["adams"]) and not np.array_equal(frames["euler"], frames["renoise"])
    assert pipe.plan(Request(mode="pro", solver="euler")).solver == "euler"
    with pytest.raises(UserError, match="unknown solver 'eular' .did you mean 'euler'"):
        pipe.plan(Request(solver="eular"))


def test_requests_made_together_are_those_made_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks of one shape in one batch, with and without a picture, a camera for some shots only; hops, joins and pasted parts alone."""
    pipe = tiny_pipeline(capabilities=[*TASKS, "camera", "reference", "shots"])
    settings = {"num_frames": 5, "num_inference_steps": 3, "guidance_scale": 2.0}
    story = {"num_frames": None, "shots": [("a ball", 0.5, "pan=5"), ("a cube", 0.6)]}
    asked = [
        {"prompt": "a ball"},
        {"prompt": "a cube rolls", "image": picture(), "guidance_reach": 0.0},
        {"prompt": "a ball", "num_frames": 9},
        {"prompt": "a ball", "camera": "pan=5"},
        {"prompt": "a cube", "camera": "zoom=2", "image": picture(1)},
        {"prompt": "a ball", "num_frames": None, "extend_to": 2.5},
        {"prompt": "a ball", "video": movie(9)},
        {"prompt": "a ball", "references": [picture(2)]},
        {"prompt": "a cube", "references": [picture(3)]},
        {"prompt": "a ball", "references": [picture(4)], "keyframes": [(picture(5), 2, 1.0)], "reference_guidance_scale": 3.0},
        {"prompt": "a cube", "references": [picture(6), picture(7)], "reference_guidance_scale": 3.0},  # as many frames, of other kinds
        story,
        story | {"shots": [("a cone", 0.6), ("a ring", 0.5)]},
        story | {"shots": [("a ring", 0.6, "dolly=3"), ("a cone", 0.5, "tilt=2")]},
    ]
    requests = [Request(**settings | fields, seed=seed) for seed, fields in enumerate(asked)]
    sizes, sample = [], KlingPipeline._sample
    monkeypatch.setattr(KlingPipeline, "_sample", lambda self, many, seeds: (sizes.append(len(seeds)), sample(self, many, seeds))[1])
    for solver in ("euler", "renoise"):
        pipe.register_modules(scheduler=KlingFlowScheduler(solver=solver))
        sizes.clear()
        made = pipe.together(requests)
        assert sorted(sizes) == [1, 1, 1, 1, 2, 2, 2, 2]
        for request, frames in zip(requests, made, strict=True):
            alone = torch.from_numpy(pipe(request).frames[0])
            assert frames.shape == alone.shape and int((frames.int() - alone.int()).abs().max()) <= 1, request
    with pytest.raises(UserError, match="2 videos of one request"):
        pipe.together([requests[0].replace(num_videos=2)])


@pytest.mark.parametrize("second", [1.0, 2.0])
def test_an_expert_adds_nothing_of_the_guidance_of_the_other(second: float) -> None:
    """The one for low noise begins at the fourth of five steps, which takes over the change of the third if there is one expert."""
    pipe = tiny_pipeline()
    torch.manual_seed(1)
    low = KlingTransformer3DModel.from_config(pipe.transformer.config)
    for p in low.parameters():
        torch.nn.init.normal_(p, std=0.2)
    pipe.register_modules(transformer_2=low)
    pipe.register_to_config(boundary_ratio=0.5)
    pipe.register_modules(scheduler=KlingFlowScheduler(num_inference_steps=5, guidance_scale=[3.0, second]))
    request, seen = Request("a ball", num_frames=5, guidance_every=2), []
    note = lambda pipe, i, t, kept: seen.append((t / 1000, kept["latents"], kept["x0"])) or kept  # noqa: E731
    pipe(request, callback_on_step_end=note, output_type="latent")
    words = {which: pipe.text_encoder.encode([text]) for which, text in (("prompt", "a ball"), ("negative", ""))}
    (_, z, _), (level, _, x0) = seen[2:4]
    with torch.no_grad():
        v = {which: low(z, torch.tensor([level]), text).sample for which, text in words.items()}
    want = v["prompt"] + (second - 1) * (v["prompt"] - v["negative"])
    torch.testing.assert_close(x0, z - level * want, atol=1e-4, rtol=1e-4)


def test_a_plan_counts_the_passes_that_a_step_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the camera only where there is one, whatever the checkpoint's scale; of words also if only the second expert is guided."""
    pipe = tiny_pipeline()
    pipe.register_modules(scheduler=KlingFlowScheduler(num_inference_steps=1, guidance_scale=3.0, camera_guidance_scale=5.5))
    calls, forward = [], KlingTransformer3DModel.forward
    monkeypatch.setattr(KlingTransformer3DModel, "forward", lambda self, *a, **k: calls.append(1) or forward(self, *a, **k))
    for fields in ({}, {"camera": "pan=5"}, {"guidance_scale": 1.0}, {"guidance_scale": 1.0, "camera": "pan=5"}):
        calls.clear()
        pipe("a ball", num_frames=5, output_type="latent", **fields)
        assert len(calls) == pipe.plan(Request("a ball", num_frames=5, **fields)).passes, fields
    plan = pipe.plan(Request("a ball", num_frames=5, guidance_scale=1.0))
    assert dataclasses.replace(plan, guidance_scale_2=4.0).passes == 2
    assert pipe.plan(Request("a", extend_to=2.5)).title == "text to video, then 1 continuation"


def test_given_pictures_are_read_and_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request among several is read once; a reference is encoded once for all hops and videos, and the words for all videos."""
    pipe, read, encoded, said = tiny_pipeline(), [], [], []
    reader, encode, say = pipeline_file.read_inputs, KlingPipeline.encode, ByteTextEncoder.encode
    monkeypatch.setattr(pipeline_file, "read_inputs", lambda *a: read.append(1) or reader(*a))
    monkeypatch.setattr(KlingPipeline, "encode", lambda self, frames: encoded.append(len(frames)) or encode(self, frames))
    monkeypatch.setattr(ByteTextEncoder, "encode", lambda self, texts: said.append(texts) or say(self, texts))
    requests = [Request("a", **SHORT), Request("b", **SHORT, image=picture()), Request("c", **SHORT, video=movie(5))]
    pipe.together(requests)
    assert len(read) == 3
    encoded.clear(), said.clear()
    pipe("a", references=[picture(1), picture(2)], extend_to=3.0, num_videos=2, num_inference_steps=1, guidance_scale=1.0)
    assert encoded.count(1) == 2 and len(encoded) > 2 and said == [["a"]]
