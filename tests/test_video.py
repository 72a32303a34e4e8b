"""Reading and writing video, on real files made during the test."""

from __future__ import annotations

import hashlib
import multiprocessing
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter

from kling.data import decode
from kling.data.image import read_image, write_png_frames
from kling.data.video import TO_RGB, VideoWriter, probe, read_video, stream_video, write_gif, write_video
from kling.errors import UserError

H, W = 48, 64
STEP = 5  # grey levels between one frame and the next, so that a frame can be told by its brightness


def make(
    path: Path,
    codec: str = "libx264",
    container: str | None = None,
    n: int = 24,
    fps: int = 12,
    times: list[int] | None = None,
    picture: np.ndarray | None = None,
    matrix: int = Colorspace.ITU709,
    colour_range: int = ColorRange.MPEG,
    primaries: int = 2,
    transfer: int = 2,
    rotate: float | None = None,
    pixel_aspect: Fraction | None = None,
    **options: str,
) -> Path:
    """Write a video using only PyAV. `times` are time stamps in 1/120 s."""
    muxer = {"movflags": "+faststart"} if path.suffix == ".mp4" else {}
    with av.open(f"file:{path}", "w", format=container or path.suffix[1:].replace("mkv", "matroska"), options=muxer) as out:
        stream = out.add_stream(codec, rate=fps, options=options)
        stream.width, stream.height, stream.pix_fmt = W, H, "rgb8" if codec == "gif" else "yuv420p"
        context = stream.codec_context
        context.colorspace, context.color_range = matrix, colour_range
        context.color_primaries, context.color_trc = primaries, transfer
        if times:
            context.time_base = Fraction(1, 120)
        if rotate is not None:
            stream.set_display_rotation(rotate)
        if pixel_aspect:
            context.sample_aspect_ratio = pixel_aspect
        for i in range(n):
            pixels = np.full((H, W, 3), 20 + STEP * i, np.uint8) if picture is None else picture
            frame = av.VideoFrame.from_ndarray(pixels)
            tags = {} if codec == "gif" else {"dst_colorspace": matrix, "dst_color_range": colour_range, "interpolation": TO_RGB}
            frame = frame.reformat(format=stream.pix_fmt, **tags)
            frame.pts, frame.time_base = (times[i], Fraction(1, 120)) if times else (i, Fraction(1, fps))
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


def which(frames: torch.Tensor) -> list[int]:
    """The frame numbers that `make` encoded as brightness."""
    return [round((level - 20) / STEP) for level in frames.float().mean((1, 2, 3)).tolist()]


def smooth(n: int = 9) -> torch.Tensor:
    """(n, H, W, 3) drifting gradients."""
    y, x = np.mgrid[:H, :W]
    return torch.from_numpy(np.stack([np.stack([60 + 2 * x + t, 40 + 3 * y, 200 - x - y - t], -1) for t in range(n)]).astype(np.uint8))


CONTAINERS = {
    "a.mp4": dict(codec="libx264"),
    "a.mov": dict(codec="libx264"),
    "a.mkv": dict(codec="libx264"),
    "a.webm": dict(codec="libvpx-vp9", deadline="realtime"),
    "a.avi": dict(codec="mpeg4", qmin="1", qmax="3"),
    "a.gif": dict(codec="gif"),
    "a.ts": dict(codec="libx264", container="mpegts"),
    "a.mpg": dict(codec="mpeg2video", container="mpeg", fps=25, qmin="1", qmax="3"),
    "a.h264": dict(codec="libx264", fps=25),
}


# ------------------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("name", CONTAINERS)
def test_every_container_reads_whole_and_in_part(tmp_path, name):
    path = make(tmp_path / name, **CONTAINERS[name])
    info = probe(path)
    assert (info.width, info.height, info.frames) == (W, H, 24)
    clip = read_video(path)
    assert clip.frames.dtype == torch.uint8 and clip.frames.shape == (24, H, W, 3) and clip.fps == info.fps
    if name != "a.gif":  # its 256 colours are too few to tell the frames
        assert which(clip.frames) == list(range(24))
    part = read_video(path, start=12 / info.fps, num_frames=5)
    assert torch.equal(part.frames, clip.frames[12:17])


def test_the_contents_decide_and_not_the_file_name(tmp_path):
    webm = make(tmp_path / "a.webm", **CONTAINERS["a.webm"])
    assert probe(webm.rename(tmp_path / "b.mp4")).codec.startswith(("vp9", "libvpx"))
    assert probe(make(tmp_path / "a.mp4").rename(tmp_path / "no_suffix")).codec == "h264"


