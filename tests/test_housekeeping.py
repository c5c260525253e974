"""A worker that keeps house: it prunes and verifies beside its sends, one worker at a time, and survives what fails."""

import logging
import os
import signal
import threading
import time
from collections import Counter
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta

import pytest
from commands import scalar
from conftest import in_thread, new_message, queue, row, until
from crashes.accidents import Running
from sqlalchemy import event, func, select, text
from sqlalchemy.orm import Session

from engagement import (
    EngagementMessage,
    EngagementMessageRepository,
    NewMessage,
    Sent,
    Worker,
    migrations,
    process_message_queue,
)
from engagement._operating import housekeeping
from engagement.cli import cli
from engagement.verification import Violation

DAY = timedelta(days=1)
OFTEN = timedelta(milliseconds=100)
PRUNED = "SELECT count(*) FROM engagement_message_queue WHERE destination_jid IS NULL"


@pytest.fixture(name="often", autouse=True)
def _often(monkeypatch):
    """Let pruning come round as often as these tests need it, and let nothing be waited for."""
    monkeypatch.setattr(housekeeping, "PRUNE_EVERY", OFTEN)
    monkeypatch.setattr(housekeeping, "PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(housekeeping, "GRACE_SECONDS", 0.0)
    monkeypatch.setattr(housekeeping, "CLOSE_SECONDS", 20.0)


def queue_finished(engine, *, days_ago: int, how_many: int = 1, schema: str | None = None) -> list[NewMessage]:
    """Queue messages that were sent so many days ago."""
    then = datetime.now(UTC) - days_ago * DAY
    messages = [new_message(f"of-{days_ago}-{number}", scheduled_for=then) for number in range(how_many)]
    with Session(engine) as session, session.begin():
        EngagementMessageRepository(session, schema=schema).queue_messages(messages)
    assert process_message_queue(engine, lambda _: Sent(), concurrency=100, schema=schema).succeeded == how_many
    return messages


@contextmanager
def lock_of(engine, task: str):
    """Be another worker that is at `task`."""
    key = func.hashtextextended(f"engagement_housekeeping:public:{task}", 0)
    with engine.begin() as connection:
        until(lambda: connection.scalar(select(func.pg_try_advisory_xact_lock(key))))
        yield


def housekeepers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name in {"engagement-prune", "engagement-verify"}]


def test_a_worker_keeps_no_house_unless_it_is_asked(engine):
    """By default there is no thread for it, and nothing is pruned."""
    queue_finished(engine, days_ago=900)

    with Running(engine, lambda _: Sent()):
        sent = queue(engine, new_message("today"))
        until(lambda: row(engine, sent[0]).status == "sent")
        assert housekeepers() == []

    assert scalar(engine, PRUNED) == 0


@pytest.mark.parametrize("schema", [None, "guest"])
def test_a_worker_prunes_what_is_old(empty_engine, schema):
    """What was last due before `prune_older_than` is blanked while the worker sends; younger ones stay as they are."""
    migrations.upgrade(empty_engine, schema=schema)
    (old,) = queue_finished(empty_engine, days_ago=31, schema=schema)
    (young,) = queue_finished(empty_engine, days_ago=29, schema=schema)

    def found(message: NewMessage) -> EngagementMessage:
        with Session(empty_engine) as session:
            return EngagementMessageRepository(session, schema=schema).get_message_by_key(message.key)

    with Running(empty_engine, lambda _: Sent(), prune_older_than=30 * DAY, schema=schema):
        until(lambda: found(old).destination_jid is None)

    assert found(old).history[-1]["event"] == "pruned"
    assert found(young).destination_jid is not None
    with Session(empty_engine) as session:
        assert EngagementMessageRepository(session, schema=schema).queue_message(old).created is False


def test_each_batch_is_a_transaction_of_its_own(engine, monkeypatch, caplog):
    """No lock is held for longer than a batch takes: of 25 messages, 10, 10 and 5 are pruned, each committed."""
    monkeypatch.setattr(housekeeping, "PRUNE_BATCH", 10)
    caplog.set_level(logging.INFO, "engagement")
    queue_finished(engine, days_ago=40, how_many=25)

    with Running(engine, lambda _: Sent(), prune_older_than=30 * DAY):
        until(lambda: scalar(engine, PRUNED) == 25)
        until(lambda: "engagement.pruned messages=25" in caplog.messages)

    with engine.connect() as connection:
        batches = connection.execute(text("SELECT count(*) FROM engagement_message_queue GROUP BY xmin::text"))
        assert sorted(batches.scalars()) == [5, 10, 10]


