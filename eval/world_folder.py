"""The folder of a run of `kling-eval world`: its settings, its clips, and the cases measured so far."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kling_programs.eval.cases import TASKS
from kling_programs.eval.common import found_only, write_json

from kling.errors import UserError
from kling.runtime.files import head, parse_json, written

PROTOCOL = 4  # raised when a case is asked or measured in another way: older measurements are then not mixed with new ones
READ = (3, PROTOCOL)  # protocols that a folder may hold: cases of 3 counted a camera that was not found, which is left out on reading
EXAMPLES = 400  # rendered clips to which the detectors are fitted
PICTURES = 64  # number of cases for tasks that need few
CONTROLS = 32  # number of cases in which controls, and the VAE alone, are measured
Record = dict[str, Any]  # of one case: "k", "seconds" of each generated clip, "rows" by who answered, then by task


@dataclass(frozen=True)
class Options:
    """The settings that determine a score, apart from the model. A folder has one set; `n`, the workers and the limit may change."""

    out: str
    n: int = 256
    seed: int = 0
    steps: int | None = None
    mode: str | None = None  # of the requests; None: the default
    examples: int = EXAMPLES
    tasks: tuple[str, ...] = ()  # of `TASKS`; none: all, and the VAE alone
    bf16: bool = False  # transformer, text encoder and VAE in bfloat16
    workers: int = 1
    ray: bool = False  # workers are processes of the Ray cluster that this process has joined, each with a GPU if it has some
    batch: int = 1  # cases that a worker samples at once
    limit_minutes: float | None = None

    @property
    def pictures(self) -> int:
        """Number of cases for tasks that need few."""
        return max(1, PICTURES // 2) if self.tasks else PICTURES

    @property
    def controls(self) -> int:
        """Number of cases in which controls are measured."""
        return max(1, CONTROLS // 4) if self.tasks else CONTROLS

    def cases(self, task: str) -> int:
        return min(self.n, self.pictures) if TASKS[task].few else self.n


def recorded(path: Path) -> dict[int, Record]:
    """The measured cases in a file, by k. A line that was cut off by a kill is removed."""
    if not path.is_file():
        return {}
    whole, newline, torn = path.read_bytes().rpartition(b"\n")
    if torn:
        with written(path) as temporary:
            temporary.write_bytes(whole + newline)
    records = {}
    for number, line in enumerate(whole.split(b"\n") if whole else (), 1):
        try:
            record = parse_json(line)
            for rows in record["rows"].values():
                rows |= {task: found_only(row) for task, row in rows.items()}
            records[record["k"]] = record
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} line {number} is damaged ({error}): remove the line, and its case is measured again") from None
    return records


def claim(out: Path, options: Options, model: dict[str, Any]) -> None:
    """Make the folder, or check that its contents come from the same model and options, and were measured in the same way."""
    mine = {
        "seed": options.seed,
        "steps": options.steps,
        "mode": options.mode,
        "tasks": list(options.tasks),
        "bf16": options.bf16,
        "weights": model.get("sha256"),
        "examples": options.examples,
        "protocol": PROTOCOL,
    }
    path = out / "run.json"
    if path.is_file():
        head(path)
        try:
            before = dict(parse_json(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise UserError(f"{path} is damaged ({error}): give another --out, or delete that folder's contents") from None
        before |= {"protocol": PROTOCOL} if before.get("protocol") in READ else {}
        if changed := [name for name in mine if before.get(name) != mine[name]]:
            raise UserError(f"{out} holds clips made with other {' and '.join(changed)}: give another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_json(path, mine)


def clip_path(out: str | Path, task: str, k: int) -> Path:
    return Path(out) / "clips" / task / f"{k:04d}.npz"
