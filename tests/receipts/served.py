"""Endpoints of receipts on real servers, and a provider that speaks to them as it likes."""

import hashlib
import hmac
import json
import socket
import wsgiref.simple_server
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from http.client import HTTPResponse
from typing import NamedTuple

import uvicorn
import werkzeug.serving
from conftest import row
from test_examples import running

from engagement import Receipt
from engagement.messages import delivery_id, reference
from engagement.receipts import ReceiptsASGI, ReceiptsWSGI, UnreadableReceipts, Unsigned

PATIENCE = 20
KEY = b"a secret that nobody may see"
NUMBER = "5511987654321"
"""A person's, who stands in every request and may stand nowhere else."""


class WrongToken(Unsigned):
    status = 403


class Tiny:
    """A source whose requests are `{"receipts": [{"event": …, "reference": …}]}`, signed in `X-Signature`."""

    name = "tiny"

    def read(self, body, headers):
        """Return the receipts."""
        if headers.get("x-signature") != sign(body):
            raise Unsigned("x-signature is missing or wrong")
        try:
            given = json.loads(body)["receipts"]
        except (ValueError, KeyError):
            raise UnreadableReceipts("receipts: is missing") from None
        return [Receipt(at=datetime.now(UTC), provider=self.name, **each) for each in given]


class Challenging(Tiny):
    """The same, with a handshake."""

    def challenge(self, query):
        """Return the number that is asked for."""
        if query.get("token") != "right":
            raise WrongToken("the token is wrong")
        return query["number"]


def sign(body: bytes) -> str:
    return hmac.digest(KEY, body, hashlib.sha256).hex()


def body_of(*receipts) -> bytes:
    return json.dumps({"to": NUMBER, "receipts": receipts}).encode()


def about(engine, message_id: int, event: str = "delivered") -> dict[str, str]:
    """Return what a provider says of a message."""
    return {"event": event, "reference": reference(message_id, delivery_id(row(engine, message_id).idempotency_key))}


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    text: str


class Provider:
    """Speaks HTTP/1.1 to an endpoint, byte by byte."""

    def __init__(self, port: int) -> None:
        self._port = port

    def connect(self) -> socket.socket:
        """Open a connection."""
        return socket.create_connection(("127.0.0.1", self._port), PATIENCE)

    def ask(self, method: str = "POST", body: bytes = b"", path: str = "/", **headers: str) -> Answer:
        """Send a whole request, and return the answer. Underscores in names of headers become hyphens."""
        with self.connect() as connection:
            connection.sendall(head(method, path, Content_Length=str(len(body)), **headers) + body)
            return answer_on(connection)

    def tell(self, *receipts) -> Answer:
        """Send a request that is right."""
        body = body_of(*receipts)
        return self.ask(body=body, X_Signature=sign(body))


def head(method: str = "POST", path: str = "/", **headers: str) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: engagement", "Connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def answer_on(connection: socket.socket, method: str = "POST") -> Answer:
    """Read an answer to its end."""
    with closing(HTTPResponse(connection, method=method)) as response:
        response.begin()
        headers = {name.lower(): value for name, value in response.getheaders()}
        return Answer(response.status, headers, response.read().decode())


@contextmanager
def served(kind: str, engine, source, **options):
    """Serve an endpoint of this kind, and hand out a provider."""
    with {"asgi": _by_uvicorn, "wsgi": _by_werkzeug}[kind](engine, source, **options) as port:
        yield Provider(port)


@contextmanager
def _by_uvicorn(engine, source, **options):
    app = ReceiptsASGI(engine, source, **options)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, ws="none", loop="asyncio"))
    with (
        socket.create_server(("127.0.0.1", 0)) as listening,
        running(lambda: server.run(sockets=[listening]), lambda: setattr(server, "should_exit", True)),
    ):
        yield listening.getsockname()[1]


@contextmanager
def _by_werkzeug(engine, source, **options):
    server = werkzeug.serving.make_server("127.0.0.1", 0, ReceiptsWSGI(engine, source, **options), threaded=True)
    with running(server.serve_forever, server.shutdown):
        yield server.server_port
    server.server_close()


@contextmanager
def by_wsgiref(app):
    """Serve a WSGI application by the server of the standard library, which knows no chunks."""
    server = wsgiref.simple_server.make_server("127.0.0.1", 0, app)
    with running(server.serve_forever, server.shutdown):
        yield server.server_port
    server.server_close()
