"""The studio: a page on which a person sees what the model does.

kling-demo                                   # http://127.0.0.1:7860, the shipped model
kling-demo --model runs/dit/export --run runs/dit
kling-demo --listen --auth me:secret         # for others on the network
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import socket
import sys
import tempfile
from pathlib import Path

from kling_programs.sample.command import Parser

from kling.errors import UserError, program

UPLOAD_LIMIT = "64mb"


@program
def main(argv: list[str] | None = None) -> None:
    args = parse(sys.argv[1:] if argv is None else argv)
    auth = check_auth(args.auth, args.listen)
    host = "0.0.0.0" if args.listen else "127.0.0.1"
    if args.run and not (Path(args.run) / "metrics.jsonl").is_file():
        raise UserError(f"run folder '{args.run}' holds no metrics.jsonl: give the `out` of kling-train")
    check_port(host, args.port)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl+C: closes the server, and the arrivals go
    arrivals = Path(tempfile.mkdtemp(prefix="kling-demo-"))
    os.environ["GRADIO_TEMP_DIR"] = str(arrivals)  # before gradio is imported, as is the next one
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        _, page, settings = prepare(args, arrivals)
        page.launch(server_name=host, server_port=args.port, auth=auth, prevent_thread_lock=True, max_file_size=UPLOAD_LIMIT, **settings)
        print(
            f"kling studio: http://{'127.0.0.1' if host == '127.0.0.1' else socket.gethostname()}:{args.port}  (Ctrl+C ends it)", flush=True
        )
        page.block_thread()
    finally:
        shutil.rmtree(arrivals, ignore_errors=True)


def prepare(args: argparse.Namespace, arrivals: Path) -> tuple:
    """The studio, its page, and the settings of the launch."""
    try:
        from kling_programs.sample.studio.page import build, launch_settings
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise UserError("the studio needs gradio, which is not installed: pip install 'kling[demo]'") from None
    from kling_programs.sample.generate import load_pipeline, precision_of
    from kling_programs.sample.studio.shelf import Shelf
    from kling_programs.sample.studio.studio import Studio
    from kling_programs.sample.studio.uploads import Uploads

    from kling.runtime.precision import describe
    from kling.sampling.machine import pick_device
    from kling.sampling.record import model_hashes

    folder, pipe = load_pipeline(args.model, args.device)
    pipe.to(pick_device(args.device))
    print(describe(precision_of(pipe), pipe.device.type), file=sys.stderr, flush=True)
    pipe.set_progress_bar_config(disable=True)
    model = model_hashes(folder)
    shelf = Shelf(Path(args.out), model, args.keep)
    studio = Studio(pipe, model, shelf, Uploads(arrivals, shelf.inputs), Path(args.run) if args.run else None)
    return studio, build(studio), launch_settings(studio)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser("kling-demo", __doc__)
    parser.add_argument("--model", metavar="FOLDER", help="default: the shipped one")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, …; default: cuda if there is one")
    parser.add_argument("--run", metavar="RUNDIR", help="a training run: compare its checkpoints, see its curves")
    parser.add_argument("--port", metavar="N", type=int, default=7860)
    parser.add_argument("--listen", action="store_true", help="let other machines in; needs --auth")
    parser.add_argument("--auth", metavar="USER:PASSWORD", help="who may open the page")
    parser.add_argument("--out", metavar="FOLDER", default="out/studio", help="where videos and what they were made from go (out/studio)")
    parser.add_argument("--keep", metavar="N", type=int, default=200, help="videos that stay; the oldest go first (200)")
    args = parser.parse_args(argv)
    if not 0 < args.port < 65536:
        raise UserError(f"port {args.port}: give a number from 1 to 65535")
    if args.keep < 1:
        raise UserError(f"--keep {args.keep}: give at least 1")
    return args


def check_auth(text: str | None, listen: bool) -> tuple[str, str] | None:
    """(user, password), which a page that other machines reach must have."""
    if text is None:
        if listen:
            raise UserError("--listen opens the page to the network: give --auth USER:PASSWORD too")
        return None
    user, _, password = text.partition(":")
    if not user or not password:
        raise UserError("--auth is not USER:PASSWORD: give both, with a colon between them")
    return user, password


def check_port(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(f"port {port} cannot be used ({error.strerror}): choose another with --port") from None


if __name__ == "__main__":
    main()
