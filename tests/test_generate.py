"""`kling-sample` with a tiny random model: from command line to file and back through --replay, and every mistake in one line."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from kling_programs.sample import generate
from PIL import Image
from safetensors.torch import load_file

from kling import AutoencoderKLKling, ByteTextEncoder, KlingFlowScheduler, KlingPipeline, KlingTransformer3DModel
from kling.cameras.axes import axes_trajectory
from kling.cameras.files import save_trajectory
from kling.data.video import WRITABLE, probe, write_video
from kling.sampling.plan import TASK_TITLES
from kling.sampling.record import find_record, record_path

QUICK = ("--num-frames", "5", "--aspect", "1:1")
load = functools.cache(generate.load_pipeline)


def save_tiny(folder: Path, capabilities: list[str]) -> None:
    torch.manual_seed(0)
    heads = {"num_attention_heads": 1, "attention_head_dim": 32, "freq_dim": 32, "ffn_dim": 32, "num_layers": 1}
    dit = KlingTransformer3DModel(
        **heads, in_channels=4, out_channels=4, text_dim=32, num_kinds=8, camera_channels=24, camera_fold="pool", camera_downscale=1
    )
    for parameter in dit.parameters():  # else the velocity is 0, whatever is given
        torch.nn.init.normal_(parameter, std=0.1)
    KlingPipeline(
        AutoencoderKLKling(base_dim=4, decoder_base_dim=4, z_dim=4, dim_mult=(1, 1, 1, 1), num_res_blocks=1),
        dit,
        ByteTextEncoder(byte_dim=32, byte_layers=1, out_dim=32, token_layers=1, max_bytes=63),
        KlingFlowScheduler(num_inference_steps=2),
        capabilities,
        max_frames=41,
    ).save_pretrained(folder)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_tiny(folder / "able", [*TASK_TITLES, "camera"])
    save_tiny(folder / "unable", ["text", "continuation"])
    return folder


@pytest.fixture
def run(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """run(*argv) -> (exit code, stdout lines, stderr), in an empty folder, with the model of all tasks by default."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(generate, "load_pipeline", load)

    def run(*argv: str) -> tuple[int, list[str], str]:
        code = 0
        try:
            generate.main([*argv, *(() if {"--model", "--replay"} & set(argv) else ("--model", str(models / "able")))])
        except SystemExit as stop:
            code = stop.code
        text = capsys.readouterr()
        return code, text.out.splitlines(), text.err

    return run


@pytest.mark.parametrize("option", ["--camera", "--model", "--image", "--output", "--solver", "--size", "--lora", "--device"])
def test_an_option_that_a_shell_left_empty_is_refused(run, option) -> None:
    """--camera "$CAM" without a CAM would be no camera, --model "$MODEL" the shipped one."""
    code, _, error = run("ball", *QUICK, option, "")
    assert (code, error.count("\n")) == (2, 1) and (f"{option} is empty" in error)


@pytest.mark.parametrize(
    "words",
    ["--fps 1e-9", "--lora pipe.safetensors", "--transformer pipe.safetensors", "--lora none.safetensors", "--shift 0", "--tiles 7",
     "--context-parallel 0", "--cache first-block=nan", "--cache calibrate=precious.json", "--cache calibrate=a.txt/b.json"],
)  # fmt: skip
def test_what_cannot_work_is_said_before_anything_is_made_in_a_dry_run_too(run, words: str) -> None:
    os.mkfifo("pipe.safetensors")
    Path("precious.json").write_text("1")
    Path("a.txt").write_text("1")
    for dry in ((), ("--dry-run",)):
        code, out, error = run("ball", *QUICK, *words.split(), *dry)
        assert code == 2 and error.splitlines()[-1].startswith("error: ") and not out and not Path("out").exists()
    assert Path("precious.json").read_text() == "1"


BENT = {
    "a list": [], "deep": "[" * 100_000, "threads": {"machine": {"threads": -1}}, "threads in words": {"machine": {"threads": "two"}},
    "a model's path": {"model": {"path": ["m"]}}, "hashes": {"frames": {"each": 3}}, "format": {"output": {"format": "zip"}},
    "rate": {"output": {"fps": "fast"}}, "keyframes": {"request": {"keyframes": "mid.png"}}, "prompt": {"request": {"prompt": 3}},
    "dtype": {"machine": {"dtype": ["bf16"]}}, "inputs": {"inputs": {"nowhere.png": "0"}},
}  # fmt: skip


