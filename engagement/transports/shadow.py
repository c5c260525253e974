"""A dry run: does everything but send."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol

from engagement._logging import logger
from engagement.messages import OutgoingMessage
from engagement.outcomes import Postpone, Sent
from engagement.transports.client import Prepared


class PreparingTransport(Protocol):
    """A transport that can show its request without sending it: each HTTP transport of this package."""

    def prepare(self, message: OutgoingMessage, /) -> Any:
        """Return the request, or the outcome of a message that cannot be sent."""


class Shadow:
    """Prepares each message as `transport` would and sends none, so that it can run on production data.

    Every message stays pending and is postponed by `again_after`: a dry run makes no message sent or failed. The
    history tells the outcome that it would have had (`shadow: would be sent, 312 bytes`). `ready` and `look_up` are the
    transport's own.
    """

    idempotent = False

    def __init__(self, transport: PreparingTransport, *, again_after: timedelta = timedelta(hours=1)) -> None:
        if again_after <= timedelta(0):
            raise ValueError("again_after: must be positive")
        self._transport = transport
        self._again_after = again_after

    @property
    def look_up(self) -> Callable[[OutgoingMessage], Any] | None:
        """The transport's look-up, for a message that a real worker left behind."""
        found: Callable[[OutgoingMessage], Any] | None = getattr(self._transport, "look_up", None)
        return found

    @property
    def why_not_ready(self) -> Any:
        """The transport's own reason."""
        return getattr(self._transport, "why_not_ready", None)

    def ready(self) -> Any:
        """Ask the transport. An awaitable is handed on to the worker."""
        ask = getattr(self._transport, "ready", None)
        return True if ask is None else ask()

    def send(self, message: OutgoingMessage) -> Postpone:
        """Prepare the message, and put it off."""
        prepared = self._transport.prepare(message)
        if isinstance(prepared, Prepared):
            event, reason = Sent.event, f"shadow: would be sent, {len(prepared.body)} bytes"
        else:
            event = getattr(prepared, "event", type(prepared).__name__)
            reason = f"shadow: would be {type(prepared).__name__}: {getattr(prepared, 'reason', '')}"
        logger.info("engagement.shadow message_id=%s attempt=%s outcome=%s", message.id, message.attempt, event)
        return Postpone(datetime.now(UTC) + self._again_after, reason)
