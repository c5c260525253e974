"""Statements, commits and hooks that fail for a while or for good: what was sent is recorded before a run ends."""

import threading
import time
from datetime import timedelta

import pytest
from conftest import execute, in_thread, new_message, queue, row, until
from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.pool import NullPool

from crashes.accidents import PATIENCE_SECONDS, Running, Transport, an_engine, heard, is_true, lose, terminate
from engagement import Sent, Worker, process_message_queue
from engagement._delivery import one_by_one, outage
from engagement._sql.errors import is_undone

BREAK = """
CREATE FUNCTION pg_temp_break() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'broken'; END $$;
CREATE TRIGGER chaos_break BEFORE UPDATE ON engagement_message_queue FOR EACH ROW
WHEN ({when}) EXECUTE FUNCTION pg_temp_break();
"""
BREAK_EXTENSIONS_AT_COMMIT = """
CREATE FUNCTION pg_temp_break() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'broken'; END $$;
CREATE CONSTRAINT TRIGGER chaos_break AFTER UPDATE ON engagement_message_queue DEFERRABLE INITIALLY DEFERRED
FOR EACH ROW WHEN (old.status = 'sending' AND new.claimed_by = old.claimed_by AND new.status = 'sending')
EXECUTE FUNCTION pg_temp_break();
"""
SLOW_CLAIM = """
CREATE FUNCTION pg_temp_break() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(5); RETURN new; END $$;
CREATE TRIGGER chaos_break BEFORE UPDATE ON engagement_message_queue FOR EACH ROW
WHEN (old.status = 'pending' AND new.status = 'sending') EXECUTE FUNCTION pg_temp_break();
"""
EXTENSION_FAILED = "engagement.leases_not_extended error=LookupError"
MEND = """
DROP TRIGGER IF EXISTS chaos_break ON engagement_message_queue;
DROP FUNCTION IF EXISTS pg_temp_break;
"""


@pytest.fixture(name="break_when")
def _break_when(engine):
    yield lambda when: execute(engine, BREAK.format(when=when))
    execute(engine, MEND)


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("SELECT 1 / 0", True),
        ("SET LOCAL statement_timeout = 1; SELECT pg_sleep(60)", True),
        # It may come after the commit, which then waited for a standby.
        ("SELECT pg_terminate_backend(pg_backend_pid())", False),
    ],
)
def test_only_a_server_that_goes_on_has_undone_a_transaction(engine, statement, expected):
    """A claim of which this is not known is looked for again, and adopted if it is there."""
    with pytest.raises(DBAPIError) as caught, engine.begin() as connection:
        connection.execute(text(statement))

    assert is_undone(caught.value) is expected


def test_an_error_of_the_claim_does_not_delay_what_is_known(engine, break_when, monkeypatch):
    """When claiming breaks for good, what was just sent is settled at once, and then the error is raised."""
    monkeypatch.setattr(one_by_one, "MOST_BROKEN", 1)
    sent, waiting = queue(engine, new_message("sent"), new_message("waiting"))

    def send(_):
        break_when("old.status = 'pending' AND new.status = 'sending'")
        return Sent()

    run = in_thread(process_message_queue, engine, send)
    until(lambda: row(engine, sent).status == "sent")
    with pytest.raises(DBAPIError, match="broken"):
        run.result(PATIENCE_SECONDS)

    assert row(engine, waiting).status == "pending"


