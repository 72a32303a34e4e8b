"""The evaluation, on a pipeline that answers with the rendered truth: the ruler's own upper bound."""

from __future__ import annotations

import dataclasses
import functools
import json
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from kling_programs.eval import cases, certify, world_folder
from kling_programs.eval import world as program
from kling_programs.eval.cases import TASKS, chosen, held_out
from kling_programs.eval.evaluate import main
from kling_programs.eval.world import Options, evaluate
from torch import Tensor

from kling.cameras.axes import axes_trajectory
from kling.cameras.trajectory import Trajectory
from kling.data.video import write_video
from kling.errors import UserError
from kling.metrics.controls import noise
from kling.metrics.motion import magnitude
from kling.metrics.ruler import Ruler
from kling.sampling.pipeline import ASSETS
from kling.sampling.request import Request

N = 2


def key(request: dict[str, Any]) -> tuple:
    given = ("image", "last_image", "video", "keyframes")
    return *(str(request.get(name)) for name in ("prompt", "seed", "camera", "num_frames", "strength", "shots")), *(
        x in request for x in given
    )


class Oracle:
    """Answers every case with its truth. Counts what it was asked."""

    config = SimpleNamespace(
        capabilities=["text", "image", "first_last", "keyframes", "restyle", "continuation", "camera", "brush", "reference", "shots"],
        max_frames=program.FRAMES,
    )
    device = torch.device("cpu")

    def __init__(self) -> None:
        world = held_out(0, program.FRAMES, max_things=1)
        asked = [task.make(world, k) for task in TASKS.values() for k in range(1 if task.few else N)]
        self.asked = {key(case.request): case for case in asked}
        self.calls, self.batches = 0, []

    def __call__(self, **request: Any) -> SimpleNamespace:
        self.calls += 1
        return SimpleNamespace(frames=cases.rendered(self.asked[key(request)].scene)[None].numpy())

    def together(self, requests: list[Request]) -> list[Tensor]:
        self.batches.append(len(requests))
        mine = [case for case in self.asked.values() if case.task in ("things-2", "image", "image-motion")]
        known = {(x.request["prompt"], x.request["seed"], "image" in x.request): x for x in mine}
        return [cases.rendered(known[x.prompt, x.seed, x.image is not None].scene) for x in requests]

    def encode(self, frames: Tensor) -> Tensor:
        return frames[None]

    def decode(self, latents: Tensor, cuts=()) -> Tensor:
        return latents


def ruler(options: Options, share: Callable[..., Any] = map) -> Ruler:
    return taught()


