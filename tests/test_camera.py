"""Camera conventions against closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from kling.cameras.axes import MOVES, UNITS, axes_trajectory, parse_axes
from kling.cameras.trajectory import Cameras, Trajectory, focal_of, plucker_rays
from kling.errors import UserError

H, W, T = 8, 12, 9


def camera_signal(path: Trajectory, H: int, W: int, appended: tuple[int, ...] = ()) -> torch.Tensor:
    """The rays (24, G, H, W) of one clip."""
    return Cameras(path.c2w[None], path.intrinsics[None], (H, W), torch.tensor([appended], dtype=torch.long)).rays()[0]


def end(axes: dict[str, float]) -> tuple[torch.Tensor, torch.Tensor]:
    c2w = axes_trajectory(axes, T, H, W).c2w[-1]
    return c2w[:, :3], c2w[:, 3]


@pytest.mark.parametrize(
    ("axes", "where"),
    [({"horizontal": 10}, (2.5, 0, 0)), ({"vertical": 10}, (0, -1.0, 0)), ({"dolly": -10}, (0, 0, -3.0))],
)
def test_translations_have_the_named_direction(axes, where):
    R, o = end(axes)
    assert torch.allclose(R, torch.eye(3)) and torch.allclose(o, torch.tensor(where), atol=1e-6)


@pytest.mark.parametrize(
    ("axes", "vector", "axis"),
    [({"pan": 10}, (0, 0, 1), 0), ({"tilt": 10}, (0, 0, 1), 1), ({"roll": 10}, (1, 0, 0), 1)],
)
def test_rotations_have_the_named_direction(axes, vector, axis):
    """pan right moves the optical axis to +x, tilt up to -y, clockwise roll moves the right-hand axis down (+y)."""
    R, o = end(axes)
    name = next(iter(axes))
    angle = math.radians(UNITS[name][0])
    sign = -1 if name == "tilt" else 1
    assert torch.allclose(o, torch.zeros(3))
    assert float((R @ torch.tensor(vector).float())[axis]) == pytest.approx(sign * math.sin(angle), abs=1e-6)
    assert torch.allclose(R @ R.T, torch.eye(3), atol=1e-6) and torch.det(R) > 0


def test_zoom_out_halves_the_focal_length_and_the_aspect_keeps_square_pixels():
    k = axes_trajectory({"zoom": 10}, T, H, W).intrinsics
    assert k[-1, 0] == pytest.approx(float(k[0, 0]) / 2)
    fx, fy = focal_of(H, W)
    assert fx * W == pytest.approx(fy * H)


def test_pan_with_dolly_drives_an_arc():
    """Moving forward while turning at a constant rate is a circle of radius length / angle."""
    trajectory = axes_trajectory({"pan": 10, "dolly": 10}, 401, H, W)
    angle, length = math.radians(45), 3.0
    r = length / angle
    expected = torch.tensor([r * (1 - math.cos(angle)), 0, r * math.sin(angle)])
    assert torch.allclose(trajectory.c2w[-1, :, 3], expected, atol=1e-4)


def test_plucker_rays_of_a_hand_made_camera():
    """A camera at (1, 0, 0) looking along z with unit focal length: d and o x d by hand."""
    c2w = torch.cat([torch.eye(3), torch.tensor([[1.0], [0.0], [0.0]])], dim=1)[None]
    rays = plucker_rays(Trajectory(c2w, torch.tensor([[1.0, 1.0, 0.5, 0.5]])), 2, 2)
    d = torch.tensor([-0.25, -0.25, 1.0])  # pixel (0, 0): centre at u = v = 0.25
    d = d / d.norm()
    assert torch.allclose(rays[0, 3:, 0, 0], d, atol=1e-6)
    assert torch.allclose(rays[0, :3, 0, 0], torch.stack([torch.tensor(0.0), -d[2], d[1]]), atol=1e-6)


def test_rays_are_not_rounded_by_autocast():
    """Training computes rays inside the network's pass, under autocast: bf16 has three digits, an error of a third of a degree."""
    trajectory = axes_trajectory({"pan": 7, "dolly": 5}, T, H, W)
    plain = plucker_rays(trajectory, H, W)
    with torch.autocast("cpu", torch.bfloat16):
        cast = plucker_rays(trajectory, H, W)
    assert torch.equal(cast, plain)


def test_packing_is_component_major_with_frame_zero_four_times():
    trajectory = axes_trajectory({"pan": 5, "dolly": 2}, 5, H, W)
    signal, alone = camera_signal(trajectory, H, W), plucker_rays(trajectory, H, W)
    assert signal.shape == (24, 2, H, W)
    for component in range(6):
        assert all(torch.equal(signal[4 * component + t, 0], alone[0, component]) for t in range(4))
        assert all(torch.equal(signal[4 * component + t, 1], alone[1 + t, component]) for t in range(4))


def test_rays_of_a_batch_equal_those_of_its_clips_whole_and_in_parts():
    paths = [axes_trajectory({"pan": 5}, 9, H, W), axes_trajectory({"dolly": 3, "zoom": 4}, 9, H, W)]
    batch = Cameras(torch.stack([p.c2w for p in paths]), torch.stack([p.intrinsics for p in paths]), (H, W), torch.tensor([[3], [8]]))
    want = torch.stack([camera_signal(path, H, W, (t,)) for path, t in zip(paths, (3, 8), strict=True)])
    assert batch.frames == 4 and torch.equal(batch.rays(), want)
    assert torch.equal(torch.cat([batch.rays(0, 1), batch.rays(1, 4)], dim=2), want)


def test_an_appended_frame_carries_its_own_pose_four_times():
    trajectory = axes_trajectory({"pan": 5}, T, H, W)
    signal = camera_signal(trajectory, H, W, appended=(6,))
    assert signal.shape == (24, 4, H, W)
    alone = plucker_rays(trajectory, H, W)[6]
    for frame in range(4):
        assert torch.equal(signal[frame::4, 3], alone)


def test_relative_and_scaled():
    trajectory = axes_trajectory(MOVES["forward_up"] | {"pan": 4}, T, H, W)
    again = trajectory[3:].relative()
    assert torch.allclose(again.c2w[0], torch.eye(3, 4), atol=1e-6)
    R, o = trajectory.c2w[3, :, :3], trajectory.c2w[3, :, 3]
    assert torch.allclose(R @ again.c2w[2, :, 3] + o, trajectory.c2w[5, :, 3], atol=1e-5)
    assert torch.allclose(trajectory.scaled(2).c2w[:, :, 3], 2 * trajectory.c2w[:, :, 3])


@pytest.mark.parametrize("text", ["pan=11", "pan=x", "pam=3", "spin", "pan=1,pan=2", "pan=nan"])
def test_bad_axes_are_refused_by_name(text):
    with pytest.raises(UserError):
        parse_axes(text)


def test_axes_text():
    assert parse_axes("pan=5, zoom=-2") == {"pan": 5.0, "zoom": -2.0}
    assert parse_axes("forward_up") == MOVES["forward_up"] and parse_axes("static") == {}
