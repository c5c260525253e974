"""Behind PgBouncer in transaction mode, where each transaction may get another connection of the server."""

import asyncio
import os
import select
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from conftest import new_message, queue, row, until
from pgbouncer import PgBouncer, pgbouncer
from sqlalchemy import Engine, create_engine, event, text
from sqlalchemy.exc import ProgrammingError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from engagement import (
    AsyncEngagementMessageRepository,
    EngagementMessageRepository,
    Sent,
    Worker,
    migrations,
    process_message_queue,
    wake_workers,
)

PATIENCE = 20
FOR_POOLERS = {"prepare_threshold": None}


@pytest.fixture(scope="module", name="pooler")
def _pooler(migrated_template) -> Iterator[PgBouncer]:
    # A setting that differs from the server's own, so that one that is left behind can be told.
    with pgbouncer(migrated_template, pool_size=4, connect_query="SET synchronous_commit = off") as pooler:
        yield pooler


@pytest.fixture(name="pooled")
def _pooled(pooler, engine) -> Iterator[Engine]:
    """An engine that reaches the database of `engine` through the pooler."""
    pooled = create_engine(pooler.url(engine.url.database), connect_args=FOR_POOLERS, pool_size=30)
    yield pooled
    pooled.dispose()


def left_behind(engine: Engine) -> list:
    """Return the settings, temporary tables, prepared statements and locks that outlived their transactions."""
    question = text("""
        SELECT name FROM pg_settings WHERE name IN ('synchronous_commit', 'lock_timeout', 'search_path')
                                       AND setting NOT IN ('off', '0', '"$user", public')
        UNION ALL SELECT relname FROM pg_class WHERE relpersistence = 't'
        UNION ALL SELECT name FROM pg_prepared_statements
        UNION ALL SELECT locktype FROM pg_locks WHERE locktype = 'advisory'
              AND database = (SELECT oid FROM pg_database WHERE datname = current_database())""")
    # As many at once as the pooler has connections of the server, so that each of them is asked.
    connections = [engine.connect() for _ in range(4)]
    try:
        return [found for connection in connections for found in connection.execute(question).scalars()]
    finally:
        for connection in connections:
            connection.close()


def count(engine: Engine) -> int:
    with engine.connect() as connection:
        return connection.scalar(text("SELECT count(*) FROM engagement_message_queue"))


# psycopg's default is 5.
@pytest.mark.parametrize("prepare_threshold", [None, 5])
def test_the_one_argument_is_needed(migrated_template, engine, prepare_threshold):
    """Two clients that meet on one connection of the server disturb each other, unless nothing is prepared on it."""
    with pgbouncer(migrated_template, pool_size=1) as pooler:
        pooled = create_engine(pooler.url(engine.url.database), connect_args={"prepare_threshold": prepare_threshold})

        def both_queue() -> None:
            with pooled.connect() as one, pooled.connect() as other:
                for number in range(20):
                    for client in (one, other):
                        EngagementMessageRepository(Session(client)).queue_message(new_message(f"user{number}"))
                        client.commit()

        if prepare_threshold is None:
            both_queue()
            assert count(engine) == 20
        else:
            with pytest.raises(ProgrammingError, match=r"prepared statement .* (already exists|does not exist)"):
                both_queue()
        pooled.dispose()


def test_a_message_is_queued_in_the_hosts_transaction(pooled):
    """What is rolled back leaves nothing, also to a savepoint; what is committed is there once."""
    with Session(pooled) as session:
        messages = EngagementMessageRepository(session)
        assert messages.queue_message(new_message("a")).created
        session.rollback()
        with session.begin():
            with session.begin_nested() as savepoint:
                messages.queue_message(new_message("a"))
                savepoint.rollback()
            assert messages.queue_message(new_message("b")).created
            assert not messages.queue_message(new_message("b")).created

    assert count(pooled) == 1
    assert left_behind(pooled) == []


