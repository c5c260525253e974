"""Receipts in a transaction of our own: recorded, and `on_settled` called for the messages that they settle."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from engagement._delivery.database import messages
from engagement._delivery.hook import Hook, OnSettled
from engagement._logging import logger
from engagement._receiving import keeping, recording
from engagement._sql import receiving
from engagement._sql.errors import describe
from engagement._sql.host_sessions import HostSession
from engagement._sql.keeping import KEPT_FOR
from engagement._sql.own_transactions import connect, transaction
from engagement._watching import observers
from engagement.messages import ReceiptAnswer, Recorded
from engagement.models import MessageStatus

LATELY = timedelta(minutes=10)
"""Most receipts come a moment too soon: those of the last minutes are looked for more often than the others."""
_PATIENCE = timedelta(seconds=10)


def settle_by(
    connection: Connection, record: Callable[[Session], Sequence[ReceiptAnswer]], hook: Hook | None
) -> Sequence[ReceiptAnswer]:
    """Record receipts, and call the hook for each message that has another status by them. Only COMMIT may follow."""
    with Session(connection) as session:
        answers = record(session)
    if hook is not None and (ends := _ends(answers)):
        hook.call(connection, [(message, ends[message.id]) for message in messages(connection, sorted(ends))])
    return answers


def _ends(answers: Iterable[ReceiptAnswer]) -> dict[int, MessageStatus]:
    """Return the last status of each message that has another one now than before all of them."""
    before: dict[int, MessageStatus | None] = {}
    ends: dict[int, MessageStatus] = {}
    for each in answers:
        if each.message_id is not None and each.status is not None:
            before.setdefault(each.message_id, each.before)
            ends[each.message_id] = each.status
    return {message_id: status for message_id, status in ends.items() if status != before[message_id]}


class KeptReceipts:
    """The kept receipts, for a worker that records those whose messages are known by now. Nothing is sent for one."""

    def __init__(self, engine: Engine, on_settled: OnSettled | None) -> None:
        self._engine = engine
        self._hook = None if on_settled is None else Hook(on_settled, _PATIENCE.total_seconds())

    def look(self, stop: threading.Event, within: timedelta | None = None) -> None:
        """Match the receipts that were kept `within` a time, or all of them, and drop then those of more than a day.

        An error is logged, and nothing is lost by it: a receipt is taken out in the transaction that records it.
        """
        try:
            while not stop.is_set():
                answers = self._match(within)
                if not answers:
                    break
                recorded = sum(each.answer is Recorded.RECORDED for each in answers)
                logger.info("engagement.receipts_matched receipts=%s recorded=%s", len(answers), recorded)
            if within is None and not stop.is_set():
                self._drop()
        except SQLAlchemyError as error:
            logger.error("engagement.housekeeping_failed task=receipts error=%s", describe(error))

    def _match(self, within: timedelta | None) -> Sequence[ReceiptAnswer]:
        def record(session: Session) -> Sequence[ReceiptAnswer]:
            host = HostSession(session, None)
            receipts = keeping.take_matching(host, within)
            if not receipts:
                return ()
            session.execute(receiving.settings(), {"patience": f"{_PATIENCE // timedelta(milliseconds=1)}ms"})
            return recording.record(host, receipts, keeps=False)

        with connect(self._engine) as connection, transaction(connection):
            return settle_by(connection, record, self._hook)

    def _drop(self) -> None:
        with connect(self._engine) as connection, transaction(connection), Session(connection) as session:
            dropped = keeping.drop_older(HostSession(session, None), KEPT_FOR)
        if dropped:
            logger.info("engagement.receipts_dropped receipts=%s", dropped)
            observers.dropped(dropped)