def test_a_record_that_somebody_bent_is_refused_in_one_line(run) -> None:
    """Before anything is made: a video whose record cannot be compared at the end is lost work."""
    assert run("ball", *QUICK, "--seed", "1", "--output", "a.mp4")[0] == 0
    whole = json.loads(Path("a.mp4.json").read_text())
    for name, change in BENT.items():
        text = change if isinstance(change, str) else json.dumps(change)
        if isinstance(change, dict):
            text = json.dumps(whole | {part: whole[part] | fields for part, fields in change.items()})
        Path("bent.json").write_text(text)
        code, out, error = run("--replay", "bent.json")
        assert (code, error.count("\n")) == (2, 1) and not list(Path().glob("bent-*")), (name, error)


def test_no_other_way_to_write_a_path_destroys_an_input(run) -> None:
    """By .., by a link, and weights beside the output's latents."""
    Path("sub").mkdir()
    write_video("in.mp4", np.zeros((9, 40, 40, 3), np.uint8), 8)
    Path("link").symlink_to(".")
    Path("b.safetensors").write_bytes(b"a LoRA of somebody's")
    for words in (("sub/../in.mp4",), ("link/in.mp4",), ("b.mp4", "--lora", "b.safetensors", "--save-latents")):
        before = {path: path.read_bytes() for path in (Path("in.mp4"), Path("b.safetensors"))}
        code, _, error = run("ball", "--video", "in.mp4", *QUICK[:2], "--overwrite", "--output", *words)
        assert code == 2 and "is an input and would be overwritten" in error
        assert before == {path: path.read_bytes() for path in before}


def sha(path: str | Path) -> str:
    return json.loads(Path(path).read_text())["frames"]["sha256"]


def picture(path: str, H: int = 40, W: int = 60) -> str:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (H, W, 3), dtype=np.uint8)).save(path)
    return path


def test_prompt_to_video(run, tmp_path: Path) -> None:
    code, lines, _ = run("a red ball, rolling!", *QUICK, "--seed", "7", "--camera", "pan=5")
    assert code == 0
    assert lines[0] == "task: text to video, camera pan=5 · 5 frames 80x80 at 8 fps · 2 steps · seed 7"
    path = Path("out/a-red-ball-rolling-7.mp4")
    assert lines[1].startswith(f"{path} · seed 7 · ") and lines[1].endswith("out/a-red-ball-rolling-7.mp4.json")
    info = probe(path)
    assert (info.frames, info.width, info.height, info.fps) == (5, 80, 80, 8)
    assert sorted(p.name for p in path.parent.iterdir()) == [path.name, f"{path.name}.json"]
    record = json.loads(record_path(path).read_text())
    assert record["request"]["seed"] == 7 and record["settings"]["num_inference_steps"] == 2 and len(record["model"]["sha256"]) == 8


