"""Clips from files: our reader against decord, torchcodec and plain PyAV, including opening the file, shrunk to 252x448.

Ours (`kling.data.decode`) skips frames that neither the clip nor another frame needs, and shrinks inside FFmpeg. Plain PyAV, the obvious
implementation, decodes all frames and resizes tensors.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import torch
import torch.nn.functional as F
from av.video.reformatter import ColorRange, Colorspace
from kling_programs.eval.benches.measure import Bench, Row, Run, absent
from torch import Tensor

from kling.data.decode import probe
from kling.data.reader import READERS, open_reader
from kling.errors import UserError

FRAMES, FPS = 17, 8.0
SIZE = (252, 448)  # the whole 16:9 picture, so that readers that crop and readers that squeeze agree
SECONDS = 12  # of every synthetic video
GOALS = {12: 1.15, 240: 1.35}  # for short and long groups of pictures, against the best of the others


def rows(bench: Bench) -> Iterator[Row]:
    clips = 4 if bench.quick else 8
    with tempfile.TemporaryDirectory() as folder:
        for height in (360,) if bench.quick else (360, 720):
            for gop, goal in GOALS.items():
                path, case = Path(folder) / f"{height}-{gop}.mp4", f"{height}p gop {gop}"
                make_video(path, height, gop)
                ours = reading(path, "pyav", clips)
                if not bench.noisy:
                    yield bench.same(case, ours)
                found = []
                for name in [*(name for name in READERS if name != "pyav"), "plain PyAV"]:
                    peer = plain_reading(path, clips) if name == "plain PyAV" else reading(path, name, clips)
                    try:
                        peer()  # raises if absent; otherwise warms up
                    except UserError as error:
                        yield absent(case, name, str(error))
                        continue
                    row = same_frames(case, name, ours(), peer())
                    if "wrong" in row:
                        yield row
                        continue
                    row |= bench.compare(case, ours, peer, name=name)
                    found.append(row)
                    yield row | {"clips/s": 1e3 * clips / row["ours ms"], "peer clips/s": 1e3 * clips / row["peer ms"]}
                best = min(found, key=lambda row: row["ratio"])
                yield {"case": case, "peer": f"the best, {best['peer']}", "ratio": best["ratio"]} | bench.judge(best["ratio"], goal)


def make_video(path: Path, height: int, gop: int) -> None:
    """H.264 video of a drifting texture, 24 frames a second, with B-frames."""
    H, W = height, height * 16 // 9 // 2 * 2
    rng = np.random.default_rng(0)
    wall = cv2.resize(rng.integers(0, 256, (H // 6, W // 3, 3), dtype=np.uint8), (2 * W, H), interpolation=cv2.INTER_CUBIC)
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=24, options={"g": str(gop), "preset": "veryfast", "crf": "23"})
        stream.width, stream.height, stream.pix_fmt = W, H, "yuv420p"
        # decoders guess the matrix of an untagged HD file differently, so only ours could read one
        stream.codec_context.colorspace, stream.codec_context.color_range = Colorspace.ITU709, ColorRange.MPEG
        for t in range(24 * SECONDS):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(np.roll(wall, -3 * t, axis=1)[:, :W]), format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG)
            frame.pts, frame.time_base = t, Fraction(1, 24)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())


def starts(count: int) -> list[float]:
    """Start times of clips, in seconds."""
    return (np.random.default_rng(1).random(count) * (SECONDS - FRAMES / FPS - 0.1)).tolist()


def reading(path: Path, name: str, clips: int) -> Run:
    """Open the file and read one clip, for each of `clips`."""
    info = probe(path)

    def read() -> list[Tensor]:
        return [open_reader(path, name, info, threads=1).at([start + i / FPS for i in range(FRAMES)], SIZE) for start in starts(clips)]

    return read


def same_frames(case: str, name: str, ours: list[Tensor], theirs: list[Tensor]) -> Row:
    """The mean difference of the peer's clips from ours, of 255. Filters and chroma differ, so frames count as the same if they differ by
    less than half as much as consecutive frames of ours."""
    a, b = (torch.stack([as_pixels(clip) for clip in clips]) for clips in (ours, theirs))  # (clips, T, H, W, 3)
    apart, step = float((a - b).abs().mean()), float((a[:, 1:] - a[:, :-1]).abs().mean())
    row: Row = {"case": case, "peer": name, "frames apart of 255": apart}
    return row if apart < step / 2 else row | {"wrong": f"{apart:.1f} of 255 apart, ours are {step:.1f} from the next: not timed"}


def as_pixels(clip: Tensor) -> Tensor:
    """uint8 (T, H, W, 3), or (3, T, H, W) in [-1, 1] -> (T, H, W, 3) in [0, 255]"""
    return clip.float() if clip.dtype == torch.uint8 else (clip.permute(1, 2, 3, 0) + 1) * 127.5


def plain_reading(path: Path, clips: int) -> Run:
    return lambda: [plain_clip(path, start) for start in starts(clips)]


def plain_clip(path: Path, start: float, size: tuple[int, int] = SIZE) -> Tensor:
    """A clip (3, T, H, W) in [-1, 1] by the obvious code: seek, decode, RGB arrays, float tensors, `interpolate`."""
    frames: list[Tensor] = []
    wanted = [start + k / FPS for k in range(FRAMES)]
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        container.seek(int(start / stream.time_base), stream=stream)
        for frame in container.decode(stream):
            while len(frames) < FRAMES and frame.time >= wanted[len(frames)] - 0.5 / 24:
                frames.append(torch.from_numpy(frame.to_ndarray(format="rgb24")))
            if len(frames) == FRAMES:
                break
    video = torch.stack(frames).permute(0, 3, 1, 2).float() / 127.5 - 1  # (T, 3, H, W)
    return F.interpolate(video, size, mode="bilinear", antialias=True).transpose(0, 1)
