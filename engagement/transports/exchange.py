"""One HTTP exchange: a request is written once, and one answer is read, all by one deadline.

h11 reads and writes the wire format. The rest is here, since a delivery depends on what no client tells: whether a
byte of the request was written, and whether a connection is clean, so that what is left over from one exchange is never
taken for the answer of the next. Nothing is kept of an answer (no cookies), followed, repeated or logged.
"""

from __future__ import annotations

import math
import select
import socket
import ssl
import threading
import weakref
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from time import monotonic, sleep

import h11

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
    WriteTimeout,
)
from engagement.transports.reaching import Origin, connected_to, proxy_of, seconds_left, tls_context

LARGEST_ANSWER = 256 * 1024
"""Bytes that are read of an answer, its chunk sizes and trailers included."""
LARGEST_HEAD = 32 * 1024
"""Bytes of a status line and its headers, of a chunk's size and extension, of trailers."""
MOST_INTERIM_ANSWERS = 20
"""So many 1xx may come before the answer."""
SETTLING_SECONDS = 0.0005
"""A connection that became free only now is watched for so long: what was written behind the answer is still coming.
So is one that is new: what speaks first is no HTTP server, and what it says is no answer."""
DISTRUST_SECONDS = 600.0
"""So long no connection is used twice after one of them had something left on it: next time it may come too late to be
told from the answer to the next request."""


