"""Work 7: the cost of an idle worker, and the time until it notices a due message."""

import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from queue import SimpleQueue
from statistics import median
from typing import Any

from sqlalchemy import event
from sqlalchemy.orm import Session

from benchmarks.floors import Floor
from benchmarks.given import given, new_messages
from benchmarks.measuring import Fact, facts
from benchmarks.server import Database, database
from benchmarks.setup import Setup
from engagement import EngagementMessageRepository, OutgoingMessage, Worker


def idle(setup: Setup) -> Iterator[str]:
    """Count the statements of an idle worker, time the pick-up of a message that becomes due, and drain a burst."""
    with database(setup.url) as db:
        poll = setup.seconds(0.5, 0.1)
        yield facts(f"worker with poll_interval={poll} s", [*_costs(db, setup, poll), *_pick_ups(db, setup, poll)])
        poll = setup.seconds(5.0, 0.5)
        yield facts(f"worker with poll_interval={poll} s", _burst(db, setup, poll))


def _costs(db: Database, setup: Setup, poll: float) -> list[Fact]:
    """Measure a worker that finds nothing."""
    polls = setup.size(20, 2)
    asked = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        asked.append(statement)

    with _worker(db, poll):
        time.sleep(poll)  # It looks for work and for lost leases once before it is idle.
        event.listen(db.engine, "before_cursor_execute", note)
        used = time.process_time()
        time.sleep(polls * poll)
        used = time.process_time() - used
        event.remove(db.engine, "before_cursor_execute", note)
    return [
        Fact("statements for each poll", len(asked) / polls, "", at_most=1 + 1 / polls),
        Fact("processor time for each poll", 1000 * used / polls, "ms"),
    ]


def _pick_ups(db: Database, setup: Setup, poll: float) -> list[Fact]:
    """Measure the time from due to sent, for messages that become due at random between two polls, and by no poll."""
    waits = []
    with _worker(db, poll) as sent_at:
        for row in given(setup.size(60, 2)):
            due = datetime.now(UTC) + timedelta(seconds=poll + 0.1 + random.random() * poll)
            message = replace(*new_messages([row]), scheduled_for=due)
            with Session(db.engine) as session, session.begin():
                EngagementMessageRepository(session).queue_message(message)
            waits.append((sent_at.get() - due).total_seconds())
    return [
        Fact("from due to sent, median", 1000 * median(waits), "ms", at_most=10),
        Fact("from due to sent, longest", 1000 * max(waits), "ms"),
    ]


def _burst(db: Database, setup: Setup, poll: float) -> list[Fact]:
    """Measure a burst from its first send to its last."""
    size = setup.size(5_000, 300)
    with _worker(db, poll, concurrency=10) as sent_at:
        Floor(db).queue_many(given(size))()
        times = [sent_at.get() for _ in range(size)]
    took = (max(times) - min(times)).total_seconds()
    return [Fact(f"burst of {size:,}, concurrency=10, from first to last", took, "s", poll)]


@contextmanager
def _worker(db: Database, poll: float, *, concurrency: int = 1) -> Iterator[SimpleQueue[datetime]]:
    """Run a worker, and yield when it sent each message."""
    Floor(db).empty()
    sent_at: SimpleQueue[datetime] = SimpleQueue()

    def send(message: OutgoingMessage) -> None:  # noqa: ARG001
        sent_at.put(datetime.now(UTC))

    stop = threading.Event()
    worker = Worker(db.engine, send, poll_interval=timedelta(seconds=poll), concurrency=concurrency)
    thread = threading.Thread(target=worker.run, args=[stop])
    thread.start()
    try:
        yield sent_at
    finally:
        stop.set()
        thread.join()
