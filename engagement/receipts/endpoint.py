"""The endpoint of a provider's receipts: each request gets the status by which its sender repeats it, or does not.

| request | status |
|---|---|
| its receipts are recorded or kept, or it has none | 200 |
| a handshake of a source that has one (Meta's GET) | 200, or 403 for a wrong token |
| not signed, or wrongly, or too long ago | 401 |
| it cannot be read, or ends early | 400 |
| another method | 405 |
| its body takes longer than `patience` (ASGI only) | 408 |
| its body has no length, and the WSGI server does not say where it ends | 411 |
| longer than 3 MiB | 413 |
| the database is away, too slow or too busy: to be sent again | 503 |
| any other failure (the table is missing) | 500 |

No server is known here: `asgi` and `wsgi` read a request and write the response.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from traceback import extract_tb
from typing import Protocol, runtime_checkable
from urllib.parse import parse_qsl

from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from engagement._delivery.evidence import settle_by
from engagement._delivery.hook import Hook, OnSettled, why_no_hook
from engagement._logging import logger
from engagement._sql import receiving
from engagement._sql.errors import describe, is_transient
from engagement._sql.own_transactions import connect, for_own_transactions, transaction
from engagement.messages import Receipt, ReceiptAnswer, Recorded
from engagement.receipts.sources import ReceiptSource, UnreadableReceipts
from engagement.repository import EngagementMessageRepository

MOST_BYTES = 3 * 1024 * 1024
"""Of a body. Meta: "Webhooks payloads can be up to 3MB" (WhatsApp Business Platform, "Webhooks", of 2026)."""
PATIENCE = timedelta(seconds=10)
RETRY_SECONDS = 10
MOST_FIELDS = 20
"""In a query. Meta's handshake has three."""

Record = Callable[[Sequence[Receipt]], Sequence[ReceiptAnswer]]


class NotAllowed(UnreadableReceipts):
    """The method is none of this endpoint's."""

    status = 405


class TooSlow(UnreadableReceipts):
    """The body did not arrive in time."""

    status = 408


class NoLength(UnreadableReceipts):
    """Nothing says where the body ends."""

    status = 411


class TooLong(UnreadableReceipts):
    """The body is longer than `MOST_BYTES`."""

    status = 413

    def __init__(self) -> None:
        super().__init__(f"the body is longer than {MOST_BYTES} bytes")


class Incomplete(UnreadableReceipts):
    """The body ends early: the sender has gone."""

    def __init__(self) -> None:
        super().__init__("the body ends early")


@runtime_checkable
class Challenged(Protocol):
    """A source whose provider asks with a GET request whether the endpoint is ours, before it sends anything."""

    def challenge(self, query: Mapping[str, str]) -> str:
        """Return the text to answer with. Raises `UnreadableReceipts`, mostly with status 403."""
        ...


@dataclass(frozen=True, slots=True, repr=False)
class Head:
    """A request without its body. The names of headers are in small letters, and equal ones are one, with commas."""

    method: str
    query: str
    headers: Mapping[str, str]


@dataclass(frozen=True, slots=True, repr=False)
class Response:
    """The answer to a request."""

    status: int
    text: str = ""
    extra: tuple[tuple[str, str], ...] = ()

    @property
    def body(self) -> bytes:
        """The bytes of the text."""
        return self.text.encode()

    @property
    def headers(self) -> list[tuple[str, str]]:
        """All headers."""
        return [
            ("content-type", "text/plain; charset=utf-8"),
            ("content-length", str(len(self.body))),
            ("x-content-type-options", "nosniff"),
            *self.extra,
        ]


