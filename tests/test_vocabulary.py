"""What the shipped model understands: the table that people read, the line they get for other words, and the examples they copy."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from kling_programs.eval import evaluate
from kling_programs.eval.world import Options, load, make_ruler
from kling_programs.eval.world_folder import EXAMPLES
from kling_programs.sample import generate

from kling import KlingPipeline
from kling.cameras.axes import MOVES, axes_trajectory, parse_axes
from kling.data.world.captions import CAMERA_AXES, CAMERA_MOVES, camera_said, unknown_words, vocabulary, vocabulary_table
from kling.data.world.scene import FOCAL, HELD_OUT, PHRASINGS, World, render_scene
from kling.metrics.permanence import FAULTS
from kling.metrics.ruler import Ruler
from kling.runtime.precision import bf16_is_fast, default_device
from kling.sampling.pipeline import ASSETS

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "Makefile", "kling/assets/README.md", "kling/__init__.py", "kling/sampling/pipeline.py")),
    *(ROOT / name for name in ("sample/generate.py", "sample/studio/create.py", "train/train_all.py")),
    *(path for path in sorted((ROOT / "docs").iterdir()) if path.suffix in (".md", ".py") and path.name != "LOG.md"),
]
QUOTED = re.compile(r"""("|^PROMPT \?= )((?:an?|on|in) [^"\n]+|[\u3400-\u9fff，]{6,})(?:"|$)([^\n]*)""", re.MULTILINE)
ELSEWHERE = ("--model", "--image ", "--video", "--last-image", "image=", "video=")  # asks another model, or about something given

# Share of clips that show all that is asked: 14 of the 27 that were judged on 2026-11-27 (nine sentences; the whole set was not run).
REACHED, MARGIN = 0.52, 0.1

# What tells a name from a sentence, where it is not the name itself.
SIGNS = {
    "ball": ("ball", "sphere", "球"), "cube": ("cube", "box", "方块", "立方体"), "cone": ("cone", "圆锥", "锥体"),
    "grass": ("grass", "lawn", "草地"), "sand": ("sand", "沙"), "tiles": ("tile", "砖"), "snow": ("snow", "雪"), "water": ("water", "水面"),
    "still": ("stays still", "does not move", "静止不动", "保持不动"), "left": ("s left", "to the left", "向左移", "向左滚", "向左滑"),
    "right": ("moves right", "rolls right", "slides right", "to the right", "向右移", "向右滚", "向右滑"),
    "toward": ("comes closer", "toward us", "靠近", "朝镜头"), "away": ("moves away", "into the distance", "远处", "远去"),
    "bounce": ("bounces", "jumps", "上下"), "circle": ("circle", "圈"),
}  # fmt: skip


def examples() -> dict[str, list[str]]:
    """Every prompt for the shipped model that stands anywhere, alone (no picture or video beside it), and the files that it stands in.

    Where: README, docs and the scripts that make their pictures, the page's examples, Makefile, the help of the programs, the model card.
    """
    found: dict[str, list[str]] = {}
    for page in PAGES:
        for _, prompt, rest in QUOTED.findall(page.read_text(encoding="utf-8")):
            if said(prompt) and not any(option in rest for option in ELSEWHERE):
                found.setdefault(prompt, []).append(str(page.relative_to(ROOT)))
    return {prompt: list(dict.fromkeys(places)) for prompt, places in found.items()}


def said(prompt: str) -> dict[str, str]:
    """The answers to the detectors' questions that a prompt with one thing gives."""
    words = prompt.split(", the camera")[0].split("，镜头")[0].replace("green lawn", "lawn")
    answers = {}
    for question, subject in (("colour", "colours"), ("solid", "solids"), ("ground", "grounds"), ("motion", "motions")):
        for name, english, chinese in vocabulary()[subject]:
            if any(sign in words for sign in SIGNS.get(name, (*english, *chinese))):
                answers[question] = name
    return answers if {"colour", "solid"} <= answers.keys() else {}


def test_captions_say_only_what_the_table_lists() -> None:
    world, table = World(seed=0, frames=5), vocabulary_table()
    for i in range(200):
        captions = world.captions(world.scene(i))
        assert not [text for texts in captions.values() for text in texts if unknown_words(text)]
        scene = world.scene(i)
        for text in [text for texts in captions.values() for text in texts] if len(scene.things) == 1 else []:
            answers = {
                "colour": scene.things[0].colour,
                "solid": scene.things[0].solid,
                "ground": scene.ground,
                "motion": scene.things[0].motion,
            }
            assert said(text) == answers, text
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + sum(map(len, vocabulary().values())) and "rolls to the left" in table and "镜头向右摇" in table
    assert not re.search(r"[{}]", table)


