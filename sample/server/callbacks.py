"""Callbacks: at every change of a task's status its data is posted to the client, signed and, if need be, again.

The signature is that of Standard Webhooks (https://www.standardwebhooks.com): `webhook-signature: v1,BASE64`, the HMAC-SHA256 under the
key's secret of "webhook-id.webhook-timestamp.body". The id is the same at every try, so that a receiver can tell a repetition; `verify` is
what a receiver does.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

from kling_programs.sample.server.fetch import Reach, fetch
from kling_programs.sample.server.store import Notice, Store, Task

from kling.errors import UserError

log = logging.getLogger(__name__)

TRIES = 8
FIRST_WAIT = 2.0  # seconds to the second try; four times as long to each further one, at most an hour
LONGEST_WAIT = 3600.0
BROKEN_WAIT = 30.0  # seconds to the next try if the store itself fails
OLDEST = 300.0  # seconds of a timestamp that a receiver should still accept
SENDERS = 8


def sign(secret: str, notice_id: str, timestamp: int, body: str) -> dict[str, str]:
    """The headers of a callback."""
    signature = hmac.new(secret.encode(), f"{notice_id}.{timestamp}.{body}".encode(), hashlib.sha256).digest()
    return {
        "webhook-id": notice_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": f"v1,{base64.b64encode(signature).decode()}",
    }


def verify(secret: str, headers: Mapping[str, str], body: str, seen: set[str]) -> None:
    """What a receiver does before it believes a callback. seen: the ids so far. Raises ValueError for a wrong signature, an old one, or one
    that came before."""
    notice_id, stamp = headers["webhook-id"], headers["webhook-timestamp"]
    right = sign(secret, notice_id, int(stamp), body)["webhook-signature"]
    if not any(hmac.compare_digest(right, given) for given in headers["webhook-signature"].split()):
        raise ValueError("the signature is wrong")
    if abs(time.time() - int(stamp)) > OLDEST:
        raise ValueError("the timestamp is too old or too new")
    if notice_id in seen:
        raise ValueError("this id came before")
    seen.add(notice_id)


class Sender:
    """Sends what the store owes. write: the body of a task's callback. secret_of: by key."""

    def __init__(
        self, store: Store, write: Callable[[Task, str], str], secret_of: Callable[[str], str], reach: Reach, told: Callable[[str], None]
    ) -> None:
        self.store, self.write, self.secret_of, self.reach, self.told = store, write, secret_of, reach, told
        self._busy: set[str] = set()  # tasks of which one is being sent
        self._stopping = threading.Event()
        self._pool = ThreadPoolExecutor(SENDERS, "callback")
        self._thread = threading.Thread(target=self._run, name="callbacks", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        with self.store.changed:
            self.store.changed.notify_all()
        self._thread.join()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _run(self) -> None:
        while not self._stopping.is_set():
            with self.store.changed:
                notice, wait = self.store.owed(self._busy) if len(self._busy) < SENDERS else (None, 60.0)
                if notice is None:
                    self.store.changed.wait(wait)
                    continue
                self._busy.add(notice.task.id)
            self._pool.submit(self._send, notice)

    def _send(self, notice: Notice) -> None:
        try:
            why = self._try(notice)
            if why is None:
                self.store.settle(notice)
                self.told("delivered")
            elif notice.tries + 1 >= TRIES:
                log.warning("callback %s of task %s is given up after %d tries: %s", notice.id, notice.task.id, TRIES, why)
                self.store.settle(notice)
                self.told("given up")
            else:
                self.store.settle(notice, min(LONGEST_WAIT, FIRST_WAIT * 4**notice.tries))
                self.told("failed")
        except Exception:  # a full disk, for one: it is still owed, and must not be posted again and again meanwhile
            log.exception("callback %s of task %s", notice.id, notice.task.id)
            self._stopping.wait(BROKEN_WAIT)
        finally:
            with self.store.changed:
                self._busy.discard(notice.task.id)
                self.store.changed.notify_all()

    def _try(self, notice: Notice) -> str | None:
        """Post it. None if it was taken, else why not."""
        body = notice.body
        if body is None:
            body = self.write(notice.task, notice.status)
            self.store.keep_body(notice, body)
        headers = sign(self.secret_of(notice.task.key), notice.id, int(time.time()), body)
        try:
            answer = fetch(notice.url, self.reach, "callback_url", body.encode(), headers | {"Content-Type": "application/json"})
        except UserError as error:
            return str(error)
        return None if 200 <= answer.status < 300 else f"it answered {answer.status}"
