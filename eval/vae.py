"""Compare diffusers VAEs on the same clips: quality, time, memory, and whether any of them grows with the length.

    kling-eval vae kling/assets/vae wan21/vae --out out/vae                  # the others are compared with the first
    kling-eval vae my/vae --videos clips/ --size 832x480 --out out/vae

Without --videos the clips are held-out scenes of the small world. Any folder that diffusers' AutoModel opens can be used, if it encodes
video (b, 3, T, H, W). Each length has its own lines: PSNR, SSIM, temporal PSNR, added flicker, ms per frame each way, and the peak memory
above what was held before (of CUDA if there is one, else of the process, which only Linux reports).
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from kling_programs.eval.common import VIDEOS, check_order, files, protocol_hash, results, write_json, write_text
from kling_programs.eval.options import vae as parse
from torch import Tensor

from kling.data.transforms import to_tensor
from kling.data.video import read_video
from kling.data.world.scene import World
from kling.errors import UserError
from kling.metrics.controls import Order, frozen, noise, shuffled
from kling.metrics.pixel import flicker, psnr, ssim, temporal_psnr
from kling.metrics.report import Line, Row, markdown, paired, summarise

QUALITY = (("psnr", "PSNR", "dB"), ("ssim", "SSIM", ""), ("temporal", "temporal PSNR", "dB"), ("flicker", "flicker added", "levels"))
COST = (("encode", "encode", "ms a frame"), ("decode", "decode", "ms a frame"), ("memory", "peak memory", "MiB"))
BEFORE = "less the first"  # name of the lines that compare with the first folder


def main(argv: list[str]) -> None:
    args = parse(argv)
    with results(args, "vae"):
        scored(args, argv)


def scored(args: argparse.Namespace, argv: list[str]) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    clips = {T: load(args, T) for T in args.frames}
    rows: dict[str, list[Row]] = defaultdict(list)
    models = {}
    for folder in args.folders:
        vae = open_vae(folder, device)
        models[folder] = {"class": type(vae).__name__, "parameters": sum(p.numel() for p in vae.parameters())}
        for T, videos in clips.items():
            for k, video in enumerate(videos):
                rows[task(folder, T)].append(reconstruct(vae, video, device))
                print(f"{folder}: {T} frames, clip {k + 1}/{len(videos)}", file=sys.stderr, flush=True)
        del vae
    scores = {name: summarise(found) for name, found in rows.items()}
    first, *others = args.folders
    for folder in others:
        for T in args.frames:
            scores[f"{task(folder, T)} {BEFORE}"] = paired(rows[task(first, T)], rows[task(folder, T)])
    columns = controls(clips, args)
    both = [(f, T) for f in args.folders for T in args.frames]
    lines = [Line(task(f, T), name, f"{f}, {T} frames, {title}", unit) for f, T in both for name, title, unit in QUALITY + COST]
    for f, T in both[len(args.frames) :]:
        lines += [Line(f"{task(f, T)} {BEFORE}", name, f"{f} less {first}, {T} frames, {title}", unit) for name, title, unit in QUALITY]
    table = markdown(lines, scores, columns)
    protocol = {"suite": "vae", "version": 1, "frames": args.frames, "size": args.size, "videos": args.videos or "small world, held out"}
    report = {"suite": "vae", "options": vars(args), "protocol": protocol_hash(protocol), "n": len(clips[args.frames[0]]), "failures": {}}
    report |= {"models": models, "scores": scores, "columns": columns, "rows": rows, "table": table}
    report["command"] = shlex.join(["kling-eval", "vae", *argv])
    write_json(Path(args.out) / "scores.json", report)
    write_text(Path(args.out) / "scores.md", table + "\n")
    print(table)
    orders = [Order(f"{task(f, T)} {name}", ("truth", "shuffled", "noise")) for f, T in both for name, _, _ in QUALITY[:3]]
    check_order(orders, columns)


def task(folder: str, T: int) -> str:
    return f"{folder} {T}"


def open_vae(folder: str, device: torch.device) -> Any:
    """A VAE from a diffusers folder. Raises `UserError` if it is none."""
    if not (Path(folder) / "config.json").is_file():
        raise UserError(f"{folder} holds no config.json: give the folder of a VAE, such as model/vae")
    from diffusers import AutoModel
    from diffusers.utils import logging

    from kling.vae import AutoencoderKLKling

    logging.set_verbosity_error()
    try:
        ours = f'"{AutoencoderKLKling.__name__}"' in (Path(folder) / "config.json").read_text(encoding="utf-8")
        vae = (AutoencoderKLKling if ours else AutoModel).from_pretrained(folder, local_files_only=True, use_safetensors=True)
    except (OSError, ValueError, AttributeError, ImportError) as error:
        raise UserError(
            f"{folder} cannot be opened as a VAE ({str(error).splitlines()[0]}): give a diffusers folder with safetensors"
        ) from None
    if not hasattr(vae, "encode") or not hasattr(vae, "decode"):
        raise UserError(f"{folder} is a {type(vae).__name__}, which neither encodes nor decodes: give the folder of a VAE")
    return vae.to(device).eval()


@torch.inference_mode()
def reconstruct(vae: Any, video: Tensor, device: torch.device) -> Row:
    """Encode (the mode, no noise) and decode one clip (T, H, W, 3) uint8, and measure."""
    x, held = to_tensor(video)[None].to(device), memory(device, reset=True)
    started = clock(device)
    latents = vae.encode(x).latent_dist.mode()  # (1, c, f, h, w)
    between = clock(device)
    y = vae.decode(latents).sample.clamp(-1, 1)  # (1, 3, T, H, W)
    ended, peak = clock(device), memory(device)
    if y.shape != x.shape:
        raise UserError(f"{type(vae).__name__} makes {tuple(y.shape)} of {tuple(x.shape)}: give frames and a size that it can keep")
    T, grown = len(video), None if held is None or peak is None else (peak - held) / 2**20
    return quality(y, x) | {"encode": 1e3 * (between - started) / T, "decode": 1e3 * (ended - between) / T, "memory": grown}


def quality(y: Tensor, x: Tensor) -> Row:
    """A reconstruction against its clip, both (1, 3, T, H, W) in [-1, 1]; measures between frames need at least three."""
    row = {"psnr": float(psnr(y, x).mean()), "ssim": float(ssim(y, x).mean())}
    return row | ({"temporal": float(temporal_psnr(y, x).mean()), "flicker": float(flicker(y) - flicker(x))} if x.shape[2] > 2 else {})


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def memory(device: torch.device, reset: bool = False) -> float | None:
    """Peak bytes since the last reset; None if the system does not report it."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")  # Linux: resets the peak to the present value
        peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        return 1024 * float(peak.split()[1])
    except (OSError, StopIteration):
        return None


def load(args: argparse.Namespace, T: int) -> list[Tensor]:
    if not args.videos:
        world = World(0, T, "16:9", split="heldout", size=args.size)
        return [world.clip(k).video for k in range(args.n)]
    paths = list(files(args.videos, VIDEOS, "videos").values())[: args.n]
    return [read_video(path, num_frames=T, size=args.size).frames for path in paths]


def controls(clips: dict[int, list[Tensor]], args: argparse.Namespace) -> dict[str, Any]:
    """The quality measures for the clip itself and for three bad reconstructions; the same for every folder."""
    columns: dict[str, Any] = {}
    answers = {"truth": lambda v: v, "frozen": frozen, "shuffled": lambda v: shuffled(v, 0), "noise": lambda v: noise(v, 0)}
    for T, videos in clips.items():
        for name, make in answers.items():
            rows = [quality(to_tensor(make(video))[None], to_tensor(video)[None]) for video in videos[:2]]
            columns.setdefault(name, {}).update({task(folder, T): summarise(rows) for folder in args.folders})
    return columns