def test_what_another_worker_is_at_is_left_to_it(engine):
    """A worker whose turn comes while another one prunes does nothing; at a later turn it may be the one."""
    queue_finished(engine, days_ago=40)
    asked = Counter()

    @event.listens_for(engine, "after_cursor_execute")
    def count(_c, _cursor, statement, *_):
        asked["lock" if "pg_try_advisory" in statement else "prune" if "pruned" in statement else "else"] += 1

    try:
        with ExitStack() as stack:
            with lock_of(engine, "prune"):
                asked.clear()
                stack.enter_context(Running(engine, lambda _: Sent(), prune_older_than=30 * DAY))
                until(lambda: asked["lock"] >= 3)
                assert asked["prune"] == 0
            until(lambda: scalar(engine, PRUNED) == 1)
    finally:
        event.remove(engine, "after_cursor_execute", count)


@pytest.mark.parametrize("lock", ["pg_advisory_lock", "pg_advisory_xact_lock"])
@pytest.mark.parametrize("task", ["prune", "verify"])
def test_who_never_gives_a_turn_back_is_named(engine, caplog, task, lock):
    """Any role that may connect can hold our lock: that nobody prunes or verifies then is an error in the log."""
    caplog.set_level(logging.INFO, "engagement")
    wanted = {"prune": {"prune_older_than": DAY}, "verify": {"verify_every": OFTEN}}[task]
    with engine.connect() as stranger:
        pid = stranger.scalar(text("SELECT pg_backend_pid()"))
        stranger.execute(text(f"SELECT {lock}(hashtextextended('engagement_housekeeping:public:{task}', 0))"))
        if lock == "pg_advisory_lock":
            stranger.commit()
        with Running(engine, lambda _: Sent(), **wanted):
            until(lambda: any(record.levelno == logging.ERROR for record in caplog.records))
        stranger.invalidate()

    told = [record for record in caplog.records if record.message == f"engagement.turn_taken task={task} pids=[{pid}]"]
    assert [record.levelno for record in told[:2]] == [logging.INFO, logging.ERROR]


def test_one_tenants_turn_is_not_anothers(empty_engine, caplog, monkeypatch):
    """On an engine that sends what names no schema to a tenant's, each tenant's queue is verified."""
    caplog.set_level(logging.INFO, "engagement")
    tenants = []
    for name in ("one", "two"):
        migrations.upgrade(empty_engine, schema=name)
        tenants.append(empty_engine.execution_options(schema_translate_map={None: name}))

    monkeypatch.setattr(housekeeping, "GRACE_SECONDS", 60.0)
    with ExitStack() as stack:
        for tenant in tenants:
            stack.enter_context(Running(tenant, lambda _: Sent(), verify_every=timedelta(seconds=2)))
        until(lambda: caplog.messages.count("engagement.verified violations=0") >= 2)

    assert not [message for message in caplog.messages if "turn_taken" in message]


def test_of_many_workers_one_verifies_at_a_time(engine, monkeypatch):
    """Three workers with the same cadence: no two verifications overlap."""
    running, most = Counter(), []

    def slow(*_, **__):
        running["now"] += 1
        most.append(running["now"])
        time.sleep(0.05)
        running["now"] -= 1
        return []

    monkeypatch.setattr(housekeeping, "verify", slow)
    every = timedelta(milliseconds=250)
    with ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(Running(engine, lambda _: Sent(), verify_every=every))
        until(lambda: len(most) >= 6)

    assert set(most) == {1}


def test_a_verification_keeps_its_turn_for_a_moment(engine, monkeypatch):
    """Whoever comes to the same turn a moment later finds it taken: the lock outlives the verification."""
    monkeypatch.setattr(housekeeping, "GRACE_SECONDS", 60.0)
    verified = threading.Event()
    monkeypatch.setattr(housekeeping, "verify", lambda *_, **__: verified.set() or [])
    locks = """
        SELECT count(*) FROM pg_locks JOIN pg_database AS d ON d.oid = database
        WHERE locktype = 'advisory' AND datname = current_database()
    """

    with Running(engine, lambda _: Sent(), verify_every=timedelta(seconds=4)):
        assert verified.wait(20)
        assert [scalar(engine, locks) for _ in range(20)] == [1] * 20

    assert scalar(engine, locks) == 0


def test_each_violation_is_one_event_with_ids_only(engine, caplog):
    """What a hand-written UPDATE broke is logged by promise and id, and nothing that it says of a person is."""
    caplog.set_level(logging.INFO, "engagement")
    broken, healthy = queue(engine, new_message("Ana"), new_message("Rui"))
    with engine.begin() as connection:
        connection.execute(
            text("UPDATE engagement_message_queue SET status = 'sent', sent_at = now() WHERE id = :id"), {"id": broken}
        )

    with Running(engine, lambda _: Sent(), verify_every=OFTEN):
        until(lambda: "engagement.verified violations=1" in caplog.messages)

    events = [record for record in caplog.records if record.message.startswith("engagement.violation")]
    assert {record.message for record in events} == {f"engagement.violation promise=claim_counts message_id={broken}"}
    assert {record.levelno for record in events} == {logging.ERROR}
    assert "Ana" not in caplog.text
    assert "@" not in caplog.text
    assert row(engine, healthy).status == "sent"


