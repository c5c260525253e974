"""The table: the columns of a message, and the constraints that keep the promises.

Every promise that a hand-written UPDATE could break is a named constraint here (`sent_iff_sent_at`). `alembic/` creates
the same, and a test compares the two. All names start with `engagement`, since the table is a guest in the host's
database.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import (
    DDL,
    BigInteger,
    Boolean,
    CheckConstraint,
    Dialect,
    Index,
    Integer,
    MetaData,
    PrimaryKeyConstraint,
    Text,
    UniqueConstraint,
    cast,
    text,
    type_coerce,
)
from sqlalchemy.dialects.postgresql import JSONB, TIMESTAMP
from sqlalchemy.orm import DeclarativeBase, Mapped, declared_attr, mapped_column
from sqlalchemy.schema import SchemaItem
from sqlalchemy.sql.elements import conv
from sqlalchemy.types import TypeDecorator

TABLE_NAME = "engagement_message_queue"

EARLIEST = datetime(1, 1, 2, tzinfo=UTC)
LATEST = datetime(9999, 12, 30, tzinfo=UTC)
"""The moments that both PostgreSQL and Python can hold in every time zone."""


MOST_COUNTED = 1_000_000_000
"""The most that `attempt` and `retry_count` can be: far enough from the largest integer that adding one never fails."""


class MessageStatus(StrEnum):
    """Where a message stands: `pending → sending → sent`, if all goes well."""

    PENDING = "pending"
    """Queued; is sent once it is due."""
    SENDING = "sending"
    """Claimed by a worker, whose lease has not been settled or recovered yet."""
    SENT = "sent"
    """Accepted by the transport."""
    FAILED = "failed"
    """Refused, or proven unsent `max_retries` times."""
    CANCELLED = "cancelled"
    """Taken back before it was sent."""
    EXPIRED = "expired"
    """Its `expires_at` passed before it was sent."""
    IN_DOUBT = "in_doubt"
    """Claimed, and nobody can say whether it left: a person or a look-up resolves it."""


FINISHED = (MessageStatus.SENT, MessageStatus.FAILED, MessageStatus.CANCELLED, MessageStatus.EXPIRED)
"""The statuses that a message does not leave by itself, and whose content may be pruned."""


class Destination(StrEnum):
    """Whether a message goes to one person or to a group."""

    INDIVIDUAL = "individual"
    GROUP = "group"


class TextOf(TypeDecorator[Any]):
    """A text column whose values are the members of a `StrEnum`."""

    impl = Text
    cache_ok = True

    def __init__(self, words: type[StrEnum]) -> None:
        super().__init__()
        self.words = words
        self._members = {word.value: word for word in words}  # Calling the enum takes four times as long.

    def process_bind_param(self, value: Any, dialect: Dialect) -> str | None:  # noqa: ARG002
        """Give the driver a plain `str`: psycopg would dump the enum's name."""
        return None if value is None else str(self.words(value))

    def process_result_value(self, value: Any, dialect: Dialect) -> Any:  # noqa: ARG002
        """Return the member."""
        return None if value is None else self._members[value]


def checked_schema(schema: str | None) -> str | None:
    """Return the schema; None is the search path. Raises `ValueError` for an empty one: a variable that was not set."""
    if schema is not None and not (isinstance(schema, str) and schema):
        raise ValueError("schema: must be the name of a schema, or None for the search path")
    return schema


class ReadableJson(TypeDecorator[Any]):
    """A JSONB column that can always be read. A value that Python cannot read is `UNREADABLE`.

    It is read as text: drivers take JSON for UTF-8 in every client encoding, and a number of 5,000 digits, or a list of
    5,000 levels, written by hand, would break the fetch of every row beside it.
    See docs/decisions.md#2026-11-29--json-is-selected-as-text.
    """

    impl = JSONB
    cache_ok = True

    def column_expression(self, column: Any) -> Any:
        """Select the text."""
        return type_coerce(cast(column, Text), self)

    def result_processor(self, dialect: Dialect, coltype: object) -> Callable[[Any], Any]:  # noqa: ARG002
        """Return the function that reads the text."""
        return _read_json

    def coerce_compared_value(self, op: Any, value: Any) -> Any:
        """Index and compare as JSONB does."""
        return self.impl_instance.coerce_compared_value(op, value)


UNREADABLE = "cannot be read by Python"
_DEEPEST = 500
"""Levels of a JSON value. Python's JSON writer, and the page, get through as many."""


def _read_json(text: Any) -> Any:
    try:
        value = json.loads(text) if isinstance(text, str) else text
        if not _is_deeper(value, _DEEPEST):
            return value
    except (ValueError, RecursionError):
        pass
    return {UNREADABLE: True} if text[:1] == "{" else [UNREADABLE]


def _is_deeper(value: Any, levels: int) -> bool:
    level = [value]
    for _ in range(levels):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True


