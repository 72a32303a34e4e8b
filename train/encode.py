"""Encode clips once into a latent cache that kling-train reads.

kling-encode configs/cache/world.yaml vae=runs/vae/export out=runs/cache     # again: goes on, and remakes what is damaged
"""

from __future__ import annotations

import sys

from tqdm import tqdm

from kling.cache import CacheConfig, fill_cache
from kling.config import load_config
from kling.errors import UserError, program
from kling.pipeline import load_vae
from kling.runtime.accelerator import set_threads


@program
def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        raise UserError("usage: kling-encode CONFIG.yaml [key=value ...]")
    cfg = load_config(CacheConfig, argv[0], argv[1:])
    set_threads(cfg.threads)
    vae = load_vae(cfg.vae)
    with tqdm(unit="clip", desc=f"encode to {cfg.out}") as bar:
        for done, total in fill_cache(cfg, vae):
            bar.total = total
            bar.update(done - bar.n)


if __name__ == "__main__":
    main()
