"""The script for a machine with a GPU (configs/gpu/first.sh) on a simulated one: a clock, and programs that last as long as told.

Every second on such a machine is lent: whatever lasts longer than planned, the script must end in time and leave its results.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

ROOT = Path(__file__).parents[1]
BEGIN = 1_000_000
# seconds: of a program until it works, of encoding, compiling and a compiled step; `later`: factor on the steps of the real training
USUAL = {"start": 15, "encode": 60, "compile": 60, "step": 0.1, "later": 1.0}
GRACE = 20  # seconds from the script's TERM to its KILL

# stands for coreutils' timeout, and for the program that it would run
TIMEOUT = '''#!{python}
import json, os, sys, time
from pathlib import Path

home, limit, command = Path(os.environ["MACHINE"]), int(sys.argv[5]), sys.argv[6:]
speed, began = json.loads((home / "speed.json").read_text()), int((home / "clock").read_text())
program = command[2].rpartition(".")[2] if command[1] == "-m" else "machine"
words = dict(word.split("=", 1) for word in command if "=" in word)
code, seconds, beside = 0, 10.0, program in ("pytest", "distill")
with open(home / "commands.jsonl", "a") as file:
    file.write(json.dumps({{"program": program, "began": began, "limit": limit, "command": command}}) + "\\n")


def write(name, text):
    """Whole at any moment, although programs run beside each other."""
    (home / f"{{name}}.{{program}}").write_text(text)
    (home / f"{{name}}.{{program}}").replace(home / name)


def trained(step, compiles=False):
    """Steps until the limit, with a checkpoint, a log and at the end an export; the 46th compiles for 20 s."""
    run, steps = Path(words["out"]), int(words["steps"])
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").touch()
    done = int((run / "latest").read_text()[5:]) if (run / "latest").exists() else 0
    spent = speed["start"] + speed.pop("encode_left", 0)
    if words.get("compile") == "true" and done < steps:
        if speed["compile"] is None:
            return 1, spent
        spent += speed["compile"] if not done else 10
    with open(run / "metrics.jsonl", "a") as log:
        first = done
        while done < steps and (spent < limit or done == first):  # a signal is seen at the end of a step
            took = step + 20 * (compiles and done == 45)
            done, spent = done + 1, spent + took
            log.write(json.dumps({{"step": done, "time/step": took}}) + "\\n")
    if spent > limit + {grace}:
        return 137, limit + {grace}
    (run / "latest").write_text(f"step-{{done:08d}}\\n")
    if done < steps:
        return 143, spent + 2
    for part in ("transformer", "transformer_fast", "text_encoder", "scheduler"):
        (run / "export" / part).mkdir(parents=True, exist_ok=True)
    (run / "export" / "model_index.json").write_text(json.dumps({{"steps": done}}))
    return 0, spent + 3


if program == "encode":
    seconds = min(limit, speed["encode"])
    code = 143 if speed["encode"] > limit else 0
    speed["encode_left"] = speed["encode"] - seconds
if program == "train_dit":
    eager = 1.7 if words.get("compile") == "false" else 1
    code, seconds = trained(speed["step"] * eager * (speed["later"] if int(words["steps"]) > 60 else 1), compiles=True)
if program == "distill":
    code, seconds = trained(2 * speed["step"])
    (home / "distilled").touch()
if program == "evaluate":
    for _ in range(100):  # it began beside this, unless there was no time for it
        time.sleep(0.02 * (not (home / "distilled").exists()))
    out, minutes = Path(command[command.index("--out") + 1]), float(command[command.index("--limit-minutes") + 1])
    out.mkdir(parents=True)
    (out / "cases.jsonl").touch()
    seconds = 60 * minutes + 30
if program == "bench":
    seconds = 60
if seconds > limit:
    code, seconds = code or 143, min(seconds, limit + {grace})
if not beside:
    write("speed.json", json.dumps(speed))
    write("clock", str(began + round(seconds)))
sys.exit(code)
'''
TOOLS = {
    "timeout": TIMEOUT.format(python=sys.executable, grace=GRACE),
    "date": '#!/bin/sh\ncat "$MACHINE/clock"\n',
    "nproc": '#!/bin/sh\necho "${OMP_NUM_THREADS:-16}"\n',  # as GNU's
    "mount": "#!/bin/sh\n",
}


class Ran(NamedTuple):
    seconds: int
    stages: dict[str, Any]  # the exit code of each, null if there was no time for it
    commands: list[dict[str, Any]]
    work: Path
    out: Path

    def made(self, name: str) -> list[list[str]]:
        """The command lines of a program."""
        return [one["command"] for one in self.commands if one["program"] == name]

    def shipped(self, name: str) -> int:
        """The steps of the weights in OUT."""
        whole = b"".join(part.read_bytes() for part in sorted(self.out.glob(f"{name}.tar.*")))
        return json.load(tarfile.open(fileobj=BytesIO(whole)).extractfile("model_index.json"))["steps"]


def ran(home: Path, *words: str, **speed: Any) -> Ran:
    (home / "bin").mkdir(exist_ok=True)
    for name, text in TOOLS.items():
        (home / "bin" / name).write_text(text)
        (home / "bin" / name).chmod(0o755)
    (home / "clock").write_text(str(BEGIN))
    (home / "speed.json").write_text(json.dumps(USUAL | speed))
    env = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "FROM")}
    env |= {"PATH": f"{home / 'bin'}:{env['PATH']}", "MACHINE": str(home), "PYTHON": sys.executable, "WHEELS": str(home)}
    env |= {"OUT": str(home / "out"), "WORK": str(home / "work")}
    subprocess.run(["bash", str(ROOT / "configs" / "gpu" / "first.sh"), *words], env=env, timeout=120)
    stages = [json.loads(line) for line in (home / "out" / "stages.jsonl").read_text().splitlines()]
    commands = [json.loads(line) for line in (home / "commands.jsonl").read_text().splitlines()]
    spent = int((home / "clock").read_text()) - BEGIN
    return Ran(spent, {stage["stage"]: stage["code"] for stage in stages}, commands, home / "work", home / "out")


@pytest.mark.parametrize(
    ("words", "limit", "speed"),
    [
        (["4"], 490, {}),
        (["4"], 490, {"encode": 130, "compile": 90, "step": 0.25}),
        (["5"], 540, {"step": 0.05}),
        (["--try"], 260, {"encode": 25}),
    ],
)
def test_it_ends_in_time_with_the_weights_of_its_last_step(words: list[str], limit: int, speed: dict[str, float], tmp_path: Path) -> None:
    found = ran(tmp_path, *words, **speed)
    assert found.seconds <= limit, found.commands
    trying = words == ["--try"]
    done = ["machine", "tests", "pace", "student", "scores", *([] if trying else ["train"])]
    assert {name: found.stages.get(name) for name in done} == dict.fromkeys(done, 0)
    steps = int([word for word in found.made("train_dit")[-1] if word.startswith("steps=")][0][6:])
    assert found.shipped("weights") == steps and found.shipped("fast") > 10
    assert trying or steps * (USUAL | speed)["step"] > 60, "the late compilation of one step is no reason to train a few steps only"
    files = {path.name for path in found.out.iterdir()}
    assert {"eval.tar.gz", "logs.tar.gz", "metrics.jsonl.gz", "stages.jsonl"} < files and len(files) <= 8
    with tarfile.open(found.out / "logs.tar.gz") as logs:
        assert {f"logs/{name}.log" for name in done} <= set(logs.getnames())


def test_workers_are_counted_although_one_thread_is_asked_for(tmp_path: Path) -> None:
    found = ran(tmp_path, "4")
    assert yaml.safe_load((found.work / "encode.yaml").read_text())["workers"] == 13
    assert all("workers=13" in command for command in found.made("train_dit"))
    (distill,), (score,) = found.made("distill"), found.made("evaluate")
    assert "workers=7" in distill and score[score.index("--workers") + 1] == "7", "both share the 16 processors"


def test_a_training_that_is_cut_short_gives_its_own_weights(tmp_path: Path) -> None:
    found = ran(tmp_path, "4", later=4.0)
    assert found.seconds <= 490 and found.stages["train"] == 143 and found.stages["export"] == 0
    assert found.shipped("weights") == int((found.work / "run" / "latest").read_text()[5:]) > 60


def test_a_slow_compiler_leaves_no_pace_to_go_by(tmp_path: Path) -> None:
    """It trains until the time is over, instead of the seven steps that a pace of 10 s would mean."""
    found = ran(tmp_path, "4", compile=178)
    assert found.seconds <= 490 and found.stages["pace"] == 143 and found.stages["export"] == 0
    assert found.shipped("weights") == int((found.work / "run" / "latest").read_text()[5:]) > 300


def test_without_a_compiler_it_trains_uncompiled(tmp_path: Path) -> None:
    found = ran(tmp_path, "4", compile=None)
    assert found.seconds <= 490 and found.stages["pace"] == 1 and found.stages["train"] == found.stages["scores"] == 0
    assert ["compile=false" in command for command in found.made("train_dit")] == [False, True, True]


def test_more_makes_what_is_left_and_the_bench(tmp_path: Path) -> None:
    first = ran(tmp_path, "4")
    assert first.stages["train"] == 0 and not first.made("bench"), "the whole run leaves its time to the training"
    more = ran(tmp_path, "--more")
    assert more.seconds <= 155 and more.stages["bench"] == 0 and len(more.commands) == len(first.commands) + 1, "nothing is made twice"
    (bench,) = more.made("bench")
    assert bench[bench.index("kling_programs.eval.bench") + 1 :][:4] == ["dit", "train", "--device", "cuda"] and "--quick" in bench
