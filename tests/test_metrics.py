"""The metrics: closed forms, known paths, and their readings of rendered clips with known truth."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from kling_programs.eval.cases import TABLE
from torch import Tensor

from kling.cameras.axes import MOVES, axes_trajectory
from kling.data.strip import strip
from kling.data.world.render import HAZE, HAZE_DISTANCE
from kling.data.world.scene import COLOUR_RGB, FOCAL, Scene, World, render_scene, start_pose
from kling.metrics.camera.errors import CLASSES, SINGLE, axes_of, camera_class, rotation_error, translation_error
from kling.metrics.camera.odometry import Stage, estimate_trajectory
from kling.metrics.control import QUESTIONS, Detectors
from kling.metrics.pixel import flicker, psnr, seam, ssim
from kling.metrics.report import Line, markdown, paired, portion, reached, summarise
from kling.metrics.ruler import Ruler
from kling.metrics.stats import bootstrap, wilson

STAGE = Stage(start_pose(), FOCAL, float(HAZE.mean()), HAZE_DISTANCE, COLOUR_RGB)


def flat(*levels: float) -> Tensor:
    """A video (1, 3, T, 16, 16) with one grey level in [0, 1] per frame."""
    return (torch.tensor(levels) * 2 - 1).view(1, 1, -1, 1, 1).expand(1, 3, -1, 16, 16)


# ------------------------------------------------------------------------------------------------------------------ pixels


def test_psnr_of_a_constant_difference() -> None:
    assert psnr(flat(0.5, 0.5), flat(0.6, 0.5)).tolist() == [pytest.approx([20.0, 106.02], abs=0.1)]


def test_ssim_closed_forms() -> None:
    x = torch.rand(1, 3, 2, 20, 24) * 2 - 1
    assert torch.allclose(ssim(x, x), torch.ones(1, 2))
    a, b = 0.3, 0.7  # no structure: luminance alone
    assert float(ssim(flat(a), flat(b))) == pytest.approx((2 * a * b + 1e-4) / (a * a + b * b + 1e-4), abs=1e-6)


def test_ssim_of_one_window_by_hand() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.random((11, 11)), rng.random((11, 11))
    g = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    w = np.outer(g, g) / g.sum() ** 2
    ma, mb = (w * a).sum(), (w * b).sum()
    va, vb, cab = (w * (a - ma) ** 2).sum(), (w * (b - mb) ** 2).sum(), (w * (a - ma) * (b - mb)).sum()
    expected = (2 * ma * mb + 1e-4) * (2 * cab + 9e-4) / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4))
    video = [torch.from_numpy(x * 2 - 1).expand(1, 3, 1, 11, 11) for x in (a, b)]
    assert float(ssim(*video)) == pytest.approx(expected, abs=1e-6)


def test_ssim_agrees_with_scikit_image() -> None:
    metrics = pytest.importorskip("skimage.metrics")
    a = torch.rand(32, 40, generator=torch.Generator().manual_seed(0)).double()
    b = (a + 0.1 * torch.rand(32, 40, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
    expected = metrics.structural_similarity(a.numpy(), b.numpy(), **options)
    assert float(ssim(*((x * 2 - 1).expand(1, 3, 1, 32, 40) for x in (a, b)))) == pytest.approx(expected, abs=1e-4)


def test_flicker_detects_flashes_and_ignores_a_ramp() -> None:
    assert float(flicker(flat(0.1, 0.2, 0.3, 0.4))) == pytest.approx(0, abs=1e-4)
    assert float(flicker(flat(0.4, 0.5, 0.4, 0.5))) == pytest.approx(0.2 * 255, abs=1e-3)


def test_seam_finds_the_jump() -> None:
    ramp = [0.2 + 0.01 * t for t in range(8)]
    smooth, broken = seam(flat(*ramp), 4), seam(flat(*ramp[:4], *(x + 0.1 for x in ramp[4:])), 4)
    assert float(smooth["gap"]) == pytest.approx(0, abs=0.01)
    assert float(smooth["jump"]) == pytest.approx(float(smooth["usual"]), abs=1e-3)
    assert float(broken["gap"]) == pytest.approx(20 * math.log10(11), abs=0.01)
    assert float(broken["jump"]) == pytest.approx(0.11 * 255 * math.sqrt(3), abs=0.01)


# ------------------------------------------------------------------------------------------------------------------ statistics


def test_wilson() -> None:
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(0, 20)[0] == 0 and wilson(20, 20)[1] == 1
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe 1998, table I


def test_bootstrap_is_seeded_and_holds_the_mean() -> None:
    values = torch.randn(200, generator=torch.Generator().manual_seed(0)).tolist()
    low, high = bootstrap(values)
    assert bootstrap(values) == (low, high)
    assert low < sum(values) / 200 < high
    assert high - low == pytest.approx(2 * 1.96 / math.sqrt(200), rel=0.15)


def test_a_difference_reaches_its_target_with_its_whole_interval() -> None:
    line = Line("zh - en", "motion", "Chinese less English", target=">= -0.05", whole=True)
    few, many = ({"value": 0.0, "low": -0.1, "high": 0.1, "n": 12}, {"value": 0.0, "low": -0.04, "high": 0.04, "n": 256})
    for score, met in ((few, False), (many, True)):
        assert reached([line], {"zh - en": {"motion": score}}) == {"zh - en motion": met}
        assert ("**0.0 %**" in markdown([line], {"zh - en": {"motion": score}}, {})) == met
    assert "interval ≥ -5.0 %" in markdown([line], {"zh - en": {"motion": few}}, {})
    assert [x.whole for x in TABLE if " - " in x.task and x.target] == [True] * 8
    most = Line("a - b", "x", "difference", target="<= 0.05", whole=True)
    assert (
        most.reached({"value": 0.0, "low": -0.1, "high": 0.1}) is False and most.reached({"value": None, "low": None, "high": None}) is None
    )


def test_report() -> None:
    rows = [{"hit": True, "error": 2.0}, {"hit": False, "error": None}]
    scores = {"task": summarise(rows), "difference": paired(rows, rows[::-1])}
    assert scores["task"]["hit"]["value"] == 0.5 and scores["task"]["error"]["n"] == 1
    assert scores["difference"]["hit"]["value"] == 0
    with_, without = ([{"other": hit} for hit in hits] for hits in ([True, False, None, False], [True, True, True, False]))
    half = portion(without, with_, "other")["other"]
    assert half["value"] == 0.5 and half["n"] == 3 and 0 <= half["low"] < 0.5 < half["high"] <= 1
    assert portion(with_[1:2], without[:1], "other")["other"]["value"] is None
    lines = [Line("task", "hit", "right", target=">= 0.4", chance=0.25), Line("task", "error", "error", "°", None, "<= 1")]
    table = markdown(lines, scores, {"truth": {"task": summarise(rows[:1])}})
    assert "**50.0 %**" in table and "| 100.0 % |" in table and "≤ 1.00 °" in table
    assert reached(lines, scores) == {"task hit": True, "task error": False}
    assert strip([torch.zeros(5, 4, 6, 3, dtype=torch.uint8)] * 2, columns=3, gap=1).shape == (9, 20, 3)


# ---------------------------------------------------------------------------------------------------------------------- camera


@pytest.mark.parametrize("axes", [{"pan": 9.0, "tilt": -4.0, "zoom": 3.0}, {"horizontal": -5.0, "pan": 8.0}, {"roll": 10.0, "dolly": 4.0}])
def test_axes_of_a_path_are_the_axes_it_was_made_from(axes: dict[str, float]) -> None:
    found = axes_of(axes_trajectory(axes, 41, 64, 112))
    assert found == pytest.approx({name: axes.get(name, 0.0) for name in found}, abs=0.02)


def test_every_class_is_its_own() -> None:
    for name in CLASSES:
        asked = {**SINGLE, **MOVES}.get(name, {})
        weak = {axis: 0.4 * value for axis, value in asked.items()}
        assert camera_class(axes_of(axes_trajectory(weak, 17, 64, 112))) == name


def test_errors_of_known_paths() -> None:
    still, pan, truck = (axes_trajectory(axes, 41, 64, 112) for axes in ({}, {"pan": 10.0}, {"horizontal": 10.0}))
    back = axes_trajectory({"horizontal": -5.0}, 41, 64, 112)
    found = torch.ones(41, dtype=torch.bool)
    mean_s = sum(t / 40 for t in range(1, 41)) / 40
    assert rotation_error(still, pan, found) == pytest.approx(45 * mean_s, abs=1e-3)
    assert rotation_error(pan, pan, found) == pytest.approx(0, abs=1e-3)
    assert translation_error(still, pan, found) is None
    assert translation_error(truck.scaled(0.5), truck, found) == pytest.approx(0, abs=1e-5)  # self-normalised
    assert translation_error(still, truck, found) == pytest.approx(mean_s, abs=1e-4)
    assert translation_error(back, truck, found) == pytest.approx(2 * mean_s, abs=1e-4)
    lost = torch.arange(41) < 21  # half of the frames after the first
    assert rotation_error(pan, pan, lost) is None and translation_error(truck, truck, lost) is None


@pytest.mark.parametrize("axes", [{"pan": -9.0}, {"horizontal": 6.0, "zoom": -4.0}], ids=str)
def test_the_camera_of_a_rendered_clip(axes: dict[str, float]) -> None:
    scene = with_camera(World(seed=3, frames=17, aspect="16:9").scene(1), axes)
    row = Ruler(STAGE, None).camera(render_scene(scene), scene.trajectory, axes if len(axes) == 1 else None)
    assert row["registered"] and row["rotation"] < 0.6
    assert row["translation"] is None or row["translation"] < 0.05
    assert row["class"] in (None, True)


def test_noise_is_not_registered() -> None:
    noise = torch.randint(0, 256, (5, 64, 112, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    row = Ruler(STAGE, None).camera(noise, axes_trajectory({"pan": 5.0}, 5, 64, 112), {"pan": 5.0})
    assert row == {"class": False, "rotation": None, "translation": None, "registered": False}


# --------------------------------------------------------------------------------------------------------------------- control


def with_camera(scene: Scene, axes: dict[str, float]) -> Scene:
    H, W = 64, 112
    return dataclasses.replace(scene, axes=axes, move="", trajectory=axes_trajectory(axes, scene.frames, H, W, FOCAL))


def labelled(seed: int, n: int, frames: int, split: str) -> list[tuple[Tensor, dict[str, str]]]:
    world = World(seed, frames, "16:9", split, max_things=1)
    scenes = [with_camera(world.scene(i), {}) for i in range(n)]
    return [
        (render_scene(s), {"colour": s.things[0].colour, "solid": s.things[0].solid, "ground": s.ground, "motion": s.things[0].motion})
        for s in scenes
    ]


def hits(detectors: Detectors, clips: list[tuple[Tensor, dict[str, str]]]) -> dict[str, float]:
    readings = [(detectors.read(video), labels) for video, labels in clips]
    return {q: sum(r[q] == labels[q] for r, labels in readings) / len(clips) for q in QUESTIONS}


def test_detectors_read_rendered_clips() -> None:
    detectors = Detectors.fit(labelled(1, 80, 17, "train"), COLOUR_RGB)
    clips = labelled(2, 20, 17, "heldout")
    score = hits(detectors, clips)
    assert score["colour"] == 1 and score["ground"] == 1 and score["solid"] >= 0.9 and score["motion"] >= 0.8
    frozen = hits(detectors, [(video[:1].expand_as(video), labels) for video, labels in clips])
    assert frozen["colour"] >= 0.9 and frozen["motion"] <= 0.5
    noise = torch.randint(0, 256, (17, 64, 112, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert detectors.read(noise)["solid"] != "nothing"


@pytest.mark.slow
def test_certified_at_the_length_that_is_scored() -> None:
    detectors = Detectors.fit(labelled(1, 400, 41, "train"), COLOUR_RGB)
    assert min(hits(detectors, labelled(2, 200, 41, "heldout")).values()) >= 0.99


@pytest.mark.slow
def test_camera_certified_at_the_length_that_is_scored() -> None:
    world, rows = World(seed=3, frames=41, aspect="16:9", max_things=1), []
    for i in range(60):
        scene = world.scene(i)
        named = scene.axes if len(scene.axes) < 2 or scene.move else None
        rows.append(Ruler(STAGE, None).camera(render_scene(scene), scene.trajectory, named))
    score = summarise(rows)
    assert score["class"]["value"] >= 0.99 and score["registered"]["value"] == 1
    assert score["rotation"]["value"] <= 0.6 and score["translation"]["value"] <= 0.05


def test_estimates_are_relative_to_the_first_frame() -> None:
    scene = with_camera(World(seed=3, frames=5, aspect="16:9").scene(2), {"vertical": 5.0})
    path = estimate_trajectory(render_scene(scene), STAGE).trajectory
    assert torch.allclose(path.c2w[0], torch.eye(3, 4), atol=1e-6)
    assert torch.allclose(path.intrinsics[0], scene.trajectory.intrinsics[0], atol=1e-6)
