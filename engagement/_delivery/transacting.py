"""A worker's own transactions: begun, seen, and committed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from sqlalchemy import Connection, Engine

from engagement._delivery.presence import Presence
from engagement._delivery.state import State
from engagement._sql.errors import CannotConnect
from engagement._sql.own_transactions import connect, transaction

T = TypeVar("T")


class Transacting:
    """Does work in transactions, which take the worker's sign of life along when it is due."""

    def __init__(self, engine: Engine, state: State, presence: Presence) -> None:
        self._engine = engine
        self._state = state
        self._presence = presence

    def do(self, work: Callable[[Connection], T]) -> T:
        """Do work in a transaction that is committed at its end. Raises the database's error."""
        try:
            connection = connect(self._engine)
        except CannotConnect as error:
            if not self._state.outage.database_was_reached and error.__cause__ is not None:
                raise error.__cause__ from None  # The host's hook may never work: its author sees its own error.
            raise
        with connection, transaction(connection):
            # First, since nothing may follow the host's `on_settled` but COMMIT.
            said = self._presence.go_along(connection)
            done = work(connection)
        self._presence.gone_along(said)
        return done
