"""One run of a worker: claim, send, settle, and recover the messages of lost workers.

A claim is committed before anything is sent, and no transaction is open while somebody else's server is waited for.
One thread does all the database work; `Sender` runs the transport beside it. `schedule.next_step` names the
next step, `State` hears its result.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import timedelta
from functools import partial
from typing import TypeVar, assert_never

from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from engagement._claim import Claim, clock
from engagement._delivery import database, one_by_one
from engagement._delivery.dispatch import Dispatch
from engagement._delivery.listening import Listener
from engagement._delivery.options import Options
from engagement._delivery.presence import Presence
from engagement._delivery.schedule import next_step
from engagement._delivery.state import State
from engagement._delivery.steps import Ask, Beat, Collect, Extend, GiveUp, Nap, Over, Peek, Step, Taken, Tell, Transact
from engagement._delivery.tally import ProcessResult, Tally
from engagement._delivery.transacting import Transacting
from engagement._delivery.transaction import Transactions
from engagement._delivery.verdicts import Verdicts
from engagement._logging import logger
from engagement._sending.protocols import Transport
from engagement._sending.sender import Sender
from engagement._sql.errors import DriverFailed, describe, is_of_one_message, is_transient, is_undone
from engagement._watching import observers
from engagement._watching.observers import Round

T = TypeVar("T")

ERRORS_KEPT = 1_000
"""Errors that a worker's result keeps: it may run for months."""


def deliver(
    engine: Engine,
    transport: Transport,
    options: Options,
    stop: threading.Event,
    *,
    until_empty: bool = False,
    limit: int | None = None,
) -> ProcessResult:
    """Deliver until `stop` is set or, with `until_empty`, until nothing is due. Return the counts."""
    paced = options.min_interval > timedelta(0)
    sender = Sender(transport, concurrency=options.concurrency, classify=options.rule, tells_begun=paced)
    state = State(
        options,
        clock(),
        sends_many=sender.sends_many,
        can_be_asked=sender.can_be_asked,
        until_empty=until_empty,
        limit=limit,
    )
    tally = Tally(errors_kept=None if until_empty else ERRORS_KEPT)
    delivery = Delivery(engine, transport, options, stop, sender=sender, state=state, tally=tally)
    try:
        with ExitStack() as beside:
            if options.wake_up:
                beside.enter_context(Listener(engine, options.listen_on, sender).beside())
            delivery.work()
    finally:
        try:
            delivery.end()
        finally:
            sender.close()
    return tally.result()