@pytest.mark.parametrize(
    "name", ["über 猫.mp4", 'it\'s "it".mp4', "12:30.mp4", "100%d.mp4", "-i.mp4", "a#b?c=d&e.mp4", "http:x|y.mp4", "line\nend.mp4"]
)
def test_unusual_file_names(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write_video(name, smooth(5), 8)
    assert probe(name).frames == 5 and len(list(tmp_path.iterdir())) == 1


def test_frames_are_nearest_in_time_at_any_rate(tmp_path):
    path = make(tmp_path / "a.mp4", n=36, fps=24)
    for fps in (5, 8, 12, 23.976, 24, 30, 60):
        clip = read_video(path, fps=fps, start=0.2)
        assert len(clip.frames) == probe(path).count(fps, 0.2) and abs(len(clip.frames) - fps * (36 / 24 - 0.2)) <= 1
        assert all(abs(time - (0.2 + i / fps)) <= 0.5 / 24 + 1e-5 for i, time in enumerate(clip.times))
        assert which(clip.frames) == [round(time * 24) for time in clip.times]


def test_variable_rate_is_read_by_time_stamp(tmp_path):
    times = [0, 10, 20, 30, 60, 90, 120, 125, 130, 240]  # 1/120 s
    path = make(tmp_path / "a.mkv", n=len(times), times=times)
    assert probe(path).fps == pytest.approx(9 / 2, abs=0.01)  # nine intervals in two seconds, whatever the header says
    clip = read_video(path, fps=8, num_frames=17)
    assert which(clip.frames) == [min(range(len(times)), key=lambda k: abs(times[k] - 15 * i)) for i in range(17)]


def test_a_time_stamp_gone_wrong_is_not_filled_with_copies(tmp_path):
    with pytest.raises(UserError, match="jump by 90"):
        probe(make(tmp_path / "a.mkv", n=4, times=[0, 10, 20, 120 * 900]))


def test_seeking_changes_nothing(tmp_path):
    path = make(tmp_path / "a.mp4", n=45, fps=15, g="8", bf="2")
    whole = read_video(path)
    for start in (0.5, 1.0, 1.7, 2.5):
        part = read_video(path, start=start, num_frames=4)
        assert part.times == pytest.approx([whole.times[round(start * 15 - 1e-6) + i] for i in range(4)])
        assert torch.equal(part.frames, whole.frames[[whole.times.index(time) for time in part.times]])


def test_stream_gives_the_same_frames(tmp_path):
    path = make(tmp_path / "a.mp4")
    streamed = stream_video(path, fps=8, size=(32, 32))
    assert torch.equal(torch.stack(list(streamed)), read_video(path, fps=8, size=(32, 32)).frames)


def test_one_frame(tmp_path):
    path = make(tmp_path / "a.mp4", n=1)
    assert probe(path).frames == 1 and which(read_video(path).frames) == [0]


@pytest.mark.parametrize(("degrees", "turns"), [(90, 1), (180, 2), (-90, 3)])
def test_rotation_is_applied(tmp_path, degrees, turns):
    picture = smooth(1)[0].numpy()
    path = make(tmp_path / "a.mov", n=3, picture=picture, rotate=degrees)
    info, want = probe(path), np.rot90(picture, turns).astype(float)
    assert (info.height, info.width) == want.shape[:2] and info.rotation % 360 == degrees % 360
    assert np.abs(read_video(path).frames[0].numpy() - want).mean() < 2


def test_mirrored_video_is_mirrored_back(tmp_path):
    picture, path = smooth(1)[0].numpy(), tmp_path / "a.mov"
    raw = make(path, n=3, picture=picture, rotate=180).read_bytes()
    minus, plus = (x.to_bytes(4, "big", signed=True) for x in (-65536, 65536))
    matrix = minus + bytes(12) + minus
    assert raw.count(matrix) == 1
    path.write_bytes(raw.replace(matrix, minus + bytes(12) + plus))
    assert np.abs(read_video(path).frames[0].numpy() - picture[:, ::-1].astype(float)).mean() < 2


def test_pixels_are_squared(tmp_path):
    path = make(tmp_path / "a.mp4", n=3, pixel_aspect=Fraction(3, 2))
    assert (probe(path).width, probe(path).height) == (96, H) and read_video(path).frames.shape == (3, H, 96, 3)


@pytest.mark.parametrize("matrix", [Colorspace.ITU709, Colorspace.ITU601, Colorspace.BT2020])
@pytest.mark.parametrize("colour_range", [ColorRange.MPEG, ColorRange.JPEG])
def test_colours_are_read_as_tagged(tmp_path, matrix, colour_range):
    colour = np.uint8([200, 60, 30])
    tag = 6 if matrix == Colorspace.ITU601 else matrix  # AVCOL_SPC_SMPTE170M
    path = make(tmp_path / "a.mp4", n=2, picture=colour + np.zeros((H, W, 3), np.uint8), matrix=tag, colour_range=colour_range, crf="5")
    error = read_video(path).frames[0].numpy().astype(float) - colour
    assert np.abs(error).max() <= 2


XY = {  # red, green, blue (ITU-R BT.709-6, BT.2020-2; SMPTE EG 432-1), all with white D65
    1: ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060)),
    9: ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046)),
    12: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),
}


