"""Tasks a minute of `kling-serve` against its number of workers: the real program with the shipped model, asked over HTTP.

A worker has `--threads` threads. "busy %" is the share of the workers' time in which they made something: what is missing from 100 is the
server's own cost. "cpu s" is the processor time of server and workers for a task, which other processes of the machine hardly change.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from kling_programs.eval.benches.measure import Bench, Row

WORKERS = (1, 2, 4, 8, 16)
TASK = {"prompt": "a red ball rolls left on grass", "num_frames": 17}
START = 1800.0  # seconds to load the models, as many as the server gives them


def rows(bench: Bench) -> Iterator[Row]:
    most = torch.cuda.device_count() if bench.device.type == "cuda" else len(bench.cores or [0])
    for workers in WORKERS:
        if workers <= max(1, most // bench.threads if bench.device.type == "cpu" else most):
            with serving(bench, workers) as server:
                server.make(workers)  # the first ones are slower
                yield server.measured(4 if bench.quick else 12 * workers)


class Serving:
    """A running server."""

    def __init__(self, process: subprocess.Popen, url: str, workers: int) -> None:
        self.process, self.url, self.workers = process, url, workers
        end = time.monotonic() + START
        while self.health() < workers:
            if process.poll() is not None:
                raise RuntimeError(f"kling-serve has ended (exit code {process.returncode}): its last lines say why")
            if time.monotonic() > end:
                raise RuntimeError(f"kling-serve has {self.health()} of {workers} workers ready after {START:g} s")
            time.sleep(0.2)

    def ask(self, path: str, body: Any = None) -> bytes:
        data = None if body is None else json.dumps(body).encode()
        asked = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(asked, timeout=60) as reply:
            return reply.read()

    def health(self) -> int:
        """The number of ready workers."""
        try:
            return json.loads(self.ask("/healthz"))["workers"]
        except OSError:  # not listening yet, or 503
            return 0

    def make(self, count: int) -> list[dict[str, Any]]:
        """Have `count` tasks made, all asked for at once. Returns what the server tells about them."""
        names = {json.loads(self.ask("/v1/videos/text2video", TASK | {"seed": i}))["data"]["task_id"] for i in range(count)}
        while True:
            listed = [t for t in json.loads(self.ask("/v1/videos/text2video?pageSize=500"))["data"] if t["task_id"] in names]
            if all(task["task_status"] in ("succeed", "failed") for task in listed):
                return listed
            time.sleep(0.5)

    def spent(self) -> tuple[float, float]:
        """Seconds of processor time so far, and seconds in which workers made something."""
        server = psutil.Process(self.process.pid)
        times = [process.cpu_times() for process in (server, *server.children())]
        (making,) = re.findall(rb"^kling_made_seconds_sum (\S+)", self.ask("/metrics"), re.M)
        return sum(t.user + t.system for t in times), float(making)

    def measured(self, count: int) -> Row:
        """Wall time from the first request to the last result, as the server dates them."""
        before = self.spent()
        told = self.make(count)
        after = self.spent()
        row: Row = {"case": f"{self.workers} worker{'s' * (self.workers > 1)}, {count} tasks of {TASK['num_frames']} frames"}
        if failed := [task["task_status_msg"] for task in told if task["task_status"] == "failed"]:
            return row | {"wrong": f"{len(failed)} tasks failed: {failed[0]}"}
        seconds = (max(task["updated_at"] for task in told) - min(task["created_at"] for task in told)) / 1000
        cpu, making = (b - a for a, b in zip(before, after, strict=True))
        row |= {"ours tasks/min": 60 * count / seconds, "cpu s": cpu / count, "busy %": 100 * making / (self.workers * seconds)}
        return row | {"axis": "workers", "size": self.workers, "line": f"{TASK['num_frames']} frames"}


@contextmanager
def serving(bench: Bench, workers: int) -> Iterator[Serving]:
    """A server with the shipped model, free to use all cores that this bench was given; it ends with the block."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="kling-bench-") as folder:
        words = ["--store", folder, "--port", str(port), "--workers", str(workers), "--threads", str(bench.threads), "--places", "1000"]
        program = [sys.executable, "-m", "kling_programs.sample.serve", *words, "--rate", "100000", "--drain", "0"]
        here = os.sched_getaffinity(0) if bench.cores else None
        if bench.cores:
            os.sched_setaffinity(0, bench.cores)  # which children inherit
        process = subprocess.Popen([*program, "--device", bench.device.type], stdout=subprocess.DEVNULL)
        if here:
            os.sched_setaffinity(0, here)
        try:
            yield Serving(process, f"http://127.0.0.1:{port}", workers)
        finally:
            process.terminate()
            process.wait(60)
