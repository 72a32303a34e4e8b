"""The workers of a server: a thread for each, which claims a task, has it made, and hands the result to the store.

Where a worker lives, in a process of this machine or in a Ray actor anywhere, is its own business: see `ProcessWorker` and `cluster.py`.
"""

from __future__ import annotations

import json
import logging
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any, Protocol

from kling_programs.sample.server.store import Store, Task
from kling_programs.sample.server.worker import Setup

from kling.errors import UserError
from kling.sampling.rows import located

log = logging.getLogger(__name__)

LEASE = 900.0  # seconds without a sign of life after which a worker counts as dead; a step of a large model takes minutes on a CPU
START = 1800.0  # seconds to load a model
HELD = LEASE + 60.0  # seconds of the store's lease: longer, so that whoever waits for a worker tells of its death first
POLL = 1.0
PROGRAM = (sys.executable, "-m", "kling_programs.sample.server.worker")


class Worker(Protocol):
    """One place where tasks are made, one at a time."""

    def ready(self) -> str:
        """Wait until the model is loaded; the device. Raises `UserError` if it cannot be."""

    def make(self, task: Task) -> Iterator[dict[str, Any]]:
        """Make a task under its lease. Yields the lines of `worker.py`; without a last one the worker has died."""

    def stop(self, task: Task) -> None:
        """Nobody wants this task any more."""

    def alive(self) -> bool: ...

    def close(self) -> None: ...


class ProcessWorker:
    """A worker in a process of its own on this machine."""

    def __init__(self, store: Store, setup: Setup, program: Sequence[str] = PROGRAM) -> None:
        self.store = store
        self.process = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8", bufsize=1)
        self.lines: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._say(asdict(setup))
        threading.Thread(target=self._listen, name=f"worker {self.process.pid}", daemon=True).start()

    def _say(self, line: dict[str, Any]) -> None:
        try:
            self.process.stdin.write(json.dumps(line) + "\n")
            self.process.stdin.flush()
        except (OSError, ValueError):
            pass  # it is dead, which its silence tells

    def _listen(self) -> None:
        for line in self.process.stdout:
            try:
                self.lines.put(json.loads(line))
            except ValueError:
                log.error("worker %d said %r", self.process.pid, line[:200])
        self.lines.put(None)

    def ready(self) -> str:
        line = self._next(START)
        if line is None:
            self.close()
            raise UserError(f"a worker ended while it loaded the model (exit code {self.process.returncode}): its last lines say why")
        return line["ready"]

    def make(self, task: Task) -> Iterator[dict[str, Any]]:
        folder = self.store.folder
        self._say({"make": task.claim, "request": located(task.request, folder), "output": str(folder / "made" / task.claim)})
        while line := self._next(LEASE):
            yield line
            if "step" not in line:
                return
        self.close()  # dead, or silent for too long

    def stop(self, task: Task) -> None:
        self._say({"stop": task.claim})

    def _next(self, seconds: float) -> dict[str, Any] | None:
        try:
            return self.lines.get(timeout=seconds)
        except queue.Empty:
            return None

    def alive(self) -> bool:
        return self.process.poll() is None

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


class Pool:
    """Keeps `count` workers at work. start: makes that of a slot. told(what, seconds): for the figures."""

    def __init__(self, store: Store, count: int, start: Callable[[int], Worker], told: Callable[[str, float], None]) -> None:
        self.store, self.start_worker, self.told = store, start, told
        self.ready: set[int] = set()  # slots with a loaded worker
        self._stopping = threading.Event()
        self._workers: dict[int, Worker] = {}
        self._threads = [threading.Thread(target=self._run, args=(slot,), name=f"slot {slot}", daemon=True) for slot in range(count)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self, seconds: float) -> None:
        """Claim nothing more, and give running tasks some seconds to end; the others wait for the next start."""
        self._stopping.set()
        with self.store.changed:
            self.store.changed.notify_all()
        end = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        for worker in list(self._workers.values()):
            worker.close()
        for thread in self._threads:
            thread.join(10)

    def _run(self, slot: int) -> None:
        wait = 1.0
        while not self._stopping.is_set():
            try:
                worker = self._workers[slot] = self.start_worker(slot)
                log.info("worker %d is ready: %s", slot, worker.ready())
                self.ready.add(slot)
                wait = 1.0
                while not self._stopping.is_set() and worker.alive():
                    if task := self._claim():
                        self._make(worker, task)
            except UserError as error:
                if not self._stopping.is_set():  # which ends those that are loading
                    log.error("%s", error)
            except Exception:  # whatever a worker or the disk failed of, the slot goes on: with a new worker, after a while
                log.exception("slot %d", slot)
            self.ready.discard(slot)
            if slot in self._workers:
                self._workers.pop(slot).close()
            if not self._stopping.is_set():
                self._stopping.wait(wait)
                wait = min(60.0, 2 * wait)

    def _claim(self) -> Task | None:
        with self.store.changed:
            task = self.store.claim(HELD)
            if task is None:
                self.store.changed.wait(POLL)
            return task

    def _make(self, worker: Worker, task: Task) -> None:
        """One task under its lease: made, failed, cancelled, or to be made again."""
        self.told("waited", task.started - task.created)
        ended = False
        try:
            for line in worker.make(task):
                ended = "step" not in line
                if not ended:
                    if not self.store.extend(task, line["step"], line["of"], HELD):
                        worker.stop(task)
                elif "made" not in line:
                    reason = line.get("failed", "cancelled")
                    self.store.fail(task, reason.replace(f"{self.store.folder.absolute()}/", ""))
                elif self.store.finish(task, f"made/{task.claim}.{line['made']['kind']}", line["made"]):
                    self.told("made", time.time() - task.started)
        finally:
            if not ended:
                log.warning("the worker of task %s died (lease %d)", task.id, task.lease)
                self.store.release(task, died=not self._stopping.is_set())
