"""Real servers on loopback that do what a test says: answer, hang, reset the connection, cut an answer in half."""

# ruff: noqa: D102 - the names say it

import contextlib
import json
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

SELF_SIGNED = Path(__file__).with_name("self_signed.pem")
REASONS = {200: "OK", 201: "Created", 400: "Bad Request", 503: "Service Unavailable"}


@dataclass
class Received:
    """A request as it arrived."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self):
        return json.loads(self.body)


@dataclass
class Reply:
    """An answer. Text and bytes are sent as they are, all else as JSON."""

    status: int = 200
    body: object = b""
    headers: dict[str, str] = field(default_factory=dict)

    def encode(self) -> bytes:
        body = self.body if isinstance(self.body, bytes) else self._text().encode()
        lines = [f"HTTP/1.1 {self.status} {REASONS.get(self.status, 'Status')}", f"Content-Length: {len(body)}"]
        lines += [f"{name}: {value}" for name, value in self.headers.items()]
        return "\r\n".join([*lines, "", ""]).encode() + body

    def _text(self) -> str:
        return self.body if isinstance(self.body, str) else json.dumps(self.body)


Behaviour = Callable[[Received], "Reply | Callable[[socket.socket], None]"]
"""Returns an answer, or a function that is given the connection and does with it what it likes."""


class Server:
    """Listens on loopback and remembers what it received."""

    def __init__(self, behave: Behaviour, tls: ssl.SSLContext | None = None) -> None:
        self.behave = behave
        self.received: list[Received] = []
        self.connections = 0
        self.reads_bodies = True
        self.is_closing = threading.Event()
        self._tls = tls
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def port(self) -> int:
        return self._listener.getsockname()[1]

    @property
    def url(self) -> str:
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}"

    def close(self) -> None:
        self.is_closing.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            for connection in self._open:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                self._open.add(connection)
                self.connections += 1
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.closing(connection))
            if self._tls is not None:
                connection = self._tls.wrap_socket(connection, server_side=True)
                stack.enter_context(contextlib.closing(connection))
            stream = stack.enter_context(connection.makefile("rb"))
            while (request := self._read(stream)) is not None:
                with self._lock:
                    self.received.append(request)
                reply = self.behave(request)
                if not isinstance(reply, Reply):
                    reply(connection)
                    return
                connection.sendall(reply.encode())

    def _read(self, stream) -> Received | None:
        words = stream.readline().decode("latin-1").split(" ")
        if not words[-1].startswith("HTTP/1.1"):
            return None
        headers = {}
        while (line := stream.readline().decode("latin-1").rstrip("\r\n")) != "":
            name, _, value = line.partition(":")
            headers[name.strip().lower()] = value.strip()
        length = int(headers.get("content-length", 0)) if self.reads_bodies else 0
        return Received(words[0], words[1], headers, stream.read(length))


@contextlib.contextmanager
def serving(behave: Behaviour, *, tls: bool = False) -> Iterator[Server]:
    context = None
    if tls:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(SELF_SIGNED)
    server = Server(behave, context)
    try:
        yield server
    finally:
        server.close()


@contextlib.contextmanager
def refusing() -> Iterator[str]:
    """A URL whose port is taken and refuses every connection."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


@contextlib.contextmanager
def never_accepting() -> Iterator[str]:
    """A URL whose connections are never made: its queue is full."""
    with socket.socket() as listener, contextlib.ExitStack() as waiting:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            one = waiting.enter_context(socket.socket())
            one.setblocking(False)
            one.connect_ex(listener.getsockname())
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


# What a server may do with a connection instead of answering


def reset(connection: socket.socket) -> None:
    """End the connection with RST, as a crashed process or a firewall does."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def hang_up(connection: socket.socket) -> None:
    """End the connection in order, without an answer."""
    connection.shutdown(socket.SHUT_RDWR)


def hang(connection: socket.socket) -> None:
    """Say nothing until the client gives up."""
    connection.settimeout(30)
    connection.recv(1)


def saying(*pieces: bytes, then: Callable[[socket.socket], None] = hang_up) -> Callable[[socket.socket], None]:
    """Return what writes `pieces` as they are, and then does what is said."""

    def speak(connection: socket.socket) -> None:
        for piece in pieces:
            connection.sendall(piece)
        then(connection)

    return speak


def dripping(head: bytes, server_is_closing: threading.Event) -> Callable[[socket.socket], None]:
    """Return what writes `head` and then one byte of a body every 50 ms, without end."""

    def drip(connection: socket.socket) -> None:
        connection.sendall(head)
        while not server_is_closing.wait(0.05):
            connection.sendall(b" ")

    return drip
