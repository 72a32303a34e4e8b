"""Three decoders with one interface: the same frames and the right colours, compared with the ffmpeg program."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from av.video.reformatter import ColorRange, Colorspace

from kling.data import decode
from kling.data.decode import probe
from kling.data.reader import open_reader
from kling.data.transforms import fit
from kling.data.video import read_video
from kling.errors import UserError
from tests.corpus import CORPUS, encode, make_corpus
from tests.test_video import make, smooth, which

BACKENDS = ["pyav", "decord"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    make_corpus(folder)
    return folder


def ffmpeg(path: Path, width: int, height: int) -> np.ndarray:
    """Every stored frame as decoded by the ffmpeg program, (T, H, W, 3)."""
    program = pytest.importorskip("imageio_ffmpeg").get_ffmpeg_exe()
    scale = f"scale={width}:{height}:flags=bicubic+accurate_rnd+full_chroma_int"
    options = ["-fps_mode", "passthrough", "-vf", scale, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    raw = subprocess.run([program, "-v", "error", "-i", f"file:{path}", *options], check=True, capture_output=True).stdout
    return np.frombuffer(raw, np.uint8).reshape(-1, height, width, 3)


@pytest.mark.parametrize("name", [n for n, (_, reason) in CORPUS.items() if not reason and n != "a picture.mp4"])
def test_every_good_file_is_decoded_as_by_ffmpeg(corpus, name):
    path = corpus / name
    info = probe(path)
    want = ffmpeg(path, info.width, info.height)
    assert len(want) == info.frames
    times = [t / 120 for t in (0, 10, 20, 30, 60, 90, 120, 125, 130, 240)] if info.vfr else [i / info.fps for i in range(info.frames)]
    got = open_reader(path).at(times)
    assert np.abs(got.numpy().astype(int) - want).mean() <= 2
    some = sorted({len(times) // 3, len(times) // 2, len(times) - 1})
    assert torch.equal(open_reader(path).at([times[i] for i in some]), got[some])


def count_decoded(monkeypatch: pytest.MonkeyPatch) -> list[av.VideoFrame]:
    """All frames that the reader decodes from now on."""
    seen: list[av.VideoFrame] = []
    real = decode._frames
    monkeypatch.setattr(decode, "_frames", lambda *args: (seen.append(frame) or frame for frame in real(*args)))
    return seen


@pytest.mark.parametrize("codec", ["libx264", "libx265", "libvpx-vp9", "mpeg2video"])
def test_unneeded_frames_are_not_decoded(tmp_path, monkeypatch, codec):
    options = {"libx264": {"g": "40", "bf": "3"}, "libx265": {"x265-params": "log-level=none:bframes=3:b-adapt=0"}}.get(codec, {"g": "40"})
    path = make(tmp_path / "a.mkv", codec, n=40, fps=12 if codec != "mpeg2video" else 25, **options)
    info = probe(path)
    whole, seen = open_reader(path).at([i / info.fps for i in range(40)]), count_decoded(monkeypatch)
    places = [7, 11, 14, 19, 23, 28, 35]
    assert torch.equal(open_reader(path, info=info).at([i / info.fps for i in places]), whole[places])
    if codec == "libx264":
        assert len(seen) < 30


def test_seeking_uses_key_frames(tmp_path, monkeypatch):
    path = make(tmp_path / "a.mp4", n=40, fps=4, g="8", sc_threshold="0")
    info = probe(path)
    assert info.keyframes == (0, 2, 4, 6, 8)
    whole, seen = open_reader(path).at([i / 4 for i in range(40)]), count_decoded(monkeypatch)
    assert torch.equal(open_reader(path, info=info).at([0, 4.25, 9.75]), whole[[0, 17, 39]])
    assert len(seen) <= 2 + 4 + 8


@pytest.mark.parametrize("matrix", [Colorspace.ITU709, 6, Colorspace.BT2020])
@pytest.mark.parametrize("colour_range", [ColorRange.MPEG, ColorRange.JPEG])
def test_matrix_and_range_are_ffmpegs(tmp_path, matrix, colour_range):
    path = make(tmp_path / "a.mp4", n=3, picture=smooth(1)[0].numpy(), matrix=matrix, colour_range=colour_range, crf="10")
    want = ffmpeg(path, 64, 48).astype(int)
    assert np.abs(open_reader(path).at([0, 1 / 12, 2 / 12]).numpy() - want).mean() <= 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_backends_give_the_same_frames_in_any_order(tmp_path, backend):
    pytest.importorskip("av" if backend == "pyav" else backend)
    path = make(tmp_path / "a.mp4", n=40, fps=12, g="20", bf="3")
    reader = open_reader(path, backend)
    whole = reader.at([i / 12 for i in range(40)])
    assert which(whole) == list(range(40))
    for start, fps, n in ((1.3, 8, 9), (0.0, 24, 30), (2.0, 5, 6), (3.2, 12, 1)):
        times = [start + i / fps for i in range(n)]
        part = reader.at(times)
        assert torch.equal(part, whole[which(part)])
        assert all(abs(place / 12 - time) <= 0.5 / 12 + 1e-6 for place, time in zip(which(part), times, strict=True))
    assert (whole.int() - read_video(path).frames).abs().float().mean() <= 2


@pytest.mark.parametrize("matrix", [Colorspace.ITU709, 6])
def test_decord_agrees_with_pyav_in_colours_where_allowed(tmp_path, matrix):
    pytest.importorskip("decord")
    path = make(tmp_path / "a.mp4", n=3, picture=smooth(1)[0].numpy(), matrix=matrix, crf="10")
    got, want = (open_reader(path, backend).at([0, 0.1, 0.2], (24, 32)).int() for backend in ("decord", "pyav"))
    assert (got - want).abs().float().mean() <= 2


def test_decord_refuses_primaries_that_it_does_not_know(tmp_path):
    with pytest.raises(UserError, match="its colours are not those of BT.709"):
        open_reader(make(tmp_path / "a.mp4", n=2, primaries=12), "decord")


@pytest.mark.parametrize("name", ["vfr.mkv", "rotated.mov", "wide pixels.mp4", "av1.mp4", "10bit.mp4", "moving.gif", "444.mp4"])
def test_decord_refuses_what_it_reads_wrongly(corpus, name):
    with pytest.raises(UserError, match="needs reader pyav"):
        open_reader(corpus / name, "decord")


def test_a_reader_that_does_not_exist(corpus):
    with pytest.raises(UserError, match="did you mean 'pyav'"):
        open_reader(corpus / "plain.mp4", "pyavv")


def test_shrinking_in_the_decoder_equals_shrinking_afterwards(tmp_path):
    path = tmp_path / "a.mp4"
    encode(path, "libx264", size=(144, 256), crf="5")
    full = read_video(path).frames
    for size in ((48, 80), (64, 40), (143, 255)):
        small = read_video(path, size=size).frames
        assert (small.int() - fit(full, *size)).abs().float().mean() < 1.5
    assert torch.equal(read_video(path, size=(160, 256)).frames, fit(full, 160, 256))


def test_rotated_video_is_shrunk_upright(tmp_path):
    path = make(tmp_path / "a.mov", n=2, picture=smooth(1)[0].numpy(), rotate=90)
    small = read_video(path, size=(32, 24)).frames
    assert (small.int() - fit(read_video(path).frames, 32, 24)).abs().float().mean() < 1.5


@pytest.mark.slow
def test_torchcodec_gives_the_same_frames(tmp_path):
    """In its own process: torchcodec needs FFmpeg's libraries under their usual names, which PyAV's wheel changes."""
    if importlib.util.find_spec("torchcodec") is None:
        pytest.skip("torchcodec is not installed")
    libraries = Path(av.__file__).parents[1] / "av.libs"
    for library in libraries.glob("lib*.so.*"):
        stem, _, version = library.name.partition(".so.")
        (tmp_path / f"{stem.rpartition('-')[0]}.so.{version.split('.')[0]}").symlink_to(library)
    path = make(tmp_path / "a.mp4", n=40, fps=12, g="20", bf="3")
    code = f"""
from kling.data.reader import open_reader
for times in ([1.3 + i / 8 for i in range(9)], [0.0], [3.2]):
    a, b = (open_reader({str(path)!r}, name).at(times, (24, 32)).int() for name in ("torchcodec", "pyav"))
    assert (a - b).abs().float().mean() <= 2, (a - b).abs().float().mean()
"""
    clean = os.environ | {"LD_LIBRARY_PATH": f"{tmp_path}:{libraries}"}
    subprocess.run([sys.executable, "-c", code], check=True, env=clean, cwd=Path(__file__).parents[1])
