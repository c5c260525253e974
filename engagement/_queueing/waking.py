"""Wakes sleeping workers after a host's commit: by NOTIFY, from a thread and a connection of its own.

NOTIFY in the host's transaction would take a lock of the whole server at its commit, one commit after the other. Here
the host's thread sets a flag. All commits within 10 ms (50 under load) share one NOTIFY.
Nothing of the host waits for it.
See docs/decisions.md#2026-11-30--a-wake-up-is-sent-after-the-commit-by-a-thread-of-its-own.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from sqlalchemy import Dialect, Engine, event
from sqlalchemy.orm import Session
from sqlalchemy.pool import PoolProxiedConnection

from engagement._logging import logger
from engagement._sql.errors import describe
from engagement._sql.host_sessions import HostSession
from engagement._sql.waking import WAKE

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

WINDOW_SECONDS = 0.01
"""Commits within this time of a NOTIFY share the next one. The window doubles as long as each has a commit."""
LONGEST_WINDOW_SECONDS = 0.05
KEEP_SECONDS = 60.0
"""How long the connection is kept that is not used."""
LONGEST_RETRY_SECONDS = 60.0
EXIT_SECONDS = 1.0
"""How long the end of the process waits for the last wake-up."""
SOON = timedelta(minutes=1)
"""A message that is due later is found by a poll in time, and then waited for by a timer."""
_WAITING = "engagement_wakes"


def wake_workers(engine: Engine | AsyncEngine, *, by: Engine | None = None) -> None:
    """Wake sleeping workers after each commit of a session on `engine` that queued messages due now or soon.

    Call it once, when the process has made its engine; it connects at the first such commit. A thread notifies the
    workers that run with `wake_up`, by one connection more. No commit waits for it, and an error of it is logged and
    costs a poll. `by` is an engine of the same database to notify on; an async engine needs one.
    Raises `ValueError` for an engine that cannot notify.
    """
    notifying = by or engine
    if not isinstance(notifying, Engine) or notifying.dialect.is_async or notifying.dialect.name != "postgresql":
        name = "engine" if by is None else "by"
        raise ValueError(f"{name}: must be a sync Engine of PostgreSQL, as in wake_workers(async_engine, by=engine)")
    if not _announcers:
        _listen_to_sessions()
    if engine.dialect not in _announcers:
        _announcers[engine.dialect] = announcer = _Announcer(notifying)
        event.listen(notifying, "engine_disposed", announcer.disconnect)


def note_queued(host: HostSession, scheduled_for: datetime | None = None) -> None:
    """Wake workers once the host's transaction is committed, if the host wants it."""
    if not _announcers or (scheduled_for is not None and scheduled_for > datetime.now(UTC) + SOON):
        return
    if announcer := _announcers.get(host.dialect):
        host.session.info.setdefault(_WAITING, set()).add(announcer)


class _Announcer:
    """Notifies on connections like those of `engine`. All that a host's thread does is to set a flag."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._forget()
        os.register_at_fork(after_in_child=self._forget)
        atexit.register(self._finish)

    def _forget(self) -> None:
        """Begin anew: after a fork the thread is gone, and the connection is the parent's."""
        self._starting = threading.Lock()
        self._roused = threading.Event()
        self._thread: threading.Thread | None = None
        self._connection: PoolProxiedConnection | None = None
        self._is_wanted = self._is_busy = self._is_to_disconnect = False
        self._failures = 0

    def announce(self) -> None:
        """Have workers woken soon. Waits for nothing, and raises nothing."""
        if self._is_wanted:
            return
        self._is_wanted = True
        self._rouse()

    def disconnect(self, _engine: Engine) -> None:
        """Close the connection: the host's own are being closed too."""
        if self._thread is not None:
            self._is_to_disconnect = True
            self._rouse()

    def _rouse(self) -> None:
        self._roused.set()
        if self._thread is None:
            with self._starting:
                if self._thread is None:
                    thread = threading.Thread(target=self._run, name="engagement-wake", daemon=True)
                    try:
                        thread.start()
                    except RuntimeError:  # The system has no thread left, or the process is about to end.
                        self._is_wanted = False
                        return
                    self._thread = thread

    def _run(self) -> None:
        window = WINDOW_SECONDS
        while True:
            is_roused = self._roused.wait(None if self._connection is None else KEEP_SECONDS)
            self._roused.clear()
            if self._is_wanted:
                self._is_busy = True
                self._is_wanted = False  # Before the NOTIFY: a commit after its beginning needs another one.
                self._notify()
                self._is_busy = False
                time.sleep(min(2.0**self._failures, LONGEST_RETRY_SECONDS) if self._failures else window)
                window = min(2 * window, LONGEST_WINDOW_SECONDS) if self._is_wanted else WINDOW_SECONDS
            if (not is_roused or self._is_to_disconnect) and not self._is_wanted:
                self._is_to_disconnect = False
                self._close()

    def _notify(self) -> None:
        try:
            if self._connection is None:
                self._connection = self._connected()
            cursor = self._connection.cursor()
            cursor.execute(WAKE)
            cursor.close()
        except Exception as error:  # noqa: BLE001 - the message is committed, and a worker's poll finds it
            if not self._failures:
                logger.warning("engagement.not_woken error=%s", describe(error))
            self._failures = min(self._failures + 1, 10)  # For the power of two that is waited for.
            self._close()
        else:
            self._failures = 0

    def _connected(self) -> PoolProxiedConnection:
        # Made as the host's are, hooks included, and in no pool of the host's: it must not run out for our sake.
        connection = self._engine.pool.recreate().connect()
        connection.detach()
        driver: Any = connection.dbapi_connection
        self._engine.dialect.set_isolation_level(driver, "AUTOCOMMIT")
        return connection

    def _close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            try:
                connection.close()
            except Exception as error:  # noqa: BLE001 - it is broken, and not used again
                logger.debug("engagement.not_closed error=%s", describe(error))

    def _finish(self) -> None:
        deadline = time.monotonic() + EXIT_SECONDS
        while (self._is_wanted or self._is_busy) and not self._failures and time.monotonic() < deadline:
            time.sleep(WINDOW_SECONDS / 2)


_announcers: dict[Dialect, _Announcer] = {}


def _listen_to_sessions() -> None:
    @event.listens_for(Session, "after_commit")
    def announce(session: Session) -> None:
        if _WAITING in session.info and not session.in_nested_transaction():  # The end of a savepoint is no commit.
            for announcer in session.info.pop(_WAITING):
                announcer.announce()

    @event.listens_for(Session, "after_rollback")
    def forget(session: Session) -> None:
        if not session.in_nested_transaction():
            session.info.pop(_WAITING, None)
