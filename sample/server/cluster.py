"""Workers as actors of a Ray cluster: Ray places and starts them, on any host; this server queues and keeps the results.

An actor gets a task's pictures with the task and gives the video back, so that the hosts share no file system. They need this package, at
the same version, and the model's folder under the same path. What an actor dies of, it dies of for one task: the pool starts another one,
wherever Ray has room, and the task waits again. If the server dies, Ray ends its actors.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kling_programs.sample.server.pool import LEASE, START
from kling_programs.sample.server.store import Store, Task, names_of
from kling_programs.sample.server.worker import Maker, Setup, Stopped, outcome

from kling.errors import UserError
from kling.sampling.rows import located

LOOK = 0.5  # seconds between looks at how far a task is


class Actor:
    """Lives in the cluster. Two threads: one makes, the other tells how far it is."""

    def __init__(self, setup: dict[str, Any], maker: Callable[[Setup], Any]) -> None:
        self.maker, self.at, self.stopped = maker(Setup(**setup)), (0, 0), set()

    def device(self) -> str:
        import socket

        return f"{self.maker.device} of {socket.gethostname()}"

    def make(self, name: str, request: dict[str, Any], files: dict[str, bytes]) -> dict[str, Any]:
        """A line of `worker.py`; one of success has the video, its record, and the folder that this speaks of. files: by their names."""
        self.at = (0, 0)

        def tell(step: int, of: int) -> None:
            self.at = (step, of)
            if name in self.stopped:
                raise Stopped

        with tempfile.TemporaryDirectory(prefix="kling-serve-") as temporary:
            folder = Path(temporary)
            for part in ("inputs", "made"):
                (folder / part).mkdir()
            for kept, data in files.items():
                (folder / kept).write_bytes(data)
            line = outcome(self.maker, {"request": located(request, folder), "output": str(folder / "made" / name)}, tell)
            if "made" in line:
                video = folder / "made" / f"{name}.{line['made']['kind']}"
                record = video.with_name(f"{video.name}.json").read_text(encoding="utf-8")
                line |= {"video": video.read_bytes(), "record": record, "folder": temporary}
            return line

    def progress(self) -> tuple[int, int]:
        return self.at

    def stop(self, name: str) -> None:
        self.stopped.add(name)


class RayWorker:
    """A worker of the pool, in an actor. gpus: that Ray keeps for it, or a part of one. maker: makes what has `make` and `device`."""

    def __init__(self, store: Store, setup: Setup, gpus: float = 0.0, maker: Callable[[Setup], Any] = Maker) -> None:
        import ray

        self.ray, self.store, self.dead = ray, store, False
        options = {"num_cpus": setup.threads or 1, "num_gpus": gpus, "max_concurrency": 2, "scheduling_strategy": "SPREAD"}
        self.actor = ray.remote(Actor).options(**options).remote(asdict(setup), maker)

    def ready(self) -> str:
        try:
            return self.ray.get(self.actor.device.remote(), timeout=START)
        except self.ray.exceptions.RayError as error:
            self.close()
            raise UserError(f"a worker could not start in the cluster: {str(error).strip().splitlines()[-1][:300]}") from None

    def make(self, task: Task) -> Iterator[dict[str, Any]]:
        files = {name: (self.store.folder / name).read_bytes() for name in names_of(task.request)}
        try:
            result = self.actor.make.remote(task.claim, task.request, files)
            seen, at = time.monotonic(), (0, 0)
            while not self.ray.wait([result], timeout=LOOK)[0]:
                now = self.ray.get(self.actor.progress.remote(), timeout=LEASE)
                seen, at = (seen if now == at else time.monotonic()), now
                if time.monotonic() - seen > LEASE:
                    raise self.ray.exceptions.GetTimeoutError("no step")
                yield {"step": at[0], "of": at[1]}
            line = self.ray.get(result)
        except self.ray.exceptions.RayError:
            self.close()
            return
        yield self._keep(task, line) if "made" in line else line

    def _keep(self, task: Task, line: dict[str, Any]) -> dict[str, Any]:
        """Write what an actor gave back, its record in the names of this host."""
        path = self.store.folder / "made" / f"{task.claim}.{line['made']['kind']}"
        path.write_bytes(line["video"])
        record = line["record"].replace(line["folder"], str(self.store.folder.absolute()))
        path.with_name(f"{path.name}.json").write_text(record, encoding="utf-8")
        return {"made": line["made"]}

    def stop(self, task: Task) -> None:
        self.actor.stop.remote(task.claim)

    def alive(self) -> bool:
        return not self.dead

    def close(self) -> None:
        self.dead = True
        self.ray.kill(self.actor)
