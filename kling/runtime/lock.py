"""One run to a folder: two that write into one would destroy each other's files.

The lock is the operating system's, on the file `.lock`, and ends with the process that holds it, however that ends: a stale one does not
exist. What the file says, host and process, is for people.
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
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # what file systems without locks answer
_held: set[tuple[int, int]] = set()  # (device, inode) of the lock files that this process holds


@contextmanager
def locked(folder: str | Path, what: str = "run", accelerator: Accelerator | None = None) -> Iterator[None]:
    """Hold a folder, made if it is missing, while the block lasts. A process may hold one that it holds already.

    what: what to call the folder. accelerator: of a run on several processes: the main one holds it for all. Raises `UserError`, on all of
    them, with host and process if another run holds it, on this machine or, where the file system's locks reach over it, on another.
    """
    path, refused, file, several = Path(folder) / LOCK, None, None, accelerator is not None and accelerator.num_processes > 1
    if accelerator is None or accelerator.is_main_process:
        try:
            file = _take(path, what)
        except UserError as error:
            refused = error
    if several:
        from kling.runtime.parallel import same_for_all  # torch and accelerate, which one process does without

        if not same_for_all(accelerator, int(refused is None)) and refused is None:
            refused = UserError(f"{what} {folder} is in use: the main process says by whom")
    if refused is not None:
        raise refused
    try:
        yield
    finally:
        if file is not None:
            _held.discard(_key(os.fstat(file)))
            os.truncate(file, 0)  # the file stays: another process may be waiting at it
            os.close(file)


def _take(path: Path, what: str) -> int | None:
    """The open lock file; None if this process holds it already, or the file system has no locks. Raises `UserError` if another does."""
    import fcntl  # not on Windows, where nothing trains

    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and _key(path.stat()) in _held:  # opened again and closed, the file would lose its lock
            return None
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of this process alone: workers that it forks do not hold it
    except OSError as error:
        holder = os.pread(file, 4096, 0)
        os.close(file)
        if error.errno not in _NO_LOCKS:
            raise UserError(f"{what} {path.parent} is in use by {_spell(holder)}: wait for it, stop it, or take another folder") from None
        print(f"{path}: this file system has no locks: see to it that one program at a time writes there", file=sys.stderr)
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
