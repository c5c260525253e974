"""Wake-ups: a host's commit starts a sleeping worker at once, and nothing that befalls one costs more than a poll."""

import asyncio
import logging
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

import pytest
from conftest import PATIENCE, execute, in_thread, new_message, queue, row, until
from sqlalchemy import create_engine, event, text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.pool import AssertionPool

from engagement import AsyncEngagementMessageRepository, EngagementMessageRepository, Worker, wake_workers
from engagement._delivery import listening
from engagement._delivery.sleep import Sleep

pytestmark = pytest.mark.direct("LISTEN takes a direct connection; test_pgbouncer.py has a worker behind a pooler")

# No test lasts for so long: whatever is sent was sent for a wake-up.
NEVER = timedelta(hours=1)
LISTENERS = "SELECT pid FROM pg_stat_activity WHERE query LIKE 'LISTEN engagement%' AND datname = current_database()"
NOTIFIERS = "SELECT pid FROM pg_stat_activity WHERE query = 'NOTIFY engagement_due' AND datname = current_database()"


@pytest.fixture(name="host")
def _host(engine):
    """The engine of a host that wakes workers."""
    host = create_engine(engine.url)
    wake_workers(host)
    yield host
    host.dispose()
    until(lambda: not pids(engine, NOTIFIERS))


def pids(engine, query: str) -> list[int]:
    return list(execute(engine, query).scalars())


class Sent(list):
    """The ids of what a worker has sent."""

    def __init__(self, engine) -> None:
        self._asked_at = time.monotonic()
        event.listen(engine, "before_cursor_execute", self._note)

    def _note(self, *_) -> None:
        if threading.current_thread() is not threading.main_thread():
            self._asked_at = time.monotonic()

    def rest(self) -> None:
        """Return when the worker asks the database nothing, so that it finds nothing by another look that it owes."""
        until(lambda: time.monotonic() > self._asked_at + 1.2)


@contextmanager
def working(engine, caplog, **options):
    """Run a worker that hears wake-ups and sleeps, and yield the ids of what it sends."""
    caplog.set_level(logging.INFO, logger="engagement")
    told, stop, sent = caplog.messages.count("engagement.listening"), threading.Event(), Sent(engine)
    given = {"poll_interval": NEVER, "wake_up": True} | options
    running = in_thread(Worker(engine, lambda message: sent.append(message.id), **given).run, stop)
    until(lambda: running.done() or caplog.messages.count("engagement.listening") > told)
    try:
        yield sent
    finally:
        stop.set()
        running.result(PATIENCE)


def test_a_commit_wakes_a_sleeping_worker(engine, host, caplog):
    """What is committed is sent without a poll, one by one and as a batch; what is rolled back wakes nobody."""
    with working(engine, caplog) as sent:
        for number in range(3):
            sent.rest()
            (message_id,) = queue(host, new_message(f"user{number}"))
            until(lambda: message_id in sent)  # noqa: B023
        sent.rest()
        with Session(host) as session, session.begin():
            EngagementMessageRepository(session).queue_messages([new_message("a"), new_message("b")])
        until(lambda: len(sent) == 5)
        with Session(host) as session:
            EngagementMessageRepository(session).queue_message(new_message("c"))
            session.rollback()
            session.execute(text("SELECT 1"))
            session.commit()
            assert "engagement_wakes" not in session.info


def test_the_end_of_a_savepoint_is_no_commit(engine, host, caplog):
    """The worker is woken by the commit of the whole, also if a later savepoint was rolled back."""
    with working(engine, caplog) as sent:
        with Session(host) as session, session.begin():
            with session.begin_nested():
                EngagementMessageRepository(session).queue_message(new_message())
            with session.begin_nested() as savepoint:
                session.execute(text("SELECT 1"))
                savepoint.rollback()
            assert session.info["engagement_wakes"]
        until(lambda: sent)


def test_the_message_of_a_slow_transaction_is_found(engine, host, caplog):
    """It lies before those that were claimed meanwhile, where the next claim does not begin."""
    with working(engine, caplog) as sent:
        with Session(host) as session, session.begin():
            EngagementMessageRepository(session).queue_message(new_message("slow"))
            for number in range(3):
                (message_id,) = queue(host, new_message(f"user{number}"))
                until(lambda: message_id in sent)  # noqa: B023
        until(lambda: len(sent) == 4)


