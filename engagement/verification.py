"""Looks for broken promises, with SQL that only reads: one condition for each, and what the catalog says of the guards.

The table's constraints keep most of these promises themselves. Rows are searched all the same: a constraint may have
been dropped, weakened or added as NOT VALID, and a promise of the worker's has no constraint at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any, cast

from sqlalchemy import (
    CheckConstraint,
    ColumnElement,
    Constraint,
    Interval,
    PrimaryKeyConstraint,
    Select,
    Text,
    UniqueConstraint,
    and_,
    bindparam,
    case,
    column,
    exists,
    func,
    literal_column,
    or_,
    select,
    table,
)
from sqlalchemy.dialects.postgresql import JSONPATH, OID, dialect

from engagement.models import TABLE_NAME, Destination, MessageStatus
from engagement.statements import IN_DOUBT, NOW, PENDING, QUEUE, SENDING, SENT, C

if TYPE_CHECKING:
    from sqlalchemy.orm import Session


@dataclass(frozen=True, slots=True)
class Violation:
    """A promise that is broken: its name, by which message (None: by the table), and what is wrong. Nothing personal.

    A promise that a constraint guards has the constraint's name without the table's.
    """

    promise: str
    message_id: int | None
    problem: str


def verify(
    session: Session,
    *,
    schema: str | None = None,
    overdue: timedelta = timedelta(hours=1),
    limit: int = 100,
) -> list[Violation]:
    """Return the broken promises that the queue shows; none in a healthy one, also while it is busy.

    Up to `limit` messages are named for each promise. A message that has been due, and a lease that has run out, for
    longer than `overdue` is a broken promise: nobody delivers. Only reads, in the session's transaction, and most of
    it reads the whole table: run it nightly rather than every minute.

    A key of the host's own is no violation, unless it reads as the daily key of this user's message of another type,
    or of another user's message of this type: it would block that message. Nothing can be said of the key's date,
    since a message may be rescheduled.
    """
    if overdue < timedelta(0):
        raise ValueError("overdue: must not be negative")
    if limit < 1:
        raise ValueError("limit: must be at least 1")
    options = {"schema_translate_map": {None: schema}}
    found = list(_missing_guards(session, schema))
    for promise in _promises():
        values = {"overdue": overdue, "at_most": limit}
        broken_by = session.execute(promise.broken_by(), values, execution_options=options).scalars()
        found += [Violation(promise.name, message_id, promise.problem) for message_id in broken_by]
    return found


# What a row tells -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Promise:
    name: str
    problem: str
    is_broken: ColumnElement[bool]

    def broken_by(self) -> Select[Any]:
        # Not ordered: whoever sorts by id may read the whole table by its primary key to find nothing.
        return select(C.id).where(self.is_broken).limit(bindparam("at_most"))


@cache
def _promises() -> tuple[_Promise, ...]:
    """Return what must hold for each message, in the order of the message's life."""
    long_ago = NOW - bindparam("overdue", type_=Interval)
    is_unclaimed = C.attempt < 1
    return (
        # Queueing
        _Promise("status_known", "has a status that is none", _is_none_of(C.status, MessageStatus)),
        _Promise("destination_known", "has a destination that is none", _is_none_of(C.destination, Destination)),
        _Promise("message_type_format", "has a type that is none", ~C.message_type.op("~")("^[a-z][a-z0-9_]*$")),
        _Promise("message_params_is_object", "has params that are no object", _is_no("object", C.message_params)),
        _Promise("history_is_array", "has a history that is no array", _is_no("array", C.history)),
        _Promise("history_entries", "has an entry in its history without at, attempt or event", _has_bad_entry()),
        _Promise("jid_fits_destination", "has a JID that does not fit its destination", _jid_does_not_fit()),
        _Promise("expires_after_scheduled", "expires before it is scheduled", C.expires_at <= C.scheduled_for),
        _Promise("times_readable", "has a time that Python cannot hold", _has_unreadable_time()),
        _Promise("idempotency_key_key", "has the key of an earlier message", _has_key_of_an_earlier_one()),
        _Promise("key_given", "has no key, and so blocks no duplicate", C.idempotency_key.is_(None)),
        _Promise("key_fits", "has a key that reads as another user's or type's daily key", _key_does_not_fit()),
        _Promise(
            "pending_has_destination",
            "is pending without a JID",
            and_(C.status == PENDING, C.destination_jid.is_(None)),
        ),
        # Delivery
        _Promise(
            "due_is_claimed",
            "has been due for longer than it should be",
            and_(C.status == PENDING, C.next_attempt_at < long_ago),
        ),
        _Promise(
            "leases_are_recovered",
            "has a lease that ran out long ago",
            and_(C.status == SENDING, C.lease_expires_at < long_ago),
        ),
        _Promise(
            "sending_iff_lease",
            "is sending without a lease",
            and_(C.status == SENDING, C.lease_expires_at.is_(None)),
        ),
        _Promise(
            "sending_iff_lease",
            "has a lease and is not sending",
            and_(C.status != SENDING, C.lease_expires_at.is_not(None)),
        ),
        _Promise("sent_iff_sent_at", "is sent without sent_at", and_(C.status == SENT, C.sent_at.is_(None))),
        _Promise("sent_iff_sent_at", "has sent_at and is not sent", and_(C.status != SENT, C.sent_at.is_not(None))),
        # By the clock of now, not of the statement's start: a worker may settle in between.
        _Promise("sent_in_the_past", "was sent in the future", C.sent_at > func.clock_timestamp()),
        _Promise("counters_not_negative", "has a negative counter", or_(C.attempt < 0, C.retry_count < 0)),
        _Promise(
            "claim_counts_attempt",
            "was claimed, but has no attempt",
            and_(C.status.in_([SENDING, SENT, IN_DOUBT, literal_column("'failed'", Text)]), is_unclaimed),
        ),
        _Promise("failure_is_attempt", "failed more often than it was tried", C.retry_count > C.attempt),
        _Promise("attempt_only_grows", "has an attempt that went back", _attempt_went_back()),
    )


