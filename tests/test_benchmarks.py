"""Published benchmarks: scores computed by hand, file names in their format; votes and reports."""

from __future__ import annotations

import csv
import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kling_programs.eval import side_by_side
from kling_programs.eval.benchmark import read_results
from kling_programs.eval.evaluate import main
from kling_programs.eval.report import plot, table
from kling_programs.eval.side_by_side import Votes, arrangement, chosen, win_rate

from kling.data.image import read_image, write_png
from kling.data.transforms import fit
from kling.data.video import probe, write_gif, write_video
from kling.errors import UserError
from kling.metrics.benchmarks import BOARDS, VIEWS, Job, board_scores, physics_iq, physics_iq_jobs, vbench_jobs
from kling.metrics.worldscore import camera_data, worldscore, worldscore_instances
from kling.runtime.precision import Speeds
from kling.sampling.pipeline import KlingPipeline

# ------------------------------------------------------------------------------------------------------------------- weighting


def test_vbench_by_hand() -> None:
    raw = {"subject_consistency": 0.95, "background_consistency": 0.96, "temporal_flickering": 0.98, "motion_smoothness": 0.97}
    raw |= {"dynamic_degree": 0.6, "aesthetic_quality": 0.62, "imaging_quality": 0.65, "object_class": 0.9, "multiple_objects": 0.7}
    raw |= {"human_action": 0.94, "color": 0.88, "spatial_relationship": 0.75, "scene": 0.5, "appearance_style": 0.24}
    raw |= {"temporal_style": 0.25, "overall_consistency": 0.27}
    scores = board_scores(BOARDS["vbench"], raw)
    # quality: .9414383 .9458362 .9460480 .9056604 .62 .65 and half of .6, over 6.5
    assert scores["quality"] == pytest.approx((0.9414383 + 0.9458362 + 0.9460480 + 0.9056604 + 0.62 + 0.65 + 0.3) / 6.5, abs=1e-6)
    # semantic: .9 .7 .94 .88 .75 .6081245 .8401265 .6868132 .7417582, over 9
    assert scores["semantic"] == pytest.approx(7.0468224 / 9, abs=1e-6)
    assert scores["total"] == pytest.approx((4 * 0.8167666 + 0.7829803) / 5, abs=1e-6)
    with pytest.raises(UserError, match="'colour' is no dimension"):
        board_scores(BOARDS["vbench"], {"colour": 1.0})


def test_vbench_i2v_and_2_by_hand() -> None:
    i2v = dict.fromkeys(BOARDS["vbench-i2v"].dimensions, 1.0) | {"camera_motion": 0.3, "motion_smoothness": 0.9975, "dynamic_degree": 0.0}
    scores = board_scores(BOARDS["vbench-i2v"], i2v)
    assert scores["i2v"] == pytest.approx((0.03 + 2) / 2.1) and scores["quality"] == pytest.approx(5 / 5.5)
    assert scores["total"] == pytest.approx((2.03 / 2.1 + 5 / 5.5) / 2)
    two = board_scores(BOARDS["vbench-2.0"], {"Diversity": 0.5, "Composition": 0.7, "Material": 0.4})
    assert two["creativity"] == pytest.approx(0.6) and two["physics"] == pytest.approx(0.1) and two["total"] == pytest.approx(0.14)
    assert (
        len(BOARDS["vbench-2.0"].dimensions) == 18 and len(BOARDS["vbench"].dimensions) == 16 and len(BOARDS["vbench-i2v"].dimensions) == 9
    )