def seen_as(colour: tuple[int, ...], primaries: int) -> np.ndarray:
    """A colour in sRGB, by way of XYZ from the chromaticities."""

    def to_xyz(primaries: int) -> np.ndarray:
        columns = np.array([(x / y, 1, (1 - x - y) / y) for x, y in XY[primaries]]).T
        white = np.array([0.3127 / 0.3290, 1, (1 - 0.3127 - 0.3290) / 0.3290])
        return columns * np.linalg.solve(columns, white)

    c = np.array(colour) / 255
    light = np.linalg.solve(to_xyz(1), to_xyz(primaries) @ np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)).clip(0, 1)
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("primaries", [1, 9, 12])
@pytest.mark.parametrize("colour", [(60, 200, 90), (200, 60, 30), (128, 128, 128), (250, 240, 5), (20, 30, 140)])
def test_primaries_become_srgb(tmp_path, primaries, colour, caplog):
    """As for a picture with a profile, where P3's (60, 200, 90) is (0, 205, 72). Whole, shrunk, and from the second frame on."""
    picture = np.uint8(colour) + np.zeros((H, W, 3), np.uint8)
    path = make(tmp_path / "a.mp4", n=3, picture=picture, primaries=primaries, transfer=1, crf="1")
    want = seen_as(colour, primaries)
    if (primaries, colour) == (12, (60, 200, 90)):
        assert want == pytest.approx([0, 205, 72], abs=2)  # of the profile, in whole levels
    for frames in (read_video(path).frames, read_video(path, size=(16, 24)).frames):
        assert np.abs(frames.numpy() - want).max() <= 5  # two levels of 8-bit 4:2:0, which the matrix and the curve stretch
    assert not caplog.records


def test_colours_that_are_not_brought_to_srgb_are_named(tmp_path, caplog):
    """HDR and rare primaries, in one line each, once a file."""
    for name, tags, says in (
        ("pq.mp4", {"primaries": 9, "transfer": 16, "matrix": Colorspace.BT2020}, "HDR (PQ)"),
        ("cinema.mp4", {"primaries": 11, "transfer": 1}, "of the primaries DCI-P3"),
    ):
        caplog.clear()
        path = make(tmp_path / name, n=2, picture=np.full((H, W, 3), 128, np.uint8), **tags)
        for _ in range(2):
            probe(path)
        (record,) = caplog.records
        assert says in record.getMessage() and str(path) in record.getMessage() and "\n" not in record.getMessage()


@pytest.mark.slow
def test_the_map_of_hdr_colours_is_computed_once(tmp_path):
    """swscale takes seconds for it: for the first of two files, and not for their probes."""
    picture = np.full((H, W, 3), 128, np.uint8)
    paths = [make(tmp_path / name, n=2, picture=picture, primaries=9, transfer=16, matrix=Colorspace.BT2020) for name in ("a.mp4", "b.mp4")]
    decode._scaler.cache_clear()
    spent = [time.process_time()]
    for step in (probe, read_video, probe, read_video):
        step(paths[len(spent) > 2])
        spent.append(time.process_time())
    first, *others = (spent[2] - spent[1], spent[1] - spent[0], spent[3] - spent[2], spent[4] - spent[3])
    assert max(others) < first / 4, (first, others)