@pytest.mark.direct("it gives the server options at its start")
@pytest.mark.usefixtures("break_when")
def test_a_claim_that_fails_again_and_again_does_not_delay_what_is_known(engine, monkeypatch):
    """While each claim outlasts the host's `statement_timeout`, what is known is settled, and leases are extended."""
    monkeypatch.setattr(outage, "WAIT_SECONDS", (10.0, 10.0))  # Longer than a lease, from the beginning.
    first, second = queue(engine, new_message("first"), new_message("second"))
    may_end = {first: threading.Event(), second: threading.Event()}
    are_sending, adoptions = threading.Semaphore(0), []

    def send(message):
        are_sending.release()
        assert may_end[message.id].wait(PATIENCE_SECONDS)

    with (
        an_engine(engine.url, connect_args={"options": "-c statement_timeout=600"}) as hasty,
        Running(hasty, send, lease=timedelta(seconds=1.5), concurrency=2),
    ):

        @event.listens_for(hasty, "before_cursor_execute")
        def note(_conn, _cursor, _statement, parameters, *_):
            if "names" in parameters and "held" not in parameters:
                adoptions.append(parameters["names"])

        for _ in may_end:
            assert are_sending.acquire(timeout=PATIENCE_SECONDS)
        execute(engine, SLOW_CLAIM)
        third = queue(engine, new_message("third"))
        may_end[first].set()
        until(lambda: row(engine, first).status == "sent")
        for _ in range(3):
            lease = row(engine, second).lease_expires_at
            until(lambda lease=lease: row(engine, second).lease_expires_at > lease)
        may_end[second].set()
        until(lambda: row(engine, second).status == "sent")
        assert row(engine, third[0]).status == "pending"
    assert adoptions == [], "the server has said that it undid those claims"


@pytest.mark.direct("it gives the server options at its start")
@pytest.mark.usefixtures("break_when")
def test_a_run_that_gives_up_finishes_what_it_has_in_hand(engine):
    """A cron job whose claims fail for longer than a lease ends with the error, and records its send before."""
    (in_hand,) = queue(engine, new_message())
    is_sending, may_end = threading.Event(), threading.Event()

    def send(_):
        is_sending.set()
        assert may_end.wait(PATIENCE_SECONDS)

    with an_engine(engine.url, connect_args={"options": "-c statement_timeout=600"}) as hasty:
        run = in_thread(process_message_queue, hasty, send, lease=timedelta(seconds=2), concurrency=2)
        assert is_sending.wait(PATIENCE_SECONDS)
        execute(engine, SLOW_CLAIM)
        (waiting,) = queue(engine, new_message("waiting"))
        with heard("engagement.database_lost") as is_lost:
            assert is_lost.wait(PATIENCE_SECONDS)
        for _ in range(6):  # Two leases: a third of one each.
            lease = row(engine, in_hand).lease_expires_at
            until(lambda lease=lease: row(engine, in_hand).lease_expires_at > lease)
        may_end.set()
        with pytest.raises(DBAPIError, match="statement timeout"):
            run.result(PATIENCE_SECONDS)

    assert (row(engine, in_hand).status, row(engine, waiting).status) == ("sent", "pending")


def test_a_run_that_gives_up_waits_for_its_send_though_a_commit_was_not_acknowledged(engine):
    """A cron job whose database is away for longer than two leases still records what it sent meanwhile."""
    (message_id,) = queue(engine, new_message())
    is_sending, may_end, is_away, tries = threading.Event(), threading.Event(), threading.Event(), []

    def send(_):
        is_sending.set()
        assert may_end.wait(PATIENCE_SECONDS)

    with an_engine(engine.url, poolclass=NullPool) as hooked, heard(EXTENSION_FAILED) as cannot_extend:

        @event.listens_for(hooked, "do_connect")
        def token(*_):
            if is_away.is_set():
                tries.append(time.monotonic())
                raise LookupError("no token")

        @event.listens_for(hooked, "commit")
        def cut_off(conn):
            if is_sending.is_set() and not tries:
                is_away.set()
                terminate(engine, conn)

        run = in_thread(process_message_queue, hooked, send, lease=timedelta(seconds=1), concurrency=2)
        assert cannot_extend.wait(PATIENCE_SECONDS)
        until(lambda: run.done() or tries[-1] > tries[0] + 4)  # More than two leases, and their waits.
        assert not run.done()
        is_away.clear()
        may_end.set()
        with pytest.raises(SQLAlchemyError):
            run.result(PATIENCE_SECONDS)

    assert row(engine, message_id).status == "sent"


