"""Who works: each worker is seen while it lives, told to be gone when it does not, and costs its sends nothing."""

import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from datetime import timedelta
from functools import partial

import pytest
from admin_page import admin_of
from conftest import PATIENCE, execute, in_thread, new_message, queue, row, until, wait_until_blocked
from seen import a_worker
from shell import url_of
from sqlalchemy import create_engine, event, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from engagement import NotSent, Refused, Worker, migrations, process_message_queue
from engagement._delivery import heartbeat, presence
from engagement._delivery.heartbeat import ALONE_SECONDS, ALONG_SECONDS, Heartbeat
from engagement._operating.overview import overview
from engagement._operating.workers import seen_workers

TABLE = "engagement_worker"
PROGRAM = """
import sys, time
from sqlalchemy import create_engine
from engagement import Worker
from engagement._delivery import heartbeat
heartbeat.ALONG_SECONDS, heartbeat.ALONE_SECONDS = 0.1, 0.2
Worker(create_engine(sys.argv[1]), lambda _: time.sleep(600), worker_name="far").run()
"""


def seen(engine):
    with Session(engine) as session:
        return seen_workers(session).seen


def seen_since(engine, moment):
    return [worker for worker in seen(engine) if worker.last_seen_at > moment]


def standings(engine) -> list[str]:
    return [worker.standing for worker in seen(engine)]


def write(engine, **given) -> None:
    with engine.begin() as connection:
        connection.execute(a_worker(**given))


@pytest.fixture(name="quick")
def _quick(monkeypatch):
    """Heartbeats that come soon."""
    monkeypatch.setattr(heartbeat, "ALONG_SECONDS", 0.05)
    monkeypatch.setattr(heartbeat, "ALONE_SECONDS", 0.1)


@contextmanager
def working(engine, send=lambda _: None, **options):
    """Run a worker while the block runs."""
    stop = threading.Event()
    result = in_thread(Worker(engine, send, **options).run, stop)
    try:
        yield result
    finally:
        stop.set()
    result.result(PATIENCE)


@contextmanager
def far_worker(engine):
    """Run a worker in a process of its own, whose one send never ends."""
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, url_of(engine)])
    try:
        until(lambda: any(worker.in_hand for worker in seen(engine)))
        yield process
    finally:
        process.kill()
        process.wait(PATIENCE)


# Seen, and gone


def test_a_worker_is_seen_from_its_first_claim_to_its_end(engine):
    """The row is committed with the claim, so no message is ever held by a worker that nobody can name."""
    found = []
    (message_id,) = queue(engine, new_message())
    process_message_queue(engine, lambda _: found.extend(seen(engine)), worker_name="mine", concurrency=3)

    (worker,) = found
    assert row(engine, message_id).claimed_by.startswith(f"{worker.name}/")
    assert worker.name.startswith("mine#")
    assert (worker.standing, worker.holds, worker.concurrency) == ("working", 1, 3)
    assert worker.process_id == os.getpid()
    assert "test_workers" in worker.transport
    assert worker.version
    assert seen(engine) == []


def test_a_worker_counts(engine, quick):
    """Sent and failed, and the messages in hand, as of the last heartbeat."""
    outcomes = {"no": Refused("no"), "later": NotSent("later")}
    goes_on = threading.Event()

    def send(message):
        if message.user_id == "long":
            goes_on.wait(PATIENCE)
        return outcomes.get(message.user_id)

    with working(engine, send, poll_interval=timedelta(milliseconds=10)):
        queue(engine, *(new_message(user) for user in ("a", "b", "no", "later", "long")))
        until(lambda: [(each.sent, each.failed, each.in_hand) for each in seen(engine)] == [(2, 1, 1)])
        goes_on.set()


@pytest.mark.parametrize("options", [{}, {"concurrency": 3}])
def test_a_long_send_keeps_being_seen(engine, quick, options):
    """Also while nothing else is to be done with the database for minutes."""
    goes_on, begun = threading.Event(), threading.Event()
    queue(engine, new_message())
    with working(
        engine, lambda _: begun.set() or (goes_on.wait(PATIENCE) and None), poll_interval=timedelta(hours=1), **options
    ):
        assert begun.wait(PATIENCE)
        (first,) = seen(engine)
        for _ in range(2):
            (first,) = until(partial(seen_since, engine, first.last_seen_at))
            assert first.in_hand == 1
        goes_on.set()


