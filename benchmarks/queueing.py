"""Works 1 to 3: queue many, queue many of which most are there, queue one."""

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context

from sqlalchemy import URL
from sqlalchemy.orm import Session

from benchmarks.floors import Floor
from benchmarks.given import given, new_messages, stream
from benchmarks.measuring import Contender, Fact, compare, facts, peak_megabytes, timed
from benchmarks.ours import Ours
from benchmarks.peers import peers
from benchmarks.queues import Queue, Timed
from benchmarks.server import Database, database
from benchmarks.setup import Setup
from engagement import EngagementMessageRepository

CLIENTS = 8
SHARE_THERE = 0.9


def queue_many(setup: Setup) -> Iterator[str]:
    """Queue 100,000 at once: none there, and 90 % there. Then the client's peak memory, up to a million."""
    size = setup.size(100_000, 2_000)
    with database(setup.url) as db, peers(setup) as others:
        floor, ours = Floor(db), Ours(db)
        contenders = [
            Contender("floor: unnest of binary arrays", lambda: _many(floor, size)),
            Contender("queue_messages", lambda: _many(ours, size), "floor: unnest of binary arrays", 0.9),
            Contender("floor, 90 % there", lambda: _many(floor, size, SHARE_THERE)),
            Contender("queue_messages, 90 % there", lambda: _many(ours, size, SHARE_THERE), "floor, 90 % there", 0.8),
        ]
        for peer in others:
            contenders += [
                Contender(peer.name, lambda peer=peer: _many(peer, size // 10), contenders[0].name),
                Contender(
                    f"{peer.name}, 90 % there",
                    lambda peer=peer: _many(peer, size // 10, SHARE_THERE),
                    contenders[2].name,
                ),
            ]
        comparison = compare(f"queue {size:,} at once", contenders, rounds=setup.rounds, warm_up=not setup.small)
        yield comparison.table()
        gain = comparison.ratio("queue_messages, 90 % there", "queue_messages")
        peaks = {count: _peak_in_a_process(db, count) for count in (size, setup.size(1_000_000, size))}
        yield facts(
            "queue_messages",
            [
                Fact("90 % there, by none there", gain, "times as fast", at_least=1),
                *(Fact(f"peak memory, {count:,} messages", peak, "MB", at_most=120) for count, peak in peaks.items()),
            ],
        )


def queue_one(setup: Setup) -> Iterator[str]:
    """Queue one message in a transaction of its own: one client, and eight."""
    size = setup.size(1_000, 40)
    with database(setup.url) as db, peers(setup) as others:
        floor, ours = Floor(db), Ours(db)
        contenders = [
            Contender("floor: BEGIN, INSERT, COMMIT", lambda: _each(floor, size)),
            Contender("queue_message", lambda: _each(ours, size), "floor: BEGIN, INSERT, COMMIT", 0.6),
            Contender("floor, 8 threads", lambda: _each(floor, size, CLIENTS)),
            Contender("queue_message, 8 threads", lambda: _each(ours, size, CLIENTS), "floor, 8 threads", 0.5),
        ]
        contenders += [Contender(p.name, lambda p=p: _each(p, size), contenders[0].name) for p in others]
        yield compare("queue one at a time", contenders, rounds=setup.rounds, warm_up=not setup.small).table()


def _many(queue: Queue, size: int, share_there: float = 0.0) -> float:
    rows = given(size)
    queue.empty()
    queue.fill(rows[: int(size * share_there)])
    return size / _seconds(queue.queue_many(rows))


def _each(queue: Queue, size: int, threads: int = 1) -> float:
    queue.empty()
    parts = [queue.queue_each(given(size)) for _ in range(threads)]
    if threads == 1:
        return size / _seconds(parts[0])
    with ThreadPoolExecutor(threads) as pool:
        return size * threads / _seconds(lambda: list(pool.map(lambda part: part(), parts)))


def _seconds(part: Timed) -> float:
    with timed() as timer:
        part()
    return timer.seconds


def _peak_in_a_process(db: Database, size: int) -> float:
    db.execute("TRUNCATE engagement_message_queue")
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_peak, db.url, size).result()


def _peak(url: URL, size: int) -> float:
    """Queue rows that are made as they are asked for, and return the megabytes that this process ever held."""
    with Session(Database(url).engine) as session, session.begin():
        EngagementMessageRepository(session).queue_messages(new_messages(stream(range(size))))
    return peak_megabytes()
