"""The host's part: its transport, and the server behind it."""

from __future__ import annotations

import unittest
from collections.abc import Collection
from datetime import UTC, datetime, timedelta
from itertools import count

from engagement._sending.protocols import Transport
from engagement.messages import OutgoingMessage
from engagement.models import Destination
from engagement.outcomes import Outcome, classify_exception
from engagement.words import RenderedMessage

_numbers = count(1)


class FarSide:
    """The hooks of a host: they make its transport, and set the behaviour of the far side.

    The promises are in its one child, `TransportContract`: a single class for both had 240 lines.
    See docs/decisions.md#2026-11-29--a-file-has-one-question-350-lines-at-most-and-its-room-in-the-wheel.
    """

    answers_within: timedelta = timedelta(seconds=10)
    secrets: Collection[str] = ()

    def make_transport(self) -> Transport:
        """Return a new transport, to be used from any thread."""
        raise NotImplementedError("make_transport: return your transport")

    def close_transport(self, transport: Transport) -> None:
        """Free the transport's connections: by default with its `close`, if it has one."""
        close = getattr(transport, "close", None)
        if close is not None:
            close()

    def make_message(self) -> OutgoingMessage:
        """Return a message of its own: another id, key, destination and content than any before."""
        number = next(_numbers)
        return RenderedMessage(
            id=number,
            idempotency_key=f"contract-{number}:reminder:2030-01-01",
            user_id=f"contract-{number}",
            message_type="reminder",
            message_key="reminder.appointment",
            message_params={"name": f"Personal-{number}-Param", "at": "12:30"},
            destination=Destination.INDIVIDUAL,
            destination_jid=f"{55_119_000_000_000 + number}@s.whatsapp.net",
            scheduled_for=datetime.now(UTC),
            attempt=1,
            retry_count=0,
            text=f"Hello Personal-{number}-Text",
        )

    def far_side_accepts(self) -> None:
        """Make the far side take messages."""
        raise NotImplementedError("far_side_accepts: make the far side take messages")

    def far_side_refuses(self) -> None:
        """Make the far side refuse a message for good (a wrong number)."""
        raise NotImplementedError("far_side_refuses: make the far side refuse messages")

    def far_side_times_out(self) -> None:
        """Make the far side take requests and answer none for longer than `answers_within`."""
        raise NotImplementedError("far_side_times_out: make the far side silent")

    def far_side_unreachable(self) -> None:
        """Make it impossible to connect to the far side."""
        raise NotImplementedError("far_side_unreachable: stop the far side")

    def far_side_breaks_off(self) -> None:
        """Make the far side take requests, and cut the connection instead of answering. Optional."""
        raise unittest.SkipTest("far_side_breaks_off is not given")

    def effects_of(self, message: OutgoingMessage) -> int | None:
        """Return how often the far side acted on the message's delivery id; None if it cannot be told.

        Optional, unless the transport says that it is idempotent.
        """
        del message
        return None

    def classify(self, error: BaseException) -> Outcome:
        """Return the outcome of an exception of the transport: by default the worker's."""
        return classify_exception(error)
