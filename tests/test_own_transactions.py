"""What a worker, the command and the admin page do in transactions of their own, whatever the database has set."""

import logging
import threading
from contextlib import ExitStack

import pytest
from conftest import in_thread, new_message, queue, row, until
from psycopg import generators
from sqlalchemy import create_engine, event, text
from sqlalchemy.exc import InternalError
from sqlalchemy.pool import NullPool

from engagement import Sent, Worker, migrations, process_message_queue
from engagement._sql import own_transactions
from engagement._sql.own_transactions import connect, for_own_transactions, transaction


@pytest.fixture(name="database")
def _database(empty_engine):
    """A database of its own, migrated, and an engine on it that keeps no connection: its settings can be changed."""
    engine = create_engine(empty_engine.url, poolclass=NullPool)
    migrations.upgrade(engine)
    return engine


def set_for_new_connections(database, setting: str, value: str | None) -> None:
    """Set what each connection that is made from now on begins with; None takes it back."""
    name = database.dialect.identifier_preparer.quote(database.url.database)
    how = f"RESET {setting}" if value is None else f"SET {setting} = {value}"
    with database.begin() as connection:
        connection.exec_driver_sql("SET TRANSACTION READ WRITE")
        connection.exec_driver_sql(f"ALTER DATABASE {name} {how}")


def filled(engine, connections: int):
    """Return the engine with so many connections in its pool."""
    with ExitStack() as stack:
        for _ in range(connections):
            stack.enter_context(engine.connect())
    return engine


@pytest.fixture(name="pooled")
def _pooled(database):
    engine = create_engine(database.url, pool_size=5)
    yield engine
    engine.dispose()


# A connection is as its database was when it was made


@pytest.mark.direct("the pooler's connections to the server are its own")
@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_within_begin_gives_the_connection_up(pooled, interrupt, caplog, monkeypatch):
    """The answer to BEGIN is still to come: the pool neither asks this connection anything nor hands it out again."""
    engine = for_own_transactions(pooled)
    with connect(engine) as connection, transaction(connection):
        pass  # The schema is looked up once.

    def interrupted(_: object):
        monkeypatch.undo()
        raise interrupt

    monkeypatch.setattr(generators, "execute", interrupted)
    with (
        caplog.at_level(logging.WARNING, "sqlalchemy.pool"),
        pytest.raises(interrupt),
        connect(engine) as connection,
        transaction(connection),
    ):
        pytest.fail("the transaction was never begun")

    assert caplog.messages == []
    with connect(engine) as connection, transaction(connection):
        assert connection.scalar(text("SELECT 1")) == 1


@pytest.mark.direct("the pooler's connections to the server are its own")
def test_a_worker_that_connected_while_the_database_was_read_only_goes_on(database, pooled, caplog):
    """All connections of that time are given up at once, not only the one that was in use, and the next one works."""
    [message_id] = queue(database, new_message())
    set_for_new_connections(database, "default_transaction_read_only", "on")
    filled(pooled, 5)
    stop = threading.Event()
    with caplog.at_level(logging.WARNING, "engagement"):
        worker = in_thread(Worker(pooled, lambda _: Sent()).run, stop)
        until(lambda: "engagement.database_lost error=InternalError 25006" in caplog.text)
        set_for_new_connections(database, "default_transaction_read_only", None)
        until(lambda: row(database, message_id).status == "sent")
        stop.set()

    assert worker.result(20).succeeded == 1


@pytest.mark.direct("the pooler's connections to the server are its own")
def test_a_run_gives_up_a_connection_that_cannot_write(database, pooled):
    """A cron job in a host's process says what it met; the next run has other connections."""
    queue(database, new_message())
    set_for_new_connections(database, "default_transaction_read_only", "on")
    filled(pooled, 5)
    set_for_new_connections(database, "default_transaction_read_only", None)

    with pytest.raises(InternalError):
        process_message_queue(pooled, lambda _: Sent())
    assert process_message_queue(pooled, lambda _: Sent()).succeeded == 1


def begun_with(connection, setting: str) -> str:
    query = f"SELECT reset_val FROM pg_catalog.pg_settings WHERE name = '{setting}'"
    return connection.exec_driver_sql(query).scalar_one()


@pytest.mark.direct("the pooler's connections to the server are its own")
@pytest.mark.parametrize(
    ("setting", "value", "provoke"),
    [
        ("statement_timeout", "1000", "SELECT pg_sleep(20)"),
        ("search_path", "nowhere", "SELECT FROM engagement_message_queue"),
        ("lock_timeout", "1", "LOCK engagement_message_queue"),
    ],
)
def test_a_setting_that_failed_a_statement_is_not_met_again(database, pooled, setting, value, provoke):
    """What a role or database is set to holds for a connection until its end: the setting is mended, and it is not."""
    with database.begin() as connection:
        default = begun_with(connection, setting)
    set_for_new_connections(database, setting, value)
    ours = for_own_transactions(filled(pooled, 1))
    set_for_new_connections(database, setting, None)

    with database.begin() as other:
        other.exec_driver_sql("LOCK engagement_message_queue")
        with pytest.raises(Exception), ours.begin() as connection:  # noqa: B017 - each has a class of its own
            connection.exec_driver_sql(provoke)

    with ours.begin() as connection:
        assert begun_with(connection, setting) == default


def test_a_warning_before_the_commit_says_nothing_of_the_commit(engine):
    """The server warns of a statement: `NotReplicated`, which is for a commit, would have its work looked for again."""
    with connect(for_own_transactions(engine)) as connection, transaction(connection):
        connection.exec_driver_sql("BEGIN")  # There is already a transaction in progress.


def test_an_engine_that_is_ours_already_is_made_ours_once(engine, monkeypatch):
    """The command's engine, in a worker's hands, begins a transaction with one message as any other does."""
    said = []
    at_once = own_transactions.send_at_once
    monkeypatch.setattr(own_transactions, "send_at_once", lambda *given: said.append(given[1]) or at_once(*given))
    ours = for_own_transactions(for_own_transactions(engine), lends=True)
    with connect(ours) as connection, transaction(connection):
        pass  # The schema is looked up once.

    said.clear()
    event.listen(ours, "before_cursor_execute", lambda *given: said.append(given[2]))
    with connect(ours) as connection, transaction(connection):
        assert connection.scalar(text("SHOW search_path")) == "pg_catalog, pg_temp"
        kept = connection.scalar(text("SELECT current_setting('engagement.search_path')"))

    assert [each.split()[0] for each in said] == ["BEGIN", "SHOW", "SELECT"]
    assert kept == '"$user", public'
