"""The VAE: equal to diffusers' Wan VAEs, causal, the same streamed as whole, and strict about its inputs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor

from kling.config import read_yaml
from kling.data.transforms import to_tensor
from kling.data.world.scene import World
from kling.errors import UserError
from kling.nn.channel_norm import NormSilu
from kling.nn.conv import CausalConv3d, DoublingConv2d, HalvingConv2d, conv
from kling.nn.patch import patchify, unpatchify
from kling.sampling.pipeline import load_vae
from kling.vae import AutoencoderKLKling, LossWeights, StreamState, split_latents, vae_loss
from kling.vae.tiling import Tiles, in_tiles

CLOSE = {"atol": 1e-5, "rtol": 0}
STATS = {"z_dim": 4, "latents_mean": [0.5, -1.0, 0.0, 2.0], "latents_std": [2.0, 1.0, 0.5, 3.0]}
WAN21 = {"base_dim": 4, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 1, **STATS}
WAN22 = {
    "base_dim": 4, "decoder_base_dim": 8, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 1, "is_residual": True,
    "patch_size": 2, "in_channels": 12, "out_channels": 12, "scale_factor_spatial": 16, **STATS,
}  # fmt: skip
TYPES = {"wan2.1": WAN21, "wan2.2": WAN22}


def wan(config: dict) -> AutoencoderKLWan:
    """diffusers' class with weights that reveal errors: norms differ from 1, biases from 0."""
    torch.manual_seed(0)
    model = AutoencoderKLWan(**config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("gamma", "bias")):
            torch.nn.init.uniform_(parameter, 0.5, 1.5) if name.endswith("gamma") else torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture(scope="module", params=TYPES)
def model(request) -> AutoencoderKLKling:
    config = TYPES[request.param]
    model = AutoencoderKLKling(**config).eval()
    model.load_state_dict(wan(config).state_dict())
    return model


def clip(T: int, b: int = 1, H: int = 32, W: int = 48) -> Tensor:
    return torch.rand(b, 3, T, H, W, generator=torch.Generator().manual_seed(T)) * 2 - 1


def noise(model: AutoencoderKLKling, f: int, b: int = 1, h: int = 2, w: int = 3) -> Tensor:
    return torch.randn(b, model.config.z_dim, f, h, w, generator=torch.Generator().manual_seed(f))


def encode(model: AutoencoderKLKling, video: Tensor, state: StreamState | None = None) -> Tensor:
    """Mean and log-variance, concatenated."""
    return model.encode(video, state).latent_dist.parameters


# ---- the same function as diffusers' ----


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("grad", [False, True], ids=["chunks", "one pass"])
@torch.no_grad()
def test_equals_diffusers(kind: str, grad: bool) -> None:
    theirs = wan(TYPES[kind])
    ours = AutoencoderKLKling(**TYPES[kind]).eval()
    ours.load_state_dict(theirs.state_dict())
    video, latents = clip(13, b=2), noise(ours, 4, b=2)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(encode(ours, video), theirs.encode(video).latent_dist.parameters, **CLOSE)
        torch.testing.assert_close(ours.decode(latents).sample, theirs.decode(latents).sample, **CLOSE)


def test_wan_folder_loads(tmp_path) -> None:
    theirs = wan(WAN22)
    theirs.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "clip_output": False}))  # as published
    ours = AutoencoderKLKling.from_pretrained(tmp_path)
    assert type(ours) is AutoencoderKLKling and ours.spatial_factor == 16
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, theirs.get_parameter(name)), name


# ---- causal, and a stream is the whole ----


