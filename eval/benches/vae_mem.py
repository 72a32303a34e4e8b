"""Memory of an encode and a decode as clips grow: ours as a stream, frame by frame, against diffusers'.

Pictures of 256x256 and a narrow VAE; each length runs in its own process, which first warms up on a short clip.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from diffusers import AutoencoderKLWan
from kling_programs.eval.benches.measure import Bench, Row
from kling_programs.eval.benches.memory import peak, slope
from kling_programs.eval.benches.vae import HALVES, config, shape
from torch import Tensor

from kling.data.transforms import to_uint8
from kling.vae import AutoencoderKLKling

SIDE, BASE, BLOCKS = 256, 8, 1
CUDA = (480, 832, 96, 2)  # height, width, base, blocks
SLOPE = 0.05  # MiB per frame, decode
SHARE = 0.2  # of diffusers' peak at the greatest length
CUDA_SHARE = 0.6
LOOKAHEAD = 64  # more frames than x264 buffers: the warm-up fills the buffer, since it does not grow with the clip


def rows(bench: Bench) -> Iterator[Row]:
    cuda = bench.device.type == "cuda"
    lengths = (17, 65) if bench.quick else (17, 81, 161) if cuda else (17, 65, 129, 257)
    for half in HALVES:
        peaks: dict[str, list[float]] = {"ours": [], "diffusers": []}
        for frames in lengths:
            for which, found in peaks.items():
                target = f"{__name__}:{half}"
                found.append(
                    peak(target, {"which": which, "frames": frames, "device": bench.device.type}, bench.device.type, bench.threads)
                )
            ours, peer = (found[-1] for found in peaks.values())
            row: Row = {"case": f"{half} {frames} frames", "peer": "diffusers", "ours MiB": ours, "peer MiB": peer, "share": ours / peer}
            if half == "decode" and frames == lengths[-1]:
                row |= bench.judge(ours / peer, CUDA_SHARE if cuda else SHARE, at_most=True)
            yield row | {"axis": "frames", "size": frames, "line": half}
        growth = {which: slope(list(lengths), found) for which, found in peaks.items()}
        row = {"case": f"{half} MiB a frame", "peer": "diffusers", "ours": growth["ours"], "peer's": growth["diffusers"]}
        yield row | (bench.judge(growth["ours"], SLOPE, at_most=True) if half == "decode" else {})


Work = tuple[Callable[[], object], Callable[[], object]]


def decode(which: str, frames: int, device: str) -> Work:
    """Decode into a file; ours frame by frame, diffusers' after decoding everything."""
    model, height, width = prepare(which, device)
    short, z = (torch.randn(shape("decode", n, height, width), device=device, dtype=model.dtype) for n in (9, frames))

    @torch.no_grad()
    def work(z: Tensor, before: int = 0) -> None:
        from kling.data.video import VideoWriter  # imported here because the other rows need no encoder

        with TemporaryDirectory() as folder, VideoWriter(Path(folder) / "clip.mp4", fps=8) as file:
            file.write(torch.zeros(before, height, width, 3, dtype=torch.uint8))
            for video in model.decode_stream(z) if which == "ours" else [model.decode(z).sample]:
                file.write(to_uint8(video[0]))

    return lambda: work(short, LOOKAHEAD), lambda: work(z)


def encode(which: str, frames: int, device: str) -> Work:
    """Encode; ours takes the clip four frames at a time, as from a file reader; diffusers' needs it whole."""
    model, height, width = prepare(which, device)

    def pixels(n: int) -> Tensor:
        return torch.rand(1, 3, n, height, width, device=device, dtype=model.dtype) * 2 - 1

    @torch.no_grad()
    def work(n: int) -> None:
        if which == "ours":
            for latents in model.encode_stream(pixels(4 if i else 1) for i in range(1 + n // 4)):
                latents.mean()
        else:
            model.encode(pixels(n)).latent_dist.mode().mean()

    return lambda: work(9), lambda: work(frames)


def prepare(which: str, device: str) -> tuple[AutoencoderKLKling | AutoencoderKLWan, int, int]:
    """A model and the height and width of its pictures."""
    height, width, base, blocks = CUDA if device == "cuda" else (SIDE, SIDE, BASE, BLOCKS)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = {"ours": AutoencoderKLKling, "diffusers": AutoencoderKLWan}[which](**config(base, blocks))
    return model.eval().to(device, dtype), height, width
