"""HTTP to addresses that a client named: never to private networks, with limits of size, time and redirects.

The name is resolved once, every address of it is checked, and the connection goes to a checked one, so that a second look-up cannot lead
elsewhere (DNS rebinding).
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import threading
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import urljoin, urlsplit

from kling.errors import UserError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
NAT64 = ipaddress.ip_network("64:ff9b::/96")
LONGEST = 2048  # characters of a URL


@dataclass(frozen=True)
class Reach:
    """private: whether addresses that are not of the public internet may be used. most: bytes of an answer. seconds: for everything.
    redirects: followed at most."""

    private: bool = False
    most: int = 10 * 2**20
    seconds: float = 15.0
    redirects: int = 3


@dataclass(frozen=True)
class Answer:
    status: int
    kind: str  # its Content-Type
    data: bytes


def is_public(address: str) -> bool:
    """Whether an address is one of the public internet, also if it is an IPv4 address inside an IPv6 one.

    >>> is_public("93.184.216.34"), is_public("::ffff:127.0.0.1"), is_public("169.254.169.254"), is_public("64:ff9b::a00:1")
    (True, False, False, False)
    """
    found: Address = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        inside = [found.ipv4_mapped, found.sixtofour, *(found.teredo or ())]
        inside += [ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)] if found in NAT64 or int(found) >> 32 == 0 else []
        if any(one is not None and not is_public(str(one)) for one in inside):
            return False
    return found.is_global and not found.is_multicast


def check_url(url: str, what: str, reach: Reach | None = None) -> None:
    """Raises `UserError` unless it is an http or https URL with a host and without a password; with `reach`, also unless
    that allows the address that its host may be. Looks no name up."""
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.username is None and (parts.port or 1) > 0
    except ValueError:
        good = False
    if not good or len(url) > LONGEST or any(c <= " " or c == "\x7f" for c in url):
        raise UserError(f"{what} '{url[:60]}' cannot be used: give http://HOST/… or https://HOST/…, at most {LONGEST} characters")
    if reach is not None:
        with suppress(OSError, UnicodeError):  # a name, which may lead elsewhere when it is used
            _check_public(parts.hostname, addresses_of(url, socket.AI_NUMERICHOST), reach, what)


def resolve(url: str, reach: Reach, what: str) -> list[str]:
    """The addresses of a URL's host. Raises `UserError` if there are none, or if any is private and `reach` does not allow it."""
    host = urlsplit(url).hostname
    try:
        found = addresses_of(url)
    except (OSError, UnicodeError):
        raise UserError(f"{what}: the host '{host}' is unknown: check the URL") from None
    _check_public(host, found, reach, what)
    return found


def addresses_of(url: str, flags: int = 0) -> list[str]:
    """The addresses of a URL's host, in the order of preference. Raises OSError or UnicodeError if there are none."""
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    return list(dict.fromkeys(str(row[4][0]) for row in socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM, flags=flags)))


def _check_public(host: str | None, addresses: list[str], reach: Reach, what: str) -> None:
    if not reach.private and not all(map(is_public, addresses)):
        raise UserError(f"{what}: the host '{host}' is in a private network, which this server does not reach: give a public URL")


def fetch(url: str, reach: Reach, what: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> Answer:
    """GET a URL, or POST `body` to it, which follows no redirect. `what`: the field that named it.

    Raises `UserError` for what may not be reached, does not answer in time, or is too large.
    """
    for _ in range(reach.redirects + 1):
        check_url(url, what)
        answer, where = _once(url, reach, what, body, headers or {})
        if where is None or body is not None:
            return answer
        url = urljoin(url, where)
    raise UserError(f"{what}: the URL leads on more than {reach.redirects} times: give the address of the file itself")


def _once(url: str, reach: Reach, what: str, body: bytes | None, headers: dict[str, str]) -> tuple[Answer, str | None]:
    """One request to a checked address, and where its answer leads on."""
    parts = urlsplit(url)
    late = threading.Event()
    connection = _Pinned(parts.hostname, parts.port, parts.scheme, resolve(url, reach, what), reach.seconds)

    def cut() -> None:  # time limits of sockets are for each read: an answer that drips would never end
        late.set()
        if connection.wire is not None:
            with suppress(OSError):
                connection.wire.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(reach.seconds, cut)
    timer.daemon = True
    timer.start()
    try:
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request("GET" if body is None else "POST", target, body=body, headers={"User-Agent": "kling-serve", **headers})
        answer = connection.getresponse()
        if answer.status in (301, 302, 303, 307, 308):
            return Answer(answer.status, "", b""), answer.getheader("Location") or ""
        if (answer.length or 0) > reach.most:
            raise UserError(f"{what}: the file has {answer.length / 2**20:.1f} MiB: give at most {reach.most / 2**20:g} MiB")
        data = answer.read(reach.most + 1)
        if late.is_set():
            raise TimeoutError
        if len(data) > reach.most:
            raise UserError(f"{what}: the file has more than {reach.most / 2**20:g} MiB: give a smaller one")
        return Answer(answer.status, answer.getheader("Content-Type") or "", data), None
    except (OSError, http.client.HTTPException, ValueError) as error:
        if isinstance(error, UserError):
            raise
        slow = late.is_set() or isinstance(error, TimeoutError)
        why = f"it took more than {reach.seconds:g} s" if slow else str(error) or type(error).__name__
        raise UserError(f"{what}: nothing came from '{parts.hostname}' ({why}): check the URL, or try again") from None
    finally:
        timer.cancel()
        connection.close()


class _Pinned(http.client.HTTPConnection):
    """A connection to one of the given addresses, in the name of the host."""

    def __init__(self, host: str, port: int | None, scheme: str, addresses: list[str], seconds: float) -> None:
        self.secure, self.addresses = scheme == "https", addresses[:3]
        self.default_port = 443 if self.secure else 80
        self.wire: socket.socket | None = None  # `sock`, which the library forgets once an answer has it
        super().__init__(host, port or self.default_port, timeout=seconds)

    def connect(self) -> None:
        for i, address in enumerate(self.addresses):
            try:
                self.sock = self.wire = socket.create_connection((address, self.port), self.timeout / len(self.addresses))
                break
            except OSError:
                if i == len(self.addresses) - 1:
                    raise
        self.sock.settimeout(self.timeout)
        if self.secure:
            context = ssl.create_default_context()
            self.sock = self.wire = context.wrap_socket(self.sock, server_hostname=self.host, do_handshake_on_connect=False)
            self.sock.do_handshake()
