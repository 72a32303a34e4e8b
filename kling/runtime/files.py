"""Detects what a file contains from its first bytes; writes files and folders under a temporary name, then moves them into place."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from kling.errors import FULL, UserError

DEEPEST = 100  # nesting depth allowed in JSON; thousands of levels would overflow the code that walks it later
LONGEST = 100_000  # characters of a value in Python syntax
END = 2**20  # bytes of a file, at both ends, that tell weights apart
HEAD = 512  # bytes that `sniff` needs: two MPEG-TS packets and a little

# (offset, magic, FFmpeg demuxer). The demuxer is forced: left to guess, FFmpeg takes a text file named x.mp4 for a playlist
# or a script and opens what it names.
VIDEO_MAGIC = (
    (4, b"ftyp", "mov"), (4, b"moov", "mov"), (4, b"mdat", "mov"), (4, b"wide", "mov"), (4, b"free", "mov"), (4, b"skip", "mov"),
    (0, b"\x1aE\xdf\xa3", "matroska"), (8, b"AVI ", "avi"), (0, b"GIF8", "gif"), (0, b"FLV\x01", "flv"), (0, b"OggS", "ogg"),
    (0, b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "asf"), (0, b"\x00\x00\x01\xba", "mpeg"), (0, b"DKIF", "ivf"),
    (0, b"YUV4MPEG2 ", "yuv4mpegpipe"), (0, b"\x06\x0e\x2b\x34", "mxf"),
    (0, b"\x00\x00\x00\x01\x67", "h264"), (0, b"\x00\x00\x01\x67", "h264"), (0, b"\x00\x00\x00\x01\x40\x01", "hevc"),
)  # fmt: skip
OTHER_MAGIC = (
    (0, b"\x89PNG", "a PNG image"), (0, b"\xff\xd8\xff", "a JPEG image"), (8, b"WEBP", "a WebP image"), (0, b"BM", "a BMP image"),
    (0, b"II*\x00", "a TIFF image"), (0, b"MM\x00*", "a TIFF image"), (8, b"avif", "an AVIF image"), (8, b"heic", "a HEIC image"),
    (8, b"mif1", "a HEIF image"), (8, b"WAVE", "WAV audio"), (0, b"ID3", "MP3 audio"), (0, b"fLaC", "FLAC audio"),
    (8, b"M4A ", "M4A audio"), (0, b"PK\x03\x04", "a zip archive"), (0, b"\x1f\x8b", "a gzip archive"), (0, b"%PDF", "a PDF"),
    (0, b"\x93NUMPY", "a NumPy array"),
)  # fmt: skip


@dataclass(frozen=True)
class Member:
    """A file inside an uncompressed tar, read in place: `size` bytes from `start`."""

    tar: Path
    name: str
    start: int
    size: int

    def __str__(self) -> str:
        return f"{self.tar}/{self.name}"


Source = Path | Member


def as_source(path: str | Path | Member) -> Source:
    return path if isinstance(path, Member) else Path(path)


def file_of(source: Source) -> Path:
    """The file on disk that holds the bytes."""
    return source.tar if isinstance(source, Member) else source


def member_of(source: Source) -> tuple[str, int, int] | None:
    """A tar member as the manifest stores it; None for an ordinary file."""
    return (source.name, source.start, source.size) if isinstance(source, Member) else None


def url(source: Source) -> str:
    """The URL for FFmpeg. It names the protocol explicitly, since FFmpeg would take a file name such as `http:x` for a URL."""
    file = f"file:{file_of(source).absolute()}"
    return f"subfile,,start,{source.start},end,{source.start + source.size},,:{file}" if isinstance(source, Member) else file


def stamp(source: Source) -> tuple[int, int]:
    """(modification time in ns, bytes): while both are the same, the contents are taken to be the same."""
    stat = file_of(source).stat()
    return stat.st_mtime_ns, source.size if isinstance(source, Member) else stat.st_size


def read_bytes(source: Source, limit: int = -1) -> bytes:
    with file_of(source).open("rb") as file:
        if isinstance(source, Member):
            file.seek(source.start)
            limit = source.size if limit < 0 else min(limit, source.size)
        return file.read(limit)


def sha256(source: Source) -> str:
    """Hash of the contents."""
    with file_of(source).open("rb") as file:
        if isinstance(source, Path):
            return hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(source.start)
        digest, left = hashlib.sha256(), source.size
        while left and (block := file.read(min(left, 1 << 20))):
            digest.update(block)
            left -= len(block)
        return digest.hexdigest()


def ends_hash(files: Iterable[Path]) -> bytes:
    """Hash of the files' names, sizes, and first and last bytes: weights of many gigabytes that differ at all differ there."""
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(END)
            file.seek(max(0, size - END))
            digest.update(repr((path.name, size)).encode() + start + file.read(END))
    return digest.digest()


