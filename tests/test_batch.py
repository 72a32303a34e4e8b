"""`kling-sample --prompts`: one line a result, resumed where it was, shared over processes, mistakes told before anything is made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from kling_programs.sample import batch
from test_generate import models, run  # noqa: F401 - fixtures

from kling.data.video import probe
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
    code, said, _ = run("--prompts", file, *QUICK)
    assert code == 0 and said[0].endswith("4 requests, 0 made already")
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
        ("[]", "line 2: it is no object"),
        ('{"promt": "x"}', "line 2: unknown field 'promt' (did you mean 'prompt'?)"),
        ('{"prompt": "x", "num_frames": 6}', "line 2: 6 frames"),
        ('{"prompt": "x", "image": "none.png"}', "none.png"),
        ('{"prompt": "x", "name": "../x"}', "line 2: name '../x'"),
        ('{"prompt": "x", "name": "one"}', "line 2: name 'one' is that of line 1"),
        ('{"prompt": "x", "loop": true, "last_image": "a.png"}', "line 2: both loop and last_image"),
    ],
)
def test_a_mistake_in_one_line_stops_before_anything_is_made(run, tmp_path: Path, row: str, words: str) -> None:  # noqa: F811
    file = write(tmp_path / "many.jsonl", ['{"prompt": "x", "name": "one"}', row])
    code, _, error = run("--prompts", file, *QUICK)
    assert code == 2 and error.strip().splitlines()[-1].count("error: ") == 1 and words in error
    assert not (tmp_path / "made").exists()


def test_options_of_one_request_are_refused(run, tmp_path: Path) -> None:  # noqa: F811
    file = write(tmp_path / "many.jsonl", LINES)
    for more, words in ((["a ball"], "the prompt"), (["--num-videos", "2"], "--num-videos"), (["--output", "x.mp4"], "folder")):
        code, _, error = run("--prompts", file, *QUICK, *more)
        assert code == 2 and words in error
    assert "cannot be read" in run("--prompts", "nowhere.jsonl")[2]
