"""Observers hear about messages. There are none unless `engagement.telemetry` or `engagement.prometheus` is at work.

An observer can neither change nor fail the work: its error is logged, and the work goes on.
See docs/decisions.md#2026-11-24--telemetry-is-told-by-one-list-of-observers.
"""

from __future__ import annotations

from asyncio import CancelledError
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from contextvars import Context, copy_context
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, ParamSpec, Protocol, TypeVar

from engagement._logging import logger

if TYPE_CHECKING:
    from engagement._claim import Claim
    from engagement.messages import OutgoingMessage, Queued, QueuedMany, Receipt
    from engagement.models import MessageStatus
    from engagement.outcomes import Outcome, Verdict

    R = TypeVar("R", Queued, QueuedMany)

P = ParamSpec("P")
T = TypeVar("T")

QueueEnd = Callable[["Queued | QueuedMany | BaseException"], None]
SendEnd = Callable[[Sequence["Outcome"]], None]


@dataclass(frozen=True, slots=True)
class Round:
    """One transaction of a worker, after its commit. `started_at` is in nanoseconds since the epoch."""

    started_at: int
    settled: Sequence[tuple[Claim, Verdict, MessageStatus | None]]
    """Each attempt, its verdict, and the status of its message now; None says that the claim was lost."""
    claimed: Sequence[Claim]
    ended: Mapping[OutgoingMessage, MessageStatus]
    """The messages that ended instead of being claimed: expired, or in doubt of an earlier attempt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Heard:
    """A receipt that told something new of its message."""

    receipt: Receipt
    message_id: int
    message_type: str
    trace_context: str | None
    status: MessageStatus
    """The status of the message now."""
    news: frozenset[str]
    """Which of `delivered`, `read` and `undeliverable` the message was not before. `read` is a delivery too."""
    sent_to_delivered: timedelta | None
    """None unless this is the first word of a delivery, and the send was settled before."""
    resolves_doubt: bool


class Observer(Protocol):
    """The calls of an observer. The thread that does the work makes them, and waits for each.

    Between the beginning and the end of a step the work runs in the context (`contextvars`) that the beginning leaves
    behind: a span that is made current there is the parent of the spans of the driver or the transport.
    """

    def queueing(self, message_type: str | None) -> tuple[str | None, QueueEnd]:
        """Hear that a message of this type, or many (None), are about to be queued.

        Return the W3C `traceparent` to store with them, if any, and the listener for the result or the error.
        """

    def sending(self, claims: Sequence[Claim]) -> SendEnd | None:
        """Hear that claims are handed to the transport; return the listener for the outcomes, in another thread."""

    def committed(self, round_: Round) -> None:
        """Hear of one transaction: its settlements, its claims, and the messages that ended instead."""

    def heard(self, receipts: Sequence[Heard], started_at: int) -> None:
        """Hear of the receipts that one call recorded, in the host's transaction: that may still fail.

        `started_at` is in nanoseconds since the epoch.
        """

    def dropped(self, receipts: int) -> None:
        """Hear how many kept receipts were dropped, since no message was ever known by their names."""


_observers: tuple[Observer, ...] = ()


def observe(observer: Observer) -> None:
    """Tell `observer` from now on about the work of this process."""
    global _observers  # noqa: PLW0603 - one list for the process, as with logging
    _observers = (*_observers, observer)


def unobserve(observer: Observer) -> None:
    """Tell `observer` nothing any more."""
    global _observers  # noqa: PLW0603
    _observers = tuple(other for other in _observers if other is not observer)


def queueing(message_type: str | None, queue: Callable[[str | None], R]) -> R:
    """Return `queue(trace_context)`, and tell the observers."""
    if not _observers:
        return queue(None)
    context = copy_context()
    begun = [context.run(_guarded, observer.queueing, message_type) for observer in _observers]
    steps = [step for step in begun if step is not None]

    def end(result: Queued | QueuedMany | BaseException) -> None:
        for _, told in steps:
            _guarded(told, result)

    try:
        result = context.run(queue, next((given for given, _ in steps if given), None))
    except BaseException as error:
        end(error)
        raise
    end(result)
    return result


def sending(claims: Sequence[Claim]) -> tuple[Context, SendEnd]:
    """Tell the observers; return the context for the send, and the listener for the outcomes."""
    context = copy_context()
    if not _observers:
        return context, _tell_nobody
    begun = [context.run(_guarded, observer.sending, claims) for observer in _observers]

    def end(outcomes: Sequence[Outcome]) -> None:
        for told in begun:
            if told is not None:
                with suppress(BaseException):  # It would end the thread of the send, and nothing else.
                    _guarded(told, outcomes)

    return context, end


def _tell_nobody(_: Sequence[Outcome]) -> None:
    """Do nothing, and cost nothing."""


def committed(round_: Round) -> None:
    """Tell the observers."""
    for observer in _observers:
        _guarded(observer.committed, round_)


def heard(receipts: Sequence[Heard], started_at: int) -> None:
    """Tell the observers."""
    for observer in _observers:
        _guarded(observer.heard, receipts, started_at)


def dropped(receipts: int) -> None:
    """Tell the observers."""
    for observer in _observers:
        _guarded(observer.dropped, receipts)


def _guarded(told: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
    try:
        return told(*args, **kwargs)
    # An observer's error, taken for the transport's, would send a message twice. A cancelled call is no plain
    # exception.
    except (Exception, CancelledError) as error:  # noqa: BLE001
        logger.warning("engagement.observer_failed error=%s", type(error).__name__)
        return None
