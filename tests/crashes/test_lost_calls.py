"""Transactions that are lost in a call of `on_settled`, or after it: both happened, or neither."""

import subprocess
import sys
import threading
from functools import partial

import pytest
from conftest import execute, new_message, queue, row, until
from goodbyes import Hook, _host, note_if_sent, noted, run_sql  # noqa: F401 - the fixture
from shell import url_of

from crashes.accidents import PATIENCE_SECONDS, Running, Transport, at_first_commit, is_claim, is_settlement, terminate
from engagement import Sent, process_message_queue
from engagement._delivery import hook as hooks
from engagement.models import LATEST


@pytest.mark.parametrize("statement", ["COMMIT", "COMMIT AND CHAIN", "ROLLBACK", "ROLLBACK AND CHAIN"])
def test_a_statement_that_ends_the_transaction_is_noticed(host, caplog, monkeypatch, statement):
    """Neither is anything sent again, nor is the message left in doubt; one that is undone each time is given up."""
    monkeypatch.setattr("engagement._delivery.outage.WAIT_SECONDS", (0.001, 0.001))
    ids = queue(host, new_message("user1"), new_message("user2"))
    hook, given = Hook(lambda connection, *_: connection.exec_driver_sql(statement)), Transport()

    result = process_message_queue(host, given, on_settled=hook, concurrency=2)

    assert (result.succeeded, len(given.sends)) == (2, 2)
    assert [row(host, message_id).status for message_id in ids] == ["sent", "sent"]
    assert f"engagement.on_settled_failed message_id={ids[0]} error=TransactionEnded" in caplog.messages
    is_undone = statement.startswith("ROLLBACK")
    assert hook.heard.count(("user1", "sent")) == (hooks.MOST_LOST if is_undone else 1)
    assert (f"engagement.on_settled_skipped message_id={ids[0]} status=sent" in caplog.messages) == is_undone
    assert noted(host) == (["user2"] if is_undone else ["user1"])


def test_claims_beside_a_call_that_commits_are_adopted(host):
    """A message expires, its call ends the transaction, and others were claimed in it: they are sent, and once."""
    late, *others = queue(host, *(new_message(f"user{number}") for number in range(3)))
    execute(
        host,
        "UPDATE engagement_message_queue SET scheduled_for = '2020-01-01', expires_at = '2020-01-02' WHERE id = :id",
        id=late,
    )
    hook, given = Hook(partial(run_sql, "COMMIT"), of="user0"), Transport()

    with Running(host, given, on_settled=hook, concurrency=3):
        until(lambda: noted(host) == ["user1", "user2"])

    assert row(host, late).status == "expired"
    assert [(message.id, message.attempt) for message in given.sends] == [(other, 1) for other in others]
    assert hook.heard.count(("user0", "expired")) == 1


@pytest.mark.direct("it ends its own backend")
def test_a_call_that_loses_the_connection_is_a_lost_database(host, caplog, monkeypatch):
    """Nothing of the transaction happened: it is done again, with its calls, and each is written once."""
    monkeypatch.setattr("engagement._delivery.outage.WAIT_SECONDS", (0.001, 0.001))
    ids = queue(host, new_message("user1"), new_message("user2"))
    given, once = Transport(), [1]

    def lose_it(connection, *_):
        if once and once.pop():
            run_sql("SELECT pg_terminate_backend(pg_backend_pid())", connection)

    hook = Hook(lose_it, of="user2")
    process_message_queue(host, given, on_settled=hook, concurrency=2)

    assert "engagement.database_lost" in caplog.text
    assert len(given.sends) == 2
    assert hook.heard == [("user1", "sent"), ("user2", "sent")] * 2
    assert noted(host) == ["user1", "user2"]
    assert [row(host, message_id).status for message_id in ids] == ["sent", "sent"]


