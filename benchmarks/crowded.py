"""Work 5: claim from a table that is full of messages that are not due."""

import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

from sqlalchemy import event

from benchmarks.floors import Floor
from benchmarks.given import given
from benchmarks.measuring import Contender, compare
from benchmarks.ours import Ours
from benchmarks.server import Database, database
from benchmarks.setup import Setup

BATCH = 1000

_CROWD = """
    INSERT INTO engagement_message_queue
        (user_id, message_type, message_key, message_params, destination, destination_jid, idempotency_key,
         status, sent_at, attempt, scheduled_for, next_attempt_at)
    SELECT 'crowd-' || number, 'goodbye', 'goodbye.14_days', jsonb_build_object('name', repeat('x', 150)),
           'individual', '55' || lpad(number::text, 11, '0') || '@s.whatsapp.net', 'crowd-' || number,
           {status}, {sent_at}, {attempt}, due, due
    FROM generate_series(1, {size}) AS number, LATERAL (SELECT {due} + number * interval '1 second' AS due) AS at
"""


def finished(size: int) -> str:
    """Return the INSERT of a number of messages that were sent long ago."""
    due = "now() - interval '1 year'"
    return _CROWD.format(status="'sent'", sent_at="now()", attempt=1, due=due, size=size)


def _scheduled(size: int) -> str:
    due = "now() + interval '1 day'"
    return _CROWD.format(status="'pending'", sent_at="NULL", attempt=0, due=due, size=size)


def claim_from_a_crowd(setup: Setup) -> Iterator[str]:
    """Claim beside five million finished messages, and beside a million that are scheduled for later."""
    size = setup.size(20_000, 2_000)
    done, scheduled = setup.size(5_000_000, 5_000), setup.size(1_000_000, 1_000)
    crowds = {
        "an empty table": None,
        f"{done:,} finished": finished(done),
        f"{scheduled:,} scheduled for later": _scheduled(scheduled),
    }
    with ExitStack() as stack:
        tables = {name: _Table(stack.enter_context(database(setup.url)), crowd) for name, crowd in crowds.items()}
        for unit, measure in (("claimed/s", _Table.claim), ("drained/s", _Table.drain)):
            contenders = [
                Contender(name, partial(measure, table, size), "an empty table" if crowds[name] else None, target)
                for (name, table), target in zip(
                    tables.items(), (None, *[0.95 if unit == "claimed/s" else None] * 2), strict=True
                )
            ]
            yield compare(
                f"{size:,} due beside", contenders, rounds=setup.rounds, warm_up=not setup.small, unit=unit
            ).table()
        for name, table in tables.items():
            yield f"A claim of {BATCH:,} beside {name}:\n\n```\n{table.explain(size)}\n```"


class _Table:
    """A table with a crowd in it, and a worker's statements, seen from outside."""

    def __init__(self, db: Database, crowd: str | None) -> None:
        self._db = db
        self._queue = Ours(db, many=True, concurrency=BATCH)
        self._claim: tuple[str, Any] | None = None
        self._claim_seconds = 0.0
        self._is_empty = crowd is None
        if crowd:
            db.execute(crowd, "VACUUM ANALYZE engagement_message_queue", "CHECKPOINT")
        event.listen(db.engine, "before_cursor_execute", self._before)
        event.listen(db.engine, "after_cursor_execute", self._after)

    def claim(self, size: int) -> float:
        """Drain, and return how many were claimed for each second that claims took."""
        self.drain(size)
        return size / self._claim_seconds

    def drain(self, size: int) -> float:
        """Drain, and return the rate."""
        if self._is_empty:
            self._queue.empty()
        self._queue.fill(given(size))
        part = self._queue.drain()
        self._claim_seconds = 0.0
        started = time.perf_counter()
        part()
        return size / (time.perf_counter() - started)

    def explain(self, size: int) -> str:
        """Return the plan of the last claim, as it runs with so many due."""
        Floor(self._db).fill(given(size))
        assert self._claim
        statement, values = self._claim
        with self._db.connect() as connection:
            plan = connection.execute(
                f"EXPLAIN (ANALYZE, BUFFERS, COSTS OFF, TIMING OFF) {statement}", values
            ).fetchall()
            connection.rollback()
        return "\n".join(line for (line,) in plan)

    def _before(self, _connection: Any, _cursor: Any, statement: str, values: Any, *_: Any) -> None:
        self._started = time.perf_counter()
        if _is_claim(statement):
            self._claim = (statement, values)

    def _after(self, _connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if _is_claim(statement):
            self._claim_seconds += time.perf_counter() - self._started


def _is_claim(statement: str) -> bool:
    return "SKIP LOCKED" in statement and "'pending'" in statement