def test_an_idle_worker_keeps_being_seen(engine, quick):
    """Also one that polls once an hour."""
    with working(engine, poll_interval=timedelta(hours=1)):
        (first,) = until(lambda: seen(engine))
        until(partial(seen_since, engine, first.last_seen_at))
        assert standings(engine) == ["idle"]


def test_a_killed_worker_is_gone_and_its_message_names_it(engine, run):
    """After three heartbeats that did not come: in the list, in `status`, and on the message that it holds."""
    (message_id,) = queue(engine, new_message())
    with far_worker(engine) as process:
        assert standings(engine) != ["gone"]
        process.send_signal(signal.SIGKILL)
        until(lambda: standings(engine) == ["gone"])

    (worker,) = seen(engine)
    assert (worker.holds, row(engine, message_id).status) == (1, "sending")
    gone, lease = (f"{at:%Y-%m-%d %H:%M:%SZ}" for at in (worker.last_seen_at, row(engine, message_id).lease_expires_at))
    shown = json.loads(run("show", message_id, "--json", on=engine).out)["worker"]
    assert shown == f"{worker.name} is gone since {gone}; any worker recovers the message after {lease}"
    with admin_of(engine) as page:
        assert shown in page.get(f"messages/{message_id}").text
        overview_page = page.get("").text
    assert f'<td data-label="Worker">{worker.name}</td>' in overview_page
    assert '<td data-label="Standing">gone</td>' in overview_page
    status = json.loads(run("status", "--json", on=engine).out)
    assert (status["workers_gone"], status["held_by_gone_workers"]) == (1, 1)
    assert [each["name"] for each in status["workers"]] == [worker.name]


def test_a_frozen_worker_is_gone_until_it_goes_on(engine):
    """A process that is stopped, as by a debugger or a paused machine, cannot be told from a dead one, until it can."""
    queue(engine, new_message())
    with far_worker(engine) as process:
        process.send_signal(signal.SIGSTOP)
        until(lambda: standings(engine) == ["gone"])
        process.send_signal(signal.SIGCONT)
        until(lambda: standings(engine) == ["working"])


HOUR, MINUTE, NOW = timedelta(hours=1), timedelta(minutes=1), timedelta(0)


@pytest.mark.parametrize(
    ("given", "standing"),
    [
        ({}, "idle"),
        ({"in_hand": 1}, "working"),
        ({"in_hand": 1, "in_hand_since": -MINUTE / 2}, "working"),
        ({"in_hand": 1, "in_hand_since": -MINUTE}, "slow"),
        ({"in_hand": 1, "in_hand_since": -HOUR, "not_ready": "no session"}, "slow"),
        ({"not_ready": "no session"}, "not_ready"),
        ({"gone_at": NOW, "in_hand": 1, "in_hand_since": -HOUR}, "gone"),
        ({"gone_at": MINUTE, "last_seen_at": -HOUR}, "idle"),
    ],
)
def test_gone_slow_and_not_ready_are_told_apart(engine, given, standing):
    """Gone is who was not seen in time by the database's clock, whatever else its row says; slow is seen."""
    write(engine, **given)

    assert standings(engine) == [standing]


def test_a_transport_that_is_not_ready_is_said_to_be_so(engine, quick):
    """With its reason, from which what is personal was taken."""

    class NotNow:
        why_not_ready = "no session of 5511999990001"

        def send(self, message): ...

        def ready(self):
            return False

    queue(engine, new_message())
    with working(engine, NotNow()):
        (worker,) = until(lambda: [each for each in seen(engine) if each.standing == "not_ready"])
    assert worker.not_ready.startswith("no session of")
    assert "5511999990001" not in worker.not_ready


