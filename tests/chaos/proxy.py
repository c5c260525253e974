"""A proxy between an engine and the server, which can lose the answer to a COMMIT, or bring the COMMIT late."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from sqlalchemy import URL

COMMIT = b"COMMIT\0"
PATIENCE_SECONDS = 30.0


class Proxy:
    """Passes all bytes on, but for the answer to a COMMIT that it is told to lose: that cuts the connection.

    A COMMIT that it is told to delay is passed on when it `may_commit`, and the client is cut off at once.
    """

    def __init__(self, server: URL) -> None:
        self._server = server
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = [self._listener]
        self._is_to_lose = threading.Event()
        self._is_to_delay = threading.Event()
        self.is_delayed = threading.Event()
        self.may_commit = threading.Event()
        host, port = self._listener.getsockname()
        # Not encrypted, or a COMMIT could not be read.
        query = {"sslmode": "disable", "gssencmode": "disable"}
        self.url = server.set(host=host, port=port, query=query)

    def lose_next_commit(self) -> None:
        """Let the server commit once more, and the client not know it."""
        self._is_to_lose.set()

    def delay_next_commit(self) -> None:
        """Let the server commit later once more, after the client has been cut off."""
        self._is_to_delay.set()

    def accept(self) -> None:
        """Serve connections until the end."""
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = self._connect()
                self._sockets += [client, server]
                is_lost = threading.Event()
                for pump, source, target in ((self._ask, client, server), (self._answer, server, client)):
                    threading.Thread(target=pump, args=(source, target, is_lost), daemon=True).start()

    def close(self) -> None:
        """End all connections."""
        self.may_commit.set()
        for each in self._sockets:
            _close(each)

    def _connect(self) -> socket.socket:
        host = str(self._server.host or self._server.query["host"])
        port = int(self._server.port or self._server.query["port"])
        if not host.startswith("/"):
            return socket.create_connection((host, port))
        server = socket.socket(socket.AF_UNIX)
        server.connect(f"{host}/.s.PGSQL.{port}")
        return server

    def _ask(self, client: socket.socket, server: socket.socket, is_lost: threading.Event) -> None:
        with suppress(OSError):
            while data := client.recv(65536):
                if COMMIT in data and self._is_to_lose.is_set():
                    self._is_to_lose.clear()
                    is_lost.set()
                if COMMIT in data and self._is_to_delay.is_set():
                    self._is_to_delay.clear()
                    is_lost.set()
                    _close(client)
                    self.is_delayed.set()
                    self.may_commit.wait(PATIENCE_SECONDS)
                    server.sendall(data)
                    return  # Who waits for the answer closes it.
                server.sendall(data)
        _close(server)

    def _answer(self, server: socket.socket, client: socket.socket, is_lost: threading.Event) -> None:
        with suppress(OSError):
            while (data := server.recv(65536)) and not is_lost.is_set():
                client.sendall(data)
        _close(client)
        _close(server)


def _close(each: socket.socket) -> None:
    with suppress(OSError):
        each.shutdown(socket.SHUT_RDWR)
    each.close()


@contextmanager
def proxied(server: URL) -> Iterator[Proxy]:
    """Run a proxy in front of the server."""
    proxy = Proxy(server)
    thread = threading.Thread(target=proxy.accept)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.close()
        thread.join()
