"""The transformer: exactly Wan's function without extras, extras that start at zero, and all features of diffusers models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from diffusers import FirstBlockCacheConfig, WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from peft import LoraConfig
from torch import Tensor

from kling.dit import KlingTransformer3DModel
from kling.errors import UserError
from kling.nn.modulation import Modulation, gate, modulate, noise_levels
from kling.nn.patch import patchify, unpatchify
from kling.nn.rope import RotaryPosEmbed

SMALL = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "text_dim": 12,
    "freq_dim": 32,
    "ffn_dim": 48,
    "num_layers": 2,
    "in_channels": 4,
}
SMALL |= {"out_channels": 4, "rope_max_seq_len": 32}
EXTRAS = {"num_kinds": 5, "camera_channels": 24}
B, G, H, W, TOKENS = 2, 3, 4, 6, 18  # latents, and tokens at patch (1, 2, 2)


def wan(**config: object) -> WanTransformer3DModel:
    """diffusers' class with random weights, so that no part has zero effect."""
    torch.manual_seed(0)
    model = WanTransformer3DModel(**SMALL | config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def kling(source: WanTransformer3DModel | None = None, **config: object) -> KlingTransformer3DModel:
    """Our class with the weights of a Wan model, and the same configuration unless given otherwise."""
    source = source or wan()
    model = KlingTransformer3DModel(**{k: v for k, v in source.config.items() if not k.startswith("_")} | config).eval()
    lacking, surplus = model.load_state_dict(source.state_dict(), strict=not config)
    assert not surplus and all(key.startswith(("kind_embedding", "control_adapter")) for key in lacking)
    return model


def inputs(**more: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {
        "hidden_states": torch.randn(B, 4, G, H, W),
        "encoder_hidden_states": torch.randn(B, 5, 12),
        "sigma": torch.tensor([0.125, 0.75]),
    } | more


def rays(size: int = 8) -> Tensor:
    return torch.randn(B, 24, G, H * size, W * size)


def gradients(model: torch.nn.Module, output: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    (output * torch.linspace(-1, 1, output.numel()).view_as(output)).mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


# ---- the same function as Wan ----

IMAGE = {"image_dim": 10, "added_kv_proj_dim": 32}
LEVELS = {
    "a sample": (torch.tensor([125.0, 750.0]), (B,)),
    "a frame": (torch.tensor([[0.0, 500.0, 500.0], [250.0, 250.0, 750.0]]).repeat_interleave(6, 1), (B, G)),
    "a token": (torch.linspace(0, 1000, B * TOKENS).view(B, TOKENS).round(), (B, G, 2, 3)),
}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    "config", [{}, {"cross_attn_norm": False}, IMAGE, IMAGE | {"pos_embed_seq_len": 14}], ids=["t2v", "no norm2", "i2v", "flf2v"]
)
def test_equals_wan_in_output_and_gradients(config: dict, level: str) -> None:
    theirs = wan(**config)
    ours = kling(theirs)
    timestep, shape = LEVELS[level]
    sigma = timestep.double().div(1000)
    sigma = sigma[:, ::6] if shape == (B, G) else sigma.view(shape)
    x = inputs()
    if "image_dim" in config:
        x["encoder_hidden_states"] = torch.randn(B, 512, 12)  # diffusers tells image from text tokens by this length
    image = torch.randn(B * (2 if "pos_embed_seq_len" in config else 1), 7, 10) if "image_dim" in config else None
    latents = [x["hidden_states"].clone().requires_grad_() for _ in range(2)]
    a = theirs(latents[0], timestep, x["encoder_hidden_states"], image).sample
    b = ours(latents[1], sigma, x["encoder_hidden_states"], encoder_hidden_states_image=image).sample
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    expected, actual = gradients(theirs, a), gradients(ours, b)
    assert expected.keys() == actual.keys()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], atol=1e-5, rtol=1e-4, msg=name)
    torch.testing.assert_close(latents[0].grad, latents[1].grad, atol=1e-5, rtol=1e-4)


