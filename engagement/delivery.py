"""One run of a worker: claim, send, settle, and recover what other workers left behind.

A claim is committed before anything is sent, and no transaction is open while somebody else's server is waited for.
One thread does all the database work; `Sender` runs the transport beside it.
"""

from __future__ import annotations

import random
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from itertools import count
from queue import Empty
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError

from engagement import claims, observing, one_by_one
from engagement.claims import Holder
from engagement.database_errors import (
    CannotConnect,
    DriverFailed,
    connect,
    describe,
    is_of_one_message,
    is_transient,
    is_undone,
    transaction,
)
from engagement.messages import OutgoingMessage
from engagement.models import EARLIEST, MessageStatus
from engagement.observing import Round
from engagement.outcomes import (
    InDoubt,
    Outcome,
    Postpone,
    Refused,
    Sent,
    Verdict,
    Withdraw,
    clean_reason,
    decide,
    exponential_backoff,
    storable,
)
from engagement.sending import CLOSE_SECONDS, Claim, Position, Sender, clock
from engagement.tally import ProcessResult, Tally, logger

if TYPE_CHECKING:
    from engagement.worker import Worker

T = TypeVar("T")

RESTART_SECONDS = 1.0
"""A claim starts where the last one ended, past the dead index entries of what was claimed before. What was back-dated
or committed late lies before that, so one starts from the beginning this often."""
RESTART_SHARE = 0.1
"""The most of its time that a worker spends on that: while another session holds an old snapshot, no dead entry can be
removed, and to step over all of them takes ever longer."""
LONGEST_RESTART_SECONDS = 60.0
"""But it is put off for no longer: that one took long may also have been a lock, or a machine that slept."""
LOST = 0.0
"""A lease that ran out long ago, by `clock`."""
MEND_SECONDS = 60.0
"""How soon a message that could not be claimed is tried again: somebody may have mended it."""
EXTEND_AGAIN_SECONDS = 1.0
"""How soon leases that could not be extended are tried again."""
STOP_SECONDS = 1.0
"""How soon a stop is heard while nothing is in hand, and an answer of the transport is waited for."""
READY_SECONDS = 1.0
TELL_SECONDS = 10.0
"""How long a transport is not ready before a worker writes that on the oldest due message, and then how often."""
BEGIN_POLL_SECONDS = 0.005
"""How soon a paced worker looks again whether the send that it handed over has begun."""
DATABASE_WAIT_SECONDS = (0.1, 10.0)
"""The first and the longest wait for a lost database."""
DEFAULT_BACKOFF = exponential_backoff()
ERRORS_KEPT = 1_000
"""Errors that a worker's result keeps: it may run for months."""


