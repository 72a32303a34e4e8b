"""Give weights back under the names that others load.

    kling-export MODEL out/mine                        # for diffusers: WanPipeline.from_pretrained("out/mine")
    kling-export MODEL out/mine --naming original      # for the Wan repositories, ComfyUI and their like
    kling-export wan.safetensors out/transformer       # one transformer, from either naming to either

MODEL is a folder in diffusers layout, ours or published, or a hub id. Tensors are copied bit for bit; there and back is the same file.
"""

from __future__ import annotations

import sys

from kling_programs.sample.command import Parser

from kling.errors import program


@program
def main(argv: list[str] | None = None) -> None:
    parser = Parser("kling-export", __doc__)
    parser.add_argument("model", metavar="MODEL", help="folder, hub id or safetensors file")
    parser.add_argument("target", metavar="FOLDER", help="where to write; must not exist")
    parser.add_argument("--naming", metavar="diffusers|original", default="diffusers")
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)

    from kling.hub.export import export_weights  # torch takes seconds to import: a typing mistake should not wait for it
    from kling.hub.load import find_folder

    files = export_weights(find_folder(args.model), args.target, args.naming)
    size = sum(file.stat().st_size for file in files)
    print(f"{args.target}: {len(files)} files, {size / 1e6:.1f} MB, {args.naming} naming")
    if args.naming == "original":
        print("text and image encoders are not part of it: they are the published ones, unchanged")


if __name__ == "__main__":
    main()
