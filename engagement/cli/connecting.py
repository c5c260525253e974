"""The way to the queue: the options with its address, the engine, and the database's errors as problems."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, TypeVar

import click
from sqlalchemy import URL, Engine, create_engine, make_url, select
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.orm import Session

from engagement._sql.errors import is_not_migrated, is_unreadable, sqlstate
from engagement._sql.hiding import ListIsHidden
from engagement._sql.own_transactions import for_own_transactions
from engagement._sql.schemas import in_schema
from engagement.cli.parameters import schema_named
from engagement.cli.problems import DatabaseProblem, Problem
from engagement.messages import InvalidMessage
from engagement.models import EngagementMessage
from engagement.repository import EngagementMessageRepository

F = TypeVar("F", bound=Callable[..., Any])

EXAMPLE_URL = "postgresql://user:password@host:5432/name"
CONNECT_SECONDS = 10
SECRETS = ("password", "sslpassword", "oauth_client_secret", "scram_client_key", "scram_server_key")
"""Options of libpq that a URL may give behind its question mark."""


@dataclass(frozen=True, slots=True)
class Database:
    """The values of `--database-url` and `--schema`. Nothing is connected before it is used."""

    given_url: str | None = field(repr=False)
    schema: str | None

    @contextmanager
    def engine(self, *, to_migrate: bool = False) -> Iterator[Engine]:
        """Hand out an engine, and turn the database's errors into problems."""
        url = _checked_url(self.given_url)
        try:
            # The `repr` of an engine shows its URL, and masks only the password before the @: secrets go separately.
            shown = url.difference_update_query(SECRETS)
            # SQLAlchemy would look for hstore on the role's own search path. We have none.
            arguments = _connect_args(url)
            engine = create_engine(shown, hide_parameters=True, use_native_hstore=False, connect_args=arguments)
        except ImportError:
            raise Problem("psycopg cannot be loaded. Run: pip install 'psycopg[binary]'") from None
        except (SQLAlchemyError, ValueError):
            raise _unreadable() from None
        # psycopg logs the cancelling of a query after Ctrl-C: a second line beside our one.
        logging.getLogger("psycopg").addHandler(logging.NullHandler())
        try:
            # docs/decisions.md#2026-11-29--our-own-transactions-begin-with-their-own-settings
            yield engine if to_migrate else for_own_transactions(engine, self.schema)
        except InvalidMessage as error:
            raise Problem(str(error)) from None
        except ListIsHidden as error:
            raise DatabaseProblem(str(error)) from None
        except SQLAlchemyError as error:
            raise self._problem(error, url) from None
        finally:
            engine.dispose()

    @contextmanager
    def session(self) -> Iterator[Session]:
        """Hand out a session in a transaction that is committed at the end."""
        with self.engine() as engine, Session(engine) as session, session.begin():
            yield session

    @contextmanager
    def repository(self) -> Iterator[EngagementMessageRepository]:
        """Hand out a repository in a transaction that is committed at the end."""
        with self.session() as session:
            # A database that cannot work is told of before the input is read.
            session.execute(select(EngagementMessage.id).limit(0), execution_options=in_schema(self.schema))
            yield self.repository_on(session)

    def repository_on(self, session: Session) -> EngagementMessageRepository:
        """Return a repository on a session of our own making."""
        return EngagementMessageRepository(session, schema=self.schema)

    def in_full(self, command: str) -> str:
        """Return another command about the same table, as it is typed (`engagement upgrade --schema crm`)."""
        return f"engagement {command}" + ("" if self.schema is None else f" --schema {self.schema}")

    def _problem(self, error: SQLAlchemyError, url: URL) -> Problem:
        original, state = getattr(error, "orig", None), sqlstate(error)
        if is_not_migrated(error):
            return DatabaseProblem(f"the queue's table is missing or old. Run: {self.in_full('upgrade')}")
        if is_unreadable(error):
            return DatabaseProblem(f"a row of the table cannot be read. Run: {self.in_full('verify')}")
        if original is None or state is not None:
            # The server's text may show a row: the SQLSTATE is enough.
            return DatabaseProblem(f"the database refused: {type(original or error).__name__} {state or ''}")
        return DatabaseProblem(f"cannot reach the database: {_without_passwords(str(original), url)}")


def _checked_url(given: str | None) -> URL:
    """Return the URL with our driver. A problem never repeats the URL, which may hold a password."""
    if not given:
        problem = f"no database given. Set ENGAGEMENT_DATABASE_URL={EXAMPLE_URL} or use --database-url"
        raise Problem(problem)
    try:
        given.encode()  # A variable may hold bytes that are no text.
        url = make_url(given)
    except (ArgumentError, ValueError):
        raise _unreadable() from None
    # Several hosts and ports are allowed. Two values of any other option would reach the driver as one text.
    if any(name not in {"host", "port"} and isinstance(value, tuple) for name, value in url.query.items()):
        raise _unreadable()
    if url.get_backend_name() not in {"postgres", "postgresql"}:
        raise Problem(f"the database URL is none of PostgreSQL. It looks like {EXAMPLE_URL}")
    if "@" in (url.host or ""):
        raise Problem("the database URL has an @ too many. In a password, write it as %40")
    return url.set(drivername="postgresql+psycopg")


def _unreadable() -> Problem:
    """Return the problem of a URL that cannot be read, by SQLAlchemy or by us."""
    return Problem(f"the database URL cannot be read. It looks like {EXAMPLE_URL}")


def _connect_args(url: URL) -> dict[str, Any]:
    # A pooler in transaction mode gives each transaction another session, without the statements that we prepared.
    arguments: dict[str, Any] = {"prepare_threshold": None, **_secrets(url)}
    if "connect_timeout" not in url.query and "PGCONNECT_TIMEOUT" not in os.environ:
        arguments["connect_timeout"] = CONNECT_SECONDS
    return arguments


def _without_passwords(text: str, url: URL) -> str:
    for secret in (url.password, *_secrets(url).values()):
        if secret:
            text = text.replace(str(secret), "***")
    return text


def _secrets(url: URL) -> dict[str, Any]:
    return {name: url.query[name] for name in SECRETS if name in url.query}


def on_database(command: F) -> Callable[..., Any]:
    """Give a command the argument `database`, from --database-url and --schema."""

    @click.option(
        "--database-url",
        envvar="ENGAGEMENT_DATABASE_URL",
        show_envvar=True,
        metavar="URL",
        help="The PostgreSQL database. Rather set the variable: options can be seen by others.",
    )
    @click.option("--schema", type=schema_named, metavar="NAME", help="Where the table is, if not on the search path.")
    @wraps(command)
    def run(*, database_url: str | None, schema: str | None, **options: Any) -> Any:
        return command(database=Database(database_url, schema), **options)

    return run