def test_a_message_is_queued_in_an_async_transaction(pooled):
    """The same for an async host, whose engine takes the same argument."""

    async def run() -> list[bool]:
        engine = create_async_engine(pooled.url, connect_args=FOR_POOLERS)
        created = []
        async with AsyncSession(engine) as session:
            messages = AsyncEngagementMessageRepository(session)
            for _ in range(8):  # More often than it takes for a statement to be prepared.
                created.append((await messages.queue_message(new_message("a"))).created)
                await session.rollback()
            created.append((await messages.queue_message(new_message("a"))).created)
            await session.commit()
        await engine.dispose()
        return created

    assert asyncio.run(run()) == [True] * 9
    assert count(pooled) == 1


def test_large_batches_do_not_meet_in_their_temporary_tables(pooled, monkeypatch):
    """Batches at once, over the same keys in different orders, gather on connections that they share with others."""
    monkeypatch.setattr("engagement._queueing.batch.CHUNK", 20)
    messages = [new_message(f"user{number}") for number in range(200)]

    def queue_batch(number: int) -> int:
        with Session(pooled) as session, session.begin():
            batch = messages if number % 2 else reversed(messages)
            return EngagementMessageRepository(session).queue_messages(batch).created

    with ThreadPoolExecutor(4) as threads:
        created = sum(threads.map(queue_batch, range(8), timeout=PATIENCE))

    assert (created, count(pooled)) == (200, 200)
    assert left_behind(pooled) == []


def test_one_key_is_created_once(pooled):
    """Twenty clients on four connections queue the same key: one creates it, and nineteen are told the same row."""
    together = threading.Barrier(20)

    def queue_it(_number: int):
        together.wait(PATIENCE)
        with Session(pooled) as session, session.begin():
            return EngagementMessageRepository(session).queue_message(new_message())

    with ThreadPoolExecutor(20) as threads:
        answers = list(threads.map(queue_it, range(20), timeout=PATIENCE))

    assert Counter(answer.created for answer in answers) == {True: 1, False: 19}
    assert len({answer.message_id for answer in answers}) == 1


@pytest.mark.parametrize("in_order", [False, True])
def test_several_processors_send_each_message_once(pooled, in_order):
    """Three processors, through the pooler, share the work and leave no setting behind."""
    ids = queue(pooled, *(new_message(f"user{number}") for number in range(60)))
    sent = []

    def process(_number: int) -> int:
        options = {"concurrency": 5, "in_order": in_order}
        return process_message_queue(pooled, lambda message: sent.append(message.id), **options).succeeded

    with ThreadPoolExecutor(3) as threads:
        succeeded = sum(threads.map(process, range(3), timeout=PATIENCE))

    assert (sorted(sent), succeeded) == (ids, 60)
    assert left_behind(pooled) == []


def test_what_a_lost_worker_left_is_recovered(pooled):
    """A lease that ran out is taken over through the pooler: asked for, or parked; one that holds is left alone."""
    lost, holding = queue(pooled, new_message("a"), new_message("b"))
    with pooled.begin() as connection:
        connection.execute(
            text("""
            UPDATE engagement_message_queue SET status = 'sending', attempt = 1, claimed_by = 'lost',
                   lease_expires_at = now() + CASE id WHEN :lost THEN interval '-1 s' ELSE interval '1 h' END"""),
            {"lost": lost},
        )

    class LooksUp:
        def send(self, _message):
            raise AssertionError("nothing is due")

        def look_up(self, _message):
            return Sent("wamid.1")

    process_message_queue(pooled, LooksUp())

    assert (row(pooled, lost).status, row(pooled, lost).provider_message_id) == ("sent", "wamid.1")
    assert row(pooled, holding).status == "sending"


