"""Listens for wake-ups beside a worker, and proves that it hears.

A wake-up is a hint: the worker polls as ever, so one that is lost costs a poll, and one that is forged costs a look.
See docs/decisions.md#2026-11-30--a-wake-up-is-a-hint-beside-the-poll.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any
from uuid import uuid4

from sqlalchemy import Engine
from sqlalchemy.pool import PoolProxiedConnection

from engagement._claim import clock
from engagement._logging import logger
from engagement._sending.sender import Sender, Woken
from engagement._sql.errors import describe
from engagement._sql.own_transactions import HOSTS_ENGINE, connect, transaction
from engagement._sql.waking import CHANNEL, LISTEN

STOP_SECONDS = 0.2
"""How soon the end of the run is heard."""
QUIET_SECONDS = 0.01
"""Wake-ups within this time of one are told as one more: a flood of forged ones is read in gulps."""
PROVE_SECONDS = 30.0
"""How often it proves that it hears: a pooler, a standby or a dead line would be silent for ever."""
PROOF_SECONDS = 5.0
"""How long a proof may take."""
RETRY_SECONDS = 1.0
LONGEST_RETRY_SECONDS = 60.0


class Deaf(Exception):  # noqa: N818 - a state
    """A notification on the worker's engine is not heard here."""


class Listener:
    """Tells `sender.news` of wake-ups, from a thread with a connection of its own."""

    def __init__(self, engine: Engine, listen_on: Engine | None, sender: Sender) -> None:
        self._engine = engine
        self._listen_on = listen_on or engine.get_execution_options().get(HOSTS_ENGINE, engine)
        self._news = sender.news
        self._woken = Woken()
        self._over = threading.Event()
        self._is_heard: bool | None = None
        self._retry_seconds = RETRY_SECONDS

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Listen while the block runs."""
        thread = threading.Thread(target=self._run, name="engagement-listen", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join(2 * STOP_SECONDS)  # It may be connecting to a host that does not answer.

    def _run(self) -> None:
        while not self._over.is_set():
            try:
                with closing(self._connected()) as connection:
                    self._listen(connection.dbapi_connection)
            except Exception as error:  # noqa: BLE001 - the worker polls, and this tries again
                self._note(why_not=describe(error))
                self._over.wait(self._retry_seconds)
                self._retry_seconds = min(2 * self._retry_seconds, LONGEST_RETRY_SECONDS)

    def _connected(self) -> PoolProxiedConnection:
        # Made as all of the engine's are, and in no pool: it is kept, and must take no place of another one.
        connection = self._listen_on.pool.recreate().connect()
        connection.detach()
        return connection

    def _listen(self, driver: Any) -> None:
        driver.autocommit = True
        proof = f"engagement_hears_{uuid4().hex}"
        driver.execute(LISTEN)
        driver.execute(f"LISTEN {proof}")
        prove_at, deaf_at = clock(), 0.0
        while not self._over.is_set():
            if not deaf_at and clock() >= prove_at:
                deaf_at = clock() + PROOF_SECONDS
                self._prove(proof)
            channels = {notify.channel for notify in driver.notifies(timeout=STOP_SECONDS, stop_after=1)}
            if proof in channels and deaf_at:
                prove_at, deaf_at = clock() + PROVE_SECONDS, 0.0
                self._note(why_not=None)
            if deaf_at and clock() >= deaf_at:
                raise Deaf
            if CHANNEL in channels:
                self._wake()
                self._over.wait(QUIET_SECONDS)

    def _prove(self, proof: str) -> None:
        """Notify on the worker's engine, as hosts do. On this connection a pooler would hear it too."""
        with connect(self._engine) as connection, transaction(connection):
            connection.exec_driver_sql(f"NOTIFY {proof}")

    def _note(self, *, why_not: str | None) -> None:
        if why_not is None:
            self._retry_seconds = RETRY_SECONDS
        if self._is_heard is (why_not is None):
            return
        self._is_heard = why_not is None
        if why_not is None:
            logger.info("engagement.listening")
            self._wake()  # Something may have been queued before.
        else:
            logger.warning("engagement.not_listening error=%s", why_not)

    def _wake(self) -> None:
        if not self._woken.is_told:
            self._woken.is_told = True
            self._news.put(self._woken)
