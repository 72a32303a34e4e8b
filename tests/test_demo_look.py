"""The studio's drawings of the camera and views inside a model, against closed forms and the model's own activations."""

# ruff: noqa: F811 - arguments are fixtures

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from test_demo import H, W, clip, pipe  # noqa: F401 - pipe is a fixture

pytest.importorskip("gradio")

from kling_programs.sample.studio import camera, look
from kling_programs.sample.studio.studio import Step

from kling import Request
from kling.cameras.axes import axes_trajectory
from kling.errors import UserError
from kling.shapes import token_grid

# ------------------------------------------------------------------------------------------------------------- the drawings


def test_the_motion_field_in_closed_form():
    still, end = camera.motion_field(axes_trajectory({}, 9, H, W), 7, 12, 8)
    assert torch.allclose(still, end, atol=1e-6)
    start, end = camera.motion_field(axes_trajectory({"zoom": 10}, 9, H, W), 7, 12, 8)
    assert torch.allclose(end - 0.5, (start - 0.5) / 2, atol=1e-5)  # half the focal length: half as far from the centre
    path = axes_trajectory({"horizontal": 4}, 9, H, W)  # 1 m to the right
    start, end = camera.motion_field(path, 7, 12, 8, depth=5.0)
    fx = float(path.intrinsics[0, 0])
    assert torch.allclose(end - start, torch.tensor([-fx / 5.0, 0.0]).expand_as(start), atol=1e-5)
    path = axes_trajectory({"pan": 10}, 9, H, W)  # 45 degrees
    start, end = camera.motion_field(path, 1, 1, 8)
    assert torch.allclose(end[0], torch.tensor([0.5 - fx * math.tan(math.radians(45)), 0.5]), atol=1e-5)
    _, end = camera.motion_field(axes_trajectory({"dolly": 10}, 9, H, W), 3, 3, 8, depth=1.0)  # past the points
    assert end.isnan().all()


def test_drawings_follow_the_camera():
    draws = {camera.path_svg(axes_trajectory(axes, 41, H, W), "x") for axes in ({}, {"pan": 5}, {"dolly": 5}, {"zoom": 5})}
    moves = {camera.motion_svg(axes_trajectory(axes, 41, H, W), H, W, "x") for axes in ({}, {"pan": 5}, {"dolly": 5}, {"zoom": 5})}
    assert len(draws) == len(moves) == 4
    assert "arrow" not in camera.motion_svg(axes_trajectory({}, 41, H, W), H, W, "x") and not any("nan" in s for s in draws | moves)


# ------------------------------------------------------------------------------------------------------------------- inside


def test_the_displayed_attention_is_the_model_s(pipe):
    """The tiny model has one head, so its output for a token is the displayed weights times the values."""
    walk = look.walk(pipe, Request("a ball", num_frames=9, num_inference_steps=2), lambda event: None)
    attn = pipe.transformer.blocks[0].attn1
    values, outs = [], []
    hooks = [
        attn.to_v.register_forward_hook(lambda m, a, out: values.append(out[0])),
        attn.to_out[0].register_forward_hook(lambda m, a, out: outs.append(a[0][0])),
    ]
    weight = look.attention_of(pipe, walk, 0, 0.5, (1, 2, 3))
    for hook in hooks:
        hook.remove()
    grid = token_grid(*walk.latents.shape[1:], tuple(pipe.transformer.config.patch_size))
    token = (1 * grid[1] + 2) * grid[2] + 3
    assert weight.shape == grid and abs(float(weight.sum()) - 1) < 1e-5
    assert torch.allclose(weight.flatten() @ values[0], outs[0][token], atol=1e-5)


def test_the_displayed_steps_end_with_the_video(pipe):
    request = Request("a ball", num_frames=9, num_inference_steps=3, seed=4)
    steps = []
    walk = look.walk(pipe, request, steps.append)
    assert [step for step, _ in walk.x0] == [1, 2, 3] and [e.step for e in steps if isinstance(e, Step)] == [0, 1, 2, 3]
    assert np.array_equal(walk.x0[-1][1], pipe(request).frames[0]) and np.array_equal(walk.frames, walk.x0[-1][1])
    assert walk.sigmas[0] == 1 and walk.sigmas[-1] == 0


@pytest.mark.parametrize(("c", "f", "blocks"), [(16, 11, 1), (16, 3, 2), (16, 1, 4), (48, 5, 2)])
def test_every_latent_has_its_cell(c, f, blocks):
    latents = torch.zeros(c, f, 8, 14)
    latents[-1, -1, 4:] = 1.0  # the lower half of the last channel's last frame
    shown, high, wide = look.channel_map(latents), look.CELL * 8 + 2, look.CELL * 14 + 2
    assert shown.shape == (c // blocks * high, blocks * f * wide + (blocks - 1) * look.GAP, 3)
    cell, half = shown[-high:, -wide:][:-2, :-2].copy(), look.CELL * 4
    assert (cell[half:] == cell[-1, -1]).all() and (cell[:half] == shown[0, 0]).all() and (cell[-1, -1] != shown[0, 0]).any()
    shown[-high:, -wide:] = 0
    assert not (shown == cell[-1, -1]).all(-1).any()  # nowhere else


def test_the_vae_s_displayed_numbers_match_the_pixels(pipe, tmp_path):
    found = look.reconstruct(pipe, str(clip(tmp_path / "c.mp4", frames=11)))
    assert found.original.shape == found.again.shape == found.error.shape == (9, H, W, 3)
    mse = ((found.original.astype(float) - found.again) ** 2).mean((1, 2, 3))
    assert np.allclose(found.psnr, 10 * np.log10(255**2 / mse), atol=0.02)
    assert np.array_equal(found.error, np.minimum(4 * np.abs(found.original.astype(int) - found.again), 255))


def test_scales_are_numbers():
    assert look.read_scales("1, 2.5，8") == [1, 2.5, 8]
    for bad in ("", "a", "1,nan", "1," * 9 + "1", "-1", None):
        with pytest.raises(UserError, match="scales"):
            look.read_scales(bad)
