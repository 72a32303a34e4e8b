"""The studio: a web page for the model.

kling-demo                                   # http://127.0.0.1:7860, the shipped model
kling-demo --model runs/dit/export --run runs/dit
kling-demo --listen --auth accounts.txt      # for others on the network; lines of USER:PASSWORD, or KLING_DEMO_AUTH in the environment
kling-demo --server http://cluster:8000      # a kling-serve makes the videos
kling-demo --models models --loras loras     # folders from which visitors choose
"""

from __future__ import annotations

import argparse
import math
import os
import re
import shutil
import signal
import socket
import ssl
import sys
import tempfile
from pathlib import Path

from kling_programs.sample.command import Parser, limits
from kling_programs.sample.server.fetch import check_url

from kling.errors import UserError, program

UPLOAD_LIMIT = "64mb"


@program
def main(argv: list[str] | None = None) -> None:
    args = parse(sys.argv[1:] if argv is None else argv)
    auth = check_auth(args)
    host = "0.0.0.0" if args.listen else "127.0.0.1"
    if args.run and not (Path(args.run) / "metrics.jsonl").is_file():
        raise UserError(f"run folder '{args.run}' holds no metrics.jsonl: give the `out` of kling-train")
    chosen_folders(args.models), chosen_files(args.loras)
    tls = check_tls(args)
    check_port(host, args.port)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl+C: closes the server and deletes uploads
    arrivals = Path(tempfile.mkdtemp(prefix="kling-demo-"))
    os.environ["GRADIO_TEMP_DIR"] = str(arrivals)  # must be set before gradio is imported, like the next one
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_RUN_HISTORY"] = "False"  # else every request is kept in the browser, and a page of Gradio's own shows it
    try:
        _, page, settings = prepare(args, arrivals)
        page.launch(
            server_name=host, server_port=args.port, auth=auth, prevent_thread_lock=True, max_file_size=UPLOAD_LIMIT, **tls, **settings
        )
        name = socket.gethostname() if args.listen else "127.0.0.1"
        print(f"kling studio: {'https' if tls else 'http'}://{name}:{args.port}  (Ctrl+C ends it)", flush=True)
        page.block_thread()
    finally:
        shutil.rmtree(arrivals, ignore_errors=True)


def prepare(args: argparse.Namespace, arrivals: Path) -> tuple:
    """The studio, its page, and the launch settings."""
    try:
        from kling_programs.sample.studio.page import build, launch_settings
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise UserError("the studio needs gradio, which is not installed: pip install 'kling[demo]'") from None
    from kling_programs.sample.generate import load_pipeline, precision_of
    from kling_programs.sample.studio.guard import Door, own_names
    from kling_programs.sample.studio.jobs import ModelQueue
    from kling_programs.sample.studio.remote import Remote
    from kling_programs.sample.studio.shelf import Shelf
    from kling_programs.sample.studio.studio import Studio
    from kling_programs.sample.studio.uploads import Uploads

    from kling.runtime.precision import describe
    from kling.sampling.enhance import Enhancer
    from kling.sampling.machine import pick_device
    from kling.sampling.record import model_hashes
    from kling.shapes import ASPECTS

    remote = Remote(args.server, os.environ.get("KLING_SERVER_KEY")) if args.server else None
    folder, pipe = load_pipeline(args.model, args.device, (("weights", False),) if remote else ())
    device = pick_device(args.device)
    if remote is not None:
        remote.check(pipe)
    else:
        pipe.to(device)
        print(describe(precision_of(pipe), device.type), file=sys.stderr, flush=True)
    pipe.set_progress_bar_config(disable=True)
    model = model_hashes(folder)
    shelf = Shelf(Path(args.out), model, args.keep)
    uploads = Uploads(arrivals, shelf.inputs, pipe.config.fps, pipe.config.get("sizes") or ASPECTS)
    queue = ModelQueue(places=args.places, seconds=None if args.minutes is None else 60 * args.minutes)
    door = Door(arrivals, own_names(args.host), kept=(shelf.inputs,), tidy=shelf.tidy_inputs)
    studio = Studio(pipe, model, shelf, uploads, Path(args.run) if args.run else None, queue, door)
    studio.remote = remote
    studio.models, studio.loras = chosen_folders(args.models), chosen_files(args.loras)
    studio.enhancer = Enhancer(args.enhance, device) if args.enhance else None
    return studio, build(studio), launch_settings(studio)


def chosen_folders(folder: str | None) -> dict[str, Path]:
    """name -> model folder, for those in the operator's folder."""
    found = {path.parent.name: path.parent.absolute() for path in sorted(Path(folder).glob("*/model_index.json"))} if folder else {}
    if folder and not found:
        raise UserError(f"--models {folder}: no folder in it holds a model_index.json; give the folder that holds model folders")
    return found


