"""Serve the model over HTTP, in the format of Kling's own interface: point a client's base URL at it.

kling-serve                                    # http://127.0.0.1:8000, the shipped model; /docs lists the methods
kling-serve --model runs/dit/export --workers 4
kling-serve --listen --keys keys.json --url https://video.example.org
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import secrets
import socket
import sqlite3
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from kling_programs.sample.command import Parser, limits
from kling_programs.sample.server.fetch import check_url

from kling.errors import UserError, program, unknown

if TYPE_CHECKING:
    from kling_programs.sample.server.pool import Worker
    from kling_programs.sample.server.store import Store

MOST = 1000  # workers, or threads of one
HOUSEKEEPING = 600.0  # seconds between looks for results and pictures that are not needed any more


@program
def main(argv: list[str] | None = None) -> None:
    args = parse(sys.argv[1:] if argv is None else argv)
    try:
        import uvicorn
        from kling_programs.sample.server.app import Figures, Server, build
        from kling_programs.sample.server.callbacks import Sender
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("fastapi", "uvicorn", "prometheus_client", "jwt", "starlette", "pydantic"):
            raise
        raise UserError(f"kling-serve needs {error.name}, which is not installed: pip install 'kling[serve]'") from None
    from kling_programs.sample.server.desk import Desk, Rules
    from kling_programs.sample.server.fetch import Reach
    from kling_programs.sample.server.keys import read_keys
    from kling_programs.sample.server.pool import Pool
    from kling_programs.sample.server.store import Limits, Store

    from kling.runtime.lock import locked

    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    keys = read_keys(args.keys)
    if args.ray is None:
        check_device(args.device)
    listener = open_port("0.0.0.0" if args.listen else "127.0.0.1", args.port)
    with locked(args.store, "store"):
        store = Store(Path(args.store), Limits(args.places, args.rate, args.days))
        rules = Rules(args.strict, args.convention, args.allow_private, not args.no_urls)
        desk = Desk(store, args.model, rules)
        figures = Figures(store)
        if again := store.recover():
            print(f"{again} tasks were being made when the last server ended: they are made again", file=sys.stderr, flush=True)
        pool = Pool(store, args.workers, workers_of(args, store), figures.told)
        server = Server(store, desk, keys, pool, figures, args.url)
        own = secret_of_callbacks(store.folder)
        sender = Sender(store, server.callback, lambda key: keys.secrets.get(key, own), Reach(args.allow_private), figures.sent)

        @asynccontextmanager
        async def lifespan() -> AsyncIterator[None]:
            over = threading.Event()
            keeper = threading.Thread(target=keep_house, args=(store, over), name="housekeeping", daemon=True)
            for part in (pool, sender, keeper):
                part.start()
            yield
            over.set()
            await asyncio.to_thread(pool.stop, args.drain)
            await asyncio.to_thread(sender.stop)

        app = build(server, None if keys.secrets else {"localhost"}, lifespan)
        config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=5, server_header=False)
        name = socket.gethostname() if args.listen else "127.0.0.1"
        print(f"kling-serve: {args.url or f'http://{name}:{args.port}'}  (/docs lists the methods; Ctrl+C ends it)", flush=True)
        uvicorn.Server(config).run(sockets=[listener])
        store.close()


def workers_of(args: argparse.Namespace, store: Store) -> Callable[[int], Worker]:
    """How a worker is made: a process of this machine, each with its GPU or its share of the cores, or an actor of a Ray cluster."""
    from kling_programs.sample.server.pool import ProcessWorker
    from kling_programs.sample.server.worker import Setup

    if args.ray is not None:
        from kling_programs.sample.server.cluster import RayWorker

        from kling.runtime.cluster import connect

        connect(args.ray)
        return lambda slot: RayWorker(store, Setup(args.model, args.device, args.threads), args.gpus_per_worker)
    import torch

    cards = torch.cuda.device_count() if args.device in (None, "cuda") else 0
    threads = args.threads or max(1, torch.get_num_threads() // args.workers)
    return lambda slot: ProcessWorker(store, Setup(args.model, f"cuda:{slot % cards}" if cards else args.device, threads))


def check_device(name: str | None) -> None:
    """Raises `UserError` for a device that this machine lacks: a worker would tell it only after the port is open. Nothing is put there."""
    import torch

    try:
        device = torch.device(name or "cpu")
    except RuntimeError as error:
        raise UserError(f"device '{name}' cannot be used ({str(error).splitlines()[0]}): try --device cpu") from None
    kind = getattr(torch, device.type, None)
    there = 1 if device.type == "cpu" else kind.device_count() if hasattr(kind, "device_count") else 0
    if (device.index or 0) >= there:
        raise UserError(f"device '{name}' cannot be used (this machine has {there} of them): try --device cpu")


def keep_house(store: Store, over: threading.Event) -> None:
    """Delete what is not needed any more, until the server ends."""
    while not over.wait(HOUSEKEEPING):
        try:
            while store.expire() and not over.is_set():
                pass  # a thousand at a time
            store.tidy()
        except (OSError, sqlite3.Error):
            logging.exception("housekeeping")


def secret_of_callbacks(folder: Path) -> str:
    """The secret that signs the callbacks of a server without keys; made at the first start."""
    path = folder / "callback.secret"
    if not path.is_file() or not path.read_text():
        with suppress(FileNotFoundError):
            (part := path.with_suffix(".part")).unlink()
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
        part.replace(path)  # whole or not at all: an empty secret would sign for anybody
    return path.read_text()


def open_port(host: str, port: int) -> socket.socket:
    """A listening socket. Raises `UserError` if the port is taken."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(1024)
    except OSError as error:
        listener.close()
        raise UserError(f"port {port} cannot be used ({error.strerror}): choose another with --port") from None
    return listener


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser("kling-serve", __doc__)
    parser.add_argument("--model", metavar="FOLDER", help="default: the shipped one")
    parser.add_argument("--store", metavar="FOLDER", default="out/serve", help="tasks, pictures and results (out/serve)")

    add = parser.add_argument_group("network").add_argument
    add("--port", metavar="N", type=int, default=8000)
    add("--listen", action="store_true", help="allow other machines; needs --keys")
    add("--keys", metavar="FILE", help='JSON {"ACCESS": "SECRET"} of mode 0600: clients send a JWT signed with the secret, or the secret')
    add("--url", metavar="URL", help="the server's address as clients know it, such as https://video.example.org behind a proxy")
    add("--allow-private", action="store_true", help="callbacks and picture URLs may lead into private networks")
    add("--no-urls", action="store_true", help="fetch no picture URLs: pictures come as base64")

    add = parser.add_argument_group("workers").add_argument
    add("--workers", metavar="N", type=int, default=1, help="processes with the model, each with a GPU or a share of the cores (1)")
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1, …; default: one GPU for each worker if there are some")
    add("--threads", metavar="N", type=int, default=0, help="CPU threads of a worker; default: the cores, shared between them")
    add("--ray", metavar="ADDRESS", help="workers are actors of this Ray cluster: auto, local or HOST:6379")
    add("--gpus-per-worker", metavar="X", type=float, default=0.0, help="GPUs that Ray keeps for each (0)")
    add(
        "--drain",
        metavar="SECONDS",
        type=float,
        default=30.0,
        help="at the end, time for running tasks; others wait for the next start (30)",
    )

    add = parser.add_argument_group("limits").add_argument
    add("--places", metavar="N", type=int, default=100, help="unfinished tasks of one key (100)")
    add("--rate", metavar="N", type=int, default=600, help="new tasks of one key in a minute (600)")
    add("--days", metavar="N", type=float, default=30.0, help="that a result is kept (30)")

    add = parser.add_argument_group("wire").add_argument
    add("--strict", action="store_true", help="refuse what Kling refuses: short clips, several axes, small pictures, a tail with a camera")
    add("--convention", metavar="YEAR", default="2024", help="what pan and tilt mean: 2024 (pan turns right) or 2025 (pan turns up) (2024)")
    args = parser.parse_args(argv)
    if not 0 < args.port < 65536:
        raise UserError(f"port {args.port}: give a number from 1 to 65535")
    limits(args, workers=(1, MOST), threads=(0, MOST), places=(1, 10**9), rate=(1, 10**9), days=(0, 36500), drain=(0, 86400))
    limits(args, gpus_per_worker=(0, 1000))
    if args.gpus_per_worker and args.ray is None:
        raise UserError(f"--gpus-per-worker {args.gpus_per_worker:g} is for Ray: give --ray ADDRESS, or --device")
    if args.convention not in ("2024", "2025"):
        raise unknown("convention", args.convention, ["2024", "2025"])
    if args.listen and args.keys is None:
        raise UserError("--listen opens the server to the network: give --keys FILE with access keys and secrets")
    if args.url is not None:
        check_url(args.url, "--url")
        args.url = args.url.rstrip("/")
    return args


if __name__ == "__main__":
    main()