class Delivery:
    """Does each step and reports its result to `state`."""

    def __init__(
        self,
        engine: Engine,
        transport: Transport,
        options: Options,
        stop: threading.Event,
        *,
        sender: Sender,
        state: State,
        tally: Tally,
    ) -> None:
        verdicts = Verdicts(options, idempotent=sender.idempotent)
        self._lease, self._types = options.lease, options.types
        self._stop = stop
        self._sender = sender
        self._state = state
        self._tally = tally
        self._presence = Presence(transport, options, state, tally)
        self._in_transaction = Transacting(engine, state, self._presence).do
        self._dispatch = Dispatch(transport, sender, options, state, verdicts)
        self._transactions = Transactions(options, state, stop, idempotent=sender.idempotent, verdict=verdicts.of)

    def work(self) -> None:
        """Do step after step, until it is over."""
        while True:
            self._dispatch.hear()
            if self._stop.is_set():
                self._state.stopped()
            step = next_step(self._state, clock())
            if isinstance(step, Over):
                break
            self._do(step)
        if step.error is not None:
            raise _plainer(step.error)

    def _do(self, step: Step) -> None:
        match step:
            case Transact():
                self._transact(step)
            case Collect(until):
                self._dispatch.hear(until - clock())
            case Extend(claims):
                self._extend(claims)
            case Peek():
                self._peek(step)
            case GiveUp(claims):
                self._give_up(claims)
            case Ask():
                self._dispatch.ask()
            case Tell(why):
                self._tell(why)
            case Beat():
                self._presence.go_alone(self._in_transaction)
            case Nap(until):
                self._dispatch.nap(until - clock(), self._stop)
            case _:
                assert_never(step)

    def _give_up(self, claims: Sequence[Claim]) -> None:
        for claim in claims:
            self._dispatch.give_up(claim)

    def _transact(self, step: Transact) -> None:
        """Do it with all messages at once, or one by one if the data of one of them make that fail."""
        names = self._state.names
        for how in (database, one_by_one):
            try:
                taken = self._in_transaction(partial(self._transactions.do, step=step, how=how))
            except SQLAlchemyError as error:
                if how is one_by_one or not is_of_one_message(error):
                    self._failed(error)
                    return
                logger.warning("engagement.one_by_one error=%s", describe(error))
                names.undo()
                names.in_ascii()
            else:
                break
        self._tell_of(step, taken)
        self._state.committed(step, taken, clock())
        # They may be sent from here on. An error before this line gives them back.
        self._sender.start(taken.claims)
        if len(self._state.hand.claims) > 1:
            time.sleep(0)  # Other threads run: sends that take no time end before the database is asked.

    def _tell_of(self, step: Transact, taken: Taken) -> None:
        settled = [(claim, verdict, taken.recorded.get(claim)) for claim, verdict in step.verdicts]
        for each in settled:
            self._tally.add(*each)
        self._tally.end(taken.ended)
        observers.committed(Round(taken.started_at, settled, taken.claims, taken.ended))

    def _failed(self, error: SQLAlchemyError) -> None:
        """Wait for the database, or give up. The verdicts stay: an error after a send is no failed send."""
        now, will_mend = clock(), is_transient(error)
        if will_mend and not is_undone(error):
            self._state.commit_unknown(error, now)
        else:
            self._state.undone(error, now, will_mend=will_mend)
        if self._state.outage.is_on:
            wait = max(self._state.outage.retry_at - now, 0.0)
            logger.warning("engagement.database_lost error=%s wait_seconds=%.1f", describe(error), wait)

    def _peek(self, step: Peek) -> None:
        asked_at = clock()
        try:
            waits = self._in_transaction(partial(self._transactions.seconds_to_work, after=step.after))
        except SQLAlchemyError as error:
            self._failed(error)
        else:
            self._state.peeked(step, waits, took=clock() - asked_at, now=clock())

    def _extend(self, claims: Sequence[Claim]) -> None:
        now = clock()
        try:
            try:
                extended = self._in_transaction(partial(database.extend, lease=self._lease, held=claims))
            except SQLAlchemyError as error:
                if not is_of_one_message(error):
                    raise
                extended = self._in_transaction(partial(one_by_one.extend, lease=self._lease, held=claims))
        except SQLAlchemyError as error:
            self._state.not_extended(error, now, will_mend=is_transient(error))
            logger.warning("engagement.leases_not_extended error=%s", describe(error))
            return
        # Now that it is committed, and no sooner: a send must not begin under a lease that the database does not know.
        self._state.extended(claims, extended, now)

    def _tell(self, why: str) -> None:
        self._dispatch.note_silence(why)
        try:
            self._in_transaction(partial(database.note_not_ready, reason=why, types=self._types))
        except Exception as error:  # noqa: BLE001 - it is for people only, also if the encoding lacks a character of it
            logger.warning("engagement.not_ready_not_told error=%s", type(error).__name__)
        self._state.readiness.told(clock())

    def end(self) -> None:
        """Give back claims whose commit was not acknowledged, and be seen no more."""
        if self._state.names.unacknowledged:
            try:
                self._in_transaction(self._transactions.give_back)
            except SQLAlchemyError as error:
                logger.warning("engagement.claims_not_released error=%s", describe(error))
        self._presence.leave(self._in_transaction)


def _plainer(error: Exception) -> BaseException:
    """Return the driver's own error, which says more than ours around it."""
    return (error.__cause__ if isinstance(error, DriverFailed) else None) or error