def qualified_name(schema: str | None, table: str = TABLE_NAME) -> str:
    """Return a table's name as SQL and `to_regclass` read it. SQLAlchemy would double a %, for its own statements."""
    schema = checked_schema(schema)
    return table if schema is None else '"{}".{}'.format(schema.replace('"', '""'), table)


def _check(name: str, sql: str) -> CheckConstraint:
    return CheckConstraint(sql, name=conv(f"{TABLE_NAME}_{name}"))


def _index(name: str, *columns: str, where: str | None = None) -> Index:
    return Index(conv(f"{TABLE_NAME}_{name}"), *columns, postgresql_where=None if where is None else text(where))


def _alter(how: str) -> DDL:
    # `create_all` executes it, and Alembic's autogenerate renders none.
    # docs/decisions.md#2026-11-24--what-alembic-does-not-see-of-the-table-a-host-with-its-own-base-writes-by-hand
    return DDL(f"ALTER TABLE %(fullname)s {how}")  # type: ignore[no-untyped-call]


def _words(words: tuple[StrEnum, ...] | type[StrEnum]) -> str:
    return ", ".join(f"'{word}'" for word in words)


def _between(column: str) -> str:
    return f"{column} BETWEEN '0001-01-02 00:00:00+00' AND '9999-12-30 00:00:00+00'"


_MOMENT = TIMESTAMP(timezone=True)


