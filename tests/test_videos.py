"""kling-eval videos on real mp4s: failures count, controls decide, mistakes are one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from kling_programs.eval import videos as program
from kling_programs.eval.evaluate import main
from test_motion import texture

from kling.cameras.axes import axes_trajectory
from kling.cameras.files import save_trajectory
from kling.data.image import write_png
from kling.data.video import write_video
from kling.metrics.controls import turned


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """made/: a turning clip and a frozen one; true/: both turning, and a third that made/ lacks; beside them paths and first frames."""
    video, path = turned(torch.from_numpy(texture(64, 96)))
    for name, frames in (("a", video), ("b", video[:1].expand_as(video))):
        write_video(tmp_path / "made" / f"{name}.mp4", frames, 8, crf=10)
    (tmp_path / "paths").mkdir()
    for name in "abc":
        write_video(tmp_path / "true" / f"{name}.mp4", video, 8, crf=10)
        save_trajectory(tmp_path / "paths" / f"{name}.txt", path)
        write_png(tmp_path / "first" / f"{name}@0.png", video[0])
    return tmp_path


def run(folder: Path, *options: str) -> dict:
    main(["videos", str(folder / "made"), "--out", str(folder / "out"), *options])
    return json.loads((folder / "out/scores.json").read_text())


def test_what_is_missing_counts_as_the_worst_and_controls_are_beside_everything(clips: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("imageio_ffmpeg")
    monkeypatch.setattr(program, "CONTROLS", 1)
    monkeypatch.setattr(program, "CONTROL_FRAMES", 17)
    given = {"--reference": "true", "--cameras": "paths", "--keyframes": "first"}
    report = run(clips, *(part for option, name in given.items() for part in (option, str(clips / name))), "--seams", "5")
    assert report["n"] == 3 and list(report["failures"]) == ["c"]
    rows = report["rows"]
    assert rows["a"]["reference"]["psnr"] > 35 and rows["a"]["reference"]["vmaf"] > 90 and rows["a"]["camera"]["rotation"] < 0.3
    assert rows["a"]["camera"]["class"] and rows["a"]["camera"]["registered"] and rows["a"]["motion"]["dynamic"]
    assert rows["a"]["keyframes"]["psnr"] > 35
    assert rows["b"]["keyframes"] == {"psnr": 0.0, "frozen": True}  # a perfect first frame, and no video
    assert rows["b"]["camera"]["rotation"] == pytest.approx(9, abs=0.2) and not rows["b"]["motion"]["dynamic"]
    assert rows["c"]["reference"] == {"psnr": 0, "ssim": 0, "temporal": 0, "vmaf": 0} and rows["c"]["camera"]["rotation"] == 180
    assert report["scores"]["reference"]["psnr"]["n"] == 3
    for measure in program.MEASURES:
        for control in measure.controls:
            assert measure.name in report["columns"][control][measure.task], (measure.name, control)
    assert (clips / "out/strips/reference-psnr.png").is_file() and report["ranked"] == ["b", "a"]


def test_a_metric_that_ranks_its_controls_wrongly_fails_the_run(
    clips: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(program, "CONTROLS", 1)
    monkeypatch.setattr(
        program, "warp_error", lambda video, flow: 1.0 - float(flow.speed().mean() > 0)
    )  # best where nothing can be matched
    with pytest.raises(SystemExit) as stop:
        run(clips)
    assert stop.value.code == 3
    assert "motion warp: frozen 1 should be below noise" in capsys.readouterr().err
    assert (clips / "out/scores.json").is_file()


def test_classes_of_paths() -> None:
    names = {"pan": 5.0, "tilt": -5.0, "zoom": -5.0, "dolly": -5.0, "horizontal": -5.0, "roll": 5.0}
    found = {name: program.vbench_class(axes_trajectory({name: value}, 9, 64, 96)) for name, value in names.items()}
    assert found == {
        "pan": "pan_right",
        "tilt": "tilt_down",
        "zoom": "zoom_in",
        "dolly": "zoom_out",
        "horizontal": "pan_left",
        "roll": None,
    }
    assert program.vbench_class(axes_trajectory({}, 9, 64, 96)) == "static"
    assert program.vbench_class(axes_trajectory({"pan": 5.0, "tilt": 5.0}, 9, 64, 96)) is None


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "no suite was given"),
        (["videos", "nowhere", "--out", "x"], "nowhere is not a folder"),
        (["videos", ".", "--out", "x"], "holds no videos"),
        (["videos", ".", "--out", "x", "--seams", "41:"], "--seams 41:"),
        (["videos", ".", "--out", "x", "--n", "0"], "--n 0"),
        (["videos", ".", "--out", "x", "--colmap"], "give --cameras"),
    ],
)
def test_mistakes_are_one_line(
    argv: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(argv)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1
