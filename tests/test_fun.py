"""The Fun layouts against their published loops, written out: extra channels, camera rays, and sampling with UniPC."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny_wan
import torch
from diffusers import UniPCMultistepScheduler
from safetensors.torch import save_file
from torch import Tensor

from kling import KlingPipeline, KlingTransformer3DModel
from kling.cameras.axes import axes_trajectory
from kling.cameras.trajectory import Cameras
from kling.data.transforms import to_tensor
from kling.training.start import widen

H, W, FRAMES, STEPS = 32, 48, 9, 3
F, HH, WW = 3, 4, 6


def load(folder: Path, in_channels: int, checkpoint: str, **config: object) -> KlingPipeline:
    """A tiny model with a Fun layout, loaded from a single file in the original naming."""
    source = tiny_wan.transformer(in_channels=in_channels)
    keys = {key: value for key, value in source.config.items() if not key.startswith("_")}
    model = tiny_wan.randomised(KlingTransformer3DModel(**keys | config))
    save_file(model.state_dict(), folder / "fun.safetensors")
    return KlingPipeline.from_pretrained(folder, transformer=folder / "fun.safetensors", checkpoint=checkpoint, torch_dtype=torch.float32)


def published_walk(pipe: KlingPipeline, noise: Tensor, y: Tensor, **signals: Tensor) -> Tensor:
    """The loop of VideoX-Fun's pipelines: y as extra channels, plain guidance, UniPC at shift 3."""
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    scheduler.set_timesteps(STEPS)
    text, negative = (pipe.text_encoder.encode([prompt]) for prompt in ("a ball", pipe.setting("negative_prompt")))
    z = noise
    with torch.no_grad():
        for t in scheduler.timesteps:
            x, sigma = torch.cat([z, y], dim=1), (t.double() / 1000)[None]
            v, plain = (pipe.transformer(x, sigma, words, **signals).sample for words in (text, negative))
            z = scheduler.step(plain + 6 * (v - plain), t, z, return_dict=False)[0]
    return z


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_wan.saved("t2v", tmp_path)


def movie(frames: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (frames, H, W, 3), dtype=np.uint8)


def encoded(pipe: KlingPipeline, video: Tensor) -> Tensor:
    with torch.no_grad():
        return pipe.vae.normalize(pipe.vae.encode(video).latent_dist.mode())


def made(pipe: KlingPipeline, noise: Tensor, **given: object) -> Tensor:
    fields = {"size": f"{W}x{H}", "num_inference_steps": STEPS, "output_type": "latent"} | {"num_frames": FRAMES}
    return pipe("a ball", latents=noise, **fields, **given).latents


def test_fun_control(folder: Path) -> None:
    """Control latents, then the start image's latent and zeros (pipeline_wan_fun_control.py)."""
    pipe = load(folder, 48, "wan2.1-fun-control-1.3b")
    noise, frames = torch.randn(1, 16, F, HH, WW), movie(FRAMES)
    control = encoded(pipe, to_tensor(frames)[None])
    start = torch.zeros_like(noise)
    torch.testing.assert_close(
        made(pipe, noise, control=frames), published_walk(pipe, noise, torch.cat([control, start], dim=1)), atol=1e-4, rtol=0
    )
    image = movie(1)[0]
    start[:, :, :1] = encoded(pipe, to_tensor(image[None])[None])
    with_image = made(pipe, noise, control=frames, image=image)
    torch.testing.assert_close(with_image, published_walk(pipe, noise, torch.cat([control, start], dim=1)), atol=1e-4, rtol=0)


def test_fun_camera(folder: Path) -> None:
    """The start image's latent and zeros, and packed rays through the adapter (pipeline_wan_fun_control.py, V1.1)."""
    pipe = load(folder, 32, "wan2.1-fun-camera-1.3b", camera_channels=24)
    noise, image = torch.randn(1, 16, F, HH, WW), movie(1)[0]
    start = torch.zeros_like(noise)
    start[:, :, :1] = encoded(pipe, to_tensor(image[None])[None])
    path = axes_trajectory({"pan": 5.0}, FRAMES, H, W)
    rays = Cameras(path.c2w[None], path.intrinsics[None], (H, W), torch.zeros(1, 0, dtype=torch.long)).rays()
    assert rays.shape == (1, 24, F, H, W)
    out = made(pipe, noise, image=image, camera="pan=5")
    torch.testing.assert_close(out, published_walk(pipe, noise, start, camera=rays), atol=1e-4, rtol=0)
    assert (out - made(pipe, noise, image=image)).abs().max() > 1e-3


def test_fun_inpaint(folder: Path) -> None:
    """Mask and masked video: the part to generate is grey in one and 0 in the other (pipeline_wan_fun_inpaint.py)."""
    pipe = load(folder, 36, "wan2.1-fun-inp-1.3b")
    noise, frames = torch.randn(1, 16, F, HH, WW), movie(FRAMES)
    hole = np.zeros((H, W), np.float32)
    hole[:16, :16] = 1  # a whole token
    video = to_tensor(frames)[None] * (1 - torch.from_numpy(hole))
    mask = torch.ones(1, 4, F, HH, WW)
    mask[..., :2, :2] = 0
    out = made(pipe, noise, video=frames, mask=hole)
    torch.testing.assert_close(out, published_walk(pipe, noise, torch.cat([mask, encoded(pipe, video)], dim=1)), atol=1e-4, rtol=0)
    nothing = made(pipe, noise)
    torch.testing.assert_close(nothing, published_walk(pipe, noise, torch.zeros(1, 20, F, HH, WW)), atol=1e-4, rtol=0)


def test_zero_extended_inputs_leave_the_output_bit_equal() -> None:
    source = tiny_wan.transformer()
    model = KlingTransformer3DModel.from_config(dict(source.config)).eval()
    model.load_state_dict(source.state_dict())
    wide = widen(model, 36)
    z, sigma, text = torch.randn(2, 16, F, HH, WW), torch.tensor([0.3, 0.8]), torch.randn(2, 7, 32)
    with torch.no_grad():
        expected = model(z, sigma, text).sample
        assert torch.equal(wide(torch.cat([z, torch.zeros(2, 20, F, HH, WW)], dim=1), sigma, text).sample, expected)
        assert torch.equal(wide(torch.cat([z, torch.randn(2, 20, F, HH, WW)], dim=1), sigma, text).sample, expected)
    assert wide.config.in_channels == 36 and wide.config.out_channels == 16 and model.config.in_channels == 16