def test_a_converter_is_kept_from_read_to_read_and_changes_nothing(tmp_path, monkeypatch):
    """One for each size, and for each thread; to the bit what a new one gives."""
    y, x = np.mgrid[:H, :W]
    picture, made = np.stack([4 * x, 5 * y, 255 - 2 * x - 2 * y], -1).astype(np.uint8), []
    paths = [make(tmp_path / name, n=2, picture=picture) for name in ("a.mp4", "b.mp4")]
    monkeypatch.setattr(decode, "VideoReformatter", lambda: made.append(1) or VideoReformatter())
    decode._scaler.cache_clear()
    frames = [read_video(path, size=size).frames for size in ((16, 24), (20, 32), (16, 24)) for path in paths]
    assert len(made) == 3 and torch.equal(frames[0], frames[5])  # and the one of `probe`, at the file's own size
    decode._scaler.cache_clear()
    assert torch.equal(read_video(paths[1], size=(16, 24)).frames, frames[0])
    before = len(made)
    with ThreadPoolExecutor(1) as other:
        assert torch.equal(other.submit(read_video, paths[0], size=(16, 24)).result().frames, frames[0])
    assert len(made) == before + 1


def test_size_and_limits(tmp_path, monkeypatch):
    path = make(tmp_path / "a.mp4")
    assert read_video(path, size=(32, 20), num_frames=2).frames.shape == (2, 32, 20, 3)
    for wrong in (dict(fps=0), dict(fps=float("nan")), dict(start=-1.0), dict(start=9.0), dict(num_frames=0), dict(num_frames=25)):
        with pytest.raises(UserError):
            read_video(path, **wrong)
    with pytest.raises(UserError, match="whole number"):
        read_video(path, size=(32.5, 20))
    monkeypatch.setattr("kling.data.video.MAX_GIB", 1e-6)
    with pytest.raises(UserError, match="GiB"):
        read_video(path)


# ------------------------------------------------------------------------------------------------------------------ bad files


