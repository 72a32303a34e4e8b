"""What visitors hand in. A file is looked at from outside first: where it lies, how large it is, what its bytes and its header say.
Only then a decoder sees it. What is refused is deleted.

Browsers and clients upload to a folder of Gradio's and then name the file in their request; any other place is refused, and so are links.
"""

from __future__ import annotations

import base64
import binascii
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import av
from PIL import Image

from kling.cameras.files import load_trajectory
from kling.data.image import FORMATS, read_image
from kling.data.video import probe
from kling.errors import UserError
from kling.runtime.files import head, sniff, written
from kling.sampling.record import input_hash

MAX_BYTES = 64 * 2**20
MAX_PIXELS = 25_000_000  # of an image
MAX_FRAME = 4096 * 2304  # pixels of a video frame
MAX_FRAMES = 3000
MAX_VIDEO = 2**30  # bytes of a video once it is decoded
MAX_POSES = 1_000_000  # bytes of a camera file
ENDINGS = {"mov": ".mp4", "matroska": ".mkv", "PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp"}


class Uploads:
    """arrivals: where Gradio puts uploads. store: where the accepted ones are kept, named by their contents."""

    def __init__(self, arrivals: Path, store: Path) -> None:
        self.arrivals, self.store = arrivals.resolve(), store.resolve()
        self.store.mkdir(parents=True, exist_ok=True)

    def accept(self, payload: Any, kind: str) -> str | None:
        """The kept copy of an upload: kind "image", "video" or "camera"; None for nothing. Raises `UserError`, and deletes it, if refused.

        payload: what the request says, {"path": …} or {"video": {"path": …}}, or a path of `store` itself.
        """
        path = self._place(payload)
        if path is None or path.parent == self.store:
            return path and str(path)
        try:
            ending = {"image": _check_image, "video": _check_video, "camera": _check_camera}[kind](path)
            return str(self._keep(path, ending))
        except UserError as error:
            path.unlink(missing_ok=True)
            raise UserError(str(error).replace(str(path), path.name)) from None

    def keep(self, result: Path) -> str:
        """A copy of one of our own results, to be given as the next input."""
        return str(self._keep(result, result.suffix))

    def accept_drawing(self, url: Any) -> str | None:
        """A mask that was painted in the page, as the PNG of a `data:` URL: painted is white. None if nothing was painted."""
        if not url:
            return None
        prefix = "data:image/png;base64,"
        if not isinstance(url, str) or not url.startswith(prefix) or len(url) > MAX_POSES:
            raise UserError("the mask is not a drawing of this page: clear it and draw it again")
        try:
            data = base64.b64decode(url[len(prefix) :], validate=True)
        except (binascii.Error, ValueError):
            raise UserError("the mask is damaged: clear it and draw it again") from None
        temporary = self.store / f".{os.urandom(8).hex()}.png"
        try:
            temporary.write_bytes(data)
            _check_image(temporary)
            return str(self._keep(temporary, ".png"))
        except UserError:
            raise UserError("the mask is damaged: clear it and draw it again") from None
        finally:
            temporary.unlink(missing_ok=True)

    def _place(self, payload: Any) -> Path | None:
        """Where the file lies, if it is one that was uploaded here."""
        if isinstance(payload, dict) and isinstance(payload.get("video"), dict):
            payload = payload["video"]
        if payload in (None, "", {}):
            return None
        named = payload.get("path") if isinstance(payload, dict) else payload
        if not isinstance(named, str) or "\0" in named or len(named) > 4096:
            raise UserError("a file was named that was not uploaded here: upload it first")
        path = Path(os.path.abspath(named))
        inside = path.is_relative_to(self.arrivals) or path.parent == self.store
        if not inside or path.is_symlink() or path.resolve() != path or not path.is_file():
            raise UserError("a file was named that was not uploaded here: upload it first")
        return path

    def _keep(self, path: Path, ending: str) -> Path:
        kept = self.store / f"{input_hash(path)[:24]}{ending}"
        if kept.exists():
            kept.touch()
        else:
            with written(kept) as temporary:  # a page names one upload in several requests at once
                shutil.copyfile(path, temporary)
        return kept


def _check_size(path: Path, limit: int) -> None:
    if path.stat().st_size > limit:
        raise UserError(f"{path} has {path.stat().st_size / 2**20:.1f} MiB: give at most {limit / 2**20:.0f} MiB")


def _check_image(path: Path) -> str:
    _check_size(path, MAX_BYTES)
    head(path)
    try:
        with warnings.catch_warnings(), Image.open(path, formats=FORMATS) as image:  # the header only
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            (w, h), kind = image.size, image.format
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning):
        w, h, kind = 0, 0, None
    if w * h > MAX_PIXELS:
        raise UserError(f"{path} has {w}x{h} pixels: give at most {MAX_PIXELS // 10**6} megapixels")
    read_image(path)  # says what is wrong
    return ENDINGS.get(kind or "", ".img")


def _check_video(path: Path) -> str:
    _check_size(path, MAX_BYTES)
    demuxer, kind = sniff(head(path))
    if demuxer is None:
        raise UserError(f"{path} is not a video: it holds {kind} (give an mp4, mov, webm, mkv, avi or gif)")
    try:
        with av.open(f"file:{path}", format=demuxer, metadata_errors="replace") as container:  # packets only
            streams = container.streams.video
            w, h = (streams[0].width, streams[0].height) if streams else (0, 0)
            frames = sum(1 for p in container.demux(streams[0]) if p.size) if streams and w * h <= MAX_FRAME else 0
    except (av.FFmpegError, OSError):
        w = h = frames = 0  # `probe` says what is wrong
    if w * h > MAX_FRAME:
        raise UserError(f"{path} is {w}x{h}: give a video of at most 4096x2304")
    if frames > MAX_FRAMES or frames * w * h * 3 > MAX_VIDEO:
        raise UserError(f"{path} has {frames} frames of {w}x{h}: give at most {MAX_FRAMES}, and at most 1 GiB of pixels")
    probe(path)
    return ENDINGS.get(demuxer, f".{demuxer}")


def _check_camera(path: Path) -> str:
    _check_size(path, MAX_POSES)
    head(path)
    load_trajectory(path, 5)
    return ".json" if path.read_text(encoding="utf-8-sig").lstrip().startswith("{") else ".txt"
