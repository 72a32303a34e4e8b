"""Train a model from scratch: one stage after another, each by its own program, to a folder that kling-sample reads.

kling-train-all configs/shipped.yaml out=runs/shipped                 # `make model`; run again, it continues where it stopped
kling-train-all configs/shipped.yaml out=/tmp/all scale=0.01          # every stage in six minutes, to see that all of them run
kling-train-all configs/shipped.yaml out=runs/shipped processes=8     # 8 GPUs, or 8 processes on CPUs
kling-train-all configs/shipped.yaml out=runs/mine stages.clips.steps=20000 stages.clips.lr=1e-3

OUT gets a folder for each stage and, at the end, OUT/model. Every command is printed before it runs, so a stage can be repeated by hand.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from kling_programs.train.command import helped

from kling.config import load_config, read_preset
from kling.errors import UserError, program, unknown
from kling.runtime.accelerator import EXIT_STOPPED
from kling.runtime.files import parse_json, write_atomic, written_folder

PROGRAMS = {"encode": "encode", "train-vae": "train_vae", "train-text": "train_text", "train": "train_dit", "distill": "distill"}
MODEL = "model"  # folder of OUT
SCALED = ("steps", "warmup", "clips")  # numbers of a preset that `scale` multiplies; also the values of `shorter`
ALONE = ("train-text",)  # takes minutes on one process, and does not run on several


@dataclass
class TrainAllConfig:
    """The stages in order, and how to run them.

    stages: by name: `program` (one of `PROGRAMS`), `preset`, and settings that change it; a value that begins with the name of an
    earlier stage is a path in its folder (`init_from: pictures/export`). model: what becomes OUT/model, likewise.
    scale: factor for the steps and the clips of every stage.
    processes: how many share each batch; 0 is one per GPU, or one on CPUs. threads: CPU threads per operation, null uses all cores.
    out: folder of the stages and of the model.
    """

    out: str = "runs/shipped"
    stages: dict[str, Any] = field(default_factory=dict)
    model: str = ""
    scale: float = 1.0
    processes: int = 0
    threads: int | None = None


@program
def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if helped("kling-train-all", argv):
        return
    cfg = load_config(TrainAllConfig, argv[0], argv[1:])
    out, processes = Path(cfg.out), cfg.processes or max(1, torch.cuda.device_count())
    words = {name: stage_words(cfg, name, processes) for name in cfg.stages}  # mistakes are reported before the first stage starts
    for name in words:
        check_settings(cfg, name, words[name])
    if cfg.model.split("/")[0] not in cfg.stages:
        raise UserError(
            f"model '{cfg.model}' begins with no stage's name: give one of {', '.join(cfg.stages) or 'stages'}, as in NAME/export"
        )
    source = Path(place(cfg, cfg.model, list(cfg.stages)))
    recipes = {name: stage_words(dataclasses.replace(cfg, out="OUT", threads=None), name, 1) for name in cfg.stages}
    done = finished(out / "stages.json", recipes)
    out.mkdir(parents=True, exist_ok=True)
    for number, (name, arguments) in enumerate(words.items(), start=1):
        title = f"stage {number} of {len(words)}, {name}"
        if name in done:
            print(f"{title}: done before", flush=True)
            continue
        stage, started = cfg.stages[name]["program"], time.monotonic()
        print(f"{title}: kling-{stage} {shlex.join(arguments)}", flush=True)
        run(command(stage, arguments, 1 if stage in ALONE else processes), title)
        seconds = round(time.monotonic() - started)
        done[name] = {"words": recipes[name], "seconds": seconds}  # of the last run only, if the stage was interrupted
        write_atomic(out / "stages.json", json.dumps(done, indent=1, ensure_ascii=False) + "\n")
        print(f"{title}: {seconds} s", flush=True)
    if not source.is_dir():
        raise UserError(f"all stages are done, and model '{cfg.model}' is no folder of theirs: give model= another and run again")
    with written_folder(target := out / MODEL) as temporary:
        for file in filter(Path.is_file, source.rglob("*")):
            (copy := temporary / file.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
    print(
        f'{target} · kling-sample --model {target} "a red ball rolls left on grass" · kling-eval world --model {target} --out {out}/scores'
    )
    print(f"it samples in fp32; kling-export {target} --measure-bf16 allows bf16, if its clips are the same")


def stage_words(cfg: TrainAllConfig, name: str, processes: int) -> list[str]:
    """The command line of a stage. Raises `UserError` for a stage that lacks something, or refers to a later one."""
    settings = dict(cfg.stages[name]) if isinstance(cfg.stages[name], dict) else {}
    if missing := [key for key in ("program", "preset") if not settings.get(key)]:
        raise UserError(f"stage '{name}' has no {missing[0]}: give stages.{name}.{missing[0]}=...")
    if name == MODEL or Path(name).name != name or name in (".", ".."):
        raise UserError(f"stage '{name}' cannot have that name, which is that of its folder in OUT, beside OUT/{MODEL}: give another")
    kind, preset = str(settings.pop("program")), str(settings.pop("preset"))
    if kind not in PROGRAMS:
        raise unknown(f"program of stage '{name}'", kind, PROGRAMS)
    earlier = list(cfg.stages)[: list(cfg.stages).index(name)]
    values = read_preset(preset) | settings
    for key in SCALED:
        if isinstance(values.get(key), int) and cfg.scale != 1:
            settings[key] = scaled(values[key], cfg.scale)
    if isinstance(values.get("shorter"), dict) and cfg.scale != 1:
        settings["shorter"] = {frames: scaled(count, cfg.scale) for frames, count in values["shorter"].items()}
    if processes > 1 and kind not in ALONE and isinstance(values.get("batch"), int):
        settings["batch"] = -(-values["batch"] // processes)
    if cfg.threads is not None:
        settings["threads"] = cfg.threads
    settings = {key: place(cfg, value, earlier) for key, value in settings.items()}
    return [preset, f"out={Path(cfg.out) / name}", *(f"{key}={written_as(value)}" for key, value in settings.items())]


def check_settings(cfg: TrainAllConfig, name: str, words: list[str]) -> None:
    """Raises `UserError` if the program of a stage would refuse its settings."""
    try:
        load_config(config_of(cfg.stages[name]["program"]), words[0], words[1:])
    except UserError as error:
        raise UserError(f"stage '{name}': {error}") from None


def config_of(kind: str) -> type:
    """The settings of a stage's program, whose modules are heavy."""
    from kling_programs.train.students import DistillConfig
    from kling_programs.train.train_dit import TrainDiTConfig
    from kling_programs.train.train_text import TrainTextConfig
    from kling_programs.train.train_vae import TrainVAEConfig

    from kling.cache.plan import CacheConfig

    kinds = {"encode": CacheConfig, "train-vae": TrainVAEConfig, "train-text": TrainTextConfig}
    return {**kinds, "train": TrainDiTConfig, "distill": DistillConfig}[kind]


