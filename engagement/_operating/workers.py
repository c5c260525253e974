"""The workers: each that runs or was lost, with its last sign of life and the messages that it holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from typing import TYPE_CHECKING, Any

from sqlalchemy import Executable, func, select

from engagement._operating.masking import masked
from engagement._sql.host_sessions import in_session, readable, schema_in_session
from engagement._sql.parameters import text_of
from engagement._sql.table import word
from engagement._sql.working import GONE, SLOW, STANDINGS, worker_of, workers
from engagement.models import WORKER_TABLE_NAME, EngagementMessage, MessageStatus, qualified_name

if TYPE_CHECKING:
    from sqlalchemy.orm import Session


@dataclass(frozen=True, slots=True, kw_only=True)
class SeenWorker:
    """A worker as it was last seen, by the database's clock.

    `standing` is `working`, `slow` (seen, but its oldest send has lasted for over a minute), `not_ready`, `idle`, or
    `gone`: not seen for the time of three heartbeats.
    """

    name: str
    """As the claims of its run begin (`host:7#4fe1ab12`)."""
    standing: str
    last_seen_at: datetime
    started_at: datetime
    host: str
    process_id: int
    version: str
    transport: str
    concurrency: int
    in_hand: int
    in_hand_since: datetime | None
    holds: int
    """Messages that are `sending` under its name. Those of one that is gone are recovered when their leases run out."""
    sent: int
    failed: int
    not_ready: str | None


@dataclass(frozen=True, slots=True)
class Workers:
    """All workers, those that are gone first. `may_see` says whether the role may read their table."""

    seen: Sequence[SeenWorker]
    may_see: bool = True

    @property
    def by_standing(self) -> Mapping[str, int]:
        """How many workers are gone, slow, working, not ready and idle."""
        found = [worker.standing for worker in self.seen]
        return {standing: found.count(standing) for standing in STANDINGS}

    @property
    def held_by_gone(self) -> int:
        """How many messages are held by workers that are gone."""
        return sum(worker.holds for worker in self.seen if worker.standing == GONE)


def seen_workers(session: Session, *, schema: str | None = None) -> Workers:
    """Return the workers. A role that may not read their table is told so, and no error is raised."""
    keywords = in_session(schema)
    if not _may_see(session, schema, keywords):
        return Workers([], may_see=False)
    with readable(session):
        rows = session.execute(workers(), **keywords).mappings().all()
    return Workers([_seen(row) for row in rows])


def whose(session: Session, message: EngagementMessage, *, schema: str | None = None) -> str | None:
    """Return in a sentence whether the worker of a message that is being sent still lives; None for all others."""
    keywords = in_session(schema)
    if message.status is not MessageStatus.SENDING or not _may_see(session, schema, keywords):
        return None
    with readable(session):
        found = session.execute(worker_of(), {"message_id": message.id}, **keywords).one_or_none()
    lease = message.lease_expires_at
    after = "" if lease is None else f" after {_at(lease)}"
    if found is None:
        return f"it has left no sign of life; any worker recovers the message{after}"
    name = f"{found.name}#{found.run}"
    if found.standing == GONE:
        return f"{name} is gone since {_at(found.last_seen_at)}; any worker recovers the message{after}"
    seen = f"{name} was seen at {_at(found.last_seen_at)}"
    if found.standing == SLOW:
        seen += f", and is slow: its oldest send began at {_at(found.in_hand_since)}"
    return seen


def _may_see(session: Session, schema: str | None, keywords: Mapping[str, Any]) -> bool:
    table = {"workers": qualified_name(schema_in_session(schema, session), WORKER_TABLE_NAME)}
    return bool(session.execute(_may_read(), table, **keywords).scalar())


@cache
def _may_read() -> Executable:
    return select(func.has_table_privilege(func.to_regclass(text_of("workers")), word("SELECT")))


def _seen(row: Mapping[Any, Any]) -> SeenWorker:
    given = {name: row[name] for name in SeenWorker.__slots__}
    given |= {"name": f"{row['name']}#{row['run']}", "not_ready": row["not_ready"] and masked(row["not_ready"])}
    return SeenWorker(**given)


def _at(moment: datetime) -> str:
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M:%SZ}"