def test_replay_is_identical_from_any_folder(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture("a.png"), picture("mid.png", 60, 40)
    save_trajectory("path.json", axes_trajectory({"dolly": 5}, 9, 64, 112))
    given = ("--image", "a.png", "--keyframe", "mid.png@3:0.5", "--camera", "path.json", "--mode", "pro")
    assert run("ball", *QUICK, *given, "--output", "x.mp4")[0] == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    code, lines, _ = run("--replay", "../x.mp4.json")
    assert code == 0 and lines[-1].startswith("identical to ../x.mp4.json: 5 frames")
    assert (tmp_path / "x-replay.mp4").read_bytes() == (tmp_path / "x.mp4").read_bytes()


def test_a_seed_is_the_same_video_alone_and_among_others(run) -> None:
    run("ball", *QUICK, "--seed", "3", "--num-videos", "2", "--output", "many.mp4")
    run("ball", *QUICK, "--seed", "4", "--output", "one.mp4")
    assert sha("many-4.mp4.json") == sha("one.mp4.json") != sha("many-3.mp4.json")
    assert run("--replay", "many-4.mp4.json")[1][-1].startswith("identical")


def test_replay_refuses_changed_inputs_and_reports_differences(run, models: Path, tmp_path: Path) -> None:
    run("ball", *QUICK, "--image", picture("a.png"), "--output", "x.mp4")

    code, _, error = run("--replay", "x.mp4.json", "--model", str(models / "unable"))
    assert code == 2 and "model_index.json" in error
    code, _, error = run("--replay", "x.mp4.json", "--output", "x.mp4", "--overwrite")
    assert code == 2 and "would be overwritten" in error
    code, _, error = run("--replay", "x.mp4.json", "--seed", "1")
    assert code == 2 and "leave out --seed" in error

    record = json.loads(Path("x.mp4.json").read_text())
    frames = record["frames"]["each"].split()
    record["frames"] |= {"sha256": "0", "each": " ".join([*frames[:2], "00000000", *frames[3:]])}
    Path("y.json").write_text(json.dumps(record | {"machine": record["machine"] | {"torch": "1.0"}}))
    code, lines, _ = run("--replay", "y.json")
    assert code == 1 and "1 of 5 frames, the first is 2 (torch 1.0 ->" in lines[-1]

    picture("a.png", 50, 50)
    code, _, error = run("--replay", "x.mp4.json", "--output", "again.mp4")
    assert code == 2 and str(tmp_path / "a.png") in error


def test_formats(run) -> None:
    assert run("球", *QUICK, "--seed", "1", "--format", "gif", "--fps", "4")[0] == 0
    assert probe("out/球-1.gif").fps == 4 and json.loads(Path("out/球-1.gif.json").read_text())["settings"]["fps"] == 8
    assert run("ball", *QUICK, "--seed", "1", "--format", "png-frames", "--output", "frames")[0] == 0
    assert len(list(Path("frames/ball-1").glob("frame_*.png"))) == 5 and Path("frames/ball-1.json").is_file()
    again = ("ball", *QUICK, "--seed", "1", "--format", "png-frames", "--output", "frames")
    assert "exists already" in run(*again)[2] and run(*again, "--overwrite")[0] == 0
    Path("frames/ball-1/notes.txt").touch()
    assert "holds more than frames" in run(*again, "--overwrite")[2] and len(list(Path("frames/ball-1").iterdir())) == 6
    code, lines, _ = run("ball", "--image-only", "--output", "still.png", "--save-latents")
    assert code == 0 and lines[0].startswith("task: text to image · 1 frames 112x64")
    assert Image.open("still.png").size == (112, 64) and load_file("still.safetensors")["latents"].shape == (4, 1, 8, 14)
    assert run("--replay", "still.png.json")[1][-1].startswith("identical") and Path("still-replay.png").is_file()


def test_nothing_is_overwritten_unless_told_to(run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("ball", *QUICK, "--seed", "1", "--output", "a.mp4", "--save-latents")[0] == 0
    first = {path.name: path.read_bytes() for path in Path().iterdir()}
    assert set(first) == {"a.mp4", "a.mp4.json", "a.safetensors"}
    assert run("ball", *QUICK, "--seed", "2", "--output", "a.gif")[0] == 0 and Path("a.gif.json").is_file()
    for more in ("--output a.mp4", "--output a.gif", "--output a.mov --save-latents"):  # the last one has its latents there already
        code, _, error = run("ball", *QUICK, "--seed", "3", *more.split())
        assert code == 2 and "exists already: choose another --output or seed, or add --overwrite" in error
        assert {name: Path(name).read_bytes() for name in first} == first
    monkeypatch.setattr(generate, "load_pipeline", lambda *args: pytest.fail("refused before the model is loaded"))
    assert "a.mp4 exists already" in run("ball", *QUICK, "--output", "a.mp4")[2]
    monkeypatch.setattr(generate, "load_pipeline", load)
    Path("b.mp4.json").touch()  # a record alone is worth as much
    assert "b.mp4.json exists already" in run("ball", *QUICK, "--output", "b.mp4")[2]
    assert run("ball", *QUICK, "--seed", "3", "--output", "a.mp4", "--overwrite")[0] == 0
    assert sha("a.mp4.json") != json.loads(first["a.mp4.json"])["frames"]["sha256"]


def test_records_under_their_earlier_names_are_found_and_replayed(run) -> None:
    """`a.json` was the record of both `a.mp4` and `a.gif`; the later file overwrote it."""
    run("ball", *QUICK, "--seed", "1", "--output", "a.mp4")
    Path("a.mp4.json").rename("a.json")
    Path("a.gif").touch(), Path("b.mp4").touch()
    Path("b.json").write_text('{"caption": "not a record"}')
    found = {name: find_record(Path(name)) for name in ("a.mp4", "a.gif", "b.mp4", "absent.mp4")}
    assert found == {"a.mp4": Path("a.json"), "a.gif": None, "b.mp4": None, "absent.mp4": None}
    code, lines, _ = run("--replay", "a.json")
    assert code == 0 and lines[-1].startswith("identical to a.json") and Path("a-replay.mp4.json").is_file()


def test_every_task_is_recognised(run) -> None:
    write_video("in.mp4", np.full((9, 64, 112, 3), 99, np.uint8), 8)
    picture("a.png", 64, 112), picture("b.png", 50, 50), picture("mask.png", 64, 112)
    for given, task in {
        "--image a.png": "image to video",
        "--last-image a.png": "last frame to video",
        "--image a.png --last-image b.png": "first + last frame to video",
        "--keyframe a.png@3": "keyframes to video",
        "--loop": "first + last frame to video, loop",
        "--video in.mp4": "continuation of a video",
        "--video in.mp4 --strength 0.5": "restyling of a video",
        "--video in.mp4 --mask mask.png": "filling of a video",
        "--video in.mp4 --outpaint 1:1": "filling of a video",
    }.items():
        code, lines, error = run("ball", "--dry-run", "--num-frames", "9", *given.split())
        assert code == 0 and lines[0].startswith(f"task: {task} · "), (given, lines, error)
    assert "41 frames 80x80" in run("ball", "--dry-run", "--last-image", "b.png")[1][0]  # 5 s, and the picture's aspect
    assert "81 frames" in run("ball", "--dry-run", "--extend-to", "10")[1][0]
    assert not Path("out").exists()


def test_a_random_seed_is_printed(run) -> None:
    seeds = {run("ball", "--dry-run")[1][0].rsplit("seed ", 1)[1] for _ in range(2)}
    assert len(seeds) == 2
    assert run("ball", "--dry-run", "--num-videos", "3", "--seed", "5")[1][0].endswith("seeds 5 to 7")


BAD = {
    "": "prompt",
    "ball --num-frames 6": "use 5 or 9",
    "ball --num-frames many": "--num-frames",
    "ball --image-only --duration 5": "leave out --duration",
    "ball --image-only --extend-to 5": "leave out --extend-to",
    "ball --image-only --video in.mp4": "1 frame adds nothing",
    "ball --aspect 16x9": "did you mean '16:9'",
    "ball --camera spin": "unknown camera move",
    "ball --camera spin=5": "unknown camera axis",
    "ball --camera pan=11": "outside [-10, 10]",
    "ball --camera text.mp4": "text.mp4, frame 0",
    "ball --camera-scale nan": "camera_scale",
    "ball --model nowhere": "nowhere",
    "ball --model half": "half is incomplete",
    "ball --device tpu9": "tpu9",
    "ball --mode prp": "did you mean 'pro'",
    "ball --image text.png": "text.png",
    "ball --image absent.png": "absent.png does not exist",
    "ball --image .": "folder",
    "ball --image in.mp4": "give it as a video",
    "ball --video empty.mp4": "empty",
    "ball --video text.mp4": "text.mp4 is not a video",
    "ball --video a.png": "is not a video",
    "ball --video in.mp4 --image a.png": "leave image out",
    "ball --video in.mp4 --mask absent.png": "absent.png does not exist",
    "ball --video in.mp4 --extend-to 0.5": "adds nothing",
    "ball --mask a.png": "without a video",
    "ball --strength 0.5": "without a video",
    "ball --loop --last-image a.png": "loop",
    "ball --keyframe a.png": "FILE@FRAME",
    "ball --keyframe a.png@99": "keyframe at frame 99",
    "ball --keyframe a.png@3:7": "strength 7",
    "ball --keyframe a.png@3:1.2.3": "FRAME:STRENGTH",
    "ball --seed -1": "seed",
    "ball --seed 4294967296": "seed",
    "ball --duration 0": "duration",
    "ball --num-videos 0": "num_videos",
    "ball --fps 0": "fps",
    "ball --fps nan": "fps",
    "ball --format avi": "unknown format",
    "ball --output x.avi": ".mp4",
    "ball --output x.png": ".mp4",
    "ball --output x.mp4 --image-only": ".png",
    "ball --output x.gif --format png-frames": "folder",
    "ball --output text.mp4/x.mp4": "text.mp4",
    "ball --output /proc/x.mp4": "/proc/x.mp4",
    "ball --output in.mp4 --video in.mp4": "would be overwritten",
    f"ball --output {'x' * 300}.mp4": "cannot be written",
    "ball --lastimage a.png": "did you mean '--last-image'",
    "ball rolls": "quotes",
    "--replay absent.json": "absent.json",
    "--replay text.mp4": "not the JSON",
    "ball --replay text.mp4": "leave out the prompt",
    "--replay text.mp4 --num-frames 5": "leave out --num-frames",
    "--replay text.mp4 --keyframe a.png@0": "leave out --keyframe\n",
    "--replay text.mp4 --reference a.png": "leave out --reference\n",
}


@pytest.mark.parametrize("line", BAD)
def test_bad_input(run, models: Path, tmp_path: Path, line: str) -> None:
    picture("a.png")
    write_video("in.mp4", np.full((9, 64, 112, 3), 99, np.uint8), 8)
    Path("text.png").write_text("no picture")
    Path("text.mp4").write_text("no video")
    Path("empty.mp4").touch()
    shutil.copytree(models / "able", "half", ignore=shutil.ignore_patterns("vae"))
    before = sorted(tmp_path.rglob("*"))
    code, lines, error = run(*line.split())
    assert code == 2 and lines == [], (lines, error)
    assert error.startswith("error: ") and error.count("\n") == 1 and BAD[line] in error
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("given", ["--image a.png", "--camera pan=5", "--image-only", "--video in.mp4 --strength 0.5"])
def test_model_refuses_what_it_was_not_trained_for(run, models: Path, given: str) -> None:
    picture("a.png")
    write_video("in.mp4", np.full((9, 64, 112, 3), 99, np.uint8), 8)
    code, _, error = run("ball", "--model", str(models / "unable"), *given.split())
    assert code == 2 and "not trained for" in error and not Path("out").exists()


def test_the_time_is_counted_from_the_start(run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time waited, and the part of it before sampling; the second video is not charged for that. On a clock of the test's own."""
    now = [0.0]

    def taking(seconds: float, do: Callable) -> Callable:
        def slowly(*args: object, **kwargs: object) -> object:
            now[0] += seconds
            return do(*args, **kwargs)

        return slowly

    monkeypatch.setattr(generate, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    for name, seconds, do in (
        ("asked_request", 0.3, generate.asked_request),
        ("load_pipeline", 0.5, load),
        ("sample", 2.0, generate.sample),
    ):
        monkeypatch.setattr(generate, name, taking(seconds, do))
    _, lines, _ = run("ball", *QUICK, "--seed", "1", "--num-videos", "2", "--output", "a.mp4")
    found = [re.search(r"· ([\d.]+) s(?: \(([\d.]+) s to load\))? ·", line).groups() for line in lines[-2:]]
    assert found == [("2.8", "0.8"), ("2.0", None)]


def test_a_continuation_uses_the_prompt_of_its_source(run) -> None:
    """Unless another prompt is given, or the video is edited instead of continued. Videos from other tools have no prompt."""
    run("a red ball", *QUICK, "--seed", "1", "--output", "a.mp4")
    write_video("in.mp4", np.full((5, 80, 80, 3), 99, np.uint8), 8)
    Path("in.mp4.json").write_text('{"caption": "somebody else\'s"}')
    for k, (words, prompt) in enumerate(
        {
            "--video a.mp4": "a red ball",
            "it --video a.mp4": "it",
            "--video a.mp4 --strength 0.5": "",
            "--video in.mp4": "",
        }.items()
    ):
        code, _, said = run(*words.split(), "--num-frames", "5", "--seed", "1", "--output", f"{k}.mp4")
        assert code == 0 and json.loads(Path(f"{k}.mp4.json").read_text())["request"]["prompt"] == prompt
        assert ("a red ball" in said) == (k == 0)
    Path("a.mp4.json").rename("a.json")
    assert generate.prompt_of(Path("a.mp4")) == "a red ball"


def test_unused_parts_of_a_long_video_are_reported(run) -> None:
    write_video("in.mp4", np.full((50, 64, 112, 3), 99, np.uint8), 8)
    lines = run("ball", "--video", "in.mp4", "--strength", "0.5", "--dry-run")[1]
    assert lines[1].startswith("note: strength changes the first 41 of the video's 50 frames")


def test_every_listed_format_can_be_written() -> None:
    assert generate.FORMATS["mp4"] == tuple(WRITABLE)


def test_slug() -> None:
    assert generate.slug("一只红色的球, rolls!") == "一只红色的球-rolls"
    assert generate.slug("../..") == "video" and len(generate.slug("word " * 99)) <= 40
