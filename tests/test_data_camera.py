"""Camera estimation, on warped pictures and rendered scenes with known cameras."""

from __future__ import annotations

import functools
import json
import math
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from kling.cameras.files import read_path, save_trajectory
from kling.cameras.plot import draw_path
from kling.cameras.trajectory import Trajectory
from kling.data.manifest import read_manifest
from kling.data.scan.listing import Listing
from kling.data.scan.scan import scan
from kling.data.video import write_video
from kling.data.world.scene import Scene, World, render_scene
from kling.metrics.camera.conventions import convention_errors
from kling.metrics.camera.rotation import estimate_rotation
from kling.metrics.camera.tracks import tracks

sys.path[:0] = [str(Path(__file__).parents[1] / "train")]
import data as program  # noqa: E402

H, W, FOCAL = 180, 320, 0.8


def wall() -> np.ndarray:
    rng = np.random.default_rng(0)
    rough = cv2.resize(rng.integers(0, 256, (60, 107, 3), dtype=np.uint8), (3 * W, 3 * H), interpolation=cv2.INTER_CUBIC)
    return cv2.GaussianBlur(rough, (0, 0), 1.5)


def turning(T: int = 17, yaw: float = 0.015, pitch: float = -0.006) -> tuple[np.ndarray, list[np.ndarray]]:
    """(frames, camera-to-world rotations) of a camera that rotates in front of a distant wall."""
    K = np.array([[FOCAL * W, 0, W / 2], [0, FOCAL * W, H / 2], [0, 0, 1]])
    centred = np.array([[1, 0, -W], [0, 1, -H], [0, 0, 1]])  # the wall's middle third is the first frame's view
    frames, turns, picture = [], [], wall()
    for t in range(T):
        R = cv2.Rodrigues(np.array([pitch * t, yaw * t, 0.0]))[0]
        frames.append(cv2.warpPerspective(picture, K @ R.T @ np.linalg.inv(K) @ centred, (W, H), flags=cv2.INTER_LINEAR))
        turns.append(R)
    return np.stack(frames), turns


def test_a_rotating_camera_is_found_with_its_focal_length():
    frames, turns = turning()
    estimate = estimate_rotation(tracks(frames), 8.0, W / H)
    R = estimate.trajectory.c2w[:, :, :3].double().numpy()
    angles = [math.degrees(math.acos(min(1, (np.trace(a.T @ b) - 1) / 2))) for a, b in zip(R, turns, strict=True)]
    total = math.degrees(math.hypot(0.015, 0.006) * 16)
    assert max(angles) < 0.06 * total and estimate.registered == 1 and estimate.error < 0.5
    assert abs(math.log(float(estimate.trajectory.intrinsics[0, 0]) / FOCAL)) < 0.15
    assert estimate.trajectory.intrinsics[0, 1] == pytest.approx(float(estimate.trajectory.intrinsics[0, 0]) * W / H)


@functools.cache
def scene_with(axis: str) -> tuple[np.ndarray, Trajectory]:
    """A rendered clip whose camera moves mostly along an axis."""
    world = World(0, 17, "16:9", "train")
    scenes = (world.scene(i) for i in range(5000))
    scene = next(s for s in scenes if list(s.axes) == [axis] and abs(s.axes[axis]) > 4 and s.ground == "tiles" and _still(s))
    return render_scene(scene, (H, W)).numpy(), scene.trajectory


def _still(scene: Scene) -> bool:
    return all(thing.motion == "still" for thing in scene.things)


@pytest.mark.parametrize("axis", ["pan", "dolly", pytest.param("horizontal", marks=pytest.mark.slow)])
def test_the_picture_distinguishes_pose_conventions(axis):
    frames, truth = scene_with(axis)
    pairs = tracks(frames, gap=2)
    right, w2c, opengl, _ = convention_errors(truth, pairs, gap=2).values()
    assert right < 1.0 and w2c > 2 * right
    if axis == "pan":
        assert opengl > 2 * right


