"""The whole queue: its state now, and the messages due and sent over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cache
from typing import TYPE_CHECKING, Any

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Executable,
    Integer,
    Interval,
    Select,
    Text,
    and_,
    bindparam,
    cast,
    extract,
    func,
    select,
    true,
    union_all,
)
from sqlalchemy.dialects.postgresql import ARRAY

from engagement._operating.flow import Flows, flows
from engagement._operating.masking import masked
from engagement._operating.workers import Workers, seen_workers
from engagement._sql import claiming, looking
from engagement._sql.host_sessions import in_session, readable, schema_in_session
from engagement._sql.parameters import text_of
from engagement._sql.table import (
    FAILED,
    IN_DOUBT,
    MOMENT,
    NOW,
    PENDING,
    QUEUE,
    SENDING,
    SENT,
    C,
    catalog,
    is_due,
    is_lost,
    is_prunable,
    number,
    time_since,
)
from engagement.messages import Pause
from engagement.messages.checks import checked_moment
from engagement.models import MessageStatus, qualified_name
from engagement.pausing import Pauses

if TYPE_CHECKING:
    from sqlalchemy.orm import Session


@dataclass(frozen=True, slots=True, kw_only=True)
class Overview:
    """The state of the queue. Ages and leases are by the database's clock."""

    by_status: Mapping[MessageStatus, int]
    is_rough: bool
    """Whether finished messages, and counts that reached `count_up_to`, are estimated."""
    due: int
    oldest_due: timedelta | None
    """How long the oldest due message has been waiting."""
    waiting_for: str | None
    """Why it waits, if a worker's transport has given a reason for not being ready.

    See docs/decisions.md#2026-11-29--what-a-queue-waits-for-stands-on-the-message-that-waits-longest."""
    pauses: Sequence[Pause]
    """The pauses in force: why else nothing may be sent."""
    flows: Flows
    """How many were queued and sent in the last minutes."""
    done_in: timedelta | None
    """How long the due messages will take at the speed of the last five minutes: an estimate. None if none is sent."""
    workers: Workers
    """The workers, with their last signs of life."""
    leases_expired: int
    """Of the messages that are `sending`, how many have lost their worker, and wait to be recovered."""
    pending_in_doubt: int
    """Of the pending messages, how many may have left before."""
    oldest_in_doubt: timedelta | None
    """How long ago the oldest message in doubt was last due."""
    table_bytes: int
    index_bytes: int
    dead_rows: int
    """As the statistics of PostgreSQL estimate it; a replica knows none."""
    last_vacuum: datetime | None


def overview(session: Session, *, schema: str | None = None, count_up_to: int | None = None) -> Overview:
    """Return the state of the queue.

    The counts are exact and read the narrowest whole index (an index-only scan, while the table is vacuumed). All other
    figures come from partial indexes, from at most 100,000 rows, or from PostgreSQL's own statistics.

    With `count_up_to`, a table with more rows is not counted: finished messages are then estimated by the statistics,
    and all others are counted so far and no further. `pending_in_doubt` looks at as many pending messages. See
    docs/decisions.md#2026-11-24--the-page-estimates-what-is-finished.
    """
    keywords = in_session(schema)
    queue = {"queue": qualified_name(schema_in_session(schema, session))}
    values = {"most": count_up_to}
    facts = session.execute(_queue_facts(), values, **keywords).one()
    counts = {} if count_up_to is None else _count_roughly(session, queue | values, keywords)
    is_rough = bool(counts)
    if not counts:
        found = session.execute(looking.count_by_status(), **keywords)
        counts = {word: count for word, count, _ in found}
    with readable(session):
        table_facts = session.execute(_table_facts(), queue, **keywords).one()
    speed = flows(session, schema=schema)
    return Overview(
        by_status=dict.fromkeys(MessageStatus, 0) | {MessageStatus(word): count for word, count in counts.items()},
        is_rough=is_rough,
        pauses=Pauses(session, schema=schema).in_force(),
        flows=speed,
        workers=seen_workers(session, schema=schema),
        done_in=speed.takes(facts.due),
        due=facts.due,
        oldest_due=facts.oldest_due,
        waiting_for=facts.waiting_for and masked(facts.waiting_for),
        leases_expired=facts.leases_expired,
        pending_in_doubt=facts.pending_in_doubt,
        oldest_in_doubt=facts.oldest_in_doubt,
        **table_facts._mapping,  # noqa: SLF001 - the public name of a row's mapping
    )


def _count_roughly(session: Session, values: Mapping[str, Any], keywords: Mapping[str, Any]) -> dict[str, int]:
    """Return counts that read little; none if the table is small, or the planner has not looked at it."""
    counts: dict[str, int] = {row.word: row.counted for row in session.execute(_estimates(), values, **keywords)}
    if counts:
        for word, count in session.execute(_counts_of_unfinished(), values, **keywords):
            # A count that stopped at its limit may be below the estimate.
            counts[word] = max(count, counts.get(word, 0)) if count == values["most"] else count
    return counts


