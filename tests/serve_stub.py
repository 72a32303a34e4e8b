"""A server's store, pool and worker processes around a maker that needs no model: what is killed in tests/test_serve.py.

serve_stub.py STORE     makes everything that waits there; prints its workers' process numbers when it has begun
serve_stub.py worker    is a worker
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kling_programs.sample.server import worker
from kling_programs.sample.server.pool import Pool, ProcessWorker
from kling_programs.sample.server.store import LIVE, Store

from kling.errors import UserError
from kling.runtime.lock import locked


class Stub:
    """Writes bytes that follow from the seed, in some steps. Prompts "kill", "error" and "long" do what they say."""

    device = "none"

    def __init__(self, setup: Any) -> None:
        pass

    def make(self, fields: dict[str, Any], output: Path, tell: Callable[[int, int], None]) -> dict[str, Any]:
        if fields["prompt"] == "kill":
            os._exit(9)
        if fields["prompt"] == "error":
            raise UserError("there are no balls")
        output = output.with_name(f"{output.name}.mp4")
        with output.open("wb") as file:
            for i in range(5 if fields["prompt"] != "long" else 5000):
                file.write(hashlib.sha256(f"{fields['seed']} {i}".encode()).digest())
                file.flush()
                time.sleep(0.02)
                tell(i + 1, 5)
        output.with_name(f"{output.name}.json").write_text("{}")
        return {"kind": "mp4", "seconds": 1, "seed": fields["seed"]}


def main(folder: str) -> None:
    with locked(folder, "store"):
        store = Store(Path(folder))
        store.recover()
        processes: list[ProcessWorker] = []

        def start(slot: int) -> ProcessWorker:
            processes.append(ProcessWorker(store, worker.Setup(), program=(sys.executable, __file__, "worker")))
            return processes[-1]

        pool = Pool(store, 2, start, lambda what, seconds: None)
        pool.start()
        while len(pool.ready) < 2:
            time.sleep(0.01)
        print(*(process.process.pid for process in processes), flush=True)
        while any(store.counts()[status] for status in LIVE):
            time.sleep(0.02)
        pool.stop(5)


if __name__ == "__main__":
    worker.main(Stub) if sys.argv[1] == "worker" else main(sys.argv[1])
