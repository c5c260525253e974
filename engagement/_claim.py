"""A message in hand, and the clock by which it is held."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from engagement.messages import OutgoingMessage
from engagement.models import EARLIEST
from engagement.outcomes import Outcome


def _boot_clock() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


# Unlike the monotonic clock of Linux, this one goes on while the machine sleeps, as the database's does.
# docs/decisions.md#2026-11-24--leases-are-believed-by-the-clock-that-does-not-stop
clock: Callable[[], float] = _boot_clock if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic

Position = tuple[datetime, int]
"""A place in the queue: when a message is due, and its id."""

START: Position = (EARLIEST, 0)


class Handle(Protocol):
    """A call that was handed to a thread or to the event loop."""

    def cancel(self) -> bool:
        """Take the call back; False if it goes on, though it may have been asked to end."""


@dataclass(slots=True, eq=False)
class Claim:
    """A message in hand.

    `place` is its position in the queue, `claimed_by` the name on its lease, and `held_until` when that
    runs out, by `clock`. The thread that sends it reads `held_until` and `is_overdue`, and writes `begun_at`; all else
    is the worker's.
    """

    message: OutgoingMessage
    place: Position
    claimed_by: str
    held_until: float
    lost_workers: int = 0
    """How many workers were lost with it. If any were, this worker looks up the message and does not send it."""
    trace_context: str | None = None
    """The W3C `traceparent` of the span that queued the message."""
    known: Outcome | None = None
    """The outcome, if it is known without the transport."""
    started_at: float = 0.0
    """When it was handed to a thread or the event loop."""
    begun_at: float | None = None
    """When its send really began, which may be later on a busy machine."""
    handle: Handle | None = None
    is_overdue: bool = False
    """It outlasted its time-out and was settled as in doubt; an answer after that is late."""
