"""The table of the workers that run: each says there that it is alive."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import BigInteger, Integer, PrimaryKeyConstraint, Text
from sqlalchemy.orm import Mapped, declared_attr, mapped_column
from sqlalchemy.schema import SchemaItem
from sqlalchemy.sql.elements import conv

from engagement.models.parts import MOMENT, WORKER_TABLE_NAME, EngagementBase, between, check

MOST_TEXT = 500
"""Characters of each text of a worker."""


class EngagementWorkerMixin:
    """The columns and constraints of a worker that runs, for hosts with a `Base` of their own.

    Map it as `EngagementMessageMixin`.
    """

    __tablename__ = WORKER_TABLE_NAME

    run: Mapped[str] = mapped_column(Text(collation="C"))
    """The mark of this run in `claimed_by`: `4fe1ab12` in `host:7#4fe1ab12/12`."""
    name: Mapped[str] = mapped_column(Text)
    """The `worker_name`, which many may share."""
    host: Mapped[str] = mapped_column(Text)
    process_id: Mapped[int] = mapped_column(BigInteger)
    version: Mapped[str] = mapped_column(Text)
    """The version of `engagement`."""
    transport: Mapped[str] = mapped_column(Text)
    concurrency: Mapped[int] = mapped_column(BigInteger)
    in_hand: Mapped[int] = mapped_column(Integer)
    """Messages that are claimed and not yet settled."""
    in_hand_since: Mapped[datetime | None] = mapped_column(MOMENT)
    """When the oldest of them was handed to the transport."""
    sent: Mapped[int] = mapped_column(BigInteger)
    failed: Mapped[int] = mapped_column(BigInteger)
    started_at: Mapped[datetime] = mapped_column(MOMENT)
    last_seen_at: Mapped[datetime] = mapped_column(MOMENT)
    gone_at: Mapped[datetime] = mapped_column(MOMENT)
    """From this moment on the worker is gone, unless it has been seen again."""
    not_ready: Mapped[str | None] = mapped_column(Text)
    """Why it claims nothing, while it does not."""

    @declared_attr.directive
    @classmethod
    def __table_args__(cls) -> tuple[SchemaItem, ...]:
        """Return new constraints for each class that is mapped."""
        moments = ("in_hand_since", "started_at", "last_seen_at", "gone_at")
        lengths = ("name", "host", "version", "transport", "not_ready")
        return (
            PrimaryKeyConstraint("run", name=conv(f"{WORKER_TABLE_NAME}_pkey")),
            check("run_form", "run ~ '^[0-9a-f]{8}$'", WORKER_TABLE_NAME),
            check(
                "texts_length",
                " AND ".join(f"char_length({text}) <= {MOST_TEXT}" for text in lengths),
                WORKER_TABLE_NAME,
            ),
            check(
                "counts",
                "concurrency >= 1 AND in_hand >= 0 AND sent >= 0 AND failed >= 0",
                WORKER_TABLE_NAME,
            ),
            check("times_readable", " AND ".join(map(between, moments)), WORKER_TABLE_NAME),
        )


class EngagementWorker(EngagementWorkerMixin, EngagementBase):
    """One run of a worker: a row of `engagement_worker`, which the worker writes and takes away."""