def test_a_table_in_another_schema_is_verified_there(empty_engine, caplog):
    """`schema=` says where the table is, and where its guards are."""
    caplog.set_level(logging.INFO, "engagement")
    migrations.upgrade(empty_engine, schema="guest")

    with Running(empty_engine, lambda _: Sent(), verify_every=OFTEN, schema="guest"):
        until(lambda: "engagement.verified violations=0" in caplog.messages)


def test_sends_do_not_wait_for_a_verification(engine, monkeypatch):
    """While one takes its time messages go out, and a stop does not wait for its end."""
    monkeypatch.setattr(housekeeping, "CLOSE_SECONDS", 0.05)
    begun, release = threading.Event(), threading.Event()

    def hang(*_, **__) -> list[Violation]:
        begun.set()
        assert release.wait(60)
        return []

    monkeypatch.setattr(housekeeping, "verify", hang)
    try:
        with Running(engine, lambda _: Sent(), verify_every=OFTEN):
            assert begun.wait(20)
            (message_id,) = queue(engine, new_message())
            until(lambda: row(engine, message_id).status == "sent")
        assert housekeepers() == ["engagement-verify"]
        assert all(thread.daemon for thread in threading.enumerate() if thread.name == "engagement-verify")
    finally:
        release.set()
    until(lambda: housekeepers() == [])


def test_an_error_is_logged_and_survived(engine, monkeypatch, caplog):
    """A database that refuses, and a bug, each cost one turn: the sends go on, and the next turn does the work."""
    monkeypatch.setattr(housekeeping, "RETRY_SECONDS", 0.0)
    queue_finished(engine, days_ago=40)
    refusals = [RuntimeError("a bug"), "SELECT 1 / 0"]

    @event.listens_for(engine, "before_cursor_execute", retval=True)
    def refuse(_c, _cursor, statement, parameters, *_):
        if "pg_try_advisory" in statement and refusals:
            refusal = refusals.pop()
            if isinstance(refusal, Exception):
                raise refusal
            return refusal, {}
        return statement, parameters

    try:
        with Running(engine, lambda _: Sent(), prune_older_than=30 * DAY):
            (message_id,) = queue(engine, new_message())
            until(lambda: row(engine, message_id).status == "sent")
            until(lambda: scalar(engine, PRUNED) == 1)
    finally:
        event.remove(engine, "before_cursor_execute", refuse)

    told = [message for message in caplog.messages if "housekeeping" in message]
    assert told == [
        "engagement.housekeeping_failed task=prune error=DataError 22012",
        "engagement.housekeeping_failed task=prune error=RuntimeError",
    ]


def test_a_worker_that_ends_with_an_error_leaves_no_housekeeper(empty_engine):
    """What the worker raises comes out, and the threads beside it end."""
    worker = Worker(empty_engine, lambda _: Sent(), prune_older_than=DAY, verify_every=DAY)

    with pytest.raises(Exception, match="does not exist"):
        worker.run()

    assert housekeepers() == []


@pytest.mark.parametrize(
    "options",
    [{"prune_older_than": -DAY}, {"prune_older_than": 40_000 * DAY}, {"verify_every": 0 * DAY}],
    ids=", ".join,
)
def test_what_makes_no_sense_is_refused(engine, options):
    """The keyword is named, and nothing runs."""
    with pytest.raises(ValueError, match=next(iter(options))):
        Worker(engine, lambda _: Sent(), **options)


def test_the_command_takes_both(engine, monkeypatch):
    """`engagement work` prunes and verifies as its options say, and a signal ends it all."""
    monkeypatch.setenv("ENGAGEMENT_DATABASE_URL", engine.url.render_as_string(hide_password=False))
    (old,) = queue_finished(engine, days_ago=91)
    (young,) = queue_finished(engine, days_ago=89)
    verified = threading.Event()
    monkeypatch.setattr(housekeeping, "verify", lambda *_, **__: verified.set() or [])

    def stop_when_done() -> None:
        try:
            until(lambda: scalar(engine, PRUNED) == 1 and verified.is_set())
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    stopping = in_thread(stop_when_done)
    options = ["--prune-older-than=90d", "--verify-every=100ms"]
    with pytest.raises(SystemExit) as left:
        cli.main(["work", "--transport=engagement.transports.console:Console", *options])

    stopping.result(20)
    assert left.value.code == 0
    with Session(engine) as session:
        kept = EngagementMessageRepository(session).get_message_by_key
        assert [kept(message.key).destination_jid is None for message in (old, young)] == [True, False]
