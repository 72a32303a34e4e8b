"""kling-eval videos on real mp4s: failures are counted separately, controls are checked, mistakes are one line."""

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
from kling.metrics import clip as clip_metrics
from kling.metrics.clip import METRICS
from kling.metrics.controls import noise, turned


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """made/: a rotating clip and a frozen one; true/: both rotating, and a third that made/ lacks; also paths and first frames."""
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


def test_missing_files_are_counted_and_in_no_mean_and_all_scores_have_controls(clips: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert rows["b"]["keyframes"] == {"psnr": None, "frozen": True}  # a perfect first frame, and no video
    assert rows["b"]["camera"]["rotation"] == pytest.approx(9, abs=0.2) and not rows["b"]["motion"]["dynamic"]
    assert rows["c"] == {} and report["failed"] == dict.fromkeys(report["failed"], 1) and len(report["failed"]) == 5
    for m in METRICS:
        found = [rows[name][m.task][m.name] for name in "ab" if rows[name][m.task][m.name] is not None]
        assert not found or report["scores"][m.task][m.name]["value"] == pytest.approx(sum(found) / len(found)), m.name
        for control in m.controls:
            assert m.name in report["columns"][control][m.task], (m.name, control)
    assert (clips / "out/strips/reference-psnr.png").is_file() and report["ranked"] == ["b", "a"]


def test_a_bad_file_beside_a_video_affects_only_its_own_rows(clips: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A damaged reference, an invalid path file, a picture for a frame beyond the end, and a missing file."""
    monkeypatch.setattr(program, "CONTROLS", 0)
    write_video(clips / "made" / "c.mp4", turned(torch.from_numpy(texture(64, 96)))[0], 8, crf=10)
    (clips / "true" / "a.mp4").write_bytes(b"no video")
    (clips / "paths" / "b.txt").write_text("no path")
    (clips / "paths" / "c.txt").unlink()
    (clips / "first" / "c@0.png").rename(clips / "first" / "c@99.png")
    report = run(clips, "--reference", str(clips / "true"), "--cameras", str(clips / "paths"), "--keyframes", str(clips / "first"))
    assert {name: set(row) for name, row in report["rows"].items()} == {
        "a": {"motion", "camera", "keyframes"}, "b": {"motion", "reference", "keyframes"}, "c": {"motion", "reference"},
    }  # fmt: skip
    assert report["failed"] == {"motion": 0, "reference": 1, "camera": 2, "keyframes": 1, "continuation": 0}
    assert report["scores"]["motion"]["warp"]["n"] == 3 and report["scores"]["camera"]["rotation"]["n"] == 1
    assert report["scores"]["camera"]["rotation"]["value"] < 1 and report["scores"]["reference"]["psnr"]["value"] > 10
    assert "1 in reference, 2 in camera, 1 in keyframes" in (clips / "out/scores.md").read_text()
    assert "keyframes: " in report["failures"]["c"] and "camera: " in report["failures"]["c"]


def test_a_camera_that_cannot_be_found_is_named_and_in_no_mean(
    clips: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(program, "CONTROLS", 0)
    write_video(clips / "made" / "b.mp4", noise(turned(torch.from_numpy(texture(64, 96)))[0], 0), 8, crf=10)
    report = run(clips, "--cameras", str(clips / "paths"))
    says = "camera not found, so in no mean of camera errors (1): b"
    assert says in capsys.readouterr().err.splitlines() and says in (clips / "out/scores.md").read_text()
    assert report["rows"]["b"]["camera"]["registered"] is False and report["rows"]["b"]["camera"]["rotation"] is None
    assert report["scores"]["camera"]["registered"]["value"] == 0.5 and report["scores"]["camera"]["rotation"]["value"] < 1


def test_a_metric_is_one_function(clips: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of them, one with a wrong order of controls: in the table, the report and the check."""
    monkeypatch.setattr(program, "CONTROLS", 1)
    monkeypatch.setattr(clip_metrics, "METRICS", before := list(METRICS))
    monkeypatch.setattr(program, "METRICS", before)

    @clip_metrics.metric("motion", "brightness", "levels", controls=("turned", "noise"))
    def motion_brightness(clip: clip_metrics.Clip) -> float:
        return float(clip.video.float().mean())

    @clip_metrics.metric("motion", "frames", controls=("frozen", "turned"), higher=False)
    def motion_frames(clip: clip_metrics.Clip) -> float:
        return float(len(clip.video))

    with pytest.raises(SystemExit) as stop:
        run(clips)
    report = json.loads((clips / "out/scores.json").read_text())
    assert stop.value.code == 3
    assert report["rows"]["a"]["motion"]["frames"] == 9 and report["columns"]["noise"]["motion"]["brightness"]["value"] > 100
    assert "| brightness |" in report["table"] and "| frames |" in report["table"]


def test_a_metric_that_ranks_its_controls_wrongly_fails_the_run(
    clips: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(program, "CONTROLS", 1)
    monkeypatch.setattr(clip_metrics, "warp_error", lambda video, flow: 1.0 - float(flow.speed().mean() > 0))  # best where something moves
    with pytest.raises(SystemExit) as stop:
        run(clips)
    assert stop.value.code == 3
    assert "motion warp: frozen 1 should be below turned" in capsys.readouterr().err
    assert (clips / "out/scores.json").is_file()


def test_classes_of_paths() -> None:
    names = {"pan": 5.0, "tilt": -5.0, "zoom": -5.0, "dolly": -5.0, "horizontal": -5.0, "roll": 5.0}
    found = {name: clip_metrics.vbench_class(axes_trajectory({name: value}, 9, 64, 96)) for name, value in names.items()}
    assert found == {
        "pan": "pan_right",
        "tilt": "tilt_down",
        "zoom": "zoom_in",
        "dolly": "zoom_out",
        "horizontal": "pan_left",
        "roll": None,
    }
    assert clip_metrics.vbench_class(axes_trajectory({}, 9, 64, 96)) == "static"
    assert clip_metrics.vbench_class(axes_trajectory({"pan": 5.0, "tilt": 5.0}, 9, 64, 96)) is None


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "no suite was given"),
        (["videos", "nowhere", "--out", "x"], "nowhere is not a folder"),
        (["videos", ".", "--out", "x"], "holds no videos"),
        (["videos", ".", "--out", "x", "--seams", "41:"], "--seams 41:"),
        (["videos", ".", "--out", "x", "--n", "0"], "--n 0"),
        (["videos", ".", "--out", "x", "--seams", "9,5"], "--seams 9,5"),
        (["features", ".", "--out", "x", "--with", "dino=x", "--reference", "."], "--reference is for fvd, jedi, fid, lpips and clipscore"),
        (["features", ".", "--out", "x", "--with", "dino=x", "--prompts", "."], "--prompts is for clipscore"),
        (["features", ".", "--out", "x", "--with", "dino=x", "--with", "dino=y"], "--with dino is given twice"),
        (["features", ".", "--out", "x", "--with", "dino=x", "--stride", "100000000000000000000"], "--stride 100000000000000000000"),
        (["features", ".", "--out", "x", "--with", "fvd=.", "--reference", "."], ". is a folder: give i3d_torchscript.pt"),
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


def test_a_film_too_long_to_be_measured_is_named(clips: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Its pixels would take more than the limit: it is not read, and nothing was measured, so that the run has failed."""
    monkeypatch.setattr(program, "MOST_GIB", 1e-6)
    with pytest.raises(SystemExit) as stop:
        main(["videos", str(clips / "made"), "--out", str(clips / "long")])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "more than the 1e-06 that are held at once" in error
    assert error.splitlines()[-1].startswith("error: no video could be measured in motion")
    assert (clips / "long" / "scores.md").is_file()


def test_scores_of_other_options_are_kept(clips: Path, capsys: pytest.CaptureFixture) -> None:
    kept = clips / "kept" / "scores.json"
    kept.parent.mkdir()
    kept.write_text('{"suite": "videos", "options": {"folder": "others/"}}')
    with pytest.raises(SystemExit) as stop:
        main(["videos", str(clips / "made"), "--out", str(kept.parent)])
    assert stop.value.code == 2 and "holds the scores of another run" in capsys.readouterr().err and "others/" in kept.read_text()