def _is_none_of(word: ColumnElement[Any], words: Iterable[str]) -> ColumnElement[bool]:
    known = ", ".join(f"'{known}'" for known in words)
    # As text: a word that is none of the enumeration's must reach the database as it is.
    return or_(word.is_(None), func.concat(word).not_in([literal_column(f"{known}", Text)]))


def _is_no(json_type: str, value: ColumnElement[Any]) -> ColumnElement[bool]:
    return func.jsonb_typeof(value).is_distinct_from(json_type)


def _exists_in_history(path: str, **values: ColumnElement[Any]) -> ColumnElement[bool]:
    """Ask by a JSON path, which is no error whatever a hand-written history holds."""
    given = [part for name, value in values.items() for part in (literal_column(f"'{name}'", Text), value)]
    found: ColumnElement[bool] = func.jsonb_path_exists(
        C.history, literal_column(f"'{path}'", JSONPATH), func.jsonb_build_object(*given)
    )
    return found


def _has_bad_entry() -> ColumnElement[bool]:
    complete = '@.at.type() == "string" && @.attempt.type() == "number" && @.event.type() == "string"'
    return and_(func.jsonb_typeof(C.history) == "array", _exists_in_history(f"$[*] ? (!({complete}))"))


def _attempt_went_back() -> ColumnElement[bool]:
    return _exists_in_history("$[*].attempt ? (@ > $attempt)", attempt=C.attempt)


def _jid_does_not_fit() -> ColumnElement[bool]:
    individual = r"^([1-9][0-9]{6,14}@s\.whatsapp\.net|[1-9][0-9]{4,19}@lid)$"
    group = r"^([1-9][0-9]{14,19}@g\.us|[1-9][0-9]{4,14}-[0-9]{10}@g\.us)$"
    form = case((C.destination == Destination.GROUP, group), else_=individual)
    return ~C.destination_jid.op("~")(form)


def _has_unreadable_time() -> ColumnElement[bool]:
    readable = "BETWEEN '0001-01-02 00:00:00+00' AND '9999-12-30 00:00:00+00'"
    moments = (C.scheduled_for, C.expires_at, C.next_attempt_at, C.lease_expires_at, C.sent_at, C.created_at)
    return or_(*(~moment.op(readable.partition(" ")[0])(literal_column(readable.partition(" ")[2])) for moment in moments))


def _has_key_of_an_earlier_one() -> ColumnElement[bool]:
    earlier = QUEUE.alias("earlier")
    return exists().where(earlier.c.idempotency_key == C.idempotency_key, earlier.c.id < C.id)


def _key_does_not_fit() -> ColumnElement[bool]:
    raise NotImplementedError
