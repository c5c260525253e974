"""Times of a person's day, where a clock may show one twice or skip it."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, date, datetime, time, tzinfo
from zoneinfo import ZoneInfo

from engagement.messages import OutgoingMessage

TimeZoneOf = Callable[[OutgoingMessage], tzinfo | str]
"""The person's time zone: a `tzinfo`, or its name, such as `America/Sao_Paulo`."""


def zone(answer: tzinfo | str) -> tzinfo:
    """Return the zone that a host named, or raise the error of `ZoneInfo`."""
    return answer if isinstance(answer, tzinfo) else ZoneInfo(answer)


def checked_wall_time(name: str, value: time) -> time:
    """Return `value` if it is a time of some person's day, or raise `ValueError`."""
    if not isinstance(value, time) or value.tzinfo is not None:
        raise ValueError(f"{name}: must be a time without a time zone: the zone is the person's")
    return value


def earlier(day: date, wall: time, tz: tzinfo) -> datetime:
    """Return when the clock first shows it, in UTC."""
    return min(_readings(day, wall, tz))


def later(day: date, wall: time, tz: tzinfo) -> datetime:
    """Return when the clock last shows it, in UTC."""
    return max(_readings(day, wall, tz))


def _readings(day: date, wall: time, tz: tzinfo) -> list[datetime]:
    # In UTC, since aware datetimes of one zone are compared by their wall times.
    return [datetime.combine(day, wall.replace(fold=fold), tz).astimezone(UTC) for fold in (0, 1)]
