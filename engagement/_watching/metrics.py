"""The metrics, defined once for OpenTelemetry and Prometheus: counts of this process, and the state of the queue.

No label holds anything personal, and each has few values: outcomes and statuses are words of ours, and message types
are words in the host's code.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import (
    ColumnElement,
    CompoundSelect,
    Connection,
    Engine,
    Float,
    Select,
    Subquery,
    Text,
    cast,
    func,
    literal_column,
    null,
    select,
    union_all,
)
from sqlalchemy.exc import SQLAlchemyError

from engagement._logging import logger
from engagement._sql import pausing, working
from engagement._sql.errors import describe
from engagement._sql.own_transactions import SAFE_PATH, check_engine
from engagement._sql.schemas import find_schema, schema_in_force, with_schema
from engagement._sql.table import FAILED, IN_DOUBT, NOW, PENDING, SENDING, C, is_due, is_lost, number, word
from engagement._watching.observers import Heard, QueueEnd, Round
from engagement.messages import Queued, QueuedMany
from engagement.models import MessageStatus

COUNTED_UP_TO = 100_000
"""A count of the queue ends here, so that reading it costs the same whether there is a backlog or not.

See docs/decisions.md#2026-11-24--what-a-scrape-reads-is-bounded."""
COUNTED_BY_TYPE_UP_TO = 10_000
"""A count by type ends sooner: the type is in the table, not in the index, and each message may be another page."""
FAILED_DAYS = 7
"""A failure counts for so long. It stays in the table for ever, and old ones would fill the count in the end."""


MOST_CODES = 50
"""Codes of providers that a process counts apart. Meta has about 60, of which a webhook tells a part."""
_CODE = re.compile("[0-9]{1,6}")
"""Too short for a number of a person's."""


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric, in OpenTelemetry's spelling; `help` is its one line for everybody."""

    name: str
    unit: str
    help: str
    labels: tuple[str, ...] = ()

    @property
    def prometheus_name(self) -> str:
        """The name as Prometheus spells it: the one that OpenTelemetry's own exporters make of it, too."""
        return self.name.replace(".", "_") + ("_seconds" if self.unit == "s" else "")


_MESSAGES = "{message}"
_BY_TYPE = ("message_type",)

QUEUED = Metric("engagement.queued", _MESSAGES, "Messages queued by this process, in transactions that may still fail.")
DUPLICATES = Metric("engagement.duplicates", _MESSAGES, "Messages not queued by this process, since their key existed.")
OUTCOMES = Metric(
    "engagement.outcomes",
    _MESSAGES,
    "Attempts that this process settled: the transport's outcome, and the status of the message now.",
    ("message_type", "outcome", "status"),
)
DUE_TO_SENT = Metric(
    "engagement.due_to_sent", "s", "Time from when a message was last due until it was recorded as sent.", _BY_TYPE
)
DELIVERED = Metric(
    "engagement.delivered", _MESSAGES, "Messages that a receipt called delivered or read for the first time.", _BY_TYPE
)
READ = Metric("engagement.read", _MESSAGES, "Messages that a receipt called read for the first time.", _BY_TYPE)
UNDELIVERABLE = Metric(
    "engagement.undeliverable",
    _MESSAGES,
    "Messages that a receipt called undeliverable: the provider's code, `none`, or `other`.",
    ("message_type", "code"),
)
DOUBTS_RESOLVED = Metric(
    "engagement.doubts_resolved",
    _MESSAGES,
    "Messages in doubt that a receipt resolved, and the status of the message now.",
    ("message_type", "status"),
)
RECEIPTS_DROPPED = Metric(
    "engagement.receipts_dropped",
    "{receipt}",
    "Receipts that this process dropped: they were kept for a day, and no message had their provider's id.",
)
SENT_TO_DELIVERED = Metric(
    "engagement.sent_to_delivered",
    "s",
    "Time from when a message was recorded as sent until it was delivered, as its first receipt of that says.",
    _BY_TYPE,
)
COUNTERS = (QUEUED, DUPLICATES, OUTCOMES, DELIVERED, READ, UNDELIVERABLE, DOUBTS_RESOLVED, RECEIPTS_DROPPED)
HISTOGRAMS = {
    DUE_TO_SENT: (1, 2.5, 5, 10, 30, 60, 150, 300, 900, 1_800, 3_600, 14_400, 43_200, 86_400),
    SENT_TO_DELIVERED: (1, 2.5, 5, 10, 30, 60, 300, 900, 3_600, 14_400, 43_200, 86_400, 259_200, 604_800),
}
"""And the upper bounds of their buckets."""