class EngagementMessageMixin:
    """The columns, constraints and indexes of a message, for hosts that map them on a `Base` of their own.

    Map it with `class Message(EngagementMessageMixin, Base): ...`. Every type and name is given, so that no
    `type_annotation_map` and no naming convention of the host changes them.
    """

    __tablename__ = TABLE_NAME

    id: Mapped[int] = mapped_column(BigInteger, autoincrement=True)
    user_id: Mapped[str] = mapped_column(Text)
    message_type: Mapped[str] = mapped_column(Text)
    message_key: Mapped[str] = mapped_column(Text)
    """The name of the wording. The renderer turns it into words, with `message_params`, when the message is sent."""
    message_params: Mapped[dict[str, Any]] = mapped_column(ReadableJson, server_default=text("'{}'"))
    destination: Mapped[Destination] = mapped_column(TextOf(Destination))
    destination_jid: Mapped[str | None] = mapped_column(Text)
    """A JID, or Meta's business-scoped id of a person without a number. None once forgotten or pruned.

    See docs/decisions.md#2026-11-24--destination_jid-is-null-once-a-message-was-forgotten-or-pruned."""
    scheduled_for: Mapped[datetime] = mapped_column(_MOMENT, server_default=text("now()"))
    """The time that the host asked for; a retry does not change it."""
    expires_at: Mapped[datetime | None] = mapped_column(_MOMENT)
    """From this moment on the message is no longer sent."""
    next_attempt_at: Mapped[datetime] = mapped_column(_MOMENT, server_default=text("now()"))
    """While pending, when it is due; afterwards, when it last was."""
    status: Mapped[MessageStatus] = mapped_column(TextOf(MessageStatus), server_default=text("'pending'"))
    attempt: Mapped[int] = mapped_column(Integer, server_default=text("0"))
    """How many times it was claimed: the fence. It only grows, so a late worker is recognised by its lower number."""
    retry_count: Mapped[int] = mapped_column(Integer, server_default=text("0"))
    """How many attempts failed. Unlike `attempt`, it is set back when a person asks for another try."""
    has_doubt: Mapped[bool] = mapped_column(Boolean, server_default=text("false"))
    """An earlier attempt may have left, and an idempotent transport tries it again under the same delivery id. Until
    the doubt is resolved, the message cannot end as if nothing had been sent (`cancelled`).

    See docs/decisions.md#2026-11-24--has_doubt-a-doubt-is-not-forgotten-by-what-comes-later."""
    lease_expires_at: Mapped[datetime | None] = mapped_column(_MOMENT)
    """Until when the claim holds, by the database's clock."""
    claimed_by: Mapped[str | None] = mapped_column(Text)
    """The worker that claimed it last."""
    sent_at: Mapped[datetime | None] = mapped_column(_MOMENT)
    """When it was accepted, by the database's clock."""
    provider_message_id: Mapped[str | None] = mapped_column(Text)
    error_message: Mapped[str | None] = mapped_column(Text)
    """The last failure; `history` has all of them."""
    history: Mapped[list[dict[str, Any]]] = mapped_column(ReadableJson, server_default=text("'[]'"))
    """One entry for each thing that went other than well: at, attempt, event, reason."""
    idempotency_key: Mapped[str] = mapped_column(Text(collation="C"))
    """Unique, and never freed: it outlives the content of the message. Collated as bytes, so that Python and the
    database sort a batch alike."""
    created_at: Mapped[datetime] = mapped_column(_MOMENT, server_default=text("now()"))
    trace_context: Mapped[str | None] = mapped_column(Text)
    """The W3C `traceparent` of the span that queued it, if one was recorded: the delivery is linked to it."""
    delivered_at: Mapped[datetime | None] = mapped_column(_MOMENT)
    """When it reached a device of the person, as the provider says."""
    read_at: Mapped[datetime | None] = mapped_column(_MOMENT)
    """When the person read it, as the provider says."""
    undeliverable_at: Mapped[datetime | None] = mapped_column(_MOMENT)
    """When the provider gave up the latest attempt of which it said so."""

    @declared_attr.directive
    @classmethod
    def __table_args__(cls) -> tuple[SchemaItem | dict[str, Any], ...]:
        """Return new constraints and indexes for each class that is mapped, and its table's vacuum setting."""
        return (
            PrimaryKeyConstraint("id", name=conv(f"{TABLE_NAME}_pkey")),
            UniqueConstraint("idempotency_key", name=conv(f"{TABLE_NAME}_idempotency_key_key")),
            _check("status_known", f"status IN ({_words(MessageStatus)})"),
            _check("destination_known", f"destination IN ({_words(Destination)})"),
            _check("message_type_format", "message_type ~ '^[a-z][a-z0-9_]*$'"),
            _check("message_params_is_object", "jsonb_typeof(message_params) = 'object'"),
            _check("history_is_array", "jsonb_typeof(history) = 'array'"),
            _check("counters_not_negative", "attempt >= 0 AND retry_count >= 0"),
            # Claim, settlement and recovery add one: there must be a next number.
            # docs/decisions.md#2026-11-29--what-fails-on-the-data-of-one-message-is-done-again-one-by-one
            _check("counters_bounded", f"attempt <= {MOST_COUNTED} AND retry_count <= {MOST_COUNTED}"),
            _check("claimed_by_form", "char_length(claimed_by) <= 3000 AND claimed_by !~ '/recovery/[0-9]{7,}$'"),
            _check("sent_iff_sent_at", "(status = 'sent') = (sent_at IS NOT NULL)"),
            _check("delivered_was_sent", "delivered_at IS NULL OR (status = 'sent' AND undeliverable_at IS NULL)"),
            _check("read_was_delivered", "read_at IS NULL OR delivered_at IS NOT NULL"),
            _check("sending_iff_lease", "(status = 'sending') = (lease_expires_at IS NOT NULL)"),
            _check("ended_without_doubt", f"NOT (has_doubt AND status IN ({_words(FINISHED)}))"),
            _check("pending_has_destination", "status <> 'pending' OR destination_jid IS NOT NULL"),
            # A private text must not end in a group because of a hand-written UPDATE.
            _check("jid_fits_destination", "(destination = 'group') = (right(destination_jid, 5) = '@g.us')"),
            _check("expires_after_scheduled", "expires_at > scheduled_for"),
            # One infinite timestamp would break the fetch of every batch that it is in.
            _check(
                "times_readable",
                " AND ".join(_between(column) for column in ("scheduled_for", "next_attempt_at", "expires_at")),
            ),
            _check("receipts_readable", " AND ".join(map(_between, ("delivered_at", "read_at", "undeliverable_at")))),
            _index("due", "next_attempt_at", "id", where="status = 'pending'"),
            _index("lease", "lease_expires_at", where="status = 'sending'"),
            # count_by_status reads it instead of the table.
            _index("user", "user_id", "status"),
            _index("attention", "status", "next_attempt_at", where="status IN ('failed', 'in_doubt')"),
            # docs/decisions.md#2026-11-24--pruning-goes-by-when-a-message-was-last-due
            _index(
                "prunable",
                "next_attempt_at",
                where=f"status IN ({_words(FINISHED)}) AND destination_jid IS NOT NULL",
            ),
            # How a receipt finds its message where the transport could give the provider no reference.
            _index("provider", "provider_message_id", where="provider_message_id IS NOT NULL"),
            # Each message leaves two dead rows. Not by `postgresql_with`, which SQLAlchemy 2.0 has for indexes only.
            # docs/decisions.md#2026-11-24--autovacuum-comes-when-2--of-the-table-is-dead
            {"listeners": [("after_create", _alter("SET (autovacuum_vacuum_scale_factor = 0.02)"))]},
        )

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(id={self.id}, message_type={self.message_type!r}, status={self.status!s}, "
            f"attempt={self.attempt})"
        )


class EngagementBase(DeclarativeBase):
    """The registry of our own table; a host's Base stays the host's."""

    metadata = MetaData()


class EngagementMessage(EngagementMessageMixin, EngagementBase):
    """One message: a row of `engagement_message_queue`.

    Read it and query it as any entity. Change it through `EngagementMessageRepository`, whose statements are right
    under concurrency. The table's constraints refuse a plain UPDATE that breaks a promise (`sent` without `sent_at`).
    """
