"""`kling-sample --prompts FILE.jsonl`: many requests, one a line, shared over the processes of `accelerate launch`.

    {"prompt": "a red ball rolls left on grass"}
    {"prompt": "the ball rolls on", "image": "first.png", "camera": "pan=5", "seed": 7, "name": "second"}

A line has the fields of `kling.sampling.request.Request`, for which the options of the command line are defaults; files are relative to the
folder of FILE. Without a seed it is the number of the line, counted from 0, plus --seed. `name` names the output. A line is done when its
record lies beside its output: started again, the program goes on where it was.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kling.errors import UserError, unknown

RESULTS = "results.jsonl"  # a line for each result, beside the outputs
NOT_WITH = ("prompt", "image_only", "num_videos", "save_latents", "context_parallel", "replay", "enhance")  # options of one request
LONGEST_NAME = 200  # bytes; most file systems take 255, with the suffixes of the output and its record
EXIT_SOME_FAILED = 1


@dataclass(eq=False)
class Line:
    """One request: its number in the file from 0, and where its output goes."""

    number: int
    request: Any
    path: Path


def many(args: argparse.Namespace) -> None:
    """Make all lines of `args.prompts` that are not made yet. Exit code 1 if some could not be made."""
    from kling_programs.sample import generate

    check_options(args)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    folder = Path(args.output or "out")
    kind = generate.chosen_format(args, None)
    lines = read_lines(args, folder, generate.FORMATS[kind][0])
    todo = dict.fromkeys(line for line in lines if not is_made(line, args.overwrite))
    mine = [line for line in lines[rank::world] if line in todo]  # by place in the file: processes may find others' results already
    if not rank:
        shared = f", shared over {world} processes" if world > 1 else ""
        print(f"{args.prompts}: {len(lines)} requests, {len(lines) - len(todo)} made already{shared}", flush=True)
    if not mine:
        return

    import torch

    from kling.data.video import frame_rate
    from kling.runtime.precision import describe
    from kling.sampling import record as records
    from kling.sampling.machine import Machine, pick_device, set_up

    if args.device is None and world > 1 and torch.cuda.is_available():
        args.device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    device = pick_device(args.device)
    model_folder, pipe = generate.load_pipeline(args.model, args.device, generate.loading(args, [line.request for line in mine]))
    if not rank:
        print(describe(generate.precision_of(pipe), device.type), file=sys.stderr, flush=True)
    generate.check_fast([line.request for line in mine], args)
    plans = [planned(pipe, line, args.prompts) for line in mine]  # every mistake is told before anything is made
    if not rank and (unknown_words := generate.unknown_to_the_model(pipe, [line.request for line in todo])):
        print(unknown_words, file=sys.stderr, flush=True)  # once, of all lines
    if args.cache and len(steps := sorted({plan.num_inference_steps for plan in plans})) > 1:
        raise UserError(
            f"--cache {args.cache} is set up for one number of steps, and {args.prompts} asks for {steps}: give it lines of one"
        )
    if args.dry_run:
        for line, plan in zip(mine, plans, strict=True):
            print(f"{line.number}: {generate.describe(plan, line.request)} · {line.path}", flush=True)
        return
    set_up(pipe, Machine(**generate.given(args, generate.MACHINE)), device, plans[0].num_inference_steps)
    model, failed = generate.model_hashes(model_folder, args), 0
    for line, plan in zip(mine, plans, strict=True):
        began = time.perf_counter()
        try:
            frames, _ = generate.sample(pipe, line.request, plan)  # uint8 (T, H, W, 3)
            fps = float(frame_rate(plan.fps if args.fps is None else args.fps))
            generate.write_frames(line.path, kind, frames, fps, overwrite=True)  # only what has no record is there
        except UserError as error:
            failed += 1
            tell(folder, {"line": line.number, "error": str(error)})
            continue
        seconds = round(time.perf_counter() - began, 2)
        output = {"path": str(line.path.absolute()), "format": kind, "fps": fps, "seconds": seconds}
        command = f"kling-sample --prompts {args.prompts} (line {line.number})"
        dtype = generate.precision_of(pipe)
        record = records.make_record(line.request, plan, model, device, frames, dtype, output=output, command=command)
        records.write_record(records.record_path(line.path), record)
        said = {"line": line.number, "output": str(line.path), "seed": line.request.seed, "seconds": seconds}
        tell(folder, said | {"sha256": record["frames"]["sha256"]})
    if failed:
        print(f"{failed} requests could not be made: {folder / RESULTS} says why", file=sys.stderr, flush=True)
        raise SystemExit(EXIT_SOME_FAILED)


def check_options(args: argparse.Namespace) -> None:
    """Raises `UserError` for options that belong to one request."""
    for name in NOT_WITH:
        if getattr(args, name, None) not in (None, False):
            raise UserError(
                f"--prompts makes many requests: leave out {'the prompt' if name == 'prompt' else '--' + name.replace('_', '-')}"
            )
    if (args.cache or "").startswith("calibrate"):
        raise UserError("--prompts makes many requests: calibrate the cache with one")
    if args.output and Path(args.output).suffix and not os.path.isdir(args.output):
        raise UserError(f"--prompts needs a folder for --output, not '{args.output}'")


def read_lines(args: argparse.Namespace, folder: Path, suffix: str) -> list[Line]:
    """All requests of the file. Raises `UserError` with the number of the first line that is none."""
    from kling_programs.sample import generate

    from kling.sampling.request import Request
    from kling.sampling.rows import request_rows

    file = Path(args.prompts)
    names = [field.name for field in dataclasses.fields(Request) if field.name != "num_videos"]
    defaults = generate.given(args, names) | generate.given_tracks(args)
    first_seed = defaults.pop("seed", 0)
    found: list[Line] = []
    taken: dict[Path, int] = {}
    for number, fields in ((number - 1, fields) for number, fields in request_rows(file)):
        name = fields.pop("name", None)
        for field in fields:
            if field not in names:
                raise UserError(f"{file} line {number + 1}: {unknown('field', field, [*names, 'name'])}")
        if name is not None and not is_file_name(name):
            raise UserError(f"{file} line {number + 1}: name {str(name)[:60]!r} is no file name: leave out folders and the suffix")
        try:
            request = Request(**{"seed": first_seed + number} | defaults | fields)
        except UserError as error:
            raise UserError(f"{file} line {number + 1}: {error}") from None
        stem = name or f"{number:06d}-{generate.slug(request.prompts[0])}-{request.seed}"
        path = folder / f"{stem}{suffix}"
        if path in taken:
            raise UserError(f"{file} line {number + 1}: name '{stem}' is that of line {taken[path] + 1}: choose another")
        taken[path] = number
        found.append(Line(number, request, path))
    if not found:
        raise UserError(f"--prompts {file} has no line: write objects, one a line")
    return found


def is_file_name(name: Any) -> bool:
    """Whether a file can have that name, with a suffix and a record beside it."""
    if not isinstance(name, str) or Path(name).name != name or name in ("", ".", "..") or "\0" in name:
        return False
    return len(name.encode(errors="replace")) <= LONGEST_NAME and name.isprintable()


def is_made(line: Line, overwrite: bool | None) -> bool:
    """Whether the record of the same request lies beside the output. Raises `UserError` if it is another request's."""
    from kling.sampling.record import read_record, record_path

    record = record_path(line.path)
    if overwrite or not record.is_file() or not line.path.exists():
        return False
    if read_record(record)["request"] != json.loads(json.dumps(dataclasses.asdict(line.request))):
        raise UserError(
            f"{line.path} was made from another request than line {line.number + 1}: choose another --output, or add --overwrite"
        )
    return True


def planned(pipe: Any, line: Line, file: str) -> Any:
    try:
        return pipe.plan(line.request)
    except UserError as error:
        raise UserError(f"{file} line {line.number + 1}: {error}") from None


def tell(folder: Path, result: dict[str, Any]) -> None:
    """One line on the screen and in the results, which several processes may write."""
    text = json.dumps(result, ensure_ascii=False)
    print(text, flush=True)
    folder.mkdir(parents=True, exist_ok=True)  # nothing may have been made yet
    with (folder / RESULTS).open("a", encoding="utf-8") as file:  # one write: lines do not mix
        file.write(text + "\n")
