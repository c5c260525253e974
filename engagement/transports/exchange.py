"""One HTTP exchange: a request is written once, and one answer is read, all by one deadline.

Bytes left over from one exchange never pass for the answer of the next. Of an answer nothing is kept (no cookies),
followed (no redirects), repeated or logged.
"""

from __future__ import annotations

import socket
import ssl
import threading
import weakref
from collections import deque
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import lru_cache
from time import monotonic

import h11

from engagement.transports.connection import FOR_ONE_EXCHANGE, Connection, Distrust, asked_with
from engagement.transports.http import (
    Answer,
    ConnectError,
    ConnectTimeout,
    PoolTimeout,
    ProxyError,
    ReadError,
    ReadTimeout,
    RemoteProtocolError,
    Silence,
    UnsendableRequest,
)
from engagement.transports.reaching import Origin, connected_to, proxy_of, seconds_left, tls_context

_OF_EVERY_REQUEST = [
    ("User-Agent", "engagement"),
    ("Accept", "*/*"),
    ("Accept-Encoding", "identity"),  # Compressed answers would have to be trusted to be small.
]
_FRAMING = {"connection", "content-length", "transfer-encoding"}


class Connections:
    """Connections to one origin, directly or through the environment's proxy. Thread-safe.

    `headers` are sent with every request. `limit` bounds the exchanges at one time.
    """

    def __init__(
        self,
        url: str,
        *,
        headers: Mapping[str, str],
        connect_within: float,
        idle_seconds: float,
        limit: int,
        verify: ssl.SSLContext | bool,
    ) -> None:
        self._origin = Origin(url)
        self._proxy = proxy_of(self._origin)
        self._context = tls_context(verify) if self._origin.is_https else None
        given = {name.lower() for name in headers}
        credentials = [(name, value) for name, value in self._credentials() if name.lower() not in given]
        self._host = self._origin.authority.encode()
        self._fields = _fields([*_OF_EVERY_REQUEST, *credentials, *headers.items()])
        self._connect_within = connect_within
        self._idle_seconds = idle_seconds
        self._limit = limit
        self._is_closed = False
        self._distrust = Distrust()
        self._idle: deque[Connection] = deque()
        self.begin_anew()
        weakref.finalize(self, _close_all, self._idle)

    def close(self) -> None:
        """Close the idle connections. One in use is closed at the end of its exchange."""
        self._is_closed = True
        _close_all(self._idle)

    def begin_anew(self) -> None:
        """In a child process, forget the connections, which `waiting` has closed there, and the places in use."""
        self._idle.clear()
        self._places = threading.BoundedSemaphore(self._limit)

    def exchange(
        self, method: str, path: str, body: bytes | None, headers: Mapping[str, str], *, within: float
    ) -> Answer | Silence:
        """Make one request. `path` is put behind the URL's own and may hold a query; "" is the URL itself."""
        deadline = monotonic() + within
        try:
            asked, written = asked_with(method), self._written(method, path, body, headers)
        except Exception:  # noqa: BLE001 - a request that cannot be written down was not sent
            return Silence(UnsendableRequest)
        connect_by = min(deadline, monotonic() + self._connect_within)
        places = self._places
        if not places.acquire(timeout=max(connect_by - monotonic(), 0)):
            return Silence(PoolTimeout)
        try:
            while (result := self._exchanged(asked, written, connect_by, deadline)) is None:
                pass
            return result
        finally:
            places.release()

    def _exchanged(
        self, asked: h11.Request, written: bytes, connect_by: float, deadline: float
    ) -> Answer | Silence | None:
        """Make the exchange on one connection. None if that was an idle one that may not be used again."""
        connection, is_new = self._idle_one(), False
        if connection is None:
            try:
                connection, is_new = self._new_one(connect_by), True
            except ProxyError:
                return Silence(ProxyError)
            except TimeoutError:
                return Silence(ConnectTimeout)
            except Exception:  # noqa: BLE001 - without a connection nothing was written
                return Silence(ConnectError)
        try:
            return connection.exchange(asked, written, deadline)
        except ConnectError:
            return Silence(ConnectError) if is_new else None
        except Exception as error:  # noqa: BLE001 - after any other error a byte may have been written
            return Silence(_kind(error))
        finally:
            if connection.is_free and not self._is_closed:
                self._idle.append(connection)
            else:
                connection.close()

    def _idle_one(self) -> Connection | None:
        """Take the connection that has been idle for longest."""
        try:
            return self._idle.popleft()
        except IndexError:
            return None

    def _new_one(self, connect_by: float) -> Connection:
        origin, proxy = self._origin, self._proxy
        connected = connected_to(proxy or origin, connect_by)
        try:
            if self._context is not None:
                if proxy is not None:
                    self._tunnel(connected, proxy, connect_by)
                connected.settimeout(seconds_left(connect_by))
                connected = self._context.wrap_socket(connected, server_hostname=origin.host)
            return Connection(connected, self._idle_seconds, self._distrust)
        except BaseException:
            connected.close()
            raise

    def _tunnel(self, connected: socket.socket, proxy: Origin, connect_by: float) -> None:
        to = self._origin.address.encode()
        fields = _fields([("Proxy-Authorization", proxy.basic)] if proxy.basic else [])
        written = b"CONNECT %s HTTP/1.1\r\nHost: %s\r\n%s\r\n" % (to, to, fields)
        try:
            answer = Connection(connected, self._idle_seconds, self._distrust).exchange(
                asked_with("CONNECT"), written, connect_by
            )
        except (ConnectTimeout, ReadTimeout):
            raise TimeoutError from None
        if not answer.is_success:
            raise ProxyError

    def _written(self, method: str, path: str, body: bytes | None, headers: Mapping[str, str]) -> bytes:
        target = self._origin.target(path)
        if self._proxy is not None and not self._origin.is_https:
            target = f"http://{self._origin.authority}{target}"
        fields = self._fields
        if headers:
            fields += _fields(headers.items())
        if body is not None:
            fields += b"Content-Type: application/json\r\nContent-Length: %d\r\n" % len(body)
        if method in FOR_ONE_EXCHANGE:
            fields += b"Connection: close\r\n"
        first = (method.encode(), target.encode(), self._host)
        return b"%s %s HTTP/1.1\r\nHost: %s\r\n%s\r\n%s" % (*first, fields, body or b"")

    def _credentials(self) -> list[tuple[str, str]]:
        """Return the headers for the URL's user and password, and for those of a proxy that reads our requests."""
        found = [("Authorization", self._origin.basic)]
        if self._proxy is not None and not self._origin.is_https:
            found.append(("Proxy-Authorization", self._proxy.basic))
        return [(name, value) for name, value in found if value]