def test_physics_iq_by_hand(tmp_path: Path) -> None:
    row = {}
    for view in VIEWS:
        row |= {f"v1_mse_{view}": [0.02, 0.04], f"variance_mse_{view}": [0.01, 0.01]}
        row |= {f"spatiotemporal_iou_v1_{view}": [0.1, 0.3], f"variance_spatiotemporal_iou_{view}": [0.4, 0.4]}
        row |= {f"spatial_iou_v1_{view}": 0.3, f"variance_spatial_{view}": 0.5}
        row |= {f"weighted_spatial_iou_v1_{view}": 0.1, f"variance_weighted_spatial_{view}": 0.4}
    # (.2/.4 + .3/.5 + .1/.4) / 3 - (.03 - .01)
    assert physics_iq([row])["total"] == pytest.approx(43.0)
    with (tmp_path / "model.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["scenario", *row])
        writer.writeheader()
        writer.writerow({"scenario": "0001", **row})
    main(["benchmark", "import", "physics-iq", "--results", str(tmp_path / "model.csv"), "--out", str(tmp_path / "out")])
    assert json.loads((tmp_path / "out/scores.json").read_text())["scores"]["physics-iq"]["total"]["value"] == pytest.approx(43.0)


STATIC = ("camera_control", "object_control", "content_alignment", "3d_consistency", "photometric_consistency", "style_consistency")


def test_worldscore_by_hand() -> None:
    aspects = dict.fromkeys(STATIC, 50.0) | {"subjective_quality": 85.0}
    assert worldscore(aspects) == {"static": 55, "dynamic": 38.5}
    assert worldscore(aspects | dict.fromkeys(("motion_accuracy", "motion_magnitude", "motion_smoothness"), 55.0))["dynamic"] == 55
    with pytest.raises(UserError, match="subjective_quality is missing"):
        worldscore(dict.fromkeys(STATIC, 50.0))
    with pytest.raises(UserError, match="between 0 and 100"):
        worldscore(aspects | {"camera_control": 101.0})


def test_worldscore_results_are_read(tmp_path: Path) -> None:
    """As `run_evaluate.py` of the benchmark: two static instances, one dynamic; metrics average before they are rounded."""

    def put(folder: str, **aspects: dict[str, float]) -> None:
        (tmp_path / folder).mkdir(parents=True)
        scores = {aspect: {metric: {"score": 9.0, "score_normalized": x} for metric, x in m.items()} for aspect, m in aspects.items()}
        (tmp_path / folder / "evaluation.json").write_text(json.dumps(scores | {"content_alignment": {"clip_score": {}}}))

    put(
        "static/photorealistic/indoor/rooms/a",
        camera_control={"camera_error": 0.2},
        subjective_quality={"clip_iqa+": 0.1, "clip_aesthetic": 0.5},
    )
    put(
        "static/photorealistic/indoor/rooms/b",
        camera_control={"camera_error": 0.4},
        subjective_quality={"clip_iqa+": 0.3, "clip_aesthetic": 0.5},
    )
    put("dynamic/stylized/fluids/c", motion_accuracy={"motion_accuracy": 0.6}, camera_control={"camera_error": 1.0})
    scores = read_results("worldscore", tmp_path)
    assert scores["camera_control"] == 30 and scores["subjective_quality"] == 35 and scores["motion_accuracy"] == 60
    assert scores["static"] == round((30 + 35) / 7, 2) and scores["dynamic"] == round((30 + 35 + 60) / 10, 2)

    written = {name: value for name, value in scores.items() if name not in ("static", "dynamic")}
    (tmp_path / "worldscore.json").write_text(json.dumps(written | {"WorldScore-Static": 9.29, "WorldScore-Dynamic": 12.5}))
    assert read_results("worldscore", tmp_path / "worldscore.json") == scores
    (tmp_path / "worldscore.json").write_text(json.dumps(written | {"WorldScore-Static": 9.4}))
    with pytest.raises(UserError, match="is 9.4, its aspects give 9.29"):
        read_results("worldscore", tmp_path / "worldscore.json")


# ----------------------------------------------------------------------------------------------------------- names, and checks


def test_jobs_have_the_file_names_of_the_benchmark() -> None:
    info = [{"prompt_en": "a cat", "dimension": ["color"]}, {"prompt_en": "a cat", "dimension": ["temporal_flickering"]}]
    assert [job.file for job in vbench_jobs("vbench", info)] == [f"a cat-{i}.mp4" for i in range(25)]
    i2v = [{"prompt_en": "a sea", "dimension": ["i2v_background"], "image_name": "a sea.jpg"}]
    i2v += [{"prompt_en": "a sea, camera pans left", "dimension": ["camera_motion"]}]
    jobs = vbench_jobs("vbench-i2v", i2v)
    assert len(jobs) == 10 and {job.image for job in jobs} == {"a sea.jpg"} and jobs[-1].file == "a sea, camera pans left-4.mp4"
    long = vbench_jobs("vbench-2.0", [{"prompt_en": "x" * 200, "dimension": ["Material"]}, {"prompt_en": "y", "dimension": ["Diversity"]}])
    assert long[2].file == "x" * 180 + "-2.mp4" and len(long) == 23
    row = {"description": "It falls.", "generated_video_name": "0001_perspective-left_trimmed-ball.mp4"}
    switch = "0001_switch-frames_anyFPS_perspective-left_trimmed-ball.jpg"
    assert physics_iq_jobs([row]) == [Job(row["generated_video_name"], "It falls.", 0, switch)]


def test_check_names_missing_videos(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "info.json").write_text(json.dumps([{"prompt_en": "a cat", "dimension": ["color"]}]))
    command = ["benchmark", "check", "vbench", "--info", str(tmp_path / "info.json"), "--videos", str(tmp_path / "videos")]
    for i in range(4):
        write_video(tmp_path / "videos" / f"a cat-{i}.mp4", torch.zeros(3, 16, 16, 3, dtype=torch.uint8), 8)
    with pytest.raises(SystemExit):
        main(command)
    assert "lacks 1 of 5 videos, the first is 'a cat-4.mp4'" in capsys.readouterr().err
    write_video(tmp_path / "videos" / "a cat-4.mp4", torch.zeros(3, 16, 16, 3, dtype=torch.uint8), 8)
    main(command)
    assert "all 5 videos are there, 3 frames each" in capsys.readouterr().out


def test_import_reads_vbench_results(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    raw = dict.fromkeys(BOARDS["vbench"].dimensions, 0.5)
    for name, value in raw.items():
        (tmp_path / f"{name}_eval_results.json").write_text(json.dumps({name: [value, [{"video_path": "x", "video_results": value}]]}))
    (tmp_path / "full_info.json").write_text("[]")
    main(["benchmark", "import", "vbench", "--results", str(tmp_path), "--out", str(tmp_path / "out")])
    found = json.loads((tmp_path / "out/scores.json").read_text())["scores"]["vbench"]
    assert found["total"]["value"] == pytest.approx(board_scores(BOARDS["vbench"], raw)["total"])
    (tmp_path / "color_eval_results.json").write_text('{"color": ["much", []]}')
    with pytest.raises(SystemExit):
        main(["benchmark", "import", "vbench", "--results", str(tmp_path), "--out", str(tmp_path / "out")])
    assert "color is 'much', not a finite number" in capsys.readouterr().err
    (tmp_path / "color_eval_results.json").write_text('{"color": [NaN, []]}')
    with pytest.raises(SystemExit):
        main(["benchmark", "import", "vbench", "--results", str(tmp_path), "--out", str(tmp_path / "out")])
    assert "color is nan, not a finite number" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["grade", "vbench"], "unknown action 'grade'"),
        (["check", "vbenhc"], "did you mean 'vbench'"),
        (["import", "vbench", "--results", "x"], "import needs --out"),
        (["check", "vbench", "--info", "x", "--videos", "y", "--model", "z"], "check does not use --model"),
        (["sample", "worldscore"], "sample needs --info"),
        (["sample", "vbench", "--info", "x", "--videos", "y", "--still", "z"], "sample does not use --still"),
        (["check", "vbench", "--info", "{tmp}/list.json", "--videos", "y"], "list.json is not as expected"),
        (["check", "physics-iq", "--info", "{tmp}/latin.csv", "--videos", "y"], "latin.csv is no UTF-8 text"),
        (["import", "physics-iq", "--results", "{tmp}/rows.csv", "--out", "x"], "rows.csv is not as expected (KeyError"),
        (["import", "vbench", "--results", "{tmp}/other.json", "--out", "x"], "other.json holds no results"),
    ],
)
def test_bad_benchmark_commands(argv: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "other.json").write_text('{"speed": 1}')
    (tmp_path / "latin.csv").write_bytes(b"sc\xe9ne\n")
    (tmp_path / "rows.csv").write_text("a,b\n1,2\n")
    with pytest.raises(SystemExit) as stop:
        main(["benchmark", *(word.replace("{tmp}", str(tmp_path)) for word in argv)])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1


