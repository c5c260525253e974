"""The endpoint of a provider's receipts as an ASGI application (FastAPI, Starlette, uvicorn)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

from sqlalchemy import Engine

from engagement._delivery.hook import OnSettled
from engagement.receipts.endpoint import (
    MOST_BYTES,
    PATIENCE,
    Endpoint,
    Head,
    Incomplete,
    Response,
    TooLong,
    TooSlow,
    recorder,
)
from engagement.receipts.sources import ReceiptSource

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

THREADS = 4
"""Of one application, and as many connections. They are its own: receipts that wait take no thread of the host's."""


class ReceiptsASGI:
    """An ASGI application that records the receipts of `source`.

    A host mounts it (`app.mount("/receipts", ReceiptsASGI(engine, source))`, see docs/receipts.md), and it answers at
    each path below that place. `engine` is a synchronous one, as for a `Worker`, and is used in threads of its own: the
    event loop, which must be asyncio's, never waits. `schema` says where the table is, if not on the search path. A
    body that takes longer than `patience` is refused, and a database that does is answered for with 503.
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
        self._seconds = patience.total_seconds()
        self._threads = ThreadPoolExecutor(THREADS, "engagement-receipts")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "websocket":  # Anybody may ask, and an error would fill the host's log.
            await send({"type": "websocket.close"})
            return
        if scope["type"] != "http":
            raise NotImplementedError(scope["type"])  # The lifespan: an error says that there is none.
        try:
            response = await self._answer(scope, receive)
        except Exception as error:  # noqa: BLE001 - a server would log the traceback, which may show a person
            response = self._endpoint.refusal(error)
        await _send(response, scope, send)

    async def _answer(self, scope: Scope, receive: Receive) -> Response:
        head = Head(scope["method"], scope["query_string"].decode("latin-1"), _headers(scope))
        self._endpoint.check(head)
        try:
            async with asyncio.timeout(self._seconds):
                body = await _body(receive)
        except TimeoutError:
            raise TooSlow("the body did not arrive in time") from None
        async with asyncio.timeout(self._seconds):
            # A thread that is given up goes on. The provider repeats the request, which changes nothing then.
            return await asyncio.get_running_loop().run_in_executor(self._threads, self._endpoint.answer, head, body)


def _headers(scope: Scope) -> dict[str, str]:
    headers: dict[str, str] = {}
    for raw_name, raw_value in scope["headers"]:
        name, value = raw_name.decode("latin-1").lower(), raw_value.decode("latin-1")
        headers[name] = f"{headers[name]},{value}" if name in headers else value
    return headers


async def _body(receive: Receive) -> bytes:
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] != "http.request":
            raise Incomplete
        body += message.get("body", b"")
        if len(body) > MOST_BYTES:
            raise TooLong
        if not message.get("more_body", False):
            return bytes(body)


async def _send(response: Response, scope: Scope, send: Send) -> None:
    headers = [(name.encode(), value.encode("latin-1")) for name, value in response.headers]
    if response.status in {TooLong.status, TooSlow.status} and scope["http_version"].startswith("1"):
        headers.append((b"connection", b"close"))  # Or the server would read the rest, for the next request.
    await send({"type": "http.response.start", "status": response.status, "headers": headers})
    await send({"type": "http.response.body", "body": response.body})
