"""A server that is away for a while, or crashes and comes back without its last commits."""

import threading
from datetime import timedelta

import pytest
from conftest import execute, new_message, queue, row, until
from sqlalchemy import event

from crashes.accidents import (
    PATIENCE_SECONDS,
    Running,
    Transport,
    an_engine,
    heard,
    is_claim,
    is_extension,
    is_take_over,
    lose,
)
from engagement import Sent, migrations
from engagement._operating.temporary_postgres import temporary_postgres


@pytest.fixture(name="server", scope="module")
def _server():
    # What is not flushed is lost in a crash: the WAL writer comes by every ten seconds only.
    with temporary_postgres(settings={"wal_writer_delay": "10s"}) as server:
        with an_engine(server.url) as engine:
            migrations.upgrade(engine)
        yield server


@pytest.fixture(name="own_engine")
def _own_engine(server):
    with an_engine(server.url, pool_pre_ping=True) as engine:
        yield engine
        execute(engine, "TRUNCATE engagement_message_queue")


@pytest.mark.parametrize("concurrency", [1, 3])
def test_a_send_that_is_accepted_while_the_database_is_away_is_recorded(server, own_engine, concurrency):
    """The database crashes during the send and comes back later: the message is sent, once, and not in doubt."""
    ids = queue(own_engine, *(new_message(f"user{number}") for number in range(6)))
    has_crashed = threading.Event()

    def send(message):
        if message.id == ids[2]:
            server.stop("immediate")
            has_crashed.set()
        return Sent(f"wamid.{message.id}")

    transport = Transport(send)
    with (
        heard("engagement.database_lost") as is_lost,
        an_engine(server.url) as engine,
        Running(engine, transport, concurrency=concurrency),
    ):
        assert has_crashed.wait(PATIENCE_SECONDS)
        assert is_lost.wait(PATIENCE_SECONDS)
        server.start()
        until(lambda: all(row(own_engine, message_id).status == "sent" for message_id in ids))

    assert sorted(message.id for message in transport.sends) == ids


@pytest.mark.direct("it gives the server options at its start")
def test_a_claim_is_durable_whatever_the_hosts_setting(engine):
    """A host may commit asynchronously; what gives a lease, or extends it, does not, and leaves no setting behind."""
    lost, due = queue(engine, new_message("lost"), new_message("due"))
    execute(engine, f"UPDATE engagement_message_queue SET next_attempt_at = now() + interval '1h' WHERE id = {due}")
    lose(engine, lost)
    execute(engine, "UPDATE engagement_message_queue SET next_attempt_at = now() WHERE status = 'pending'")
    seen = set()
    kinds = {"claim": is_claim, "take_over": is_take_over, "extension": is_extension}
    with an_engine(engine.url, connect_args={"options": "-c synchronous_commit=off"}) as careless:

        @event.listens_for(careless, "after_cursor_execute")
        def note(conn, cursor, _statement, parameters, *_):
            if cursor.rowcount > 0:
                conn.info.setdefault("kinds", set()).update(kind for kind, is_it in kinds.items() if is_it(parameters))

        @event.listens_for(careless, "commit")
        def commits(conn):
            setting = conn.exec_driver_sql("SHOW synchronous_commit").scalar()
            seen.update((kind, setting) for kind in conn.info.pop("kinds", set()))

        def send(_):
            until(lambda: ("extension", "on") in seen or ("extension", "off") in seen)

        with Running(careless, Transport(send, look_up=lambda _: Sent("found")), lease=timedelta(seconds=1)):
            until(lambda: {row(engine, lost).status, row(engine, due).status} == {"sent"})
        with careless.connect() as connection:
            assert connection.exec_driver_sql("SHOW synchronous_commit").scalar() == "off"

    assert seen == {(kind, "on") for kind in kinds}


def test_a_settlement_that_a_crash_undid_is_not_sent_again(server, own_engine):
    """With asynchronous commits a crash can lose that a message was sent. Its worker must not take it for unsent."""
    (message_id,) = queue(own_engine, new_message())
    transport = Transport()
    with (
        heard("engagement.database_lost") as is_lost,
        an_engine(server.url, connect_args={"options": "-c synchronous_commit=off"}) as careless,
        # The interval keeps the settlement in a transaction of its own.
        Running(careless, transport, min_interval=timedelta(seconds=0.5), lease=timedelta(seconds=2)),
    ):
        until(lambda: row(own_engine, message_id).status == "sent")
        server.restart("immediate")
        assert is_lost.wait(PATIENCE_SECONDS)
        until(lambda: row(own_engine, message_id).status in {"sent", "in_doubt"})

    assert len(transport.sends) == 1
    # Else the WAL writer came by just then, and nothing was undone.
    assert row(own_engine, message_id).status == "in_doubt"
