"""A transport around another one, which asks before each send. If the question raises, nothing has left."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from traceback import walk_tb
from typing import Any

from engagement._logging import logger
from engagement._sending.call import LeaseRanOut, MayHaveLeft, checked_lease
from engagement._sending.protocols import Transport
from engagement.messages import OutgoingMessage
from engagement.messages.checks import checked_flag
from engagement.outcomes import NotSent, Outcome, Postpone, causes

A_MINUTE = timedelta(minutes=1)


class Gate:
    """A transport around another one, which asks `check` before each send.

    `ready`, `why_not_ready`, `idempotent` and `look_up` are those of the transport inside. Around an `async def send`,
    `send` is still a plain function: the worker asks in a thread, where a look-up may block, and awaits the result in
    its event loop. A transport that has only `send_many` is refused: an error counts for the whole batch, so a time-out
    would put a message in doubt that the check held back. One that has both is used message by message. See
    docs/decisions.md#2026-11-24--route-is-not-idempotent-and-policies-refuse-batches.

    Any exception of `check` is `NotSent`, even `SystemExit`. Only its type is kept: its text may be about a person. A
    time zone that this machine cannot find is `Postpone`.
    """

    def __init__(self, transport: Transport) -> None:
        send = getattr(transport, "send", transport)
        if not callable(send):
            raise TypeError("transport: must be a function or an object with send; send_many cannot be asked each time")
        self._transport = transport
        self._send: Callable[[OutgoingMessage], Any] = send
        for name in ("ready", "look_up"):
            if (inner := getattr(transport, name, None)) is not None:
                setattr(self, name, inner)

    @property
    def idempotent(self) -> bool:
        """Whether the same delivery id twice has one effect."""
        return checked_flag("idempotent", getattr(self._transport, "idempotent", False))

    @property
    def why_not_ready(self) -> Any:
        """The reason of the transport inside for not being ready."""
        return getattr(self._transport, "why_not_ready", None)

    def send(self, message: OutgoingMessage) -> Any:
        """Send the message if it passes the check; else return the outcome of the check."""
        passed = self._ask(message)
        if not isinstance(passed, OutgoingMessage):
            return passed
        with checked_lease():  # The host's function may have taken longer.
            return self._send(passed)

    def check(self, message: OutgoingMessage) -> OutgoingMessage | Outcome:
        """Return the message, as it is to be sent, or an outcome if it is not to be sent now (`Withdraw("moved")`)."""
        raise NotImplementedError

    def _ask(self, message: OutgoingMessage) -> OutgoingMessage | Outcome:
        name = type(self).__name__
        try:
            answer = self.check(message)
        except (LeaseRanOut, MayHaveLeft):
            raise
        except BaseException as error:  # noqa: BLE001 - after any error of a host's function, nothing has left
            return for_want_of_a_zone(error, message) or NotSent(f"{name} raised {type(error).__name__}")
        if isinstance(answer, OutgoingMessage | Outcome):
            return answer
        return NotSent(f"{name} answered {type(answer).__name__}")


def for_want_of_a_zone(error: BaseException, message: OutgoingMessage) -> Postpone | None:
    """Return when to ask again if `error` comes from a look-up of a time zone; None if it does not.

    The machine has no time-zone database, or one that lacks the name, or the person's zone is empty: no fault of the
    message. So it costs no retry, and the question is asked ever more rarely, an hour apart at last.
    See docs/decisions.md#2026-11-29--a-time-zone-that-cannot-be-found-postpones.
    """
    traces = (frame for cause in causes(error) for frame, _ in walk_tb(cause.__traceback__))
    if not any(frame.f_globals.get("__name__", "").partition(".")[0] in _ZONE_LIBRARIES for frame in traces):
        return None
    logger.warning("engagement.no_time_zone message_id=%s error=%s", message.id, type(error).__name__)
    return Postpone(datetime.now(UTC) + A_MINUTE * 2 ** min(message.attempt - 1, 6), "a time zone could not be found")


_ZONE_LIBRARIES = frozenset({"zoneinfo", "pytz"})


def plain_function(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function`, or raise `TypeError` for an `async def`, whose coroutine would be taken for an answer."""
    if not callable(function) or inspect.iscoroutinefunction(function):
        raise TypeError(f"{name}: must be a plain function")
    return function