@pytest.mark.direct("it ends its own backend")
def test_a_call_that_loses_every_connection_is_given_up(host, caplog, monkeypatch):
    """One row that crashes the server does not keep the others from being settled, and itself neither."""
    monkeypatch.setattr("engagement._delivery.outage.WAIT_SECONDS", (0.001, 0.001))
    ids = queue(host, new_message("user1"), new_message("user2"))
    hook = Hook(partial(run_sql, "SELECT pg_terminate_backend(pg_backend_pid())"))

    result = process_message_queue(host, lambda _: None, on_settled=hook, concurrency=2)

    assert result.succeeded == 2
    assert noted(host) == ["user2"]
    assert hook.heard.count(("user1", "sent")) == hooks.MOST_LOST
    assert f"engagement.on_settled_skipped message_id={ids[0]} status=sent" in caplog.messages


def test_a_settlement_whose_commit_was_not_acknowledged_is_not_told_twice(host, proxy, through_proxy):
    """It was recorded with its call. The worker finds it recorded, and calls nobody."""
    (message_id,) = queue(host, new_message())
    hook = Hook()
    at_first_commit(through_proxy, is_settlement, lambda _: proxy.lose_next_commit())

    with Running(through_proxy, lambda _: None, on_settled=hook):
        until(lambda: row(host, message_id).status == "sent")
        queue(host, new_message("user2"))
        until(lambda: noted(host) == ["user1", "user2"])

    assert hook.heard == [("user1", "sent"), ("user2", "sent")]


def test_a_settlement_that_was_not_committed_is_told_again(host, through_proxy):
    """Nothing of it happened, and nothing of its call: both are done again."""
    (message_id,) = queue(host, new_message())
    hook = Hook()
    at_first_commit(through_proxy, is_settlement, lambda connection: terminate(host, connection))

    with Running(through_proxy, lambda _: None, on_settled=hook):
        until(lambda: row(host, message_id).status == "sent")

    assert hook.heard == [("user1", "sent"), ("user1", "sent")]
    assert noted(host) == ["user1"]


def test_a_claim_that_is_given_back_is_no_settlement(host, proxy, through_proxy):
    """It was never begun: the message is as before."""
    slow, late = queue(host, new_message("slow"), new_message("late", scheduled_for=LATEST))
    is_sending, may_end, hook = threading.Event(), threading.Event(), Hook()

    def send(_):
        is_sending.set()
        assert may_end.wait(PATIENCE_SECONDS)

    with Running(through_proxy, send, concurrency=2, on_settled=hook) as worker:
        assert is_sending.wait(PATIENCE_SECONDS)
        at_first_commit(through_proxy, is_claim, lambda _: worker.stop.set() or proxy.lose_next_commit())
        execute(host, f"UPDATE engagement_message_queue SET next_attempt_at = now() WHERE id = {late}")
        until(lambda: row(host, late).history)
        may_end.set()

    assert (row(host, slow).status, row(host, late).status) == ("sent", "pending")
    assert hook.heard == [("slow", "sent")]


KILLED_AT_ITS_COMMIT = """
import os, signal, sys
from sqlalchemy import create_engine, event, text
from engagement import process_message_queue
engine, calls = create_engine(sys.argv[1]), []
def hook(connection, message, status):
    connection.execute(text("INSERT INTO goodbyes (user_id) VALUES (:u)"), {"u": message.user_id})
    calls.append(status)
@event.listens_for(engine, "commit")
def commits(_):
    if calls:
        print(*calls, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
process_message_queue(engine, lambda _: None, on_settled=hook)
"""


def test_a_kill_between_the_call_and_the_commit_leaves_neither(host):
    """The message is as a lost worker leaves it, and the host has written nothing; a look-up brings both."""
    (message_id,) = queue(host, new_message())

    command = [sys.executable, "-c", KILLED_AT_ITS_COMMIT, url_of(host)]
    killed = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE_SECONDS)

    assert (killed.returncode, killed.stdout) == (-9, "sent\n")
    assert (row(host, message_id).status, noted(host)) == ("sending", [])
    execute(host, "UPDATE engagement_message_queue SET lease_expires_at = now() - interval '1 s'")
    process_message_queue(host, Transport(look_up=lambda _: Sent("found")), on_settled=note_if_sent)
    assert (row(host, message_id).status, noted(host)) == ("sent", ["user1"])