class Connections:
    """Connections to one origin, directly or through the environment's proxy. Thread-safe.

    `headers` are sent with every request. `limit` bounds how many exchanges are made at once.
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
        self._headers = [
            ("Host", self._origin.authority),
            ("User-Agent", "engagement"),
            ("Accept", "*/*"),
            ("Accept-Encoding", "identity"),  # Compressed answers would have to be trusted to be small.
            *((name, value) for name, value in self._credentials() if name.lower() not in given),
            *headers.items(),
        ]
        self._connect_within = connect_within
        self._idle_seconds = idle_seconds
        self._limit = limit
        self._is_closed = False
        self._distrusted_until = 0.0
        self._idle: deque[_Connection] = deque()
        self.begin_anew()
        weakref.finalize(self, _close_all, self._idle)

    def close(self) -> None:
        """Close what is idle; what is in use is closed after it."""
        self._is_closed = True
        _close_all(self._idle)

    def begin_anew(self) -> None:
        """Forget the connections, which a child process shares with its parent, and who holds a place."""
        _close_all(self._idle)  # Only the child's descriptors: the parent's connections stay open.
        self._places = threading.BoundedSemaphore(self._limit)

    def exchange(
        self, method: str, path: str, body: bytes | None, headers: Mapping[str, str], *, within: float
    ) -> Answer | Silence:
        """Make one request; `path`, which may hold a query, comes after that of the URL; "" is the URL itself."""
        deadline = monotonic() + within
        try:
            request = self._request(method, path, body, headers)
        except Exception:  # noqa: BLE001 - whatever is wrong with it, it was not sent
            return Silence(UnsendableRequest)
        connect_by = min(deadline, monotonic() + self._connect_within)
        places = self._places
        if not places.acquire(timeout=max(connect_by - monotonic(), 0)):
            return Silence(PoolTimeout)
        try:
            return self._exchanged(request, body or b"", connect_by, deadline)
        finally:
            places.release()

    def _exchanged(self, request: h11.Request, body: bytes, connect_by: float, deadline: float) -> Answer | Silence:
        try:
            connection = self._clean_one() or self._new_one(connect_by)
        except ProxyError:
            return Silence(ProxyError)
        except TimeoutError:
            return Silence(ConnectTimeout)
        except Exception:  # noqa: BLE001 - whatever it was, nothing of the request was written
            return Silence(ConnectError)
        try:
            return connection.exchange(request, body, deadline)
        except Exception as error:  # noqa: BLE001 - whatever it was, something may have been written
            return Silence(_kind(error))
        finally:
            self._keep_or_close(connection)

    def _keep_or_close(self, connection: _Connection) -> None:
        if connection.has_surplus:
            self._distrusted_until = monotonic() + DISTRUST_SECONDS
        if connection.is_free and not self._is_closed and monotonic() >= self._distrusted_until:
            self._idle.append(connection)
        else:
            connection.close()

    def _request(self, method: str, path: str, body: bytes | None, headers: Mapping[str, str]) -> h11.Request:
        fields = [*self._headers, *headers.items()]
        if body is not None:
            fields += [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
        if method == "HEAD":
            # Some servers send a body nevertheless, and some of them not at once.
            fields.append(("Connection", "close"))
        target = self._origin.target(path)
        if self._proxy is not None and not self._origin.is_https:
            target = f"http://{self._origin.authority}{target}"
        return h11.Request(method=method, target=target, headers=fields)

    def _credentials(self) -> list[tuple[str, str]]:
        """Return what the user and password of the URL become, and those of a proxy that reads our requests."""
        found = [("Authorization", self._origin.basic)]
        if self._proxy is not None and not self._origin.is_https:
            found.append(("Proxy-Authorization", self._proxy.basic))
        return [(name, value) for name, value in found if value]

    def _clean_one(self) -> _Connection | None:
        """Take the connection that has been idle for longest, if nothing has come on it since."""
        while True:
            try:
                connection = self._idle.popleft()
            except IndexError:
                return None
            connection.look_again(self._idle_seconds)
            if connection.is_free and monotonic() >= self._distrusted_until:
                return connection
            self._keep_or_close(connection)

    def _new_one(self, connect_by: float) -> _Connection:
        origin, proxy = self._origin, self._proxy
        connected = connected_to(proxy or origin, connect_by)
        try:
            if self._context is not None:
                if proxy is not None:
                    _tunnel(connected, origin, proxy, connect_by)
                connected.settimeout(seconds_left(connect_by))
                connected = self._context.wrap_socket(connected, server_hostname=origin.host)
            connection = _Connection(connected)
        except BaseException:
            connected.close()
            raise
        connection.look_again(self._idle_seconds)
        if not connection.is_free:
            connection.close()
            raise ConnectError
        return connection


class _Connection:
    """A connection, for one exchange at a time; it `is_free` for another if the last one left nothing behind."""

    def __init__(self, connected: socket.socket) -> None:
        connected.settimeout(0)
        self._socket = connected
        self._tls = connected if isinstance(connected, ssl.SSLSocket) else None
        self._readable, self._writable = select.poll(), select.poll()
        self._readable.register(connected, select.POLLIN)
        self._writable.register(connected, select.POLLOUT)
        self._wire = h11.Connection(h11.CLIENT, max_incomplete_event_size=LARGEST_HEAD)
        self._free_since = monotonic()
        self.is_free = True
        self.has_surplus = False

    def close(self) -> None:
        self._socket.close()

    def look_again(self, idle_seconds: float) -> None:
        """Let it not be free any more if it was closed, was idle for too long, or brought what nobody had asked for."""
        idle_for = monotonic() - self._free_since
        self.is_free = idle_for <= idle_seconds
        if idle_for < SETTLING_SECONDS:
            sleep(SETTLING_SECONDS - idle_for)
        # Also one that was idle for too long: what came on it is a reason to distrust the others.
        if self._readable.poll(0) or self._tls is not None:
            try:
                self.has_surplus = bool(self._socket.recv(1))
                self.is_free = False
            except (BlockingIOError, ssl.SSLWantReadError):
                pass  # TLS speaks for itself, too: session tickets.
            except OSError:
                self.is_free = False

    def exchange(self, request: h11.Request, body: bytes, deadline: float) -> Answer:
        """Write the request, and return its answer, or as much of it as came. Raises if not even the head did."""
        self.is_free = False
        parts = [self._wire.send(request), self._wire.send(h11.Data(body)), self._wire.send(h11.EndOfMessage())]
        is_whole = self._write(b"".join(part for part in parts if part), deadline)
        answer = self._read(deadline)
        if not is_whole:
            self.is_free = False
            if answer.is_success:  # What was not read was not taken, whatever it says.
                raise ReadError
        return answer

    def _write(self, data: bytes, deadline: float) -> bool:
        """Write as much as is taken, and tell whether that was all."""
        left = memoryview(data)
        while left:
            try:
                left = left[self._socket.send(left) :]
            except (BlockingIOError, ssl.SSLWantWriteError):
                _wait(self._writable, deadline, WriteTimeout)
            except ssl.SSLWantReadError:
                _wait(self._readable, deadline, WriteTimeout)
            except OSError:
                return False  # Who hung up may have said why.
        return True

    def _read(self, deadline: float) -> Answer:
        head: h11.Response | None = None
        parts: list[bytes] = []
        received = interim = 0
        try:
            while True:
                event = self._wire.next_event()
                if event is h11.NEED_DATA:
                    data = self._receive(deadline)
                    received += len(data)
                    self._wire.receive_data(data)
                elif isinstance(event, h11.Data):
                    parts.append(bytes(event.data))
                elif isinstance(event, h11.Response):
                    head = event
                elif isinstance(event, h11.InformationalResponse):
                    interim += 1
                else:
                    break
                if received > LARGEST_ANSWER + LARGEST_HEAD or interim > MOST_INTERIM_ANSWERS:
                    raise RemoteProtocolError  # noqa: TRY301 - as if it had been h11's
            self._set_free(head)
        except Exception:
            # The head has spoken; a body that breaks off takes nothing back.
            if head is None:
                raise
        assert head is not None
        return Answer(head.status_code, _merged(head), b"".join(parts))

    def _receive(self, deadline: float) -> bytes:
        while True:
            if self._tls is None or not self._tls.pending():
                _wait(self._readable, deadline, ReadTimeout)
            try:
                return self._socket.recv(65_536)
            except (BlockingIOError, ssl.SSLWantReadError):
                continue
            except ssl.SSLWantWriteError:
                _wait(self._writable, deadline, ReadTimeout)

    def _set_free(self, head: h11.Response | None) -> None:
        """Let it be used again if the answer ended where both sides say that it did."""
        wire = self._wire
        self.has_surplus = bool(wire.trailing_data[0])
        if head is None or self.has_surplus or {wire.our_state, wire.their_state} != {h11.DONE}:
            return
        framing = [value for name, value in head.headers if name in {b"content-length", b"transfer-encoding"}]
        if len(framing) > 1 or (head.status_code in {204, 304} and framing not in ([], [b"0"])):
            return  # It says that there is more than may come: some servers send it, and not at once.
        wire.start_next_cycle()
        self._free_since = monotonic()
        self.is_free = True


def _tunnel(connected: socket.socket, to: Origin, proxy: Origin, deadline: float) -> None:
    headers = [("Host", to.address)] + ([("Proxy-Authorization", proxy.basic)] if proxy.basic else [])
    request = h11.Request(method="CONNECT", target=to.address, headers=headers)
    try:
        answer = _Connection(connected).exchange(request, b"", deadline)
    except ReadTimeout:
        raise TimeoutError from None
    if not answer.is_success:
        raise ProxyError


def _wait(poller: select.poll, deadline: float, error: type[Exception]) -> None:
    left = deadline - monotonic()
    if left <= 0 or not poller.poll(math.ceil(left * 1000)):
        raise error


def _kind(error: Exception) -> type[Exception]:
    if isinstance(error, h11.RemoteProtocolError):
        return RemoteProtocolError
    return ReadError if isinstance(error, OSError) else type(error)


def _merged(head: h11.Response) -> dict[str, str]:
    merged: dict[str, str] = {}
    for given, value in head.headers:
        name, text = given.decode("latin-1"), value.decode("latin-1")
        merged[name] = f"{merged[name]}, {text}" if name in merged else text
    return merged


def _close_all(idle: deque[_Connection]) -> None:
    with suppress(IndexError):
        while True:
            idle.popleft().close()
