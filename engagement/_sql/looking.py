"""Statements that find and count messages, for a host and for the frequency cap. They change nothing."""

from __future__ import annotations

from functools import cache
from typing import Any

from sqlalchemy import (
    ARRAY,
    BigInteger,
    ColumnElement,
    Executable,
    Select,
    Text,
    and_,
    any_,
    bindparam,
    case,
    false,
    func,
    literal_column,
    or_,
    select,
)

from engagement._sql.history import doubted_at
from engagement._sql.parameters import text_of
from engagement._sql.table import IN_DOUBT, MOMENT, NOW, PENDING, SENDING, SENT, C, is_due, is_wanted, time_since
from engagement.models import EngagementMessage


@cache
def clock() -> Executable:
    """Return the time by the database's clock, which leases and due times go by."""
    return select(NOW)


@cache
def claim_of_message() -> Executable:
    """Return (now, status, attempt) of a message, by the database's clock."""
    return select(NOW.label("now"), C.status, C.attempt).where(is_wanted)


@cache
def count_others_of_user(*, of_types: bool) -> Executable:
    """Count the other messages of a user: `left` since a moment, or may have; being sent `ahead` of this one, `behind`.

    A doubt counts for when it was recorded, which is never before the send.
    """
    since: ColumnElement[Any] = bindparam("since", type_=MOMENT)
    message_id: ColumnElement[Any] = bindparam("message_id", type_=BigInteger)
    # A row written by hand has no history: better one message too few.
    doubt_at = func.coalesce(doubted_at(), literal_column("'infinity'::timestamptz"))
    left = case(
        (C.status == SENT, C.sent_at >= since),
        (C.status == SENDING, false()),
        # Pending too: an idempotent transport is asked again after a doubt.
        else_=and_(or_(C.status == IN_DOUBT, C.has_doubt), doubt_at >= since),
    )
    wanted = [C.user_id == text_of("of_user")]  # The message itself is neither ahead nor behind.
    if of_types:
        wanted.append(C.message_type == any_(bindparam("types", type_=ARRAY(Text))))
    return select(
        func.count().filter(left).label("left"),
        func.count().filter(and_(C.status == SENDING, C.id < message_id)).label("ahead"),
        func.count().filter(and_(C.status == SENDING, C.id > message_id)).label("behind"),
    ).where(*wanted)


@cache
def pending_of_user() -> Select[Any]:
    """Return a user's pending messages, next first."""
    return (
        select(EngagementMessage)
        .where(EngagementMessage.user_id == bindparam("of_user"), EngagementMessage.status == PENDING)
        .order_by(EngagementMessage.next_attempt_at, EngagementMessage.id)
    )


@cache
def message_by(column_name: str) -> Select[Any]:
    """Return the message whose `id` or `idempotency_key` is `value`."""
    wanted = C[column_name]
    return select(EngagementMessage).where(wanted == bindparam("value", type_=wanted.type))


@cache
def count_by_status() -> Executable:
    """Return (status, count, how long the oldest due message has been waiting)."""
    oldest_due = select(time_since(func.min(C.next_attempt_at))).where(is_due).scalar_subquery()
    return select(C.status, func.count(), oldest_due).group_by(C.status)
