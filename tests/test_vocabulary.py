"""What the shipped model understands: the table that people read, the line they get for other words, and the examples they copy."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from kling_programs.eval import evaluate
from kling_programs.eval.world import Options, load, make_ruler
from kling_programs.sample import generate

from kling import KlingPipeline
from kling.data.world.captions import unknown_words, vocabulary, vocabulary_table
from kling.data.world.scene import World
from kling.sampling.pipeline import ASSETS

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "Makefile", "kling/assets/README.md", "kling/__init__.py", "kling/sampling/pipeline.py")),
    *(ROOT / name for name in ("sample/generate.py", "sample/studio/create.py", "train/train_all.py")),
    *(path for path in sorted((ROOT / "docs").iterdir()) if path.suffix in (".md", ".py") and path.name != "LOG.md"),
]
QUOTED = re.compile(r"""("|^PROMPT \?= )((?:an?|on|in) [^"\n]+|[\u3400-\u9fff，]{6,})(?:"|$)([^\n]*)""", re.MULTILINE)
ELSEWHERE = ("--model", "--image ", "--video", "--last-image", "image=", "video=")  # asks another model, or about something given

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


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_example_shows_what_it_says() -> None:
    """Two of three seeds are right in all that is said of the thing and its ground, and of its motion where the camera is still."""
    options = Options("", examples=200, bf16=False)
    pipe, ruler, wrong = load(ASSETS, options), make_ruler(options), {}
    for prompt in examples():
        moving = "camera" in prompt or "镜头" in prompt
        asked = {question: name for question, name in said(prompt).items() if not (moving and question == "motion")}
        read = [ruler.detectors.read(torch.from_numpy(pipe(prompt, seed=seed).frames[0])) for seed in range(3)]
        if sum(all(reading[q] == name for q, name in asked.items()) for reading in read) < 2:
            wrong[prompt] = read
    assert not wrong


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
