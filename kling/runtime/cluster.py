"""A Ray cluster for work that processes of one machine share otherwise. Ray places the work, and does it again where a host was lost;
nothing is scheduled here.

    connect("auto")
    for result in shared(make, jobs, workers=8): ...      # make() on every host once, then make()(job) for each job, as they are done

Hosts need this package at the same version, and the files that the work reads and writes under the same paths.
"""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple, TypeVar

from kling.errors import UserError

Job = TypeVar("Job")
Result = TypeVar("Result")
ANSWER = 10.0  # seconds to wait for a cluster's head
RETRIES = 3  # of a job whose process or host was lost


class Room(NamedTuple):
    """CPUs and GPUs of a cluster."""

    cpus: int
    gpus: int


def connect(address: str) -> Room:
    """Join a cluster: "auto" is the one of this host, "local" a new one in this process, else HOST:PORT or ray://HOST:PORT.

    Raises `UserError` if there is none, or no Ray.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    given = address not in ("local", "auto")
    if given and (not host or "/" in host or not port.isdecimal() or not 0 < int(port) < 65536):
        raise UserError(f"--ray {address}: give auto, local, HOST:PORT or ray://HOST:PORT, such as head:6379")
    if address != "local":
        os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "1")  # of 40 s each; Ray's own 20 look like a hang
    try:
        import ray
    except ModuleNotFoundError:
        raise UserError("--ray needs Ray, which is not installed: pip install 'kling[ray]'") from None
    try:
        if given:
            socket.create_connection((host, int(port)), timeout=ANSWER).close()
        ray.init(None if address == "local" else address, log_to_driver=True, configure_logging=False)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        line = str(error).strip().splitlines()[0][:200]
        raise UserError(
            f"--ray {address}: there is no cluster ({line}): start one with 'ray start --head', or give its HOST:PORT"
        ) from None
    has = ray.cluster_resources()
    return Room(int(has.get("CPU", 0)), int(has.get("GPU", 0)))


def shared(make: Callable[[], Callable[[Job], Result]], jobs: Sequence[Job], workers: int, on_gpu: bool = False) -> Iterator[Result]:
    """`make()(job)` for each job, in order of completion, at most `workers` at once, each on a CPU of the cluster.

    on_gpu: and on a GPU, if the cluster has any. A process calls `make` once for all its jobs.
    Raises what a job raises, and `UserError` for one whose process dies again and again.
    """
    import ray

    gpus = min(1.0, ray.cluster_resources().get("GPU", 0.0)) if on_gpu else 0.0
    task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=RETRIES, scheduling_strategy="SPREAD")(_do)
    name, here, made, waiting = secrets.token_hex(8), os.getcwd(), ray.put(make), iter(jobs)
    running: list[Any] = []
    try:
        while True:
            running += [task.remote(name, here, made, job) for job in islice(waiting, workers - len(running))]
            if not running:
                return
            (done, *_), running = ray.wait(running)
            yield ray.get(done)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayError as error:
        line = str(error).strip().splitlines()[0][:200]
        raise UserError(f"a job was lost {RETRIES + 1} times in the cluster ({line}): see Ray's log of that host") from None
    finally:
        for one in running:
            ray.cancel(one, force=True)


_made: dict[str, Callable[[Any], Any]] = {}  # of this process: what `make` returned, by the name of its `shared`


def _do(name: str, folder: str, make: Callable[[], Callable[[Any], Any]], job: Any) -> Any:
    """One job, in a process of the cluster, with the same working folder as here."""
    if name not in _made:
        try:
            os.chdir(folder)
        except OSError:
            raise UserError(f"{folder} is not on host {os.uname().nodename}: all hosts of the cluster need it") from None
        _made.clear()
        _made[name] = make()
    return _made[name](job)
