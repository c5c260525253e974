"""The worker's own row in `engagement_worker`. No send waits for it, and no settlement is lost with it."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from sqlalchemy import Connection

from engagement._claim import clock
from engagement._delivery import heartbeat
from engagement._delivery.options import Options
from engagement._delivery.state import State
from engagement._delivery.tally import Tally
from engagement._logging import logger
from engagement._sql import working
from engagement._sql.errors import describe
from engagement._sql.own_transactions import can_go_on, optional
from engagement.models import MOST_TEXT
from engagement.outcomes import clean_reason, storable

SWEEP_SECONDS = 3600.0
SWEPT_AFTER = timedelta(days=1)
"""So long a worker that is gone can still be seen: the night in which it went."""
WAIT_MILLISECONDS = 100
"""The longest wait for a lock on the table: verdicts wait behind it to be committed."""

_WRITTEN = ""


class Presence:
    """Writes the row along in the worker's transactions, and takes it away at the end."""

    def __init__(self, transport: object, options: Options, state: State, tally: Tally) -> None:
        self._state = state
        self._tally = tally
        self._began_at = clock()
        self._fixed = {
            "name": _text(options.name),
            "host": _text(socket.gethostname()),
            "process_id": os.getpid(),
            "version": _version(),
            "transport": _text(_name(transport)),
            "concurrency": options.concurrency,
        }
        self._sweep_at = 0.0
        self._is_written = False
        self._trouble = _WRITTEN

    def go_along(self, connection: Connection) -> str | None:
        """Write the row if it is time, at the beginning of a transaction. Return the argument of `gone_along`.

        Raises the database's error only if that has cost the transaction.
        """
        now = clock()
        if not self._state.heartbeat.goes_along(now):
            return None
        sweeps = now >= self._sweep_at
        try:
            with optional(connection, WAIT_MILLISECONDS):
                connection.execute(working.beat(), self._values(now))
                if sweeps:
                    connection.execute(working.sweep(), {"older_than": SWEPT_AFTER})
        except Exception as error:
            if not can_go_on(connection):
                raise
            return describe(error)
        if sweeps:
            self._sweep_at = now + SWEEP_SECONDS
        return _WRITTEN

    def gone_along(self, said: str | None) -> None:
        """Note that the transaction was committed, with the row in it or without."""
        if said is None:
            return
        if said == _WRITTEN:
            self._is_written = True
        self._note(said)

    def go_alone(self, in_transaction: Callable[[Callable[[Connection], None]], None]) -> None:
        """Write the row in a transaction of its own."""
        try:
            in_transaction(_nothing)
        except Exception as error:  # noqa: BLE001 - it is for people only
            self._note(describe(error))

    def leave(self, in_transaction: Callable[[Callable[[Connection], None]], None]) -> None:
        """Take the row away at a clean end. With messages still in hand it stays: somebody has to recover them."""
        if not self._is_written or self._state.hand.claims or self._state.outage.is_on:
            return
        try:
            in_transaction(self._take_away)
        except Exception as error:  # noqa: BLE001 - it is for people only
            logger.warning("engagement.heartbeat_failed error=%s", describe(error))

    def _take_away(self, connection: Connection) -> None:
        with optional(connection, WAIT_MILLISECONDS):
            connection.execute(working.leave(), {"of_run": self._state.names.run})

    def _note(self, trouble: str) -> None:
        """Tell of a trouble once, not at every heartbeat."""
        self._state.heartbeat.beat(clock())
        if trouble not in {_WRITTEN, self._trouble}:
            logger.warning("engagement.heartbeat_failed error=%s", trouble)
        self._trouble = trouble

    def _values(self, now: float) -> dict[str, Any]:
        hand = self._state.hand
        begun = [claim.started_at for claim in (*hand.claims.values(), *hand.overdue) if claim.started_at]
        return self._fixed | {
            "run": self._state.names.run,
            "in_hand": len(hand.claims) + len(hand.overdue),
            "in_hand_for": timedelta(seconds=now - min(begun)) if begun else None,
            "runs_for": timedelta(seconds=now - self._began_at),
            "sent": self._tally.so_far("succeeded"),
            "failed": self._tally.so_far("failed"),
            "gone_after": timedelta(seconds=heartbeat.ALONE_SECONDS * heartbeat.MISSED),
            "not_ready": _text(self._state.readiness.says(now)),
        }


def _nothing(_: Connection) -> None:
    """Do nothing more in a transaction."""


def _text(text: str | None) -> str | None:
    return None if text is None else (storable(clean_reason(text)) or "")[:MOST_TEXT]


def _name(transport: object) -> str:
    named: Any = transport if hasattr(transport, "__qualname__") else type(transport)
    return f"{named.__module__}.{named.__qualname__}"


@cache
def _version() -> str:
    try:
        return version("engagement")
    except PackageNotFoundError:
        return "unknown"