def test_a_message_that_becomes_due_soon_is_waited_for(engine, host, caplog):
    """A worker that would sleep longer learns of it, and sends it at its moment."""
    due = datetime.now(UTC) + timedelta(seconds=0.5)
    with working(engine, caplog) as sent:
        (message_id,) = queue(host, new_message(scheduled_for=due))
        until(lambda: sent)
        assert until(lambda: row(engine, message_id).sent_at) >= due


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
def test_an_async_host_wakes_by_a_sync_engine(engine, caplog, driver):
    """`by` notifies for sessions of the async engine."""
    by = create_engine(engine.url)

    async def queue_it() -> None:
        host = create_async_engine(engine.url.set(drivername=f"postgresql+{driver}"))
        wake_workers(host, by=by)
        async with AsyncSession(host) as session, session.begin():
            await AsyncEngagementMessageRepository(session).queue_message(new_message())
        await host.dispose()

    with working(engine, caplog) as sent:
        asyncio.run(queue_it())
        until(lambda: sent)
    by.dispose()


def test_an_engine_that_cannot_notify_is_refused(engine):
    """The field is named, and what to do instead."""
    host = create_async_engine(engine.url)

    for arguments in ({}, {"by": host}):
        with pytest.raises(ValueError, match=rf"{'by' if arguments else 'engine'}: must be a sync Engine .* by=engine"):
            wake_workers(host, **arguments)


def test_a_host_whose_wake_ups_fail_is_none_the_worse(engine, caplog):
    """The message is committed, the pool of the host is not touched, and the error is told once."""
    host = create_engine(engine.url, poolclass=AssertionPool)  # It fails who takes a second connection.
    wake_workers(host)

    @event.listens_for(host, "do_connect")
    def refuse(*_) -> None:
        if threading.current_thread().name == "engagement-wake":
            raise RuntimeError("secret")

    for number in range(3):
        with Session(host) as session, session.begin():
            EngagementMessageRepository(session).queue_message(new_message(f"user{number}"))
    until(lambda: "engagement.not_woken error=RuntimeError" in caplog.messages)
    host.dispose()

    assert execute(engine, "SELECT count(*) FROM engagement_message_queue").scalar_one() == 3
    assert caplog.messages.count("engagement.not_woken error=RuntimeError") == 1
    assert "secret" not in caplog.text


def test_a_broken_line_of_the_host_is_made_anew(engine, host, caplog):
    """Its connection is ended by the server; that wake-up may be lost, and a later one is heard."""
    with working(engine, caplog) as sent:
        queue(host, new_message("a"))
        until(lambda: sent)
        (pid,) = until(lambda: pids(engine, NOTIFIERS))
        execute(engine, "SELECT pg_terminate_backend(:pid)", pid=pid)
        queue(host, new_message("b"))
        until(lambda: any("engagement.not_woken" in message for message in caplog.messages))
        queue(host, new_message("c"))
        until(lambda: len(sent) == 3)


def test_a_broken_line_of_the_worker_is_made_anew(engine, host, caplog, monkeypatch):
    """It is told once; the worker listens again, and then looks for what it may not have heard of."""
    monkeypatch.setattr(listening, "RETRY_SECONDS", 0.01)
    with working(engine, caplog) as sent:
        (pid,) = pids(engine, LISTENERS)
        execute(engine, "SELECT pg_terminate_backend(:pid)", pid=pid)
        queue(engine, new_message("nobody wakes for it"))
        until(lambda: sent)
        queue(host, new_message("b"))
        until(lambda: len(sent) == 2)

    assert sum("engagement.not_listening" in message for message in caplog.messages) == 1


