"""Migrations from two processes at once, behind a stranger's lock, and interrupted."""

import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from alembic.util import CommandError
from shell import killed_at_the_end, program
from sqlalchemy import Engine, create_engine, text
from test_migrations import OURS, PATIENCE, environment, tables

from engagement import migrations


def wait_until_waiting(engine: Engine, count: int) -> None:
    """Return when so many other sessions wait for their turn to migrate."""
    query = text(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        " AND (query LIKE '%pg_try_advisory_xact_lock%' OR wait_event_type = 'Lock')"
    )
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        with engine.connect() as connection:
            if connection.execute(query).scalar_one() == count:
                return
        time.sleep(0.02)
    raise AssertionError(f"{count} sessions never waited for their turn")


def test_two_processes_upgrade_at_once(empty_engine):
    """Of two processes that begin while a third one's upgrade is open, one migrates and both succeed."""
    program = (
        "import os, sqlalchemy; from engagement import migrations;"
        "migrations.upgrade(sqlalchemy.create_engine(os.environ['ENGAGEMENT_DATABASE_URL']))"
    )
    with empty_engine.connect() as connection:
        migrations.upgrade(connection)
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", program], env=environment(empty_engine), stderr=subprocess.PIPE, text=True
            )
            for _ in range(2)
        ]
        wait_until_waiting(empty_engine, 2)
        connection.rollback()
        errors = [process.communicate(timeout=PATIENCE)[1] for process in processes]

    assert [(process.returncode, error) for process, error in zip(processes, errors, strict=True)] == [(0, "")] * 2
    assert migrations.current(empty_engine) == migrations.head()
    assert tables(empty_engine) == OURS


@pytest.mark.parametrize("commits", [True, False], ids=["commit", "rollback"])
@pytest.mark.parametrize("schema", [None, "guest"])
def test_an_upgrade_waits_for_another_one(empty_engine, schema, commits):
    """Who waited for another upgrade finds it done, or does it if it was rolled back, whatever its isolation level."""
    strict = create_engine(empty_engine.url, isolation_level="SERIALIZABLE")  # whose snapshot would be older
    with ThreadPoolExecutor(1) as pool, empty_engine.connect() as connection:
        migrations.upgrade(connection, schema=schema)
        waiting = pool.submit(migrations.upgrade, strict, schema=schema)
        wait_until_waiting(empty_engine, 1)
        if commits:
            connection.commit()
        else:
            connection.rollback()
        waiting.result(PATIENCE)
    strict.dispose()

    assert migrations.current(empty_engine, schema=schema) == migrations.head()
    assert tables(empty_engine, schema) == OURS


@pytest.fixture(name="held_by_a_stranger")
def _held_by_a_stranger(empty_engine):
    """A session that may do nothing but connect, and holds the lock of our migrations as long as it lives."""
    role = f"{empty_engine.url.database}_stranger"
    with empty_engine.begin() as connection:
        if not connection.scalar(text("SELECT rolsuper FROM pg_roles WHERE rolname = current_user")):
            pytest.skip("only a superuser can make roles")
        connection.execute(text(f"CREATE ROLE {role} NOLOGIN"))
    stranger = create_engine(empty_engine.url, isolation_level="AUTOCOMMIT")
    with stranger.connect() as connection:
        connection.execute(text(f"SET ROLE {role}"))
        pid = connection.scalar(text("SELECT pg_backend_pid()"))
        connection.execute(text(f"SELECT pg_advisory_lock(hashtextextended('{migrations.VERSION_TABLE}:public', 0))"))
        yield pid
        connection.invalidate()
    stranger.dispose()
    with empty_engine.begin() as connection:
        connection.execute(text(f"DROP ROLE {role}"))


@pytest.mark.parametrize("call", ["upgrade", "downgrade", "adopt"])
def test_a_connection_in_autocommit_is_refused(empty_engine, call):
    """Half of a migration would stay: of an adoption, an old table out of the way and no key that blocks."""
    with (
        empty_engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection,
        pytest.raises(ValueError, match=r"^connection: is in AUTOCOMMIT"),
    ):
        getattr(migrations, call)(connection)

    assert migrations.current(empty_engine) is None


def test_an_upgrade_does_not_wait_for_ever(empty_engine, held_by_a_stranger, monkeypatch, caplog):
    """Who holds our lock is named: in the log at once, and in the error after a while. The caller's work stays."""
    monkeypatch.setattr(migrations, "LONGEST_WAIT_SECONDS", 0.3)
    with empty_engine.begin() as connection:
        connection.execute(text("CREATE TABLE customers (id integer PRIMARY KEY)"))
        with pytest.raises(CommandError, match=rf"{held_by_a_stranger}.*pg_terminate_backend"):
            migrations.upgrade(connection)
        with pytest.raises(CommandError):
            migrations.downgrade(connection)

    assert f"engagement.migration_waits pids=[{held_by_a_stranger}]" in caplog.messages
    assert tables(empty_engine) == {"customers"}


def test_the_command_says_whom_it_waits_for(run, empty_engine, held_by_a_stranger, monkeypatch):
    """One line while it waits, and one when it gives up."""
    monkeypatch.setattr(migrations, "LONGEST_WAIT_SECONDS", 0.3)

    ran = run("upgrade", on=empty_engine)

    waits, gives_up = ran.err.splitlines()
    assert ran.status == 2
    assert f"engagement.migration_waits pids=[{held_by_a_stranger}]" in waits
    assert f"process [{held_by_a_stranger}]" in gives_up


def test_an_interrupted_upgrade_says_so(empty_engine):
    """Ctrl-C while a statement waits costs the connection, on which nothing can be set back: one line, no traceback."""
    migrations.upgrade(empty_engine)
    with empty_engine.connect() as connection:
        connection.execute(text(f"LOCK {migrations.VERSION_TABLE} IN ACCESS EXCLUSIVE MODE"))
        with killed_at_the_end(program("upgrade", on=empty_engine)) as process:
            wait_until_waiting(empty_engine, 1)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=PATIENCE)

    assert (process.returncode, err.strip()) == (130, b"engagement: interrupted")
