"""A server on loopback that answers as no server should, and knows which messages it really took.

A `Play` is what it does with one request: whether it takes the message, and the pieces that it writes, as they are.
"""

import contextlib
import re
import socket
import ssl
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from loopback import SELF_SIGNED


@dataclass
class Play:
    """How one request is answered. Pieces are bytes; `pause` waits before each but the first; then `end` is done."""

    name: str
    takes: bool
    pieces: Iterable[bytes]
    end: str = "keep"  # or: close, reset, hold
    pause: float = 0.0
    is_endless: bool = False
    is_over: threading.Event = field(default_factory=threading.Event)


class HostileServer:
    """Plays what `plays` holds for the message in a request, and `otherwise` for all that has none in it."""

    def __init__(self, otherwise: Callable[[str], Play], *, tls: bool = False) -> None:
        self.plays: dict[int, Play] = {}
        self.taken: set[int] = set()
        self.asked: Counter[int] = Counter()
        self.cookies: list[str] = []
        self.connections = 0
        self._otherwise = otherwise
        self._is_closing = threading.Event()
        self._context = None
        if tls:
            self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._context.load_cert_chain(SELF_SIGNED)
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._is_closing.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self.connections += 1
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            stack.callback(connection.close)
            connection.settimeout(20)
            if self._context is not None:
                connection = self._context.wrap_socket(connection, server_side=True)
                stack.callback(connection.close)
            stream = stack.enter_context(connection.makefile("rb"))
            while (play := self._played(stream)) is not None:
                try:
                    self._perform(play, connection)
                finally:
                    play.is_over.set()
                if play.end != "keep":
                    self._end(play, connection)
                    return

    def _played(self, stream) -> Play | None:
        first = stream.readline(65_536).decode("latin-1")
        headers = {}
        while (line := stream.readline(65_536).decode("latin-1").rstrip("\r\n")) != "":
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        if not first:
            return None
        if "cookie" in headers:
            self.cookies.append(headers["cookie"])
        body = stream.read(int(headers.get("content-length", 0)))
        about = re.search(rb"message-([0-9]+)", body)
        if about is None:
            return self._otherwise(first.partition(" ")[0])
        message = int(about[1])
        play = self.plays[message]
        self.asked[message] += 1
        if play.takes:
            self.taken.add(message)
        return play

    def _perform(self, play: Play, connection: socket.socket) -> None:
        for number, piece in enumerate(play.pieces):
            if number and play.pause:
                time.sleep(play.pause)
            if self._is_closing.is_set():
                return
            connection.sendall(piece)

    def _end(self, play: Play, connection: socket.socket) -> None:
        if play.end == "reset":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        elif play.end == "hold":
            self._is_closing.wait(60)


def answer(status: int, body: bytes = b"", *headers: str, reason: str = "Said", length: int | None = None) -> bytes:
    """Return an answer whose length is told, rightly or not."""
    told = len(body) if length is None else length
    lines = [f"HTTP/1.1 {status} {reason}", f"Content-Length: {told}", *headers, "", ""]
    return "\r\n".join(lines).encode("latin-1") + body


def chunked(status: int, *chunks: bytes, extension: bytes = b"", trailer: bytes = b"") -> bytes:
    """Return an answer in chunks."""
    told = b"".join(b"%x%s\r\n%s\r\n" % (len(chunk), extension, chunk) for chunk in chunks)
    head = b"HTTP/1.1 %d Said\r\nTransfer-Encoding: chunked\r\n\r\n" % status
    return head + told + b"0" + extension + b"\r\n" + trailer + b"\r\n"


def bytewise(text: bytes) -> list[bytes]:
    """Return each byte of a text as a piece."""
    return [text[place : place + 1] for place in range(len(text))]


def endlessly(*pieces: bytes, first: bytes = b"") -> Iterable[bytes]:
    """Return `first`, and then the pieces again and again."""
    yield first
    while True:
        yield from pieces