class Delivery:
    """One run of a worker: what it has in hand, and what it has done so far."""

    def __init__(self, worker: Worker, stop: threading.Event, *, until_empty: bool, limit: int | None) -> None:
        self._worker = worker
        self._stop = stop
        self._until_empty = until_empty
        self._left = limit
        # Nobody else may take our claims for theirs, also if they are given the same name.
        self._name = f"{worker.worker_name}#{secrets.token_hex(4)}"
        self._claims_made = count(1)
        self._unacknowledged: list[str] = []
        self._sender = Sender(worker.transport, concurrency=worker.concurrency, classify=worker.classify)
        self._in_hand: dict[int, Claim] = {}
        self._decided: list[tuple[Claim, Verdict]] = []
        self._overdue: set[Claim] = set()
        self._broken: set[int] = set()
        self._position = claims.START
        self._readiness: Future[Any] | None = None
        self._was_ready = False
        self._not_ready: str | None = None
        self._tell_at = 0.0
        self._is_paced = False
        self._found_nothing = False
        self._failure: SQLAlchemyError | None = None
        self._database_was_reached = False
        self._tally = Tally(errors_kept=None if until_empty else ERRORS_KEPT)
        # When something is to be done next, by `clock`.
        self._restart_at = self._recover_at = self._ask_at = self._mend_at = 0.0
        self._latest: Claim | None = None
        self._extend_at = clock() + self._lease / 3
        self._adopt_until = 0.0

    @property
    def _lease(self) -> float:
        return self._worker.lease.total_seconds()

    def run(self) -> ProcessResult:
        """Work until there is nothing to do, or until told to stop; then say what was done."""
        try:
            while not self._is_over():
                if self._round():
                    if len(self._in_hand) > 1:
                        time.sleep(0)  # Other threads run: sends that take no time end before the database is asked.
                    self._collect(0)
                elif not self._is_over():
                    self._wait()
        finally:
            self._release_unstarted()
            self._sender.close()
        if self._failure is not None:
            raise (isinstance(self._failure, DriverFailed) and self._failure.__cause__) or self._failure
        return self._tally.result()

    def _is_over(self) -> bool:
        if self._in_hand or self._decided:
            return False
        if self._stop.is_set() or self._failure is not None or self._left == 0:
            return True
        return self._until_empty and self._found_nothing

    # One round: settle, recover and claim in one transaction, then start

    def _round(self) -> bool:
        """Settle what was decided, and take and start what can be started now. Return whether there may be more."""
        wanted = self._wanted()
        is_to_give_back = bool(self._unacknowledged) and self._failure is None
        if not self._decided and not wanted and not is_to_give_back:
            return False
        try:
            taken = self._taken(wanted)
        except SQLAlchemyError as error:
            if self._failure is not None or is_transient(error):
                raise
            # What waiting does not mend may concern the claim only: what is in hand is finished before it is raised.
            self._failure = error
            return False
        if taken is None:
            return False
        self._note(taken)
        self._start(taken)
        self._found_nothing = bool(taken.name) and not taken.any
        was_put_off = wanted > 0 and not taken.name
        return taken.any or was_put_off

    def _taken(self, wanted: int) -> _Taken | None:
        """Do it with all messages at once, or one by one if the data of one of them make that fail."""
        for how in (claims, one_by_one):
            work, known = (partial(self._settle_and_take, how, wanted=number) for number in (wanted, 0))
            try:
                return self._in_transaction(work, known=known)
            except SQLAlchemyError as error:
                if how is one_by_one or not is_of_one_message(error):
                    raise
                logger.warning("engagement.one_by_one error=%s", describe(error))
                self._name = storable(self._name) or ""
        raise AssertionError

    def _settle_and_take(self, how: ModuleType, connection: Connection, *, wanted: int) -> _Taken:
        """Change nothing but the database; the whole is done again if the database is lost on the way."""
        taken = _Taken()
        if self._decided:
            taken.recorded = how.settle(connection, self._decided)
        if not wanted or self._stop.is_set():
            self._give_back_unstarted(connection)
            return taken
        holder = self._next_holder()
        taken.name = holder.name
        taken.claims += self._adopt(connection, holder)
        if clock() >= self._mend_at:
            self._mend_at = clock() + MEND_SECONDS
            self._broken.clear()
        if clock() >= self._recover_at:
            lost = how.take_over(connection, holder, limit=wanted, held=self._in_hand, broken=self._broken)
            taken.recovered_all = len(lost) < wanted
            taken.claims += map(self._unless_it_kills, lost)
        if wanted > len(taken.claims):
            self._claim(how, connection, holder, taken, limit=wanted - len(taken.claims))
        return taken

    def _unless_it_kills(self, claim: Claim) -> Claim:
        """Ask no more what became of a message when those who asked were lost too, as often as a send may fail."""
        if claim.lost_workers > 1 and claim.message.retry_count + claim.lost_workers >= self._worker.max_retries:
            claim.known = InDoubt(f"{claim.lost_workers} workers were lost with it")
        return claim

    def _next_holder(self) -> Holder:
        """Return a name for one transaction: if its commit is not acknowledged, what carries it was never started."""
        holder = Holder(self._next_name(), self._worker.lease)
        self._unacknowledged.append(holder.name)
        return holder

    def _next_name(self) -> str:
        return f"{self._name}/{next(self._claims_made)}"

    def _adopt(self, connection: Connection, holder: Holder) -> list[Claim]:
        earlier = [name for name in self._unacknowledged if name != holder.name]
        return claims.adopt(connection, holder, names=earlier) if earlier else []

    def _claim(self, how: ModuleType, connection: Connection, holder: Holder, taken: _Taken, *, limit: int) -> None:
        for after in self._claim_from():
            asked_at = clock()
            claimed = how.claim(
                connection,
                holder,
                limit=limit,
                after=after,
                busy=self._busy(taken.claims),
                broken=self._broken,
                one_per_destination=not self._sender.sends_many,
                idempotent=self._sender.idempotent,
            )
            if after == claims.START:
                taken.restart_took = clock() - asked_at
            taken.position = claimed.go_on_after
            if claimed.go_on_after is not None:
                break
        taken.claims += claimed.claims
        taken.ended = claimed.ended

    def _claim_from(self) -> list[Position]:
        """Return where to claim from, and where else if there is nothing."""
        if clock() >= self._restart_at:
            return [claims.START]
        after = [self._position]
        if not self._sender.sends_many:
            # Earlier claims passed over what goes to a destination in hand, which lies behind the message in hand.
            after += [claim.place for claim in (*self._in_hand.values(), *self._overdue)]
        is_last = self._until_empty and {claim for claim, _ in self._decided}.issuperset(self._in_hand.values())
        return [min(after), claims.START] if is_last else [min(after)]

    def _busy(self, taken: list[Claim]) -> set[str]:
        """Return where a send is under way, or about to be: a destination gets its messages in order, one at a time."""
        if self._sender.sends_many:
            return set()  # One batch at a time, in order.
        return {claim.message.destination_jid for claim in (*self._unanswered(), *self._overdue, *taken)}

    def _unanswered(self) -> list[Claim]:
        decided = {claim for claim, _ in self._decided}
        return [claim for claim in self._in_hand.values() if claim not in decided]

    def _note(self, taken: _Taken) -> None:
        settled = [(claim, verdict, taken.recorded.get(claim)) for claim, verdict in self._decided]
        for claim, verdict, status in settled:
            if self._in_hand.get(claim.message.id) is claim:
                del self._in_hand[claim.message.id]
            self._tally.add(claim, verdict, status)
        self._position = min([self._position, *(claim.place for claim, _ in self._decided)])
        self._decided.clear()
        self._tally.end(taken.ended)
        observing.committed(Round(taken.started_at, settled, taken.claims, taken.ended))
        if taken.position is not None:
            self._position = taken.position
        if taken.restart_took is not None:
            self._put_off_restart(taken.restart_took)
        if taken.recovered_all:
            self._recover_at = clock() + self._lease / 4

    def _start(self, taken: _Taken) -> None:
        own = [claim for claim in taken.claims if not claim.lost_workers]
        self._in_hand |= {claim.message.id: claim for claim in taken.claims}
        if own:
            self._latest = own[-1]
            if self._left is not None:
                self._left -= len(own)
        # From here on they may be sent: what fails before, gives them back.
        if taken.name in self._unacknowledged:
            self._unacknowledged.remove(taken.name)
        if clock() >= self._adopt_until:
            # A commit that was still under way on the server has happened by now, or never will.
            self._unacknowledged.clear()
        self._sender.start(taken.claims)

    # How much can be started now

    def _wanted(self) -> int:
        self._is_paced = clock() < self._start_at
        if self._stop.is_set() or self._failure is not None or self._is_paced:
            return 0
        for claim in [claim for claim in self._overdue if claim.handle and claim.handle.done()]:
            self._overdue.remove(claim)
            self._position = min(self._position, claim.place)
        settling = sum(self._in_hand.get(claim.message.id) is claim for claim, _ in self._decided)
        in_use = len(self._in_hand) - settling + len(self._overdue)
        free = self._worker.concurrency - in_use
        if self._sender.sends_many and in_use > 0:
            return 0
        if self._worker.min_interval:
            free = min(free, 1)
        if self._left is not None:
            free = min(free, self._left)
        return free if free > 0 and self._is_ready() else 0

    @property
    def _start_at(self) -> float:
        """When the next send may start: `min_interval` after the last one really began."""
        if self._latest is None or not self._worker.min_interval:
            return 0.0
        if self._latest.begun_at is not None:
            return self._latest.begun_at + self._worker.min_interval
        is_to_begin = self._in_hand.get(self._latest.message.id) is self._latest and self._latest.known is None
        return clock() + BEGIN_POLL_SECONDS if is_to_begin else 0.0

    def _is_ready(self) -> bool:
        """Ask the transport, and believe its answer for a second; what it has not answered yet counts as no."""
        if self._readiness is None and clock() >= self._ask_at:
            self._readiness = self._sender.ask_ready()
            self._was_ready = self._readiness is None
        if self._readiness is not None and self._readiness.done():
            self._was_ready = _is_true(self._readiness)
            self._note_readiness(None if self._was_ready else _why_not_ready(self._worker.transport))
            self._readiness = None
            self._ask_at = clock() + READY_SECONDS
        return self._was_ready and self._readiness is None

    def _note_readiness(self, why_not: str | None) -> None:
        if why_not is not None and why_not != self._not_ready:
            logger.warning("engagement.not_ready reason=%s", why_not or "unknown")
        if why_not is None or self._not_ready is None:
            self._tell_at = clock() + TELL_SECONDS
        self._not_ready = why_not

    def _tell_why_nothing_is_claimed(self) -> None:
        """Write it on the message that has been due for longest: `status` and the page are other processes."""
        if self._not_ready is None or (clock() < self._tell_at and not self._until_empty):
            return
        self._tell_at = clock() + TELL_SECONDS
        try:
            with self._begin() as connection:
                claims.note_not_ready(connection, reason=self._not_ready or "the transport is not ready")
        except Exception as error:  # noqa: BLE001 - it is for people only, also if the encoding lacks a character of it
            logger.warning("engagement.not_ready_not_told error=%s", type(error).__name__)

    # Waiting

    def _wait(self) -> None:
        if self._decided:
            return
        if self._in_hand or self._readiness is not None or self._is_ending():
            # With nothing in hand a stop ends the run, and is not to wait for a poll.
            self._collect(self._pause() if self._in_hand else min(self._pause(), STOP_SECONDS))
        elif self._is_paced:
            self._stop.wait(max(0.0, self._start_at - clock()))
        else:
            self._idle()

    def _is_ending(self) -> bool:
        """Whether a send that was given up has been asked to end, and may do so any moment."""
        patience = (self._worker.send_timeout or 0.0) + CLOSE_SECONDS
        return any(clock() < claim.started_at + patience for claim in self._overdue)

    def _idle(self) -> None:
        """Sleep until there is work. One small query a poll."""
        self._tell_why_nothing_is_claimed()
        if self._until_empty:
            self._found_nothing = True  # Not ready: a cron job comes again.
            return
        while not self._stop.wait(self._worker.poll_interval):
            self._collect(0)
            if self._unacknowledged:
                return  # A commit may still be on its way, and what it claimed is to be adopted.
            asked_at = clock()
            after = claims.START if asked_at >= self._restart_at else self._position
            is_waiting: bool | None = self._in_transaction(partial(claims.is_work_waiting, after=after))
            if self._decided or is_waiting:
                self._recover_at = 0.0
                return
            if after == claims.START:
                self._put_off_restart(clock() - asked_at)

    def _put_off_restart(self, took: float) -> None:
        self._restart_at = clock() + min(max(RESTART_SECONDS, took / RESTART_SHARE), LONGEST_RESTART_SECONDS)

    def _collect(self, timeout: float) -> None:
        """Wait for an answer, then take all that are there; extend leases and notice overdue sends on the way."""
        arrived: list[tuple[Claim, Outcome] | None] = []
        try:
            arrived.append(
                self._sender.answers.get(timeout=timeout) if timeout > 0 else self._sender.answers.get(block=False)
            )
            while True:
                arrived.append(self._sender.answers.get(block=False))
        except Empty:
            pass
        for answer in arrived:
            if answer is not None:
                self._decide(*answer)
        self._give_up_overdue()
        if clock() >= self._extend_at:
            self._extend_leases()

    def _pause(self) -> float:
        """Return how long nothing has to be done unless an answer arrives."""
        until = [self._extend_at]
        if self._worker.send_timeout is not None:
            until += [claim.started_at + self._worker.send_timeout for claim in self._unanswered()]
        if len(self._in_hand) < self._worker.concurrency:
            start_at = self._start_at
            until.append(start_at if start_at > clock() else clock() + self._worker.poll_interval)
        return max(min(until) - clock(), 0.001)

    def _decide(self, claim: Claim, outcome: Outcome) -> None:
        if not isinstance(outcome, Sent | Refused | Withdraw):
            self._ask_at = 0.0  # The next message may fare no better.
        if claim.is_overdue and not isinstance(outcome, Sent):
            return  # It is in doubt, and this adds nothing.
        self._decided.append((claim, self._verdict(claim, outcome)))

    def _verdict(self, claim: Claim, outcome: Outcome) -> Verdict:
        return decide(
            outcome,
            retry_count=claim.message.retry_count,
            max_retries=self._worker.max_retries,
            idempotent=self._sender.idempotent,
            worker_lost=claim.lost_workers > 0,
            backoff=self._backoff,
        )

    def _backoff(self, failures: int) -> timedelta:
        """Ask the host's rule; one that breaks must not lose what happened."""
        try:
            wait = self._worker.backoff(failures)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever it is
            logger.error("engagement.backoff_failed error=%s", type(error).__name__)
        else:
            if isinstance(wait, timedelta):
                return wait
            logger.error("engagement.backoff_failed type=%s", type(wait).__name__)
        return DEFAULT_BACKOFF(failures)

    def _give_up_overdue(self) -> None:
        timeout = self._worker.send_timeout
        if timeout is None:
            return
        for claim in self._unanswered():
            if clock() >= claim.started_at + timeout and claim.handle is not None:
                if claim.handle.cancel() and not claim.lost_workers:
                    self._decide(claim, Postpone(EARLIEST, f"it could not begin within {timeout:g} s"))
                    continue
                self._decide(claim, InDoubt(f"no answer within {timeout:g} s"))
                claim.is_overdue = True
                self._overdue.add(claim)

    def _extend_leases(self) -> None:
        self._extend_at = clock() + self._lease / 3
        if not self._in_hand:
            return
        held = list(self._in_hand.values())
        try:
            try:
                with self._begin() as connection:
                    extended = claims.extend(connection, self._worker.lease, held)
            except SQLAlchemyError as error:
                if not is_of_one_message(error):
                    raise
                with self._begin() as connection:
                    extended = one_by_one.extend(connection, self._worker.lease, held)
        except SQLAlchemyError as error:
            if not is_transient(error):
                self._failure = self._failure or error  # What is in hand is finished before it is raised.
            self._extend_again()
            logger.warning("engagement.leases_not_extended error=%s", describe(error))
            return
        # Now that it is committed, and no sooner: a send must not begin under a lease that the database does not know.
        for claim in held:
            claim.held_until = extended.get(claim, LOST)
        if len(extended) < len(held):
            self._extend_again()  # Some may only be locked for a moment.

    def _extend_again(self) -> None:
        self._extend_at = clock() + min(self._lease / 3, EXTEND_AGAIN_SECONDS)

    # The database

    def _release_unstarted(self) -> None:
        """Give back claims whose commit was not acknowledged: nobody will start them now."""
        if not self._unacknowledged:
            return
        try:
            with self._begin() as connection:
                self._give_back_unstarted(connection)
        except SQLAlchemyError as error:
            logger.warning("engagement.claims_not_released error=%s", describe(error))

    def _give_back_unstarted(self, connection: Connection) -> None:
        unstarted = Postpone(EARLIEST, "its worker was told of the claim too late to send it")
        for claim in self._adopt(connection, Holder(self._next_name(), self._worker.lease)):
            claims.settle(connection, [(claim, self._verdict(claim, unstarted))])

    def _in_transaction(
        self, work: Callable[[Connection], T], *, known: Callable[[Connection], T] | None = None
    ) -> T | None:
        """Do `work` and commit, as often as it takes for the database to answer. None if stopped with nothing in hand.

        After a failure, what was decided is settled first, by `known`, whatever becomes of the rest of the work.

        An error after the send is no failed send: what is known stays known, and is recorded once the database is
        back. A commit that was not acknowledged may have happened: settling twice is recognised, and claims that
        nobody was told of are adopted.
        """
        first, longest = DATABASE_WAIT_SECONDS
        lost_at, wait = clock(), first
        while True:
            earlier = len(self._unacknowledged)
            try:
                with self._begin() as connection:
                    result = work(connection)
            except SQLAlchemyError as error:
                if is_undone(error) or not is_transient(error):
                    del self._unacknowledged[earlier:]
                else:
                    self._adopt_until = clock() + self._lease
                if not is_transient(error):
                    raise
                if self._gives_up(lost_at):
                    if not self._in_hand or self._failure is not None:
                        raise
                    self._failure = error  # What is in hand is finished first.
                    return None
                logger.warning("engagement.database_lost error=%s wait_seconds=%.1f", describe(error), wait)
            else:
                self._database_was_reached = True
                return result
            if self._stop.is_set() and not self._decided:
                return None
            self._sleep(wait * random.uniform(0.8, 1.2))  # noqa: S311 - no secret
            wait = min(wait * 2, longest)
            if self._decided and known is not None:
                work = known

    @contextmanager
    def _begin(self) -> Iterator[Connection]:
        try:
            connection = connect(self._worker.engine)
        except CannotConnect as error:
            if not self._database_was_reached and error.__cause__ is not None:
                raise error.__cause__ from None  # It may never work, and who starts the worker should see why.
            raise
        with connection, transaction(connection):
            yield connection

    def _gives_up(self, lost_at: float) -> bool:
        return self._until_empty and (not self._database_was_reached or clock() > lost_at + self._lease)

    def _sleep(self, seconds: float) -> None:
        if self._in_hand:
            # The database may answer all but what has just failed.
            until, known = clock() + seconds, len(self._decided)
            while len(self._decided) == known and (left := until - clock()) > 0:
                self._collect(min(left, self._pause()))
        elif self._stop.is_set():
            time.sleep(seconds)  # A stop is no reason to forget what is to be settled.
        else:
            self._stop.wait(seconds)


@dataclass(slots=True)
class _Taken:
    """What one transaction did, to be noted once it is committed."""

    name: str = ""
    started_at: int = field(default_factory=time.time_ns)
    recorded: dict[Claim, MessageStatus] = field(default_factory=dict)
    claims: list[Claim] = field(default_factory=list)
    ended: dict[OutgoingMessage, MessageStatus] = field(default_factory=dict)
    position: Position | None = None
    restart_took: float | None = None
    recovered_all: bool = False

    @property
    def any(self) -> bool:
        return bool(self.claims or self.ended)


def _is_true(answer: Future[Any]) -> bool:
    error = answer.exception()
    if error is not None:
        logger.warning("engagement.ready_failed error=%s", type(error).__name__)
        return False
    said = answer.result()
    if not isinstance(said, bool):  # Most of what is no answer is true to Python.
        logger.warning("engagement.ready_failed error=TypeError answered=%s", type(said).__name__)
    return said is True


def _why_not_ready(transport: object) -> str:
    """Return what a transport says that it waits for, or nothing."""
    try:
        return clean_reason(getattr(transport, "why_not_ready", None)) or ""
    except Exception:  # noqa: BLE001 - the host's code, and no reason to stop
        return ""
