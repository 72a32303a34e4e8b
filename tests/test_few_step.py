"""Few-step weights, sampled block by block or frame by frame: against diffusers, masked attention and naive loops."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_wan
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor
from torch.nn import functional as F

from kling import KlingFlowScheduler, KlingPipeline, KlingTransformer3DModel, Request
from kling.condition.state import Given, build_state
from kling.dit.history import History
from kling.errors import UserError
from kling.flow.walk import walk
from kling.nn.attention import AttentionProcessor
from kling.runtime.random import generator

G, H, W = 5, 4, 6
TOKENS = H * W // 4  # of a frame


def model(**config: object) -> KlingTransformer3DModel:
    source = tiny_wan.transformer(**config)
    ours = KlingTransformer3DModel.from_config(dict(source.config)).eval()
    ours.load_state_dict(source.state_dict())
    return ours


class Masked(AttentionProcessor):
    """Self-attention in which a token attends to its own block of frames and earlier ones: the definition, in one pass."""

    def __init__(self, size: int) -> None:
        self.size = size

    def attend(self, query: Tensor, key: Tensor, value: Tensor, parallel_config: object | None) -> Tensor:
        n, mask = query.shape[1], None
        if key.shape[1] == n:
            block = torch.arange(n) // TOKENS // self.size
            mask = block[:, None] >= block[None]
        out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (query, key, value)), attn_mask=mask)
        return out.transpose(1, 2).flatten(2)


def masked(ours: KlingTransformer3DModel, size: int) -> KlingTransformer3DModel:
    other = KlingTransformer3DModel.from_config(dict(ours.config)).eval()
    other.load_state_dict(ours.state_dict())
    for block in other.blocks:
        block.attn1.set_processor(Masked(size))
    return other


def test_renoising_is_the_stochastic_sampling_of_diffusers() -> None:
    theirs = FlowMatchEulerDiscreteScheduler(shift=5.0, stochastic_sampling=True)
    theirs.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    ours = KlingFlowScheduler(shift=5.0, solver="renoise", num_inference_steps=4)
    torch.testing.assert_close(ours.sigmas, theirs.sigmas)
    velocity = lambda z: torch.tanh(3 * z) + 0.2  # noqa: E731 - any function will do
    state = build_state([Given()], torch.zeros(1, 4, G, H, W), None)
    noise = torch.randn(1, 4, G, H, W)
    torch.manual_seed(3)
    fresh = [torch.randn_like(noise) for _ in range(4)]
    torch.manual_seed(3)
    z, expected = noise, []
    for t in theirs.timesteps:
        z = theirs.step(velocity(z), t, z, return_dict=False)[0]
        expected.append(z)
    steps = list(walk(state, ours, lambda z, level, end, highest: velocity(z), noise, lambda i: fresh[i]))
    assert len(steps) == 4
    for step, z in zip(steps, expected, strict=True):
        torch.testing.assert_close(step.z, z, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_history_is_block_causal_attention(size: int) -> None:
    """First clean blocks, each remembered, then a noisy one: equal to one masked pass over all frames."""
    ours = model()
    torch.manual_seed(0)
    z, text = torch.randn(1, 16, G, H, W), torch.randn(1, 7, 32)
    last = (G - 1) // size * size  # first frame of the last block
    sigma = torch.zeros(1, G)
    sigma[:, last:] = 0.6
    with torch.no_grad():
        expected = masked(ours, size)(z, sigma, text).sample
        history = History(len(ours.blocks))
        for start in range(0, G, size):
            part = slice(start, min(start + size, G))
            history.keep(start < last)
            positions = torch.arange(G)[None, part].float()
            out = ours(z[:, :, part], sigma[:, part], text, positions=positions, history=history).sample
            torch.testing.assert_close(out, expected[:, :, part], atol=1e-5, rtol=1e-5)
    past = history.layers[0].past
    assert (0 if past is None else past[0].shape[1]) == last * TOKENS, "the noisy block is not remembered"


def test_the_pipeline_makes_blocks_as_self_forcing_does(tmp_path: Path) -> None:
    """The published loop without a cache: every pass runs over all frames so far, with a block-causal mask."""
    folder = tiny_wan.saved("t2v", tmp_path)
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    pipe = KlingPipeline.from_pretrained(folder, transformer=weights, checkpoint="self-forcing-1.3b", torch_dtype=torch.float32)
    frames, size, seed = 21, 3, 4  # 6 latent frames
    noise = torch.randn(1, 16, 6, H, W, generator=torch.Generator().manual_seed(0))
    fields = {"prompt": "a ball", "num_frames": frames, "size": f"{8 * W}x{8 * H}", "seed": seed}
    out = pipe(**fields, latents=noise, output_type="latent").latents
    plan = pipe.plan(Request(**fields))
    assert plan.total_steps == 8 and plan.block_frames == size and plan.guidance_scale == 1
    with pytest.raises(UserError, match="guidance_reach 4: .*leave it out"):
        pipe.plan(Request(**fields, guidance_reach=4))

    reference, text = masked(pipe.transformer, size), pipe.text_encoder.encode(["a ball"])
    sigmas = [5 * s / (1 + 4 * s) for s in (1.0, 0.75, 0.5, 0.25)] + [0.0]
    done = noise[:, :, :0]
    with torch.no_grad():
        for start in (0, 3):
            z = noise[:, :, start : start + size]
            for i, (level, after) in enumerate(zip(sigmas, sigmas[1:], strict=False)):
                levels = torch.tensor([[0.0] * start + [level] * size])
                v = reference(torch.cat([done, z], dim=2), levels, text).sample[:, :, start:]
                x0 = z - level * v
                z = (1 - after) * x0 + after * torch.randn(z.shape, generator=generator(seed, "renoise", 0, start, i))
            done = torch.cat([done, z], dim=2)
    torch.testing.assert_close(out, done, atol=1e-4, rtol=0)
    again = pipe(**fields, latents=noise, output_type="latent").latents
    assert torch.equal(out, again), "the fresh noise follows from the seed"


@pytest.mark.parametrize("solver", ["euler", "adams"])
@pytest.mark.parametrize("delay", [0, 1, 3])
def test_delayed_frames_all_reach_their_targets(solver: str, delay: int) -> None:
    """With the true velocity of a straight path every frame reaches its target, and it starts at the right step."""
    target, noise = torch.randn(1, 4, G, H, W), torch.randn(1, 4, G, H, W)
    state = build_state([Given(known=1)], target, None)
    scheduler = KlingFlowScheduler(solver=solver, num_inference_steps=4)
    levels: list[Tensor] = []

    def velocity(z: Tensor, level: Tensor, end: Tensor, highest: float) -> Tensor:
        levels.append(state.sigma(level)[0, 0, :, 0, 0])
        return noise - target

    steps = list(walk(state, scheduler, velocity, noise, _none, delay))
    torch.testing.assert_close(steps[-1].z, target, atol=1e-5, rtol=0)
    assert len(steps) == 4 + delay * (G - 1)
    for i, level in enumerate(levels):
        expected = [0.0] + [1 - min(max(i - delay * g, 0), 4) / 4 for g in range(1, G)]
        assert level.tolist() == pytest.approx(expected)


def test_the_pipeline_delays_frames_only_for_weights_trained_so(tmp_path: Path) -> None:
    pipe = KlingPipeline.from_pretrained(tiny_wan.saved("t2v", tmp_path), checkpoint="wan2.1-t2v-1.3b", torch_dtype=torch.float32)
    fields = {"prompt": "a", "num_frames": 9, "size": "48x32", "num_inference_steps": 2, "frame_delay": 1, "output_type": "latent"}
    with pytest.raises(UserError, match="not trained for 'diffusion_forcing'"):
        pipe(**fields)
    pipe.register_to_config(capabilities=["text", "diffusion_forcing"])
    seen: list[int] = []
    out = pipe(**fields, callback_on_step_end=lambda pipe, i, t, kept: seen.append(i)).latents
    assert seen == [0, 1, 2, 3] and out.isfinite().all()


def test_our_scheduler_replaces_a_published_one_where_levels_differ(tmp_path: Path) -> None:
    """Restyling puts every token at a fraction of the level, which UniPC does not support: strength 1 returns the clip, 0 ignores it."""
    pipe = KlingPipeline.from_pretrained(tiny_wan.saved("t2v", tmp_path), checkpoint="wan2.1-t2v-1.3b", torch_dtype=torch.float32)
    video = torch.randint(0, 256, (9, 32, 48, 3), dtype=torch.uint8).numpy()
    fields = {"prompt": "a", "size": "48x32", "num_inference_steps": 2, "output_type": "latent", "video": video}
    kept, half, forgotten = (pipe(**fields, strength=strength).latents for strength in (1.0, 0.5, 0.0))
    clean = pipe.encode(torch.from_numpy(video))
    assert torch.equal(kept, clean)
    assert (half - clean).norm() < (forgotten - clean).norm() and not torch.equal(half, clean)


def _none(step: int) -> Tensor:
    raise AssertionError("this walk needs no fresh noise")