@cache
def _estimates() -> Executable:
    """Return (status, count) as the planner believes, if the table has more than `most` rows; else nothing."""
    of_statistics = ("schemaname", "tablename", "attname", "most_common_vals", "most_common_freqs")
    statistics = catalog("pg_stats", *of_statistics)
    relation = catalog("pg_class", "oid", "reltuples", "relname", "relnamespace")
    namespace = catalog("pg_namespace", "oid", "nspname")
    words = cast(cast(statistics.c.most_common_vals, Text), ARRAY(Text))
    common = func.unnest(words, statistics.c.most_common_freqs).table_valued("word", "share").render_derived("common")
    return (
        select(common.c.word, cast(relation.c.reltuples * common.c.share, BigInteger).label("counted"))
        .select_from(relation)
        .join(namespace, namespace.c.oid == relation.c.relnamespace)
        .join(
            statistics,
            and_(statistics.c.schemaname == namespace.c.nspname, statistics.c.tablename == relation.c.relname),
        )
        .join(common, true())
        .where(
            relation.c.oid == func.to_regclass(text_of("queue")),
            relation.c.reltuples > bindparam("most", type_=BigInteger),
            statistics.c.attname == "status",
        )
    )


@cache
def _counts_of_unfinished() -> Executable:
    """Return (status, count) of those that have an index of their own, each counted to `most`."""
    words = (PENDING, SENDING, FAILED, IN_DOUBT)
    return union_all(*(select(word, _count_up_to_most(C.status == word).scalar_subquery()) for word in words))


def _count_up_to_most(condition: ColumnElement[bool]) -> Select[Any]:
    """Return how many rows fit, counted to `most`; to the end if that is NULL."""
    some: Select[Any] = select(number(1)).select_from(QUEUE).where(condition)
    return select(func.count()).select_from(some.limit(bindparam("most", type_=BigInteger)).subquery())


@cache
def _queue_facts() -> Executable:
    pending = select(C.has_doubt).where(C.status == PENDING).limit(bindparam("most", type_=BigInteger)).subquery()
    questions: dict[str, Select[Any]] = {
        "due": _count_up_to_most(is_due),
        "oldest_due": select(time_since(func.min(C.next_attempt_at))).where(is_due),
        "waiting_for": claiming.waiting_for(),
        "leases_expired": select(func.count()).where(is_lost),
        "pending_in_doubt": select(func.count()).select_from(pending).where(pending.c.has_doubt),
        "oldest_in_doubt": select(time_since(func.min(C.next_attempt_at))).where(C.status == IN_DOUBT),
    }
    return select(*(question.scalar_subquery().label(name) for name, question in questions.items()))


@cache
def _table_facts() -> Executable:
    queue = func.to_regclass(text_of("queue"))
    statistics = catalog("pg_stat_all_tables", "relid", "n_dead_tup", "last_vacuum", "last_autovacuum")
    return select(
        func.pg_table_size(queue, type_=BigInteger).label("table_bytes"),
        func.pg_indexes_size(queue, type_=BigInteger).label("index_bytes"),
        statistics.c.n_dead_tup.label("dead_rows"),
        func.greatest(statistics.c.last_vacuum, statistics.c.last_autovacuum).label("last_vacuum"),
    ).where(statistics.c.relid == queue)


MOST_BUCKETS = 2_000


@dataclass(frozen=True, slots=True)
class Activity:
    """The messages due, and those sent, in the bucket that begins `at`."""

    at: datetime
    due: int
    sent: int


def activity(session: Session, since: datetime, bucket: timedelta, *, schema: str | None = None) -> list[Activity]:
    """Return the messages due and sent since then, bucket by bucket until now, zeros included.

    Read by the partial indexes on when messages were last due, and sent, which leave out forgotten and pruned ones.
    """
    checked_moment("since", since)
    if bucket <= timedelta(0):
        raise ValueError("bucket: must be more than nothing")
    keywords = in_session(schema)
    values = {"since": since, "bucket": bucket}
    past: timedelta = session.execute(_time_since(), values, **keywords).scalar_one()
    if (buckets := past // bucket + 1) > MOST_BUCKETS:
        raise ValueError(f"bucket: makes {buckets} buckets, more than {MOST_BUCKETS}")
    rows = session.execute(_activity(), values, **keywords)
    counts = {place: (due, sent) for place, due, sent in rows}
    return [Activity(since + place * bucket, *counts.get(place, (0, 0))) for place in range(buckets)]


@cache
def _time_since() -> Executable:
    return select(time_since(bindparam("since", type_=MOMENT)))


@cache
def _activity() -> Executable:
    since = bindparam("since", type_=MOMENT)
    is_recent = and_(since <= C.next_attempt_at, C.next_attempt_at <= NOW)
    was_due = select(C.next_attempt_at.label("at"), number(1).label("due"), number(0).label("sent"))
    was_sent = select(C.sent_at, number(0), number(1))
    seen = union_all(
        # One for each index: with OR, the planner reads the whole table.
        was_due.where(C.status == PENDING, is_recent),
        was_due.where(C.status == SENDING, is_recent),
        was_due.where(C.status == IN_DOUBT, is_recent),
        was_due.where(is_prunable, is_recent),
        was_sent.where(C.status == SENT, C.destination_jid.is_not(None), since <= C.sent_at, C.sent_at <= NOW),
    ).subquery("seen")
    bucket = bindparam("bucket", type_=Interval)
    place = func.floor(extract("epoch", seen.c.at - since) / extract("epoch", bucket)).cast(Integer)
    return select(place, func.sum(seen.c.due), func.sum(seen.c.sent)).group_by(place)
