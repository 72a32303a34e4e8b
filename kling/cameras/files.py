"""Camera files: RealEstate10K text and JSON, read into a `Trajectory` and written from one.

    text   an optional line with the video's url, then one line a frame:
           timestamp(µs) fx fy cx cy 0 0 r11 r12 r13 t1 r21 ... t3        the 3x4 is world-to-camera
    JSON   {"fps": 8, "intrinsics": [T][4], "c2w": [T][3][4]}

Also accepted: lines without the timestamp, or with the same one in every line (the frames are then evenly spaced); 4x4 matrices, whose
last row is 0 0 0 1; in JSON, one row of intrinsics for all frames.

Both hold OpenCV axes (x right, y down, z forward) and intrinsics normalised by width and height. A path is resampled, from its first pose
to its last, to the clip's number of frames: it lasts as long as the clip does, like a named camera move.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from kling.cameras.poses import cropped, inverse, quaternion, resample, rotation_matrix
from kling.cameras.trajectory import Trajectory
from kling.errors import UserError
from kling.runtime.files import parse_json, replaced, writing

COLUMNS = 19
LAST_ROW = [0.0, 0.0, 0.0, 1.0]  # of a 4x4
SLACK = 1e-2  # how far R Rᵀ may be from the identity: files round to a few digits
MAX_FOCAL = 20.0  # picture widths; a larger value must be in pixels


def load_trajectory(path: str | Path, T: int, size: tuple[int, int] | None = None) -> Trajectory:
    """The camera of a file over T frames, relative to frame 0.

    size: (H, W) of the video to be made; if the file's picture is wider or taller, the intrinsics are those of its centre crop.
    Raises `UserError` naming the file, and the frame, for anything that is not a camera path.
    """
    times, path_taken = read_path(path)
    when = torch.linspace(0, 1, T, dtype=times.dtype) * (times[-1] - times[0]) + times[0]  # (T,)
    trajectory = resample(path_taken.relative(), times, when)
    if size is not None:
        trajectory = cropped(trajectory, *size)
    return Trajectory(trajectory.c2w.float(), trajectory.intrinsics.float())


def load_window(path: str | Path, when: Tensor, size: tuple[int, int], duration: float) -> Trajectory:
    """The camera at the times `when` (T,), in seconds into a video of `duration` seconds, relative to the first of them.

    If the timestamps of a RealEstate10K file lie beyond the video's end, they count from the start of a longer video that this one was cut
    from: they are shifted to start at 0. Raises `UserError` if the path does not cover all of `when`.
    """
    times, path_taken = read_path(path, timed=True)
    if times[-1] > duration + 0.5:
        times = times - times[0]
    step = float((times[-1] - times[0]) / max(1, len(times) - 1))
    if len(times) > 1 and (when[0] < times[0] - step or when[-1] > times[-1] + step):
        given = f"{float(times[0]):.2f} … {float(times[-1]):.2f} s"
        raise UserError(f"camera file {path} covers {given}, the clip {float(when[0]):.2f} … {float(when[-1]):.2f} s: give the whole path")
    trajectory = cropped(resample(path_taken, times, when.to(times.dtype)).relative(), *size)
    return Trajectory(trajectory.c2w.float(), trajectory.intrinsics.float())


def read_path(path: str | Path, timed: bool = False) -> tuple[Tensor, Trajectory]:
    """(times (n,), the poses as given in the file), float64. Times are in seconds; without timestamps, frame numbers (refused if `timed`).

    Raises `UserError` naming what is wrong and in which frame.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"camera file {path} does not exist: check the path") from None
    except (OSError, ValueError) as error:
        raise UserError(f"camera file {path} cannot be read ({error}): give RealEstate10K text or JSON") from None
    times, intrinsics, c2w = _from_json(path, text, timed) if text.lstrip()[:1] in ("{", "[") else _from_text(path, text, timed)
    _check(path, intrinsics, c2w)
    R = rotation_matrix(quaternion(c2w[:, :, :3]))  # exact, whatever the file was rounded to
    return times, Trajectory(torch.cat([R, c2w[:, :, 3:]], dim=-1), intrinsics)


