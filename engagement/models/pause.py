"""The table of the pauses."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum

from sqlalchemy import PrimaryKeyConstraint, Text, text
from sqlalchemy.orm import Mapped, declared_attr, mapped_column
from sqlalchemy.schema import SchemaItem
from sqlalchemy.sql.elements import conv

from engagement.models.parts import MOMENT, PAUSE_TABLE_NAME, EngagementBase, between, check, words
from engagement.models.suppression import MOST_REASON

MOST_SENDER = 200
"""Characters in the name of a sender."""
MOST_BY = 255
"""Characters in the name of a pause's author."""


class PauseScope(StrEnum):
    """How much a pause holds back."""

    EVERYTHING = "everything"
    TYPE = "type"
    """The messages of one type."""
    SENDER = "sender"
    """All messages of the workers that name this sender."""


class EngagementPauseMixin:
    """The columns and constraints of a pause, for hosts with a `Base` of their own. Map it as `EngagementMessageMixin`.

    The key is the scope: of each there is one pause at most.
    """

    __tablename__ = PAUSE_TABLE_NAME

    scope: Mapped[str] = mapped_column(Text)
    name: Mapped[str] = mapped_column(Text)
    """The message type, or the sender. Empty for everything, since a key holds no NULL."""
    reason: Mapped[str] = mapped_column(Text)
    paused_by: Mapped[str | None] = mapped_column(Text)
    since: Mapped[datetime] = mapped_column(MOMENT, server_default=text("now()"))
    until: Mapped[datetime | None] = mapped_column(MOMENT)
    """From this moment on it holds nothing back. None is until it is lifted."""

    @declared_attr.directive
    @classmethod
    def __table_args__(cls) -> tuple[SchemaItem, ...]:
        """Return new constraints for each class that is mapped."""
        return (
            PrimaryKeyConstraint("scope", "name", name=conv(f"{PAUSE_TABLE_NAME}_pkey")),
            check("scope_known", f"scope IN ({words(PauseScope)})", PAUSE_TABLE_NAME),
            check("name_fits_scope", "(scope = 'everything') = (name = '')", PAUSE_TABLE_NAME),
            check(
                "texts_length",
                f"char_length(name) <= {MOST_SENDER} AND char_length(reason) <= {MOST_REASON}"
                f" AND char_length(paused_by) <= {MOST_BY}",
                PAUSE_TABLE_NAME,
            ),
            check("times_readable", f"{between('since')} AND {between('until')}", PAUSE_TABLE_NAME),
        )


class EngagementPause(EngagementPauseMixin, EngagementBase):
    """One pause: a row of `engagement_pause`. Change it by `Pauses`."""
