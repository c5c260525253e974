"""Statements in a host's session: sent to the engine that has our table, and read under any of its settings.

Nothing here commits or rolls back, and no setting is left behind.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Dialect, Executable, Select, update
from sqlalchemy.exc import StatementError
from sqlalchemy.orm import Session

from engagement._sql.encodings import with_storable_texts
from engagement._sql.errors import sqlstate
from engagement._sql.schemas import in_schema, schema_in_force
from engagement._sql.table import QUEUE
from engagement.models import EngagementMessage, checked_schema, qualified_name

# A statement of tables has no mapper, by which a session with several engines chooses (`Session.binds`). Of one that
# reads from a replica, all go where an UPDATE goes: a replica may lack the row that an INSERT has just met.
# docs/decisions.md#2026-11-29--a-session-with-several-engines-is-asked-for-the-one-of-updates
_BY_THE_ENGINE_OF_UPDATES: dict[str, Any] = {"mapper": EngagementMessage.__mapper__, "clause": update(QUEUE)}


def in_session(schema: str | None) -> dict[str, Any]:
    """Return the keywords with which a session executes a statement: `in_schema`, and by the engine of our table."""
    # Also if the host's engine says otherwise: no cursor of the server's inserts, or changes the rows that it returns.
    options = {"stream_results": False, "yield_per": None} | in_schema(schema)
    return {"execution_options": options, "bind_arguments": _BY_THE_ENGINE_OF_UPDATES}


def schema_in_session(schema: str | None, session: Session) -> str | None:
    """Return where a statement in `session` finds the table; see `in_session`."""
    checked_schema(schema)  # Before anything is connected to.
    return schema_in_force(schema, session.connection(bind_arguments=_BY_THE_ENGINE_OF_UPDATES))


@contextmanager
def readable(session: Session, bind_arguments: dict[str, Any] = _BY_THE_ENGINE_OF_UPDATES) -> Iterator[None]:
    """Let moments be read while the block runs, also by psycopg, which reads those of DateStyle ISO only.

    The host's setting is as before at the end. Where it is ISO, the server is not asked.
    """
    connection = session.connection(bind_arguments=bind_arguments)
    reported = getattr(connection.connection.driver_connection, "info", None)
    style = "ISO" if reported is None else reported.parameter_status("DateStyle") or "ISO"
    if style.startswith("ISO"):
        yield
        return
    # Without a transaction nothing would be local to it.
    scope = "" if getattr(connection.connection.driver_connection, "autocommit", False) else "LOCAL "
    connection.exec_driver_sql(f"SET {scope}datestyle = ISO")
    try:
        yield
    except BaseException as error:
        # Else the transaction is over, or back at a savepoint, and the setting with it.
        if (scope == "" or sqlstate(error) is None) and not connection.invalidated:
            connection.exec_driver_sql(f"SET {scope}datestyle = '{style}'")
        raise
    connection.exec_driver_sql(f"SET {scope}datestyle = '{style}'")


class HostSession:
    """Executes statements in a host's session, in its transaction or savepoint."""

    def __init__(self, session: Session, schema: str | None) -> None:
        self.session = session
        self._schema = schema
        self._keywords = in_session(schema)

    @property
    def dialect(self) -> Dialect:
        """The dialect, which all engines share that are made of the one with our table."""
        return self.session.connection(bind_arguments=self._keywords["bind_arguments"]).dialect

    # `Any`: SQLAlchemy 2.0 and 2.1 give the rows of a result different types.
    def execute(self, statement: Executable, values: Mapping[str, Any] | None = None) -> Any:
        """Return the result. Raises `InvalidMessage` for a text that the database cannot store."""
        values = with_storable_texts(values or {}, self.session, self._keywords["bind_arguments"])
        try:
            return self.session.execute(statement, values, **self._keywords)
        except StatementError as error:
            _hide_values(error)
            raise

    def entities(self, statement: Select[Any], values: Mapping[str, Any] | None = None) -> list[EngagementMessage]:
        """Return the entities, as they are in the database now."""
        # The session may have loaded them before a worker changed them.
        statement = statement.execution_options(populate_existing=True)
        with readable(self.session, {"mapper": EngagementMessage.__mapper__, "clause": statement}):
            found: list[EngagementMessage] = self.execute(statement, values).scalars().all()
        return found

    def rows(self, statement: Executable, values: Mapping[str, Any]) -> Sequence[Any]:
        """Return the rows, with moments that can be read."""
        with readable(self.session):
            found: Sequence[Any] = self.execute(statement, values).all()
        return found

    def storable(self, reason: str) -> str:
        """Return a text, or one that says as much and that the database can store."""
        kept: str = with_storable_texts({"reason": reason}, self.session, self._keywords["bind_arguments"])["reason"]
        return kept

    def name_of(self, table: str) -> str:
        """Return the name of a table of ours, as SQL reads it."""
        return qualified_name(schema_in_session(self._schema, self.session), table)


def _hide_values(error: StatementError) -> None:
    """Keep people's data out of the host's log: the parameters, and a DETAIL that shows the row."""
    error.hide_parameters = True
    for shown in (error, error.orig):
        if shown is not None and shown.args:
            shown.args = (str(shown.args[0]).partition("\n")[0], *shown.args[1:])
