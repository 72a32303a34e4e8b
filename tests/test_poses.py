"""Camera files and Kling's HTTP format: closed forms, round trips, and one clear line for every invalid file."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from kling.cameras.axes import MOVES, axes_trajectory
from kling.cameras.files import load_trajectory, load_window, save_trajectory
from kling.cameras.kling_http import AXES, axes_from_wire, axes_to_wire
from kling.cameras.poses import cropped, inverse, quaternion, rotation_matrix
from kling.cameras.trajectory import Trajectory
from kling.errors import UserError

T, H, W = 41, 64, 112
EYE = [[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]
K = [0.8, 1.4, 0.5, 0.5]


def close(a: Trajectory, b: Trajectory, atol: float = 1e-6) -> bool:
    return torch.allclose(a.c2w, b.c2w, atol=atol) and torch.allclose(a.intrinsics, b.intrinsics, atol=atol)


def json_file(path: Path, **changes: object) -> Path:
    path.write_text(json.dumps({"fps": 8, "intrinsics": [K, K], "c2w": [EYE, EYE]} | changes))
    return path


@pytest.mark.parametrize("suffix", [".txt", ".json"])
def test_round_trip(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"camera{suffix}"
    axes = {"pan": 10, "tilt": -6, "roll": 8, "zoom": 5, "dolly": 7, "horizontal": -4}
    trajectory = axes_trajectory(axes, T, H, W)
    save_trajectory(path, trajectory)
    assert close(load_trajectory(path, T), trajectory)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_realestate10k_closed_form(tmp_path: Path) -> None:
    """World-to-camera lines after a url; the camera starts elsewhere and moves 2 along its own z while it pans right by 90 degrees."""
    first = "100 0.5 0.9 0.5 0.5 0 0  0 0 -1 3   0 1 0 -1   1 0 0 2"  # rotated: the camera's z is the world's x
    R = torch.tensor([[0.0, 0, -1], [0, 1, 0], [1, 0, 0]], dtype=torch.float64)
    o = -R.T @ torch.tensor([3.0, -1, 2], dtype=torch.float64) + 2 * R[2]
    turn = torch.tensor([[0.0, 0, 1], [0, 1, 0], [-1, 0, 0]], dtype=torch.float64)  # of the camera, to the right
    w2c = inverse(torch.cat([R.T @ turn, o[:, None]], dim=1))
    last = "300 1.5 2.7 0.5 0.5 0 0 " + " ".join(str(x) for x in w2c.flatten().tolist())
    path = tmp_path / "clip.txt"
    path.write_text(f"https://example.org/watch?v=x\n{first}\n{last}\n")

    trajectory = load_trajectory(path, 5)
    assert torch.allclose(trajectory.c2w[0], torch.eye(3, 4), atol=1e-6)
    assert torch.allclose(trajectory.c2w[:, :, 3], torch.tensor([[0.0, 0, 2]]) * torch.linspace(0, 1, 5)[:, None], atol=1e-6)
    assert torch.allclose(trajectory.intrinsics[:, 0], torch.linspace(0.5, 1.5, 5))
    for t in range(5):  # at a constant rate: camera z leans to the right, towards +x
        angle = math.pi / 2 * t / 4
        assert torch.allclose(trajectory.c2w[t, :, 2], torch.tensor([math.sin(angle), 0, math.cos(angle)], dtype=torch.float32), atol=1e-6)


def test_uneven_timestamps_keep_their_pace(tmp_path: Path) -> None:
    pose = "0.5 0.9 0.5 0.5 0 0 1 0 0 {x} 0 1 0 0 0 0 1 0"
    (tmp_path / "a.txt").write_text("\n".join(f"{t} {pose.format(x=-t)}" for t in (0, 1, 2, 8)))
    assert torch.allclose(load_trajectory(tmp_path / "a.txt", 5).c2w[:, 0, 3], torch.tensor([0.0, 2, 4, 6, 8]))


def test_one_pose_is_a_still_camera(tmp_path: Path) -> None:
    trajectory = load_trajectory(json_file(tmp_path / "a.json", intrinsics=[K], c2w=[EYE]), 9)
    assert trajectory.c2w.shape == (9, 3, 4) and torch.equal(trajectory.c2w, torch.eye(3, 4).expand(9, 3, 4))


def test_resampling_to_another_length_stays_on_the_path(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    save_trajectory(path, axes_trajectory({"pan": 8, "roll": 0}, 81, H, W))
    assert close(load_trajectory(path, T), axes_trajectory({"pan": 8}, T, H, W))


def test_intrinsics_follow_the_crop() -> None:
    trajectory = Trajectory(torch.eye(3, 4)[None], torch.tensor([[0.5, 0.5 * 16 / 9, 0.5, 0.4]]))  # 16:9
    square = cropped(trajectory, 80, 80).intrinsics[0]
    assert torch.allclose(square, torch.tensor([0.5 * 16 / 9, 0.5 * 16 / 9, 0.5, 0.4]))
    tall = cropped(Trajectory(trajectory.c2w, torch.tensor([[1.0, 1, 0.5, 0.4]])), 90, 160).intrinsics[0]
    assert torch.allclose(tall, torch.tensor([1.0, 16 / 9, 0.5, 0.5 - 0.1 * 16 / 9]))
    same = cropped(trajectory, 90, 160)
    assert torch.allclose(same.intrinsics, trajectory.intrinsics)


def test_quaternions_cover_all_rotations() -> None:
    q = torch.randn(64, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    q = torch.cat([q / q.norm(dim=1, keepdim=True), torch.eye(4, dtype=torch.float64)])  # includes rotations by 180 degrees
    R = rotation_matrix(q)
    assert torch.allclose(torch.linalg.det(R), torch.ones(68, dtype=torch.float64))
    assert torch.allclose(rotation_matrix(quaternion(R)), R, atol=1e-12)


def rows(n: int, time: str = "{t} ", more: str = "") -> str:
    """RealEstate10K lines of a camera that moves forward by one unit per frame."""
    return "".join(time.format(t=1000 * t) + f"0.5 0.9 0.5 0.5 0 0 1 0 0 0 0 1 0 0 0 0 1 {-t}{more}\n" for t in range(n))


FORMS = {
    "timed.txt": rows(5), "no-times.txt": rows(5, time=""), "zero-times.txt": rows(5, time="0 "), "4x4.txt": rows(5, more=" 0 0 0 1"),
    "no-times-4x4.txt": rows(5, time="", more=" 0 0 0 1"), "url.txt": "https://example.org\n" + rows(5, time=""),
}  # fmt: skip
GOES = [[[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, t]] for t in range(5)]
FORMS |= {
    name: json.dumps({"fps": 8, "intrinsics": k, "c2w": [pose + last for pose in GOES]})
    for name, k, last in (
        ("4x4.json", [K] * 5, [[0, 0, 0, 1]]), ("one-row.json", [K], []), ("flat-row.json", K, []), ("both.json", K, [[0, 0, 0, 1]]),
    )
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_all_accepted_forms_give_the_same_path(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(FORMS[name])
    trajectory = load_trajectory(tmp_path / name, 9)
    assert torch.allclose(trajectory.c2w[:, :, 3], torch.tensor([[0.0, 0, 4]]) * torch.linspace(0, 1, 9)[:, None], atol=1e-6)
    assert trajectory.intrinsics.shape == (9, 4) and trajectory.intrinsics[:, 2:].eq(0.5).all()


@pytest.mark.parametrize("name", ["no-times.txt", "zero-times.txt"])
def test_a_path_beside_a_video_needs_times(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(FORMS[name])
    with pytest.raises(UserError, match="give microseconds") as error:
        load_window(tmp_path / name, torch.linspace(0, 1, 5), (H, W), 1.0)
    assert name in str(error.value)


LINE = "0 0.5 0.9 0.5 0.5 0 0 1 0 0 0 0 1 0 0 0 0 1 0\n"
BAD = {
    "empty.txt": ("", "no pose"),
    "url-only.txt": ("https://example.org\n", "no pose"),
    "short.txt": (LINE + "1 0.5 0.9\n", "frame 1 has 3 columns"),
    "word.txt": (LINE.replace("0.9", "wide"), "word"),
    "time.txt": ("2" + LINE + "1" + LINE, "frame 1: its timestamp"),
    "columns.txt": ("0 0.5 0.9 0.5 0.5 1 0 0 0 0 1 0 0 0 0 1 0\n", "frame 0 has 17 columns: give 19"),
    "mixed.txt": (LINE + LINE[2:], "frame 1 has 18 columns"),
    "transposed.txt": (LINE.rstrip() + " 0 0 1 1\n", "frame 0: the last row of its 4x4"),
    "transposed.json": (json.dumps({"intrinsics": K, "c2w": [[*EYE, [3, 0, 0, 1]]]}), "frame 0: the last row of its 4x4"),
    "list.json": (json.dumps([EYE, EYE]), "holds a list"),
    "w2c.json": (json.dumps({"intrinsics": K, "w2c": [EYE]}), "w2c is the inverse of c2w"),
    "deep.json": ('{"c2w": ' + "[" * 100_000, "is nested thousands of levels deep"),
    "lens.txt": (LINE.replace("0 0 1 0 0 0", "0.1 0 1 0 0 0", 1), "distortion"),
    "nan.txt": (LINE.replace("0.9", "nan"), "frame 0 holds NaN"),
    "focal.txt": (LINE.replace("0.9", "-0.9"), "focal"),
    "pixels.txt": (LINE.replace("0.9", "900"), "pixels"),
    "broken.json": ('{"fps": 8', "not JSON"),
    "missing.json": ('{"fps": 8, "intrinsics": []}', "'c2w'"),
    "none.json": ('{"intrinsics": [], "c2w": []}', "0 intrinsics"),
    "number.json": ('{"intrinsics": 1, "c2w": 2}', "lists"),
    "counts.json": (json.dumps({"intrinsics": [K, K], "c2w": [EYE]}), "2 intrinsics and 1 poses"),
    "shape.json": (json.dumps({"intrinsics": [K, K], "c2w": [EYE, EYE[:2]]}), "frame 1"),
    "scaled.json": (json.dumps({"intrinsics": [K, K], "c2w": [EYE, [[2 * x for x in row] for row in EYE]]}), "frame 1: its 3x3 part"),
    "left.json": (json.dumps({"intrinsics": [K, K], "c2w": [EYE, [[-x for x in EYE[0]], *EYE[1:]]]}), "frame 1 is left-handed"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files(tmp_path: Path, name: str) -> None:
    text, message = BAD[name]
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as error:
        load_trajectory(tmp_path / name, T)
    assert message in str(error.value) and name in str(error.value) and "\n" not in str(error.value)


def test_unwritable_paths_are_refused(tmp_path: Path) -> None:
    (tmp_path / "binary.txt").write_bytes(b"\x89PNG\xff\xfe")
    for path in (tmp_path / "absent.txt", tmp_path, tmp_path / "binary.txt"):
        with pytest.raises(UserError, match=path.name):
            load_trajectory(path, T)
    trajectory = axes_trajectory({}, 5, H, W)
    for path in (tmp_path / "a.yaml", tmp_path / "absent" / "a.json"):
        with pytest.raises(UserError, match=path.name):
            save_trajectory(path, trajectory)


@pytest.mark.parametrize("convention", ["2024", "2025"])
def test_wire_round_trip(convention: str) -> None:
    for axes in ({}, *({axis: -4.5} for axis in AXES), *MOVES.values()):
        assert axes_from_wire(axes_to_wire(axes, convention), convention) == axes


def test_wire_conventions_exchange_pan_and_tilt() -> None:
    control = {"type": "simple", "config": {"pan": 5, "tilt": 0, "zoom": 0}}
    assert axes_from_wire(control, "2024") == {"pan": 5.0}
    assert axes_from_wire(control, "2025") == {"tilt": 5.0}
    assert axes_to_wire({"pan": 5}, "2025")["config"]["tilt"] == 5
    assert axes_to_wire(MOVES["forward_up"], "2025") == {"type": "forward_up"}


@pytest.mark.parametrize(
    "control",
    [
        {"type": "spin"},
        {},
        {"type": "simple", "config": {"dolly": 1}},
        {"type": "simple", "config": {"pan": 11}},
        {"type": "simple", "config": {"pan": "5"}},
        {"type": "forward_up", "config": {"pan": 5}},
    ],
)
def test_wire_refuses(control: dict) -> None:
    with pytest.raises(UserError):
        axes_from_wire(control, "2024")


def test_unsupported_cameras_are_refused_by_the_wire_format() -> None:
    for axes in ({"dolly": 1}, {"pan": 1, "roll": 1}, {"pan": 11}):
        with pytest.raises(UserError):
            axes_to_wire(axes, "2024")
    with pytest.raises(UserError, match="2024"):
        axes_to_wire({}, "2023")
