"""The endpoint of a provider's receipts as a WSGI application (Flask, Django, gunicorn)."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta
from http import HTTPStatus
from typing import TYPE_CHECKING

from sqlalchemy import Engine

from engagement._delivery.hook import OnSettled
from engagement.receipts.endpoint import (
    MOST_BYTES,
    PATIENCE,
    Endpoint,
    Head,
    Incomplete,
    NoLength,
    Response,
    TooLong,
    recorder,
)
from engagement.receipts.sources import ReceiptSource

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

CHUNK = 64 * 1024


class ReceiptsWSGI:
    """A WSGI application that records the receipts of `source`.

    A host mounts it (`DispatcherMiddleware(app.wsgi_app, {"/receipts": ReceiptsWSGI(engine, source)})` of Werkzeug, see
    docs/receipts.md), and it answers at each path below that place. `engine` is a synchronous one, as for a `Worker`.
    `schema` says where the table is, if not on the search path. A database that takes longer than `patience` is
    answered for with 503. The time that a body may take is the server's matter (gunicorn's `--timeout`).
    `on_settled` is called as a worker's is, for each message to which a request gives another status
    (docs/settling.md). Raises `ValueError` or `TypeError`, which names the field.
    """

    def __init__(
        self,
        engine: Engine,
        source: ReceiptSource,
        *,
        schema: str | None = None,
        patience: timedelta = PATIENCE,
        on_settled: OnSettled | None = None,
    ) -> None:
        self._endpoint = Endpoint(source, recorder(engine, schema, patience, on_settled))

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Answer one request."""
        try:
            response = self._answer(environ)
        except Exception as error:  # noqa: BLE001 - a server would log the traceback, which may show a person
            response = self._endpoint.refusal(error)
        start_response(f"{response.status} {HTTPStatus(response.status).phrase}", response.headers)
        return [response.body]

    def _answer(self, environ: WSGIEnvironment) -> Response:
        head = Head(environ["REQUEST_METHOD"], environ.get("QUERY_STRING", ""), _headers(environ))
        length = self._endpoint.check(head)
        return self._endpoint.answer(head, _body(environ, length))


def _headers(environ: WSGIEnvironment) -> dict[str, str]:
    names = {name: name.removeprefix("HTTP_") for name in environ if name.startswith("HTTP_")}
    names |= {name: name for name in ("CONTENT_TYPE", "CONTENT_LENGTH") if name in environ}
    return {short.replace("_", "-").lower(): environ[name] for name, short in names.items()}


def _body(environ: WSGIEnvironment, length: int | None) -> bytes:
    """Return the body. Without a length, only a server that marks the end of its input may be read to the end."""
    if length is None and not environ.get("wsgi.input_terminated"):
        if "HTTP_TRANSFER_ENCODING" in environ:
            raise NoLength("content-length: is missing")
        return b""
    body = _read(environ, MOST_BYTES + 1 if length is None else length)
    if length is None and len(body) > MOST_BYTES:
        raise TooLong
    if length is not None and len(body) < length:
        raise Incomplete
    return body


def _read(environ: WSGIEnvironment, most: int) -> bytes:
    body = bytearray()
    try:
        while len(body) < most and (some := environ["wsgi.input"].read(min(CHUNK, most - len(body)))):
            body += some
    except OSError:  # Servers tell so of a broken connection, and of chunks that cannot be read.
        raise Incomplete from None
    return bytes(body)
