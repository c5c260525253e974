"""The host's `on_settled`: called for each message that a transaction settles, last in it."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial

from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError

from engagement._logging import logger
from engagement._sql.errors import describe
from engagement._sql.lending import Lender
from engagement.messages import OutgoingMessage
from engagement.models import MessageStatus

OnSettled = Callable[[Connection, OutgoingMessage, MessageStatus], object]
"""A function of the host's that writes beside a settlement, in its transaction; `Worker` describes it."""

SHARE_OF_A_LEASE = 1 / 3
"""The time of all calls in a transaction. Meanwhile no lease is extended, which is due after a third."""
MOST_LOST = 5
"""So many transactions may be lost in the call for a message. Then it is settled without one: nothing else would be."""


class Hook:
    """Calls `on_settled`, and logs its errors. Each undoes its own part, and nothing of ours.

    All calls in a transaction have `seconds` together.
    """

    def __init__(self, on_settled: OnSettled, seconds: float) -> None:
        self._on_settled = on_settled
        self._seconds = seconds
        self._lost: Counter[int] = Counter()

    def call(self, connection: Connection, settled: Iterable[tuple[OutgoingMessage, MessageStatus]]) -> None:
        """Call it once for each message, with its last status. No statement of ours may follow but COMMIT.

        Raises the database's error, or `TransactionEnded`, if a call has cost the transaction.
        """
        last = {message.id: (message, status) for message, status in settled}
        if not last:
            return
        lender = Lender(connection, self._seconds)
        # In one order everywhere, or two workers that write to the same users would deadlock.
        for message, status in sorted(last.values(), key=lambda pair: (pair[0].user_id, pair[0].id)):
            self._call(lender, message, status)

    def _call(self, lender: Lender, message: OutgoingMessage, status: MessageStatus) -> None:
        if self._lost[message.id] >= MOST_LOST:
            logger.error("engagement.on_settled_skipped message_id=%s status=%s", message.id, status)
            return
        try:
            error = lender.lend(partial(self._work, message, status))
        except SQLAlchemyError as lost:
            self._lost[message.id] += 1
            _tell(message, lost)
            raise
        if error is not None:
            _tell(message, error)

    def _work(self, message: OutgoingMessage, status: MessageStatus, connection: Connection) -> None:
        answer = self._on_settled(connection, message, status)
        if inspect.iscoroutine(answer) or inspect.isgenerator(answer):
            answer.close()
            raise TypeError(f"on_settled: returned a {type(answer).__name__}, which has done nothing")


def why_no_hook(given: object) -> str | None:
    """Return why `given` cannot be called with a connection, a message and a status; None if it can."""
    if not callable(given):
        return f"must be a function, not {type(given).__name__}"
    if inspect.iscoroutinefunction(given) or inspect.iscoroutinefunction(type(given).__call__):
        return "must be a plain function, not async: the worker's connection is a sync one"
    try:
        inspect.signature(given).bind(None, None, None)
    except TypeError:
        return "must take a connection, a message and a status"
    except ValueError:  # Written in C, without a signature.
        return None
    return None


def _tell(message: OutgoingMessage, error: BaseException) -> None:
    logger.error("engagement.on_settled_failed message_id=%s error=%s", message.id, describe(error))