def scaled(count: int, scale: float) -> int:
    return max(1, round(count * scale))


def written_as(value: Any) -> str:
    """A value in the form that a key=value command line takes."""
    if isinstance(value, str):
        return value
    return yaml.safe_dump(value, default_flow_style=True, width=math.inf).removesuffix("\n").removesuffix("\n...")


def place(cfg: TrainAllConfig, value: Any, earlier: list[str]) -> Any:
    """A value that begins with a stage's name as a path in that stage's folder; any other value unchanged."""
    head = value.split("/")[0] if isinstance(value, str) else ""
    if head in cfg.stages and head not in earlier:
        raise UserError(f"{value} belongs to a stage that comes later: put stage '{head}' before the one that needs it")
    return str(Path(cfg.out) / value) if head in cfg.stages else value


def finished(path: Path, recipes: dict[str, list[str]]) -> dict[str, Any]:
    """The finished stages, whatever the number of processes and the folder. Raises `UserError` if one was done with other settings."""
    if not path.is_file():
        return {}
    try:
        done = parse_json(path.read_text(encoding="utf-8"))
        words = {name: list(map(str, stage["words"])) for name, stage in done.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}): delete it; stages that are finished then end at once") from None
    for name, stage in done.items():
        if name in recipes and words[name] != recipes[name]:
            was, now = (shlex.join(sorted({*a} - {*b})) for a, b in ((stage["words"], recipes[name]), (recipes[name], stage["words"])))
            raise UserError(f"{path.parent} has stage '{name}' done with {was}, and {now} is asked for: give another out")
    return {name: stage for name, stage in done.items() if name in recipes}


def command(stage: str, arguments: list[str], processes: int) -> list[str]:
    """The command to start. Accelerate's launcher starts several CPU processes through MPI only; torchrun starts them and GPUs alike."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes > 1 else []
    return [sys.executable, *launcher, "-m", f"kling_programs.train.{PROGRAMS[stage]}", *arguments]


def run(arguments: list[str], title: str) -> None:
    """Run a program to its end. A signal to stop is passed on: the stage saves, and both exit."""
    child, asked = subprocess.Popen(arguments), []

    def hand_on(number: int, _: object) -> None:
        asked.append(number)
        child.send_signal(number)

    before = {number: signal.signal(number, hand_on) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        code = child.wait()
    except KeyboardInterrupt:  # the terminal has sent it to the child too
        asked.append(signal.SIGINT)
        code = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if asked or code == EXIT_STOPPED:
        print(f"{title}: stopped; run the same command to continue", file=sys.stderr)
        raise SystemExit(EXIT_STOPPED)
    if code:
        print(f"error: {title} ended with exit code {code}, see the lines above; run the same command to continue", file=sys.stderr)
        raise SystemExit(code if code > 0 else 1)


if __name__ == "__main__":
    main()
