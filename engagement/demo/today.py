"""The demo's messages, as of today."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta

from engagement.messages import NewMessage


def of_today(messages: Sequence[NewMessage], now: datetime) -> list[NewMessage]:
    """Return the messages on the latest days on which all their times have come, at the same hours of each person.

    The days in the file are examples. Their distances stay (a message three days before the last one stays three days
    before it). In the small hours of UTC the last day is yesterday, since people further west have their morning later.
    """
    last = max(moment for message in messages for moment in _times(message))
    days = (now - last).days + 1
    moved = _moved(messages, days)
    while any(moment > now for message in moved for moment in _times(message)):
        days -= 1
        moved = _moved(messages, days)
    return moved


def _times(message: NewMessage) -> list[datetime]:
    return [moment for moment in (message.scheduled_for, message.expires_at) if moment]


def _moved(messages: Sequence[NewMessage], days: int) -> list[NewMessage]:
    def move(moment: datetime | None, message: NewMessage) -> datetime | None:
        # In the person's zone: 09:00 stays 09:00, also if the clocks were changed in between.
        return moment and (moment.astimezone(message.tz) + timedelta(days=days)).astimezone(UTC)

    return [
        replace(
            message,
            scheduled_for=move(message.scheduled_for, message),
            expires_at=move(message.expires_at, message),
        )
        for message in messages
    ]
