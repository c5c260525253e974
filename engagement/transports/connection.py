"""A connection: writes a request once and reads one answer, and knows whether it may be used for another.

h11 reads the wire format. The rest is here, since a delivery depends on two facts that no client tells: whether a byte
of the request was written, and whether the connection was clean right before.
docs/decisions.md#2026-11-29--one-http-exchange-on-h11-and-a-socket
"""

from __future__ import annotations

import re
import socket
import ssl
import sys
from functools import cache
from time import monotonic, sleep

import h11

from engagement.transports.http import Answer, ConnectError, ReadError, ReadTimeout, RemoteProtocolError, WriteTimeout
from engagement.transports.waiting import READ, WRITE, Run, Steps, the_waiter

LARGEST_ANSWER = 256 * 1024
"""Most bytes of an answer that are read, its chunk sizes and trailers included."""
LARGEST_HEAD = 32 * 1024
"""Most bytes of a status line and its headers, of a chunk's size and extension, of trailers."""
MOST_AT_ONCE = 16 * 1024
"""Most bytes that are read before the other connections have their turn: in chunks of one byte, h11 takes 30 ms."""
MOST_INTERIM_ANSWERS = 20
"""The number of 1xx that may come before the answer."""
FOR_ONE_EXCHANGE = {"HEAD", "CONNECT"}
"""Methods that get a connection of their own: some servers answer HEAD with a body, which may come late."""
SETTLING_SECONDS = 0.0005
"""How long a connection is watched before its use. One that was freed just now may still receive bytes from behind the
answer. On a new one a peer may speak first: it is no HTTP server, and its bytes are no answer."""
DISTRUST_SECONDS = 600.0
"""How long no connection is used twice, once bytes were left on one. The next left-over bytes may come later, and would
pass for the answer to the next request."""


class Distrust:
    """Whether bytes were left on one of several connections, of late."""

    def __init__(self) -> None:
        self._until = 0.0

    def __bool__(self) -> bool:
        return monotonic() < self._until

    def begin(self) -> None:
        """Note that bytes were left."""
        self._until = monotonic() + DISTRUST_SECONDS


class Connection:
    """A connection, for one exchange at a time. It `is_free` for the next if the last one left nothing behind."""

    def __init__(self, connected: socket.socket, idle_seconds: float, distrust: Distrust) -> None:
        connected.settimeout(0)
        self.socket = connected
        self.is_free = False
        self.watched_for = 0
        self.running: Run[Answer] | None = None
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
        """Write a request, and return its answer, or as much of the answer as came. `asked` is the request for h11.

        Raises if not even the head came: `NothingWritten` if the connection was not clean, so nothing was sent.
        """
        self.is_free = False
        if (idle_for := monotonic() - self._free_since) < SETTLING_SECONDS:
            sleep(SETTLING_SECONDS - idle_for)
        return self._waiter.run(self, self._exchange(asked, written), deadline)

    def is_clean(self) -> bool:
        """Whether the connection is open, and no byte has come that nobody asked for."""
        # OpenSSL shows nothing of an answer until its TLS record is whole. On a new connection it is a session ticket.
        is_in_part = not self._is_new and isinstance(self.socket, ssl.SSLSocket) and _ends_within_a_record(self.socket)
        try:
            came = is_in_part or self.socket.recv(1)
        except (BlockingIOError, ssl.SSLWantReadError):
            return True  # TLS may have had bytes of its own (session tickets).
        except OSError:
            return False
        if came:
            self._distrust.begin()
        return False

    def _exchange(self, asked: h11.Request, written: bytes) -> Steps[Answer]:
        # A connection that was idle for too long is looked at too: bytes on it are a reason to distrust the others.
        if not self.is_clean() or not (self._is_new or self._may_be_used_again()):
            raise ConnectError
        self._is_new = False
        is_whole = yield from self._write(written)
        data = yield from self._receive()
        answer = usual_answer(data) if asked.method == b"POST" else None
        if answer is None:
            self._wire.send(asked)
            self._wire.send(_ALL_ASKED)
            answer = yield from self._read(data)
        else:
            self._set_free()
        if not is_whole:
            self.is_free = False
            if answer.is_success:  # The server did not read the whole request, so its yes proves nothing.
                raise ReadError
        return answer

    def _may_be_used_again(self) -> bool:
        return monotonic() - self._free_since <= self._idle_seconds and not self._distrust

    def _write(self, data: bytes) -> Steps[bool]:
        """Write as much as the server takes, and return whether it took everything."""
        left = memoryview(data)
        while left:
            try:
                left = left[self.socket.send(left) :]
            except (BlockingIOError, ssl.SSLWantWriteError):
                yield WRITE, WriteTimeout
            except ssl.SSLWantReadError:
                yield READ, WriteTimeout
            except OSError:
                return False  # A server that hangs up may have answered before: read on.
        return True

    def _read(self, data: bytes) -> Steps[Answer]:
        """Read an answer that begins with `data`."""
        wire = self._wire
        head: h11.Response | None = None
        parts: list[bytes] = []
        received, interim = len(data), 0
        try:
            wire.receive_data(data)
            while True:
                event = wire.next_event()
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
            self._look_at_the_end(head)
        except Exception:
            # The status in the head holds, also if the body breaks off.
            if head is None:
                raise
        assert head is not None
        return Answer(head.status_code, _merged(head), b"".join(parts))

    def _receive(self) -> Steps[bytes]:
        while True:
            yield READ, ReadTimeout
            try:
                return self.socket.recv(MOST_AT_ONCE)
            except (BlockingIOError, ssl.SSLWantReadError):
                continue
            except ssl.SSLWantWriteError:
                yield WRITE, ReadTimeout

    def _look_at_the_end(self, head: h11.Response | None) -> None:
        """Set the connection free if both sides agree where the answer ended."""
        wire = self._wire
        if wire.trailing_data[0]:
            self._distrust.begin()
            return
        if head is None or {wire.our_state, wire.their_state} != {h11.DONE}:
            return
        framing = [value for name, value in head.headers if name in {b"content-length", b"transfer-encoding"}]
        if len(framing) > 1 or (head.status_code in {204, 304} and framing not in ([], [b"0"])):
            return  # The headers announce a body that HTTP forbids (204 with a length). Some servers send it, later.
        wire.start_next_cycle()
        self._set_free()

    def _set_free(self) -> None:
        if sys.platform == "linux":
            # A server's second write waits until the first one is acknowledged (Nagle). Our system would acknowledge
            # 40 ms later or with the next request, and a second answer would pass for the answer to that request.
            # Acknowledged at once, it comes while the connection is idle.
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        self._free_since = monotonic()
        self.is_free = True