def test_a_cut_behind_the_pooler_is_waited_for(engine, pooled):
    """The pooler's connection to the server is lost before a commit: nothing is lost, in doubt, or sent twice."""
    ids = queue(engine, new_message("a"), new_message("b"))
    sent, claims, cut = [], [], []

    @event.listens_for(pooled, "after_cursor_execute")
    def cut_once(connection, _cursor, statement, *_) -> None:
        claims.extend(["one"] if "lease_expires_at=CASE" in statement else [])
        # The second claim's transaction records the first send too, and is about to commit.
        if len(claims) != 2 or cut:
            return
        client = connection.connection.dbapi_connection
        cut.append(client.execute("SELECT pg_backend_pid()").fetchone()[0])
        with engine.begin() as direct:
            direct.execute(text("SELECT pg_terminate_backend(:pid)"), {"pid": cut[0]})
        assert select.select([client.fileno()], [], [], PATIENCE)[0]  # The pooler has told the client.

    result = process_message_queue(pooled, lambda message: sent.append(message.id))

    assert len(cut) == 1
    assert (sent, result.succeeded) == (ids, 2)
    assert {(row(engine, message_id).status, row(engine, message_id).attempt) for message_id in ids} == {("sent", 1)}


def test_a_send_outlives_the_pooler(pooler, pooled):
    """The pooler is restarted in the middle of a send: the worker waits for it, and records what it knows."""
    first, second = queue(pooled, new_message("a"), new_message("b"))
    sent = []

    def send(message):
        if not sent:
            pooler.stop()
            threading.Timer(0.3, pooler.start).start()
        sent.append(message.id)
        return Sent()

    result = process_message_queue(pooled, send, lease=timedelta(minutes=1))

    assert (sent, result.succeeded) == ([first, second], 2)
    assert row(pooled, first).status == "sent"


@pytest.mark.parametrize("is_direct", [False, True])
def test_a_worker_behind_a_pooler_knows_whether_it_hears(engine, pooled, caplog, monkeypatch, is_direct):
    """Through the pooler it says once that it does not, and polls; by a direct engine it is woken."""
    monkeypatch.setattr("engagement._delivery.listening.PROOF_SECONDS", 0.5 if not is_direct else PATIENCE)
    caplog.set_level("INFO", logger="engagement")
    stop, sent = threading.Event(), threading.Event()
    options = {"listen_on": engine, "poll_interval": timedelta(hours=1)} if is_direct else {}
    worker = Worker(pooled, lambda _: sent.set(), wake_up=True, **{"poll_interval": timedelta(seconds=0.1)} | options)
    thread = threading.Thread(target=worker.run, args=[stop], daemon=True)
    thread.start()
    said = "engagement.listening" if is_direct else "engagement.not_listening error=Deaf"
    until(lambda: said in caplog.messages)
    if is_direct:
        wake_workers(pooled)
    queue(pooled, new_message())
    assert sent.wait(PATIENCE)
    stop.set()
    thread.join(PATIENCE)

    assert [message for message in caplog.messages if "listening" in message] == [said]


def test_migrations_take_a_direct_connection(pooler, empty_engine):
    """Migrated directly, the table is there for all who come through the pooler; a lock of ours is not."""
    migrations.upgrade(empty_engine)
    pooled = create_engine(pooler.url(empty_engine.url.database), connect_args=FOR_POOLERS)
    try:
        queue(pooled, new_message())
        assert left_behind(pooled) == []
        migrations.upgrade(pooled)

        assert process_message_queue(pooled, lambda _: None).succeeded == 1
        assert left_behind(pooled) == []
    finally:
        pooled.dispose()


def test_the_command_line_works_behind_a_pooler(migrated_template, engine, tmp_path):
    """Two runs of the command, one after the other on one connection of the server, both send."""
    (tmp_path / "provider.py").write_text("def send(message): ...")
    command = [sys.executable, "-c", "from engagement.cli import main; main()", "process", "--transport"]
    with pgbouncer(migrated_template, pool_size=1) as pooler:
        environment = os.environ | {
            "ENGAGEMENT_DATABASE_URL": pooler.url(engine.url.database).render_as_string(),
            "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path]),
        }
        for run in ("a", "b"):
            ids = queue(engine, *(new_message(f"{run}{number}") for number in range(8)))
            subprocess.run([*command, "provider:send"], env=environment, timeout=60, check=True)

            assert {row(engine, message_id).status for message_id in ids} == {"sent"}