@pytest.mark.parametrize(
    ("contents", "says"),
    [
        (b"", "empty"),
        (b"just some words\n" * 60, "text"),
        (b"#EXTM3U\n/etc/hostname\n", "text"),
        ("日本語の説明。".encode() * 40, "text"),
        (bytes(range(256)) * 8, "unknown data"),
        (b"\x89PNG\r\n\x1a\n" + bytes(600), "PNG image"),
        (b"PK\x03\x04" + bytes(600), "zip"),
        (b"\x00\x00\x00\x18ftypisom" + bytes(600), "damaged|no video stream|no whole frame"),
        (b"\x1aE\xdf\xa3" + bytes(600), "damaged|no video stream|no whole frame"),
    ],
)
def test_files_that_are_not_videos_are_refused_in_one_line(tmp_path, contents, says):
    path = tmp_path / "x.mp4"
    path.write_bytes(contents)
    with pytest.raises(UserError, match=says) as error:
        probe(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_missing_folder_and_sound_only(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        probe(tmp_path / "none.mp4")
    with pytest.raises(UserError, match="folder"):
        probe(tmp_path)
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        out.mux(stream.encode(frame))
        out.mux(stream.encode())
    with pytest.raises(UserError, match="no video stream, only audio"):
        probe(path)


def test_metadata_that_is_not_text_is_ignored(tmp_path):
    path = make(tmp_path / "a.mkv")
    raw = path.read_bytes()
    assert b"DURATION" in raw
    path.write_bytes(raw.replace(b"DURATION", b"D\xdcRATION"))
    assert probe(path).frames == 24


def test_cut_short(tmp_path):
    raw = make(tmp_path / "a.mp4", picture=np.random.default_rng(0).integers(0, 256, (H, W, 3), dtype=np.uint8)).read_bytes()
    for part in (0.9, 0.5, 0.02):
        (tmp_path / "b.mp4").write_bytes(raw[: int(len(raw) * part)])
        with pytest.raises(UserError, match="cut short|damaged|no whole frame"):
            probe(tmp_path / "b.mp4")


def test_bit_rot_is_an_error_and_never_a_wrong_frame(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (H, W, 3), dtype=np.uint8)
    path = make(tmp_path / "a.mp4", picture=noise, n=8, g="1")
    raw = bytearray(path.read_bytes())
    half = len(raw) // 2
    raw[half : half + 400] = bytes(b ^ 0x5A for b in raw[half : half + 400])
    path.write_bytes(raw)
    with pytest.raises(UserError, match="damaged"):
        read_video(path)


# ------------------------------------------------------------------------------------------------------------------- writing


def test_round_trip(tmp_path):
    frames = smooth(17)
    write_video(tmp_path / "new" / "a.mp4", frames, 8)
    info, clip = probe(tmp_path / "new" / "a.mp4"), read_video(tmp_path / "new" / "a.mp4")
    assert (info.width, info.height, info.frames, info.fps, info.codec, info.pix_fmt) == (W, H, 17, 8, "h264", "yuv420p")
    error = clip.frames.float() - frames.float()
    assert error.abs().mean() < 1.5 and error.mean((0, 1, 2)).abs().max() < 0.5  # no colour cast
    with av.open(str(tmp_path / "new" / "a.mp4")) as file:
        context = file.streams.video[0].codec_context
        assert (context.colorspace, context.color_range, context.color_trc, context.color_primaries) == (1, 1, 1, 1)


@pytest.mark.parametrize("suffix", ["mp4", "mov", "mkv"])
def test_same_frames_same_bytes(tmp_path, suffix):
    paths = [tmp_path / f"{k}.{suffix}" for k in "ab"]
    for path in paths:
        write_video(path, smooth(9).numpy(), 29.97)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    with VideoWriter(paths[0], 29.97) as out:  # in pieces
        out.write(smooth(9)[0])
        out.write(smooth(9)[1:])
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert probe(paths[0]).fps == pytest.approx(30000 / 1001, abs=1e-3 if suffix == "mkv" else 1e-9)


def encoded(size: tuple[int, int]) -> list[str]:
    """Hashes of the files from encoding the same frames repeatedly."""
    h, w = size
    rng = np.random.default_rng(0)
    blocks = np.kron(rng.integers(0, 256, (17, h // 8, w // 8, 3)), np.ones((1, 8, 8, 1), np.int64))
    frames = (blocks + rng.integers(-12, 12, blocks.shape)).clip(0, 255).astype(np.uint8)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for k in range(4):
            write_video(Path(folder) / f"{k}.mp4", frames, 8)
            found.append(hashlib.sha256((Path(folder) / f"{k}.mp4").read_bytes()).hexdigest())
    return found


def test_same_frames_same_bytes_again_and_in_other_processes():
    """x264's AVX-512 code failed this at most sizes. Uses new processes, not forks: a fork of a process with threads may hang."""
    sizes = [(64, 112), (112, 64), (80, 80), (128, 224)]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        elsewhere = pool.map_async(encoded, 4 * sizes, chunksize=1).get(timeout=200)
    for i, size in enumerate(sizes):
        assert len({digest for digests in [encoded(size), *elsewhere[i::4]] for digest in digests}) == 1, size


def test_a_failed_write_leaves_nothing_and_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.mp4"
    for good in (False, True):
        if good:
            write_video(path, smooth(5), 8)
        before = path.read_bytes() if good else None
        for failure in (RuntimeError, KeyboardInterrupt, FileNotFoundError):
            with pytest.raises(failure), VideoWriter(path, 8) as out:
                out.write(smooth(5))
                raise failure("mine")
        with pytest.raises(UserError, match="no frame"), VideoWriter(path, 8):
            pass
        assert [p.read_bytes() for p in tmp_path.iterdir()] == ([before] if good else [])


def test_unwritable_videos_are_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder.mp4").mkdir()
    for path in (tmp_path / "file" / "a.mp4", tmp_path / "folder.mp4", Path("/proc/a.mp4"), tmp_path / ("n" * 300 + ".mp4")):
        with pytest.raises(UserError, match="cannot be written"):
            write_video(path, smooth(1), 8)
    with pytest.raises(UserError, match="odd"):
        write_video(tmp_path / "a.mp4", smooth(1)[:, :-1], 8)
    with pytest.raises(UserError, match=".mp4"):
        write_video(tmp_path / "a.wmv", smooth(1), 8)
    with pytest.raises(UserError, match="fps"):
        write_video(tmp_path / "a.mp4", smooth(1), 0)
    with pytest.raises(ValueError, match="frame 1 is"), VideoWriter(tmp_path / "a.mp4", 8) as out:
        out.write(smooth(1))
        out.write(smooth(1)[:, 2:])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder.mp4"]


def test_gif_and_png_frames(tmp_path):
    frames = smooth(9)
    write_gif(tmp_path / "a.gif", frames, 8)
    assert probe(tmp_path / "a.gif").duration == pytest.approx(9 / 8, abs=0.02)
    assert (read_video(tmp_path / "a.gif", fps=8).frames.float() - frames.float()).abs().mean() < 12
    paths = write_png_frames(tmp_path / "png", frames)
    assert [p.name for p in paths][:2] == ["frame_00000.png", "frame_00001.png"]
    assert all(torch.equal(read_image(p), frame) for p, frame in zip(paths, frames, strict=True))
    with pytest.raises(UserError, match="already holds"):
        write_png_frames(tmp_path / "png", frames)
