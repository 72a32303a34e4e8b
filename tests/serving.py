"""A running `kling-serve` for the tests: on a tiny random model, with workers in this process."""

from __future__ import annotations

import base64
import io
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("jwt")
pytest.importorskip("prometheus_client")

import uvicorn
from kling_programs.sample import serve
from kling_programs.sample.server import callbacks
from kling_programs.sample.server.app import Figures, Server, build
from kling_programs.sample.server.desk import Desk, Rules
from kling_programs.sample.server.fetch import Reach
from kling_programs.sample.server.keys import Keys
from kling_programs.sample.server.pool import Pool
from kling_programs.sample.server.store import DONE, FAILED, Limits, New, Store
from kling_programs.sample.server.worker import Maker, Setup, outcome
from PIL import Image
from test_generate import save_tiny

from kling.sampling.rows import located

HTTP = httpx.Client(verify=False, timeout=300)  # one for all: each loads certificates, which costs more than a request
KEYS = {"anna": "a" * 32, "ben": "b" * 32}
SHORT = {"prompt": "a red ball", "duration": "2", "seed": 5}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny(folder, ["text", "image", "last", "first_last", "continuation", "camera"])
    return folder


@pytest.fixture(scope="session")
def maker(tiny: Path) -> Maker:
    return Maker(Setup(str(tiny), "cpu"))


class Here:
    """A worker in a thread of this process. `held`: while it is set, nothing is made."""

    def __init__(self, store: Store, maker: Any, held: threading.Event | None = None) -> None:
        self.store, self.maker, self.held = store, maker, held

    def ready(self) -> str:
        return "cpu"

    def make(self, task: Any) -> Iterator[dict]:
        while self.held is not None and self.held.is_set():
            time.sleep(0.01)
            yield {"step": 0, "of": 1}
        folder = self.store.folder
        job = {"request": located(task.request, folder), "output": str(folder / "made" / task.claim)}
        yield outcome(self.maker, job, lambda step, of: None)

    def stop(self, task: Any) -> None: ...

    def alive(self) -> bool:
        return True

    def close(self) -> None: ...


class Client:
    """Requests to a server, as one of its keys."""

    def __init__(self, url: str, key: str | None = "anna") -> None:
        self.url, self.key = url, key

    def __call__(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        if self.key is not None and "Authorization" not in headers:
            headers["Authorization"] = f"Bearer {KEYS[self.key]}"
        reply = HTTP.request(method, self.url + path if path.startswith("/") else path, json=body, headers=headers)
        kind = reply.headers.get("content-type", "")
        return reply.status_code, reply.json() if kind.startswith("application/json") else reply.content

    def make(self, kind: str, body: dict, **headers: str) -> dict:
        """The data of a new task."""
        status, said = self("POST", f"/v1/videos/{kind}", body, **headers)
        assert (status, said["code"]) == (200, 0), said
        return said["data"]

    def wait(self, kind: str, name: str, every: float = 0.05) -> dict:
        """The data of a task that has ended; asked for `every` seconds."""
        for _ in range(1200):
            status, said = self("GET", f"/v1/videos/{kind}/{name}")
            assert status == 200, said
            if said["data"]["task_status"] in (DONE, FAILED):
                return said["data"]
            time.sleep(every)
        raise AssertionError(f"{name} does not end: {said}")


@pytest.fixture
def start(tiny: Path, maker: Maker, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """start(keys, rules, limits, workers, held, by) -> the `Client` of a running server, with its parts."""
    running = []

    def run(
        keys: dict | None = None,
        rules: Rules | None = None,
        limits: Limits | None = None,
        workers: int = 1,
        held: Any = None,
        by: Any = None,
    ) -> Client:
        folder = tmp_path / f"store{len(running)}"
        store = Store(folder, limits)
        desk = Desk(store, str(tiny), rules or Rules(private=True))
        figures, who = Figures(store), Keys(KEYS if keys is None else keys)
        crew = Pool(store, workers, lambda slot: Here(store, by or maker, held), figures.told)
        server = Server(store, desk, who, crew, figures)
        sender = callbacks.Sender(store, server.callback, lambda key: who.secrets.get(key, "x" * 32), Reach(True), figures.sent)

        @asynccontextmanager
        async def lifespan():
            crew.start()
            sender.start()
            yield
            sender.stop()

        port = serve.open_port("127.0.0.1", 0)
        app = build(server, None if who.secrets else {"localhost"}, lifespan)
        host = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=host.run, args=([port],), daemon=True)
        thread.start()
        client = Client(f"http://127.0.0.1:{port.getsockname()[1]}", None if keys == {} else "anna")
        client.store, client.server, client.pool = store, server, crew
        running.append((host, thread, crew))
        while not crew.ready or not host.started:
            time.sleep(0.01)
        return client

    yield run
    for host, thread, crew in running:
        if hasattr(crew, "held"):
            crew.held.clear()
        host.should_exit = True
        thread.join(10)
        crew._stopping.set()


def png(width: int = 320, height: int = 320, seed: int = 0) -> str:
    """A picture as base64."""
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).resize((width, height)).save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()


def new(key: str = "anna", external: str | None = None, callback: str | None = None, **more: Any) -> New:
    return New(key, "text2video", {}, {"prompt": "x", "seed": 1}, "digest", "http://h", external, None, callback, **more)