def trajectory_json(trajectory: Trajectory, fps: float) -> str:
    """The text of a JSON trajectory file: one pose a frame, `fps` of them a second."""
    return json.dumps({"fps": fps, "intrinsics": trajectory.intrinsics.tolist(), "c2w": trajectory.c2w.tolist()}) + "\n"


def save_trajectory(path: str | Path, trajectory: Trajectory, fps: float = 8.0, start: float = 0.0) -> None:
    """Write RealEstate10K text (.txt, its first pose at `start` seconds) or JSON (.json, which has no start time), atomically.

    Raises `UserError` for other suffixes and for paths that cannot be written.
    """
    path = Path(path)
    c2w, intrinsics = trajectory.c2w.double(), trajectory.intrinsics
    if path.suffix == ".json":
        text = trajectory_json(trajectory, fps)
    elif path.suffix == ".txt":
        stamps = [round(1e6 * (start + t / fps)) for t in range(len(trajectory))]
        rows = zip(stamps, intrinsics.tolist(), inverse(c2w).flatten(1).tolist(), strict=True)
        text = "".join(f"{stamp} " + " ".join(f"{x:.9g}" for x in (*k, 0, 0, *w2c)) + "\n" for stamp, k, w2c in rows)
    else:
        raise UserError(f"camera file {path}: end its name in .txt (RealEstate10K) or .json")
    with writing(path), replaced(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------------- reading


def _from_text(path: Path, text: str, timed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(times (n,) in seconds, intrinsics (n, 4), c2w (n, 3, 4)) of RealEstate10K lines, float64."""
    lines = [line.split() for line in text.splitlines() if line.strip()]
    if lines and len(lines[0]) == 1:  # the url
        lines = lines[1:]
    if not lines:
        raise UserError(f"camera file {path} holds no pose: give one line of {COLUMNS} numbers for each frame")
    columns = len(lines[0])
    for t, line in enumerate(lines):
        if len(line) != columns or columns not in (COLUMNS - 1, COLUMNS, COLUMNS + 3, COLUMNS + 4):
            layout = "time, 4 intrinsics, 2 zeros, the 3x4 world-to-camera matrix row by row; the time may be missing, the matrix 4x4"
            raise UserError(f"camera file {path}, frame {t} has {len(line)} columns: give {COLUMNS} ({layout})")
    try:
        table = torch.tensor([[float(x) for x in line] for line in lines], dtype=torch.float64)
    except ValueError as error:
        raise UserError(f"camera file {path} holds a word where a number belongs ({error})") from None
    if columns > COLUMNS:
        _check_last_rows(path, table[:, -4:])
        table = table[:, :-4]
    untimed = table.shape[1] < COLUMNS
    if untimed:
        table = torch.cat([torch.zeros(len(table), 1, dtype=table.dtype), table], dim=1)
    times = table[:, 0].contiguous()
    if len(times) > 1 and (times == times[0]).all():
        if timed:
            what = "no timestamps" if untimed else f"the timestamp {times[0]:g} in every line"
            raise UserError(f"camera file {path} has {what}: give microseconds from the video's start, line by line")
        times = 1e6 * torch.arange(len(times), dtype=times.dtype)
    for t in range(1, len(times)):
        if not times[t] > times[t - 1]:
            raise UserError(f"camera file {path}, frame {t}: its timestamp {times[t]:g} is not after {times[t - 1]:g}: sort by time")
    if (distorted := table[:, 5:7].ne(0).any(1)).any():
        frame = int(distorted.int().argmax())
        raise UserError(f"camera file {path}, frame {frame} has lens distortion: undistort the camera and put 0 0 in columns 6 and 7")
    return times / 1e6, table[:, 1:5], inverse(table[:, 7:].unflatten(1, (3, 4)))


def _from_json(path: Path, text: str, timed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The same from a `{fps, intrinsics, c2w}` object; the frames are evenly spaced."""
    try:
        data = parse_json(text)
        if isinstance(data, list):
            raise UserError(f'camera file {path} holds a list: give {{"fps": 8, "intrinsics": [T][4], "c2w": [T][3][4]}}')
        fps, intrinsics, c2w = data.get("fps", 0 if timed else 1), data["intrinsics"], data["c2w"]
        if _numbers(intrinsics, 4):
            intrinsics = [intrinsics]
        if len(intrinsics) == 1:
            intrinsics = intrinsics * len(c2w)
        counts = len(intrinsics), len(c2w)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"camera file {path} is not JSON ({error})") from None
    except KeyError as error:
        known = "" if error.args[0] != "c2w" or "w2c" not in data else " (w2c is the inverse of c2w)"
        raise UserError(f"camera file {path} has no {error}{known}: give fps, intrinsics [T][4] and c2w [T][3][4]") from None
    except TypeError:
        raise UserError(f"camera file {path}: intrinsics and c2w must be lists, [T][4] and [T][3][4]") from None
    if counts[0] != counts[1] or not counts[0]:
        raise UserError(f"camera file {path} has {counts[0]} intrinsics and {counts[1]} poses: give one of each for every frame")
    for t, (k, pose) in enumerate(zip(intrinsics, c2w, strict=True)):
        if not (_numbers(k, 4) and isinstance(pose, list) and len(pose) in (3, 4) and all(_numbers(row, 4) for row in pose)):
            raise UserError(f"camera file {path}, frame {t}: give 4 intrinsics (fx fy cx cy) and a 3x4 matrix of numbers")
    if any(len(pose) == 4 for pose in c2w):
        _check_last_rows(path, torch.tensor([pose[3] if len(pose) == 4 else LAST_ROW for pose in c2w], dtype=torch.float64))
        c2w = [pose[:3] for pose in c2w]
    if not _is_number(fps) or not fps > 0:
        raise UserError(f"camera file {path} has fps {fps!r:.40}: give a positive number of poses a second")
    times = torch.arange(counts[0], dtype=torch.float64) / fps
    return times, torch.tensor(intrinsics, dtype=torch.float64), torch.tensor(c2w, dtype=torch.float64)


def _check_last_rows(path: Path, rows: Tensor) -> None:
    """Refuse 4x4 matrices whose last rows (n, 4) are not 0 0 0 1, such as transposed ones."""
    if (off := (rows - torch.tensor(LAST_ROW, dtype=rows.dtype)).abs().gt(1e-6).any(1)).any():
        frame = int(off.int().argmax())
        raise UserError(f"camera file {path}, frame {frame}: the last row of its 4x4 is not 0 0 0 1: give [R | t; 0 0 0 1] by rows")


def _numbers(row: object, n: int) -> bool:
    return isinstance(row, list) and len(row) == n and all(map(_is_number, row))


def _is_number(x: object) -> bool:
    """Whether torch can hold it: JSON may have whole numbers of hundreds of digits."""
    return isinstance(x, float) or (isinstance(x, int) and abs(x) < 2**63)


def _check(path: Path, intrinsics: Tensor, c2w: Tensor) -> None:
    """Raise `UserError` for the first frame whose values no camera can have."""
    R = c2w[:, :, :3]
    off = (R @ R.mT - torch.eye(3, dtype=R.dtype)).abs().amax((1, 2))  # (n,)
    turn = torch.linalg.det(R.nan_to_num())
    for t in range(len(c2w)):
        where = f"camera file {path}, frame {t}"
        if not (c2w[t].isfinite().all() and intrinsics[t].isfinite().all()):
            raise UserError(f"{where} holds NaN or infinity: leave the frame out")
        if off[t] > SLACK:
            raise UserError(f"{where}: its 3x3 part is not a rotation (R Rᵀ is {off[t]:.2g} off the identity): give [R | t] without scale")
        if turn[t] < 0:
            raise UserError(f"{where} is left-handed (determinant -1): give OpenCV axes, x right, y down, z forward")
        fx, fy = intrinsics[t, :2].tolist()
        if min(fx, fy) <= 0:
            raise UserError(f"{where} has focal lengths {fx:g} and {fy:g}: give positive ones")
        if max(fx, fy) > MAX_FOCAL:
            raise UserError(f"{where} has a focal length of {max(fx, fy):g}, in pixels: divide fx, cx by the width, fy, cy by the height")
