"""Time and memory of encode, sample and decode over frames and sizes, with the shipped model's parts. The cost of training on many GPUs is
computed, not measured, in docs/scaling.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from kling_programs.eval.benches.measure import Bench, Row
from kling_programs.eval.benches.memory import peak, slope

from kling.dit.cost import forward_flops
from kling.sampling.pipeline import KlingPipeline
from kling.shapes import latent_frames

FRAMES = (5, 17, 41, 81, 161)
SIZES = ((64, 112), (128, 224))  # (H, W)
PARTS = ("encode", "sample", "decode")


def rows(bench: Bench) -> Iterator[Row]:
    frames, sizes = (FRAMES[:2], SIZES[:1]) if bench.quick else (FRAMES, SIZES)
    pipe = KlingPipeline.from_pretrained().to(bench.device)
    for H, W in sizes:
        for part in PARTS:
            peaks = []
            for T in frames:
                work = prepared(pipe, part, T, H, W)
                seconds = bench.times(work) if T <= 17 else bench.once(work)
                where = {"part": part, "T": T, "H": H, "W": W, "device": bench.device.type}
                peaks.append(peak(f"{__name__}:alone", where, bench.device.type))
                row = {"case": f"{part} {W}x{H}, {T} frames", "ours ms": 1e3 * seconds, "ms a frame": 1e3 * seconds / T}
                row["ours MiB"] = peaks[-1]
                if part == "sample":
                    f = latent_frames(T)
                    tokens = f * (H // pipe.vae.spatial_factor // 2) * (W // pipe.vae.spatial_factor // 2)
                    flops = forward_flops(pipe.transformer.config, tokens, pipe.text_encoder.num_tokens)
                    row |= {"tokens": tokens, "GF/s": flops / seconds / 1e9}
                yield row | {"axis": "frames", "size": T, "line": f"{part} {W}x{H}"}
            yield {"case": f"{part} {W}x{H}, memory", "MiB a frame": slope(list(frames), peaks)}


def prepared(pipe: KlingPipeline, part: str, T: int, H: int, W: int) -> Callable[[], None]:
    """One whole encode, one pass of the transformer, or one whole decode that yields frames as they are made."""
    vae, model, device = pipe.vae, pipe.transformer, pipe._execution_device
    s = vae.spatial_factor
    latents = torch.zeros(1, vae.config.z_dim, latent_frames(T), H // s, W // s, device=device)

    @torch.no_grad()
    def work() -> None:
        if part == "encode":
            first, rest = torch.zeros(1, 3, 1, H, W, device=device), torch.zeros(1, 3, 4, H, W, device=device)
            for _ in vae.encode_stream([first, *[rest] * (latents.shape[2] - 1)]):
                pass
        elif part == "decode":
            for _ in vae.decode_stream(latents):
                pass
        else:
            text = torch.zeros(1, pipe.text_encoder.num_tokens, model.config.text_dim, device=device)
            model(latents, torch.tensor([0.5], device=device), text)

    return work


def alone(part: str, T: int, H: int, W: int, device: str) -> tuple[Callable[[], None], Callable[[], None]]:
    """For `memory.peak`: warms up with five frames."""
    pipe = KlingPipeline.from_pretrained().to(device)
    return prepared(pipe, part, 5, H, W), prepared(pipe, part, T, H, W)
