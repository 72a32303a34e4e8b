"""Our pipeline against diffusers' Wan pipelines: with the same folder, noise and prompts, the same latents after every step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny_wan
import torch
from PIL import Image

from kling import KlingPipeline

STEPS, FRAMES = 8, 9
PROMPT = "A red ball &amp;  rolls\n一个红色的球，在草地上滚动"
# the settings to use, since no published checkpoint is this small
ROWS = {
    "t2v": "wan2.1-t2v-1.3b", "t2v-a14b": "wan2.2-t2v-a14b", "ti2v": "wan2.2-ti2v-5b",
    "i2v": "wan2.1-i2v-14b-480p", "flf2v": "wan2.1-flf2v-14b-720p", "i2v-a14b": "wan2.2-i2v-a14b",
}  # fmt: skip


def picture(seed: int, H: int, W: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (H, W, 3), dtype=np.uint8)


@pytest.mark.parametrize("layout", ROWS)
def test_equals_diffusers_step_by_step(layout: str, tmp_path: Path) -> None:
    theirs = tiny_wan.pipeline(layout)
    theirs.save_pretrained(tmp_path)
    ours = KlingPipeline.from_pretrained(tmp_path, torch_dtype=torch.float32, checkpoint=ROWS[layout])
    high, low = ours.setting("guidance_scale")
    H, W = (32, 64) if layout == "ti2v" else (32, 48)
    s = ours.vae.spatial_factor
    noise = torch.randn(1, ours.vae.config.z_dim, 3, H // s, W // s, generator=torch.Generator().manual_seed(0))
    first, last = picture(0, H, W), picture(1, H, W)

    expected: list[torch.Tensor] = []
    pictures = {} if layout.startswith("t2v") else {"image": Image.fromarray(first)}
    pictures |= {"last_image": Image.fromarray(last)} if layout == "flf2v" else {}
    latents = theirs(
        prompt=PROMPT, negative_prompt=ours.setting("negative_prompt"), height=H, width=W, num_frames=FRAMES, num_inference_steps=STEPS,
        guidance_scale=high, guidance_scale_2=low if layout.endswith("a14b") else None, latents=noise.clone(), output_type="latent",
        callback_on_step_end=lambda pipe, i, t, kept: expected.append(kept["latents"].clone()) or {}, **pictures,
    ).frames  # fmt: skip

    made: list[torch.Tensor] = []
    given = {} if layout.startswith("t2v") else {"image": first}
    given |= {"last_image": last} if layout == "flf2v" else {}
    out = ours(
        PROMPT, size=f"{W}x{H}", num_frames=FRAMES, num_inference_steps=STEPS, latents=noise, output_type="latent",
        callback_on_step_end=lambda pipe, i, t, kept: made.append(kept["latents"].clone()), **given,
    )  # fmt: skip
    start = 1 if layout == "ti2v" else 0  # theirs also updates the given frame, and restores it at the end
    assert len(made) == len(expected) == STEPS
    for i, (a, b) in enumerate(zip(made, expected, strict=True)):
        torch.testing.assert_close(a[:, :, start:], b[:, :, start:], atol=1e-4, rtol=0, msg=f"step {i}")
    torch.testing.assert_close(out.latents, latents, atol=1e-4, rtol=0)
    assert float(latents.std()) > 0.1 and not torch.allclose(expected[0], expected[-1], atol=0.1), "a test of something"