UP = Metric("engagement.up", "", "Whether the queue could be read: 1, or 0 and nothing else of the queue.")
OLDEST_DUE_AGE = Metric("engagement.oldest_due_age", "s", "How long the oldest due message has waited; 0 if none.")
DUE = Metric("engagement.due", _MESSAGES, "Messages that wait for a worker (counted up to 100,000).")
SCHEDULED = Metric("engagement.scheduled", _MESSAGES, "Messages that are pending, and not due yet (up to 100,000).")
CLAIMED = Metric("engagement.sending", _MESSAGES, "Messages that a worker has claimed and not settled (up to 100,000).")
EXPIRED_LEASES = Metric(
    "engagement.expired_leases", _MESSAGES, "Claims whose worker was lost, and which nobody has recovered (to 100,000)."
)
DOUBTS = Metric("engagement.in_doubt", _MESSAGES, "Messages in doubt: somebody has to look (up to 10,000).", _BY_TYPE)
FAILURES = Metric(
    "engagement.failed", _MESSAGES, "Messages that failed and were last due within 7 days (up to 10,000).", _BY_TYPE
)
WORKERS = Metric(
    "engagement.workers",
    "{worker}",
    "Workers by their standing: working, slow (a send of over a minute), not_ready, idle, or gone (not seen any more).",
    ("standing",),
)
PAUSED = Metric("engagement.paused", "{pause}", "Pauses in force: of everything, of a type, of a sender.")
QUEUE = (UP, OLDEST_DUE_AGE, PAUSED, DUE, SCHEDULED, CLAIMED, EXPIRED_LEASES, DOUBTS, FAILURES, WORKERS)


# This process --------------------------------------------------------------------------------------------------------

Labels = Mapping[str, str]
Measure = Callable[[Metric, float, Labels], None]


class Counting:
    """An observer that counts. It calls `add` for a counter, and `record` for a histogram."""

    def __init__(self, *, add: Measure, record: Measure) -> None:
        self._add = add
        self._record = record
        self._codes: set[str] = set()

    def queueing(self, message_type: str | None) -> tuple[None, QueueEnd]:  # noqa: ARG002 - a batch has many types
        """Count the messages, once they are queued."""
        return None, self._count_queued

    def sending(self, claims: object) -> None:
        """Hear nothing: an outcome counts when it is recorded."""

    def committed(self, round_: Round) -> None:
        """Count the settlements, and the messages that ended instead of being claimed."""
        now = datetime.now(UTC)
        for claim, verdict, status in round_.settled:
            message_type = claim.message.message_type
            self._count_outcome(message_type, verdict.event, status or "claim_lost")
            if status is MessageStatus.SENT:
                # By this host's clock, which may be a moment behind the database's.
                waited = max(now - claim.place[0], timedelta(0))
                self._record(DUE_TO_SENT, waited.total_seconds(), {"message_type": message_type})
        for message, status in round_.ended.items():
            self._count_outcome(message.message_type, status, status)

    def heard(self, receipts: Sequence[Heard], started_at: int) -> None:  # noqa: ARG002 - a count has no beginning
        """Count what the receipts tell."""
        for heard in receipts:
            labels = {"message_type": heard.message_type}
            for metric, event in ((DELIVERED, "delivered"), (READ, "read")):
                if event in heard.news:
                    self._add(metric, 1, labels)
            if "undeliverable" in heard.news:
                self._add(UNDELIVERABLE, 1, labels | {"code": self._code(heard.receipt.code)})
            if heard.sent_to_delivered is not None:
                self._record(SENT_TO_DELIVERED, heard.sent_to_delivered.total_seconds(), labels)
            if heard.resolves_doubt:
                self._add(DOUBTS_RESOLVED, 1, labels | {"status": str(heard.status)})

    def dropped(self, receipts: int) -> None:
        """Count them."""
        self._add(RECEIPTS_DROPPED, receipts, {})

    def _code(self, code: str | None) -> str:
        """Return the label of a provider's code. A code may be any text of any length, and a label may not."""
        if code is None:
            return "none"
        if _CODE.fullmatch(code) and (code in self._codes or len(self._codes) < MOST_CODES):
            self._codes.add(code)
            return code
        return "other"

    def _count_outcome(self, message_type: str, outcome: str, status: str) -> None:
        self._add(OUTCOMES, 1, {"message_type": message_type, "outcome": str(outcome), "status": str(status)})

    def _count_queued(self, result: Queued | QueuedMany | BaseException) -> None:
        match result:
            case Queued(created=created):
                self._add(QUEUED if created else DUPLICATES, 1, {})
            case QueuedMany(created=created, duplicates=duplicates):
                self._add(QUEUED, created, {})
                self._add(DUPLICATES, duplicates, {})


# The queue -----------------------------------------------------------------------------------------------------------

Sample = tuple[Metric, Labels, float]


