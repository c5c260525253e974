"""The table of the receipts whose messages are not known yet."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import Boolean, PrimaryKeyConstraint, Text, text
from sqlalchemy.orm import Mapped, declared_attr, mapped_column
from sqlalchemy.schema import SchemaItem
from sqlalchemy.sql.elements import conv

from engagement.models.parts import MOMENT, RECEIPT_TABLE_NAME, EngagementBase, between, check

MOST_RECEIPT_TEXT = 1000
"""Characters of a kept receipt's reason and code, as of a reason in a message's history."""


class EngagementReceiptMixin:
    """The columns and constraints of a kept receipt, for hosts with a `Base` of their own.

    Map it as `EngagementMessageMixin`. A receipt is here for a day at most.
    """

    __tablename__ = RECEIPT_TABLE_NAME

    provider_message_id: Mapped[str] = mapped_column(Text)
    event: Mapped[str] = mapped_column(Text)
    at: Mapped[datetime] = mapped_column(MOMENT)
    provider: Mapped[str] = mapped_column(Text)
    reason: Mapped[str | None] = mapped_column(Text)
    code: Mapped[str | None] = mapped_column(Text)
    unreachable: Mapped[bool] = mapped_column(Boolean)
    kept_at: Mapped[datetime] = mapped_column(MOMENT, server_default=text("now()"))
    """When it came, by the database's clock. It is dropped a day later."""

    @declared_attr.directive
    @classmethod
    def __table_args__(cls) -> tuple[SchemaItem, ...]:
        """Return new constraints for each class that is mapped."""
        lengths = ("provider_message_id", 512), ("provider", 255)
        optional = " AND ".join(f"char_length({name}) <= {MOST_RECEIPT_TEXT}" for name in ("reason", "code"))
        return (
            # A receipt that comes twice is kept once.
            PrimaryKeyConstraint("provider_message_id", "event", "at", name=conv(f"{RECEIPT_TABLE_NAME}_pkey")),
            check("event_known", "event IN ('accepted', 'delivered', 'read', 'undeliverable')", RECEIPT_TABLE_NAME),
            check(
                "names_length",
                " AND ".join(f"char_length({name}) BETWEEN 1 AND {most}" for name, most in lengths),
                RECEIPT_TABLE_NAME,
            ),
            check("texts_length", optional, RECEIPT_TABLE_NAME),
            check("unreachable_is_undeliverable", "NOT unreachable OR event = 'undeliverable'", RECEIPT_TABLE_NAME),
            check("times_readable", f"{between('at')} AND {between('kept_at')}", RECEIPT_TABLE_NAME),
        )


class EngagementReceipt(EngagementReceiptMixin, EngagementBase):
    """A receipt that came before its message's provider id was known: a row of `engagement_receipt`."""
