"""Statements of the table of workers: their last signs of life, and the messages that each holds."""

from __future__ import annotations

from functools import cache
from typing import Any

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Delete,
    Executable,
    Integer,
    Interval,
    Select,
    Table,
    Text,
    and_,
    bindparam,
    case,
    cast,
    delete,
    func,
    literal_column,
    select,
)
from sqlalchemy.dialects.postgresql import insert

from engagement._sql.parameters import text_of
from engagement._sql.table import (
    LOCKED_UNLESS_BY_OTHERS,
    NOW,
    SENDING,
    C,
    number,
    word,
)
from engagement.models import EngagementWorker

WORKERS: Table = EngagementWorker.__table__  # type: ignore[assignment]  # declared as FromClause
W = WORKERS.c

GONE, SLOW, WORKING, NOT_READY, IDLE = STANDINGS = ("gone", "slow", "working", "not_ready", "idle")
"""The standings of a worker, as far as it is seen."""
SLOW_SECONDS = 60
"""A worker whose oldest send has gone on for so long is slow. It is seen all the same, and so is not gone."""

is_gone: ColumnElement[bool] = W.gone_at <= NOW
standing: ColumnElement[str] = case(
    (is_gone, word(GONE)),
    (W.in_hand_since < NOW - literal_column(f"interval '{SLOW_SECONDS} seconds'"), word(SLOW)),
    (W.in_hand > number(0), word(WORKING)),
    (W.not_ready.is_not(None), word(NOT_READY)),
    else_=word(IDLE),
)
run_of_claim: ColumnElement[str] = func.substring(
    C.claimed_by, word("#([0-9a-f]{8})/[0-9]+(?:/recovery/[0-9]+)?$"), type_=Text
)
"""The run under whose name a message is claimed. See `names.Names`."""


@cache
def beat() -> Executable:
    """Write that a worker is alive: its row, or the changes of it."""
    texts = ("run", "name", "host", "version", "transport", "not_ready")
    given: dict[str, Any] = {name: text_of(name) for name in texts}
    given |= {name: bindparam(name, type_=BigInteger) for name in ("process_id", "concurrency", "sent", "failed")}
    given |= {
        "in_hand": bindparam("in_hand", type_=Integer),
        "in_hand_since": NOW - _length("in_hand_for"),
        "started_at": NOW - _length("runs_for"),
        "last_seen_at": NOW,
        "gone_at": NOW + _length("gone_after"),
    }
    row = insert(WORKERS).values(given)
    changed = {name: row.excluded[name] for name in given if name not in {"run", "started_at"}}
    return row.on_conflict_do_update(index_elements=[W.run], set_=changed)


def _length(name: str) -> ColumnElement[Any]:
    # Of a moment less an unknown NULL, the server makes another length.
    return cast(bindparam(name, type_=Interval), Interval)


@cache
def leave() -> Delete:
    """Take a worker's row away."""
    return delete(WORKERS).where(W.run == text_of("of_run"))


@cache
def sweep() -> Delete:
    """Take away the rows of workers that have been gone for longer than `older_than`."""
    old = select(W.run).where(W.gone_at < NOW - bindparam("older_than", type_=Interval))
    return delete(WORKERS).where(W.run.in_(old.with_for_update(**LOCKED_UNLESS_BY_OTHERS)))


@cache
def workers() -> Select[Any]:
    """Return all workers with their standing, and how many messages each holds; those that are gone first."""
    held = (
        select(run_of_claim.label("run"), func.count().label("holds"))
        .where(C.status == SENDING)
        .group_by(run_of_claim)
        .subquery("held")
    )
    holds = func.coalesce(held.c.holds, number(0)).label("holds")
    return (
        # Its row is as of the last heartbeat, and a claim may be younger.
        select(
            WORKERS,
            case((and_(standing == word(IDLE), holds > number(0)), word(WORKING)), else_=standing).label("standing"),
            holds,
        )
        .outerjoin_from(WORKERS, held, held.c.run == W.run)
        .order_by(is_gone.desc(), W.name, W.started_at, W.run)
    )


@cache
def worker_of() -> Select[Any]:
    """Return (name, run, standing, last seen) of the worker that holds a message."""
    return (
        select(W.name, W.run, standing.label("standing"), W.last_seen_at, W.in_hand_since)
        .join_from(WORKERS, C.id.table, W.run == run_of_claim)
        .where(C.id == bindparam("message_id", type_=BigInteger), C.status == SENDING)
    )