def test_state_dicts_load_strictly_both_ways() -> None:
    theirs = wan()
    ours = kling(theirs)
    wan().load_state_dict(ours.state_dict(), strict=True)
    KlingTransformer3DModel.from_config(theirs.config).load_state_dict(theirs.state_dict(), strict=True)


def test_equals_wan_in_bf16() -> None:
    theirs = wan().to(torch.bfloat16)
    ours = kling(theirs).to(torch.bfloat16)
    x, text = (inputs()[name].bfloat16() for name in ("hidden_states", "encoder_hidden_states"))
    a = theirs(x, torch.tensor([125.0, 750.0]), text).sample
    b = ours(x, torch.tensor([0.125, 0.75]), text).sample
    assert b.dtype == torch.bfloat16
    assert (a - b).norm() < 0.02 * a.norm()


def test_integer_positions_give_the_rotations_of_wan() -> None:
    cos, sin = WanRotaryPosEmbed(16, (1, 2, 2), 32)(torch.empty(B, 4, G, H, W))
    ours = RotaryPosEmbed(16)(torch.arange(G)[None], 2, 3)
    assert torch.equal(ours[..., 0], cos[..., ::2]) and torch.equal(ours[..., 1], sin[..., 1::2])


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_levels_are_embedded_in_fp32_under_autocast(bf16: bool) -> None:
    """Autocast is not used in sampling, so in training the embedding of levels is excluded from it; what follows is not."""
    embedder = kling().condition_embedder
    sigma, text = torch.tensor([0.5, 0.5001]), torch.randn(2, 5, 12)
    temb, vectors, *_ = embedder(sigma, text)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        cast = embedder(sigma, text)
    assert torch.equal(cast[0], temb) and not torch.equal(temb[0], temb[1])
    assert cast[1].dtype == (torch.bfloat16 if bf16 else torch.float32)


# ---- compiled ----


