"""The parts that every table of ours is made of: names, constraints, and the moments that it can hold.

All names start with `engagement`, since the tables are guests in the host's database.
"""

from __future__ import annotations

from datetime import UTC, datetime
from enum import StrEnum

from sqlalchemy import DDL, CheckConstraint, Index, MetaData, text
from sqlalchemy.dialects.postgresql import TIMESTAMP
from sqlalchemy.orm import DeclarativeBase
from sqlalchemy.sql.elements import conv

TABLE_NAME = "engagement_message_queue"
SUPPRESSION_TABLE_NAME = "engagement_suppression"
RECEIPT_TABLE_NAME = "engagement_receipt"
WORKER_TABLE_NAME = "engagement_worker"
PAUSE_TABLE_NAME = "engagement_pause"
TABLE_NAMES = (TABLE_NAME, SUPPRESSION_TABLE_NAME, RECEIPT_TABLE_NAME, WORKER_TABLE_NAME, PAUSE_TABLE_NAME)


EARLIEST = datetime(1, 1, 2, tzinfo=UTC)
LATEST = datetime(9999, 12, 30, tzinfo=UTC)
"""The moments that both PostgreSQL and Python can hold in every time zone."""


MOMENT = TIMESTAMP(timezone=True)


class EngagementBase(DeclarativeBase):
    """The registry of our own tables; a host's Base stays the host's."""

    metadata = MetaData()


def checked_schema(schema: str | None) -> str | None:
    """Return the schema; None is the search path. Raises `ValueError` for an empty one: a variable that was not set."""
    if schema is not None and not (isinstance(schema, str) and schema):
        raise ValueError("schema: must be the name of a schema, or None for the search path")
    return schema


def qualified_name(schema: str | None, table: str = TABLE_NAME) -> str:
    """Return a table's name as SQL and `to_regclass` read it. SQLAlchemy would double a %, for its own statements."""
    schema = checked_schema(schema)
    return table if schema is None else '"{}".{}'.format(schema.replace('"', '""'), table)


def check(name: str, sql: str, table: str = TABLE_NAME) -> CheckConstraint:
    """Return a constraint whose name begins with the table's."""
    return CheckConstraint(sql, name=conv(f"{table}_{name}"))


def index(name: str, *columns: str, where: str | None = None, table: str = TABLE_NAME) -> Index:
    """Return an index whose name begins with the table's, of the rows that `where` selects."""
    return Index(conv(f"{table}_{name}"), *columns, postgresql_where=None if where is None else text(where))


def alter(how: str) -> DDL:
    """Return an ALTER TABLE of a table that was just created."""
    # `create_all` executes it, and Alembic's autogenerate renders none.
    # docs/decisions.md#2026-11-24--what-alembic-does-not-see-of-the-table-a-host-with-its-own-base-writes-by-hand
    return DDL(f"ALTER TABLE %(fullname)s {how}")  # type: ignore[no-untyped-call]


def words(words: tuple[StrEnum, ...] | type[StrEnum]) -> str:
    """Return words as a list in SQL."""
    return ", ".join(f"'{word}'" for word in words)


def between(column: str) -> str:
    """Return the condition that a moment is between `EARLIEST` and `LATEST`."""
    return f"{column} BETWEEN '0001-01-02 00:00:00+00' AND '9999-12-30 00:00:00+00'"