def head(source: Source) -> bytes:
    """The first bytes of a file. Raises `UserError` if it is missing, a folder, unreadable or empty."""
    if file_of(source).is_dir():
        raise UserError(f"{source} is a folder: give a file")
    if file_of(source).is_fifo() or file_of(source).is_char_device():
        raise UserError(f"{source} is a pipe or a device: give a file")  # reading it might block forever
    try:
        start = read_bytes(source, HEAD)
    except FileNotFoundError:
        raise UserError(f"{source} does not exist: check the path") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{source} cannot be read ({reason}): check the path and its permissions") from None
    if not start:
        raise UserError(f"{source} is empty (0 bytes): download or export it again", code="empty_file", file=source)
    return start


def read_text(path: Path) -> str:
    """The text of a file. Raises `UserError` as `head` does, and if it is no UTF-8."""
    head(path)
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no UTF-8 text (byte {error.start}): save it as UTF-8") from None


def sniff(start: bytes) -> tuple[str | None, str]:
    """(FFmpeg demuxer or None, a name for the contents) from a file's first bytes; the file's name is ignored."""
    for offset, magic, kind in OTHER_MAGIC:
        if start.startswith(magic, offset):
            return None, kind
    for offset, magic, demuxer in VIDEO_MAGIC:
        if start.startswith(magic, offset):
            return demuxer, f"{demuxer} video"
    for first in (0, 4):  # MPEG-TS: a sync byte every 188 bytes, or every 192 in a Blu-ray .m2ts
        if start[first : first + 1] == start[first + 188 + first : first + 189 + first] == b"G":
            return "mpegts", "mpegts video"
    try:
        text = start.decode("utf-8", errors="strict" if len(start) < HEAD else "ignore")
        return None, "text" if text.isprintable() or not any(c < " " and c not in "\t\r\n\f" for c in text) else "unknown data"
    except UnicodeDecodeError:
        return None, "unknown data"


def parse_json(text: str | bytes, once: bool = False) -> Any:
    """`json.loads`. Raises ValueError for invalid JSON, and for values nested deeper than `DEEPEST`. once: also for a key given twice, of
    which JSON takes the last."""
    try:
        value = json.loads(text, object_pairs_hook=_each_once if once else None)
    except RecursionError:
        raise ValueError("it is nested thousands of levels deep") from None
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(DEEPEST):  # one level at a time: nothing here recurses
        level = [x for one in level for x in (one.values() if isinstance(one, dict) else one) if isinstance(x, dict | list)]
        if not level:
            return value
    raise ValueError(f"it is nested more than {DEEPEST} levels deep")


def parse_object(text: str | bytes, once: bool = False) -> dict[str, Any]:
    """`parse_json` for an object: ValueError for anything else."""
    value = parse_json(text, once)
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__}, not an object")
    return value


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"'{next(key for key in values if keys.count(key) > 1)}' is given twice")
    return values


def parse_literal(text: str) -> Any:
    """A value in JSON or Python syntax, as tables hold lists. Raises ValueError for anything else, and for what is nested too deep;
    `UserError` for long Python syntax, for which its parser takes minutes and gigabytes."""
    try:
        return parse_json(text)
    except ValueError:
        pass
    if len(text) > LONGEST:
        raise UserError(f'a cell of {len(text)} characters is no JSON: write it as JSON, such as ["a", "b"]')
    try:
        return ast.literal_eval(text)
    except (SyntaxError, TypeError, RecursionError, MemoryError) as error:
        raise ValueError(str(error) or "it is nested thousands of levels deep") from None


