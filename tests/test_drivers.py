"""The host's side with each driver that hosts have, and what refuses those that it cannot use."""

import asyncio

import pytest
from conftest import new_message
from main_calls import host_calls
from sqlalchemy import create_engine, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from engagement import (
    AsyncEngagementMessageRepository,
    EngagementMessageRepository,
    Sent,
    Worker,
    migrations,
    process_message_queue,
)
from engagement._sql.errors import is_transient, is_undone, sqlstate
from engagement._watching.metrics import QueueReader
from engagement.admin import anyone, create_admin
from engagement.policies import FrequencyCap

pytestmark = pytest.mark.direct("psycopg2 and asyncpg name the pooler's place in words of their own")

DRIVERS = ["psycopg", "psycopg2", "psycopg_async", "asyncpg"]


def url_with(engine, driver: str):
    """Return the URL in the words of another driver: psycopg2 and asyncpg take the place of the server elsewhere."""
    return engine.url.set(drivername=f"postgresql+{driver}")


class Host:
    """A host with a driver: `run` calls a function with its session, in a transaction that is rolled back."""

    def __init__(self, engine, driver: str) -> None:
        self.is_async = driver in {"asyncpg", "psycopg_async"}
        make = create_async_engine if self.is_async else create_engine
        self.engine = make(url_with(engine, driver), poolclass=NullPool)

    def run(self, work):
        """Return what `work` makes of a session."""
        if self.is_async:
            return asyncio.run(self._run(work))
        with Session(self.engine) as session:
            return work(session)

    async def _run(self, work):
        async with AsyncSession(self.engine) as session:
            return await session.run_sync(work)


@pytest.fixture(name="host", params=DRIVERS)
def _host(request, engine):
    return Host(engine, request.param)


def test_a_host_queues_looks_and_changes(host):
    """Every call of a host, in a session of its own driver."""
    host.run(host_calls)


def test_a_host_migrates(host, empty_engine):
    """Up and down, in the transaction of the host's connection."""
    driver = host.engine.dialect.driver
    there = Host(empty_engine, driver if driver != "psycopg" or not host.is_async else "psycopg_async")

    def migrate(session):
        connection = session.connection()
        migrations.upgrade(connection)
        assert migrations.current(connection) == migrations.head()
        migrations.upgrade(connection, schema="messaging", row_level_security=True)
        EngagementMessageRepository(session, schema="messaging").queue_message(new_message())
        migrations.downgrade(connection, schema="messaging")
        migrations.downgrade(connection)
        assert migrations.current(connection) is None

    there.run(migrate)


def test_an_error_is_told_by_its_sqlstate(host, engine):
    """The name of the attribute is the driver's own."""

    def provoke(session, statement):
        with pytest.raises(DBAPIError) as caught:
            session.execute(text(statement))
        return caught.value

    with engine.begin() as connection:
        connection.exec_driver_sql("LOCK engagement_message_queue")
        locked = host.run(lambda session: provoke(session, "LOCK engagement_message_queue NOWAIT"))
    missing = host.run(lambda session: provoke(session, "SELECT FROM nowhere"))

    assert [sqlstate(locked), sqlstate(missing)] == ["55P03", "42P01"]
    assert [is_transient(locked), is_transient(missing), is_undone(locked)] == [True, False, True]


def test_an_error_shows_no_value(host, engine):
    """What the host will log of a failed call holds neither a parameter nor a DETAIL with the row in it."""

    def fail(session):
        session.execute(text("ALTER SEQUENCE engagement_message_queue_id_seq RESTART"))
        repository = EngagementMessageRepository(session)
        repository.queue_message(new_message("somebody"))
        session.execute(text("ALTER SEQUENCE engagement_message_queue_id_seq RESTART"))
        with pytest.raises(IntegrityError) as caught:
            repository.queue_message(new_message("somebody-else"))
        return str(caught.value)

    said = host.run(fail)

    assert "somebody" not in said
    assert "DETAIL" not in said


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg_async"])
def test_an_async_repository_queues(engine, driver):
    """By its own door, with both async drivers."""

    async def queue():
        async with AsyncSession(create_async_engine(url_with(engine, driver), poolclass=NullPool)) as session:
            return await AsyncEngagementMessageRepository(session).queue_message(new_message())

    assert asyncio.run(queue()).created


@pytest.mark.parametrize("driver", ["psycopg2", "asyncpg", "psycopg_async"])
def test_what_has_transactions_of_its_own_refuses_other_drivers(engine, driver):
    """In one line that says what to give, before anything is connected, and not by failing on its way."""
    other = Host(engine, driver).engine
    makers = [
        lambda: Worker(other, lambda _: Sent()),
        lambda: process_message_queue(other, lambda _: Sent()),
        lambda: create_admin(other, authentication=anyone),
        lambda: FrequencyCap(lambda _: Sent(), other, lambda _: "UTC", limit=1, per="day"),
        lambda: QueueReader(other),
    ]

    for make in makers:
        with pytest.raises(ValueError, match=r"^engine: must be a sync Engine of psycopg 3[^\n]*$"):
            make()