@functools.cache
def taught(make: Callable[[Options], Ruler] = program.make_ruler) -> Ruler:
    return make(Options("", examples=48))


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clips of 17 frames, one set of detectors and the flow of one pair of frames, so that the whole takes seconds."""
    monkeypatch.setattr(program, "make_ruler", ruler)
    monkeypatch.setattr(program, "magnitude", lambda video: magnitude(video[:2]))
    monkeypatch.setattr(cases, "GOES_ON", 8)
    for module, name, value in (
        (program, "FRAMES", 17),
        (program, "LONG", 21),
        (world_folder, "CONTROLS", 1),
        (world_folder, "PICTURES", 1),
    ):
        monkeypatch.setattr(module, name, value)


def test_the_truth_gets_full_scores_and_broken_clips_none(tmp_path: Path) -> None:
    pipe, options = Oracle(), Options(str(tmp_path / "out"), n=N)
    report = evaluate(pipe, options, {"sha256": {"a": "1"}})
    scores = report["scores"]
    for code in ("en", "zh"):
        assert all(scores[f"text-{code}"][q]["value"] == 1 for q in ("colour", "ground"))
        assert scores[f"text-{code}"]["colour"]["n"] == N
    assert scores["zh - en"]["colour"]["value"] == 0
    kept = {task: summary["whole"]["value"] for task, summary in scores.items() if task in TASKS and "whole" in summary}
    assert len(kept) == 23 and set(kept.values()) == {1}
    assert scores["shots"]["cut"]["value"] == scores["shots"]["same"]["value"] == 1
    assert all(scores[task]["near"]["value"] == 1 and scores[task]["distance"]["value"] < 0.2 for task in kept if "brush" in task)
    assert report["columns"]["frozen"]["brush"]["near"]["value"] == 0
    assert scores["plain"]["still"]["value"] == 1 and scores["words"]["class"]["value"] == 1
    assert scores["things-2"]["colour"]["value"] == 1 and scores["restyle-0.3"]["colour"]["value"] == 1
    assert all(scores[f"continuation-{words}"]["kept"]["value"] == 1 for words in ("same", "other", "none"))
    broken = report["columns"]["broken"]
    assert broken["shots"]["cut"]["value"] == broken["shots"]["same"]["value"] == report["columns"]["frozen"]["shots"]["cut"]["value"] == 0
    assert all(broken[task]["whole"]["value"] == 0 for task in kept if task in broken and "restyle" not in task)
    assert broken["plain"]["still"]["value"] == 0 and broken["words"]["class"]["value"] == 0
    assert broken["things-2"]["right"]["value"] == 0 and broken["restyle-0.7"]["colour"]["value"] == 0
    for task in ("reference", "reference-none"):
        assert all(scores[task][q]["value"] == 1 for q in ("colour", "ground")) and scores[task]["pasted"]["value"] == 0
    assert all(broken["reference"][q]["value"] == 0 for q in ("colour", "solid", "ground")) and broken["reference"]["pasted"]["value"] == 1
    assert scores["reference-2"]["colour"]["value"] == 1 and broken["reference-2"]["right"]["value"] == 0
    assert broken["continuation-none"]["ground"]["value"] == 0
    assert scores["camera"]["class"]["value"] == 1 and scores["camera"]["rotation"]["value"] < 0.6
    assert scores["image below VAE"]["first"]["value"] == 0 and scores["first_last below VAE"]["last"]["value"] == 0
    assert report["columns"]["noise"]["camera"]["rotation"] == {"value": None, "low": None, "high": None, "n": 0}, "nothing to measure"
    assert report["columns"]["noise"]["camera"]["registered"]["value"] == 0
    assert report["columns"]["frozen"]["camera"]["registered"]["value"] == 1
    assert report["reached"]["camera class"] is True
    assert "colour, Chinese" in (tmp_path / "out/scores.md").read_text() and "RotErr" in report["table"]
    assert {path.stem for path in (tmp_path / "out/strips").glob("*.png")} == set(TASKS)
    json.dumps(report, allow_nan=False)

    n = {task: max(x["n"] for x in summary.values()) for task, summary in scores.items()}
    assert n["text-en"] == n["camera"] == N and n["image"] == n["image below VAE"] == n["continuation"] == n["vae-17"] == 1
    assert report["columns"]["truth"]["text-en"]["colour"]["n"] == N and report["columns"]["noise"]["camera"]["class"]["n"] == 1
    assert pipe.calls == sum(1 if task.few else N for task in TASKS.values())


def test_tasks_beyond_a_model_are_left_out_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = Oracle()
    asked = []
    monkeypatch.setattr(Oracle, "config", SimpleNamespace(capabilities=["text", "restyle"], max_frames=13))
    monkeypatch.setattr(Oracle, "__call__", lambda self, **request: (asked.append(request), SimpleNamespace(frames=torch.zeros(1, 17, 64, 112, 3, dtype=torch.uint8)))[1])  # fmt: skip  # noqa: E501
    report = evaluate(pipe, Options(str(tmp_path / "out"), n=3, limit_minutes=1e-9), {"sha256": {}})
    assert report["n"] == 1  # the limit stops after the first round, and the report says so
    assert set(report["not_trained_for"]) == {name for name, task in TASKS.items() if task.needs != "text"}, "nor for 41 frames at once"
    assert all("camera" not in request for request in asked)
    assert report["scores"]["text-en"]["colour"]["value"] == 0  # black shows nothing


def test_selected_tasks_and_the_time_estimate(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pipe, options = Oracle(), Options(str(tmp_path / "out"), n=N, tasks=chosen("text,image"))
    report = evaluate(pipe, options, {"sha256": {"a": "1"}})
    assert set(report["scores"]) == {"text-en", "text-zh", "zh - en", "image", "image below VAE", "image-motion"}
    assert pipe.calls == (made := 3 * N + 1)
    assert "whole clips" in report["table"] and "VAE, 17" not in report["table"]
    first = capsys.readouterr().err.splitlines()[0]
    assert first.startswith("7 clips (text-en 2, text-zh 2, image 1, image-motion 2)") and first.endswith("minutes")
    with pytest.raises(UserError, match="other tasks"):
        evaluate(pipe, dataclasses.replace(options, tasks=()), {"sha256": {"a": "1"}})

    file = tmp_path / "out/cases.jsonl"
    first, second = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(second + first[:100])  # killed while it wrote the first case, which another worker had got
    again = evaluate(pipe, options, {"sha256": {"a": "1"}})
    assert pipe.calls == made, "clips that are there are not made again"
    assert again["scores"] == report["scores"] and again["columns"] == report["columns"]
    assert sorted(file.read_bytes().splitlines()) != sorted([first.strip(), second.strip()]), "measured anew: no seconds"
    assert {json.loads(line)["k"] for line in file.read_text().splitlines()} == {0, 1}
    with pytest.raises(UserError, match="other weights"):
        evaluate(pipe, options, {"sha256": {"a": "2"}})


def test_cases_in_batches_have_the_scores_of_cases_one_by_one(tmp_path: Path) -> None:
    """Every batch holds all tasks of its cases; a clip that is there is not made again; no time means one case a worker."""
    one, pipe = Options(str(tmp_path / "one"), n=N, tasks=chosen("things-2,image")), Oracle()
    want = evaluate(Oracle(), one, {"sha256": {}})
    several = dataclasses.replace(one, out=str(tmp_path / "several"), batch=2)
    found = evaluate(pipe, several, {"sha256": {}})
    assert found["scores"] == want["scores"] and found["columns"] == want["columns"]
    assert pipe.batches == [2 * len(one.tasks) - 1 - 1], "all but the clip of the estimate; image is asked once"
    short = evaluate(pipe, dataclasses.replace(several, out=str(tmp_path / "short"), limit_minutes=1e-9), {"sha256": {}})
    assert short["n"] == 1 and len(list((tmp_path / "short" / "clips").rglob("*.npz"))) == pipe.batches[-1]
    again = evaluate(pipe, dataclasses.replace(several, out=str(tmp_path / "short")), {"sha256": {}})
    assert again["scores"] == want["scores"] and len(pipe.batches) == 2, "another limit, the same run, from its clips"


@pytest.mark.parametrize(
    ("index", "fast", "asked", "bf16"),
    [
        ({"_class_name": "KlingPipeline", "sampling_dtype": "bf16"}, True, [], True),
        ({"_class_name": "KlingPipeline", "sampling_dtype": "bf16"}, False, [], False),
        ({"_class_name": "KlingPipeline"}, True, [], False),
        ({"_class_name": "KlingPipeline"}, True, ["--precision", "auto"], False),
        ({"_class_name": "KlingPipeline"}, True, ["--precision", "bf16"], True),
        ({"_class_name": "KlingPipeline", "sampling_dtype": "bf16"}, True, ["--precision", "fp32"], False),
        ({"_class_name": "WanPipeline"}, False, [], True),
    ],
)
def test_a_model_is_scored_in_the_precision_in_which_it_is_sampled(
    index: dict[str, str], fast: bool, asked: list[str], bf16: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    monkeypatch.setattr("kling.hub.load.bf16_is_fast", lambda device_type: fast)
    monkeypatch.setattr(program, "describe", lambda precision: f"precision {precision}")
    monkeypatch.setattr(program, "model_hashes", lambda folder: {})
    opened = []

    def load(folder: Path, torch_dtype: torch.dtype | None = None) -> Any:
        opened.append(torch_dtype)
        return SimpleNamespace(to=lambda device: None)

    def evaluate(pipe: Any, options: Options, *_: Any) -> None:
        opened.append(options.bf16)
        raise SystemExit

    monkeypatch.setattr("kling.sampling.pipeline.KlingPipeline.from_pretrained", load)
    monkeypatch.setattr(program, "evaluate", evaluate)
    with pytest.raises(SystemExit):
        program.main(["--model", str(tmp_path), "--out", str(tmp_path / "out"), *asked])
    assert opened == [torch.bfloat16 if bf16 else torch.float32, bf16]


def test_the_worst_of_the_motions_is_a_line_of_its_own() -> None:
    """Two motions, of which one is right in 3 of 4 clips and the other in 1 of 2."""

    class Half:
        right = iter([True, True, False, True, True, False])

        def words(self, video: Tensor, labels: dict[str, str]) -> dict[str, bool]:
            return {"motion": next(self.right)}

        def permanence(self, video: Tensor, count: int) -> dict[str, bool]:
            return {}

    world = held_out(0, 17, max_things=1)
    made = [TASKS["text-en"].make(world, k) for k in range(20)]
    kinds = [case.scene.things[0].motion for case in made]
    twice = [kind for kind in dict.fromkeys(kinds) if kinds.count(kind) >= 2][:2]
    chosen_ones = [made[kinds.index(twice[0])]] * 4 + [made[kinds.index(twice[1])]] * 2
    video = torch.zeros(3, 16, 16, 3, dtype=torch.uint8)
    rows = [program.measure(Half(), case, video, video) for case in chosen_ones]
    found = program.summed(rows)
    assert found["motion"]["value"] == pytest.approx(4 / 6) and found[f"motion/{twice[0]}"]["value"] == 0.75
    assert found["worst motion"] == found[f"motion/{twice[1]}"] and (found["worst motion"]["value"], found["worst motion"]["n"]) == (0.5, 2)
    (line,) = [x for x in cases.TABLE if (x.task, x.measure) == ("text-en", "worst motion")]
    assert line.reached(found["worst motion"]) is False and line.reached(found["motion"] | {"value": 0.86}) is True


@pytest.mark.parametrize(("n", "workers", "batch"), [(256, 14, 8), (5, 14, 8), (64, 2, 1), (33, 2, 8), (0, 2, 8), (7, 1, 3)])
def test_jobs_hold_every_case_once_and_spread_the_dear_first_ones(n: int, workers: int, batch: int) -> None:
    jobs = program.shares(list(range(100, 100 + n)), Options("", workers=workers, batch=batch))
    assert sorted(k for job in jobs for k in job) == list(range(100, 100 + n)) and all(0 < len(job) <= batch for job in jobs)
    assert all(job[0] == 100 + i for i, job in enumerate(jobs[:workers])), "each worker begins with another of the first cases"
    firsts = [min(jobs[i : i + workers])[0] for i in range(0, len(jobs), workers)]
    assert firsts == sorted(firsts), "earlier cases first"
    assert len(jobs) <= workers or max(map(len, jobs)) - min(map(len, jobs[:workers])) <= 1, "of about the same size"


def test_a_camera_that_was_not_found_is_counted_and_in_no_mean_also_in_files_from_before(tmp_path: Path) -> None:
    """Two clips of four degrees, and one that counted 180 when protocol 3 wrote it: in the table, in a run that goes on, on the card."""
    right = {"class": True, "rotation": 4.0, "translation": 0.5, "registered": True}
    lost = {"class": False, "rotation": 180.0, "translation": 2.0, "registered": False}
    rows = [right, lost, right]
    measured = [{"k": k, "seconds": [], "rows": {"model": {"camera": row}, "noise": {"camera": lost}}} for k, row in enumerate(rows)]
    (tmp_path / "cases.jsonl").write_text("".join(json.dumps(case) + "\n" for case in measured))
    options = Options(str(tmp_path), n=3, tasks=("camera",))
    mine = {"seed": 0, "steps": None, "tasks": ["camera"], "bf16": False, "weights": {}, "examples": 400, "protocol": 3}
    (tmp_path / "run.json").write_text(json.dumps(mine))
    report = evaluate(Oracle(), options, {"sha256": {}})
    score = report["scores"]["camera"]
    assert (score["rotation"]["value"], score["rotation"]["n"]) == (4, 2) and score["registered"]["value"] == pytest.approx(2 / 3)
    assert score["translation"]["value"] == 0.5 and score["class"]["n"] == 3
    cells = {line.split(" | ")[0].strip("| "): line for line in report["table"].splitlines()}
    assert "| 4.00 ° | 4.00 to 4.00 ° | 2 |" in cells["RotErr, where found"] and "| – |" in cells["RotErr, where found"]
    json.dumps(report, allow_nan=False)

    before = report | {
        "scores": {"camera": {"rotation": {"value": 62.7, "low": 4, "high": 180, "n": 3}}},
        "rows": {"model": {"camera": rows}},
    }
    (tmp_path / "scores.json").write_text(json.dumps(before))
    (tmp_path / "card.md").write_text("<!-- scores --><!-- /scores --><!-- vocabulary --><!-- /vocabulary -->")
    main(["card", str(tmp_path), "--into", str(tmp_path / "card.md")])
    card = (tmp_path / "card.md").read_text()
    assert "| RotErr, where found | 4.00 ° | 4.00 to 4.00 ° | 2 |" in card and "| camera found | 66.7 % |" in card and "62.7" not in card


def test_certify_counts_a_camera_that_its_ruler_does_not_find(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(video: Tensor, *known: object) -> SimpleNamespace:
        found = torch.arange(len(video)) < len(video) - 1
        return SimpleNamespace(trajectory=axes_trajectory({}, len(video), 32, 32), found=found, registered=found)

    for name, value in (("CLASSED", ()), ("speeds", lambda H, W: {}), ("estimate_trajectory", lost), ("estimate_structure", lost)):
        monkeypatch.setattr(certify, name, value)
    certify.main(["--out", str(tmp_path), "--sizes", "32x32"])
    report = json.loads((tmp_path / "scores.json").read_text())
    score = report["scores"]["any 32x32"]
    assert score["registered"] == report["scores"]["world 32x32"]["registered"] and score["registered"]["value"] == 0
    assert score["rotation"]["n"] == 0 and "any 32x32 rotation" not in report["reached"]
    assert report["reached"]["any 32x32 registered"] is False
    assert "| any, 32x32, RotErr | – |  | 0 |" in report["table"]


def test_two_runs_are_compared_case_by_case(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Four common cases: one gained, none lost, and a number that falls by 2 in each; a fifth case, which only one run has, is left out."""
    hits = {"a": [False, True, True, False, True], "b": [True, True, True, False]}
    for name, rows in hits.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps({"seed": 0, "examples": 400, "mode": name}))
        measured = [{"motion": hit, "flicker": 10.0 + k - 2 * (name == "b")} for k, hit in enumerate(rows)]
        lines = [json.dumps({"k": k, "seconds": [], "rows": {"model": {"text-en": row}}}) for k, row in enumerate(measured)]
        (tmp_path / name / "cases.jsonl").write_text("\n".join(reversed(lines)) + "\n")
    main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "difference.md")])
    table = capsys.readouterr().out
    assert (tmp_path / "difference.md").read_text() == table
    assert "| motion, English | 50.0 % | 75.0 % | +25 | +0 to +75 | 4 |" in table
    assert "| flicker | 11.50 levels | 9.50 levels | -2 | -2 to -2 | 4 |" in table
    (tmp_path / "b" / "run.json").write_text(json.dumps({"seed": 1, "examples": 400}))
    with pytest.raises(SystemExit):
        main(["compare", str(tmp_path / "a"), str(tmp_path / "b")])
    assert "were made with different seed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["moon", "--out", "x"], "unknown suite 'moon'"),
        (["world"], "--out"),
        (["world", "--out", "x", "--n", "0"], "--n 0"),
        (["world", "--out", "x", "--workers", "0"], "--workers 0"),
        (["world", "--out", "x", "--steps", "0"], "--steps 0"),
        (["world", "--out", "x", "--batch", "0"], "--batch 0"),
        (["world", "--out", "x", "--precision", "fp23"], "unknown precision 'fp23' (did you mean 'fp32'?)"),
        (["world", "--out", "x", "--limit-minutes", "nan"], "--limit-minutes nan"),
        (["world", "--out", "x", "--seed", "-1"], "--seed -1"),
        (["world", "--out", "x", "--mode", "fats"], "unknown mode 'fats' (did you mean 'fast'?)"),
        (["compare", "x"], "B"),
        (["report", "run", "--out", "run/scores.json"], "end the page's name in .html"),
        (["world", "--out", "x", "--n", "100000000000"], "--n 100000000000: give at most"),
        (["world", "--out", "x", "--seed", str(2**32)], "--seed 4294967296: give at most 4294967295"),
        (["world", "--out", "x", "--workers", "1000000"], "--workers 1000000"),
        (["world", "--output", "x"], "unknown option '--output' (did you mean '--out'?)"),
        (["world", "--out", "x", "--tasks", "text,,camera"], "--tasks 'text,,camera' has an empty name"),
        (["world", "--out", "x", "--ray", "head"], "--ray head: give auto, local, HOST:PORT"),
        (["world", "--out", "x", "--ray", "ray://"], "--ray ray://: give auto"),
        (["world", "--out", "{tmp}/file"], "is a file, where a folder is needed"),
        (["world", "--out", "{tmp}/other"], "holds the scores of another run (kling-eval videos a/ --out b)"),
        (["certify", "--out", "{tmp}/damaged"], "is not JSON"),
        (["certify", "--out", "x", "--n", "100000000000"], "--n 100000000000"),
        (["certify", "--out", "x", "--sizes", "99999x64"], "--sizes 99999x64: give from 32x32"),
        (["certify", "--out", "x", "--sizes", "64x64,64x64"], "--sizes 64x64 is given twice"),
        (["certify", "--out", "x", "--seed", "-1"], "--seed -1"),
        (["certify", "--out", "{tmp}/c", "--made", "{tmp}/none"], "none is not a folder"),
        (["vae", "a", "./a", "--out", "x"], "the folder ./a is given twice"),
        (["vae", "a", "--out", "x", "--frames", "5,5"], "--frames 5 is given twice"),
        (["vae", "a", "--out", "x", "--frames", "4000000001"], "give at most"),
        (["vae", "a", "--out", "x", "--size", "8x8"], "--size 8x8: give at least 16x16"),
        (["compare", "{tmp}/other", "{tmp}/other/"], "is given twice"),
        (["compare", "{tmp}/run", "{tmp}/truth"], "cases.jsonl is not as expected (KeyError: 'model')"),
        (["report", "{tmp}/odd", "--out", "{tmp}/r.html"], "suite is ['x'], which no suite writes"),
        (["report", "{tmp}/ranked", "--out", "{tmp}/r.html"], "scores.json is not as expected"),
        (["card", "{tmp}/scored", "--into", "{tmp}/card.md"], "scores.json is not as expected"),
        (["card", "{tmp}/scored", "--into", "{tmp}/latin.md"], "latin.md is no UTF-8 text"),
        (["world", "--out", "x", "--tasks", "text,camra"], "unknown task 'camra' (did you mean 'camera'?)"),
    ],
)
def test_bad_command_lines(argv: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "card.md").write_text("<!-- scores --><!-- /scores -->")
    (tmp_path / "latin.md").write_bytes(b"\xe9")
    world = {"suite": "world", "protocol": "x", "n": 1}
    reports = {
        "other": {"suite": "videos", "command": "kling-eval videos a/ --out b"},
        "odd": {"suite": ["x"]},
        "ranked": world | {"ranked": [["a"]], "options": {"folder": str(tmp_path)}},
        "scored": world | {"scores": {"text-en": {"motion": 5}}},
    }
    for name, text in {"damaged": "{"}.items() | {name: json.dumps(value) for name, value in reports.items()}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "scores.json").write_text(text)
    for name, who in (("run", "model"), ("truth", "truth")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text("{}")
        (tmp_path / name / "cases.jsonl").write_text(json.dumps({"k": 0, "rows": {who: {"text-en": {"motion": True}}}}) + "\n")
    with pytest.raises(SystemExit) as stop:
        main([word.replace("{tmp}", str(tmp_path)) for word in argv])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def share(out: Path, n: int) -> None:
    """The shipped model at one step, by two workers: they load it themselves."""
    evaluate(program.load(ASSETS, Options("")), Options(str(out), n=n, steps=1, examples=24, workers=2), {"sha256": {}}, ASSETS)


def test_certify_reports_missed_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """A ruler that knows the path and one that sees a camera at rest, on clips whose object moves and clips whose object stands."""
    seen: list[tuple[Tensor, Trajectory]] = []

    def shown(axes: dict[str, float], index: int, H: int, W: int, seed: int, objects: str) -> tuple[Tensor, Trajectory]:
        seen.append(shot(axes, index, H, W, seed, objects))
        return seen[-1]

    def knows(video: Tensor, stage: object) -> SimpleNamespace:
        path = next(path for other, path in seen if other is video)
        return SimpleNamespace(trajectory=path, registered=torch.ones(len(path), dtype=torch.bool))

    def rests(video: Tensor, intrinsics: Tensor) -> SimpleNamespace:
        return SimpleNamespace(trajectory=axes_trajectory({}, len(video), 32, 32), found=torch.ones(len(video), dtype=torch.bool))

    shot = certify.shot
    monkeypatch.setattr(certify, "shot", shown)
    monkeypatch.setattr(certify, "estimate_trajectory", knows)
    monkeypatch.setattr(certify, "estimate_structure", rests)
    certify.main(["--out", str(tmp_path), "--sizes", "32x32", "--seed", "5"])
    report = json.loads((tmp_path / "scores.json").read_text())
    assert report["scores"]["world 32x32"]["rotation"]["value"] == 0 and report["reached"]["world 32x32 translation"] is True
    for ruler in ("any", "any, still"):
        assert report["scores"][f"{ruler} 32x32"]["rotation"]["value"] > 5 and report["reached"][f"{ruler} 32x32 rotation"] is False
    assert report["scores"]["any 32x32"]["translation"]["n"] == 4 and report["scores"]["class 32x32"]["class"]["n"] == 7
    assert "made clips: not measured" in report["table"] and "mixture 0" in capsys.readouterr().err
    pairs = [(seen[i][0], seen[i + 1][0]) for i in range(0, 14, 2)]
    assert all(torch.equal(move[0], stand[0]) for move, stand in pairs) and not all(torch.equal(*pair) for pair in pairs)


def test_certify_compares_the_rulers_on_generated_clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One clip whose camera both find, one in which there is none: it is counted, and is in no mean."""
    turning = certify.shot({"pan": 6.0}, 0, 128, 128, 11, "none")[0][:9]
    for name, frames in (("turning", turning), ("noise", noise(turning, 0))):
        write_video(tmp_path / "made" / f"{name}.mp4", frames, 8, crf=5)
    for name, nothing in (("MOVES", {}), ("CLASSED", ()), ("speeds", lambda H, W: {})):
        monkeypatch.setattr(certify, name, nothing)
    certify.main(["--out", str(tmp_path / "out"), "--sizes", "32x32", "--made", str(tmp_path / "made")])
    report = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert report["rows"]["made turning"]["any"] and report["rows"]["made noise"] == {"world": False, "any": False, "rotation": None}
    found = report["scores"]["made"]
    assert found["any"]["value"] == 0.5 and found["rotation"]["n"] == 1 and found["rotation"]["value"] < 0.5
    assert (
        "`any` refuses 1 of 2" in report["table"]
        and "any against world" in report["table"]
        and report["reached"] == {"made rotation": True}
    )


@pytest.mark.slow
@pytest.mark.timeout(1200)  # three processes that import torch and load the model, on a machine that does other things too
def test_two_processes_share_the_cases_and_one_resumes_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only words and camera are asked from case 64 on: the 64 dearer ones before are said to have been measured."""
    monkeypatch.undo()
    first, n, out = world_folder.PICTURES, world_folder.PICTURES + 4, tmp_path / "out"
    program.claim(out, Options(str(out), steps=1, examples=24), {"sha256": {}})
    cases = out / "cases.jsonl"
    cases.write_text("".join(json.dumps({"k": k, "seconds": [], "rows": {"model": {}}}) + "\n" for k in range(first)))
    both = multiprocessing.get_context("spawn").Process(target=share, args=(out, n))
    both.start()
    try:
        while len(program.recorded(cases)) < first + 2 and both.is_alive():
            time.sleep(0.5)
        workers = [child for child in psutil.Process(both.pid).children() if "spawn_main" in " ".join(child.cmdline())]
    finally:
        both.kill()
    assert len(workers) == 2 and not psutil.wait_procs(workers, timeout=60)[1], "workers go with the one that started them"

    shared = program.recorded(cases)
    pipe, options = program.load(ASSETS, Options("")), Options(str(out), n=n, steps=1, examples=24)
    report = evaluate(pipe, options, {"sha256": {}})
    assert [json.loads(line)["k"] for line in cases.read_text().splitlines()].count(first) == 1
    assert report["n"] == n and report["scores"]["camera"]["class"]["n"] == 4
    alone = program.Examiner(pipe, program.make_ruler(options), dataclasses.replace(options, out=str(tmp_path / "alone")))
    k = max(k for k in shared if k < n)
    assert k >= first and alone([k])[0]["rows"] == shared[k]["rows"], "who measures changes nothing"
