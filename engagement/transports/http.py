"""The proof in an HTTP failure: whether the message left, judged before the provider's own words.

docs/decisions.md#2026-11-29--a-status-is-believed-only-if-it-denies-the-act
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from enum import StrEnum
from typing import Any

LONGEST_WAIT = timedelta(days=1)
"""The longest wait that a far side may ask for. A longer one is cut, and the message is tried then: a `Retry-After` in
the year 9999 would park it where nobody looks."""


class Proof(StrEnum):
    """The knowledge about a message after its request failed."""

    NOT_SENT = "not sent"
    """It did not leave, and may be tried again: `NotSent`."""
    WAIT = "not sent, wait"
    """It did not leave, and no other message would now: `NotSent`, and `ready()` is False for a moment."""
    STOPPED = "not sent, stopped"
    """The sender is at fault, its key, account or address: `Postpone`, which costs the message no retry, and `ready()`
    is False for a while. With `NotSent`, one expired key would fail the whole queue."""
    LATER = "not sent, later"
    """It did not leave, and nobody can say whether the message or the sender is at fault: `Postpone`, longer each time.
    That costs no retry and holds up no other message. After two days it counts against the message."""
    REFUSED = "refused"
    """It did not leave and never will: `Refused`."""
    IN_DOUBT = "in doubt"
    """It may have left: `InDoubt`, and `ready()` is False for a moment. Otherwise a provider that answers nothing but
    errors would put one message after the other in doubt."""


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer: the status, the headers with their names in lower case, and as much of the body as came."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    body: bytes = field(default=b"", repr=False)

    @property
    def is_success(self) -> bool:
        """Whether the status is a 2xx."""
        return 200 <= self.status < 300  # noqa: PLR2004 - statuses have no better names

    @property
    def json(self) -> Any:
        """The body as JSON, or None if it is no JSON (a page of a proxy, half an answer)."""
        try:
            return json.loads(self.body)
        except (ValueError, RecursionError):
            return None

    @property
    def retry_after(self) -> timedelta | None:
        """The wait in Retry-After, at most `LONGEST_WAIT`. A date is compared with the server's own clock (`Date`)."""
        given = self.headers.get("retry-after", "").strip()
        if re.fullmatch(r"[0-9]+", given):
            return wait_of(given, timedelta(seconds=1))
        until = _http_date(given)
        if until is None:
            return None
        return bounded(until - (_http_date(self.headers.get("date", "")) or datetime.now(UTC)))


class NothingWritten(Exception):  # noqa: N818 - named after the event
    """No byte of the request was written to anybody."""


class UnsendableRequest(NothingWritten):
    """HTTP has no such request."""


class PoolTimeout(NothingWritten):
    """All connections were in use."""


class ConnectTimeout(NothingWritten):
    """There was no connection in time: name server, handshake, TLS or proxy."""


class ConnectError(NothingWritten):
    """There was no connection (no such name, refused, TLS), or the peer spoke first."""


class ProxyError(NothingWritten):
    """The proxy made no connection."""


class WriteTimeout(Exception):  # noqa: N818 - likewise
    """The request was not written whole in time."""


class ReadTimeout(Exception):  # noqa: N818 - likewise
    """No answer came in time."""


class ReadError(Exception):
    """The connection broke."""


class RemoteProtocolError(Exception):
    """The far side hung up, or sent no HTTP, or too long an answer."""


@dataclass(frozen=True, slots=True)
class Silence:
    """No answer came back. `error` is only the kind of error: its text may hold words of the far side."""

    error: type[Exception]


def what_it_proves(failure: Answer | Silence) -> Proof:
    """Return the proof in a failed request by itself, before the provider's own words are looked at.

    | failure | it proves | because |
    |---|---|---|
    | UnsendableRequest | not sent, stopped | HTTP has no such request: the address, session or key is wrong |
    | PoolTimeout, ConnectTimeout, ConnectError, ProxyError | not sent, wait | there was no connection (no free place, \
DNS, refused, TLS, proxy, or something that speaks before it is asked), so not one byte was written |
    | WriteTimeout | in doubt | the last byte may have been written before |
    | ReadTimeout, ReadError, RemoteProtocolError, every other error | in doubt | the request was or may have been \
written, and no answer came |
    | 2xx | in doubt | it succeeded, but not in the provider's words: the page of a proxy, half an answer |
    | 300, 302, 303, 304 | in doubt | a server that redirects like this may have acted before (RFC 9110, 15.4.4) |
    | 301, 307, 308 | not sent, stopped | the address has moved (RFC 9110, 15.4.2, 15.4.8, 15.4.9); it is not followed |
    | 401, 402, 403, 407, 451 | not sent, stopped | the sender is not allowed to |
    | 404, 405, 410, 411, 414, 415, 421, 426, 428, 431 | not sent, stopped | the address, the headers or the \
protocol is wrong, for every message alike |
    | 408 | in doubt | it means that the request did not come in time (RFC 9110, 15.5.9), but gateways say it of their \
own far side |
    | 409, 423 | in doubt | it conflicts with another request: perhaps the same message, still being sent |
    | 425 | not sent | the server would not risk it yet (RFC 8470, 5.2) |
    | 429 | not sent, wait | too many requests (RFC 6585, 4), with Retry-After or without |
    | 400, 413, 422 | refused | the request was understood, and is wrong as it is |
    | every other 4xx | in doubt | it is assigned to nothing that denies a send: 499, 444 and 460 are a proxy's word \
that the client has left, 406 and 424 may come after the act |
    | 505, 511 | not sent, stopped | the server does not speak this HTTP, or a login page stands before it |
    | every other 5xx | in doubt | it may have failed after it had acted, also 501: it may be another server's word \
(gRPC's UNIMPLEMENTED), and 503 with Retry-After: a proxy says it when the server behind it hung up in the middle \
(Varnish's builtin.vcl) |

    Nothing is `refused` or `not sent` that could have left. A provider's own documentation comes before this table.
    """
    if isinstance(failure, Silence):
        if issubclass(failure.error, UnsendableRequest):
            return Proof.STOPPED
        return Proof.WAIT if issubclass(failure.error, NothingWritten) else Proof.IN_DOUBT
    return _BY_STATUS.get(failure.status, Proof.IN_DOUBT)


_BY_STATUS = (
    dict.fromkeys((301, 307, 308), Proof.STOPPED)
    | dict.fromkeys((401, 402, 403, 407, 451), Proof.STOPPED)
    | dict.fromkeys((404, 405, 410, 411, 414, 415, 421, 426, 428, 431), Proof.STOPPED)
    | dict.fromkeys((400, 413, 422), Proof.REFUSED)
    | {425: Proof.NOT_SENT, 429: Proof.WAIT}
    | dict.fromkeys((505, 511), Proof.STOPPED)
)


def _http_date(text: str) -> datetime | None:
    try:
        moment = parsedate_to_datetime(text)
    except (ValueError, TypeError, OverflowError):
        return None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def value_at(data: Any, *path: str | int) -> Any:
    """Return the value at `path` in JSON, or None."""
    for step in path:
        try:
            data = data[step]
        except (LookupError, TypeError):
            return None
    return data


def wait_of(digits: str, unit: timedelta) -> timedelta:
    """Return a far side's hint in digits, cut to `LONGEST_WAIT`."""
    return LONGEST_WAIT if len(digits.lstrip("0")) > 9 else bounded(int(digits) * unit)  # noqa: PLR2004 - no overflow


def bounded(wait: timedelta) -> timedelta:
    """Return a far side's hint, cut to `LONGEST_WAIT`."""
    return min(max(wait, timedelta(0)), LONGEST_WAIT)
