"""Benchmarks our parts against the usual alternatives: the same weights, the same work, in one run.

kling-bench                                      # all suites on the CPU: about an hour
kling-bench dit attn --quick                     # a quick look, not a measurement: minutes
kling-bench dit --device cuda --json out/dit.json    # and out/dit.png where sizes grow

dit        the transformer against diffusers' Wan: forward, with backward, compiled, memory
attn       its share of a pass
vae        the VAE against diffusers' Wan VAE: encode and decode
vae-mem    memory of a decode and an encode as clips grow
sampler    the cost of a step outside the network; time saved and accuracy lost by step caches
video      clips from files, resized: our reader against decord, torchcodec and plain PyAV
loader     batches for training: ours against a plain DataLoader; cached latents; memory over many clips
train      steps from cached latents: seconds outside forward and backward, checkpointing
scaling    encode, sample and decode over frames and sizes
serve      tasks a minute of kling-serve over its workers, which may use all cores

Before anything is timed, the peak rates of this device are measured, and every result is compared with the peer's in fp64. Each suite
begins with one thing against itself: if that ratio is more than 3 % from 1, no goal is judged. Exit code 3: a result was wrong.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kling_programs.sample.command import Parser, limits

from kling.errors import UserError, program, unknown
from kling.runtime.files import check_writable, written

if TYPE_CHECKING:  # torch takes seconds to import, which --help and a typing mistake should not cost
    from kling_programs.eval.benches.measure import Bench, Row

SUITES = ("dit", "attn", "vae", "vae-mem", "sampler", "video", "loader", "train", "scaling", "serve")
ON_CPU = ("video", "loader")  # suites that use the CPU whatever the device


@program
def main(argv: list[str] | None = None) -> None:
    parser = Parser("kling-bench", __doc__, allow_abbrev=True)
    parser.add_argument("suites", nargs="*", metavar="SUITE", help="default: all")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default %(default)s)")
    parser.add_argument("--quick", action="store_true", help="smaller and fewer cases")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows here, and a plot of those with sizes beside it")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (default %(default)s)")
    parser.add_argument("--core", type=int, help="the core that a single thread runs on (default: the last)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    for suite in args.suites:
        if suite not in SUITES:
            raise unknown("suite", suite, SUITES)
    limits(args, threads=(1, 1024), core=(0, 8191), seed=(0, 2**32 - 1))
    if args.core is not None and args.threads > 1:
        raise UserError(f"--core {args.core} is for a single thread, and --threads is {args.threads}: leave one of them out")
    if args.json:
        if args.json.suffix.lower() != ".json":
            raise UserError(f"--json {args.json}: end the name in .json; the plot beside it ends in .png")
        check_writable(args.json)

    import torch
    from kling_programs.eval.benches.machine import ceilings, describe, pin
    from kling_programs.eval.benches.measure import Bench

    from kling.runtime.precision import describe as describe_precision
    from kling.runtime.precision import pick_precision
    from kling.sampling.machine import pick_device

    device = pick_device(args.device)
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    core = pin(args.core, args.threads)
    print(describe_precision(pick_precision("auto", device.type), device.type), file=sys.stderr, flush=True)
    torch.manual_seed(args.seed)
    report: dict[str, Any] = {"machine": describe(device, core, args.seed), "quick": args.quick, "ceilings": ceilings(device, args.quick)}
    print(json.dumps(report["machine"], ensure_ascii=False))
    for name, top in report["ceilings"].items():
        print(f"ceiling  {name:<18} {top / 1e9:10.1f} {'GB/s' if name == 'copy' else 'GF/s'}")
    report["rows"] = []
    try:
        for suite in args.suites or SUITES:
            where = torch.device("cpu") if suite in ON_CPU else device
            bench = Bench(where, args.quick, args.threads, args.seed, report["ceilings"], cores=cores)
            for row in rows_of(suite, bench):
                report["rows"].append({"suite": suite, **row})
                print(line(report["rows"][-1]), flush=True)
                if args.json:  # written row by row: a run that is killed keeps its rows
                    write(report, args.json)
    finally:  # also for a run that was stopped
        if args.json:
            save(report, args.json)
    if any("wrong" in row for row in report["rows"]):
        raise SystemExit(3)


def rows_of(suite: str, bench: Bench) -> Iterator[Row]:
    """Each suite is a module with one function, `rows`."""
    return importlib.import_module(f"kling_programs.eval.benches.{suite.replace('-', '_')}").rows(bench)


def line(row: Row) -> str:
    """One row as text."""
    shown = (f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items() if name != "suite")
    return f"{row['suite']:<8} " + "  ".join(shown)


def write(report: dict[str, Any], path: Path) -> None:
    with written(path) as temporary:
        temporary.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def save(report: dict[str, Any], path: Path) -> None:
    """Write the report, and beside it, as PNG, a plot of what grows with frames or tokens."""
    from kling_programs.eval.benches.plot import plot

    write(report, path)
    try:
        if plot(report["rows"], path.with_suffix(".png")):
            print(f"written  {path}, {path.with_suffix('.png')}", file=sys.stderr)
    except ImportError:
        print("no picture: matplotlib is absent (pip install 'kling[bench]')", file=sys.stderr)


if __name__ == "__main__":
    main()