def _fields(fields: Iterable[tuple[str, str]]) -> bytes:
    """Return the bytes of header fields. `ValueError` if HTTP forbids one (a line end in a value)."""
    lines = []
    for name, value in fields:
        if not value or not value.isascii() or not value.isprintable() or value != value.strip():
            raise ValueError(f"{name}: must be printable ASCII, without blanks around it")
        lines.append(_checked(name) + value.encode())
    return b"".join(line + b"\r\n" for line in lines)


@lru_cache(maxsize=100)
def _checked(name: str) -> bytes:
    """Return the beginning of a field. h11's check takes 10 µs for a few fields, so each name is checked once."""
    try:
        h11.Request(method="GET", target="/", headers=[("Host", "-"), (name, "-")])
    except (h11.LocalProtocolError, UnicodeError):
        name = ""
    if not name or name.lower() in _FRAMING:
        raise ValueError("headers: must have names that HTTP has, and leave to us where a request ends")
    return f"{name}: ".encode()


def _kind(error: Exception) -> type[Exception]:
    if isinstance(error, h11.RemoteProtocolError):
        return RemoteProtocolError
    return ReadError if isinstance(error, OSError) else type(error)


def _close_all(idle: deque[Connection]) -> None:
    with suppress(IndexError):
        while True:
            idle.popleft().close()
