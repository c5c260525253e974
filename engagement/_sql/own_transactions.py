"""Transactions of our own, on the host's engine: a worker's, the command's and the admin page's.

They do the same whatever the database, the role or an older connection has set. Whoever may create functions and
operators in a schema of the search path could otherwise have them called in place of PostgreSQL's, with the rights of
who calls (CVE-2018-1058). So ours search `pg_catalog` alone, and name the table with its schema.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Connection, Engine, ExceptionContext, event
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import ConnectionPoolEntry, Pool

from engagement._sql.errors import CannotConnect, DriverFailed, NotReplicated, sqlstate
from engagement._sql.schemas import OUR_SCHEMA, find_schema, schema_in_force, with_schema

_MADE_IN = "engagement_made_in"
_IMPORTED_IN = os.getpid()
_WAS_GIVEN = "engagement_schema_was_given"
_LENDS = "engagement_lends"
_IS_OPTIONAL = "engagement_is_optional"
HOSTS_ENGINE = "engagement_hosts_engine"
"""The execution option with the engine that the host gave, without our settings and listeners."""
HOSTS_PATH = "engagement.search_path"
"""The setting that keeps the host's search path until the end of a transaction that lends."""

# Temporary tables last: else they come first, and anybody's function could make one.
SAFE_PATH = "pg_catalog, pg_temp"
# Under a stricter isolation the claims of two workers would fail each other.
_TRANSACTION = "ISOLATION LEVEL READ COMMITTED"
# Before we set ours. Nothing is called that a stranger may have planted on the host's.
_KEEP_THE_HOSTS_PATH = f"SELECT pg_catalog.set_config('{HOSTS_PATH}', pg_catalog.current_setting('search_path'), true)"

_READ_ONLY = "25006"
_NOT_FOUND = frozenset({"42P01", "3F000"})
# The errors of a setting that a session keeps from its begin to its end: time-outs, the search path, the role.
_MAY_BE_STALE = _NOT_FOUND | {_READ_ONLY, "57014", "55P03", "42703", "42883", "42501"}


def for_own_transactions(engine: Engine, schema: str | None = None, *, lends: bool = False) -> Engine:
    """Return `engine` for transactions of our own, which find the table in `schema`, or on the search path.

    With `lends`, each keeps the host's search path for a `lending.Lender`.

    A connection keeps the settings of its server, database and role as they were when it was made (a
    `statement_timeout`). One that such a setting may have failed is not used again, so that the next one is made under
    the present ones. Raises `ValueError` for an engine that is none of psycopg 3.
    See docs/decisions.md#2026-11-29--a-connection-that-a-setting-may-have-failed-is-not-used-again.
    """
    check_engine(engine)
    given = schema_in_force(schema, engine)
    # The command's engine is ours already. Twice ours, it would set everything twice, and our path as the host's.
    hosts = engine.get_execution_options().get(HOSTS_ENGINE, engine)
    # The statements lock and change the rows that they return, which no cursor of the server's does.
    as_a_whole = {"stream_results": False, "yield_per": None}
    found = {OUR_SCHEMA: given, _WAS_GIVEN: given is not None}
    ours: Engine = hosts.execution_options(**as_a_whole, **found, **{HOSTS_ENGINE: hosts, _LENDS: lends})
    event.listen(ours, "begin", _begin)
    event.listen(ours, "before_cursor_execute", _name_schema, retval=True)
    event.listen(hosts, "handle_error", _distrust)  # Once, however often this is called.
    return ours


def check_engine(engine: Engine, name: str = "engine") -> None:
    """Raise `ValueError` if the engine is none that we can have transactions of our own on, and say which one is.

    See docs/decisions.md#2026-11-29--the-hosts-side-takes-three-drivers-ours-takes-one.
    """
    is_one = isinstance(engine, Engine)
    if not is_one or engine.dialect.is_async or engine.dialect.driver != "psycopg":
        found = f"one of {engine.dialect.driver}" if is_one else type(engine).__name__
        wanted = "must be a sync Engine of psycopg 3, made by create_engine('postgresql+psycopg://…')"
        raise ValueError(f"{name}: {wanted}, and not {found}")


@contextmanager
def transaction(connection: Connection) -> Iterator[None]:
    """Commit the work of the block. Raises `NotReplicated` for a commit that the server warned of.

    An exception that is no error of the database becomes a `DriverFailed`, and undoes the block as one of those does.
    """
    driver: Any = connection.connection.driver_connection
    warned: list[str] = []

    def hear(notice: Any) -> None:
        # By fields that are the same in every language. A deferred trigger of the host's may warn too, of anything.
        if notice.severity_nonlocalized == "WARNING" and notice.source_function != "exec_stmt_raise":
            warned.append(notice.sqlstate)

    driver.add_notice_handler(hear)
    try:
        with connection.begin():
            try:
                yield
            except SQLAlchemyError:
                raise
            except Exception as error:
                raise DriverFailed from error
            warned.clear()
    finally:
        driver.remove_notice_handler(hear)
    if warned:
        raise NotReplicated


def connect(engine: Engine) -> Connection:
    """Return a connection. Raises `CannotConnect` for an error of a hook of the host's, such as `do_connect`."""
    try:
        return engine.connect()
    except SQLAlchemyError:
        raise
    except Exception as error:
        raise CannotConnect from error