class Counted:
    """A backend of `torch.compile` that runs the graph unchanged, and keeps it."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        self.graphs.append(graph)
        return graph


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_compiled_blocks_need_few_graphs_of_real_numbers_for_any_shape() -> None:
    """15 shapes, with levels per sample, per frame and per token, of one and of several samples, give two graphs (rows and tokens), and two
    more for one sample. With more than eight, torch would silently train without compiling, or fail to make one graph."""
    torch._dynamo.reset()
    plain, compiled, backend = kling(wan(num_layers=1)).train(), kling(wan(num_layers=1)).train(), Counted()
    compiled.compile_repeated_blocks(dynamic=True, backend=backend)
    shapes = [(b, frames, 2 * h, 2 * w) for b, frames in ((1, 1), (3, 1), (1, 3), (2, 6), (5, 11)) for h, w in ((4, 7), (7, 4), (5, 5))]
    for b, frames, h, w in shapes:
        x, text = torch.randn(b, 4, frames, h, w), torch.randn(b, 5, 12)
        places = torch.arange(float(frames)).expand(b, frames).clone()
        for level in (torch.rand(b), torch.rand(b, frames), torch.rand(b, frames, h // 2, w // 2)):
            expected, found = (model(x, level, text, positions=places).sample for model in (plain, compiled))
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
        a, b_ = gradients(plain, expected), gradients(compiled, found)
        for name in a:
            torch.testing.assert_close(b_[name], a[name], atol=1e-5, rtol=1e-3, msg=name)
    assert len(backend.graphs) <= 4
    values = [node.meta.get("example_value") for graph in backend.graphs for node in graph.graph.nodes]
    assert not any(value.is_complex() for value in values if isinstance(value, Tensor))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_compiled_blocks_need_few_graphs_for_the_batches_of_the_small_world() -> None:
    """Lengths and aspects, appended frames, cameras, tracks and storyboards, in every mixture. Of these a block sees the shots alone."""
    torch._dynamo.reset()
    config = SMALL | {"num_layers": 1, "num_kinds": 8, "camera_channels": 24, "track_channels": 5}
    torch.manual_seed(0)
    plain, compiled, backend = KlingTransformer3DModel(**config), KlingTransformer3DModel(**config), Counted()
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    compiled.load_state_dict(plain.state_dict())
    compiled.compile_repeated_blocks(dynamic=True, backend=backend)
    mixtures = list(product((0, 2), (0, 3), (False, True)))  # appended frames, shots, a camera and tracks
    for k, (added, cuts, moved) in enumerate(mixtures):
        for b, frames, h, w in ((1, 1, 4, 7), (3, 5, 7, 4), (2, 11, 5, 5))[k % 2 :]:
            if cuts > frames:
                continue
            whole, text = frames + added, torch.randn(b * max(1, cuts), 5, 12)
            places = torch.cat([torch.arange(float(frames)), torch.full((added,), 1.25)]).expand(b, whole)
            kinds = torch.tensor([0] * frames + [1] * added).expand(b, whole)
            given = {"positions": places, "kinds": kinds}
            given |= {"shots": (torch.arange(whole).clamp(max=frames - 1) * cuts // frames).expand(b, whole)} if cuts else {}
            if moved:
                given |= {"camera": torch.randn(b, 24, whole, 16 * h, 16 * w), "tracks": torch.randn(b, 5, whole, 2 * h, 2 * w)}
            x = torch.randn(b, 4, whole, 2 * h, 2 * w)
            for level in (torch.rand(b), torch.rand(b, whole)):
                expected, found = (model(x, level, text, **given).sample for model in (plain, compiled))
                torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    print(f"graphs of {len(mixtures)} mixtures: {len(backend.graphs)}")
    assert len(backend.graphs) <= 8


@pytest.mark.slow
def test_a_block_may_have_more_than_eight_graphs() -> None:
    torch._dynamo.reset()
    plain, compiled, backend = kling(wan(num_layers=1)), kling(wan(num_layers=1)), Counted()
    compiled.compile_repeated_blocks(dynamic=False, backend=backend)
    with torch.no_grad():
        for frames in range(1, 11):
            x, level, text = torch.randn(1, 4, frames, 4, 4), torch.tensor([0.5]), torch.randn(1, 5, 12)
            torch.testing.assert_close(compiled(x, level, text).sample, plain(x, level, text).sample, atol=1e-5, rtol=1e-4)
    assert len(backend.graphs) == 10


# ---- positions ----


def test_default_positions_are_the_frame_numbers() -> None:
    model = kling()
    assert torch.equal(model(**inputs()).sample, model(**inputs(positions=torch.arange(3.0).expand(B, G))).sample)


def test_only_differences_of_positions_matter_and_they_may_be_negative_or_fractional() -> None:
    model = kling()
    p = torch.tensor([[0.0, 1.625, 3.5], [-2.0, 0.25, 1.0]])
    moved = model(**inputs(positions=p - 7.375)).sample
    torch.testing.assert_close(model(**inputs(positions=p)).sample, moved, atol=1e-5, rtol=0)
    assert (moved - model(**inputs()).sample).abs().max() > 1e-4


def test_samples_do_not_see_each_other() -> None:
    model = kling(**EXTRAS, camera_fold="pool")
    for extra in (model.kind_embedding.weight, model.control_adapter.conv.weight):
        torch.nn.init.normal_(extra, std=0.2)
    x = inputs(positions=torch.tensor([[0.0, 1, 2.5], [-1, 0, 1]]), kinds=torch.tensor([[0, 0, 1], [4, 0, 0]]), camera=rays())
    x["sigma"] = torch.tensor([[0.0, 0.5, 0.5], [0.3, 0.3, 0.9]])
    both = model(**x).sample
    for i in range(B):
        torch.testing.assert_close(model(**{k: v[i : i + 1] for k, v in x.items()}).sample, both[i : i + 1], atol=1e-5, rtol=1e-5)


# ---- noise levels ----


def test_all_forms_of_one_level_are_equivalent() -> None:
    model = kling()
    s = torch.tensor([0.125, 0.75])
    expected = model(**inputs(sigma=s)).sample
    for sigma in (s[:, None].expand(B, G), s[:, None].expand(B, TOKENS), s[:, None, None, None].expand(B, G, 2, 3)):
        torch.testing.assert_close(model(**inputs(sigma=sigma)).sample, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("sigma", "levels", "runs"),
    [
        (torch.tensor([0.5, 0.5]), 2, 1),
        (torch.full((B, G, 2, 3), 0.5), 1, 1),
        (torch.tensor([0.0, 0.5, 0.5]).view(1, G, 1, 1).expand(B, G, 2, 3), 2, G),
        (torch.linspace(0, 1, B * TOKENS).view(B, TOKENS), B * TOKENS, TOKENS),
    ],
)
def test_levels_are_embedded_once_each(sigma: Tensor, levels: int, runs: int) -> None:
    distinct, index, _ = noise_levels(sigma, (G, 2, 3))
    assert distinct.shape == (levels,) and index.shape == (B, runs)
    spelled = distinct[index].repeat_interleave(TOKENS // runs, 1)
    expected = sigma[:, None].expand(B, TOKENS) if sigma.ndim == 1 else sigma.reshape(B, TOKENS)
    assert torch.equal(spelled, expected)


def test_modulation_reads_the_row_of_each_run() -> None:
    table, index, x = torch.randn(4, 2, 8), torch.tensor([[0, 3, 3], [1, 2, 0]]), torch.randn(B, TOKENS, 8)
    shift, scale = (Modulation(table, index).vector(i) for i in (0, 1))
    rows = table[index.repeat_interleave(6, 1)]  # (b, n, 2, 8)
    torch.testing.assert_close(modulate(x, shift, scale), x * (1 + rows[:, :, 1]) + rows[:, :, 0])
    torch.testing.assert_close(gate(x, x**2, shift), x + x**2 * rows[:, :, 0])


def test_patchify_is_inverted() -> None:
    x = torch.randn(B, 4, G, H, W)
    for order in ("cthw", "thwc", "ctwh"):
        assert torch.equal(unpatchify(patchify(x, (1, 2, 2), order), (1, 2, 2), order), x)
    channel_first, channel_last = (patchify(x, (1, 2, 2), order).flatten(1, 3) for order in ("cthw", "thwc"))  # (b, n, 16)
    assert torch.equal(channel_first.unflatten(2, (4, 4)).transpose(2, 3).flatten(2), channel_last)


# ---- extras ----


@pytest.mark.parametrize(("fold", "size"), [("unshuffle", 8), ("pool", 8)])
def test_extras_change_nothing_until_trained_and_then_learn(fold: str, size: int) -> None:
    plain, model = kling(), kling(**EXTRAS, camera_fold=fold, camera_residual_blocks=2)
    x = inputs(kinds=torch.tensor([[0, 1, 2], [4, 0, 0]]), camera=rays(size))
    out = model(**x).sample
    assert torch.equal(out, plain(**inputs()).sample)
    learns = gradients(model, out)
    assert learns["kind_embedding.weight"].abs().sum(1).bool().tolist() == [True, True, True, False, True]
    assert learns["control_adapter.conv.weight"].any() and learns["control_adapter.residual_blocks.1.conv2.weight"].any()


def test_an_absent_camera_adds_exactly_zero() -> None:
    model = kling(**EXTRAS, camera_fold="pool")
    for parameter in model.control_adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    without, x = model(**inputs()).sample, rays()
    masked = model(**inputs(camera=x, camera_mask=torch.tensor([True, False]))).sample
    assert torch.equal(masked[1], without[1]) and not torch.allclose(masked[0], without[0])
    assert torch.equal(masked[:1], model(**inputs(camera=x)).sample[:1])


def test_camera_parameters_have_the_names_of_the_published_weights() -> None:
    names = {n for n, _ in kling(**EXTRAS).named_parameters() if n.startswith("control_adapter")}
    layers = ("conv", "residual_blocks.0.conv1", "residual_blocks.0.conv2")
    assert names == {f"control_adapter.{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}


def test_without_kinds_all_frames_are_targets() -> None:
    model = kling(num_kinds=5)
    torch.nn.init.normal_(model.kind_embedding.weight)
    torch.testing.assert_close(model(**inputs()).sample, model(**inputs(kinds=torch.zeros(B, G, dtype=torch.long))).sample)


def test_inputs_that_the_model_cannot_use_are_refused() -> None:
    plain, able = kling(), kling(**EXTRAS)
    with pytest.raises(UserError, match="no camera input"):
        plain(**inputs(camera=rays()))
    with pytest.raises(UserError, match="num_kinds"):
        plain(**inputs(kinds=torch.ones(B, G, dtype=torch.long)))
    with pytest.raises(UserError, match="num_kinds"):
        able(**inputs(kinds=torch.full((B, G), 5)))
    with pytest.raises(UserError, match="pixels per latent cell"):
        able(**inputs(camera=rays(16)))
    with pytest.raises(UserError, match="camera of 6 channels"):
        able(**inputs(camera=rays()[:, :6]))
    with pytest.raises(UserError, match="no image branch"):
        plain(**inputs(encoder_hidden_states_image=torch.randn(B, 7, 10)))
    with pytest.raises(UserError, match="one per sample, frame or token"):
        plain(**inputs(sigma=torch.rand(B, 5)))
    with pytest.raises(UserError, match="positions"):
        plain(**inputs(positions=torch.rand(B, 5)))
    with pytest.raises(UserError, match="did you mean 'pool'"):
        KlingTransformer3DModel(**SMALL, camera_channels=24, camera_fold="pol")


def test_a_new_model_predicts_zero_and_every_weight_learns() -> None:
    model = KlingTransformer3DModel(**SMALL)
    out = model(**inputs()).sample
    assert not out.any()
    for _ in range(2):  # the head first, then what is behind it
        for parameter, grad in zip(model.parameters(), gradients(model, model(**inputs()).sample).values(), strict=True):
            parameter.data -= 0.1 * grad
    assert all(grad.any() for grad in gradients(model, model(**inputs()).sample).values())


# ---- what diffusers does with a model ----


@pytest.fixture(scope="module")
def wan_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wan")
    wan().save_pretrained(folder)
    return folder


def test_a_wan_folder_loads_with_extras_that_are_zero(wan_folder: Path) -> None:
    model = KlingTransformer3DModel.from_pretrained(wan_folder, **EXTRAS, camera_fold="pool")
    assert type(model) is KlingTransformer3DModel
    assert not any(p.is_meta for p in model.parameters())
    out = model(**inputs(kinds=torch.full((B, G), 4), camera=rays())).sample
    assert torch.equal(out, kling()(**inputs()).sample)


def test_loading_in_bf16_keeps_what_must_stay_fp32(wan_folder: Path) -> None:
    model = KlingTransformer3DModel.from_pretrained(wan_folder, torch_dtype=torch.bfloat16, **EXTRAS)
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    assert dtypes["blocks.0.scale_shift_table"] == dtypes["condition_embedder.time_embedder.linear_1.weight"] == torch.float32
    assert dtypes["blocks.0.attn1.to_q.weight"] == dtypes["control_adapter.conv.weight"] == torch.bfloat16
    x = {k: v.bfloat16() for k, v in inputs(camera=rays()).items()} | {"sigma": torch.tensor([0.125, 0.75])}
    assert model(**x).sample.isfinite().all()


def test_saving_and_loading_keeps_everything(tmp_path: Path) -> None:
    model = kling(**EXTRAS, camera_fold="pool")
    torch.nn.init.normal_(model.kind_embedding.weight)
    model.save_pretrained(tmp_path)
    again = KlingTransformer3DModel.from_pretrained(tmp_path)
    assert again.config.num_kinds == 5 and all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_unknown_config_keys_are_refused(wan_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'num_kinds'"):
        KlingTransformer3DModel.from_pretrained(wan_folder, num_kind=5)
    with pytest.raises(UserError, match="did you mean 'ffn_dim'"):
        KlingTransformer3DModel.from_config({**SMALL, "ffn_dims": 3})
    kling().save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"mystery": 1}))
    with pytest.raises(UserError, match="mystery"):
        KlingTransformer3DModel.from_pretrained(tmp_path)


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    shallow = KlingTransformer3DModel(**SMALL | {"num_layers": 1})
    shallow.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="lacks .* weights"):
        KlingTransformer3DModel.from_pretrained(tmp_path, num_layers=2)


def test_gradient_checkpointing_changes_nothing() -> None:
    model = kling().train()
    x = inputs(sigma=torch.tensor([[0.0, 0.5, 0.5], [0.25, 0.25, 0.75]]))
    expected = gradients(model, model(**x).sample)
    model.enable_gradient_checkpointing()
    actual = gradients(model, model(**x).sample)
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


def test_step_cache_reuses_blocks() -> None:
    model = kling()
    model.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    calls = []
    model.blocks[1].attn1.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad(), model.cache_context("cond"):
        first = model(**inputs()).sample
        torch.testing.assert_close(model(**inputs()).sample, first, atol=1e-5, rtol=1e-5)
    assert len(calls) == 1


def test_attention_backend_can_be_chosen() -> None:
    model = kling()
    expected = model(**inputs()).sample
    model.set_attention_backend("_native_math")
    assert model.blocks[0].attn1.processor._attention_backend == "_native_math"
    torch.testing.assert_close(model(**inputs()).sample, expected, atol=1e-5, rtol=1e-5)


def test_lora_trains_and_scales() -> None:
    model = kling()
    expected = model(**inputs()).sample
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    assert {n.rsplit(".", 3)[1] for n in gradients(model, model(**inputs()).sample)} == {"lora_A", "lora_B"}
    assert not torch.allclose(model(**inputs()).sample, expected, atol=1e-3)
    torch.testing.assert_close(model(**inputs(), attention_kwargs={"scale": 0.0}).sample, expected, atol=1e-6, rtol=1e-6)


def test_layerwise_casting_stores_small_and_runs() -> None:
    model = kling(**EXTRAS)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert model.blocks[0].attn1.to_q.weight.dtype == torch.float8_e4m3fn
    assert model(**inputs(kinds=torch.zeros(B, G, dtype=torch.long))).sample.isfinite().all()


PARALLEL = """
import torch, torch.distributed as dist
from diffusers import ContextParallelConfig
from kling.dit import KlingTransformer3DModel

torch.accelerator.device_count = lambda: 2  # diffusers divides by it; a CPU has none
torch.manual_seed(0)
model = KlingTransformer3DModel(num_attention_heads=2, attention_head_dim=16, text_dim=12, ffn_dim=48, num_layers=2, num_kinds=2).eval()
for p in model.parameters():
    torch.nn.init.normal_(p, std=0.2)
x, text, kinds = torch.randn(2, 16, 3, 4, 6), torch.randn(2, 5, 12), torch.tensor([[0, 0, 1], [1, 0, 0]])
levels = [torch.tensor([0.125, 0.75]), torch.tensor([[0.0, 0.5, 0.5], [0.25, 0.25, 0.75]])]
with torch.no_grad():
    expected = [model(x, sigma, text, kinds=kinds).sample for sigma in levels]
    dist.init_process_group("gloo")
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    for sigma, want in zip(levels, expected):
        torch.testing.assert_close(model(x, sigma, text, kinds=kinds).sample, want, atol=1e-5, rtol=1e-5)
"""


@pytest.mark.slow
def test_two_devices_share_the_tokens(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PARALLEL)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", str(program)]
    subprocess.run(command, check=True, timeout=240, env=os.environ | {"OMP_NUM_THREADS": "1"})
