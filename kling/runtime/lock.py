"""A lock that lets one run at a time write into a folder: two would destroy each other's files.

It is a lock of the operating system on the file `.lock`. It ends with the process that holds it, even if that is killed, so it cannot be
stale. The file's contents, host and process, are for people to read.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from kling.errors import UserError
from kling.runtime.files import writing

if TYPE_CHECKING:
    from accelerate import Accelerator

LOCK = ".lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # the errors of file systems without locks
_held: set[tuple[int, int]] = set()  # (device, inode) of the lock files that this process holds


@contextmanager
def locked(folder: str | Path, what: str = "run", accelerator: Accelerator | None = None, file: str = "") -> Iterator[None]:
    """Lock a folder, made if it is missing, for the duration of the block. A process may lock a folder twice.

    what: how messages call the folder. accelerator: of a run on several processes; the main one takes the lock for all. file: lock only
    this file of the folder, which may not exist yet. Raises `UserError` in all processes, with host and process, if another run holds it on
    this machine or, if the file system shares its locks, on another.
    """
    path, name = Path(folder) / (f".{file}{LOCK}" if file else LOCK), Path(folder) / file
    refused, held, several = None, None, accelerator is not None and accelerator.num_processes > 1
    if accelerator is None or accelerator.is_main_process:
        try:
            held = _take(path, f"{what} {name}")
        except UserError as error:
            refused = error
    if several:
        from kling.runtime.parallel import same_for_all  # imports torch and accelerate, which a single process does not need here

        if not same_for_all(accelerator, int(refused is None)) and refused is None:
            refused = UserError(f"{what} {name} is in use: see the message of the main process")
    if refused is not None:
        raise refused
    try:
        yield
    finally:
        if held is not None:
            _held.discard(_key(os.fstat(held)))
            os.truncate(held, 0)  # the file is not deleted: another process may be waiting for its lock
            os.close(held)


def _take(path: Path, what: str) -> int | None:
    """The open lock file; None if this process holds it already or the file system has no locks. Raises `UserError` if another does."""
    import fcntl  # not on Windows, where nothing trains

    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and _key(path.stat()) in _held:  # opening and closing it again would release the lock
            return None
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # held by this process only, not by workers that it forks
    except OSError as error:
        holder = os.pread(file, 4096, 0)
        os.close(file)
        if error.errno not in _NO_LOCKS:
            raise UserError(f"{what} is in use by {_spell(holder)}: wait for it, stop it, or take another folder") from None
        print(f"{path}: this file system has no locks: make sure that only one program at a time writes there", file=sys.stderr)
        return None
    with writing(path):
        os.truncate(file, 0)
        os.pwrite(file, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode(), 0)
    _held.add(_key(os.fstat(file)))
    return file


def _key(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_dev, stat.st_ino


def _spell(holder: bytes) -> str:
    try:
        there = json.loads(holder)
        return f"process {there['pid']} on {there['host']}"
    except (ValueError, KeyError, TypeError):
        return "another process"