@contextmanager
def replaced(path: Path, sync: bool = False) -> Iterator[Path]:
    """A temporary path beside `path`, moved to `path` if the block succeeds and deleted if it fails. All atomic writing goes through this.

    sync: wait until the file and its name are on the disk. Raises the system's own errors.
    """
    temporary = path.with_name(f".{uuid.uuid4().hex}.part")
    temporary.touch(exist_ok=False)
    mode = temporary.stat().st_mode  # follows the user's umask; some writers (safetensors) replace the file by one of mode 600
    try:
        yield temporary
        os.chmod(temporary, mode)
        if sync:
            sync_to_disk(temporary)
        os.replace(temporary, path)
        if sync:
            sync_to_disk(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink()


def write_atomic(path: str | Path, text: str) -> None:
    """Replace a small text file so that a reader sees the old or the new one, never a part, even after a power failure."""
    with replaced(Path(path), sync=True) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sync_to_disk(path: Path) -> None:
    """Wait until a file's bytes, or a folder's entries, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def written(path: str | Path) -> Iterator[Path]:
    """`replaced` for a path that the user gave: makes the folder if it is missing, and turns the system's errors into `UserError`s."""
    path = Path(path)
    _make_room(path)
    with ExitStack() as stack:
        with writing(path):
            temporary = stack.enter_context(replaced(path))
        with disk_errors(path):
            yield temporary
        with writing(path):
            stack.close()


def check_writable(path: Path) -> None:
    """Raises `UserError` if a file cannot be written there, which is better told before the work than after it. Makes its folder."""
    _make_room(path)
    with writing(path), tempfile.TemporaryFile(dir=path.parent):
        pass


def _make_room(path: Path) -> None:
    """Make the folder of a file. Raises `UserError` if there can be none, or if the file is one."""
    with writing(path):
        if path.is_dir():
            raise IsADirectoryError(0, "it is a folder")
        if path.parent.exists() and not path.parent.is_dir():
            raise NotADirectoryError(0, f"{path.parent} is a file")
        path.parent.mkdir(parents=True, exist_ok=True)


@contextmanager
def written_folder(target: str | Path, replace: bool = True) -> Iterator[Path]:
    """A temporary folder, renamed to `target` if the block succeeds, with file modes that follow the user's umask.

    replace: delete an existing `target` then. Raises `UserError` for errors of the disk or the system, and leaves nothing unfinished.
    """
    target = Path(target)
    temporary = target.with_name(f".{target.name}.part")
    with writing(target):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    try:
        with disk_errors(target):
            yield temporary
        with writing(target):
            as_umask(temporary)
            if replace:
                shutil.rmtree(target, ignore_errors=True)
            temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def as_umask(folder: Path) -> None:
    """Give every file below `folder` the mode of the user's umask: some writers make files that only the owner can read."""
    new = folder / f".{uuid.uuid4().hex}.part"
    new.touch()
    mode = new.stat().st_mode
    new.unlink()
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            with suppress(FileNotFoundError):  # a temporary file of another process
                path.chmod(mode | path.stat().st_mode)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the system's errors (no permission, disk full, a file where a folder should be) into a `UserError`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise _refused(path, error) from None


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """As `writing`, for a block that also does other things: only errors of a full or broken disk become a `UserError`."""
    try:
        yield
    except SafetensorError as error:
        raise _refused(path, error) from None
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise _refused(path, error) from None


def _refused(path: Path, error: Exception) -> UserError:
    reason = getattr(error, "strerror", None) or str(error)
    if isinstance(error, FileExistsError | NotADirectoryError):
        return UserError(f"{path} cannot be written: a part of this path is a file, where a folder is needed; choose another path")
    return UserError(f"{path} cannot be written ({reason}): free space there or choose another path")
