"""The PostgreSQL that is measured: durable, with room for its cache, and databases of our own in it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import uuid4

import psycopg
from psycopg import sql
from sqlalchemy import URL, Engine, create_engine, make_url

from engagement import migrations
from engagement._operating.temporary_postgres import temporary_postgres

SETTINGS = {
    # Durable, as in production.
    "fsync": "on",
    "full_page_writes": "on",
    "synchronous_commit": "on",
    # Room: checkpoints in the middle of a round would hit one contender and not the other.
    "shared_buffers": "1GB",
    "max_wal_size": "8GB",
    "checkpoint_timeout": "30min",
}


class Database:
    """A database with our table, and the ways to it: an engine for us, plain psycopg for the floors."""

    def __init__(self, url: URL) -> None:
        self.url = url
        # Last in, first out: one client goes on with one connection, as the floors do, also after eight were at work.
        self.engine: Engine = create_engine(url, pool_size=20, pool_use_lifo=True, hide_parameters=True)

    def connect(self, *, autocommit: bool = False) -> psycopg.Connection:
        """Return a new connection of plain psycopg."""
        return psycopg.connect(conninfo(self.url), autocommit=autocommit)

    def execute(self, *statements: str) -> None:
        """Run each statement in a transaction of its own."""
        with self.connect(autocommit=True) as connection:
            for statement in statements:
                connection.execute(statement)

    def empty(self) -> None:
        """Remove all messages."""
        self.execute("TRUNCATE engagement_message_queue")


def conninfo(url: URL) -> str:
    """Return the URL as libpq reads it."""
    return url.set(drivername="postgresql").render_as_string(hide_password=False)


@contextmanager
def server() -> Iterator[URL]:
    """Yield the server of ENGAGEMENT_BENCH_DATABASE_URL, else a temporary one that is as durable."""
    given = os.environ.get("ENGAGEMENT_BENCH_DATABASE_URL")
    if given:
        yield make_url(given).set(drivername="postgresql+psycopg")
        return
    with temporary_postgres(settings=SETTINGS) as temporary:
        yield make_url(temporary.url).set(drivername="postgresql+psycopg")


@contextmanager
def database(on: URL) -> Iterator[Database]:
    """Make a database with our table and drop it afterwards. The server's other databases are not touched."""
    name = f"engagement_benchmark_{uuid4().hex[:12]}"
    _maintain(on, sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    try:
        made = Database(on.set(database=name))
        try:
            migrations.upgrade(made.engine)
            yield made
        finally:
            made.engine.dispose()
    finally:
        _maintain(on, sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


def _maintain(on: URL, statement: sql.Composed) -> None:
    with psycopg.connect(conninfo(on), autocommit=True) as connection:
        connection.execute(statement)


def describe(on: URL) -> str:
    """Return version and settings of the server."""
    with psycopg.connect(conninfo(on)) as connection:
        version = connection.execute("SHOW server_version").fetchone()
        shown = [
            (name, connection.execute(sql.SQL("SHOW {}").format(sql.Identifier(name))).fetchone()) for name in SETTINGS
        ]
    settings = ", ".join(f"{name}={value[0]}" for name, value in shown if value)
    return f"PostgreSQL {version[0] if version else '?'} ({settings})"
