"""A worker: a process that holds the pipeline and makes one task after another. It talks to its server in lines of JSON.

    server -> worker   {"make": NAME, "request": {...}, "output": PATH}      {"stop": NAME}
    worker -> server   {"ready": DEVICE}   {"step": i, "of": n}   {"made": {...}}   {"failed": LINE}   {"stopped": true}

It ends when its server does, at once: the pipe from it closes, however the server died.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kling.errors import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Setup:
    """What a worker loads. model: a folder, or None for the shipped one. device: by default the first GPU. threads: CPU threads, or 0 for
    PyTorch's own number."""

    model: str | None = None
    device: str | None = None
    threads: int = 0


class Stopped(Exception):
    """Nobody wants this task any more."""


class Maker:
    """The pipeline, ready to make requests."""

    def __init__(self, setup: Setup) -> None:
        import torch
        from kling_programs.sample.generate import load_pipeline, precision_of

        from kling.runtime.precision import describe
        from kling.sampling.machine import pick_device
        from kling.sampling.record import model_hashes

        if setup.threads:
            torch.set_num_threads(setup.threads)
        folder, self.pipe = load_pipeline(setup.model, setup.device)
        self.device = pick_device(setup.device)
        self.pipe.to(self.device)
        self.pipe.set_progress_bar_config(disable=True)
        self.model, self.precision = model_hashes(folder), precision_of(self.pipe)
        print(describe(self.precision, self.device.type), file=sys.stderr, flush=True)

    def make(self, fields: dict[str, Any], output: Path, tell: Callable[[int, int], None]) -> dict[str, Any]:
        """Make the video of a request and write it to `output`.mp4 (a single frame: .png), and beside it its record.

        tell(step, of) is called after every step and may raise `Stopped`. Returns what the task's result says.
        Raises `UserError` for what cannot be made.
        """
        import torch

        from kling.data.image import write_png
        from kling.data.video import write_video
        from kling.sampling.record import make_record, record_path, write_record
        from kling.sampling.request import Request

        began, request = time.perf_counter(), Request(**fields)
        plan = self.pipe.plan(request)

        def step(pipe: Any, i: int, timestep: Any, kwargs: dict) -> dict:
            tell(i + 1, plan.total_steps)
            return kwargs

        try:
            frames = self.pipe(request, callback_on_step_end=step, output_type="np").frames[0]  # (T, H, W, 3) uint8
        except torch.OutOfMemoryError:
            raise UserError("the device has no room for this: ask for fewer seconds or a smaller size") from None
        kind = "mp4" if len(frames) > 1 else "png"
        output = output.with_name(f"{output.name}.{kind}")
        if kind == "mp4":
            write_video(output, frames, plan.fps)
        else:
            write_png(output, frames[0])
        seconds = round(time.perf_counter() - began, 2)
        told = {"path": str(output.absolute()), "format": kind, "fps": plan.fps, "seconds": seconds}
        record = make_record(
            request,
            plan,
            self.model,
            self.device,
            frames,
            self.precision,
            output=told,
            command=f"kling-sample --replay {record_path(output)}",
        )
        write_record(record_path(output), record)
        return {
            "kind": kind, "seconds": len(frames) / plan.fps, "frames": len(frames), "width": plan.width, "height": plan.height,
            "fps": plan.fps, "seed": request.seed, "task": plan.task, "took": seconds, "sha256": record["frames"]["sha256"],
        }  # fmt: skip


def outcome(maker: Maker, job: dict[str, Any], tell: Callable[[int, int], None]) -> dict[str, Any]:
    """The last line about a job: what was made, or why nothing was."""
    try:
        return {"made": maker.make(job["request"], Path(job["output"]), tell)}
    except Stopped:
        return {"stopped": True}
    except UserError as error:
        return {"failed": str(error)}
    except Exception as error:
        log.exception("a task failed")
        return {"failed": f"it could not be made ({type(error).__name__}): the server's log has the reason"}


def main(maker: Callable[[Setup], Any] = Maker) -> None:
    """Read jobs from the standard input until it closes. maker: makes what has `make` and `device`."""
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # whatever a library prints must not mix with the lines
    jobs: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    stopped: set[str] = set()

    def listen() -> None:
        for line in sys.stdin:
            job = json.loads(line)
            if "stop" in job:
                stopped.add(job["stop"])
            else:
                jobs.put(job)
        os._exit(0)  # the server is gone: what is being made has no owner

    def say(line: dict[str, Any]) -> None:
        print(json.dumps(line), file=lines, flush=True)

    setup = Setup(**json.loads(sys.stdin.readline()))
    threading.Thread(target=listen, name="server", daemon=True).start()
    made_ready = maker(setup)
    say({"ready": str(made_ready.device)})
    while True:
        job = jobs.get()

        def tell(step: int, of: int, name: str = job["make"]) -> None:
            if name in stopped:
                raise Stopped
            say({"step": step, "of": of})

        say(outcome(made_ready, job, tell))


if __name__ == "__main__":
    logging.basicConfig(format="worker: %(message)s")
    try:
        main()
    except UserError as error:
        print(json.dumps({"failed": str(error)}), file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        sys.exit(1)