def test_the_dead_are_swept(engine):
    """A day after they were gone, by whoever works; not before."""
    write(engine, run="00000001", gone_at=-timedelta(hours=25))
    write(engine, run="00000002", gone_at=-timedelta(hours=23))
    process_message_queue(engine, print)

    assert [worker.name for worker in seen(engine)] == ["host:7#00000002"]


# What it must not cost


def test_a_heartbeat_comes_by_the_time():
    """Along with a transaction after ten seconds, alone after fifteen; the first with the first transaction."""
    beats = Heartbeat(1_000.0)
    assert beats.goes_along(1_000.0)
    assert not beats.is_to_go_alone(1_000.0)
    beats.beat(1_000.0)

    assert [beats.goes_along(1_000.0 + ALONG_SECONDS - 0.1), beats.goes_along(1_000.0 + ALONG_SECONDS)] == [False, True]
    assert [beats.is_to_go_alone(1_000.0 + ALONE_SECONDS - 0.1), beats.is_to_go_alone(1_000.0 + ALONE_SECONDS)] == [
        False,
        True,
    ]
    assert ALONE_SECONDS <= 15


def test_a_busy_worker_makes_no_transaction_more(engine, monkeypatch):
    """200 messages cost one heartbeat, in a transaction that claims; the end takes one transaction."""
    monkeypatch.setattr(heartbeat, "ALONG_SECONDS", 1e9)
    monkeypatch.setattr(heartbeat, "ALONE_SECONDS", 1e9)
    transactions = []
    for is_seen in (True, False):
        if not is_seen:
            monkeypatch.setattr(presence.Presence, "go_along", lambda *_: None)
        queue(engine, *(new_message(f"user{number}-{is_seen}") for number in range(200)))
        other = create_engine(engine.url)
        said, begun = [], []
        event.listen(other, "before_cursor_execute", lambda *given, said=said: said.append(given[2]))
        event.listen(other, "begin", begun.append)
        process_message_queue(other, lambda _: None)
        other.dispose()
        transactions.append(len(begun))
        # Written, swept, taken away.
        assert sum(TABLE in statement for statement in said) == (3 if is_seen else 0)

    assert transactions[0] - transactions[1] == 1


@pytest.mark.parametrize(
    "trouble",
    [f"DROP TABLE {TABLE}", f"ALTER TABLE {TABLE} DROP COLUMN host", f"ALTER TABLE {TABLE} ADD CHECK (false)"],
)
def test_a_heartbeat_that_fails_costs_no_settlement(empty_engine, caplog, trouble, quick):
    """Nor a connection, nor more than one line of the log."""
    migrations.upgrade(empty_engine)
    execute(empty_engine, trouble)
    ids = queue(empty_engine, *(new_message(f"user{number}") for number in range(3)))
    connected = []
    event.listen(empty_engine, "connect", lambda *_: connected.append(1))
    with working(empty_engine, poll_interval=timedelta(milliseconds=10)):
        until(lambda: [row(empty_engine, each).status for each in ids] == ["sent"] * 3)
        beats = presence.clock() + 0.5
        until(lambda: presence.clock() > beats)

    assert sum("engagement.heartbeat_failed" in each.message for each in caplog.records) == 1
    assert len(connected) <= 2


def test_no_send_waits_for_a_locked_table(engine, caplog):
    """A heartbeat waits a moment for somebody else's lock, and goes without."""
    (message_id,) = queue(engine, new_message())
    with engine.connect() as connection:
        connection.execute(text(f"LOCK TABLE {TABLE}"))
        assert process_message_queue(engine, lambda _: None).succeeded == 1

    assert row(engine, message_id).status == "sent"
    assert "engagement.heartbeat_failed error=OperationalError 55P03" in caplog.text


def test_a_connection_lost_in_a_heartbeat_is_as_any_lost_one(engine, monkeypatch):
    """The transaction is done again: the message is sent, once."""
    monkeypatch.setattr(presence, "WAIT_MILLISECONDS", 60_000)
    sent = []
    (message_id,) = queue(engine, new_message())
    with engine.connect() as connection:
        connection.execute(text(f"LOCK TABLE {TABLE}"))
        with working(engine, lambda message: sent.append(message.id)):
            wait_until_blocked(engine, 1)
            execute(
                engine,
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE wait_event_type = 'Lock' AND datname = current_database()",
            )
            wait_until_blocked(engine, 1)
            connection.rollback()
            until(lambda: row(engine, message_id).status == "sent")
    assert sent == [message_id]


