"""A host that notes beside a settlement whom it told goodbye."""

import pytest
from conftest import execute
from sqlalchemy import text

from engagement import MessageStatus


@pytest.fixture(name="host")
def _host(engine):
    """A host with a table of its own: whom it told goodbye, and in which transaction."""
    execute(
        engine,
        "CREATE TABLE goodbyes (user_id text PRIMARY KEY, wrote xid8 DEFAULT pg_current_xact_id());"
        "CREATE TABLE people (id text PRIMARY KEY);"
        "CREATE TABLE letters (user_id text REFERENCES people (id) DEFERRABLE INITIALLY DEFERRED)",
    )
    yield engine
    execute(engine, "DROP TABLE goodbyes, letters, people; DROP SCHEMA IF EXISTS app CASCADE")


def note(connection, message) -> None:
    connection.execute(text("INSERT INTO goodbyes (user_id) VALUES (:user_id)"), {"user_id": message.user_id})


def note_if_sent(connection, message, status) -> None:
    if status is MessageStatus.SENT:
        note(connection, message)


def noted(engine) -> list[str]:
    with engine.connect() as connection:
        return list(connection.scalars(text("SELECT user_id FROM goodbyes ORDER BY user_id")))


class Hook:
    """Notes whom it told goodbye, hears each status, and does `besides` for one of them."""

    def __init__(self, besides=lambda *_: None, of="user1") -> None:
        self.heard = []
        self._besides = besides
        self._of = of

    def __call__(self, connection, message, status):
        """Be called."""
        self.heard.append((message.user_id, status))
        note_if_sent(connection, message, status)
        if message.user_id == self._of:
            return self._besides(connection, message, status)
        return None


def fail(error, *_):
    raise error


def run_sql(sql, connection, *_):
    connection.execute(text(sql))


def hide(besides, *arguments):
    try:
        besides(*arguments)
    except Exception:
        return