def chosen_files(folder: str | None) -> dict[str, Path]:
    """name -> LoRA file, for those in the operator's folder."""
    found = {path.stem: path.absolute() for path in sorted(Path(folder).glob("*.safetensors"))} if folder else {}
    if folder and not found:
        raise UserError(f"--loras {folder}: it holds no .safetensors file; give the folder that holds LoRA files")
    return found


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser("kling-demo", __doc__)
    parser.add_argument("--model", metavar="FOLDER", help="default: the shipped one")
    parser.add_argument("--models", metavar="FOLDER", help="a folder of model folders, from which visitors may choose one")
    parser.add_argument("--loras", metavar="FOLDER", help="a folder of LoRA files (.safetensors), from which visitors may choose one")
    parser.add_argument("--enhance", metavar="FOLDER", help="a chat model that writes prompts out when a visitor presses a button")
    parser.add_argument("--server", metavar="URL", help="a kling-serve that makes the videos; KLING_SERVER_KEY has its key")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, …; default: cuda if there is one")
    parser.add_argument("--run", metavar="RUNDIR", help="a training run: compare its checkpoints, see its curves")
    parser.add_argument("--out", metavar="FOLDER", default="out/studio", help="folder for videos and their inputs (out/studio)")
    parser.add_argument(
        "--keep", metavar="N", type=int, default=200, help="videos to keep; the visitor with most loses the oldest first (200)"
    )
    add = parser.add_argument_group("for others on the network").add_argument
    parser.add_argument("--port", metavar="N", type=int, default=7860)
    add("--listen", action="store_true", help="allow other machines; needs --auth or KLING_DEMO_AUTH")
    add("--auth", metavar="FILE", help="who may open the page: lines of USER:PASSWORD; or give them in KLING_DEMO_AUTH")
    add("--host", metavar="NAME", action="append", help="a host name for the page, in addition to this machine's own; repeat for more")
    add("--tls-cert", metavar="FILE", help="certificate (PEM), for https")
    add("--tls-key", metavar="FILE", help="its private key (PEM)")
    add(
        "--places",
        metavar="N",
        type=int,
        help="videos that one visitor may have queued or running (3 with --listen, else no limit)",
    )
    add("--minutes", metavar="N", type=float, help="of the model's time that one visitor may use in an hour (30 with --listen, else all)")
    args = parser.parse_args(argv)
    if not 0 < args.port < 65536:
        raise UserError(f"port {args.port}: give a number from 1 to 65535")
    limits(args, keep=(1, math.inf), places=(1, math.inf), minutes=(0.1, math.inf))
    if args.server:
        check_url(args.server, "--server")
    for name in args.host or ():
        if not re.fullmatch(r"[^\s/:]+", name):
            raise UserError(f"--host '{name}': give a name alone, such as video.example.org, without http://, port and path")
    for name in ("models", "loras", "run"):
        if args.server and getattr(args, name):
            raise UserError(f"--{name} needs the weights here, and --server {args.server} has them: leave one of them out")
    if args.listen:
        args.places, args.minutes = args.places or 3, args.minutes or 30.0
    return args


def check_auth(args: argparse.Namespace) -> list[tuple[str, str]] | None:
    """All (user, password) pairs; required for a page that other machines can reach."""
    from kling_programs.sample.studio.guard import read_accounts

    accounts = read_accounts(args.auth)
    if accounts is None and args.listen:
        raise UserError("--listen opens the page to the network: give --auth FILE with lines of USER:PASSWORD, or set KLING_DEMO_AUTH")
    return accounts


def check_tls(args: argparse.Namespace) -> dict:
    """The launch settings for https; empty without a certificate."""
    if args.tls_cert is None and args.tls_key is None:
        return {}
    given = {"--tls-cert": args.tls_cert, "--tls-key": args.tls_key}
    if None in given.values():
        missing = next(option for option, file in given.items() if file is None)
        raise UserError(f"{missing} is missing: https needs a certificate and its key")
    for option, file in given.items():
        if not Path(file).is_file():
            raise UserError(f"{option} {file}: no such file; give a PEM file")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(args.tls_cert, args.tls_key, password="")
    except (ssl.SSLError, OSError) as error:
        raise UserError(f"--tls-cert {args.tls_cert} with --tls-key {args.tls_key} cannot be used ({error}): give a PEM pair") from None
    return {"ssl_certfile": args.tls_cert, "ssl_keyfile": args.tls_key, "ssl_verify": False}  # Gradio checks its own server with a request


def check_port(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(f"port {port} cannot be used ({error.strerror}): choose another with --port") from None


if __name__ == "__main__":
    main()
