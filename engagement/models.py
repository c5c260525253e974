"""The tables: the columns of a message and of a suppressed address, and the constraints that keep the promises.

Every promise that a hand-written UPDATE could break is a named constraint here (`sent_iff_sent_at`). `alembic/` creates
the same, and a test compares the two. All names start with `engagement`, since the tables are guests in the host's
database.
"""

from __future__ import annotations

from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import (
    DDL,
    BigInteger,
    Boolean,
    CheckConstraint,
    Index,
    Integer,
    MetaData,
    PrimaryKeyConstraint,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.dialects.postgresql import TIMESTAMP
from sqlalchemy.orm import DeclarativeBase, Mapped, declared_attr, mapped_column
from sqlalchemy.schema import SchemaItem
from sqlalchemy.sql.elements import conv

from engagement._columns import ReadableJson, TextOf

TABLE_NAME = "engagement_message_queue"
SUPPRESSION_TABLE_NAME = "engagement_suppression"
TABLE_NAMES = (TABLE_NAME, SUPPRESSION_TABLE_NAME)

EARLIEST = datetime(1, 1, 2, tzinfo=UTC)
LATEST = datetime(9999, 12, 30, tzinfo=UTC)
"""The moments that both PostgreSQL and Python can hold in every time zone."""


MOST_COUNTED = 1_000_000_000
"""The most that `attempt` and `retry_count` can be: far enough from the largest integer that adding one never fails."""


MOST_REASON = 500
"""Characters of the reason of a suppression."""


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


def checked_schema(schema: str | None) -> str | None:
    """Return the schema; None is the search path. Raises `ValueError` for an empty one: a variable that was not set."""
    if schema is not None and not (isinstance(schema, str) and schema):
        raise ValueError("schema: must be the name of a schema, or None for the search path")
    return schema


def qualified_name(schema: str | None, table: str = TABLE_NAME) -> str:
    """Return a table's name as SQL and `to_regclass` read it. SQLAlchemy would double a %, for its own statements."""
    schema = checked_schema(schema)
    return table if schema is None else '"{}".{}'.format(schema.replace('"', '""'), table)


def _check(name: str, sql: str, table: str = TABLE_NAME) -> CheckConstraint:
    return CheckConstraint(sql, name=conv(f"{table}_{name}"))


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


class EngagementSuppressionMixin:
    """The columns and constraints of an address that is not to be sent to, for hosts with a `Base` of their own.

    Map it as `EngagementMessageMixin`. The address itself is not here, only its hash.
    """

    __tablename__ = SUPPRESSION_TABLE_NAME

    address_hash: Mapped[str] = mapped_column(Text(collation="C"))
    """The SHA-256 of the address, in hexadecimal."""
    reason: Mapped[str | None] = mapped_column(Text)
    """None once a person of this address was forgotten."""
    since: Mapped[datetime] = mapped_column(_MOMENT, server_default=text("now()"))
    until: Mapped[datetime | None] = mapped_column(_MOMENT)
    """From this moment on it may be sent to again. None is for good."""

    @declared_attr.directive
    @classmethod
    def __table_args__(cls) -> tuple[SchemaItem, ...]:
        """Return new constraints for each class that is mapped."""
        return (
            PrimaryKeyConstraint("address_hash", name=conv(f"{SUPPRESSION_TABLE_NAME}_pkey")),
            _check("address_hash_form", "address_hash ~ '^[0-9a-f]{64}$'", SUPPRESSION_TABLE_NAME),
            _check("reason_length", f"char_length(reason) <= {MOST_REASON}", SUPPRESSION_TABLE_NAME),
            _check("times_readable", f"{_between('since')} AND {_between('until')}", SUPPRESSION_TABLE_NAME),
        )


class EngagementBase(DeclarativeBase):
    """The registry of our own tables; a host's Base stays the host's."""

    metadata = MetaData()


class EngagementMessage(EngagementMessageMixin, EngagementBase):
    """One message: a row of `engagement_message_queue`.

    Read it and query it as any entity. Change it through `EngagementMessageRepository`, whose statements are right
    under concurrency. The table's constraints refuse a plain UPDATE that breaks a promise (`sent` without `sent_at`).
    """


class EngagementSuppression(EngagementSuppressionMixin, EngagementBase):
    """One address that is not to be sent to: a row of `engagement_suppression`. Change it by `SuppressionList`."""
