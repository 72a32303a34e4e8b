"""The tasks of a server in SQLite: what outlives a kill. It knows no wire format and no model.

A task is `submitted`, then `processing` under a lease, then `succeed` or `failed`. Each claim of a task has a lease of its own, a number;
what arrives under an older one is dropped, so that a task has one result whatever was killed when. A result is two files and one commit:
the files are written under names of the lease, then the row names them. Files that no row names are deleted at the next start.

A notice (a callback) is a row too, written in the commit that changes its task's status.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kling.errors import UserError
from kling.runtime.files import writing
from kling.sampling.rows import FILES

WAITING, RUNNING, DONE, FAILED = "submitted", "processing", "succeed", "failed"
LIVE = (WAITING, RUNNING)
VERSION = 1  # of the tables
ATTEMPTS = 3  # claims of a task whose worker died before it is given up: it may be what kills them
DAY = 86400.0
TABLES = """
CREATE TABLE IF NOT EXISTS tasks (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, key TEXT NOT NULL, external TEXT, digest TEXT NOT NULL,
    kind TEXT NOT NULL, asked TEXT NOT NULL, request TEXT NOT NULL, parent TEXT, callback TEXT, base TEXT NOT NULL,
    status TEXT NOT NULL, message TEXT NOT NULL DEFAULT '', created REAL NOT NULL, updated REAL NOT NULL, started REAL, finished REAL,
    lease INTEGER NOT NULL DEFAULT 0, until REAL, died INTEGER NOT NULL DEFAULT 0, step INTEGER NOT NULL DEFAULT 0,
    steps INTEGER NOT NULL DEFAULT 0, video TEXT, token TEXT UNIQUE, file TEXT, made TEXT, gone TEXT
);
CREATE UNIQUE INDEX IF NOT EXISTS external ON tasks (key, external) WHERE external IS NOT NULL;
CREATE INDEX IF NOT EXISTS live ON tasks (status, key, seq);
CREATE INDEX IF NOT EXISTS listed ON tasks (key, kind, seq);
CREATE TABLE IF NOT EXISTS turns (key TEXT PRIMARY KEY, turn INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS notices (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL, task TEXT NOT NULL, key TEXT NOT NULL, url TEXT NOT NULL,
    status TEXT NOT NULL, due REAL NOT NULL, tries INTEGER NOT NULL DEFAULT 0, body TEXT
);
CREATE INDEX IF NOT EXISTS owed ON notices (task, seq);
"""


class Refused(UserError):
    """A task that is not accepted. `code` says why: too_many, too_fast, other_content."""


@dataclass(frozen=True)
class Limits:
    """places: unfinished tasks of one key. rate: new tasks a minute of one key. days: that a result is kept."""

    places: int = 100
    rate: int = 600
    days: float = 30.0


@dataclass
class Task:
    """One row. Times are seconds since 1970.

    key: whose it is. external: the client's own name for it. kind: of the endpoint, such as text2video. asked: the body as it was sent,
    without pictures. request: fields of `kling.sampling.request.Request`; files by their names in the store. parent: the task whose video
    is continued. base: address of the server as the client knows it. lease: number of claims so far; until: when the claim expires.
    died: claims whose worker died. video: id of the result; token: its unguessable name; file: its name in the store. made: what is told
    about it: seconds, seed, size. gone: why there is no result any more.
    """

    seq: int
    id: str
    key: str
    external: str | None
    digest: str
    kind: str
    asked: dict[str, Any]
    request: dict[str, Any]
    parent: str | None
    callback: str | None
    base: str
    status: str
    message: str
    created: float
    updated: float
    started: float | None
    finished: float | None
    lease: int
    until: float | None
    died: int
    step: int
    steps: int
    video: str | None
    token: str | None
    file: str | None
    made: dict[str, Any] = field(default_factory=dict)
    gone: str | None = None

    @property
    def seed(self) -> int:
        return self.request.get("seed", 0)

    @property
    def claim(self) -> str:
        """A name for this lease of this task."""
        return f"{self.id}-{self.lease}"


@dataclass(frozen=True)
class New:
    """A task to add; see `Task`."""

    key: str
    kind: str
    asked: dict[str, Any]
    request: dict[str, Any]
    digest: str
    base: str = ""
    external: str | None = None
    parent: str | None = None
    callback: str | None = None


@dataclass(frozen=True)
class Notice:
    """A callback that is owed. id: the same at every try. tries: failed ones."""

    seq: int
    id: str
    task: Task
    url: str
    status: str
    tries: int
    body: str | None


class Store:
    """The tasks and their files in `folder`: `tasks.sqlite`, `inputs/`, `made/`. One process at a time opens it; its threads share it."""

    def __init__(self, folder: Path, limits: Limits | None = None) -> None:
        self.folder, self.limits = folder, limits or Limits()
        self.inputs, self.made = folder / "inputs", folder / "made"
        with writing(folder):
            for path in (self.inputs, self.made):
                path.mkdir(parents=True, exist_ok=True)
        self._lock = threading.RLock()
        self.changed = threading.Condition(self._lock)  # notified when a task or a notice is added
        self._recent: dict[str, list[float]] = {}  # key -> times of its last new tasks, of this minute
        try:
            self._db = sqlite3.connect(folder / "tasks.sqlite", check_same_thread=False, isolation_level=None)
            self._db.row_factory = sqlite3.Row
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")  # what was answered has reached the disk
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, VERSION):
                raise UserError(f"store {folder} has tables of version {version}, not {VERSION}: use that version, or another --store")
            self._db.executescript(TABLES)
            self._db.execute(f"PRAGMA user_version={VERSION}")
            if (found := self._db.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
                raise sqlite3.DatabaseError(" ".join(found.split()))
        except sqlite3.DatabaseError as error:
            raise UserError(f"store {folder}: tasks.sqlite cannot be used ({error}): restore it, or give another --store") from None

    def close(self) -> None:
        with self._lock:
            self._db.close()

    @contextmanager
    def _commit(self) -> Iterator[sqlite3.Connection]:
        """One transaction: all of the block, or nothing of it."""
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:  # a full disk has ended it already
                    self._db.execute("ROLLBACK")
                raise

    # ---- clients ----

    def add(self, new: New) -> tuple[Task, bool]:
        """The task, and whether it is new: the same external name with the same content is the first task again.

        Raises `Refused` if the key has too many unfinished tasks or adds them too fast, or if the name stands for other content.
        """
        now = time.time()
        with self._commit() as db:
            if new.external is not None and (first := self._one("key = ? AND external = ?", new.key, new.external)):
                if first.digest != new.digest:
                    line = f"external_task_id '{new.external}' is the name of task {first.id}, which asks for other things: choose another"
                    raise Refused(line, code="other_content")
                return first, False
            self.check_share(new.key)
            row = {
                "id": secrets.token_hex(16), "key": new.key, "external": new.external, "digest": new.digest, "kind": new.kind,
                "asked": json.dumps(new.asked, ensure_ascii=False), "request": json.dumps(new.request, ensure_ascii=False),
                "parent": new.parent, "callback": new.callback, "base": new.base, "status": WAITING, "created": now, "updated": now,
            }  # fmt: skip
            db.execute(f"INSERT INTO tasks ({', '.join(row)}) VALUES ({', '.join('?' * len(row))})", tuple(row.values()))
            task = self._one("id = ?", row["id"])
            self._owe(db, task, now)
            self._recent.setdefault(new.key, []).append(now)
            self.changed.notify_all()
        return task, True

    def check_share(self, key: str) -> None:
        """Raises `Refused` if a key may add no task now."""
        now = time.time()
        with self._lock:
            recent = self._recent[key] = [t for t in self._recent.get(key, []) if t > now - 60]
            if len(recent) >= self.limits.rate:
                wait = 60 - (now - recent[0])
                line = f"{len(recent)} tasks were added in this minute and {self.limits.rate} are allowed: try again in {wait:.0f} s"
                raise Refused(line, code="too_fast", wait=wait)
            (live,) = self._db.execute("SELECT COUNT(*) FROM tasks WHERE key = ? AND status IN (?, ?)", (key, *LIVE)).fetchone()
        if live >= self.limits.places:
            line = f"{live} tasks of this key are unfinished and {self.limits.places} are allowed: wait for one, or cancel it"
            raise Refused(line, code="too_many")

    def get(self, key: str, name: str, kinds: Sequence[str] = ()) -> Task | None:
        """A task of a key by its id or its external name, of one of some kinds."""
        which = f" AND kind IN ({', '.join('?' * len(kinds))})" if kinds else ""
        with self._lock:
            found = [self._one(f"key = ? AND {column} = ?{which}", key, name, *kinds) for column in ("id", "external")]
        return found[0] or found[1]

    def by_video(self, key: str, video: str) -> Task | None:
        """The task of a key that made a video, by the video's id or the task's."""
        with self._lock:
            return self._one("key = ? AND (video = ? OR id = ?)", key, video, video)

    def by_token(self, token: str) -> Task | None:
        with self._lock:
            return self._one("token = ?", token)

    def list(self, key: str, kinds: Sequence[str], offset: int, count: int, before: int | None = None) -> list[Task]:
        """Tasks of a key that still have their results, the newest first. before: a `seq` that they are older than."""
        which = f"key = ? AND gone IS NULL AND kind IN ({', '.join('?' * len(kinds))})" + ("" if before is None else " AND seq < ?")
        values = (*kinds, *(() if before is None else (before,)), count, offset)
        with self._lock:
            return self._many(f"{which} ORDER BY seq DESC LIMIT ? OFFSET ?", key, *values)

    def cancel(self, task: Task, reason: str) -> bool:
        """End an unfinished task; False if it had ended. The worker that has it is told at its next step."""
        return self._end(task.id, None, FAILED, reason)

    def remove(self, task: Task, reason: str) -> None:
        """Delete a finished task's result; its row keeps the reason."""
        with self._commit() as db:
            db.execute("UPDATE tasks SET gone = ?, asked = '{}' WHERE id = ? AND gone IS NULL", (reason, task.id))
            file = self._one("id = ?", task.id).file  # `task` may be from before its end
        if file is not None:
            self._unlink(file)

    # ---- workers ----

    def claim(self, seconds: float) -> Task | None:
        """The next task, under a new lease of `seconds`; None if nothing waits. One whose lease has expired waits again.

        The key with the fewest running tasks comes first, then the one served longest ago; tasks of one key keep their order.
        """
        now = time.time()
        with self._commit() as db:
            db.execute("UPDATE tasks SET status = ?, until = NULL, step = 0 WHERE status = ? AND until < ?", (WAITING, RUNNING, now))
            row = db.execute(
                """SELECT MIN(seq) AS first, key, (SELECT COUNT(*) FROM tasks r WHERE r.key = t.key AND r.status = ?) AS running,
                COALESCE((SELECT turn FROM turns WHERE turns.key = t.key), 0) AS turn
                FROM tasks t WHERE status = ? GROUP BY key ORDER BY running, turn, first LIMIT 1""",
                (RUNNING, WAITING),
            ).fetchone()
            if row is None:
                return None
            db.execute(
                "INSERT INTO turns VALUES (?, 1 + (SELECT COALESCE(MAX(turn), 0) FROM turns)) "
                "ON CONFLICT (key) DO UPDATE SET turn = excluded.turn",
                (row["key"],),
            )
            db.execute(
                "UPDATE tasks SET status = ?, lease = lease + 1, until = ?, started = ?, updated = ?, step = 0 WHERE seq = ?",
                (RUNNING, now + seconds, now, now, row["first"]),
            )
            task = self._one("seq = ?", row["first"])
            self._owe(db, task, now)
            return task

    def extend(self, task: Task, step: int, steps: int, seconds: float) -> bool:
        """A sign of life under a lease: `step` of `steps` is done. False if the lease is not the current one."""
        with self._commit() as db:
            done = db.execute(
                "UPDATE tasks SET until = ?, step = ?, steps = ? WHERE id = ? AND lease = ? AND status = ?",
                (time.time() + seconds, step, steps, task.id, task.lease, RUNNING),
            )
            return done.rowcount == 1

    def finish(self, task: Task, file: str, made: dict[str, Any]) -> bool:
        """The result under a lease: `file` in the store, and its record beside it. False, and the files deleted, if the lease is not the
        current one."""
        more = {"file": file, "made": json.dumps(made), "video": secrets.token_hex(16), "token": secrets.token_urlsafe(32)}
        done = self._end(task.id, task.lease, DONE, "", **more)
        if not done:
            self._unlink(file)
        return done

    def fail(self, task: Task, reason: str) -> bool:
        """The end of a task that cannot be made, under a lease."""
        return self._end(task.id, task.lease, FAILED, reason)

    def release(self, task: Task, died: bool) -> bool:
        """Let go of a lease: the task waits again, with its seed. died: its worker did; after `ATTEMPTS` times it has failed."""
        if died and task.died + 1 >= ATTEMPTS:
            return self.fail(task, f"its worker died {ATTEMPTS} times while it was made")
        with self._commit() as db:
            done = db.execute(
                "UPDATE tasks SET status = ?, until = NULL, step = 0, updated = ?, died = died + ? "
                "WHERE id = ? AND lease = ? AND status = ?",
                (WAITING, time.time(), int(died), task.id, task.lease, RUNNING),
            )
            self.changed.notify_all()
            return done.rowcount == 1

    def recover(self) -> int:
        """At a start: no lease of before is valid, and files that no row names are deleted. The number of tasks that wait again."""
        with self._commit() as db:
            done = db.execute("UPDATE tasks SET status = ?, until = NULL, step = 0 WHERE status = ?", (WAITING, RUNNING))
            files = [file for (file,) in db.execute("SELECT file FROM tasks WHERE file IS NOT NULL AND gone IS NULL")]
        named = {name for file in files for name in (file, f"{file}.json")}
        for path in self.made.iterdir():
            if f"made/{path.name}" not in named:
                path.unlink()
        self.tidy()
        return done.rowcount

    def _end(self, task_id: str, lease: int | None, status: str, message: str, **more: Any) -> bool:
        now = time.time()
        columns = {"status": status, "message": message, "updated": now, "finished": now, "until": None} | more
        where = "id = ? AND status IN (?, ?)" + ("" if lease is None else " AND lease = ?")
        with self._commit() as db:
            marks = ", ".join(f"{name} = ?" for name in columns)
            values = (*columns.values(), task_id, *(LIVE if lease is None else (RUNNING, RUNNING)), *(() if lease is None else (lease,)))
            done = db.execute(f"UPDATE tasks SET {marks} WHERE {where}", values).rowcount == 1
            if done:
                self._owe(db, self._one("id = ?", task_id), now)
                self.changed.notify_all()
            return done

    # ---- notices ----

    def _owe(self, db: sqlite3.Connection, task: Task, now: float) -> None:
        if task.callback is not None:
            row = (f"msg_{secrets.token_hex(12)}", task.id, task.key, task.callback, task.status, now)
            db.execute("INSERT INTO notices (id, task, key, url, status, due) VALUES (?, ?, ?, ?, ?, ?)", row)
            self.changed.notify_all()

    def owed(self, busy: set[str]) -> tuple[Notice | None, float]:
        """The next notice that is due, of tasks that are not `busy`, and the seconds until another may be. A task's come in order."""
        now = time.time()
        which = f"seq IN (SELECT MIN(seq) FROM notices GROUP BY task) AND task NOT IN ({', '.join('?' * len(busy))})"
        with self._lock:
            row = self._db.execute(f"SELECT * FROM notices WHERE {which} ORDER BY due, seq LIMIT 1", tuple(busy)).fetchone()
            if row is None:
                return None, 60.0
            if row["due"] > now:
                return None, max(0.05, row["due"] - now)
            task = self._one("id = ?", row["task"])
            return Notice(row["seq"], row["id"], task, row["url"], row["status"], row["tries"], row["body"]), 0.0

    def keep_body(self, notice: Notice, body: str) -> None:
        """Every try sends the same bytes."""
        with self._commit() as db:
            db.execute("UPDATE notices SET body = ? WHERE seq = ?", (body, notice.seq))

    def settle(self, notice: Notice, again_in: float | None = None) -> None:
        """A notice was delivered or given up, or is tried again after some seconds."""
        with self._commit() as db:
            if again_in is None:
                db.execute("DELETE FROM notices WHERE seq = ?", (notice.seq,))
            else:
                db.execute("UPDATE notices SET due = ?, tries = tries + 1 WHERE seq = ?", (time.time() + again_in, notice.seq))
            self.changed.notify_all()

    # ---- files ----

    def put_input(self, data: bytes, suffix: str) -> str:
        """Keep a picture under the hash of its content; its name in the store. Raises OSError: a full disk is no client's mistake."""
        name = f"inputs/{hashlib.sha256(data).hexdigest()}{suffix}"
        path = self.folder / name
        if path.exists():
            os.utime(path)  # `tidy` leaves new ones alone
        else:
            temporary = self.folder / f"{name}.{secrets.token_hex(8)}.part"
            try:
                temporary.write_bytes(data)
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
        return name

    def link_input(self, path: Path) -> str:
        """Keep a result as an input of another task, whatever becomes of the result; its name in the store."""
        name = f"inputs/{secrets.token_hex(16)}{path.suffix}"
        os.link(path, self.folder / name)
        return name

    def expire(self) -> int:
        """Delete results older than the limit. The number deleted."""
        old = time.time() - self.limits.days * DAY
        with self._lock:
            tasks = self._many("gone IS NULL AND finished < ? LIMIT 1000", old)
        for task in tasks:
            self.remove(task, f"results are kept for {self.limits.days:g} days")
        return len(tasks)

    def tidy(self) -> None:
        """Delete inputs that no task with a result, and no unfinished one, needs. New ones may belong to a task that is being added."""
        with self._lock:
            rows = self._db.execute("SELECT request FROM tasks WHERE gone IS NULL").fetchall()
        used = {name for (request,) in rows for name in names_of(json.loads(request))}
        for path in self.inputs.iterdir():
            if f"inputs/{path.name}" not in used and path.stat().st_ctime < time.time() - 600:
                path.unlink(missing_ok=True)

    def _unlink(self, file: str) -> None:
        for name in (file, f"{file}.json"):
            (self.folder / name).unlink(missing_ok=True)

    # ---- figures ----

    def counts(self) -> dict[str, int]:
        """Number of tasks by status."""
        with self._lock:
            found = dict(self._db.execute("SELECT status, COUNT(*) FROM tasks WHERE gone IS NULL GROUP BY status").fetchall())
        return {status: found.get(status, 0) for status in (*LIVE, DONE, FAILED)}

    def _one(self, where: str, *values: Any) -> Task | None:
        row = self._db.execute(f"SELECT * FROM tasks WHERE {where}", values).fetchone()
        return None if row is None else _task(row)

    def _many(self, where: str, *values: Any) -> list[Task]:
        return [_task(row) for row in self._db.execute(f"SELECT * FROM tasks WHERE {where}", values).fetchall()]


def _task(row: sqlite3.Row) -> Task:
    columns = dict(row)
    return Task(**columns | {name: json.loads(columns[name] or "{}") for name in ("asked", "request", "made")})


def names_of(request: dict[str, Any]) -> list[str]:
    """The files of the store that the fields of a request name."""
    named = [request.get(field) for field in FILES] + [row[0] for row in request.get("keyframes") or []]
    named += request.get("references") or []
    return [name for name in (*named, *(track["mask"] for track in request.get("tracks") or [])) if name is not None]


def digest(content: Any) -> str:
    """A hash of what a client asked for, the order of its fields aside."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