def test_the_program_draws_a_path_and_refuses_the_inverse(tmp_path, capsys):
    frames, truth = scene_with("pan")
    write_video(tmp_path / "a.mp4", frames, 8)
    good, bad, left = (tmp_path / f"{name}.json" for name in ("good", "bad", "left"))
    save_trajectory(good, truth, 8)
    R, o = truth.c2w[:, :, :3], truth.c2w[:, :, 3:]
    save_trajectory(bad, Trajectory(torch.cat([R.mT, -R.mT @ o], -1), truth.intrinsics), 8)
    poses = json.loads(good.read_text())
    poses["c2w"] = [[[-x for x in row[:3]] + row[3:] if i == 1 else row for i, row in enumerate(pose)] for pose in poses["c2w"]]
    left.write_text(json.dumps(poses))
    program.main(["camera", str(good), "--video", str(tmp_path / "a.mp4")])
    assert "pixels off" in capsys.readouterr().out and (tmp_path / "good.png").stat().st_size > 2000
    for path, says in ((bad, "holds world-to-camera"), (left, "left-handed")):
        with pytest.raises(SystemExit) as stop:
            program.main(["camera", str(path), "--video", str(tmp_path / "a.mp4")])
        assert stop.value.code == 2 and says in capsys.readouterr().err


def test_a_manifest_gets_its_cameras(tmp_path, capsys):
    frames, turns = turning()
    write_video(tmp_path / "a.mp4", frames, 8)
    out = tmp_path / "manifest.jsonl"
    list(scan(Listing().find([tmp_path]), out))
    program.main(["camera", str(out)])
    assert "frames registered: 100.0 %" in capsys.readouterr().out
    (shot,) = read_manifest(out).shots
    times, path = read_path(tmp_path / shot.camera)
    assert len(path) == 17 and float(times[-1]) == pytest.approx(2.0) and shot.measures["camera"]["method"] == "rotation"
    off = path.c2w[-1, :, :3].numpy().T @ turns[-1]
    assert math.degrees(math.acos((np.trace(off) - 1) / 2)) < 1.5
    list(scan(Listing().find([tmp_path]), out))[-1]
    assert read_manifest(out).shots[0].camera == shot.camera  # a second scan keeps it


def test_a_path_is_drawn_where_it_goes():
    T = 9
    c2w = torch.eye(3, 4).repeat(T, 1, 1)
    c2w[:, 2, 3] = torch.linspace(0, 4, T)  # forward
    picture = draw_path(Trajectory(c2w, torch.tensor([[0.9, 1.6, 0.5, 0.5]]).repeat(T, 1)))
    above = (picture[40:480, :480] != 255).any(-1)
    rows, columns = np.nonzero(above)
    assert np.ptp(rows) > 300 and np.ptp(columns) < 300  # upward on the page, not across it


@pytest.mark.slow
def test_colmap_finds_a_moving_camera(tmp_path):
    """A camera that moves sideways past two textured walls at different depths."""
    pytest.importorskip("pycolmap")
    from kling.data.decode import probe
    from kling.metrics.camera.clips import read_colmap

    picture, T = wall(), 21
    frames = []
    for t in range(T):
        x = 0.06 * t
        far, near = ((FOCAL * W / depth) * x for depth in (6.0, 3.0))
        front = cv2.warpAffine(picture[::-1, ::-1], np.float32([[1, 0, -(W / 2 + near)], [0, 1, -H]]), (W, H))
        back = cv2.warpAffine(picture, np.float32([[1, 0, -(W / 2 + far)], [0, 1, -H]]), (W, H))
        frame = back.copy()
        frame[H // 2 :] = front[H // 2 :]
        frames.append(frame)
    write_video(tmp_path / "a.mp4", np.stack(frames), 4, crf=8)
    estimate = read_colmap(tmp_path / "a.mp4", probe(tmp_path / "a.mp4"), 0.0, T / 4)
    o = estimate.trajectory.c2w[:, :, 3].numpy()
    assert estimate.registered > 0.8 and estimate.error < 1.5
    step = np.diff(o, axis=0)
    assert (step[:, 0] > 0).mean() > 0.9 and np.abs(o[:, 0]).max() > 3 * np.abs(o[:, 1:]).max()
