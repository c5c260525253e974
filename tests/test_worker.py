"""The worker as a process of its own: what it sends, what it asks of the database, and what it logs."""

import logging
import threading
from datetime import timedelta

import pytest
from conftest import PATIENCE, new_message, queue, row
from sqlalchemy import create_engine, event
from sqlalchemy.exc import ProgrammingError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import Session

from engagement import (
    EngagementMessageRepository,
    InDoubt,
    NotSent,
    Refused,
    Sent,
    Withdraw,
    Worker,
    migrations,
    process_message_queue,
)


def test_a_worker_sends_what_becomes_due_and_finishes_what_is_in_hand(engine):
    """An idle worker notices a new message within a poll, and `stop` lets the send in hand finish and settle."""
    stop, is_sending, may_finish = threading.Event(), threading.Event(), threading.Event()

    def send(_message):
        is_sending.set()
        assert may_finish.wait(PATIENCE)
        return Sent("late")

    results = []
    worker = Worker(engine, send, poll_interval=timedelta(milliseconds=20))
    thread = threading.Thread(target=lambda: results.append(worker.run(stop)))
    thread.start()
    first, second = queue(engine, new_message("a"), new_message("b"))
    assert is_sending.wait(PATIENCE)
    stop.set()
    may_finish.set()
    thread.join(PATIENCE)

    assert results[0].succeeded == 1
    assert (row(engine, first).status, row(engine, second).status) == ("sent", "pending")


def test_an_idle_worker_makes_one_small_query_a_poll(engine):
    """A worker without work asks one question a poll, and claims nothing."""
    other = create_engine(engine.url)
    statements, stop = [], threading.Event()

    @event.listens_for(other, "after_cursor_execute")
    def _count(_connection, _cursor, statement, *_):
        if not any(word in statement for word in ("engagement_worker", "lock_timeout", "SAVEPOINT")):  # Its heartbeat.
            statements.append(statement)
        if len(statements) == 7:
            stop.set()

    Worker(other, lambda _: None, poll_interval=timedelta(milliseconds=10)).run(stop)
    other.dispose()

    polls = [statement for statement in statements if "extract(" in statement.lower()]
    assert len(polls) >= len(statements) - 3  # The first round sets, claims and recovers.


def test_a_missing_table_is_told_at_once(empty_engine):
    """What waiting does not mend is raised, and not waited for."""
    with pytest.raises(ProgrammingError, match="engagement_message_queue"):
        Worker(empty_engine, lambda _: None).run(threading.Event())


def test_the_table_may_be_in_a_schema(empty_engine):
    """`schema` is where the table is, for queueing and for sending."""
    migrations.upgrade(empty_engine, schema="crm")
    with Session(empty_engine) as session, session.begin():
        EngagementMessageRepository(session, schema="crm").queue_message(new_message())

    assert process_message_queue(empty_engine, lambda _: None, schema="crm").succeeded == 1


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"concurrency": 0}, "concurrency"),
        ({"message_types": []}, "message_types"),
        ({"message_types": "otp"}, "message_types"),
        ({"message_types": ["otp"], "excluding": ["otp"]}, "message_types"),
        ({"message_types": ["Otp"]}, "message_types"),
        ({"excluding": "otp"}, "excluding"),
        ({"excluding": [None]}, "excluding"),
        ({"lease": timedelta(0)}, "lease"),
        ({"worker_name": "a\nb"}, "worker_name"),
        ({"worker_name": "a" * 201}, "worker_name"),
        ({"max_retries": 0}, "max_retries"),
        ({"min_interval": timedelta(seconds=-1)}, "min_interval"),
        ({"send_timeout": timedelta(0)}, "send_timeout"),
        ({"backoff": lambda _: 5}, "backoff"),
        ({"limit": -1}, "limit"),
    ],
)
def test_options_are_checked_before_anything_is_claimed(engine, options, field):
    """A bad option is named at once."""
    with pytest.raises(ValueError, match=field):
        process_message_queue(engine, lambda _: None, **options)


def test_engine_and_transport_are_checked(engine):
    """An async engine, and a transport that cannot send, are refused with what to do instead."""
    async_engine = create_async_engine(engine.url)

    with pytest.raises(ValueError, match="engine: must be a sync Engine"):
        Worker(async_engine, lambda _: None)
    with pytest.raises(TypeError, match="transport"):
        process_message_queue(engine, object())


def test_logs_name_ids_and_never_people(engine, caplog):
    """No user, number, param, reason or key reaches the log, whatever the outcome."""
    caplog.set_level(logging.DEBUG, logger="engagement")
    names = ["Sent", "NotSent", "Refused", "InDoubt", "Withdraw", "raises"]
    messages = [new_message(f"person-{name}", message_params={"secret": f"param-{name}"}) for name in names]
    queue(engine, *messages)
    outcomes = {"NotSent": NotSent, "Refused": Refused, "InDoubt": InDoubt, "Withdraw": Withdraw}

    def send(message):
        name = message.user_id.removeprefix("person-")
        if name == "raises":
            raise RuntimeError(message.message_params["secret"], message.destination_jid)
        return outcomes[name](f"reason {message.destination_jid}") if name in outcomes else Sent(f"p-{name}")

    result = process_message_queue(engine, send, backoff=lambda _: timedelta(hours=1))

    assert result.processed == 6
    assert len(caplog.records) >= 6
    for private in ("person-", "param-", "@s.whatsapp.net", "reason"):
        assert private not in caplog.text
