"""The table of the messages: its columns, and the constraints that keep the promises.

Every promise that a hand-written UPDATE could break is a named constraint here (`sent_iff_sent_at`). `alembic/` creates
the same, and a test compares the two.
"""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import BigInteger, Boolean, Integer, PrimaryKeyConstraint, Text, UniqueConstraint, text
from sqlalchemy.orm import Mapped, declared_attr, mapped_column
from sqlalchemy.schema import SchemaItem
from sqlalchemy.sql.elements import conv

from engagement._columns import ReadableJson, TextOf
from engagement.models.parts import MOMENT, TABLE_NAME, EngagementBase, alter, between, check, index, words

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
    scheduled_for: Mapped[datetime] = mapped_column(MOMENT, server_default=text("now()"))
    """The time that the host asked for; a retry does not change it."""
    expires_at: Mapped[datetime | None] = mapped_column(MOMENT)
    """From this moment on the message is no longer sent."""
    next_attempt_at: Mapped[datetime] = mapped_column(MOMENT, server_default=text("now()"))
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
    lease_expires_at: Mapped[datetime | None] = mapped_column(MOMENT)
    """Until when the claim holds, by the database's clock."""
    claimed_by: Mapped[str | None] = mapped_column(Text)
    """The worker that claimed it last."""
    sent_at: Mapped[datetime | None] = mapped_column(MOMENT)
    """When it was accepted, by the database's clock."""
    provider_message_id: Mapped[str | None] = mapped_column(Text)
    error_message: Mapped[str | None] = mapped_column(Text)
    """The last failure; `history` has all of them."""
    history: Mapped[list[dict[str, Any]]] = mapped_column(ReadableJson, server_default=text("'[]'"))
    """One entry for each thing that went other than well: at, attempt, event, reason."""
    idempotency_key: Mapped[str] = mapped_column(Text(collation="C"))
    """Unique, and never freed: it outlives the content of the message. Collated as bytes, so that Python and the
    database sort a batch alike."""
    created_at: Mapped[datetime] = mapped_column(MOMENT, server_default=text("now()"))
    trace_context: Mapped[str | None] = mapped_column(Text)
    """The W3C `traceparent` of the span that queued it, if one was recorded: the delivery is linked to it."""
    delivered_at: Mapped[datetime | None] = mapped_column(MOMENT)
    """When it reached a device of the person, as the provider says."""
    read_at: Mapped[datetime | None] = mapped_column(MOMENT)
    """When the person read it, as the provider says."""
    undeliverable_at: Mapped[datetime | None] = mapped_column(MOMENT)
    """When the provider gave up the latest attempt of which it said so."""

    @declared_attr.directive
    @classmethod
    def __table_args__(cls) -> tuple[SchemaItem | dict[str, Any], ...]:
        """Return new constraints and indexes for each class that is mapped, and its table's vacuum setting."""
        return (
            PrimaryKeyConstraint("id", name=conv(f"{TABLE_NAME}_pkey")),
            UniqueConstraint("idempotency_key", name=conv(f"{TABLE_NAME}_idempotency_key_key")),
            check("status_known", f"status IN ({words(MessageStatus)})"),
            check("destination_known", f"destination IN ({words(Destination)})"),
            check("message_type_format", "message_type ~ '^[a-z][a-z0-9_]*$'"),
            check("message_params_is_object", "jsonb_typeof(message_params) = 'object'"),
            check("history_is_array", "jsonb_typeof(history) = 'array'"),
            check("counters_not_negative", "attempt >= 0 AND retry_count >= 0"),
            # Claim, settlement and recovery add one: there must be a next number.
            # docs/decisions.md#2026-11-29--what-fails-on-the-data-of-one-message-is-done-again-one-by-one
            check("counters_bounded", f"attempt <= {MOST_COUNTED} AND retry_count <= {MOST_COUNTED}"),
            check("claimed_by_form", "char_length(claimed_by) <= 3000 AND claimed_by !~ '/recovery/[0-9]{7,}$'"),
            check("sent_iff_sent_at", "(status = 'sent') = (sent_at IS NOT NULL)"),
            check("delivered_was_sent", "delivered_at IS NULL OR (status = 'sent' AND undeliverable_at IS NULL)"),
            check("read_was_delivered", "read_at IS NULL OR delivered_at IS NOT NULL"),
            check("sending_iff_lease", "(status = 'sending') = (lease_expires_at IS NOT NULL)"),
            check("ended_without_doubt", f"NOT (has_doubt AND status IN ({words(FINISHED)}))"),
            check("pending_has_destination", "status <> 'pending' OR destination_jid IS NOT NULL"),
            # A private text must not end in a group because of a hand-written UPDATE.
            check("jid_fits_destination", "(destination = 'group') = (right(destination_jid, 5) = '@g.us')"),
            check("expires_after_scheduled", "expires_at > scheduled_for"),
            # One infinite timestamp would break the fetch of every batch that it is in.
            check(
                "times_readable",
                " AND ".join(between(column) for column in ("scheduled_for", "next_attempt_at", "expires_at")),
            ),
            check("receipts_readable", " AND ".join(map(between, ("delivered_at", "read_at", "undeliverable_at")))),
            index("due", "next_attempt_at", "id", where="status = 'pending'"),
            index("lease", "lease_expires_at", where="status = 'sending'"),
            # count_by_status reads it instead of the table.
            index("user", "user_id", "status"),
            index("attention", "status", "next_attempt_at", where="status IN ('failed', 'in_doubt')"),
            # docs/decisions.md#2026-11-24--pruning-goes-by-when-a-message-was-last-due
            index(
                "prunable",
                "next_attempt_at",
                where=f"status IN ({words(FINISHED)}) AND destination_jid IS NOT NULL",
            ),
            # How many were sent in the last minutes: by when they were due, a backlog that is being sent is not seen.
            index("sent", "sent_at", where="status = 'sent' AND destination_jid IS NOT NULL"),
            # How a receipt finds its message where the transport could give the provider no reference.
            index("provider", "provider_message_id", where="provider_message_id IS NOT NULL"),
            # Each message leaves two dead rows. Not by `postgresql_with`, which SQLAlchemy 2.0 has for indexes only.
            # docs/decisions.md#2026-11-24--autovacuum-comes-when-2--of-the-table-is-dead
            {"listeners": [("after_create", alter("SET (autovacuum_vacuum_scale_factor = 0.02)"))]},
        )

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(id={self.id}, message_type={self.message_type!r}, status={self.status!s}, "
            f"attempt={self.attempt})"
        )


class EngagementMessage(EngagementMessageMixin, EngagementBase):
    """One message: a row of `engagement_message_queue`.

    Read it and query it as any entity. Change it through `EngagementMessageRepository`, whose statements are right
    under concurrency. The table's constraints refuse a plain UPDATE that breaks a promise (`sent` without `sent_at`).
    """
