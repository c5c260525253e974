"""Callers who queue at once: one key is queued once, and batches that meet never deadlock."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from batches import chunks_of, keys, messages
from conftest import PATIENCE, execute, in_thread, new_message, row, wait_until_blocked
from sqlalchemy import Engine, text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from engagement import AsyncEngagementMessageRepository, EngagementMessageRepository, Queued, QueuedMany

# Races


def race_for_one_key(engine: Engine, *, winner_commits: bool) -> tuple[Queued, list[Queued]]:
    """Return the answers of a transaction that is held open until nineteen others wait for its key, and of those."""

    def queue_it():
        with Session(engine) as session, session.begin():
            return EngagementMessageRepository(session).queue_message(new_message())

    with ThreadPoolExecutor(19) as pool, Session(engine) as winner:
        first = EngagementMessageRepository(winner).queue_message(new_message())
        others = [pool.submit(queue_it) for _ in range(19)]
        wait_until_blocked(engine, 19)
        if winner_commits:
            winner.commit()
        else:
            winner.rollback()
        return first, [other.result(PATIENCE) for other in others]


def test_twenty_callers_queue_one_key_once(engine):
    """One of twenty that queue a key at once creates it, and the nineteen others name its row."""
    first, others = race_for_one_key(engine, winner_commits=True)

    assert first.created
    assert [other.created for other in others] == [False] * 19
    assert {other.message_id for other in others} == {first.message_id}
    assert len(keys(engine)) == 1


def test_if_the_winner_rolls_back_exactly_one_of_the_waiting_wins(engine):
    """Nothing is lost to a rival that rolled back: one of the nineteen that waited creates the message."""
    _, others = race_for_one_key(engine, winner_commits=False)

    assert sorted(other.created for other in others) == [False] * 18 + [True]
    (message_id,) = {other.message_id for other in others}
    assert row(engine, message_id).status == "pending"
    assert len(keys(engine)) == 1


def test_twenty_threads_that_start_together_queue_one_key_once(engine):
    """Without anybody's help with the order, one creates the message and nineteen name its row."""
    start = threading.Barrier(20)

    def queue_it(_):
        with Session(engine) as session, session.begin():
            session.connection()
            start.wait(PATIENCE)
            return EngagementMessageRepository(session).queue_message(new_message())

    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(queue_it, range(20)))

    assert sorted(answer.created for answer in answers) == [False] * 19 + [True]
    assert len({answer.message_id for answer in answers}) == 1


def test_async_callers_race_like_threads(engine):
    """Ten sessions of one event loop that queue a key at once create it once."""

    async def one(async_engine):
        async with AsyncSession(async_engine) as session, session.begin():
            return await AsyncEngagementMessageRepository(session).queue_message(new_message())

    async def all_at_once():
        async_engine = create_async_engine(engine.url, poolclass=NullPool)
        return await asyncio.gather(*(one(async_engine) for _ in range(10)))

    answers = asyncio.run(all_at_once())

    assert sorted(answer.created for answer in answers) == [False] * 9 + [True]
    assert len({answer.message_id for answer in answers}) == 1


# Batches


@pytest.mark.parametrize("chunk", [1000, 2], ids=["in one chunk", "in several"])
def test_concurrent_batches_in_opposite_orders_never_deadlock(engine, chunk):
    """Two batches with the same keys in opposite orders, both begun before either could end, wait for one another.

    A third transaction holds the middle key until both are blocked. Were keys taken in the order given, each batch
    would by then hold the one end of which the other one needs next.
    """
    batch = messages(9)

    def queue_all(given):
        with Session(engine) as session, session.begin():
            return EngagementMessageRepository(session).queue_messages(given)

    with chunks_of(chunk), Session(engine) as session:
        EngagementMessageRepository(session).queue_message(batch[4])
        there = in_thread(queue_all, batch)
        wait_until_blocked(engine, 1)
        back = in_thread(queue_all, batch[::-1])
        wait_until_blocked(engine, 2)
        session.rollback()
        answers = {there.result(PATIENCE), back.result(PATIENCE)}

    assert answers == {QueuedMany(9, 0), QueuedMany(0, 9)}


def test_a_batch_in_chunks_takes_no_key_before_it_has_all(engine):
    """Two batches that meet half-way, in different chunks, never deadlock.

    Each pauses after most of its keys until the other one is there too. Were each chunk inserted as it comes, both
    would by then hold what the other one needs next.
    """
    batch = messages(8)
    half_way = threading.Barrier(2)

    def produce(given):
        for number, message in enumerate(given):
            if number == 6:
                half_way.wait(PATIENCE)
            yield message

    def queue_all(given):
        with Session(engine) as session, session.begin():
            return EngagementMessageRepository(session).queue_messages(produce(given))

    with chunks_of(2):
        there, back = in_thread(queue_all, batch), in_thread(queue_all, batch[::-1])
        answers = {there.result(2 * PATIENCE), back.result(2 * PATIENCE)}

    assert answers == {QueuedMany(8, 0), QueuedMany(0, 8)}


def test_keys_are_taken_in_their_order_by_any_plan(engine):
    """Repeats may be looked for by a hash that memory cannot hold, whose parts then come one after the other."""
    batch = messages(4_000)
    with Session(engine) as session, session.begin():
        EngagementMessageRepository(session).queue_messages(batch[:3_000])
    execute(engine, "ANALYZE engagement_message_queue")

    with chunks_of(1_000), Session(engine) as session, session.begin():
        for setting in ("enable_nestloop = off", "enable_mergejoin = off", "work_mem = '64kB'"):
            session.execute(text(f"SET LOCAL {setting}"))
        assert EngagementMessageRepository(session).queue_messages(batch) == QueuedMany(1_000, 3_000)

    assert keys(engine) == [message.key for message in batch]


def test_many_batches_in_random_orders_never_deadlock(engine):
    """Six threads that queue the same keys in shuffled orders, in one chunk and in several, all come through."""
    batch = messages(400)
    start = threading.Barrier(6)

    def queue_all(turn):
        start.wait(PATIENCE)
        created = 0
        for repeat in range(3):
            shift = (turn * 67 + repeat * 131) % len(batch)
            given = (batch[shift:] + batch[:shift])[:: -1 if turn % 2 else 1]
            with Session(engine) as session, session.begin():
                created += (
                    EngagementMessageRepository(session).queue_messages(given if turn % 3 else given[:90]).created
                )
        return created

    with chunks_of(100), ThreadPoolExecutor(6) as pool:
        created = list(pool.map(queue_all, range(6)))

    assert sum(created) == len(keys(engine)) == 400
