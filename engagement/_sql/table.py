"""The queue's table, its words, its conditions and its clock, for all statements.

Statuses are literals, not parameters: PostgreSQL cannot prove that a parameter matches a partial index. Time is
`statement_timestamp()`: `now()` stands still while a transaction is open, and an index cannot be searched with
`clock_timestamp()`.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Dialect,
    Integer,
    Interval,
    Numeric,
    Table,
    TableClause,
    Text,
    and_,
    bindparam,
    case,
    column,
    func,
    literal_column,
    table,
    type_coerce,
)
from sqlalchemy.dialects.postgresql import TIMESTAMP
from sqlalchemy.types import TypeDecorator

from engagement.models import FINISHED, EngagementMessage

QUEUE: Table = EngagementMessage.__table__  # type: ignore[assignment]  # declared as FromClause
C = QUEUE.c
ctid: ColumnElement[Any] = column("ctid")
"""Where a row lies in the table: found without an index, and right as long as the row is locked.

See docs/decisions.md#2026-11-27--a-claim-changes-its-rows-where-they-lie."""

MOMENT = TIMESTAMP(timezone=True)
NOW: ColumnElement[Any] = func.statement_timestamp(type_=MOMENT)


class Length(TypeDecorator[timedelta]):
    """A length of time, read as a number of seconds: of intervals, psycopg reads PostgreSQL's own style only."""

    impl = Numeric
    cache_ok = True

    def process_result_value(self, value: Any, dialect: Dialect) -> timedelta | None:  # noqa: ARG002
        """Return the length."""
        return None if value is None else timedelta(seconds=float(value))


def time_since(moment: ColumnElement[Any]) -> ColumnElement[timedelta]:
    """Return how long ago a moment was, by the database's clock."""
    return type_coerce(func.extract("epoch", NOW - moment), Length)


def time_until(moment: ColumnElement[Any]) -> ColumnElement[timedelta]:
    """Return how long it is until a moment, by the database's clock."""
    return type_coerce(func.extract("epoch", moment - NOW), Length)


def word(text: str) -> ColumnElement[Any]:
    """Return a literal of a word of ours."""
    return literal_column(f"'{text}'", Text)


def number(value: int) -> ColumnElement[Any]:
    """Return a literal of a number of ours."""
    return literal_column(str(value), Integer)


def catalog(name: str, *columns: str) -> TableClause:
    """Return a table of PostgreSQL's own, with the columns that are asked for."""
    return table(name, *map(column, columns), schema="pg_catalog")


PENDING, SENDING, SENT = (word(status) for status in ("pending", "sending", "sent"))
FAILED, EXPIRED, CANCELLED, IN_DOUBT = (word(status) for status in ("failed", "expired", "cancelled", "in_doubt"))

is_due = and_(C.status == PENDING, C.next_attempt_at <= NOW)
is_lost = and_(C.status == SENDING, C.lease_expires_at <= NOW)
# In the words of the partial index, or it would not serve.
is_prunable = and_(C.status.in_([word(status) for status in FINISHED]), C.destination_jid.is_not(None))
is_older = C.next_attempt_at < NOW - bindparam("older_than", type_=Interval)
is_forgotten = C.destination_jid.is_(None)


def unless_in_doubt(status: ColumnElement[Any], has_doubt: ColumnElement[bool]) -> ColumnElement[Any]:
    """Return `status`, but never let a message that may have left end as if it had not."""
    return case((and_(has_doubt, status.in_([FAILED, CANCELLED, EXPIRED])), IN_DOUBT), else_=status)


# No parameter of an UPDATE is named as a column: SQLAlchemy would set it.
is_wanted = C.id == bindparam("message_id", type_=BigInteger)
# As an UPDATE of no key locks: a row of the host's that only refers to the message is in nobody's way.
LOCKED: dict[str, Any] = {"key_share": True}
LOCKED_UNLESS_BY_OTHERS: dict[str, Any] = {**LOCKED, "skip_locked": True}
