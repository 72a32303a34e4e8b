"""Shots as users give them: files, Python, the command line; where cuts fall, hops beyond the model's length, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from kling_programs.sample import generate
from test_generate import save_tiny
from test_pipeline import picture, tiny_pipeline

from kling import KlingPipeline, Request, Shot
from kling.cameras.axes import axes_trajectory
from kling.cameras.files import save_trajectory
from kling.condition.state import SHOT_GAP
from kling.condition.tasks import TASKS
from kling.errors import UserError
from kling.sampling.shots import as_shots, read_shots, timeline

LEFT, UP = "a red ball rolls left on grass", "a red ball jumps up and down on grass"
STORY = """shots:
  - {prompt: a red ball rolls left on grass, seconds: 1}
  - {prompt: a red ball jumps up and down on grass, seconds: 1, camera: pan=5}
"""


@pytest.fixture(scope="module")
def pipe() -> KlingPipeline:
    return tiny_pipeline(capabilities=[*TASKS, "camera", "shots", "text_to_image", "brush"])


# ----------------------------------------------------------------------------------------------------- what is asked


@pytest.mark.parametrize(
    ("seconds", "cuts", "frames"),
    [
        ([5.0], (), 41),
        ([2.5, 2.5], (21,), 41),
        ([1.0, 1.0], (9,), 17),
        ([1.3, 0.7], (9,), 17),  # frame 10.4 is nearer to 9 than to 13
        ([0.6, 0.6, 0.6, 0.6, 0.6, 0.6], (5, 9, 13, 21, 25), 29),  # roundings do not add up
    ],
)
def test_a_cut_lies_at_the_latent_that_begins_nearest(seconds: list[float], cuts: tuple[int, ...], frames: int) -> None:
    times = timeline([Shot("x", t) for t in seconds], 8.0)
    assert (times.cuts, times.frames) == (cuts, frames)
    for k, cut in enumerate(times.cuts):
        asked = 8 * sum(seconds[: k + 1])
        assert cut % 4 == 1 and abs(cut - asked) <= 2
    assert [end - start for start, end in times.ranges] == np.diff([0, *cuts, frames]).tolist()


def test_a_part_of_a_clip_has_the_shots_that_it_shows() -> None:
    times = timeline([Shot("x", t) for t in (2.5, 1.0, 2.5)], 8.0)  # latents 0, 6, 8 of 13
    assert times.starts == (0, 6, 8) and times.frames == 49
    assert times.within(0, 21) == [(0, 0)] and times.within(0, 41) == [(0, 0), (1, 6), (2, 8)]
    assert times.within(16, 17) == [(0, 0), (1, 2), (2, 4)], "from the last frame of latent 4"
    assert times.within(24, 25) == [(1, 0), (2, 2)]


def test_files_and_lists_say_the_same(tmp_path: Path) -> None:
    path = tmp_path / "story.yaml"
    path.write_text(STORY)
    shots = [Shot(LEFT, 1.0), Shot(UP, 1.0, "pan=5")]
    assert read_shots(path) == shots == as_shots([{"prompt": LEFT, "seconds": 1}, (UP, 1, "pan=5")])
    save_trajectory(tmp_path / "c.json", axes_trajectory({"pan": 3}, 8, 64, 112), 8.0, (64, 112))
    path.write_text(f"shots:\n  - {{prompt: {LEFT}, seconds: 1, camera: c.json}}\n")
    assert read_shots(path)[0].camera == str(tmp_path / "c.json"), "a camera lies beside the file"
    assert Request(shots=str(path)).prompts == [LEFT] and Request("x").prompts == ["x"]


def test_a_file_is_read_once_for_a_request(tmp_path: Path, pipe: KlingPipeline) -> None:
    path = tmp_path / "story.yaml"
    path.write_text(STORY)
    request = Request(shots=str(path), seed=1, num_inference_steps=1)
    shots = request.storyboard
    path.write_text("gone: 1\n")  # what is edited later does not mix with what was read
    assert len(pipe.plan(request).hops[0].shots) == 2 and request.storyboard == shots


@pytest.mark.parametrize(
    ("shots", "says"),
    [
        ([("", 1)], "say in words"),
        ([("x", 0)], "give a number above 0"),
        ([("x", True)], "give a number above 0"),
        ([("x", 1, "pan=50")], "outside"),
        ([("x", 1, 5)], "give axes"),
        ([{"prompt": "x", "second": 1}], "second"),
        (["x"], "is of type str"),
        ({"prompt": "x"}, "of type dict"),
        ([("x", 1)] * 7, "at most 6"),
    ],
)
def test_mistakes_in_shots_are_one_line(shots: object, says: str) -> None:
    with pytest.raises(UserError, match=says) as error:
        Request(shots=shots)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "- x", "shots: 3", "shots: []", "shots: [x]", "shots: [{prompt: x}]", "shot: [", "a: 1"])
def test_mistakes_in_a_file_name_it(tmp_path: Path, text: str) -> None:
    path = tmp_path / "story.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"story\.yaml"):
        read_shots(path)


TWO = [Shot(LEFT, 1.0), Shot(UP, 1.0)]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"prompt": "x"}, "both prompt and shots"),
        ({"duration": 2.0}, "both duration and shots"),
        ({"num_frames": 17}, "both num_frames and shots"),
        ({"camera": "pan=5"}, "both camera and shots"),
        ({"video": "a.mp4"}, "both video and shots"),
        ({"loop": True}, "both loop and shots"),
        ({"extend_to": 9.0}, "both extend_to and shots"),
        ({"tracks": [(None, [(1, 1), (2, 2)])]}, "both tracks and shots"),
        ({"camera_scale": 2.0}, "without a camera to scale"),
    ],
)
def test_what_is_of_one_shot_is_refused_beside_several(fields: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        Request(**{"prompt": "", **fields}, shots=TWO)


# --------------------------------------------------------------------------------------------------------- what comes out


def sampled(pipe: KlingPipeline, shots: list[Shot], **more: object) -> np.ndarray:
    return pipe(shots=shots, seed=3, **more).frames[0]


def test_the_plan_says_how_lengths_are_rounded(pipe: KlingPipeline) -> None:
    plan = pipe.plan(Request(shots=[Shot(LEFT, 1.3), Shot(UP, 0.7)]))
    (note,) = plan.notes
    assert plan.cuts == (9,) and plan.frames == 17 and plan.title == "text to video, 2 shots"
    assert note.startswith("shots of 1.12 + 1 s (1.3 + 0.7 asked), cut at frame 9 of 17: a cut lies where a latent frame begins")
    with pytest.raises(UserError, match="are a single picture"):
        pipe.plan(Request(shots=[Shot(LEFT, 0.1)]))
    with pytest.raises(UserError, match="shot 2 of 0.1 s is shorter than a latent frame: give at least 0.5 s"):
        pipe.plan(Request(shots=[Shot(LEFT, 1), Shot(UP, 0.1)]))


def test_one_shot_is_the_clip_of_its_words_to_the_bit(pipe: KlingPipeline) -> None:
    a = sampled(pipe, [Shot(LEFT, 1.0, "pan=5")], camera_guidance_scale=2.0, image=picture())
    b = pipe(LEFT, duration=1.0, camera="pan=5", seed=3, camera_guidance_scale=2.0, image=picture()).frames[0]
    assert np.array_equal(a, b)
    assert "shots" not in tiny_pipeline().config.capabilities
    assert tiny_pipeline().plan(Request(shots=[Shot(LEFT, 1.0)])).frames == 9, "no capability is needed for it"


def test_every_shot_reads_its_own_words(pipe: KlingPipeline) -> None:
    """Where tokens do not see each other, the words of a shot change its latents and no others."""
    weight = pipe.transformer.blocks[0].attn1.to_out[0].weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.zero_()
    try:
        made = [
            pipe(shots=[Shot(a, 1.0), Shot(b, 1.0)], seed=3, output_type="latent").latents for a, b in ((LEFT, UP), (LEFT, "x"), ("x", UP))
        ]
    finally:
        with torch.no_grad():
            weight.copy_(kept)
    same, second, first = made  # (1, c, 5, h, w), the cut before latent 3
    assert torch.equal(same[:, :, :3], second[:, :, :3]) and not torch.equal(same[:, :, 3:], second[:, :, 3:])
    assert torch.equal(same[:, :, 3:], first[:, :, 3:]) and not torch.equal(same[:, :, :3], first[:, :, :3])


def test_a_cut_is_of_one_frame(pipe: KlingPipeline) -> None:
    """The frames of a shot are decoded from its own latents, whoever decodes them: one clip, several at once, or hop by hop."""
    story = Request(shots=[(LEFT, 1.0), (UP, 1.0)], seed=3, num_inference_steps=2)
    other = story.replace(shots=[(LEFT, 0.6), (UP, 1.4)])
    latents = pipe(story, output_type="latent").latents
    alone = pipe.decode(torch.cat([latents[:, :, 3:4], latents[:, :, 3:]], dim=2))[0, 1:]  # frames 9 … 16, from latents 3 and 4
    video, cut_earlier = pipe.together([story, other])
    assert torch.equal(torch.from_numpy(pipe(story).frames[0, 9:]), alone)
    assert (video[9:].int() - alone.int()).abs().max() <= 1 and cut_earlier.shape == video.shape
    assert (cut_earlier.int() - torch.from_numpy(pipe(other).frames[0]).int()).abs().max() <= 1


def test_a_camera_moves_its_own_shot_only_from_its_own_start(pipe: KlingPipeline) -> None:
    request = Request(shots=[Shot(LEFT, 1.0), Shot(UP, 1.0, "pan=5")])
    signals, state = (asked := pipe.ask(request)).signals, asked.state
    assert signals.text["prompt"].shape[0] == 2 and signals.text["negative"].shape[0] == 1
    assert state.shot.tolist() == [[0, 0, 0, 1, 1]] and state.position.tolist() == [[0, 1, 2, 3 + SHOT_GAP, 4 + SHOT_GAP]]
    assert signals.camera_mask.tolist() == [[False] * 3 + [True] * 2]
    alone = axes_trajectory({"pan": 5}, 8, 64, 112)
    assert torch.allclose(signals.camera.c2w[0, 9:], alone.c2w) and torch.equal(signals.camera.c2w[0, 9], torch.eye(3, 4))
    both = pipe.ask(request.replace(shots=[Shot(LEFT, 1.0, "dolly=5"), Shot(UP, 1.0, "pan=5")])).signals
    assert both.camera_mask is None and torch.equal(both.camera.c2w[0, 9:], signals.camera.c2w[0, 9:])
    assert pipe.ask(request.replace(shots=TWO)).signals.camera is None


def test_several_seeds_of_a_storyboard_are_those_made_alone(pipe: KlingPipeline) -> None:
    asked = pipe.ask(Request(shots=[Shot(LEFT, 1.0), Shot(UP, 1.0, "pan=5")]))
    two = pipe.sample_group(asked, [3, 4])
    alone = pipe(shots=[Shot(LEFT, 1.0), Shot(UP, 1.0, "pan=5")], seed=4, output_type="latent").latents
    torch.testing.assert_close(two[1:], alone, atol=1e-4, rtol=1e-4)


def test_first_and_last_frame_are_those_of_the_whole(pipe: KlingPipeline) -> None:
    request = Request(shots=TWO, image=picture(0), last_image=picture(1), keyframes=[(picture(2), 5, 1.0)])
    plan, state = pipe.plan(request), pipe.ask(request).state
    assert plan.task == "keyframes" and state.shot.tolist() == [[0, 0, 0, 1, 1, 0, 1]], "keyframes, then the last frame"
    assert state.position[0, 6] == (16 + 1.5) / 4 + SHOT_GAP and not state.mask[0, 0, 0].any()
    sampled(pipe, TWO, image=picture(0), last_image=picture(1))


def test_beyond_the_model_s_length_hops_end_at_cuts(pipe: KlingPipeline) -> None:
    """The model makes 17 frames at once, and a hop repeats 9."""
    shots = [Shot(LEFT, 1.0), Shot(UP, 1.0), Shot(LEFT, 0.5), Shot(UP, 1.5)]
    plan = pipe.plan(Request(shots=shots))
    assert plan.cuts == (9, 17, 21) and plan.frames == 33
    assert [(hop.start, hop.end, hop.overlap) for hop in plan.hops] == [(0, 17, 0), (8, 21, 9), (12, 29, 9), (20, 33, 9)]
    assert [hop.shots for hop in plan.hops] == [((0, 0), (1, 3)), ((0, 0), (1, 1), (2, 3)), ((1, 0), (2, 2), (3, 3)), ((2, 0), (3, 1))]
    assert [hop.given.known for hop in plan.hops] == [0, 3, 3, 3]
    assert sampled(pipe, shots).shape[0] == 33
    assert [hop.fade for hop in plan.hops] == [0, 0, 0, 4], "over a cut nothing goes on"
    long = pipe.plan(Request(shots=[Shot(LEFT, 3.0), Shot(UP, 1.0)]))
    assert [(hop.start, hop.end) for hop in long.hops] == [(0, 17), (8, 25), (16, 33)], "a shot longer than a hop goes on"


def test_what_a_model_cannot_do_is_refused_by_name(pipe: KlingPipeline) -> None:
    with pytest.raises(UserError, match="not trained for 'shots'"):
        tiny_pipeline().plan(Request(shots=TWO))
    pipe.transformer_fast = pipe.transformer
    try:
        with pytest.raises(UserError, match="few-step weights were not distilled for shots"):
            pipe.plan(Request(shots=TWO, mode="fast"))
        pipe.register_to_config(fast={"num_inference_steps": 4, "shots": True})
        assert pipe.plan(Request(shots=TWO, mode="fast")).cuts == pipe.plan(Request(shots=TWO)).cuts
    finally:
        pipe.transformer_fast = None
        pipe.register_to_config(fast=None)


# ------------------------------------------------------------------------------------------------------ the command line


def test_a_storyboard_is_made_recorded_and_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*argv: str) -> tuple[int, list[str], str]:
        code = 0
        try:
            generate.main([*argv])
        except SystemExit as stop:
            code = stop.code
        text = capsys.readouterr()
        return code, text.out.splitlines(), text.err

    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "model", ["text", "camera", "shots"])
    (tmp_path / "story.yaml").write_text(STORY)
    asked = ("--shots", "story.yaml", "--aspect", "1:1", "--model", str(tmp_path / "model"), "--seed", "1")
    code, lines, _ = run(*asked, "--dry-run")
    assert code == 0 and lines[0].startswith("task: text to video, 2 shots") and lines[1].startswith("note: shots of 1.12 + 1 s")
    assert any("cuts" in line and "at frames 9" in line for line in lines)
    code, lines, err = run(*asked, "--output", "a.mp4")
    assert code == 0, err
    record = json.loads(Path("a.mp4.json").read_text())
    assert record["request"]["shots"] == str(tmp_path / "story.yaml") and str(tmp_path / "story.yaml") in record["inputs"]
    code, lines, err = run("--replay", "a.mp4.json", "--output", "b.mp4")
    assert code == 0 and lines[-1].startswith("identical to a.mp4.json"), (lines, err)
    (tmp_path / "story.yaml").write_text(STORY.replace("left", "right"))
    code, _, err = run("--replay", "a.mp4.json", "--output", "c.mp4")
    assert code == 2 and "is not the file that a.mp4.json was made from" in err
    Path("many.jsonl").write_text(json.dumps({"shots": [{"prompt": LEFT, "seconds": 1}, {"prompt": UP, "seconds": 1}]}) + "\n")
    model = ("--model", str(tmp_path / "model"), "--output", "many", "--aspect", "1:1")
    assert run("--prompts", "many.jsonl", *model)[0] == 0 and run("--prompts", "many.jsonl", *model)[1] == [
        "many.jsonl: 1 requests, 1 made already"
    ]