def test_bad_votes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in "ab":
        write_video(tmp_path / folder / "x.mp4", torch.zeros(2, 16, 16, 3, dtype=torch.uint8), 8)
    for words, message in (
        ("a a/ --votes v.sqlite", "the folder a/ is given twice"),
        ("a b --votes v.sqlite --result --port 80", "--result opens no page: leave out --port"),
        ("a b --votes v.sqlite --result", "v.sqlite does not exist"),
        ("a b --votes a/x.mp4/v.sqlite", "is a file, where a folder is needed"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["side-by-side", *words.split()])
        assert stop.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "v.sqlite").exists()
    Votes(tmp_path / "v.sqlite", "a", "b").add("me", "x", "a", "a")
    main(["side-by-side", "b", "a", "--votes", "v.sqlite", "--result"])
    assert "no votes yet on b against a; there are votes on a against b" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------------ WorldScore


def ways(path: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For Blender poses (n, 4, 4): the positions, the viewing directions, and the directions to the right."""
    return path[:, :3, 3], -path[:, :3, 2], path[:, :3, 0]


def test_worldscore_cameras_follow_the_named_moves() -> None:
    def moved(*moves: str, frames: int = 5) -> tuple[torch.Tensor, ...]:
        data = camera_data(moves, frames)
        path = torch.tensor(data["cameras_interp"])
        assert len(path) == len(moves) * (frames - 1) + 1 and len(data["cameras"]) == len(moves) + 1
        assert torch.allclose(path[:: frames - 1], torch.tensor(data["cameras"]), atol=1e-6)
        assert torch.allclose(torch.linalg.det(path), torch.ones(len(path)), atol=1e-6)
        return ways(path)

    at, ahead, right = moved("push_in")
    assert torch.allclose(at[-1], ahead[0], atol=1e-6) and torch.allclose(at[2], at[-1] / 2) and torch.equal(ahead[0], ahead[-1])
    at, ahead, right = moved("pull_out")
    assert torch.allclose(at[-1], -ahead[0], atol=1e-6)
    for side, sign in (("left", -1.0), ("right", 1.0)):
        at, ahead, right = moved(f"move_{side}")
        assert torch.allclose(at[-1], 0.5 * sign * right[0], atol=1e-6)
        at, ahead, right = moved(f"pan_{side}")
        assert at.abs().max() == 0 and float(ahead[-1] @ right[0]) == pytest.approx(0.5 * sign)  # 30 degrees
        assert float(ahead[2] @ ahead[0]) == pytest.approx(0.9659258)  # half of it halfway
        at, ahead, right = moved(f"orbit_{side}")
        assert torch.allclose(at[-1] + ahead[-1], ahead[0], atol=1e-6), "it looks at the point that it goes round"
        assert float(at[-1] @ right[0]) == pytest.approx(0.5 * sign)


def test_worldscore_moves_are_chained() -> None:
    """Against 4 x 4 matrices multiplied one after another, each move in the camera's axes at that moment."""
    moves = ("pan_left", "push_in", "orbit_right", "move_left")
    keys = torch.tensor(camera_data(moves, 9)["cameras"], dtype=torch.float64)
    pose = keys[0]
    for i, move in enumerate(moves):
        first, then = torch.tensor(camera_data((move,), 2)["cameras"], dtype=torch.float64)
        pose = pose @ torch.linalg.inv(first) @ then
        assert torch.allclose(pose, keys[i + 1], atol=1e-9)


CARD = torch.device("cuda", 0)


def stand_in(answer: Any, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """`answer` is the shipped model on a machine with a GPU. Returns what is asked of it: a precision, then a device."""
    asked: list[Any] = []

    def opened(folder: Path, torch_dtype: torch.dtype | None = None) -> Any:
        asked.append(torch_dtype)
        answer.transformer = SimpleNamespace(dtype=torch_dtype)
        return answer

    answer.config = SimpleNamespace(fps=8)
    answer.to = lambda device: asked.append(device) or answer
    monkeypatch.setattr(KlingPipeline, "from_pretrained", opened)
    monkeypatch.setattr("kling.sampling.machine.pick_device", lambda name: CARD)
    monkeypatch.setattr("kling.hub.load.bf16_is_fast", lambda device_type: device_type == "cuda")
    monkeypatch.setattr("kling.runtime.precision.speeds", lambda device_type: Speeds(1e12, 9e12))
    return asked


def test_videos_of_a_benchmark_are_made_on_the_gpu_in_the_precision_of_kling_sample(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(prompt: str, image: object, seed: int) -> SimpleNamespace:
        return SimpleNamespace(frames=torch.zeros(1, 5, 16, 16, 3, dtype=torch.uint8).numpy())

    placed = stand_in(answer, monkeypatch)
    (tmp_path / "info.json").write_text(json.dumps([{"prompt_en": "a cat", "dimension": ["subject_consistency"]}]))
    main(["benchmark", "sample", "vbench", "--info", str(tmp_path / "info.json"), "--videos", str(tmp_path / "videos")])
    said = capsys.readouterr()
    assert placed == [torch.bfloat16, CARD] and said.err.startswith("precision bf16 (9000 against 1000 GFLOP/s)")
    assert "vbench: all 5 videos are there" in said.out


def test_worldscore_folders_have_the_layout_of_its_evaluator(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A static scene with two moves and a dynamic one, with a pipeline that adds to its picture: each clip continues the previous one."""
    common = {"visual_style": "stylized", "style": "Oil painting"}
    still = common | {"visual_movement": "static", "scene_type": "indoor", "image": "static/stylized/indoor/rooms/007.png"}
    still |= {"camera_path": ["pan_left", "push_in"], "prompt_list": ["A room.", "A hall.", "A stair"], "content_list": [["bed"], [], []]}
    moving = common | {"visual_movement": "dynamic", "motion_type": "fluids", "image": "dynamic/fluids/003.png", "objects": ["sea"]}
    moving |= {"camera_path": ["fixed"], "prompt": "The sea.", "masks": []}
    for entry in (still, moving):
        write_png(tmp_path / "set" / entry["image"], torch.full((20, 40, 3), 10, dtype=torch.uint8))
    (tmp_path / "set/list.json").write_text(json.dumps([still, moving]))
    worlds = worldscore_instances([still, moving], "Nothing moves.")
    assert worlds[0].prompts == (
        "Camera pan left. A hall. Oil painting. Nothing moves.",
        "Camera push in. A stair. Oil painting. Nothing moves.",
    )
    assert worlds[1].prompts == ("Camera fixed. The sea. Oil painting",) and worlds[1].folder == "dynamic/stylized/fluids/003"

    asked = []

    def answer(prompt: str, image: object, seed: int) -> SimpleNamespace:
        asked.append((prompt, seed))
        first = fit(torch.as_tensor(image), 16, 16)
        return SimpleNamespace(frames=torch.stack([first + t for t in range(5)])[None].numpy())

    placed = stand_in(answer, monkeypatch)
    out = tmp_path / "worldscore_output"
    command = ["benchmark", "sample", "worldscore", "--info", str(tmp_path / "set/list.json"), "--videos", str(out)]
    with pytest.raises(SystemExit):
        main([*command, "--images", str(tmp_path / "set")])
    assert "still worlds need --still" in capsys.readouterr().err
    command += ["--images", str(tmp_path / "set"), "--still", "Nothing moves."]
    main(command)
    said = capsys.readouterr()
    assert "all 2 worlds are there, 5 or 9 frames each" in said.out and len({seed for _, seed in asked}) == 3
    assert placed == [torch.bfloat16, CARD] and said.err.startswith("precision bf16 (")

    folder = out / "static/stylized/indoor/rooms/007"
    frames = [int(read_image(folder / "frames" / f"{t:03d}.png")[0, 0, 0]) for t in range(9)]
    assert frames == list(range(10, 19)), "the second clip goes on from the last frame of the first"
    data = json.loads((folder / "image_data.json").read_text())
    assert data == still | {"num_scenes": 2, "total_frames": 9, "anchor_frame_idx": [0, 4, 8]}
    assert len(json.loads((folder / "camera_data.json").read_text())["cameras_interp"]) == 9
    assert read_image(folder / "input_image.png").shape == (16, 16, 3) and (folder / "videos/output.mp4").is_file()
    other = out / worlds[1].folder
    assert not (other / "camera_data.json").exists() and json.loads((other / "image_data.json").read_text())["total_frames"] == 5

    main(command)
    assert len(asked) == 3, "what is there is not made again"
    (folder / "frames/004.png").unlink()
    with pytest.raises(SystemExit):
        main(["benchmark", "check", *command[2:7]])
    assert "has 8 frames and 9 cameras, and should have 9" in capsys.readouterr().err
    with pytest.raises(UserError, match="did you mean 'push_in'"):
        worldscore_instances([still | {"camera_path": ["pan_left", "push_inn"]}], "")
    with pytest.raises(UserError, match="2 camera moves for 1 scenes"):
        worldscore_instances([still | {"prompt_list": ["A room.", "A hall."]}], "")
    with pytest.raises(UserError, match="'style'.*static.json or dynamic.json"):
        worldscore_instances([{key: value for key, value in still.items() if key != "style"}], "")


# ---------------------------------------------------------------------------------------------------------------------- people


def test_votes_are_kept_and_counted(tmp_path: Path) -> None:
    votes = Votes(tmp_path / "v.sqlite", "a", "b")
    writers = [threading.Thread(target=votes.add, args=(f"voter {i}", "clip", "a" if i < 6 else "tie", "b")) for i in range(8)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert Votes(tmp_path / "v.sqlite", "a", "b").counts() == {"a": 6, "b": 0, "tie": 2}  # reopened
    assert votes.seen("voter 1") == {"clip"} and Votes(tmp_path / "v.sqlite", "a", "c").counts()["a"] == 0
    rate, low, high = win_rate({"a": 6, "b": 0, "tie": 2})
    assert rate == 0.875 and low == pytest.approx(0.5291, abs=1e-3) and high == pytest.approx(0.9776, abs=1e-3)  # Wilson, 7 of 8
    (tmp_path / "text.sqlite").write_text("not a data base, not at all, whatever its name says" * 20)
    with pytest.raises(UserError, match="cannot hold votes"):
        Votes(tmp_path / "text.sqlite", "a", "b")


def test_the_page_is_blind() -> None:
    names = [f"clip {i}" for i in range(20)]
    shown = [arrangement(f"voter {i}", names) for i in range(40)]
    assert shown[0] == arrangement("voter 0", names[::-1]) != shown[1] and {name for name, _ in shown[0]} == set(names)
    left = sum(side == "a" for voter in shown for _, side in voter)
    assert 320 < left < 480  # of 800
    assert [chosen(c, s) for c, s in (("left", "a"), ("right", "a"), ("left", "b"), ("right", "b"), ("tie", "b"))] == [
        "a",
        "b",
        "b",
        "a",
        "tie",
    ]


def test_what_is_shown_side_by_side_plays_in_browsers(tmp_path: Path) -> None:
    frames = torch.arange(5, dtype=torch.uint8)[:, None, None, None].expand(5, 15, 17, 3) * 40
    write_gif(tmp_path / "a.gif", frames, 10)
    write_video(tmp_path / "b.mp4", frames[:, :14, :16], 10)
    made = side_by_side.playable(tmp_path / "a.gif", tmp_path)
    assert made.suffix == ".mp4" and probe(made).plays_in_browsers and (probe(made).frames, probe(made).width) == (5, 16)
    assert side_by_side.playable(tmp_path / "b.mp4", tmp_path).read_bytes() == (tmp_path / "b.mp4").read_bytes()
    (tmp_path / "c.mp4").write_bytes(b"words")
    with pytest.raises(UserError, match="is not a video"):
        side_by_side.playable(tmp_path / "c.mp4", tmp_path)


@pytest.mark.slow
def test_the_page_opens_and_takes_a_vote(tmp_path: Path) -> None:
    client = pytest.importorskip("gradio_client")
    for folder in ("one", "two"):
        write_video(tmp_path / folder / "clip.mp4", torch.zeros(3, 16, 16, 3, dtype=torch.uint8), 8)
    a, b = str(tmp_path / "one"), str(tmp_path / "two")
    votes = Votes(tmp_path / "v.sqlite", a, b)
    page = side_by_side.page(side_by_side.pairs(a, b), votes)
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True)
    try:
        asked = client.Client(url, verbose=False)
        assert "1 of 1" in asked.predict(fn_index=1)[-1]
    finally:
        page.close()
    assert sum(votes.counts().values()) == 1


# ---------------------------------------------------------------------------------------------------------------------- report


def test_report_holds_tables_curves_and_failures(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for name, protocol in (("one", "p1"), ("two", "p2")):
        (tmp_path / name).mkdir()
        text = "|  | score |\n| --- | ---: |\n| PSNR <b> | **31.00 dB** |"
        report = {"suite": "videos", "protocol": protocol, "n": 3, "table": text, "failures": {"c & d": "there is no such video"}}
        (tmp_path / name / "scores.json").write_text(json.dumps(report))
    (tmp_path / "dit").mkdir()
    (tmp_path / "dit/metrics.jsonl").write_text(
        "".join(json.dumps({"step": i, "loss": 1 / (i + 1), "note": "x"}) + "\n" for i in range(1000))
    )
    main(["report", *(str(tmp_path / name) for name in ("one", "two", "dit")), "--out", str(tmp_path / "r.html")])
    page = (tmp_path / "r.html").read_text()
    assert "<b>31.00 dB</b>" in page and "PSNR &lt;b&gt;" in page and "c &amp; d: there is no such video" in page
    assert page.count("do not compare them") == 2 and "loss: " in page and "note: " not in page
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path), "--out", str(tmp_path / "r.html")])
    assert "neither scores.json nor metrics.jsonl" in capsys.readouterr().err


def test_tables_and_curves() -> None:
    assert (
        table("words\n\n| a | b |\n| --- | ---: |\n| x | 1 |")
        == "<p>words</p><table><tr><th>a</th><th>b</th></tr><tr><td>x</td><td>1</td></tr></table>"
    )
    assert "points='10.0,150.0 180.0,90.0 350.0,30.0'" in plot("loss", [(0, 0.0), (5, 1.0), (10, 2.0)])
    assert plot("loss", [(0, 1.0)]) == ""
