"""Access control for the page: authentication, upload limits, and listeners. An ASGI layer around Gradio's own server.

Every refusal is one line with its status: 400 for what cannot be read, 403 for another site's request, 404 for what the page does not use
of Gradio, 413 for too much, 408 for too slow, 429 for too often.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import math
import os
import re
import socket
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from gradio.route_utils import FnIndexInferError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from kling.errors import UserError

log = logging.getLogger(__name__)
MIB = 2**20
BODY = 2 * MIB  # bytes of a request other than an upload: enough for a form with a drawn mask
ENVELOPE = 64 * 1024  # bytes allowed in a multipart upload in addition to its file
HOUR = 3600.0
SOON = 10.0  # seconds
WRONG = 5  # wrong passwords in a row after which an address has to wait
WAIT = 300.0  # seconds of waiting, doubled every further time, up to an hour
DELAY = 0.5  # seconds of delay after the first wrong password, doubled with each
REMEMBERED = 10_000  # addresses
# What the page and its API use of Gradio. It also has recordings that pass through FFmpeg, files kept for links, histories on the Hub.
SENT = re.compile(r"/(login|upload|queue/join|cancel|reset|(run|api|call(/v2)?)/\w+)/?$")
UNUSED = re.compile(r"^/(gradio_api/)?(deep_link|proxy=|runs|run-history|stream/|vibe-code|dev/|monitoring|profiling)")

Send = Callable[[dict], Any]


class TooMuch(Exception):
    """status, line: the response to the sender."""

    def __init__(self, status: int, line: str) -> None:
        super().__init__(line)
        self.status, self.line = status, line


@dataclass
class Limits:
    """file: bytes of one upload. hourly: bytes that one address may upload in an hour. stored: bytes of all stored uploads.

    uploads: simultaneous ones per address. seconds: in which a request must arrive.
    """

    file: int = 64 * MIB
    hourly: int = 1024 * MIB
    stored: int = 4096 * MIB
    uploads: int = 4
    seconds: float = 120.0


@dataclass
class Door:
    """The state of the layer, shared with the studio. hosts: accepted host names; IP addresses are always accepted."""

    arrivals: Path
    hosts: set[str] = field(default_factory=set)
    limits: Limits = field(default_factory=Limits)
    listening: Counter[str] = field(default_factory=Counter)  # open streams of events, by session
    session_of: Callable[[str], str] = staticmethod(lambda event: event)  # Gradio's session of an event
    kept: tuple[Path, ...] = ()  # folders of accepted uploads, in addition to `arrivals`
    tidy: Callable[[], None] | None = None  # frees space that is not needed any more
    convert: Callable[[str], None] | None = None  # makes a file of the shelf that is requested by this name
    _brought: dict[str, deque[tuple[float, int]]] = field(default_factory=dict)  # address -> (when, bytes)
    _bringing: Counter[str] = field(default_factory=Counter)
    _wrong: OrderedDict[str, list[float]] = field(default_factory=OrderedDict)  # address or user -> [times wrong, closed until]

    def heard(self, session: str | None) -> bool:
        """Whether a browser or a program receives the events of a session."""
        return bool(session) and self.listening[session] > 0

    # ---- names ----

    def knows(self, host: str) -> bool:
        """Whether this is an IP address or one of our names. Another name is a foreign site pointed at this machine (DNS rebinding)."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:  # such as "["
            return False
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name.lower().rstrip(".") in self.hosts
        return True

    # ---- passwords ----

    def closed(self, *keys: str) -> float:
        """Seconds until any of them may try a password again."""
        return max(self._wrong.get(key, [0, 0.0])[1] - time.monotonic() for key in keys)

    def tried(self, right: bool, *keys: str) -> float:
        """Record an attempt; returns the seconds by which its response is delayed."""
        delay = 0.0
        for key in keys:
            if right:
                self._wrong.pop(key, None)
                continue
            times = self._wrong.pop(key, [0, 0.0])[0] + 1
            rows, rest = divmod(times, WRONG)
            until = 0.0 if rest else time.monotonic() + min(HOUR, WAIT * 2 ** (rows - 1))
            self._wrong[key] = [times, until]
            delay = max(delay, DELAY * 2 ** min((times - 1) % WRONG, 4))
        while len(self._wrong) > REMEMBERED:
            self._wrong.popitem(last=False)
        return delay

    # ---- uploads ----

    def check_upload(self, address: str, size: int) -> None:
        """Raises `TooMuch` if an upload of `size` bytes exceeds a limit."""
        limits = self.limits
        if size > limits.file + ENVELOPE:
            raise TooMuch(413, f"the file exceeds the maximum allowed size of {limits.file // MIB} MiB")
        if self._bringing[address] >= limits.uploads:
            raise TooMuch(429, f"{limits.uploads} uploads are running already: wait for one")
        self.check_hour(address, size)
        if self._stored() + size > limits.stored and self.tidy:
            self.tidy()
        if self._stored() + size > limits.stored:
            raise TooMuch(507, "the server has no room for uploads: try again in an hour")

    def _stored(self) -> int:
        """Bytes of all uploads still stored."""
        return sum(_size(path) for folder in (self.arrivals, *self.kept) for path in folder.rglob("*"))

    def check_hour(self, address: str, size: int) -> None:
        """Raises `TooMuch` if an address sends more than its hourly share."""
        brought, now = self._brought.get(address, deque()), time.monotonic()
        while brought and brought[0][0] < now - HOUR:
            brought.popleft()
        if sum(count for _, count in brought) + size > self.limits.hourly:
            raise TooMuch(429, f"more than {self.limits.hourly // MIB} MiB uploaded in an hour: try again later")

    def brought(self, address: str, count: int) -> None:
        """Record what an address has sent: a page sends a little with every letter, so what comes soon after the last is added to it."""
        brought, now = self._brought.setdefault(address, deque()), time.monotonic()
        if brought and now - brought[-1][0] < SOON:
            now, before = brought.pop()
            count += before
        brought.append((now, count))
        while len(self._brought) > REMEMBERED:
            self._brought.pop(next(iter(self._brought)))


class Guard:
    """The ASGI layer."""

    def __init__(self, app: Any, door: Door) -> None:
        self.app, self.door = app, door

    async def __call__(self, scope: dict, receive: Callable, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        address = (scope.get("client") or ("", 0))[0]
        path = scope["path"]
        if not self.door.knows(headers.get(b"host", "")):
            return await _answer(send, 403, "this page is not known by that name: open it by its address, or start it with --host NAME")
        if (origin := headers.get(b"origin")) and not self.door.knows(origin.partition("://")[2]):
            return await _answer(send, 403, "another site may not use this page")
        if scope["method"] in ("POST", "PUT", "PATCH"):
            if not SENT.search(path):
                return await _answer(send, 404, "this page takes nothing at this address")
            try:
                return await self._sent(scope, receive, send, headers, address)
            except TooMuch as refusal:
                return await _answer(send, refusal.status, refusal.line)
            except (LookupError, TypeError, ValueError, FnIndexInferError) as error:  # Gradio's, about names and types in a hand-made body
                log.info("a request to %s cannot be used", path, exc_info=error)
                return await _answer(send, 400, "this request cannot be used: its function or arguments are not this page's; see its API")
        if UNUSED.search(path):
            return await _answer(send, 404, "this page has nothing at this address")
        if session := self._session(path, scope):
            return await self._listen(session, scope, receive, send)
        if self.door.convert and path.endswith((".gif", ".webm")):
            await asyncio.to_thread(self.door.convert, path.rsplit("/", 1)[-1])  # Gradio serves it like its folder
        return await self.app(scope, receive, send)

    async def _sent(self, scope: dict, receive: Callable, send: Send, headers: dict, address: str) -> None:
        """Pass on what a visitor sends. Raises `TooMuch`."""
        path = scope["path"].rstrip("/")
        if path.endswith("/upload"):
            return await self._upload(scope, receive, send, headers, address)
        if path == "/login":
            return await self._login(scope, receive, send, headers, address)
        body = await _read(receive, headers, BODY, self.door.limits.seconds)
        self.door.check_hour(address, len(body))  # it may hold a drawing, which is stored
        self.door.brought(address, len(body))
        return await self.app(scope, _again(body, receive), send)

    async def _listen(self, session: str, scope: dict, receive: Callable, send: Send) -> None:
        """Count the listener of a session while its stream is open."""
        listening = self.door.listening
        listening[session] += 1
        try:
            await self.app(scope, receive, send)
        except RuntimeError as error:  # Gradio tells a tab of an earlier start that its session is gone, and then fails
            if not isinstance(error.__cause__, HTTPException):
                raise
            await send({"type": "http.response.body", "body": b""})
        finally:
            listening[session] -= 1
            if not listening[session]:
                del listening[session]

    def _session(self, path: str, scope: dict) -> str | None:
        """The session whose events are requested."""
        if scope["method"] != "GET":
            return None
        if path.endswith("/queue/data"):
            return parse_qs(scope["query_string"].decode("latin-1")).get("session_hash", [""])[0]
        found = re.search(r"/call/(?:v2/)?[^/]+/([0-9a-f]+)$", path)
        return self.door.session_of(found[1]) if found else None

    async def _upload(self, scope: dict, receive: Callable, send: Send, headers: dict, address: str) -> None:
        """Pass the body on as it arrives; cut it off when it is too large or too slow."""
        door, limits, began, count = self.door, self.door.limits, time.monotonic(), 0
        door.check_upload(address, _length(headers))
        door._bringing[address] += 1
        refusal: TooMuch | None = None
        answered = False

        async def counted() -> dict:
            nonlocal count, refusal
            try:
                message = await asyncio.wait_for(receive(), max(0.01, began + limits.seconds - time.monotonic()))
            except TimeoutError:
                refusal = TooMuch(408, f"an upload may take {limits.seconds:g} s: send a smaller file")
                return {"type": "http.disconnect"}
            count += len(message.get("body", b""))
            if count > limits.file + ENVELOPE:
                refusal = TooMuch(413, f"the file exceeds the maximum allowed size of {limits.file // MIB} MiB")
                return {"type": "http.disconnect"}
            return message

        async def held(message: dict) -> None:
            nonlocal answered
            if refusal is None:
                answered = True
                await send(message)

        try:
            await self.app(scope, counted, held)
        except ClientDisconnect:  # what the app makes of `http.disconnect`
            if refusal is None:
                raise
        finally:
            door._bringing[address] -= 1
            door._bringing += Counter()
            door.brought(address, count)
        if refusal is not None and not answered:
            raise refusal

    async def _login(self, scope: dict, receive: Callable, send: Send, headers: dict, address: str) -> None:
        """Delay the response to a wrong password; after several, refuse attempts for a while, by address and by user name."""
        body = await _read(receive, headers, BODY, self.door.limits.seconds)
        user = re.search(rb'(?:username=|name="username"\s*\r\n\r\n)([^&\r\n]{0,100})', body)
        keys = (f"from {address}", f"for {user[1].decode('latin-1') if user else ''} from {address}")
        if (wait := self.door.closed(*keys)) > 0:
            raise TooMuch(429, f"too many wrong passwords: try again in {math.ceil(wait / 60)} minutes")

        delay = self.door.tried(False, *keys)  # recorded before checking, otherwise many simultaneous attempts would all be the first

        async def noted(message: dict) -> None:
            if message["type"] == "http.response.start":
                if message["status"] < 400:
                    self.door.tried(True, *keys)
                else:
                    await asyncio.sleep(delay)
            await send(message)

        await self.app(scope, _again(body, receive), noted)


async def _read(receive: Callable, headers: dict, most: int, seconds: float) -> bytes:
    """The whole body. Raises `TooMuch` for more than `most` bytes, or if it takes longer."""
    if _length(headers) > most:
        raise TooMuch(413, f"a request may have {most // MIB} MiB: upload files first, and name them")
    parts, count, end = [], 0, time.monotonic() + seconds
    while True:
        try:
            message = await asyncio.wait_for(receive(), max(0.01, end - time.monotonic()))
        except TimeoutError:
            raise TooMuch(408, f"a request may take {seconds:g} s to arrive") from None
        if message["type"] == "http.disconnect":
            return b""
        parts.append(message.get("body", b""))
        count += len(parts[-1])
        if count > most:
            raise TooMuch(413, f"a request may have {most // MIB} MiB: upload files first, and name them")
        if not message.get("more_body"):
            return b"".join(parts)


def _again(body: bytes, receive: Callable) -> Callable:
    """Replay a body that was read, for the app; then pass on the connection's messages."""
    rest = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> dict:
        return rest.pop() if rest else await receive()

    return again


async def _answer(send: Send, status: int, line: str) -> None:
    body = json.dumps({"detail": line, "error": line}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _length(headers: dict) -> int:
    text = headers.get(b"content-length", "0")
    return int(text) if text.isdecimal() and len(text) < 19 else 0


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # gone meanwhile
        return 0


def own_names(more: list[str] | None = None) -> set[str]:
    """Host names of this machine, and those that the operator adds."""
    names = {"localhost", socket.gethostname(), socket.getfqdn(), f"{socket.gethostname()}.local", *(more or [])}
    return {name.lower().rstrip(".") for name in names}


def read_accounts(file: str | None) -> list[tuple[str, str]] | None:
    """All (user, password) pairs, from a file of USER:PASSWORD lines or from KLING_DEMO_AUTH; None if neither is given.

    Never from the command line, which every user of the machine can read. Raises `UserError` for other lines.
    """
    source = f"--auth {file}" if file else "KLING_DEMO_AUTH"
    if file:
        path = Path(file)
        if not path.is_file():
            if ":" in file:
                raise UserError(
                    "--auth takes a file, since everybody on this machine can read a password on the command line: write USER:PASSWORD "
                    "into a file of your own (chmod 600) and give its name, or set KLING_DEMO_AUTH"
                )
            raise UserError(f"--auth {file}: no such file; write a line USER:PASSWORD into it for everybody who may come in")
        text = path.read_text(encoding="utf-8", errors="replace")
    else:
        text = os.environ.get("KLING_DEMO_AUTH", "")
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    if not lines and not file:
        return None
    pairs = [tuple(line.split(":", 1)) for line in lines]
    if not lines or any(len(pair) != 2 or not all(pair) for pair in pairs):
        raise UserError(f"{source} has a line that is not USER:PASSWORD: give both, with a colon between them, a line for each user")
    return pairs
