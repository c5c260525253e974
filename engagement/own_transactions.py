"""Transactions of our own, on the host's engine: a worker's, the command's and the admin page's."""

from __future__ import annotations

from sqlalchemy import Engine, ExceptionContext, event

from engagement.database_errors import sqlstate
from engagement.statements import in_schema

_OURS = "engagement_own_transactions"

_READ_ONLY = "25006"
# What a session was given when it began and keeps to its end: time-outs, the search path, the role.
_MAY_BE_STALE = frozenset({_READ_ONLY, "57014", "55P03", "42P01", "42703", "42883", "3F000", "42501"})


def for_own_transactions(engine: Engine, schema: str | None = None) -> Engine:
    """Return `engine` for transactions of our own, which find the table in `schema`.

    A connection keeps what the server, the database or the role was set to when it was made: that it is read-only, or
    a `statement_timeout`. One that such a setting may have failed is not used again, so that the next one is made under
    what holds now.
    """
    event.listen(engine, "handle_error", _distrust)  # Once, however often this is called.
    # Under a stricter isolation the claims of two workers would fail each other, and AUTOCOMMIT has no transaction to
    # settle and claim in.
    return engine.execution_options(isolation_level="READ COMMITTED", **{_OURS: True}, **in_schema(schema))


def _distrust(context: ExceptionContext) -> None:
    # The event is the dialect's, and so also hears of what the host does on this engine.
    if context.connection is None or not context.connection.get_execution_options().get(_OURS):
        return
    state = sqlstate(context.sqlalchemy_exception) if context.sqlalchemy_exception else None
    if state in _MAY_BE_STALE:
        context.is_disconnect = True
        # All connections of that time are read-only. A time-out may be the fault of the statement.
        context.invalidate_pool_on_disconnect = state == _READ_ONLY
