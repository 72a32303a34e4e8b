"""Encode clips once into a latent cache that kling-train reads.

kling-encode configs/cache/world.yaml vae=runs/vae/export out=runs/cache     # again: goes on, and remakes what is damaged or has changed
kling-encode configs/cache/manifest.yaml data.source=cats/manifest.jsonl vae=runs/vae/export out=runs/cats-cache
accelerate launch --num_processes 8 train/encode.py configs/cache/manifest.yaml ...                 # every process takes its share
"""

from __future__ import annotations

import sys

from tqdm import tqdm

from kling.cache import CacheConfig, fill_cache
from kling.config import load_config
from kling.errors import UserError, program
from kling.pipeline import load_vae
from kling.runtime.accelerator import make_accelerator, set_threads


@program
def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        raise UserError("usage: kling-encode CONFIG.yaml [key=value ...]")
    cfg = load_config(CacheConfig, argv[0], argv[1:])
    set_threads(cfg.threads)
    accelerator = make_accelerator(cfg.out, "fp32")
    vae = load_vae(cfg.vae).to(accelerator.device)
    steps = fill_cache(cfg, vae, accelerator.process_index, accelerator.num_processes, accelerator.wait_for_everyone)
    with tqdm(unit="clip", desc=f"encode to {cfg.out}", disable=not accelerator.is_main_process) as bar:
        for done, total in steps:
            bar.total = total
            bar.update(done - bar.n)


if __name__ == "__main__":
    main()
