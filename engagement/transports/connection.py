"""A connection: writes a request once and reads one answer, and knows whether it may be used for another.

h11 reads and writes the wire format. The rest is here, since a delivery depends on what no client tells: whether a
byte of the request was written, and whether the connection was clean right before.
"""

from __future__ import annotations

import socket
import ssl
import sys
from functools import cache
from time import monotonic, sleep

import h11

from engagement.transports.http import (
    Answer,
    ConnectError,
    ReadError,
    ReadTimeout,
    RemoteProtocolError,
    WriteTimeout,
)
from engagement.transports.waiting import READ, WRITE, Run, Steps, the_waiter

LARGEST_ANSWER = 256 * 1024
"""Bytes that are read of an answer, its chunk sizes and trailers included."""
LARGEST_HEAD = 32 * 1024
"""Bytes of a status line and its headers, of a chunk's size and extension, of trailers."""
MOST_INTERIM_ANSWERS = 20
"""So many 1xx may come before the answer."""
FOR_ONE_EXCHANGE = {"HEAD", "CONNECT"}
"""Methods that have a connection for themselves: some servers answer HEAD with a body, and some of them not at once."""
SETTLING_SECONDS = 0.0005
"""A connection that became free only now is watched for so long: what was written behind the answer is still coming.
So is one that is new: what speaks first is no HTTP server, and what it says is no answer."""
DISTRUST_SECONDS = 600.0
"""So long no connection is used twice after one of them had something left on it: next time it may come too late to be
told from the answer to the next request."""


class Distrust:
    """Whether something was left on one of several connections, of late."""

    def __init__(self) -> None:
        self._until = 0.0

    def __bool__(self) -> bool:
        return monotonic() < self._until

    def begin(self) -> None:
        """Something was."""
        self._until = monotonic() + DISTRUST_SECONDS


class Connection:
    """A connection, for one exchange at a time; it `is_free` for another if the last one left nothing behind."""

    def __init__(self, connected: socket.socket, idle_seconds: float, distrust: Distrust) -> None:
        connected.settimeout(0)
        self.socket = connected
        self.is_free = False
        self.watched_for = 0
        self.running: Run[Answer] | None = None
        self._tls = connected if isinstance(connected, ssl.SSLSocket) else None
        self._wire = h11.Connection(h11.CLIENT, max_incomplete_event_size=LARGEST_HEAD)
        self._idle_seconds = idle_seconds
        self._distrust = distrust
        self._is_new = True
        self._free_since = monotonic()
        self._waiter = the_waiter()

    def close(self) -> None:
        """Close it."""
        self._waiter.close(self)

    def exchange(self, asked: h11.Request, written: bytes, deadline: float) -> Answer:
        """Write a request, which for h11 is `asked`, and return its answer, or as much of it as came.

        Raises if not even the head came: `NothingWritten` if it was not clean.
        """
        self.is_free = False
        if (idle_for := monotonic() - self._free_since) < SETTLING_SECONDS:
            sleep(SETTLING_SECONDS - idle_for)
        return self._waiter.run(self, self._exchange(asked, written), deadline)

    def is_clean(self) -> bool:
        """Whether it is open and nothing has come on it that nobody had asked for."""
        try:
            came = self.socket.recv(1)
        except (BlockingIOError, ssl.SSLWantReadError):
            return True  # TLS speaks for itself, too: session tickets.
        except OSError:
            return False
        if came:
            self._distrust.begin()
        return False

    def _exchange(self, asked: h11.Request, written: bytes) -> Steps[Answer]:
        # Also one that was idle for too long is looked at: what came on it is a reason to distrust the others.
        if not self.is_clean() or not (self._is_new or self._may_be_used_again()):
            raise ConnectError
        self._is_new = False
        self._wire.send(asked)
        self._wire.send(_ALL_ASKED)
        is_whole = yield from self._write(written)
        answer = yield from self._read()
        if not is_whole:
            self.is_free = False
            if answer.is_success:  # What was not read was not taken, whatever it says.
                raise ReadError
        return answer

    def _may_be_used_again(self) -> bool:
        return monotonic() - self._free_since <= self._idle_seconds and not self._distrust

    def _write(self, data: bytes) -> Steps[bool]:
        """Write as much as is taken, and tell whether that was all."""
        left = memoryview(data)
        while left:
            try:
                left = left[self.socket.send(left) :]
            except (BlockingIOError, ssl.SSLWantWriteError):
                yield WRITE, WriteTimeout
            except ssl.SSLWantReadError:
                yield READ, WriteTimeout
            except OSError:
                return False  # Who hung up may have said why.
        return True

    def _read(self) -> Steps[Answer]:
        wire = self._wire
        head: h11.Response | None = None
        parts: list[bytes] = []
        received = interim = 0
        event: h11.Event | type[h11.NEED_DATA | h11.PAUSED] = h11.NEED_DATA
        try:
            while True:
                if event is h11.NEED_DATA:
                    data = yield from self._receive()
                    received += len(data)
                    wire.receive_data(data)
                elif type(event) is h11.Data:
                    parts.append(bytes(event.data))
                elif type(event) is h11.Response:
                    head = event
                elif type(event) is h11.InformationalResponse:
                    interim += 1
                else:
                    break
                if received > LARGEST_ANSWER + LARGEST_HEAD or interim > MOST_INTERIM_ANSWERS:
                    raise RemoteProtocolError  # noqa: TRY301 - as if it had been h11's
                event = wire.next_event()
            self._set_free(head)
        except Exception:
            # The head has spoken; a body that breaks off takes nothing back.
            if head is None:
                raise
        assert head is not None
        return Answer(head.status_code, _merged(head), b"".join(parts))

    def _receive(self) -> Steps[bytes]:
        while True:
            if self._tls is None or not self._tls.pending():
                yield READ, ReadTimeout
            try:
                return self.socket.recv(65_536)
            except (BlockingIOError, ssl.SSLWantReadError):
                continue
            except ssl.SSLWantWriteError:
                yield WRITE, ReadTimeout

    def _set_free(self, head: h11.Response | None) -> None:
        """Let it be used again if the answer ended where both sides say that it did."""
        wire = self._wire
        if wire.trailing_data[0]:
            self._distrust.begin()
            return
        if head is None or {wire.our_state, wire.their_state} != {h11.DONE}:
            return
        framing = [value for name, value in head.headers if name in {b"content-length", b"transfer-encoding"}]
        if len(framing) > 1 or (head.status_code in {204, 304} and framing not in ([], [b"0"])):
            return  # It says that there is more than may come: some servers send it, and not at once.
        wire.start_next_cycle()
        if sys.platform == "linux":
            # A server that writes more than its answer, in a second write, may hold that back until we acknowledge the
            # first (Nagle). Our system would do so 40 ms later, or with the next request, and it would be its answer.
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        self._free_since = monotonic()
        self.is_free = True


_ALL_ASKED = h11.EndOfMessage()


@cache
def asked_with(method: str) -> h11.Request:
    """Return all that h11 must know of a request to read its answer: to tell it everything takes 20 µs."""
    closing = [("Connection", "close")] if method in FOR_ONE_EXCHANGE else []
    return h11.Request(method=method, target="/", headers=[("Host", "-"), *closing])


def _merged(head: h11.Response) -> dict[str, str]:
    merged: dict[str, str] = {}
    for given, value in head.headers:
        name, text = given.decode("latin-1"), value.decode("latin-1")
        merged[name] = f"{merged[name]}, {text}" if name in merged else text
    return merged
