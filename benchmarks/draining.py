"""Work 4: drain messages with a transport that does nothing."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from multiprocessing import get_context
from typing import Any

from sqlalchemy import URL, text

from benchmarks.floors import Floor
from benchmarks.given import given
from benchmarks.limits import FloorInSQLAlchemy, OurStatements
from benchmarks.measuring import Contender, compare, timed
from benchmarks.ours import Ours, send
from benchmarks.peers import peers
from benchmarks.queues import Queue
from benchmarks.server import Database, database
from benchmarks.setup import Setup
from engagement import process_message_queue

HEAD_START_SECONDS = 0.05
"""How long before a common start the processes are told of it."""


def drain(setup: Setup) -> Iterator[str]:
    """Drain in batches, with many threads, and one at a time; then with two processes."""
    size, few = setup.size(20_000, 400), setup.size(1_000, 40)
    with database(setup.url) as db, peers(setup) as others:
        floor = Floor(db, batch=1000)
        batches, threads = Ours(db, many=True, concurrency=1000), Ours(db, concurrency=100)
        contenders = [
            Contender(floor.name, partial(_drained, floor, size)),
            *_limits(db, floor, size),
            Contender(batches.name, partial(_drained, batches, size), floor.name, 0.9),
            Contender(threads.name, partial(_drained, threads, size), floor.name, 0.45),
            *(Contender(peer.name, partial(_drained, peer, size), floor.name) for peer in others),
        ]
        yield compare(f"drain {size:,}", contenders, rounds=setup.rounds, warm_up=not setup.small).table()
        floor, ours = Floor(db, batch=1), Ours(db)
        contenders = [
            Contender(floor.name, partial(_drained, floor, few)),
            *_limits(db, floor, few),
            Contender(ours.name, partial(_drained, ours, few), floor.name, 0.9),
        ]
        yield compare(f"drain {few:,}", contenders, rounds=setup.rounds, warm_up=not setup.small).table()
        with processes(db, _no_transport) as drained_by:
            for concurrency, how_many in ((1, 2 * few), (100, size)):
                contenders = [
                    Contender("one process", partial(drained_by, 1, concurrency, how_many)),
                    Contender("two processes", partial(drained_by, 2, concurrency, how_many), "one process", 1.4),
                ]
                title = f"drain {how_many:,}, a function, concurrency={concurrency}"
                yield compare(title, contenders, rounds=setup.rounds, warm_up=not setup.small).table()


def _limits(db: Database, floor: Floor, size: int) -> Iterator[Contender]:
    for limit in (FloorInSQLAlchemy(db, batch=floor.batch), OurStatements(db, batch=floor.batch)):
        yield Contender(limit.name, partial(_drained, limit, size), floor.name)


def _drained(queue: Queue, size: int) -> float:
    queue.empty()
    queue.fill(given(size))
    part = queue.drain()
    with timed() as timer:
        part()
    return size / timer.seconds


@contextmanager
def processes(db: Database, make_transport: Callable[[], Any]) -> Iterator[Callable[[int, int, int], float]]:
    """Yield a function that drains with so many processes, and returns their common rate.

    Each process has a transport of its own.
    """
    with ExitStack() as stack:
        pools = [stack.enter_context(ProcessPoolExecutor(1, mp_context=get_context("spawn"))) for _ in range(2)]

        def drained_by(how_many: int, concurrency: int, size: int) -> float:
            Floor(db).empty()
            Floor(db).fill(given(size))
            for pool in pools:
                pool.submit(_warm_up, db.url).result()
            start_at = time.monotonic() + HEAD_START_SECONDS
            begin = partial(_drain_in_a_process, db.url, make_transport, concurrency, start_at)
            runs = [pool.submit(begin) for pool in pools[:how_many]]
            return size / (max(run.result() for run in runs) - start_at)

        yield drained_by


@cache
def _database(url: URL) -> Database:
    return Database(url)


def _warm_up(url: URL) -> None:
    with _database(url).engine.connect() as connection:
        connection.execute(text("SELECT 1"))


def _no_transport() -> Any:
    return send


def _drain_in_a_process(url: URL, make_transport: Callable[[], Any], concurrency: int, start_at: float) -> float:
    """Return the time of the end. The monotonic clock is the same in all processes."""
    engine, transport = _database(url).engine, make_transport()
    time.sleep(max(0.0, start_at - time.monotonic()))
    process_message_queue(engine, transport, concurrency=concurrency)
    return time.monotonic()