def test_a_lock_that_a_heartbeat_did_not_wait_for_leaves_the_hosts_setting(engine):
    """The host's own time-out for locks holds for the rest of the transaction."""
    other = create_engine(engine.url, connect_args={"options": "-c lock_timeout=7s"})
    found = []

    @event.listens_for(other, "before_cursor_execute")
    def _look(_connection, cursor, statement, *_):
        if statement.startswith("UPDATE"):
            cursor.connection.execute("SELECT 1")
            found.append(cursor.connection.execute("SHOW lock_timeout").fetchone()[0])

    queue(engine, new_message())
    process_message_queue(other, lambda _: None)
    other.dispose()

    assert set(found) == {"7s"}


@pytest.mark.parametrize(
    "wrong",
    [
        {"run": "x"},
        {"name": "n" * 501},
        {"concurrency": 0},
        {"in_hand": -1},
        {"sent": -1},
        {"not_ready": "n" * 501},
        {"gone_at": "infinity"},
    ],
)
def test_the_table_refuses_what_nobody_could_read(engine, wrong):
    """A row that a hand has written breaks no list."""
    with pytest.raises(IntegrityError):
        write(engine, **wrong)


# Shown


def test_the_command_lists_the_workers(run, engine):
    """Lines with tabs for a program, and JSON; those that are gone first."""
    write(engine, run="00000001", name="a")
    write(engine, run="00000002", name="b", gone_at=-HOUR, sent=1_234)

    header, *rows = [line.split("\t") for line in run("workers", on=engine).out.splitlines()]
    assert header[:2] == ["name", "standing"]
    assert [each[:2] for each in rows] == [["b#00000002", "gone"], ["a#00000001", "idle"]]
    listed = json.loads(run("workers", "--json", on=engine).out)["workers"]
    assert [(each["name"], each["sent"]) for each in listed] == [("b#00000002", 1234), ("a#00000001", 0)]


def test_a_table_that_cannot_be_read_is_told(run, empty_engine):
    """`workers` says so and what to do, and `status` goes without it."""
    migrations.upgrade(empty_engine)
    execute(empty_engine, f"DROP TABLE {TABLE}")

    ran = run("workers", on=empty_engine)
    assert (ran.status, ran.out, ran.err.count("\n")) == (3, "", 1)
    assert "may not read engagement_worker" in ran.err
    status = run("status", "--json", on=empty_engine)
    assert (status.status, json.loads(status.out)["workers"], json.loads(status.out)["workers_gone"]) == (0, None, None)


def test_the_overview_counts_the_leases_of_the_gone(session):
    """By the mark of their run in the name of the claim, also of one that was taken over."""
    for user, claimed_by in (
        ("a", "host:7#4fe1ab12/3"),
        ("b", "host:7#4fe1ab12/4/recovery/2"),
        ("c", "x/#y#00000009/1"),
    ):
        queue_held(session, user, claimed_by)
    session.execute(a_worker(gone_at=-MINUTE))
    session.execute(a_worker(run="00000009", name="x/#y"))

    found = overview(session).workers
    assert [(each.name, each.standing, each.holds) for each in found.seen] == [
        ("host:7#4fe1ab12", "gone", 2),
        ("x/#y#00000009", "working", 1),
    ]
    assert found.held_by_gone == 2


def queue_held(session, user: str, claimed_by: str) -> None:
    from engagement import EngagementMessageRepository

    queued = EngagementMessageRepository(session).queue_message(new_message(user))
    session.execute(
        text(
            "UPDATE engagement_message_queue SET status = 'sending', attempt = 1, claimed_by = :by,"
            " lease_expires_at = now() + interval '1 minute' WHERE id = :id"
        ),
        {"by": claimed_by, "id": queued.message_id},
    )
