"""The meaning of an error of the database, by its SQLSTATE: not every OperationalError is transient."""

from __future__ import annotations

import re

from sqlalchemy.exc import DataError, DBAPIError, NotSupportedError, SQLAlchemyError, StatementError
from sqlalchemy.exc import TimeoutError as PoolTimeout

# Connection, transaction rollback, resources, operator intervention.
_TRANSIENT_CLASSES = frozenset({"08", "40", "53", "57"})
# A lock time-out, the server's ends of idle or long transactions, and a server that is still, or now, a standby.
_TRANSIENT_STATES = frozenset({"55P03", "25P03", "25P04", "25006"})
# No such table, column, schema.
_NOT_MIGRATED = frozenset({"42P01", "42703", "3F000"})


class CannotConnect(SQLAlchemyError):  # noqa: N818 - what happened
    """No connection could be made, and neither the driver nor the server says so: its cause is a hook of the host's."""


class DriverFailed(SQLAlchemyError):  # noqa: N818 - what happened
    """The driver cannot write a value, or nobody can read one, which is no error of the database: it is the cause."""


class NotReplicated(SQLAlchemyError):  # noqa: N818 - what happened
    """The server has committed, but warned that it did less than was asked for.

    A synchronous standby that it did not wait for, say: if that one is promoted, nothing of the transaction happened.
    See docs/decisions.md#2026-11-29--a-commit-that-the-server-warned-of-was-not-acknowledged.
    """


class TransactionEnded(SQLAlchemyError):  # noqa: N818 - named for the event
    """A statement of the host's in our transaction was its end, COMMIT or ROLLBACK: nobody knows which."""


def sqlstate(error: BaseException) -> str | None:
    """Return the server's code of the error; None if it did not come from there."""
    original = getattr(error, "orig", None)
    state: str | None = getattr(original, "sqlstate", None) or getattr(original, "pgcode", None)  # psycopg2's
    # It is logged: a stranger in the database's place could write lines of its own there.
    return state and re.sub("[^0-9A-Z]", "?", state)[:5]


def is_transient(error: BaseException) -> bool:
    """Whether the database may answer differently later: it was not reached, is starting, or was too busy."""
    if isinstance(error, PoolTimeout | CannotConnect | NotReplicated | TransactionEnded):
        return True
    if not isinstance(error, DBAPIError):
        return False
    state = sqlstate(error)
    if state is None:
        return error.connection_invalidated or type(error.orig).__name__ in {"OperationalError", "InterfaceError"}
    return state[:2] in _TRANSIENT_CLASSES or state in _TRANSIENT_STATES


def is_undone(error: BaseException) -> bool:
    """Whether the server has said so itself and goes on: then nothing of the transaction has happened, or will."""
    state = sqlstate(error)
    return state is not None and not state.startswith(("08", "57P"))


def is_not_migrated(error: BaseException) -> bool:
    """Whether the queue's table is missing, or of another version."""
    return sqlstate(error) in _NOT_MIGRATED


# A row that does not fit (no case, too many rows, data, integrity, WITH CHECK), program limits, the faults of
# a trigger (its own words, and those of functions from outside), and corruption.
_OF_DATA_CLASSES = frozenset({"20", "21", "22", "23", "38", "39", "44", "54", "P0", "XX"})


def is_of_one_message(error: BaseException) -> bool:
    """Whether it may be the data of one message, of all that a statement spoke of, that made it fail."""
    if not isinstance(error, SQLAlchemyError) or isinstance(error, DriverFailed):
        return True
    if not isinstance(error, DBAPIError):
        return isinstance(error, StatementError)
    state = sqlstate(error)
    # Without a state it is the driver's own: of a value, or of a connection that it cannot make.
    return isinstance(error, DataError | NotSupportedError) if state is None else state[:2] in _OF_DATA_CLASSES


def is_unreadable(error: BaseException) -> bool:
    """Whether a row holds a value that Python lacks, such as a moment that is infinity. The driver says so."""
    return isinstance(error, DataError) and sqlstate(error) is None


def describe(error: BaseException) -> str:
    """Return the loggable part of a database error: no statement, no parameters, no DETAIL with a row in it."""
    name = type(error.__cause__ if isinstance(error, CannotConnect | DriverFailed) else error).__name__
    state = sqlstate(error)
    return name if state is None else f"{name} {state}"