class Endpoint:
    """Answers requests of one source. `record` records receipts for good before it returns. Thread-safe."""

    def __init__(self, source: ReceiptSource, record: Record) -> None:
        if isinstance(source, type) or not callable(getattr(source, "read", None)):
            raise TypeError("source: must be an object with name and read, such as SignedReceipts(secret)")
        self._source = source
        self._record = record
        self._challenge = source.challenge if isinstance(source, Challenged) else None
        self._allowed = ("POST",) if self._challenge is None else ("GET", "POST")

    def check(self, head: Head) -> int | None:
        """Return the length of the body if the request tells it. Raises `UnreadableReceipts` before it is read."""
        if head.method not in self._allowed:
            raise NotAllowed
        length = head.headers.get("content-length")
        if not length:
            return None
        if not length.isdecimal():
            raise UnreadableReceipts("content-length: must be a number")
        if len(length) > len(str(MOST_BYTES)) or int(length) > MOST_BYTES:
            raise TooLong
        return int(length)

    def answer(self, head: Head, body: bytes) -> Response:
        """Record what a request says, and return the response. Raises whatever `refusal` takes."""
        if head.method == "GET" and self._challenge is not None:
            return Response(200, self._challenge(_fields(head.query)))
        receipts = self._source.read(body, head.headers)
        answers = self._record(receipts) if receipts else ()
        recorded = sum(each.answer is Recorded.RECORDED for each in answers)
        logger.info(
            "engagement.receipts_received provider=%s receipts=%s recorded=%s",
            self._source.name,
            len(receipts),
            recorded,
        )
        return Response(200)

    def refusal(self, error: Exception) -> Response:
        """Return the response to a request that failed, and log the failure. Nothing of the request is in either."""
        status = _status_of(error)
        logger.warning(
            "engagement.receipts_refused provider=%s status=%s error=%s", self._source.name, status, _described(error)
        )
        text = str(error) if isinstance(error, UnreadableReceipts) else ""
        if status == NotAllowed.status:
            return Response(status, text, (("allow", ", ".join(self._allowed)),))
        return Response(status, text, (("retry-after", str(RETRY_SECONDS)),) if status == _UNAVAILABLE else ())


_UNAVAILABLE, _FAILED = 503, 500


def _status_of(error: Exception) -> int:
    if isinstance(error, UnreadableReceipts):
        return error.status
    return _UNAVAILABLE if isinstance(error, TimeoutError) or is_transient(error) else _FAILED


def _described(error: Exception) -> str:
    """Return the loggable part of an error. The text of one that is not ours may show a person."""
    name = type(error).__name__
    if isinstance(error, UnreadableReceipts):
        return f"{name} {str(error)!r}"
    if isinstance(error, SQLAlchemyError | TimeoutError):
        return describe(error)
    frames = extract_tb(error.__traceback__)
    return f"{name} at {frames[-1].filename}:{frames[-1].lineno}" if frames else name


def _fields(query: str) -> dict[str, str]:
    try:
        return dict(parse_qsl(query, keep_blank_values=True, max_num_fields=MOST_FIELDS))
    except ValueError:
        raise UnreadableReceipts("the query has too many fields") from None


def recorder(engine: Engine, schema: str | None, patience: timedelta, on_settled: OnSettled | None = None) -> Record:
    """Return a function that records receipts in a transaction of its own, and commits it.

    A statement that takes longer than `patience` is given up (another transaction holds the message). `on_settled` is
    called, last in the transaction, for each message that has another status by it; all calls have `patience` together.
    """
    if not isinstance(patience, timedelta) or patience < timedelta(milliseconds=1):
        raise ValueError("patience: must be a timedelta of more than zero")
    if on_settled is not None and (problem := why_no_hook(on_settled)):
        raise ValueError(f"on_settled: {problem}")
    ours = for_own_transactions(engine, schema, lends=on_settled is not None)
    hook = None if on_settled is None else Hook(on_settled, patience.total_seconds())
    limit = f"{patience // timedelta(milliseconds=1)}ms"

    def record(receipts: Sequence[Receipt]) -> Sequence[ReceiptAnswer]:
        def work(session: Session) -> Sequence[ReceiptAnswer]:
            session.execute(receiving.settings(), {"patience": limit})
            return EngagementMessageRepository(session).record_receipts(receipts)

        with connect(ours) as connection, transaction(connection):
            return settle_by(connection, work, hook)

    return record
