"""Checks the visitors' uploads. First come path, size, first bytes and header of a file;
only then it is decoded. Refused files are deleted, and the reason is remembered. A video that is larger or longer than the model takes is
reduced once, while it is read; later requests open the small copy. What no browser shows, such as a TIFF, is kept as a copy that it does.

Browsers and clients upload to Gradio's folder and then name the file in their request; other paths and links are refused.
"""

from __future__ import annotations

import base64
import binascii
import os
import shutil
import threading
import warnings
from collections import OrderedDict
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import av
from PIL import Image

from kling.cameras.files import load_trajectory
from kling.data.decode import VideoInfo
from kling.data.image import FORMATS, read_image, write_png
from kling.data.video import VideoWriter, probe, stream_video
from kling.errors import UserError
from kling.runtime.files import head, sniff, written
from kling.sampling.record import input_hash
from kling.shapes import ASPECTS

MAX_BYTES = 64 * 2**20
MAX_PIXELS = 25_000_000  # of an image
MAX_FRAME = 4096 * 2304  # pixels of a video frame
MAX_FRAMES = 50_000  # stored in a video; its packets are counted, not decoded
MAX_SECONDS = 60.0  # of a video; the rest is cut off
MAX_DECODED = 4_000_000_000  # pixels that are decoded of one video: a minute of 1080p30; more is cut off
MAX_POSES = 1_000_000  # bytes of a camera file
NEARLY_LOSSLESS = 10  # H.264's crf of a reduced copy
REMEMBERED = 1000  # number of uploads whose outcome is remembered
ENDINGS = {"mov": ".mp4", "matroska": ".webm", "PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp"}


@dataclass(frozen=True)
class Fate:
    """The outcome of an upload: its stored copy and how it was changed, or why it was refused. stamp: of the file, None once deleted."""

    stamp: tuple[int, int] | None
    kept: str = ""
    note: dict[str, Any] | None = None
    refusal: UserError | None = None

    def told(self) -> tuple[str, dict[str, Any] | None]:
        if self.refusal is not None:
            raise self.refusal.with_traceback(None)
        os.utime(self.kept)
        return self.kept, self.note


