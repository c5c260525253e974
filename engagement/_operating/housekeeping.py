"""Housekeeping beside the sends: match kept receipts and, on request, prune old messages and look for broken promises.

Each task has a thread and a connection of its own, so no send waits for it. All workers try at the next whole interval
since 1970 by the database's clock, as a cron job does. The first takes a lock, and the others leave the work to it. So
a worker that is restarted again and again does not read the whole table each time.
See docs/decisions.md#2026-11-24--housekeeping-comes-by-the-clock-and-has-a-thread-of-its-own.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from itertools import count
from typing import Any

from sqlalchemy import Engine, Row, func, select
from sqlalchemy.orm import Session

from engagement._delivery.evidence import LATELY, KeptReceipts
from engagement._delivery.options import Options
from engagement._logging import logger
from engagement._sql import turns
from engagement._sql.errors import describe
from engagement._sql.host_sessions import schema_in_session
from engagement.repository import EngagementMessageRepository
from engagement.verification import verify

MATCH_EVERY = timedelta(minutes=1)
PRUNE_EVERY = timedelta(hours=1)
PRUNE_BATCH = 1_000
PAUSE_SECONDS = 0.2
"""The pause between two batches: other work of the database, and its vacuum, comes first."""
GRACE_SECONDS = 2.0
"""How long the lock is kept after a verification: a worker on a busy machine comes to its turn a moment later."""
LONGEST_NAP_SECONDS = 600.0
"""How often to look at the database's clock: ours may stand still while the machine sleeps."""
RETRY_SECONDS = 60.0
CLOSE_SECONDS = 5.0


class Housekeeping:
    """The housekeeping of one worker."""

    def __init__(self, engine: Engine, options: Options) -> None:
        self._engine = engine
        self._options = options
        self._over = threading.Event()
        self._receipts = KeptReceipts(engine, options.on_settled)
        self._holders: dict[str, Sequence[Row[Any]]] = {}

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Keep house while the block runs. At its end a task gets a moment to finish its batch."""
        threads = [
            threading.Thread(target=self._keep, args=(task, every, work), name=f"engagement-{task}", daemon=True)
            for task, every, work in self._tasks()
        ]
        threads.append(threading.Thread(target=self._match_receipts, name="engagement-kept", daemon=True))
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._over.set()
            for thread in threads:
                thread.join(CLOSE_SECONDS)

    def _tasks(self) -> Iterator[tuple[str, timedelta, Callable[[], None]]]:
        older_than, every = self._options.prune_older_than, self._options.verify_every
        if older_than is not None:
            yield "prune", PRUNE_EVERY, partial(self._prune, older_than)
        if every is not None:
            yield "verify", every, partial(self._verify, every)

    def _keep(self, task: str, every: timedelta, work: Callable[[], None]) -> None:
        """Do `work` at each turn, until it is over. After an error it is done again at the next turn."""
        turn = None
        while not self._over.is_set():
            wait = 0.0
            try:
                now = self._now()
                turn = turn or (now // every.total_seconds() + 1) * every.total_seconds()
                if now < turn:
                    wait = min(turn - now, LONGEST_NAP_SECONDS)
                else:
                    turn = None
                    work()
            except Exception as error:  # noqa: BLE001 - one bad night must not be the last one
                logger.error("engagement.housekeeping_failed task=%s error=%s", task, describe(error))
                wait = min(RETRY_SECONDS, every.total_seconds())
            self._over.wait(wait)

    def _match_receipts(self) -> None:
        """Look for the messages of the latest kept receipts each minute, and of all of them each hour."""
        for minute in count():
            if self._over.wait(MATCH_EVERY.total_seconds()):
                return
            self._receipts.look(self._over, LATELY if minute % 60 else None)

    def _now(self) -> float:
        """Return the database's clock, in seconds since 1970."""
        with self._engine.connect() as connection:
            return float(connection.execute(select(func.extract("epoch", func.clock_timestamp()))).scalar_one())

    def _prune(self, older_than: timedelta) -> None:
        pruned, batch = 0, PRUNE_BATCH
        while batch == PRUNE_BATCH and not self._over.is_set():
            with Session(self._engine) as session, session.begin():
                if not self._is_our_turn(session, "prune"):
                    break
                batch = EngagementMessageRepository(session).prune_messages(older_than, PRUNE_BATCH)
            pruned += batch
            self._over.wait(PAUSE_SECONDS)
        if pruned:
            logger.info("engagement.pruned messages=%s", pruned)

    def _verify(self, every: timedelta) -> None:
        with Session(self._engine) as session, session.begin():
            if not self._is_our_turn(session, "verify"):
                return
            violations = verify(session, schema=self._options.schema)
            for violation in violations:
                logger.error("engagement.violation promise=%s message_id=%s", violation.promise, violation.message_id)
                if violation.more:
                    logger.error("engagement.more_violations promise=%s", violation.promise)
            logger.info("engagement.verified violations=%s", len(violations))
            session.execute(select(func.set_config("idle_in_transaction_session_timeout", "0", True)))  # noqa: FBT003
            self._over.wait(min(GRACE_SECONDS, every.total_seconds() / 2))

    def _is_our_turn(self, session: Session, task: str) -> bool:
        """Take the lock of `task` until the end of the transaction, unless another worker has it.

        Any role that may connect can hold it. A worker's transaction ends before the next turn: if the same one has it
        then, nobody does the work, and that is an error.
        """
        name = f"engagement_housekeeping:{schema_in_session(self._options.schema, session)}:{task}"
        if session.scalar(turns.take_turn(name)):
            self._holders.pop(task, None)
            return True
        holders = session.execute(turns.who_has_turn(name)).all()
        level = logging.ERROR if holders and holders == self._holders.get(task) else logging.INFO
        logger.log(level, "engagement.turn_taken task=%s pids=%s", task, [row.pid for row in holders])
        self._holders[task] = holders
        return False
