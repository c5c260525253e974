"""A connection of ours, lent to a function of the host's: in our transaction, and in a savepoint for each call.

The function finds the host's tables on the host's search path. It may undo its own part. It can neither commit nor
close, nor use the connection after the call. A setting that it leaves behind (`SET LOCAL ROLE`) meets the calls after
it and no statement of ours, since none may follow but COMMIT.
See docs/decisions.md#2026-11-29--a-host-writes-beside-a-settlement-in-its-transaction.
"""

from __future__ import annotations

from asyncio import CancelledError
from collections.abc import Callable
from math import inf
from time import monotonic
from typing import Any, cast

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import PoolProxiedConnection

from engagement._sql.errors import TransactionEnded, sqlstate
from engagement._sql.own_transactions import HOSTS_ENGINE, HOSTS_PATH, send_at_once

SHORTEST_SECONDS = 0.1
"""The time of a statement whose call begins after the others have taken all of it: a lock is not waited for then."""

_NAME = "engagement_lent"
_UNDO = f"ROLLBACK TO SAVEPOINT {_NAME}"
# Deferred constraints are tried now, where a failure undoes this call alone and not the whole transaction. The inner
# savepoint defers them again, for the calls that follow. One message, which costs no round trip more than RELEASE.
_CHECK_AND_RELEASE = (
    "SAVEPOINT engagement_check; SET CONSTRAINTS ALL IMMEDIATE; ROLLBACK TO SAVEPOINT engagement_check; "
    f"RELEASE SAVEPOINT {_NAME}"
)
_TO_THE_HOSTS_PATH = (
    "SELECT extract(epoch FROM CAST(current_setting('statement_timeout') AS interval)), "
    "set_config('search_path', current_setting(%s), true)"
)
# The savepoint is gone, or there is no transaction.
_ENDED = frozenset({"3B001", "25P01"})


class LentOnly(RuntimeError):  # noqa: N818 - named for the connection
    """The function took itself for the owner of its connection: it committed, closed it, or used it after the call."""


class Lender:
    """Lends the connection of a transaction that `for_own_transactions(lends=True)` began, call after call.

    A statement of the function's is cancelled (`statement_timeout`) when all calls together have taken `seconds`.
    """

    def __init__(self, connection: Connection, seconds: float) -> None:
        self._connection = connection
        self._hosts: Engine = connection.get_execution_options()[HOSTS_ENGINE]
        self._end = monotonic() + seconds
        self._hosts_seconds = float(connection.exec_driver_sql(_TO_THE_HOSTS_PATH, (HOSTS_PATH,)).scalar_one()) or inf

    def lend(self, work: Callable[[Connection], None]) -> BaseException | None:
        """Call `work`. Return the error that undid its part, and nothing else.

        Raises the database's error, or `TransactionEnded`, if the whole transaction is lost with it.
        """
        begin = f"SAVEPOINT {_NAME}; SET LOCAL statement_timeout = {self._milliseconds()}"
        self._connection.exec_driver_sql(begin)
        lent = _Lent(self._connection.connection)
        try:
            self._call(work, lent)
        # `SystemExit` too, as of a transport: docs/decisions.md#2026-11-27--an-answer-always-arrives
        except (Exception, SystemExit, CancelledError) as error:  # noqa: BLE001 - the host's code
            self._undo(error)
            return error
        except BaseException as interrupt:
            self._connection.invalidate(interrupt)  # As in `_begin`: an answer may be still to come.
            raise
        return None

    def _call(self, work: Callable[[Connection], None], lent: _Lent) -> None:
        try:
            # Without the engine's listeners: they have heard of the transaction, in which nobody may set AUTOCOMMIT.
            theirs = Connection(self._hosts, cast("PoolProxiedConnection", lent), _has_events=False)
            theirs.begin()  # So that a `Session` on it takes the transaction for somebody else's.
            work(theirs)
        finally:
            lent.is_over = True
        if lent.misuse is not None:
            raise lent.misuse
        # Past psycopg's list of prepared statements, which it drops at any ROLLBACK.
        send_at_once(lent.driver_connection, _CHECK_AND_RELEASE)

    def _undo(self, error: BaseException) -> None:
        try:
            self._connection.exec_driver_sql(f"{_UNDO}; RELEASE SAVEPOINT {_NAME}")
        except DBAPIError as second:
            if sqlstate(second) in _ENDED:
                raise TransactionEnded from error
            raise

    def _milliseconds(self) -> int:
        # In steps, so that its text is nearly always one that was seen before.
        left = int(max(self._end - monotonic(), SHORTEST_SECONDS) * 10) * 100
        return int(min(left, self._hosts_seconds * 1000))


class _Lent:
    """Stands for the pooled connection in the host's `Connection`, and keeps our transaction from its end."""

    def __init__(self, pooled: PoolProxiedConnection) -> None:
        self._pooled = pooled
        self.is_over = False
        self.misuse: LentOnly | None = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # SQLAlchemy's own ways to give it back to the pool.
            raise AttributeError(name)
        return getattr(self._pooled, name)

    def cursor(self, *arguments: Any, **keywords: Any) -> Any:
        """Return a cursor of the driver's, as long as the call lasts."""
        self._check()
        return self._pooled.cursor(*arguments, **keywords)

    def rollback(self) -> None:
        """Undo the work of the call so far."""
        self._check()
        send_at_once(self.driver_connection, _UNDO)

    def commit(self) -> None:
        """Refuse, and remember it, since the caller may catch that."""
        self._check()
        raise self._refused("commits")

    def close(self, **_: Any) -> None:
        """Likewise."""
        if not self.is_over:
            raise self._refused("closes the connection")

    _close_special = close

    def detach(self) -> None:
        """Likewise."""
        raise self._refused("keeps the connection")

    def invalidate(self, *_: Any, **__: Any) -> None:
        """Only note it, since SQLAlchemy calls this while it handles a lost connection. We shall meet that too."""
        self._refused("ends the connection")

    def _check(self) -> None:
        if self.is_over:
            raise LentOnly("this connection was lent for a call of on_settled, which is over")

    def _refused(self, deed: str) -> LentOnly:
        self.misuse = LentOnly(f"the caller of on_settled {deed}, and nobody else")
        return self.misuse