class QueueReader:
    """Reads the state of the queue, of any length, in one short round trip that ends after `timeout`.

    The engine's driver must be psycopg. Give the engine a `connect_timeout`, which is for the time before that.
    """

    def __init__(self, engine: Engine, *, schema: str | None = None, timeout: timedelta = timedelta(seconds=2)) -> None:
        check_engine(engine)
        if timeout < timedelta(milliseconds=1):
            raise ValueError("timeout: must be at least a millisecond")
        self._engine = engine.execution_options(isolation_level="AUTOCOMMIT")
        self._schema = schema_in_force(schema, engine)
        statement = _queue_as_samples().compile(engine, compile_kwargs={"literal_binds": True})
        # Two statements in one message are one transaction, whose end takes the settings back. If the statistics are
        # from before a backlog, a planner that may sort reads all of it, to count the first of it.
        local = {"statement_timeout": timeout // timedelta(milliseconds=1), "enable_sort": "off", "jit": "off"}
        local |= {"search_path": SAFE_PATH, "extra_float_digits": 1}
        settings = ", ".join(f"pg_catalog.set_config('{name}', '{value}', true)" for name, value in local.items())
        self.sql = f"SELECT {settings}; {statement}"

    def read(self) -> list[Sample]:
        """Return the samples of `QUEUE`, or only that it is not `UP`. An error of the database is not raised."""
        try:
            with self._engine.connect() as connection:
                self._schema = self._schema or find_schema(connection)
                sql = self.sql if self._schema is None else with_schema(self.sql, self._schema, connection)
                with _unprepared(connection):
                    cursor: Any = connection.exec_driver_sql(sql).cursor
                cursor.nextset()
                rows = cursor.fetchall()
        except SQLAlchemyError as error:
            logger.warning("engagement.queue_not_read error=%s", describe(error))
            return [(UP, {}, 0)]
        return [(UP, {}, 1), *(_sample(*row) for row in rows)]


@contextmanager
def _unprepared(connection: Connection) -> Iterator[None]:
    """Let the driver prepare nothing, as it may from the first time on: two statements cannot be prepared as one."""
    driver: Any = connection.connection.driver_connection
    threshold, driver.prepare_threshold = driver.prepare_threshold, None
    try:
        yield
    finally:
        driver.prepare_threshold = threshold


def _sample(name: str, label: str | None, value: float) -> Sample:
    metric = _BY_NAME[name]
    return metric, {} if label is None else {metric.labels[0]: label}, value


_BY_NAME = {metric.name: metric for metric in QUEUE}


def _queue_as_samples() -> CompoundSelect[Any]:
    """Return (name, label, value) of each sample, by partial indexes only."""
    is_scheduled = C.next_attempt_at > NOW
    is_recent = C.next_attempt_at > NOW - literal_column(f"interval '{FAILED_DAYS} days'")
    age = func.coalesce(func.extract("epoch", NOW - func.min(C.next_attempt_at)), 0)
    return union_all(
        _value(OLDEST_DUE_AGE, age).where(is_due),
        _value(PAUSED, func.count()).select_from(pausing.PAUSES).where(pausing.is_in_force),
        _count(DUE, is_due),
        _count(SCHEDULED, C.status == PENDING, is_scheduled),
        _count(CLAIMED, C.status == SENDING, by=C.lease_expires_at),
        _count(EXPIRED_LEASES, is_lost, by=C.lease_expires_at),
        _count_by_type(DOUBTS, C.status == IN_DOUBT),
        _count_by_type(FAILURES, C.status == FAILED, is_recent),
        *map(_count_of_workers, working.STANDINGS),
    )


def _value(metric: Metric, value: ColumnElement[Any], label: ColumnElement[Any] | None = None) -> Select[Any]:
    return select(word(metric.name), cast(null() if label is None else label, Text), cast(value, Float))


def _count(metric: Metric, *wanted: ColumnElement[bool], by: ColumnElement[Any] = C.next_attempt_at) -> Select[Any]:
    return _value(metric, func.count()).select_from(_first(by, *wanted, by=by, limit=COUNTED_UP_TO))


def _count_by_type(metric: Metric, *wanted: ColumnElement[bool]) -> Select[Any]:
    first = _first(C.message_type, *wanted, by=C.next_attempt_at.desc(), limit=COUNTED_BY_TYPE_UP_TO)
    return _value(metric, func.count(), first.c.message_type).group_by(first.c.message_type)


def _count_of_workers(standing: str) -> Select[Any]:
    # Also those of which there are none: an alert on zero must not find nothing.
    return _value(WORKERS, func.count(), word(standing)).where(working.standing == word(standing))


def _first(what: ColumnElement[Any], *wanted: ColumnElement[bool], by: ColumnElement[Any], limit: int) -> Subquery:
    # In the order of an index, which ends the count early.
    return select(what).where(*wanted).order_by(by).limit(number(limit)).subquery()
