"""Workers as actors of a Ray cluster: Ray places and starts them, on any host; this server queues and keeps the results.

An actor gets a task's pictures with the task and gives the video back, so that the hosts share no file system. They need this package, at
the same version, and the model's folder under the same path. What an actor dies of, it dies of for one task: the pool starts another one,
wherever Ray has room, and the task waits again. If the server dies, Ray ends its actors.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kling_programs.sample.server.pool import FILES, LEASE, START
from kling_programs.sample.server.store import Store, Task
from kling_programs.sample.server.worker import Maker, Setup, Stopped, outcome

from kling.errors import UserError

LOOK = 0.5  # seconds between looks at how far a task is


def connect(address: str) -> None:
    """Join a cluster: "auto" is the one of this host, "local" a new one in this process, else HOST:PORT or ray://HOST:PORT."""
    try:
        import ray
    except ModuleNotFoundError:
        raise UserError("--ray needs Ray, which is not installed: pip install 'kling[ray]'") from None
    try:
        ray.init(None if address == "local" else address, log_to_driver=True, configure_logging=False)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        line = str(error).strip().splitlines()[0][:200]
        raise UserError(
            f"--ray {address}: there is no cluster ({line}): start one with 'ray start --head', or give its HOST:PORT"
        ) from None


class Actor:
    """Lives in the cluster. Two threads: one makes, the other tells how far it is."""

    def __init__(self, setup: dict[str, Any]) -> None:
        self.maker, self.at, self.stopped = Maker(Setup(**setup)), (0, 0), set()

    def device(self) -> str:
        import socket

        return f"{self.maker.device} of {socket.gethostname()}"

    def make(self, name: str, request: dict[str, Any], files: dict[str, tuple[str, bytes]]) -> dict[str, Any]:
        """A line of `worker.py`; one of success has the video and its record too. files: field -> (name, content)."""
        self.at = (0, 0)

        def tell(step: int, of: int) -> None:
            self.at = (step, of)
            if name in self.stopped:
                raise Stopped

        with tempfile.TemporaryDirectory(prefix="kling-serve-") as folder:
            for field, (kept, data) in files.items():
                request[field] = str(Path(folder) / Path(kept).name)
                Path(request[field]).write_bytes(data)
            output = Path(folder) / "video.mp4"
            line = outcome(self.maker, {"request": request, "output": str(output)}, tell)
            if "made" in line:
                line |= {"video": output.read_bytes(), "record": output.with_name("video.mp4.json").read_text(encoding="utf-8")}
            return line

    def progress(self) -> tuple[int, int]:
        return self.at

    def stop(self, name: str) -> None:
        self.stopped.add(name)


class RayWorker:
    """A worker of the pool, in an actor. gpus: that Ray keeps for it, or a part of one."""

    def __init__(self, store: Store, setup: Setup, gpus: float = 0.0, lease: float = LEASE) -> None:
        import ray

        self.ray, self.store, self.lease, self.dead = ray, store, lease, False
        options = {"num_cpus": setup.threads or 1, "num_gpus": gpus, "max_concurrency": 2, "scheduling_strategy": "SPREAD"}
        self.actor = ray.remote(Actor).options(**options).remote(asdict(setup))

    def ready(self) -> str:
        try:
            return self.ray.get(self.actor.device.remote(), timeout=START)
        except self.ray.exceptions.RayError as error:
            self.close()
            raise UserError(f"a worker could not start in the cluster: {str(error).strip().splitlines()[-1][:300]}") from None

    def make(self, task: Task) -> Iterator[dict[str, Any]]:
        named = {field: task.request[field] for field in FILES if task.request.get(field) is not None}
        files = {field: (name, (self.store.folder / name).read_bytes()) for field, name in named.items()}
        try:
            result = self.actor.make.remote(task.claim, task.request, files)
            seen, at = time.monotonic(), (0, 0)
            while not self.ray.wait([result], timeout=LOOK)[0]:
                now = self.ray.get(self.actor.progress.remote(), timeout=self.lease)
                seen, at = (seen if now == at else time.monotonic()), now
                if time.monotonic() - seen > self.lease:
                    raise self.ray.exceptions.GetTimeoutError("no step")
                yield {"step": at[0], "of": at[1]}
            line = self.ray.get(result)
        except self.ray.exceptions.RayError:
            self.close()
            return
        yield self._keep(task, line, named) if "made" in line else line

    def _keep(self, task: Task, line: dict[str, Any], named: dict[str, str]) -> dict[str, Any]:
        """Write what an actor gave back, its record in the names of this host."""
        name = f"made/{task.claim}.mp4"
        path, record = self.store.folder / name, json.loads(line["record"])
        for field, kept in named.items():
            there, here = record["request"][field], str((self.store.folder / kept).absolute())
            record["request"][field] = here
            record["inputs"][here] = record["inputs"].pop(there)
        record["output"]["path"] = str(path.absolute())
        record["command"] = f"kling-sample --replay {path}.json"
        path.write_bytes(line["video"])
        path.with_name(f"{path.name}.json").write_text(json.dumps(record, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        return {"made": line["made"], "file": name}

    def stop(self, task: Task) -> None:
        self.actor.stop.remote(task.claim)

    def alive(self) -> bool:
        return not self.dead

    def close(self) -> None:
        self.dead = True
        self.ray.kill(self.actor)
