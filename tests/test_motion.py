"""Motion and camera estimation for any video, on pictures with known motion."""

from __future__ import annotations

import math

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from kling.cameras.axes import axes_trajectory
from kling.data.transforms import to_tensor
from kling.metrics.camera.colmap import colmap_path
from kling.metrics.camera.errors import rotation_error, summed_errors, translation_error
from kling.metrics.camera.structure import estimate_structure
from kling.metrics.camera.tracks import follow_points
from kling.metrics.continuation import drift, seam_rows
from kling.metrics.controls import Order, frozen, noise, stepped, turned, violations
from kling.metrics.motion import Flow, camera_classes, dynamic_degree, magnitude, matched, optical_flow, visible, warp_error
from kling.metrics.pixel import temporal_psnr

cv2.setNumThreads(1)


def texture(H: int, W: int, seed: int = 0) -> np.ndarray:
    """A smooth random picture (H, W, 3) uint8 with detail everywhere."""
    rng = np.random.default_rng(seed)
    layers = [cv2.resize(rng.random((H // s, W // s, 3)).astype(np.float32), (W, H), interpolation=cv2.INTER_CUBIC) for s in (4, 8, 16)]
    return (np.clip(sum(layers) / 3, 0, 1) * 255).astype(np.uint8)


def window(big: np.ndarray, boxes: list[tuple[float, float, float]], H: int, W: int) -> Tensor:
    """Frames (T, H, W, 3): for each (left, top, width) that part of a picture, scaled to the clip's size."""
    frames = []
    for left, top, width in boxes:
        s = width / W
        M = np.array([[s, 0, left], [0, s, top]], np.float32)
        frames.append(cv2.warpAffine(big, M, (W, H), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP))
    return torch.from_numpy(np.stack(frames))


def uniform(dx: float, dy: float, T: int = 3, H: int = 32, W: int = 48) -> Flow:
    """The same motion everywhere."""
    one = np.broadcast_to(np.array([dx, dy], np.float32), (T - 1, H, W, 2)).copy()
    return Flow(one, -one)


# -------------------------------------------------------------------------------------------------------------------- motion


def test_flow_and_warp_error_of_a_known_shift() -> None:
    big = texture(96, 160)
    video = window(big, [(20 + 2 * t, 10, 96) for t in range(4)], 64, 96)
    flow = optical_flow(video)
    inner = flow.forward[:, 8:-8, 8:-8]
    assert np.abs(inner - [-2, 0]).mean() < 0.1
    assert flow.speed() == pytest.approx([2, 2, 2], abs=0.1)
    right, blind = warp_error(video, flow), warp_error(video, uniform(0, 0, 4, 64, 96))
    assert right < 1e-4 < 10 * 1e-4 < blind


def test_the_magnitude_of_a_known_shift() -> None:
    big = texture(96, 160)
    shift = magnitude(window(big, [(20 + 2 * t, 10, 96) for t in range(4)], 64, 96))
    assert shift == pytest.approx(2, abs=0.15)
    assert magnitude(window(big, [(20, 10, 96)] * 4, 64, 96)) == magnitude(window(big, [(20, 10, 96)], 64, 96)) == 0


def test_pixels_that_leave_the_picture_are_not_visible() -> None:
    there = np.zeros((10, 20, 2), np.float32)
    there[..., 0] = 6
    seen = visible(there, -there)
    assert seen[:, :14].all() and not seen[:, 14:].any()
    assert not visible(there, there).any()  # does not come back


def test_a_pair_without_anything_in_common_is_counted_and_in_no_mean() -> None:
    video = noise(torch.zeros(3, 32, 48, 3, dtype=torch.uint8), 0)
    lost, rests = uniform(5, 0).forward, uniform(0, 0).forward
    assert warp_error(video, Flow(lost, lost)) is None and matched(Flow(lost, lost)) == 0
    cut = Flow(np.concatenate([rests[:1], lost[1:]]), np.concatenate([rests[:1], lost[1:]]))
    assert warp_error(video, cut) == warp_error(video[:2], uniform(0, 0, T=2)) and matched(cut) == 0.5
    assert matched(uniform(0, 0, T=1)) is None and warp_error(video[:1], uniform(0, 0, T=1)) is None


def test_dynamic_degree_has_vbench_threshold() -> None:
    bound = 6 * 32 / 256  # pixels a frame at 8 fps, short side 32
    assert dynamic_degree(uniform(1.01 * bound, 0, T=17), 8) and not dynamic_degree(uniform(0.99 * bound, 0, T=17), 8)
    assert dynamic_degree(uniform(0.51 * bound, 0, T=17), 16)  # every second frame
    one = uniform(0, 0, T=17)
    one.forward[:3] = 5
    assert not dynamic_degree(one, 8)  # three of the four that 17 frames need
    one.forward[:4] = 5
    assert dynamic_degree(one, 8)


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("pan_right", (3, 0, 0)),
        ("pan_left", (-3, 0, 0)),
        ("tilt_down", (0, 3, 0)),
        ("tilt_up", (0, -3, 0)),
        ("zoom_in", (3, 2, -6)),
        ("zoom_out", (-3, -2, 6)),
        ("static", (0, 0, 0)),
    ],
)
def test_vbench_classes(name: str, step: tuple[float, float, float]) -> None:
    start = (40, 30, 96)
    video = window(texture(160, 240), [tuple(a + t * b for a, b in zip(start, step, strict=True)) for t in range(3)], 64, 96)
    found = camera_classes(optical_flow(video))
    assert name in found  # a zoom also reads as a pan: on a grid of ten VBench's midpoint lies right of the middle
    assert found == {name} or name.startswith("zoom") and len({"zoom_in", "zoom_out", "static"} & found) == 1


# ----------------------------------------------------------------------------------------------------------------- structure


def test_points_stay_on_their_place_while_it_grows_and_darkens() -> None:
    """It grows by half in 12 frames and loses 40 % of its brightness: a point's position in the source picture must not change."""
    width, T = 256, 13
    boxes = [(96 + 4 * t, 90 + 3 * t, 320 / 1.5 ** (t / (T - 1))) for t in range(T)]
    video = window(texture(512, 512), boxes, 192, width)
    video = (video * torch.linspace(1, 0.6, T)[:, None, None, None]).to(torch.uint8)
    paths = follow_points(video, 1) - 0.5  # (T, N, 2)
    behind = np.stack([[left, top] + xy * w / width for (left, top, w), xy in zip(boxes, paths, strict=True)])
    long = behind[:, np.isfinite(behind[..., 0]).sum(0) > 8]
    assert long.shape[1] > 100
    miss = np.linalg.norm(long - np.nanmedian(long, axis=0), axis=-1)
    assert np.nanquantile(miss, 0.95) < 0.1 and np.nanmax(miss) < 0.5


def test_a_rotation_over_a_flat_picture_is_recognised() -> None:
    video, path = turned(torch.from_numpy(texture(96, 144)))
    found = estimate_structure(video, path.intrinsics)
    assert found.model == "turning" and bool(found.found.all())
    assert rotation_error(found.trajectory, path, found.found) < 0.1
    still = estimate_structure(frozen(video), path.intrinsics)
    assert rotation_error(still.trajectory, path, still.found) == pytest.approx(2 * np.arange(1, 9).mean(), abs=0.05)


def test_noise_has_no_path() -> None:
    video = noise(torch.zeros(5, 96, 144, 3, dtype=torch.uint8), 0)
    assert not estimate_structure(video, axes_trajectory({}, 5, 96, 144).intrinsics).found[1:].any()


def two_planes(path, H: int, W: int) -> Tensor:
    """Frames of two textured walls at different depths, by ray and plane: a scene with parallax, rendered without `render.py`."""
    near, far, frames = texture(512, 512, 1), texture(512, 512, 2), []
    for pose, K in zip(path.c2w.double().numpy(), path.intrinsics.double().numpy(), strict=True):
        x, y = np.meshgrid((np.arange(W) + 0.5 - W / 2) / (K[0] * W), (np.arange(H) + 0.5 - H / 2) / (K[1] * H))
        d = np.stack([x, y, np.ones_like(x)], -1) @ pose[:, :3].T
        picture = None
        for wall, depth, scale in ((far, 9.0, 24.0), (near, 4.0, 48.0)):
            hit = pose[:, 3] + d * ((depth - pose[2, 3]) / d[..., 2])[..., None]
            at = (hit[..., :2] * scale + 256).astype(np.float32)
            seen = cv2.remap(wall, at[..., 0], at[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
            picture = seen if picture is None else np.where((hit[..., 1] > 0.3)[..., None], seen, picture)
        frames.append(picture)
    return torch.from_numpy(np.stack(frames))


@pytest.mark.parametrize("axes", [{"horizontal": 4.0}, {"dolly": 3.0, "pan": 2.0}], ids=str)
def test_travel_through_parallax(axes: dict[str, float]) -> None:
    path = axes_trajectory(axes, 9, 128, 192)
    found = estimate_structure(two_planes(path, 128, 192), path.intrinsics)
    assert found.model == "moving" and bool(found.found.all())
    assert rotation_error(found.trajectory, path, found.found) < 0.5
    assert translation_error(found.trajectory, path, found.found) < 0.05


@pytest.mark.slow
def test_pycolmap_is_one_of_the_methods() -> None:
    pytest.importorskip("pycolmap")
    path = axes_trajectory({"horizontal": 8.0, "zoom": 3.0}, 9, 128, 192)  # intrinsics that change, too
    video = two_planes(path, 128, 192)
    placed = colmap_path(video, path.intrinsics, 2)
    every = torch.ones(9, dtype=torch.bool)
    assert placed is not None
    assert rotation_error(placed, path, every) < 0.5 and translation_error(placed, path, every) < 0.03
    found = estimate_structure(video, path.intrinsics, colmap=True)
    assert found.model in ("moving", "colmap") and translation_error(found.trajectory, path, found.found) < 0.03
    assert colmap_path(noise(video, 0), path.intrinsics, 2) is None


def test_sums_match_cami2v() -> None:
    still, pan, truck = (axes_trajectory(axes, 17, 64, 112) for axes in ({}, {"pan": 10.0}, {"horizontal": 10.0}))
    turn = summed_errors(still, pan)
    assert turn["rotation"] == pytest.approx(math.radians(45) * sum(t / 16 for t in range(1, 17)), abs=1e-3)
    travel = summed_errors(still, truck)
    assert travel["translation"] == pytest.approx(travel["cammc"], abs=1e-6) and travel["translation"] == pytest.approx(8.5, abs=1e-4)
    assert summed_errors(truck.scaled(0.2), truck)["translation"] == pytest.approx(0, abs=1e-4)


# --------------------------------------------------------------------------------------------- joins, drift, order of controls


def test_temporal_psnr_ignores_constant_errors_and_detects_flicker() -> None:
    video = torch.rand(1, 3, 4, 8, 8) - 0.5
    assert float(temporal_psnr(video + 0.2, video).min()) > 100
    flick = video + 0.2 * torch.tensor([0.0, 1, 0, 1]).view(1, 1, 4, 1, 1)
    assert temporal_psnr(flick, video)[0].tolist() == pytest.approx([20.0] * 3, abs=1e-3)


def test_drift_and_joins_of_known_steps() -> None:
    flat = torch.full((12, 16, 20, 3), 100, dtype=torch.uint8)
    flat[:, ::2, ::2] = 140
    levels = torch.tensor([0] * 4 + [6] * 4 + [12] * 4, dtype=torch.uint8).view(-1, 1, 1, 1)
    steps = drift(flat + levels, [4, 8])
    assert steps["colour"] == pytest.approx(6 * math.sqrt(3), abs=1e-3) and steps["contrast"] == pytest.approx(0, abs=1e-6)
    joins = seam_rows(to_tensor(flat + levels)[None], [4, 8], np.array([1, 1, 1, 3, 1, 1, 1, 3, 1, 1, 1.0]))
    assert joins["colour"] == pytest.approx(6 * math.sqrt(3), abs=1e-2) and joins["velocity"] == 2 and joins["gap"] > 20
    still = drift(flat, [4, 8])
    assert max(still.values()) < 1e-6
    long = torch.full((1441, 8, 8, 3), 60, dtype=torch.uint8)  # 180 s at 8 fps: 41 frames, then 44 hops
    hop = torch.arange(1441).sub(9).div(32, rounding_mode="floor").clamp(min=0).to(torch.uint8)
    assert drift(long + hop.view(-1, 1, 1, 1), range(41, 1441, 32))["colour"] == pytest.approx(math.sqrt(3), abs=1e-3)
    faded = drift(stepped(flat, [4, 8]), [4, 8])
    assert faded["contrast"] == pytest.approx(0.18, abs=0.02)  # 1, 0.8, 0.64


def test_violations_are_reported() -> None:
    order = Order("error", ("truth", "frozen", "noise"), higher=False)
    assert violations([order], {"truth": {"error": 0.0}, "frozen": {"error": 0.0}, "noise": {"error": 2.0}}) == []
    wrong = violations([order], {"truth": {"error": 3.0}, "frozen": {"error": 1.0}, "noise": {"error": 2.0}})
    assert wrong == ["error: truth 3 should be below frozen 1", "error: truth 3 should be below noise 2"]
    for value in (1.0, math.nan):  # the ends must not tie
        assert violations([order], {"truth": {"error": value}, "noise": {"error": 1.0}})
    assert violations([order], {"truth": {}}) == []
