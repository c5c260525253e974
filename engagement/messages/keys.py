"""The key of a message, computed from user, type and date, and the ids that follow from it."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable
from datetime import UTC, date, datetime, tzinfo

from engagement.messages.checks import (
    MAX_KEY_BYTES,
    InvalidMessage,
    checked_moment,
    checked_text,
    checked_type,
    checked_tz,
    checked_user_id,
)

DELIVERY_NAMESPACE = uuid.UUID("6f0f6a3c-52d5-5f0e-9d8e-0f5d1b1c7a11")


def idempotency_key(user_id: str | uuid.UUID, event_type: str, when: date | None = None, *, tz: tzinfo = UTC) -> str:
    """Return `{user_id}:{event_type}:{YYYY-MM-DD}`, the date being that of `when` (default: now) in `tz`.

    >>> from datetime import UTC, datetime
    >>> idempotency_key("user123", "goodbye", datetime(2025, 11, 21, 23, 30, tzinfo=UTC))
    'user123:goodbye:2025-11-21'

    A `when` that is a plain date is that day. The key has one reading, also when the user id holds a colon:
    neither the type nor the date can. Raises `InvalidMessage` if user id, type or time could not be a message's.
    """
    return _key_of_day(user_id, event_type, when, tz, date.isoformat)


def weekly_idempotency_key(
    user_id: str | uuid.UUID, event_type: str, when: date | None = None, *, tz: tzinfo = UTC
) -> str:
    """Return `{user_id}:{event_type}:{year}-W{week}`, the ISO week of `when` (default: now) in `tz`.

    >>> from datetime import UTC, datetime
    >>> weekly_idempotency_key("user123", "weekly_review", datetime(2027, 1, 1, tzinfo=UTC))
    'user123:weekly_review:2026-W53'

    The year is the week's, not the calendar's: Thursday, 2026-12-31 and Friday, 2027-01-01 have one key. Otherwise it
    is like `idempotency_key`.
    """
    return _key_of_day(user_id, event_type, when, tz, _iso_week)


def delivery_id(idempotency_key: str) -> uuid.UUID:
    """Return the UUIDv5 of the key: the same for every attempt, so that a transport can recognise a repeat."""
    return uuid.uuid5(DELIVERY_NAMESPACE, idempotency_key)


def key_hash(idempotency_key: str) -> str:
    """Return the hash of a key for logs and `repr`: enough to find the key again, and no user id."""
    return hashlib.sha256(idempotency_key.encode()).hexdigest()[:12]


def checked_key(given: object, *, user_id: str, message_type: str, scheduled_for: datetime | None, tz: tzinfo) -> str:
    """Return the key that a message is queued under, given or computed, or raise `InvalidMessage`."""
    if given is None:
        key = f"{user_id}:{message_type}:{_day_of(scheduled_for, tz).isoformat()}"
    else:
        key = checked_text("idempotency_key", given, max_characters=MAX_KEY_BYTES)
    if len(key) * 4 > MAX_KEY_BYTES and len(key.encode()) > MAX_KEY_BYTES:
        raise InvalidMessage("idempotency_key", f"has {len(key.encode())} bytes, more than {MAX_KEY_BYTES}")
    return key


def _key_of_day(user_id: object, event_type: object, when: object, tz: object, named: Callable[[date], str]) -> str:
    user_id, event_type, zone = checked_user_id(user_id), checked_type("event_type", event_type), checked_tz(tz)
    if isinstance(when, date) and not isinstance(when, datetime):
        day = when
    else:
        day = _day_of(None if when is None else checked_moment("when", when), zone)
    return f"{user_id}:{event_type}:{named(day)}"


def _day_of(when: datetime | None, zone: tzinfo) -> date:
    return (datetime.now(zone) if when is None else when.astimezone(zone)).date()


def _iso_week(day: date) -> str:
    year, week, _ = day.isocalendar()
    return f"{year:04}-W{week:02}"


def address_hash(address: str) -> str:
    """Return the name of an address in the suppression list: its SHA-256, in hexadecimal."""
    return hashlib.sha256(address.encode()).hexdigest()
