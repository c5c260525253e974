"""Reads moments in the host's session, whatever style its connection shows them in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from engagement._sql.errors import sqlstate
from engagement._sql.statements import in_session

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

_LIKE_AN_UPDATE: dict[str, Any] = in_session(None)["bind_arguments"]


@contextmanager
def readable(session: Session, bind_arguments: dict[str, Any] = _LIKE_AN_UPDATE) -> Iterator[None]:
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
        if (
            scope == "" or sqlstate(error) is None
        ):  # Else the transaction is over, or back at a savepoint, and the setting with it.
            connection.exec_driver_sql(f"SET {scope}datestyle = '{style}'")
        raise
    connection.exec_driver_sql(f"SET {scope}datestyle = '{style}'")
