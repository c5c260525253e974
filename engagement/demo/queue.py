"""The queue, as the demo looks at it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from sqlalchemy import ColumnElement, Engine, Select, func, select
from sqlalchemy.orm import Session

from engagement.models import EngagementMessage
from engagement.repository import EngagementMessageRepository

M = EngagementMessage


class Queue:
    """The messages of the demo."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @contextmanager
    def repository(self) -> Iterator[EngagementMessageRepository]:
        """Hand out a repository in a transaction of its own."""
        with Session(self._engine) as session, session.begin():
            yield EngagementMessageRepository(session)

    def all(self) -> list[EngagementMessage]:
        """Return all messages, the oldest first."""
        with Session(self._engine) as session:
            return list(session.scalars(select(M).order_by(M.id)))

    def message(self, which: ColumnElement[bool]) -> EngagementMessage:
        """Return the one message that fits."""
        with Session(self._engine) as session:
            return session.scalars(select(M).where(which)).one()

    def count_due(self) -> int:
        """Return how many messages would be sent now: those that are due, and not too late."""
        is_due = (
            M.status == "pending",
            M.next_attempt_at <= func.now(),
            func.coalesce(M.expires_at > func.now(), True),
        )
        with Session(self._engine) as session:
            return session.scalars(select(func.count()).where(*is_due)).one()

    def sleep(self, wait: Select[Any]) -> None:
        """Wait by the database's clock, which due times and leases go by."""
        with self._engine.connect() as connection:
            left: timedelta = connection.scalar(wait) or timedelta(0)
        time.sleep(max(left.total_seconds(), 0) + 0.01)