def test_the_camera_that_a_caption_says_is_that_of_its_scene() -> None:
    world, said = World(seed=0, frames=5), set()
    for scene in map(world.scene, range(300)):
        for text in [texts[i] for texts in world.captions(scene).values() for i in range(0, PHRASINGS, 2)]:  # the others leave it out
            said.add(camera := camera_said(text))
            if scene.move:
                assert camera == scene.move, text
            else:
                assert {name: value > 0 for name, value in parse_axes(camera).items()} == {n: v > 0 for n, v in scene.axes.items()}, text
        assert not camera_said(world.captions(scene)["en"][1])
    assert {*CAMERA_MOVES} <= said


@pytest.mark.parametrize(("text", "words"), [
    ("A red CAT rolls left, at sunset", ["cat", "sunset"]), ("一只红色的猫在日落时滚动", ["猫", "日落"]), ("un ballon", ["un", "ballon"]),
    ("a red ball rolls left on grass, the camera pans right", []), ("", []), ("123 !?", []),
])  # fmt: skip
def test_words_that_no_caption_says(text: str, words: list[str]) -> None:
    assert unknown_words(text) == words


@pytest.mark.parametrize(("prompt", "word", "known"), [("a cat at sunset", '"cat", "sunset"', "red, "), ("一只猫", "“猫”", "红色、")])
def test_the_shipped_model_says_what_it_does_not_know_and_goes_on(
    prompt: str, word: str, known: str, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    generate.main([prompt, "--dry-run", "--seed", "1"])
    (line,) = notes(capsys)
    assert word in line and known in line
    generate.main(["a red ball rolls left on grass", "--dry-run", "--seed", "1"])
    assert not notes(capsys)


def test_another_checkpoint_is_not_asked_about_the_small_world(tmp_path: Path, monkeypatch, capsys) -> None:
    pipe = KlingPipeline.from_pretrained(weights=False)
    pipe.register_to_config(vocabulary=None)
    monkeypatch.setattr(generate, "load_pipeline", lambda *_: (ASSETS, pipe))
    monkeypatch.chdir(tmp_path)
    generate.main(["a cat at sunset", "--dry-run"])
    assert not notes(capsys)


def notes(capsys) -> list[str]:
    """What was said on stderr beside the precision."""
    return [line for line in capsys.readouterr().err.splitlines() if not line.startswith("precision ")]


def test_every_example_is_within_the_vocabulary() -> None:
    prompts = examples()
    assert len(prompts) >= 5 and {prompt: unknown_words(prompt) for prompt in prompts if unknown_words(prompt)} == {}


def test_examples_that_no_training_saw_are_said_to_be_held_out() -> None:
    """Within five lines of where they first stand: elsewhere on a page other things are held out, too."""
    untold = set()
    for prompt, places in examples().items():
        for place in places if held_out(prompt) else ():
            lines = (ROOT / place).read_text(encoding="utf-8").splitlines()
            at = next(n for n, line in enumerate(lines) if prompt in line)
            if not re.search(r"held[\s-]out", "\n".join(lines[max(0, at - 5) : at + 6])):
                untold.add((prompt, place, at + 1))
    assert not untold


def test_the_page_and_the_help_say_which_example_is_held_out(capsys) -> None:
    pytest.importorskip("gradio")
    from kling_programs.sample.studio.create import EXAMPLES, examples_label
    from kling_programs.sample.studio.words import WORDS

    assert [held_out(prompt) for prompt in EXAMPLES] == [True, False, False]
    english, chinese = WORDS[examples_label(world=True)]
    assert "the first is held out" in english and "第一句是留出的" in chinese and "held out" not in WORDS[examples_label(world=False)][0]
    with pytest.raises(SystemExit):
        generate.main(["--help"])
    assert "# held out: no training clip shows it" in capsys.readouterr().out


def held_out(prompt: str) -> bool:
    """Whether no training clip shows what a prompt asks for."""
    return tuple(said(prompt).get(question) for question in ("colour", "solid", "motion")) in HELD_OUT


def mistakes(ruler: Ruler, prompt: str, video: torch.Tensor) -> list[str]:
    """What a clip (T, H, W, 3) uint8 does not show of a prompt with one thing, as far as the detectors see: words, camera, permanence."""
    asked, camera = said(prompt), axes_said(prompt)
    if camera:  # where the picture moves, the motion of a thing in it says little
        asked.pop("motion", None)
    reading = ruler.detectors.read(video)
    wrong = [f"{question} {reading[question]}" for question, name in asked.items() if reading[question] != name]
    if camera:
        path = axes_trajectory(camera, len(video), *video.shape[1:3], FOCAL)
        wrong += [] if ruler.camera(video, path, camera)["class"] else ["camera"]
    row = ruler.permanence(video, 1, leaves=bool(camera))
    faults = [name for name in (*FAULTS, "reshaped") if row[name]]
    return wrong + ([] if row["whole"] else [f"not whole ({', '.join(faults)})"])


def axes_said(prompt: str) -> dict[str, float]:
    """The axes of the longest phrase about the camera in a prompt; empty where it says none, or that the camera stands still."""
    phrases = {phrase: {axis: sign * 10.0} for (axis, sign), columns in CAMERA_AXES.items() for column in columns for phrase in column}
    phrases |= {phrase: MOVES.get(move, {}) for move, columns in CAMERA_MOVES.items() for column in columns for phrase in column}
    return phrases[max((phrase for phrase in phrases if phrase in prompt), key=len, default="a static shot")]


@pytest.mark.parametrize(("prompt", "axes"), [
    ("a red ball on grass", {}), ("a red ball on grass, the camera pans left", {"pan": -10.0}),
    ("一个红色的球在草地上，镜头上升", {"vertical": 10.0}),
    ("a red ball on grass, the camera moves forward and up", MOVES["forward_up"]), ("a red ball on grass, the camera does not move", {}),
])  # fmt: skip
def test_the_camera_that_a_prompt_asks_for(prompt: str, axes: dict[str, float]) -> None:
    assert axes_said(prompt) == axes


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_truth_of_a_sentence_has_no_mistakes() -> None:
    """Rendered scenes under their own captions, camera words included, show what they say; under another scene's caption they do not."""
    ruler, world = make_ruler(Options("", examples=EXAMPLES)), World(5, 41, "16:9", max_things=1)
    scenes = [scene for scene in map(world.scene, range(140)) if len(scene.axes) < 2 or scene.move][:100]
    captions = [world.captions(scene)["en" if k % 2 else "zh"][0] for k, scene in enumerate(scenes)]
    videos = [render_scene(scene) for scene in scenes]
    wrong = {caption: found for caption, video in zip(captions, videos, strict=True) if (found := mistakes(ruler, caption, video))}
    assert len(wrong) <= 1, wrong
    assert all(mistakes(ruler, captions[k - 1], video) for k, video in enumerate(videos) if said(captions[k - 1]) != said(captions[k]))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_example_shows_what_it_says(capsys) -> None:
    """Of all examples under the seeds 0, 1 and 2, as many as the shipped weights have reached, less a margin, are right in everything."""
    options = Options("", examples=EXAMPLES, bf16=bf16_is_fast(default_device()))
    pipe, ruler, wrong = load(ASSETS, options), make_ruler(options), {}
    for prompt in examples():
        for seed in range(3):
            if found := mistakes(ruler, prompt, torch.from_numpy(pipe(prompt, seed=seed).frames[0])):
                wrong[prompt, seed] = found
    share = 1 - len(wrong) / (3 * len(examples()))
    with capsys.disabled():
        print(f"\n{100 * share:.0f} % of {3 * len(examples())} clips of examples show what they say")
        for (prompt, seed), found in wrong.items():
            print(f"  {prompt} · seed {seed}: {', '.join(found)}")
    assert share >= REACHED - MARGIN


def test_the_card_of_the_shipped_model_lists_the_vocabulary() -> None:
    card = (ASSETS / "README.md").read_text(encoding="utf-8")
    assert f"<!-- vocabulary -->\n{vocabulary_table()}\n<!-- /vocabulary -->" in card, "kling-eval card RUN writes it"


def test_scores_go_into_the_card_and_its_text_stays(tmp_path: Path, capsys) -> None:
    card, run = tmp_path / "README.md", tmp_path / "run"
    run.mkdir()
    card.write_text("before\n<!-- scores -->\nstale\n<!-- /scores -->\nbetween\n<!-- vocabulary --><!-- /vocabulary -->\nafter\n")
    score = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 9}
    report = {"suite": "world", "protocol": "abc", "n": 9, "command": "kling-eval world --n 9", "scores": {"text-en": {"motion": score}}}
    (run / "scores.json").write_text(json.dumps(report))
    evaluate.main(["card", str(run), "--into", str(card)])
    evaluate.main(["card", str(run), "--into", str(card)])
    text = card.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "between" in text and "stale" not in text
    assert text.count("| motion, English | 50.0 % | 40.0 to 60.0 % | 9 |") == 1 and vocabulary_table() in text
    card.write_text("no marks")
    with pytest.raises(SystemExit, match="2"):
        evaluate.main(["card", str(run), "--into", str(card)])
    assert "<!-- scores -->" in capsys.readouterr().err