class Uploads:
    """arrivals: Gradio's upload folder. store: the folder of accepted files, named by their contents.

    fps, sizes (aspect -> (H, W)): the model's; videos are brought down to what it takes.
    """

    def __init__(self, arrivals: Path, store: Path, fps: float = 8.0, sizes: dict[str, tuple[int, int]] = ASPECTS) -> None:
        self.arrivals, self.store = arrivals.resolve(), store.resolve()
        self.store.mkdir(parents=True, exist_ok=True)
        self.fps, self.sizes = fps, sizes
        self._fate: OrderedDict[str, Fate] = OrderedDict()  # by kind and path
        self._looking = [threading.Lock() for _ in range(16)]  # a page names one upload in several requests at once: only one checks it
        self._decoding = threading.Lock()  # one video is reduced at a time

    def accept(self, payload: Any, kind: str) -> str | None:
        """The kept copy of an upload: kind "image", "video" or "camera"; None for nothing. Raises `UserError`, and deletes it, if refused.

        payload: what the request says, {"path": …} or {"video": {"path": …}}, or a path of `store` itself.
        """
        found = self._look(payload, kind)
        return found and found[0]

    def note(self, payload: Any, kind: str = "video") -> dict[str, Any] | None:
        """What was done to an accepted upload so that the model, or a browser, can take it; None if nothing was.

        {"name"} of a picture, {"name", "size", "seconds", "of"} of a video.
        """
        found = self._look(payload, kind)
        return found and found[1]

    def _look(self, payload: Any, kind: str) -> tuple[str, dict[str, Any] | None] | None:
        named = _named(payload)
        if named is None:
            return None
        path = Path(os.path.abspath(named))
        with self._looking[hash(path) % len(self._looking)]:
            known = self._fate.get(f"{kind} {path}")
            if known is not None and _stamp(path) in (None, known.stamp) and (known.refusal or Path(known.kept).is_file()):
                return known.told()  # checked before, by another request of the page
            path = self._place(path)
            if path.parent == self.store:
                return str(path), None
            seen = _stamp(path)
            try:
                check = {"image": self._check_picture, "video": self._check_video, "camera": _check_camera}[kind]
                found = check(path)
                fate = Fate(seen, *(found if isinstance(found, tuple) else (str(self._keep(path, found)),)))
            except UserError as error:
                path.unlink(missing_ok=True)
                values = {name: path.name if str(value) == str(path) else value for name, value in error.values.items()}
                fate = Fate(None, refusal=UserError(str(error).replace(str(path), path.name), code=error.code, **values))
            self._fate[f"{kind} {path}"] = fate
            while len(self._fate) > REMEMBERED:
                self._fate.popitem(last=False)
        return fate.told()

    def place(self, payload: Any) -> Path:
        """The path of an upload that is only read. Raises `UserError` for no file, and for any path other than an upload's."""
        named = _named(payload)
        if named is None:
            raise _not_here()
        path = self._place(Path(os.path.abspath(named)))
        _check_size(path, MAX_BYTES)
        return path

    def keep(self, result: Path) -> str:
        """A copy of one of our own results, to be given as the next input."""
        return str(self._keep(result, result.suffix))

    def accept_drawing(self, url: Any) -> str | None:
        """A mask painted in the page, as the PNG of a `data:` URL: painted is white. None if nothing was painted."""
        if not url:
            return None
        prefix = "data:image/png;base64,"
        if not isinstance(url, str) or not url.startswith(prefix) or len(url) > MAX_POSES:
            raise UserError("the mask is not a drawing of this page: clear it and draw it again", code="mask_damaged")
        try:
            data = base64.b64decode(url[len(prefix) :], validate=True)
        except (binascii.Error, ValueError):
            raise UserError("the mask is damaged: clear it and draw it again", code="mask_damaged") from None
        temporary = self.store / f".{os.urandom(8).hex()}.png"
        try:
            temporary.write_bytes(data)
            _check_image(temporary)
            return str(self._keep(temporary, ".png"))
        except UserError:
            raise UserError("the mask is damaged: clear it and draw it again", code="mask_damaged") from None
        finally:
            temporary.unlink(missing_ok=True)

    def _place(self, path: Path) -> Path:
        """Check that a path is that of an uploaded file, and return it."""
        inside = path.is_relative_to(self.arrivals) or path.parent == self.store
        try:
            if inside and path.resolve() == path and path.is_file():  # so it is no link
                return path
        except (OSError, ValueError):  # a name that no file can have
            pass
        raise _not_here()

    def _check_picture(self, path: Path) -> str | tuple[str, dict[str, Any]]:
        """The suffix of a picture that is kept unchanged; for one that no browser shows, its copy and a note."""
        kind = _check_image(path)
        if kind in ENDINGS:
            return ENDINGS[kind]
        kept = self.store / f"{input_hash(path)[:24]}-{kind.lower()}.png"
        if not kept.exists():
            write_png(kept, read_image(path))
        kept.touch()
        return str(kept), {"name": path.name}

    def _check_video(self, path: Path) -> str | tuple[str, dict[str, Any]]:
        """The suffix of a video that is kept unchanged; for one that is reduced, or that no browser plays, its copy and a note."""
        demuxer = _measure_video(path)
        info = probe(path)
        size = covering(info, self.sizes)
        seconds = min(info.duration, MAX_SECONDS, MAX_DECODED / (info.width * info.height * info.fps))
        if info.plays_in_browsers and size[0] * size[1] * 2 > info.width * info.height and seconds == info.duration:
            return ENDINGS[demuxer]
        frames = min(info.count(self.fps), max(1, round(seconds * self.fps)))
        kept = self.store / f"{input_hash(path)[:24]}-{size[1]}x{size[0]}-{self.fps:g}-{frames}.mp4"
        with self._decoding:
            if not kept.exists():
                with VideoWriter(kept, self.fps, crf=NEARLY_LOSSLESS) as out:
                    for frame in stream_video(path, fps=self.fps, num_frames=frames, size=size):
                        out.write(frame)
        kept.touch()
        return str(kept), {"name": path.name, "size": f"{size[1]}x{size[0]}", "seconds": round(seconds, 1), "of": round(info.duration, 1)}

    def _keep(self, path: Path, ending: str) -> Path:
        kept = self.store / f"{input_hash(path)[:24]}{ending}"
        if kept.exists():
            kept.touch()
        else:
            with written(kept) as temporary:  # a page names one upload in several requests at once
                shutil.copyfile(path, temporary)
        return kept


