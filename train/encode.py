"""Encode clips once into a latent cache that kling-train reads.

kling-encode configs/cache/world.yaml vae=runs/vae/export out=runs/cache     # run again, it continues and remakes damaged or changed shards
kling-encode configs/cache/world.yaml vae=runs/vae/export out=runs/cache verify=true            # compares the hash of every shard first
kling-encode configs/cache/manifest.yaml data.source=cats/manifest.jsonl vae=runs/vae/export out=runs/cats-cache
kling-encode configs/cache/wan.yaml data.source=cats/manifest.jsonl model=Wan-AI/Wan2.1-T2V-1.3B-Diffusers out=runs/cats-wan
accelerate launch --num_processes 8 train/encode.py configs/cache/manifest.yaml ...                 # every process encodes a part
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from kling_programs.train.command import helped
from torch import Tensor
from tqdm import tqdm

from kling.cache.fill import fill_cache
from kling.cache.plan import CacheConfig
from kling.cache.store import LatentCache
from kling.config import load_config
from kling.errors import UserError, program
from kling.hub.clip import clip_tokens, load_image_encoder
from kling.hub.load import find_folder
from kling.runtime.accelerator import Accelerator, make_accelerator, set_threads
from kling.runtime.lock import locked
from kling.sampling.pipeline import load_vae
from kling.text.umt5 import UMT5TextEncoder
from kling.training.start import captions_of, mark_read, text_folder


@program
def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if helped("kling-encode", argv):
        return
    cfg = load_config(CacheConfig, argv[0], argv[1:])
    set_threads(cfg.threads)
    if cfg.mixed_precision == "fp16":
        raise UserError("mixed_precision fp16: latents are encoded in bf16 or fp32: give one of these, or auto")
    accelerator = make_accelerator(cfg.out, cfg.mixed_precision)
    with locked(cfg.out, "cache", accelerator):
        encode(cfg, accelerator)


def encode(cfg: CacheConfig, accelerator: Accelerator) -> None:
    """Fill the cache, and encode its captions with umT5 if the model's weights need that."""
    rank, ranks, wait = accelerator.process_index, accelerator.num_processes, accelerator.wait_for_everyone
    precision = "bf16" if accelerator.mixed_precision == "bf16" else "fp32"
    folder = find_folder(cfg.model)
    text = UMT5TextEncoder(folder, cache=text_folder(cfg.out), cut=True) if cfg.model else None
    vae = load_vae(cfg.vae or cfg.model).to(accelerator.device)
    eye = clip(folder, accelerator.device) if cfg.image and cfg.model and (folder / "image_encoder").is_dir() else None
    show(fill_cache(cfg, vae, rank, ranks, wait, eye, precision), "clip", f"encode to {cfg.out}", accelerator.is_main_process)
    if (lacking := LatentCache(cfg.out).missing) and accelerator.is_main_process:
        print(f"{lacking} clips are left out: their files are gone", file=sys.stderr)
    if text is not None:
        del vae, eye
        steps = text.learn(captions_of(cfg.out)[rank::ranks], accelerator.device)
        show(steps, "caption", f"encode to {text.cache}", accelerator.is_main_process)
        wait()
        if accelerator.is_main_process:
            mark_read(cfg.out, text)


def clip(folder: Path, device: torch.device) -> Callable[[Tensor], Tensor]:
    """The function that turns a picture uint8 (H, W, 3) into tokens (i, e) of the model folder's CLIP."""
    parts = load_image_encoder(folder)
    encoder = parts["image_encoder"].to(device)
    return lambda picture: clip_tokens(encoder, parts["image_processor"], [picture], device)[0]


def show(steps: Iterable[tuple[int, int]], unit: str, title: str, visible: bool) -> None:
    """Run through steps that yield (done, total), with a progress bar."""
    with tqdm(unit=unit, desc=title, disable=not visible) as bar:
        for done, total in steps:
            bar.total = total
            bar.update(done - bar.n)


if __name__ == "__main__":
    main()