@contextmanager
def optional(connection: Connection, wait_milliseconds: int) -> Iterator[None]:
    """Let an error undo no more than the block, which waits for a lock no longer than that.

    No connection is given up for such an error, as it is after one of a setting.
    """
    connection.execution_options(**{_IS_OPTIONAL: True})
    try:
        with connection.begin_nested():
            limited = f"SELECT pg_catalog.set_config('lock_timeout', '{wait_milliseconds}ms', true)"
            before = connection.exec_driver_sql("SELECT pg_catalog.current_setting('lock_timeout')").scalar_one()
            connection.exec_driver_sql(limited)
            yield
            connection.exec_driver_sql(f"SELECT pg_catalog.set_config('lock_timeout', '{before}', true)")
    finally:
        connection.execution_options(**{_IS_OPTIONAL: False})


def can_go_on(connection: Connection) -> bool:
    """Whether the transaction of a connection goes on after an error in an `optional` block."""
    from psycopg.pq import TransactionStatus

    if connection.invalidated:
        return False
    driver: Any = connection.connection.driver_connection
    return bool(driver.pgconn.transaction_status == TransactionStatus.INTRANS)


class MadeInAnotherProcess(RuntimeError):  # noqa: N818 - what happened
    """The connection is also another process's, on whose answers this one would wait, or which it would take away."""

    def __init__(self) -> None:
        super().__init__(
            "this engine made its connections in another process, before a fork: "
            "call engine.dispose(close=False) in this one before a worker runs"
        )


@event.listens_for(Pool, "connect")
def _note_process(_: object, record: ConnectionPoolEntry) -> None:
    # Of every pool: a fork leaves behind connections that the host has made by itself.
    # docs/decisions.md#2026-11-29--each-connection-knows-the-process-that-made-it
    record.info[_MADE_IN] = os.getpid()


def _begin(connection: Connection) -> None:
    # A connection older than this module is older than any fork that matters.
    if connection.info.get(_MADE_IN, _IMPORTED_IN) != os.getpid():
        raise MadeInAnotherProcess
    driver: Any = connection.connection.driver_connection
    if driver.autocommit:  # There would be no transaction to settle and claim in.
        connection.execution_options(isolation_level="READ COMMITTED")
    if connection.get_execution_options()[OUR_SCHEMA] is None:
        found = find_schema(connection)
        connection.connection.rollback()
        connection.engine.update_execution_options(**{OUR_SCHEMA: found})
        connection.execution_options(**{OUR_SCHEMA: found})
    settings = "; ".join((_TRANSACTION, *_settings(driver, lends=connection.get_execution_options()[_LENDS])))
    try:
        begun = _begun_at_once(driver, f"BEGIN {settings}")
    except BaseException as interrupt:
        connection.invalidate(interrupt)  # Its answer may be still to come, to the pool's ROLLBACK.
        raise
    if not begun:
        for setting in f"SET TRANSACTION {settings}".split("; "):
            connection.exec_driver_sql(setting)


def _settings(driver: Any, *, lends: bool) -> Iterator[str]:
    if lends:
        yield _KEEP_THE_HOSTS_PATH
    yield f"SET LOCAL search_path = {SAFE_PATH}"
    reported = driver.info.parameter_status
    if not reported("DateStyle").startswith("ISO"):
        yield "SET LOCAL datestyle = ISO"  # psycopg reads no moment in another style.
    if reported("server_encoding") == "UTF8" != reported("client_encoding"):
        yield "SET LOCAL client_encoding = UTF8"  # One text that it lacks would fail all that is read with it.


def _begun_at_once(driver: Any, begin: str) -> bool:
    """Send BEGIN and our settings as one message, which costs no round trip more than BEGIN alone.

    An obstacle (a lost connection) is met again by the next statement, and told as everything is.
    """
    from psycopg import Error
    from psycopg.pq import TransactionStatus

    if driver.pgconn.transaction_status != TransactionStatus.IDLE:
        return False
    try:
        send_at_once(driver, begin)
    except Error:
        return False
    return True


def send_at_once(driver: Any, commands: str) -> None:
    """Send commands as one message, past everything that psycopg would do besides. Raises the driver's error."""
    from psycopg import errors, generators
    from psycopg.pq import ExecStatus

    driver.pgconn.send_query(commands.encode())
    for result in driver.wait(generators.execute(driver.pgconn)):
        if result.status not in {ExecStatus.COMMAND_OK, ExecStatus.TUPLES_OK}:
            raise errors.error_from_result(result, driver.info.encoding)


def _name_schema(connection: Connection, _cursor: Any, statement: str, parameters: Any, *_: Any) -> tuple[str, Any]:
    schema = connection.get_execution_options()[OUR_SCHEMA]
    return (statement if schema is None else with_schema(statement, schema, connection)), parameters


def _distrust(context: ExceptionContext) -> None:
    # The event is the dialect's, and so also hears of the host's statements on this engine.
    options = {} if context.connection is None else context.connection.get_execution_options()
    if _WAS_GIVEN not in options or options.get(_IS_OPTIONAL):
        return
    state = sqlstate(context.sqlalchemy_exception) if context.sqlalchemy_exception else None
    if state in _MAY_BE_STALE:
        context.is_disconnect = True
        # All connections of that time are read-only. A time-out may be the fault of the statement.
        context.invalidate_pool_on_disconnect = state == _READ_ONLY
    if state in _NOT_FOUND and not options[_WAS_GIVEN] and context.engine is not None:
        context.engine.update_execution_options(**{OUR_SCHEMA: None})  # The table may have moved.
