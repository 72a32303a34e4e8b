"""Export weights with the names that other tools load.

    kling-export MODEL out/mine                        # for diffusers: WanPipeline.from_pretrained("out/mine")
    kling-export MODEL out/mine --naming original      # for the Wan repositories, ComfyUI and their like
    kling-export wan.safetensors out/transformer       # one transformer, from either naming to either
    kling-export MODEL --measure-bf16                  # decides from eight clips whether a folder of ours may be sampled in bf16

MODEL is a folder in diffusers layout, ours or published, or a hub id. Tensors are copied bit for bit; exporting back gives the same file.
"""

from __future__ import annotations

import sys
from pathlib import Path

from kling_programs.sample.command import Parser

from kling.errors import UserError, program


@program
def main(argv: list[str] | None = None) -> None:
    parser = Parser("kling-export", __doc__)
    parser.add_argument("model", metavar="MODEL", help="folder, hub id or safetensors file")
    parser.add_argument("target", metavar="FOLDER", nargs="?", help="where to write; must not exist")
    parser.add_argument(
        "--measure-bf16",
        action="store_true",
        help="make eight clips in fp32 and in bf16, and write sampling_dtype into MODEL/model_index.json",
    )
    parser.add_argument("--naming", metavar="diffusers|original", help="default: diffusers")
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)

    from kling.hub.export import export_weights  # imported here because torch takes seconds, which a typing mistake should not cost
    from kling.hub.load import find_folder

    if args.measure_bf16:
        if extra := [word for word in (args.target, args.naming and f"--naming {args.naming}") if word]:
            raise UserError(f"--measure-bf16 writes into {args.model} itself: leave out {extra[0]}")
        measure_bf16(find_folder(args.model))
        return
    if args.target is None:
        parser.error("the following arguments are required: FOLDER")
    naming = args.naming or "diffusers"
    files = export_weights(find_folder(args.model), args.target, naming)
    size = sum(file.stat().st_size for file in files)
    print(f"{args.target}: {len(files)} files, {size / 1e6:.1f} MB, {naming} naming")
    if naming == "original":
        print("text and image encoders are not included: they are the published ones, unchanged")


def measure_bf16(folder: Path) -> None:
    """Allow sampling a model folder of ours in bf16 if that gives the same clips, else forbid it."""
    from kling.hub.load import OURS, read_index
    from kling.runtime.precision import describe
    from kling.sampling.agreement import MIN_DB, agreement, psnr, write_sampling_dtype

    if read_index(folder).get("_class_name") != OURS:
        raise UserError(f"{folder} holds published weights, which run in bf16 anyway: give a folder of kling-train")
    print(describe("fp32 and bf16", "cpu"), file=sys.stderr, flush=True)
    errors: list[float] = []
    for error in agreement(folder):
        errors.append(error)
        print(f"clip {len(errors)}: {psnr([error]):.1f} dB", flush=True)
    allowed = write_sampling_dtype(folder, psnr(errors))
    verdict = "sampling_dtype: bf16" if allowed else "bf16 is not allowed"
    print(f"{folder}: {psnr(errors):.1f} dB over {len(errors)} clips, {MIN_DB:g} needed · {verdict}")


if __name__ == "__main__":
    main()
