"""How many messages came and went in the last minutes, and how long a backlog will take at that speed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any

from sqlalchemy import ColumnElement, Executable, Interval, Select, bindparam, func, select, union_all

from engagement._sql.host_sessions import in_session
from engagement._sql.parameters import limit
from engagement._sql.table import NOW, SENT, C, number, time_since

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

OVER = (timedelta(minutes=1), timedelta(minutes=5), timedelta(minutes=60))
MOST_READ = 50_000
"""Messages that are looked at, each way: the newest, and those that were sent last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Flow:
    """The messages that were queued, and those that were sent, in the last minutes, by the database's clock.

    Those that were forgotten or pruned since do not count as sent. A count is exact below `MOST_READ`; else it is how
    many of so many, and there were at least as many.
    """

    over: timedelta
    queued: int
    sent: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Flows:
    """The flow of the last minute, of five and of an hour."""

    each: Sequence[Flow]
    sent_per_second: float
    """Of the last five minutes; of a shorter time if `MOST_READ` were sent in it."""

    def takes(self, due: int) -> timedelta | None:
        """Return how long so many due messages will take if it goes on like this; None if nothing is being sent."""
        return timedelta(seconds=round(due / self.sent_per_second)) if self.sent_per_second else None


def flows(session: Session, *, schema: str | None = None) -> Flows:
    """Return the flow of the last minutes, from two indexes."""
    values = {"limit": MOST_READ} | {_name(over): over for over in OVER}
    queued, sent = session.execute(_flows(), values, **in_session(schema)).all()
    each = [Flow(over=over, queued=queued[place], sent=sent[place]) for place, over in enumerate(OVER)]
    return Flows(each=each, sent_per_second=_per_second(each[1], reaches=sent.reaches))


def _per_second(flow: Flow, *, reaches: timedelta | None) -> float:
    over = flow.over if flow.sent < MOST_READ or reaches is None else reaches
    return flow.sent / max(over.total_seconds(), 1.0)


@cache
def _flows() -> Executable:
    newest = select(C.created_at.label("at")).order_by(C.id.desc())
    sent = select(C.sent_at.label("at")).where(C.status == SENT, C.destination_jid.is_not(None))
    return union_all(_counted(newest, number(0)), _counted(sent.order_by(C.sent_at.desc()), number(1))).order_by("way")


def _counted(rows: Select[Any], way: Any) -> Select[Any]:
    read = rows.limit(limit).subquery()
    counts: list[ColumnElement[Any]] = [
        func.count().filter(read.c.at > NOW - bindparam(_name(over), type_=Interval)).label(_name(over))
        for over in OVER
    ]
    return select(*counts, time_since(func.min(read.c.at)).label("reaches"), way.label("way"))


def _name(over: timedelta) -> str:
    return f"over_{over // timedelta(minutes=1)}"