def covering(info: VideoInfo, sizes: dict[str, tuple[int, int]]) -> tuple[int, int]:
    """(H, W), even, of a video reduced to the smallest size that covers every size of the model; its own size if that is smaller."""
    scale = min(1.0, max(max(H / info.height, W / info.width) for H, W in sizes.values()))
    H, W = (max(2, 2 * round(side * scale / 2)) for side in (info.height, info.width))
    return H, W


def _stamp(path: Path) -> tuple[int, int] | None:
    """A value that distinguishes files with the same name; None if there is no file."""
    try:
        found = path.lstat()
    except (OSError, ValueError):
        return None
    return found.st_mtime_ns, found.st_size


def _not_here() -> UserError:
    return UserError("a file was named that was not uploaded here: upload it first", code="not_uploaded")


def _named(payload: Any) -> str | None:
    """The path in a request's payload, which may have any form."""
    if isinstance(payload, dict) and isinstance(payload.get("video"), dict):
        payload = payload["video"]
    if payload in (None, "", {}):
        return None
    named = payload.get("path") if isinstance(payload, dict) else payload
    if not isinstance(named, str) or not named or "\0" in named or len(named) > 4096:
        raise _not_here()
    return named


def _check_size(path: Path, limit: int) -> None:
    if path.stat().st_size > limit:
        size, most = f"{path.stat().st_size / 2**20:.1f}", f"{limit / 2**20:.0f}"
        raise UserError(f"{path} has {size} MiB: give at most {most} MiB", code="file_too_large", file=path, size=size, most=most)


def _check_image(path: Path) -> str:
    """Pillow's name of the format of a picture that can be read. Raises `UserError`."""
    _check_size(path, MAX_BYTES)
    head(path)
    try:
        with warnings.catch_warnings(), Image.open(path, formats=FORMATS) as image:  # the header only
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            (w, h), kind = image.size, image.format
        pixels, size = w * h, f"{w}x{h}"
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        pixels, size, kind = Image.MAX_IMAGE_PIXELS, f"more than {Image.MAX_IMAGE_PIXELS}", None
    except (OSError, ValueError, SyntaxError):
        pixels, size, kind = 0, "", None
    if pixels > MAX_PIXELS:
        most = MAX_PIXELS // 10**6
        line = f"{path} has {size} pixels: give at most {most} megapixels"
        raise UserError(line, code="image_too_large", file=path, size=size.replace("more than ", ">"), most=most)
    read_image(path)  # raises the precise error
    return kind or ""


def _measure_video(path: Path) -> str:
    """FFmpeg's name of the container, once nothing about the file is too large to look closer."""
    _check_size(path, MAX_BYTES)
    demuxer, kind = sniff(head(path))
    if demuxer is None:
        raise UserError(
            f"{path} is not a video: it holds {kind} (give an mp4, mov, webm, mkv, avi or gif)", code="not_a_video", file=path, kind=kind
        )
    w = h = frames = 0
    try:
        with av.open(f"file:{path}", format=demuxer, metadata_errors="replace") as container:  # packets only
            if streams := container.streams.video:
                w, h = streams[0].width, streams[0].height
                frames = sum(1 for p in islice(container.demux(streams[0]), MAX_FRAMES + 2) if p.size) if w * h <= MAX_FRAME else 0
    except (av.FFmpegError, OSError):
        w = h = frames = 0  # `probe` says what is wrong
    if w * h > MAX_FRAME:
        raise UserError(
            f"{path} is {w}x{h}: give a video of at most 4096x2304", code="video_too_large", file=path, size=f"{w}x{h}", most="4096x2304"
        )
    if frames > MAX_FRAMES:
        raise UserError(
            f"{path} has more than {MAX_FRAMES} frames: give a shorter video", code="too_many_frames", file=path, most=MAX_FRAMES
        )
    return demuxer


def _check_camera(path: Path) -> str:
    _check_size(path, MAX_POSES)
    head(path)
    try:
        load_trajectory(path, 5)
    except UserError as error:
        raise UserError(str(error), code="camera_file", why=str(error).removeprefix("camera file ").replace(str(path), path.name)) from None
    return ".json" if path.read_text(encoding="utf-8-sig").lstrip().startswith("{") else ".txt"
