"""The table of the addresses that are not to be sent to."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import PrimaryKeyConstraint, Text, text
from sqlalchemy.orm import Mapped, declared_attr, mapped_column
from sqlalchemy.schema import SchemaItem
from sqlalchemy.sql.elements import conv

from engagement.models.parts import MOMENT, SUPPRESSION_TABLE_NAME, EngagementBase, between, check

MOST_REASON = 500
"""Characters of the reason of a suppression."""


class EngagementSuppressionMixin:
    """The columns and constraints of an address that is not to be sent to, for hosts with a `Base` of their own.

    Map it as `EngagementMessageMixin`. The address itself is not here, only its hash.
    """

    __tablename__ = SUPPRESSION_TABLE_NAME

    address_hash: Mapped[str] = mapped_column(Text(collation="C"))
    """The SHA-256 of the address, in hexadecimal."""
    reason: Mapped[str | None] = mapped_column(Text)
    """None once a person of this address was forgotten."""
    since: Mapped[datetime] = mapped_column(MOMENT, server_default=text("now()"))
    until: Mapped[datetime | None] = mapped_column(MOMENT)
    """From this moment on it may be sent to again. None is for good."""

    @declared_attr.directive
    @classmethod
    def __table_args__(cls) -> tuple[SchemaItem, ...]:
        """Return new constraints for each class that is mapped."""
        return (
            PrimaryKeyConstraint("address_hash", name=conv(f"{SUPPRESSION_TABLE_NAME}_pkey")),
            check("address_hash_form", "address_hash ~ '^[0-9a-f]{64}$'", SUPPRESSION_TABLE_NAME),
            check("reason_length", f"char_length(reason) <= {MOST_REASON}", SUPPRESSION_TABLE_NAME),
            check("times_readable", f"{between('since')} AND {between('until')}", SUPPRESSION_TABLE_NAME),
        )


class EngagementSuppression(EngagementSuppressionMixin, EngagementBase):
    """One address that is not to be sent to: a row of `engagement_suppression`. Change it by `SuppressionList`."""