def test_a_worker_that_cannot_hear_polls_and_says_so_once(engine, host, caplog, monkeypatch):
    """It listens on another database, as deaf as a pooler."""
    monkeypatch.setattr(listening, "PROOF_SECONDS", 0.1)
    monkeypatch.setattr(listening, "RETRY_SECONDS", 0.01)
    monkeypatch.setattr(listening, "LONGEST_RETRY_SECONDS", 0.01)
    elsewhere = create_engine(engine.url.set(database="postgres"))
    stop, sent, looks = threading.Event(), [], []
    caplog.set_level(logging.INFO, logger="engagement")

    @event.listens_for(elsewhere, "connect")
    def count(*_) -> None:
        looks.append(1)

    worker = Worker(
        engine,
        lambda message: sent.append(message.id),
        poll_interval=timedelta(seconds=0.05),
        wake_up=True,
        listen_on=elsewhere,
    )
    running = in_thread(worker.run, stop)
    until(lambda: len(looks) >= 3)
    queue(host, new_message())
    until(lambda: sent)
    stop.set()
    running.result(PATIENCE)
    elsewhere.dispose()

    assert [message for message in caplog.messages if "listening" in message] == ["engagement.not_listening error=Deaf"]


def test_forged_wake_ups_cost_a_hundred_looks_a_second_at_most():
    """After a look in vain, a wake-up is heeded a moment later; after one that found something, at once."""
    sleep = Sleep(5.0)
    assert sleep.woken(1.0) == 1.0
    sleep.claimed(1.0, any_=False)
    assert [sleep.woken(1.001), sleep.woken(1.009), sleep.woken(1.02)] == [1.01, 1.01, 1.02]
    sleep.claimed(2.0, any_=True)
    assert sleep.woken(2.001) == 2.001


def test_a_flood_is_read_in_gulps(engine, caplog):
    """A thousand forged wake-ups make the worker look a few times, and it still hears."""
    looks = []
    other = create_engine(engine.url)
    with working(other, caplog) as sent:
        event.listen(other, "after_cursor_execute", lambda *_: looks.append(1))
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            began = datetime.now(UTC)
            for _ in range(1000):
                connection.execute(text("NOTIFY engagement_due"))
        took = (datetime.now(UTC) - began).total_seconds()
        queue(engine, new_message())
        execute(engine, "NOTIFY engagement_due")
        until(lambda: sent)
    other.dispose()

    assert len(looks) <= 6 * (100 * took + 10)


def test_a_stop_is_heard_in_the_sleep(engine, caplog):
    """The run ends though nothing wakes it, and its listener is gone."""
    with working(engine, caplog):
        assert len(pids(engine, LISTENERS)) == 1
    until(lambda: not pids(engine, LISTENERS))


SCRIPT = """
import os, sys
from sqlalchemy import create_engine
from sqlalchemy.orm import Session
from engagement import Destination, EngagementMessageRepository, wake_workers

def queue(user):
    sys.stdin.buffer.raw.read(1)
    with Session(engine) as session, session.begin():
        EngagementMessageRepository(session).queue_message(
            user_id=user, message_type="goodbye", message_key="k", destination="individual",
            destination_jid=f"551199999000{user}@s.whatsapp.net")

engine = create_engine(sys.argv[1])
wake_workers(engine)
queue("1")
if sys.argv[2] != "exit":
    engine.dispose()
    if os.fork() == 0:
        engine.dispose(close=False)
        queue("2")
        sys.exit(0)
    assert os.wait()[1] == 0
if sys.argv[2] == "parent":
    queue("3")
"""


@pytest.mark.parametrize(("how", "messages"), [("exit", 1), ("child", 2), ("parent", 3)])
def test_a_process_that_ends_or_forks_wakes(engine, caplog, how, messages):
    """The last wake-up is sent before the end, and a child makes a line of its own."""
    command = [sys.executable, "-c", SCRIPT, engine.url.render_as_string(hide_password=False), how]
    with working(engine, caplog) as sent:
        script = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            for number in range(1, messages + 1):
                sent.rest()
                script.stdin.write("\n")
                script.stdin.flush()
                until(lambda: len(sent) == number)  # noqa: B023
            assert script.communicate(timeout=PATIENCE) == (None, "")
        finally:
            script.kill()
        assert script.returncode == 0


@pytest.mark.parametrize(("options", "field"), [({"wake_up": 1}, "wake_up"), ({"listen_on": True}, "listen_on")])
def test_the_options_are_checked(engine, options, field):
    """A bad one is named."""
    given = {"listen_on": engine} if "listen_on" in options else options
    with pytest.raises((TypeError, ValueError), match=field):
        Worker(engine, lambda _: None, **given)