def _ends_within_a_record(connected: ssl.SSLSocket) -> bool:
    """Whether the last TLS record has come only in part."""
    try:
        came = socket.socket.recv(connected, 65_536, socket.MSG_PEEK)
    except OSError:
        return False
    end = 0
    while end < len(came):
        end += 5 + int.from_bytes(came[end + 3 : end + 5])  # type, version, length
    return end > len(came)


_USUAL = re.compile(
    rb"HTTP/1\.1 ([2-5][0-9][0-9]) [ -~]*\r\n"
    rb"((?:[A-Za-z][A-Za-z0-9-]*: [!-~](?:[ -~]*[!-~])?\r\n)+)\r\n"
)


def usual_answer(data: bytes) -> Answer | None:
    """Return an answer to a POST that came whole, alone, and in the most usual form. All else, None, is h11's to read.

    It is what h11 would return, in a tenth of the time. See
    docs/decisions.md#2026-11-29--one-http-exchange-on-h11-and-a-socket.
    """
    found = _USUAL.match(data)
    if found is None or found[1] in {b"204", b"304"}:
        return None
    lines = found[2].decode().split("\r\n")[:-1]
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    body = data[found.end() :]
    if (
        len(headers) < len(lines)
        or "transfer-encoding" in headers
        or headers.get("content-length") != str(len(body))
        or headers.get("connection", "keep-alive").lower() != "keep-alive"
    ):
        return None
    return Answer(int(found[1]), headers, body)


_ALL_ASKED = h11.EndOfMessage()


@cache
def asked_with(method: str) -> h11.Request:
    """Return a request that is enough for h11 to read the answer. Telling h11 the whole request takes 20 µs."""
    closing = [("Connection", "close")] if method in FOR_ONE_EXCHANGE else []
    return h11.Request(method=method, target="/", headers=[("Host", "-"), *closing])


def _merged(head: h11.Response) -> dict[str, str]:
    merged: dict[str, str] = {}
    for given, value in head.headers:
        name, text = given.decode("latin-1"), value.decode("latin-1")
        merged[name] = f"{merged[name]}, {text}" if name in merged else text
    return merged
