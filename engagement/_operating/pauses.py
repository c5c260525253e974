"""Pauses in words, wherever messages that wait are shown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime

from engagement._operating.masking import masked
from engagement.messages import Pause
from engagement.models import EngagementMessage, MessageStatus, PauseScope


def named(pause: Pause) -> str:
    """Return the scope of a pause (`everything`, `type campaign`, `sender main`)."""
    return pause.scope if pause.name is None else f"{pause.scope} {pause.name}"


def in_utc(at: datetime) -> str:
    """Return a moment as people read it."""
    return f"{at.astimezone(UTC):%Y-%m-%d %H:%MZ}"


def in_words(pause: Pause, moment: Callable[[datetime], str] = in_utc) -> str:
    """Return one pause as a sentence (`type campaign since 2026-11-30 09:00Z, by ana: wrong wording`)."""
    until = "" if pause.until is None else f" until {moment(pause.until)}"
    by = "" if pause.by is None else f", by {pause.by}"
    return f"{named(pause)} since {moment(pause.since)}{until}{by}: {masked(pause.reason)}"


def holding(pauses: Sequence[Pause], message: EngagementMessage) -> list[Pause]:
    """Return the pauses that hold a message back, or may: nobody knows by which sender it would be sent."""
    if message.status != MessageStatus.PENDING:
        return []
    return [pause for pause in pauses if pause.scope != PauseScope.TYPE or pause.name == message.message_type]
