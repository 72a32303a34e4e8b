"""The published sizes: every config has the parameters of diffusers' classes, and, if there is a GPU, 1.3B runs end to end."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_wan
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from transformers import UMT5Config, UMT5EncoderModel

from kling import AutoencoderKLKling, KlingPipeline, KlingTransformer3DModel
from kling.hub.detect import build_of, transformer_config
from kling.hub.registry import by_name

# transformer/config.json of the -Diffusers repositories: differences from the defaults of the class, which are T2V-14B's (and A14B's)
SMALL = {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960}
IMAGE = {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}
TRANSFORMERS = {
    "wan2.1-t2v-1.3b": SMALL,
    "wan2.1-t2v-14b": {},
    "wan2.1-i2v-14b-480p": IMAGE,
    "wan2.1-flf2v-14b-720p": IMAGE | {"pos_embed_seq_len": 2 * 257},
    "wan2.2-i2v-a14b": {"in_channels": 36},
    "wan2.2-ti2v-5b": {"num_attention_heads": 24, "num_layers": 30, "ffn_dim": 14336, "in_channels": 48, "out_channels": 48},
}
VAES = {
    "2.1": {},
    "2.2": {
        "base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12,
        "scale_factor_spatial": 16, "latents_mean": [0.0] * 48, "latents_std": [1.0] * 48,
    },
}  # fmt: skip
BILLIONS = {"wan2.1-t2v-1.3b": 1.419, "wan2.1-t2v-14b": 14.289, "wan2.2-ti2v-5b": 5.0}


def shapes(kind: type, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(t.shape) for name, t in kind(**config).state_dict().items()}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers_have_the_parameters_of_diffusers(name: str) -> None:
    config = TRANSFORMERS[name]
    ours, theirs = shapes(KlingTransformer3DModel, config), shapes(WanTransformer3DModel, config)
    missing = {key for key in theirs if "norm_added_q" in key}  # diffusers makes it and never uses it; no published file has it
    assert ours == {key: shape for key, shape in theirs.items() if key not in missing}
    assert build_of(transformer_config(ours, name)) == by_name(name).build, "and its files tell which row it is"
    numbers = sum(torch.Size(shape).numel() for shape in ours.values()) / 1e9
    assert name not in BILLIONS or numbers == pytest.approx(BILLIONS[name], abs=0.01)


@pytest.mark.parametrize("name", VAES)
def test_vaes_have_the_parameters_of_diffusers(name: str) -> None:
    assert shapes(AutoencoderKLKling, VAES[name]) == shapes(AutoencoderKLWan, VAES[name])


# ---- end to end, beside diffusers ----


def wan(transformer: dict[str, Any], vae: dict[str, Any], device: str, dtype: torch.dtype) -> WanPipeline:
    """A text-to-video pipeline with random weights, created on the device; the text encoder has one layer."""
    width = transformer.get("text_dim", 4096)
    torch.manual_seed(0)
    with torch.device(device):
        model = tiny_wan.randomised(WanTransformer3DModel(**transformer), std=0.02).to(dtype)
        text = UMT5EncoderModel(UMT5Config(vocab_size=160, d_model=width, d_kv=8, d_ff=64, num_layers=1, num_heads=2)).eval()
        return WanPipeline(
            tokenizer=tiny_wan.tokenizer(), text_encoder=text.to(dtype), transformer=model, vae=AutoencoderKLWan(**vae).eval(),
            scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0),
        )  # fmt: skip


def timed(work: Callable[[], Any], device: str) -> tuple[Any, float, float]:
    """The result, its seconds, and the peak GiB on the device (0 on a CPU)."""
    cuda = device == "cuda"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    result = work()
    if cuda:
        torch.cuda.synchronize()
    return result, time.perf_counter() - start, torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0


def run_both(folder: Path, theirs: WanPipeline, H: int, W: int, frames: int, steps: int, device: str) -> dict[str, Any]:
    """Both pipelines from the same noise: seconds and memory of text, a step and decoding, and the difference of the results."""
    theirs.save_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    dtype = theirs.transformer.dtype
    s = theirs.vae.config.scale_factor_spatial
    noise = torch.randn(1, theirs.vae.config.z_dim, 1 + (frames - 1) // 4, H // s, W // s, generator=torch.Generator().manual_seed(0))
    report: dict[str, Any] = {"size": [frames, H, W], "steps": steps, "dtype": str(dtype), "device": device}
    prompt, negative = "a red ball rolls left on grass", "static"

    def theirs_text() -> tuple[torch.Tensor, torch.Tensor]:
        return theirs.encode_prompt(prompt, negative, max_sequence_length=512, device=device)

    def theirs_walk() -> torch.Tensor:
        words = {"prompt_embeds": embeds[0], "negative_prompt_embeds": embeds[1]}
        options = {"height": H, "width": W, "num_frames": frames, "num_inference_steps": steps, "guidance_scale": 5.0}
        return theirs(**words, **options, latents=noise.to(device), output_type="latent").frames

    def theirs_decode() -> torch.Tensor:
        mean, std = (
            torch.tensor(v, device=device).view(1, -1, 1, 1, 1) for v in (theirs.vae.config.latents_mean, theirs.vae.config.latents_std)
        )
        return theirs.vae.decode(latents.float() * std + mean, return_dict=False)[0].cpu()

    with torch.no_grad():
        embeds, text, _ = timed(theirs_text, device)
        latents, walk, peak = timed(theirs_walk, device)
        _, decode, high = timed(theirs_decode, device)
    report["diffusers"] = figures(text, walk, decode, steps, peak, high)
    del theirs.transformer, theirs.vae
    theirs.to("cpu")
    if device == "cuda":
        torch.cuda.empty_cache()

    pipe = KlingPipeline.from_pretrained(folder, torch_dtype=dtype, checkpoint="wan2.1-t2v-1.3b").to(device)
    _, text, _ = timed(lambda: pipe.text_encoder.encode([prompt, negative], device), device)
    options = {"size": f"{W}x{H}", "num_frames": frames, "num_inference_steps": steps, "guidance_scale": 5.0, "negative_prompt": negative}
    ours, walk, peak = timed(lambda: pipe(prompt, latents=noise, output_type="latent", **options).latents, device)
    with torch.no_grad():
        video, decode, high = timed(lambda: pipe.decode(ours), device)
    report["kling"] = figures(text, walk, decode, steps, peak, high)
    assert video.shape == (1, frames, H, W, 3) and video.dtype == torch.uint8
    report["difference"] = float((ours.cpu() - latents.float().cpu()).norm() / latents.float().cpu().norm())
    return report


def figures(text: float, walk: float, decode: float, steps: int, walk_peak: float, decode_peak: float) -> dict[str, float]:
    whole = text + walk + decode
    shares = {"text": text / whole, "walk": walk / whole, "decode": decode / whole}
    return {
        "s/step": walk / steps,
        "GiB walking": walk_peak,
        "GiB decoding": decode_peak,
        **{f"share of {k}": v for k, v in shares.items()},
    }


def test_both_pipelines_agree(tmp_path: Path) -> None:
    """The GPU test below at a small size."""
    small = {"num_attention_heads": 1, "text_dim": 32, "freq_dim": 32, "ffn_dim": 64, "num_layers": 2}
    report = run_both(tmp_path, wan(small, tiny_wan.VAE21, "cpu", torch.float32), 32, 48, 9, 2, "cpu")
    assert report["difference"] < 1e-4
    assert all(report[who]["s/step"] > 0 for who in ("diffusers", "kling"))


@pytest.mark.gpu
@pytest.mark.timeout(3000)
def test_the_1_3b_runs_end_to_end_beside_diffusers(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """81 frames of 480x832, random weights, bf16: prints seconds a step, memory, and the share of each part, of both."""
    report = run_both(tmp_path, wan(SMALL, {}, "cuda", torch.bfloat16), 480, 832, 81, 4, "cuda")
    with capsys.disabled():
        print(json.dumps(report, indent=1))
    assert report["difference"] < 0.05, "roundings of bf16 alone"
    assert report["kling"]["GiB walking"] < 1.1 * report["diffusers"]["GiB walking"] + 0.5
    assert report["kling"]["GiB decoding"] < 1.1 * report["diffusers"]["GiB decoding"] + 0.5
