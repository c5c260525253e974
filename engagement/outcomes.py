"""The meaning of a delivery, decided in one place: an outcome is a value, and `decide` turns it into a verdict.

Nothing here touches the database or a clock.
"""

from __future__ import annotations

import random
import socket
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import ClassVar, assert_never

from engagement.messages.checks import checked_moment
from engagement.models import MessageStatus

LONGEST_DELAY = timedelta(days=366)
MAX_REASON = 1000
"""Characters that are kept of a reason: a provider may answer with a page of HTML."""


@dataclass(frozen=True, slots=True)
class Sent:
    """The transport's far side accepted the message (a gateway took it, and the person's phone may be off)."""

    event: ClassVar[str] = "sent"
    """Its name in history, logs and metrics."""
    provider_message_id: str | None = None


@dataclass(frozen=True, slots=True)
class NotSent:
    """It provably did not leave (a refused connection), and is tried again after `retry_after` at the earliest.

    The longer of that and the backoff counts (10 s and a minute: a minute). If the message had left after all, the
    person gets it twice.
    """

    event: ClassVar[str] = "not_sent"
    reason: str
    retry_after: timedelta | None = None

    def __post_init__(self) -> None:
        if self.retry_after is not None and not timedelta(0) <= self.retry_after <= LONGEST_DELAY:
            raise ValueError(f"retry_after: must be from zero to {LONGEST_DELAY.days} days")


@dataclass(frozen=True, slots=True)
class Refused:
    """It did not leave, and never will: a wrong number, a template that does not exist."""

    event: ClassVar[str] = "refused"
    reason: str


@dataclass(frozen=True, slots=True)
class InDoubt:
    """Nobody can say whether it left (a time-out). Only an idempotent transport sends it again by itself."""

    event: ClassVar[str] = "in_doubt"
    reason: str


@dataclass(frozen=True, slots=True)
class Postpone:
    """Not now, but at `until` (quiet hours). It did not leave, and this counts as no failure."""

    event: ClassVar[str] = "postponed"
    until: datetime
    reason: str

    def __post_init__(self) -> None:
        checked_moment("until", self.until)


@dataclass(frozen=True, slots=True)
class Withdraw:
    """It did not leave and is no longer wanted (opted out)."""

    event: ClassVar[str] = "withdrawn"
    reason: str


Outcome = Sent | NotSent | Refused | InDoubt | Postpone | Withdraw


