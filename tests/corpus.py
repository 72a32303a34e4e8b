"""Synthetic files of every kind that a scan meets: name -> (function that makes it, the reason to refuse it, or "" if it is good)."""

from __future__ import annotations

import multiprocessing
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

from kling.data.video import write_gif
from tests.test_video import make, smooth

RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (48, 64, 3), dtype=np.uint8)


def with_sound(path: Path, picture: bool = True) -> None:
    with av.open(f"file:{path}", "w", format="mp4") as out:
        video = out.add_stream("libx264", rate=12) if picture else None
        sound = out.add_stream("aac", rate=16000)
        if video:
            video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
            for i, frame in enumerate(smooth(12).numpy()):
                frame = av.VideoFrame.from_ndarray(frame)
                frame.pts, frame.time_base = i, Fraction(1, 12)
                out.mux(video.encode(frame))
            out.mux(video.encode())
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        out.mux(sound.encode(frame))
        out.mux(sound.encode())


def encode(path: Path, codec: str, pix_fmt: str = "yuv420p", size: tuple[int, int] = (96, 128), n: int = 12, **options: str) -> None:
    """A drifting gradient of size (H, W)."""
    y, x = np.mgrid[: size[0], : size[1]].astype(np.float32) / max(size)
    with av.open(f"file:{path}", "w") as out:
        stream = out.add_stream(codec, rate=12, options=options)
        stream.height, stream.width, stream.pix_fmt = *size, pix_fmt
        for i in range(n):
            picture = np.stack([60 + 120 * x + 2 * i, 40 + 150 * y, 200 - 90 * x - 60 * y], -1).astype(np.uint8)
            frame = av.VideoFrame.from_ndarray(picture)
            frame.pts, frame.time_base = i, Fraction(1, 12)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())


def av1(path: Path) -> None:
    """In its own process: when run as root, SVT-AV1 gives the calling thread real-time priority (SCHED_FIFO 99), and leaves it there.
    Processes forked from it afterwards starve."""
    process = multiprocessing.get_context("spawn").Process(target=encode, args=(path, "libsvtav1"), kwargs={"preset": "12"})
    process.start()
    process.join(120)
    assert process.exitcode == 0


def damaged(path: Path, change, **kwargs) -> None:  # noqa: ANN001 - bytes -> bytes
    kwargs = {"picture": NOISE, "n": 8, "g": "1"} | kwargs
    path.write_bytes(change(make(path, **kwargs).read_bytes()))


def rot(raw: bytes) -> bytes:
    half = len(raw) // 2
    return raw[:half] + bytes(b ^ 0x5A for b in raw[half : half + 400]) + raw[half + 400 :]


CORPUS = {
    "plain.mp4": (lambda p: make(p, n=24, fps=12), ""),
    "sound.mp4": (with_sound, ""),
    "long gop.mp4": (lambda p: encode(p, "libx264", n=40, g="40", bf="3"), ""),
    "one frame.mp4": (lambda p: make(p, n=1), ""),
    "vfr.mkv": (lambda p: make(p, n=10, times=[0, 10, 20, 30, 60, 90, 120, 125, 130, 240]), ""),
    "444.mp4": (lambda p: encode(p, "libx264", "yuv444p", (181, 321)), ""),
    "10bit.mp4": (lambda p: encode(p, "libx264", "yuv420p10le"), ""),
    "hevc.mp4": (lambda p: encode(p, "libx265", **{"x265-params": "log-level=none"}), ""),
    "av1.mp4": (av1, ""),
    "vp9.webm": (lambda p: encode(p, "libvpx-vp9", deadline="realtime"), ""),
    "rotated.mov": (lambda p: make(p, n=6, picture=smooth(1)[0].numpy(), rotate=90), ""),
    "wide pixels.mp4": (lambda p: make(p, n=6, pixel_aspect=Fraction(3, 2)), ""),
    "moving.gif": (lambda p: write_gif(p, smooth(8), 10), ""),
    "a webm.mp4": (lambda p: make(p, codec="libvpx-vp9", container="webm", deadline="realtime"), ""),
    "a picture.mp4": (lambda p: Image.fromarray(NOISE).save(p, format="PNG"), ""),
    "no suffix": (lambda p: make(p, container="mp4", n=12), ""),
    "über 猫 it's \"it\" 100%d.mp4": (lambda p: make(p, n=12), ""),
    "head cut off.mp4": (lambda p: damaged(p, lambda raw: raw[1000:]), "not a video"),
    "cut in the middle.mp4": (lambda p: damaged(p, lambda raw: raw[: len(raw) // 2]), "cut short"),
    "tail cut off.mp4": (lambda p: damaged(p, lambda raw: raw[:-200]), "cut short"),
    "tail cut off.webm": (lambda p: damaged(p, lambda r: r[: len(r) * 2 // 3], codec="libvpx-vp9", n=24, deadline="realtime"), "cut short"),
    "index at the end, cut.mov": (lambda p: damaged(p, lambda raw: raw[:-300], picture=NOISE), "damaged"),
    "rotten.mp4": (lambda p: damaged(p, rot), "damaged"),
    "empty.mp4": (lambda p: p.write_bytes(b""), "empty"),
    "random.mp4": (lambda p: p.write_bytes(np.random.default_rng(1).bytes(5000)), "not a video"),
    "random after a good start.mp4": (lambda p: p.write_bytes(b"\0\0\0\x18ftypisom" + np.random.default_rng(2).bytes(5000)), "damaged"),
    "sound only.mp4": (lambda p: with_sound(p, picture=False), "no video"),
    "words.mp4": (lambda p: p.write_text("just some words\n" * 60), "not a video"),
    "concat.mp4": (lambda p: p.write_text("ffconcat version 1.0\nfile plain.mp4\nfile sound.mp4\n"), "not a video"),
    "playlist.mp4": (lambda p: p.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nplain.mp4\n"), "not a video"),
}  # fmt: skip


def make_corpus(folder: Path) -> None:
    for name, (build, _) in CORPUS.items():
        build(folder / name)
