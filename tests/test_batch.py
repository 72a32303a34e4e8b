"""`kling-sample --prompts`: one line a result, resumed where it was, shared over processes, mistakes told before anything is made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from kling_programs.sample import batch, generate
from test_generate import models, run  # noqa: F401 - fixtures

from kling import KlingPipeline
from kling.data.video import probe
from kling.errors import UserError
from kling.sampling.record import read_record

LINES = [
    {"prompt": "a red ball"},
    {"prompt": "a blue cube", "seed": 7, "name": "second"},
    {"prompt": "a red ball", "camera": "pan=5"},
    {"prompt": "a green cone", "num_frames": 9},
]
QUICK = ("--num-frames", "5", "--aspect", "1:1", "--output", "made")


def write(path: Path, rows: list) -> str:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return str(path)


def results(folder: Path) -> dict[int, dict]:
    rows = [json.loads(row) for row in (folder / batch.RESULTS).read_text().splitlines()]
    assert len({row["line"] for row in rows}) == len(rows), "each line once"
    return {row["line"]: row for row in rows}


def test_every_line_is_made_once_and_as_alone(run, tmp_path: Path) -> None:  # noqa: F811
    file = write(tmp_path / "many.jsonl", [LINES[0], "", *LINES[1:]])
    code, said, error = run("--prompts", file, *QUICK)
    assert code == 0 and said[0].endswith("4 requests, 0 made already") and "precision fp32 (" in error
    made = results(tmp_path / "made")
    assert [made[i]["seed"] for i in (0, 2, 3, 4)] == [0, 7, 3, 4] and made[2]["output"] == "made/second.mp4"
    assert probe(made[4]["output"]).count(8) == 9 and probe(made[0]["output"]).count(8) == 5
    code, *_ = run("a blue cube", "--seed", "7", "--num-frames", "5", "--aspect", "1:1", "--output", "alone.mp4")
    assert read_record("alone.mp4.json")["frames"]["sha256"] == made[2]["sha256"]
    Path(f"{made[3]['output']}.json").unlink()  # as a kill between the two files leaves it
    code, said, _ = run("--prompts", file, *QUICK)
    assert code == 0 and said[0].endswith("4 requests, 3 made already") and json.loads(said[-1])["line"] == 3
    assert json.loads(said[-1])["sha256"] == made[3]["sha256"]
    code, said, _ = run("--prompts", file, *QUICK)
    assert (code, len(said)) == (0, 1)
    write(tmp_path / "many.jsonl", [LINES[0], "", LINES[1] | {"seed": 8}])
    code, _, error = run("--prompts", file, *QUICK)
    assert code == 2 and "second.mp4 was made from another request than line 3" in error


def test_words_that_the_small_model_does_not_know_are_named_once_a_list(run, models: Path, tmp_path: Path, monkeypatch) -> None:  # noqa: F811
    """Those of the lines that are still to be made, by the first process; what points at references is known where there are some."""
    pipe = KlingPipeline.from_pretrained(models / "able", weights=False)
    monkeypatch.setattr(generate, "load_pipeline", lambda *_: (models / "able", pipe))
    rows = [{"prompt": "a red cat on grass"}, {"prompt": "一只红色的猫"}, {"prompt": "a cat and a dog"}, {"prompt": "a red ball"}]
    file = write(tmp_path / "many.jsonl", rows)
    assert "not know" not in run("--prompts", file, *QUICK, "--dry-run")[2], "of a model of the real world"
    pipe.register_to_config(vocabulary="world")
    code, said, error = run("--prompts", file, *QUICK, "--dry-run")
    assert code == 0 and len(said) == 5 and error.count("not know") == 1
    assert 'does not know "cat", "猫", "dog" and ignores them' in error and "red" in error
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert "not know" not in run("--prompts", file, *QUICK, "--dry-run")[2]
    monkeypatch.setenv("RANK", "0")
    assert '"猫"' in run("--prompts", file, *QUICK, "--dry-run")[2], "a line of the other process"
    many = write(tmp_path / "words.jsonl", [{"prompt": f"a {'x' * n} ball"} for n in range(2, 40)])
    assert '"xxxxxxxxxxxxx" …' in run("--prompts", many, *QUICK, "--dry-run")[2]


def test_a_line_that_fails_first_leaves_the_others(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    sample = generate.sample

    def fails_once(*words: object) -> object:
        monkeypatch.setattr(generate, "sample", sample)
        raise UserError("no place for it")

    monkeypatch.setattr(generate, "sample", fails_once)
    code, _, error = run("--prompts", write(tmp_path / "many.jsonl", LINES[:2]), *QUICK)
    made = results(tmp_path / "made")
    assert code == 1 and "1 requests could not be made" in error and made[0] == {"line": 0, "error": "no place for it"}
    assert Path(made[1]["output"]).is_file()


def test_processes_share_the_lines(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    file = write(tmp_path / "many.jsonl", LINES)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):  # the second finds what the first has made
        monkeypatch.setenv("RANK", rank)
        assert run("--prompts", file, *QUICK)[0] == 0
    assert set(results(tmp_path / "made")) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("{", "line 2"),
        ("[]", "line 2: it holds a list, not an object"),
        ('{"promt": "x"}', "line 2: unknown field 'promt' (did you mean 'prompt'?)"),
        ('{"prompt": "x", "num_frames": 6}', "line 2: 6 frames"),
        ('{"prompt": "x", "image": "none.png"}', "none.png"),
        ('{"prompt": "x", "name": "../x"}', "line 2: name '../x'"),
        ('{"prompt": "x", "name": "one"}', "line 2: name 'one' is that of line 1"),
        ('{"prompt": "x", "name": "a\\u0000b"}', "line 2: name 'a\\x00b'"),
        ('{"prompt": "x", "name": "' + "a" * 999 + '"}', "is no file name"),
        ('{"prompt": "x", "prompt": "y"}', "line 2: 'prompt' is given twice"),
        ('{"prompt": "x", "keyframes": 5}', "line 2: keyframes 5"),
        ('{"prompt": "x", "keyframes": [5, []]}', "line 2: keyframe 5"),
        ('{"prompt": "x", "references": [5]}', "line 2: references [5]"),
        ('{"prompt": "x", "tracks": [5]}', "line 2: tracks"),
        ('{"prompt": "x", "tracks": "t.json"}', "nowhere/t.json does not exist"),
        ('{"prompt": "x", "tracks": [{"mask": "t.png", "points": [[1, 1]]}]}', "nowhere/t.png"),
        ('{"shots": [{"prompt": "x", "seconds": 1e308}, {"prompt": "x", "seconds": 1e308}]}', "line 2: "),
        ('{"prompt": "x", "camera": {"pan": 1' + "0" * 400 + "}}", "line 2: camera axis pan"),
        ('{"prompt": "x", "guidance_interval": [0, 1' + "0" * 400 + "]}", "line 2: guidance_interval"),
        ('{"prompt": "x", "keyframes": [["a.png", 3, 1' + "0" * 400 + "]]}", "line 2: keyframe at frame 3 has strength"),
        ('{"prompt": "x", "seed": 1e30}', "line 2: seed"),
        ('{"prompt": "x", "camera": {"pan": true}}', "line 2: camera axis pan is True"),
        ('{"prompt": "' + "a" * 300 + '"}', "line 2: prompt of 300 bytes is longer than this model reads"),
        ('{"prompt": "\\ud800"}', "half a character"),
        ('{"prompt": "x", "loop": true, "last_image": "a.png"}', "line 2: both loop and last_image"),
    ],
)
def test_a_mistake_in_one_line_stops_before_anything_is_made(run, tmp_path: Path, row: str, words: str) -> None:  # noqa: F811
    (tmp_path / "nowhere").mkdir()
    file = write(tmp_path / "nowhere" / "many.jsonl", ['{"prompt": "x", "name": "one"}', row])
    code, _, error = run("--prompts", file, *QUICK)
    assert code == 2 and error.strip().splitlines()[-1].count("error: ") == 1 and words in error
    assert not (tmp_path / "made").exists()


def test_a_list_from_another_editor_is_read_and_no_option_is_ignored(run, tmp_path: Path) -> None:  # noqa: F811
    """A byte order mark, Windows line ends, and a prompt with what `splitlines` takes for a line's end."""
    file = tmp_path / "many.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + '{"prompt": "a red\u2028ball"}\r\n{"prompt": "a\x85 cone"}\r\n'.encode())
    code, said, _ = run("--prompts", str(file), *QUICK, "--dry-run")
    assert code == 0 and said[0].endswith("2 requests, 0 made already")
    for more in (("--brush", "3,3;9,9"), ("--static", "none.png"), ("--tracks", "none.json")):
        code, _, error = run("--prompts", str(file), *QUICK, *more)
        assert code == 2 and any(word in error for word in ("brush", "tracks", "none."))


def test_options_of_one_request_are_refused(run, tmp_path: Path) -> None:  # noqa: F811
    file = write(tmp_path / "many.jsonl", LINES)
    for more, words in ((["a ball"], "the prompt"), (["--num-videos", "2"], "--num-videos"), (["--output", "x.mp4"], "folder")):
        code, _, error = run("--prompts", file, *QUICK, *more)
        assert code == 2 and words in error
    assert "cannot be read" in run("--prompts", "nowhere.jsonl")[2]