def as_outcome(answer: object) -> Outcome:
    """Return the outcome of a transport's answer. `None` and text are short for `Sent`; any other value is in doubt."""
    if isinstance(answer, Outcome):
        return answer
    if answer is None or isinstance(answer, str):
        return Sent(answer)
    return InDoubt(f"the transport answered {type(answer).__name__}, which is no outcome")


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The record of an attempt. `event` and `reason` go into the history, unless the message was sent."""

    status: MessageStatus
    event: str
    reason: str | None = None
    counts_as_failure: bool = False
    has_doubt: bool | None = None
    """Whether an attempt may have left; None leaves the doubt of earlier ones as it is. A doubt never ends as
    unsent."""
    delay: timedelta | None = None
    until: datetime | None = None
    provider_message_id: str | None = None


Backoff = Callable[[int], timedelta]
"""How long to wait after the n-th failure of a message, n counting from 1."""


def exponential_backoff(
    first: timedelta = timedelta(minutes=1),
    *,
    factor: float = 5.0,
    longest: timedelta = timedelta(hours=6),
    jitter: float = 0.2,
) -> Backoff:
    """Return a backoff of about 1, 5, 25 … minutes. `jitter` spreads each wait by that share both ways.

    Jitter keeps the messages that failed together from coming back together (0.2 makes 4 to 6 minutes of 5). `longest`
    bounds the wait before jitter.
    """
    if first <= timedelta(0) or longest < first or factor < 1 or not 0 <= jitter < 1:
        raise ValueError("exponential_backoff: needs 0 < first <= longest, factor >= 1 and 0 <= jitter < 1")

    def backoff(failures: int) -> timedelta:
        exponent = min(failures - 1, 64)  # beyond it, a float would overflow
        wait = min(first.total_seconds() * factor**exponent, longest.total_seconds())
        return timedelta(seconds=wait * random.uniform(1 - jitter, 1 + jitter))  # noqa: S311 - no secret

    return backoff


def decide(
    outcome: Outcome, *, retry_count: int, max_retries: int, idempotent: bool, worker_lost: bool, backoff: Backoff
) -> Verdict:
    """Return the verdict for a message that failed `retry_count` times before.

    `worker_lost` says that its worker died or froze. Such a message never ends `failed`: a message that kills its
    workers is parked in doubt, for a person to look at. See
    docs/decisions.md#2026-11-24--a-message-that-kills-its-workers-ends-in-doubt-also-if-look_up-says-that-it-was-not-sent.
    """
    failures = retry_count + 1

    def again_or(
        last: MessageStatus, reason: str, *, has_doubt: bool | None, at_least: timedelta = timedelta(0)
    ) -> Verdict:
        is_last = failures >= max_retries
        return Verdict(
            status=last if is_last else MessageStatus.PENDING,
            event=outcome.event,
            reason=reason,
            counts_as_failure=True,
            has_doubt=has_doubt,
            delay=None if is_last else min(max(backoff(failures), at_least), LONGEST_DELAY),
        )

    match outcome:
        case Sent(None):
            verdict = _SENT
        case Sent(provider_message_id):
            verdict = Verdict(
                status=MessageStatus.SENT, event=outcome.event, has_doubt=False, provider_message_id=provider_message_id
            )
        case NotSent(reason, retry_after):
            last = MessageStatus.IN_DOUBT if worker_lost else MessageStatus.FAILED
            # A send speaks of itself. A look-up speaks of the delivery id, and so of all attempts.
            has_doubt = False if worker_lost else None
            at_least = retry_after or timedelta(0)
            verdict = again_or(last, reason, has_doubt=has_doubt, at_least=at_least)
        # docs/decisions.md#2026-11-24--a-doubt-is-only-sent-again-by-an-idempotent-transport-whoever-comes-by
        case InDoubt(reason) if idempotent:
            verdict = again_or(MessageStatus.IN_DOUBT, reason, has_doubt=True)
        case InDoubt(reason):
            verdict = Verdict(status=MessageStatus.IN_DOUBT, event=outcome.event, reason=reason, has_doubt=True)
        case Refused(reason):
            verdict = Verdict(status=MessageStatus.FAILED, event=outcome.event, reason=reason)
        case Postpone(until, reason):
            verdict = Verdict(status=MessageStatus.PENDING, event=outcome.event, reason=reason, until=until)
        case Withdraw(reason):
            verdict = Verdict(status=MessageStatus.CANCELLED, event=outcome.event, reason=reason)
        case _:
            assert_never(outcome)
    return verdict


_SENT = Verdict(status=MessageStatus.SENT, event=Sent.event, has_doubt=False)

Classify = Callable[[BaseException], Outcome]

# The errors of the common clients for a connection that was never made, so nothing left. They are recognised by name,
# since none of the clients is a dependency.
_BEFORE_THE_SEND = frozenset(
    {"ConnectError", "ConnectTimeout", "ConnectTimeoutError", "NewConnectionError", "NameResolutionError"}
    | {"PoolTimeout", "EmptyPoolError", "ClientConnectorError", "ClientConnectorDNSError", "InvalidURL"}
    | {"UnsupportedProtocol", "MissingSchema", "InvalidSchema"}
)
_HTTP_CLIENTS = frozenset({"httpx", "httpcore", "requests", "urllib3", "aiohttp", "http", "grpc"})


def classify_exception(error: BaseException, *, strict: bool = False) -> Outcome:
    """Return the outcome of an exception of a transport: the rule unless `classify=` replaces it.

    A time-out or a broken connection is `InDoubt`. A connection that was never made, and every other error (a
    `KeyError`), is `NotSent`; with `strict`, every other error is `InDoubt` too. The error's causes count:
    `httpx.ReadTimeout` is no `TimeoutError`, but one is its cause. Any other error of an HTTP client is `InDoubt`,
    since it does not say whether the request was written.
    See docs/decisions.md#2026-11-24--the-default-rule-for-exceptions-looks-at-causes-and-at-http-clients-by-name.
    """
    reason = f"{type(error).__name__}: {error}"
    if not isinstance(error, Exception):
        return InDoubt(reason)
    chain = list(causes(error))
    for cause in chain:
        if _is_before_the_send(cause):
            return NotSent(reason)
        if isinstance(cause, TimeoutError | ConnectionError | EOFError):
            return InDoubt(reason)
    if strict or any(type(cause).__module__.partition(".")[0] in _HTTP_CLIENTS for cause in chain):
        return InDoubt(reason)
    return NotSent(reason)


def _is_before_the_send(error: BaseException) -> bool:
    return (
        isinstance(error, ConnectionRefusedError | socket.gaierror | ssl.SSLCertVerificationError)
        or type(error).__name__ in _BEFORE_THE_SEND
    )


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Return the error and its causes, each once."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def clean_reason(text: object) -> str | None:
    """Return a provider's text as PostgreSQL can store it, on one line and cut; None if nothing is left of it.

    A number or an exception in place of a text is turned into its text; if that fails, into the name of its type.
    """
    if text is None:
        return None
    try:
        text = str(text)
    except Exception:  # noqa: BLE001 - an error in a provider's class must not lose the outcome
        text = type(text).__name__
    if len(text) <= MAX_REASON and text.isprintable() and " " not in text:
        return text or None  # The usual case: a provider's message id.
    printable = "".join(character if character.isprintable() else " " for character in text[: 2 * MAX_REASON])
    return " ".join(printable.split())[:MAX_REASON] or None


def storable(text: str | None) -> str | None:
    """Return a text as a database of any encoding can store it, in ASCII: an arrow as a backslash and `u2192`.

    See docs/decisions.md#2026-11-29--a-text-is-checked-against-the-encoding-of-the-database.
    """
    return None if text is None else text.encode("ascii", "backslashreplace").decode("ascii")