def test_a_hook_of_the_host_that_fails_is_no_end(engine):
    """Who makes the connections may fail for a while, as one that gets a token does: what was sent is not forgotten."""
    slow, quick = queue(engine, new_message("slow"), new_message("quick"))
    is_broken, may_end, tries = threading.Event(), threading.Event(), []

    def send(message):
        is_broken.set()
        if message.id == slow:
            assert may_end.wait(PATIENCE_SECONDS)

    with an_engine(engine.url, poolclass=NullPool) as hooked:

        @event.listens_for(hooked, "do_connect")
        def token(*_):
            if is_broken.is_set():
                tries.append(1)
                raise LookupError("no token")

        with Running(hooked, send, lease=timedelta(seconds=1.5), concurrency=2), heard(EXTENSION_FAILED) as is_heard:
            assert is_heard.wait(PATIENCE_SECONDS)
            until(lambda: len(tries) > 3)
            is_broken.clear()
            until(lambda: row(engine, quick).status == "sent")
            may_end.set()
            until(lambda: row(engine, slow).status == "sent")


def test_a_hook_that_never_worked_ends_the_run(engine):
    """Who starts a worker that can never connect sees why."""
    with an_engine(engine.url, poolclass=NullPool) as hooked:

        @event.listens_for(hooked, "do_connect")
        def token(*_):
            raise LookupError("no token")

        with pytest.raises(LookupError, match="no token"):
            Worker(hooked, Transport()).run(threading.Event())


def test_an_error_of_the_extension_does_not_lose_the_send_in_hand(engine, break_when):
    """When leases cannot be extended for good, the send in hand is still settled before the error is raised."""
    (message_id,) = queue(engine, new_message())
    is_sending, may_end = threading.Event(), threading.Event()

    def send(_):
        break_when("old.status = 'sending' AND new.status = 'sending'")
        is_sending.set()
        assert may_end.wait(PATIENCE_SECONDS)
        return Sent()

    run = in_thread(process_message_queue, engine, send, lease=timedelta(seconds=0.3))
    assert is_sending.wait(PATIENCE_SECONDS)
    until(lambda: run.done() or is_true(engine, "SELECT max(lease_expires_at) < now() FROM engagement_message_queue"))
    may_end.set()
    with pytest.raises(DBAPIError, match="broken"):
        run.result(PATIENCE_SECONDS)

    assert row(engine, message_id).status == "sent"


def test_an_extension_that_was_not_committed_is_not_believed(engine, break_when):
    """While the commit of an extension fails, the lease runs out, and what was not begun by then is not sent."""
    first, second = queue(engine, new_message("first"), new_message("second"))
    execute(engine, BREAK_EXTENSIONS_AT_COMMIT)
    is_sending, may_end, sent = threading.Event(), threading.Event(), []

    async def send(message):
        sent.append(message.id)
        is_sending.set()
        assert may_end.wait(PATIENCE_SECONDS)  # In the event loop: the second send cannot begin.

    run = in_thread(process_message_queue, engine, send, lease=timedelta(seconds=0.5), concurrency=2)
    assert is_sending.wait(PATIENCE_SECONDS)
    until(lambda: is_true(engine, "SELECT max(lease_expires_at) < now() FROM engagement_message_queue"))
    may_end.set()
    with pytest.raises(DBAPIError, match="broken"):
        run.result(PATIENCE_SECONDS)

    assert sent == [first]
    assert (row(engine, first).status, row(engine, second).status) == ("sent", "pending")


def test_a_look_up_that_comes_late_is_not_taken_for_a_send_that_was_not_begun(engine, break_when):
    """What a lost worker may have sent stays in question, also when the lease of who asks has run out meanwhile."""
    ids = queue(engine, new_message("first"), new_message("second"))
    lose(engine, *ids)
    execute(engine, BREAK_EXTENSIONS_AT_COMMIT)
    is_asking, may_go_on, sent = threading.Event(), threading.Event(), []

    class Slow:
        def send(self, message):
            sent.append(message.id)

        async def look_up(self, _):
            is_asking.set()
            assert may_go_on.wait(PATIENCE_SECONDS)  # In the event loop: the second one cannot begin.

    run = in_thread(process_message_queue, engine, Slow(), lease=timedelta(seconds=0.5), concurrency=2)
    assert is_asking.wait(PATIENCE_SECONDS)
    until(lambda: is_true(engine, "SELECT max(lease_expires_at) < now() FROM engagement_message_queue"))
    may_go_on.set()
    with pytest.raises(DBAPIError, match="broken"):
        run.result(PATIENCE_SECONDS)

    assert [row(engine, message_id).status for message_id in ids] == ["in_doubt", "in_doubt"]
    assert sent == []