@torch.no_grad()
def test_prefix(model: AutoencoderKLKling) -> None:
    video = clip(17)
    whole = encode(model, video)
    for T in (1, 5, 13):
        torch.testing.assert_close(encode(model, video[:, :, :T]), whole[:, :, : 1 + T // 4], **CLOSE)


@pytest.mark.parametrize("cuts", [(1, 4, 4, 8), (9, 8), (5, 12), (13, 4)], ids=str)
@torch.no_grad()
def test_encode_stream(model: AutoencoderKLKling, cuts: tuple[int, ...]) -> None:
    video = clip(17)
    streamed = torch.cat(list(model.encode_stream(video.split(cuts, dim=2))), dim=2)
    with torch.enable_grad():
        whole = model.encode(video).latent_dist.mode()  # with gradients: one pass over the whole clip
    torch.testing.assert_close(streamed, whole, **CLOSE)


@pytest.mark.parametrize("hop", [1, 2, 3, 5])
@torch.no_grad()
def test_decode_stream(model: AutoencoderKLKling, hop: int) -> None:
    latents = noise(model, 5)
    chunks = list(model.decode_stream(latents, hop))
    assert [c.shape[2] for c in chunks][:2] == [1 + 4 * (hop - 1), min(4 * hop, 4 * (5 - hop))][: len(chunks)]
    with torch.enable_grad():
        whole = model.decode(latents).sample
    torch.testing.assert_close(torch.cat(chunks, dim=2), whole, **CLOSE)


@pytest.mark.parametrize("hop", [1, 2, 5])
@torch.no_grad()
def test_a_shot_is_decoded_without_the_shots_before(model: AutoencoderKLKling, hop: int) -> None:
    latents, other = noise(model, 6), noise(model, 6).flip(1)
    video = torch.cat(list(model.decode_stream(latents, hop, cuts=[2, 5])), dim=2)
    assert video.shape[2] == 21
    first, second, third = latents.split([2, 3, 1], dim=2)
    with torch.enable_grad():
        alone = [model.decode(first).sample, *(model.decode(torch.cat([z[:, :, :1], z], dim=2)).sample[:, :, 1:] for z in (second, third))]
    torch.testing.assert_close(video, torch.cat(alone, dim=2), **CLOSE)
    changed = torch.cat(list(model.decode_stream(torch.cat([other[:, :, :5], third], dim=2), hop, cuts=[2, 5])), dim=2)
    assert torch.equal(changed[:, :, 17:], video[:, :, 17:]) and not torch.equal(changed[:, :, :17], video[:, :, :17])


@torch.no_grad()
def test_streams_are_independent(model: AutoencoderKLKling) -> None:
    """Two streams in turn on one model, each with one state for both directions."""
    videos, states = [clip(9), clip(9).flip(2)], [StreamState(), StreamState()]
    parts: list[list[Tensor]] = [[], []]
    for t in (slice(0, 5), slice(5, 9)):
        for video, state, out in zip(videos, states, parts, strict=True):
            out.append(model.decode(model.encode(video[:, :, t], state).latent_dist.mode(), state).sample)
    for video, out in zip(videos, parts, strict=True):
        whole = model.decode(model.encode(video).latent_dist.mode()).sample
        torch.testing.assert_close(torch.cat(out, dim=2), whole, **CLOSE)


@torch.no_grad()
def test_stream_memory_is_flat(model: AutoencoderKLKling) -> None:
    state, kept = StreamState(), []
    for chunk in split_latents(noise(model, 6), 1):
        model.decode(chunk, state)
        kept.append(sum(t.untyped_storage().nbytes() for t in state.tails.values()))
    assert len(set(kept[1:])) == 1 and len(state.tails) > 10
    frames = model.decode_stream(noise(model, 1).expand(-1, -1, 10**9, -1, -1))
    assert next(frames).shape[2] == 1  # handed out before the rest is looked at


@torch.no_grad()
def test_tail_owns_its_memory() -> None:
    layer, norm, state = CausalConv3d(2, 2, 3, padding=1), NormSilu(2), StreamState()
    layer(torch.randn(1, 50, 4, 4, 2), state, norm)
    assert state.tails[layer].untyped_storage().nbytes() == 2 * 2 * 4 * 4 * 4


def test_a_stream_continues_with_and_without_gradients(model: AutoencoderKLKling) -> None:
    latents, state, outs = noise(model, 6), StreamState(), []
    for i, chunk in enumerate(split_latents(latents, 1)):
        with torch.set_grad_enabled(i in (1, 2, 4)):
            outs.append(model.decode(chunk, state).sample)
    sum(y.square().sum() for y in outs if y.requires_grad).backward()
    torch.testing.assert_close(torch.cat(outs, dim=2), model.decode(latents).sample, **CLOSE)


def test_gradients_of_a_stream_equal_those_of_the_whole(model: AutoencoderKLKling) -> None:
    latents, state = noise(model, 3), StreamState()
    ours = torch.cat([model.decode(chunk, state).sample for chunk in split_latents(latents, 1)], dim=2)
    whole = model.decode(latents).sample
    parameters = list(model.decoder.parameters())
    pairs = zip(*(torch.autograd.grad(y.square().mean(), parameters) for y in (ours, whole)), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


# ---- training ----


def test_gradients_reach_every_parameter(model: AutoencoderKLKling) -> None:
    video = clip(5, b=2)

    def gradients() -> list[Tensor]:
        model.zero_grad()
        out = model(video)
        vae_loss(video, out.sample, out.latent_dist, LossWeights())[0].backward()
        return [p.grad.clone() for p in model.parameters()]

    plain = gradients()
    assert all(g.isfinite().all() for g in plain) and sum(bool(g.any()) for g in plain) == len(plain)
    model.enable_gradient_checkpointing()
    for g, p in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(g, p, **CLOSE)
    model.disable_gradient_checkpointing()


def test_mixed_precision_gives_nearly_the_same_gradients() -> None:
    torch.manual_seed(0)
    model, video = AutoencoderKLKling(**WAN21), clip(5, H=16, W=16)
    model.load_state_dict(wan(WAN21).state_dict())

    def gradient(enabled: bool) -> Tensor:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = model(video)
        (out.sample.float() - video).square().mean().backward()
        assert out.sample.dtype == (torch.bfloat16 if enabled else torch.float32)
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    assert F.cosine_similarity(gradient(True), gradient(False), dim=0) > 0.99


def test_loss() -> None:
    video, weights = clip(5, b=2), LossWeights(pixel=1, edge=2, motion=3, kl=4)
    unit = DiagonalGaussianDistribution(torch.zeros(2, 8, 2, 4, 4))
    loss, terms = vae_loss(video, video, unit, weights)
    assert loss.item() == pytest.approx(0, abs=1e-6) and set(terms) == {"pixel", "edge", "motion", "kl"}

    posterior = DiagonalGaussianDistribution(torch.randn(2, 8, 2, 4, 4))
    normal = torch.distributions.Normal
    truth = torch.distributions.kl_divergence(normal(posterior.mean, posterior.std), normal(0.0, 1.0)).mean()
    loss, terms = vae_loss(video, video + 0.25, posterior, weights)  # a constant offset: neither edges nor motion differ
    assert terms["kl"].item() == pytest.approx(truth.item(), rel=1e-5)
    assert terms["pixel"].item() == pytest.approx(0.25, abs=1e-3)
    assert loss.item() == pytest.approx(sum(getattr(weights, k) * v.item() for k, v in terms.items()), rel=1e-5)
    assert vae_loss(video[:, :, :1], video[:, :, :1], unit, weights)[1]["motion"] == 0


def last(x: Tensor) -> Tensor:
    """Channels-last layout, as inside the VAE."""
    return x.movedim(1, -1).contiguous()


def same_with_gradients(ours: Tensor, theirs: Tensor, inputs: list[Tensor]) -> None:
    """Compare outputs, channels last and first, and the gradients of a weighted sum of squares."""
    assert ours.is_contiguous()
    torch.testing.assert_close(ours, last(theirs), **CLOSE)
    weights = torch.rand(theirs.shape, dtype=theirs.dtype)
    for a, b in zip(*(torch.autograd.grad((y * w * y).sum(), inputs) for y, w in ((ours, last(weights)), (theirs, weights))), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("batch", [1, 2])
def test_convolutions_equal_torch_s(batch: int) -> None:
    torch.manual_seed(batch)
    x = torch.randn(batch, 3, 5, 6, 8, requires_grad=True)
    args = (torch.randn(4, 3, 3, 3, 3, requires_grad=True), torch.randn(4, requires_grad=True), (2, 1, 1), (0, 1, 1))
    same_with_gradients(conv(last(x), *args), F.conv3d(x, *args), [x, *args[:2]])
    with torch.autocast("cpu", torch.bfloat16):
        assert conv(last(x), *args).dtype == torch.bfloat16

    picture = x[:, :, 0]
    down, up = HalvingConv2d(3, 4, 3, stride=2), DoublingConv2d(3, 4, 3, padding=1)
    theirs = F.conv2d(F.pad(picture, (0, 1, 0, 1)), down.weight, down.bias, stride=2)
    same_with_gradients(down(last(picture)), theirs, [x, *down.parameters()])
    theirs = F.conv2d(F.interpolate(picture, scale_factor=2, mode="nearest-exact"), up.weight, up.bias, padding=1)
    same_with_gradients(up(last(picture)), theirs, [x, *up.parameters()])


def test_a_lone_frame_is_a_clip_of_one() -> None:
    torch.manual_seed(0)
    layer, x = CausalConv3d(4, 6, 3, padding=1), torch.randn(2, 4, 1, 6, 8, requires_grad=True)
    theirs = F.conv3d(F.pad(x, (0, 0, 0, 0, 2, 0)), layer.weight, layer.bias, padding=(0, 1, 1))
    same_with_gradients(layer(last(x)), theirs, [x, *layer.parameters()])


def test_norm_silu_gradients_equal_autograd_s() -> None:
    """Against F.normalize in fp64, with history, and with a point that is all zeros."""
    torch.manual_seed(0)
    norm = NormSilu(5).double()
    torch.nn.init.uniform_(norm.gamma, 0.5, 1.5)
    x, history = (torch.randn(2, 5, t, 3, 4, dtype=torch.float64, requires_grad=True) for t in (3, 2))
    with torch.no_grad():
        x[:, :, 1, 1, 1] = 0
    theirs = torch.cat([history, F.silu(F.normalize(x, dim=1) * 5**0.5 * norm.gamma)], dim=2)
    at = torch.ones(1, 1, 3, 1, 1).index_fill(2, torch.tensor(1), 0)  # the gradient at zero has no meaning
    ours = norm(last(x), last(history))
    torch.testing.assert_close(ours, last(theirs), atol=1e-6, rtol=0)
    grads = [torch.autograd.grad((y**3).sum(), [x, history, norm.gamma]) for y in (ours, theirs)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(*((g * at if g.shape == x.shape else g) for g in (a, b)), atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(norm(last(x), last(history)), ours)


def test_patchify_inverse() -> None:
    video = clip(2)
    for p in (1, 2, 4):
        assert torch.equal(unpatchify(patchify(video, (1, p, p), "ctwh"), (1, p, p), "ctwh"), video)


# ---- tiles ----


def test_tiles_blend_without_a_trace() -> None:
    """For a function of single points, tiles are exact, whether it enlarges or shrinks."""
    x = torch.randn(1, 2, 3, 40, 28)
    up = torch.nn.Upsample(scale_factor=(1, 4, 4))
    down = torch.nn.AvgPool3d((1, 4, 4))
    for half in (up, down):
        tiled = in_tiles(lambda x, state, half=half: half(x), x, None, Tiles(16, 8))
        torch.testing.assert_close(tiled, half(x), **CLOSE)


@torch.no_grad()
def test_tiled_stream_is_tiled_whole(model: AutoencoderKLKling) -> None:
    video = clip(9, H=64, W=48)
    plain = encode(model, video)
    model.enable_tiling(size=32, overlap=16)
    try:
        whole, state = encode(model, video), StreamState()
        streamed = torch.cat([encode(model, c, state) for c in video.split((5, 4), dim=2)], dim=2)
        latents = noise(model, 3, h=4, w=3)
        frames = torch.cat(list(model.decode_stream(latents)), dim=2)
        torch.testing.assert_close(streamed, whole, **CLOSE)
        torch.testing.assert_close(frames, model.decode(latents).sample, **CLOSE)
    finally:
        model.disable_tiling()
    assert whole.shape == plain.shape and not torch.equal(whole, plain)


@torch.no_grad()
def test_tiles_are_near_the_whole() -> None:
    """The documented bound, with trained weights: tiles of 64 with a quarter overlap decode within 36 dB of the whole picture, far above
    the 24 dB of this VAE's reconstructions of the world."""
    vae = load_vae()
    latents = vae.encode(to_tensor(World(3, 5, "16:9", "heldout").clip(0).video)[None]).latent_dist.mode()
    whole = vae.decode(latents).sample
    vae.enable_tiling(size=64, overlap=16)
    tiled = vae.decode(latents).sample
    error = ((tiled - whole) / 2).square().mean()
    assert error > 0 and -10 * error.log10() > 36, f"{-10 * error.log10():.1f} dB"


# ---- config, files, scale ----


def test_save_load_and_statistics(tmp_path) -> None:
    model = AutoencoderKLKling(**{k: v for k, v in WAN21.items() if not k.startswith("latents")})
    z = noise(model, 2)
    assert torch.equal(model.normalize(z), z)
    model.register_to_config(latents_mean=STATS["latents_mean"], latents_std=STATS["latents_std"])
    model.save_pretrained(tmp_path)
    for again in (AutoencoderKLKling.from_pretrained(tmp_path), AutoencoderKLKling.from_config(model.config)):
        assert again.config.latents_std == STATS["latents_std"]
        torch.testing.assert_close(again.denormalize(again.normalize(z)), z)
        torch.testing.assert_close(again.normalize(z)[:, 3], (z[:, 3] - 2) / 3)
    assert (tmp_path / "diffusion_pytorch_model.safetensors").is_file()


PRESETS = sorted((Path(__file__).parents[1] / "configs" / "vae").glob("*.yaml"))


def model_section(preset: Path) -> dict:
    values = read_yaml(preset)
    base = model_section(preset.parent / values["base"]) if "base" in values else {}
    return {**base, **values.get("model", {})}


SMALL_PRESETS = [preset for preset in PRESETS if preset.stem[0].isalpha()]


@pytest.mark.parametrize("preset", SMALL_PRESETS, ids=lambda p: p.stem)
def test_small_presets(preset: Path) -> None:
    model = AutoencoderKLKling(**model_section(preset))
    assert sum(p.numel() for p in model.parameters()) <= 8e6
    assert model.encode(clip(5)).latent_dist.mode().shape == (1, 16, 2, 4, 6)


@pytest.mark.parametrize("preset", [p for p in PRESETS if p not in SMALL_PRESETS], ids=lambda p: p.stem)
def test_large_presets_are_wans(preset: Path) -> None:
    section = model_section(preset)
    with torch.device("meta"):
        ours, theirs = AutoencoderKLKling(**section), AutoencoderKLWan(**section)
    assert {name: t.shape for name, t in ours.state_dict().items()} == {name: t.shape for name, t in theirs.state_dict().items()}


def going() -> StreamState:
    """A stream of tiny clips that has started."""
    MODEL.encode(clip(1), state := StreamState())
    return state


MODEL = AutoencoderKLKling(**WAN21)
MISTAKES = {
    "use 5 or 9": lambda: MODEL.encode(clip(6)),
    "multiple of 4": lambda: MODEL.encode(clip(5), going()),
    "does not divide": lambda: MODEL.encode(clip(5, H=36)),
    "began with batch 1 of 48x32": lambda: MODEL.encode(clip(4, b=2), going()),
    "did you mean 'base_dim'": lambda: AutoencoderKLKling.from_config({**WAN21, "base_dims": 8}),
    "give 3 flags": lambda: AutoencoderKLKling(temperal_downsample=[True, True]),
    "use 16": lambda: AutoencoderKLKling(**{**WAN22, "scale_factor_spatial": 8}),
    "give z_dim = 16": lambda: AutoencoderKLKling(latents_std=[1.0]),
    "multiples of 8": lambda: MODEL.enable_tiling(size=100),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes(message: str) -> None:
    with pytest.raises(UserError, match=message):
        MISTAKES[message]()
