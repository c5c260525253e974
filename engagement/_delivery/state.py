"""The state of a run, and how each event changes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf

from engagement._claim import Claim
from engagement._delivery.cursor import Cursor
from engagement._delivery.hand import Hand
from engagement._delivery.heartbeat import Heartbeat
from engagement._delivery.leases import Leases
from engagement._delivery.names import Names
from engagement._delivery.options import Options
from engagement._delivery.outage import Outage
from engagement._delivery.pace import Pace
from engagement._delivery.readiness import Readiness
from engagement._delivery.sleep import Sleep
from engagement._delivery.steps import Peek, Taken, Transact
from engagement.outcomes import Outcome, Refused, Sent, Verdict, Withdraw

# A tuple: to make a union of them takes longer than to look.
_FINAL = (Sent, Refused, Withdraw)


class State:
    """The state of one run. Each method folds in an event; `now` is the time by `clock`."""

    def __init__(
        self,
        options: Options,
        now: float,
        *,
        sends_many: bool = False,
        can_be_asked: bool = False,
        until_empty: bool = False,
        limit: int | None = None,
    ) -> None:
        self.concurrency = options.concurrency
        self.poll_interval = options.poll_interval.total_seconds()
        self.send_timeout = inf if options.send_timeout is None else options.send_timeout.total_seconds()
        self.sends_many = sends_many
        self.until_empty = until_empty
        self.hand = Hand()
        self.cursor = Cursor(moves=not options.in_order)
        self.names = Names(options.name)
        self.outage = Outage()
        self.sleep = Sleep(self.poll_interval)
        self.pace = Pace(options.min_interval.total_seconds())
        self.readiness = Readiness(can_be_asked=can_be_asked)
        self.leases = Leases(options.lease.total_seconds(), now)
        self.heartbeat = Heartbeat(now)
        self.left = inf if limit is None else limit
        """How many messages may still be claimed."""
        self.is_stopped = False
        self.failure: Exception | None = None
        """The error that ends the run, once the messages in hand are settled. Nothing is claimed until then."""
        self.has_given_up = False
        """Whether a second error ends the run with messages in hand."""
        self.is_idle = False
        """Whether the last look found nothing that could be sent. The next one peeks before it claims."""
        self.look_at = 0.0
        """When to claim again without an answer that makes room."""
        self.recover_at = 0.0
        """When to take over from lost workers again."""
        self.give_back_at = 0.0
        """When to give back again, while commits are unacknowledged."""

    def stopped(self) -> None:
        """Claim nothing any more."""
        self.is_stopped = True

    def begun(self, claim: Claim) -> None:
        """Note that a send has begun."""
        self.pace.begun(claim)

    def answered(self, claim: Claim, outcome: Outcome, verdict: Verdict) -> None:
        """Note that a call is over."""
        if not isinstance(outcome, _FINAL):
            self.readiness.doubt()
        self.pace.answered(claim)
        if self.hand.overdue and claim in self.hand.overdue:
            self.hand.overdue.remove(claim)
            self.cursor.go_back([claim.place])
            self.sleep.after_vain = self.look_at = 0.0
        if claim.is_overdue and not isinstance(outcome, Sent):
            return  # The message is in doubt already.
        self.hand.keep(claim, verdict)
        self.outage.retry()

    def given_up(self, claim: Claim, outcome: Outcome, verdict: Verdict, *, goes_on: bool) -> None:
        """Wait for an answer no longer; the call itself may go on."""
        self.answered(claim, outcome, verdict)
        if goes_on:
            claim.is_overdue = True
            self.hand.overdue.add(claim)

    def asked(self, now: float) -> None:
        """Note that the transport is being asked whether it is ready."""
        self.readiness.asked(now)

    def ready_said(self, why_not: str | None, now: float) -> None:
        """Note that the transport is ready, or why not."""
        self.readiness.said(why_not, now)
        if why_not is not None:
            self.is_idle, self.look_at = True, now + self.poll_interval

    def woken(self, now: float) -> None:
        """Note that something may be due. It is a hint, which shortens a sleep and does nothing else."""
        look_at = self.sleep.woken(now)
        if not self.readiness.is_refused and look_at < self.look_at:
            self.is_idle, self.look_at = False, look_at

    def peeked(self, step: Peek, waits: float, *, took: float, now: float) -> None:
        """Note in how many seconds the database has something to do."""
        self.outage.over()
        if waits <= 0:
            self.is_idle, self.look_at, self.recover_at = False, now + self.sleep.after_vain, 0.0
            return
        self.look_at = now + self.sleep.peeked(waits, self.cursor.peeked(step.after, took, now))

    def committed(self, step: Transact, taken: Taken, now: float) -> None:
        """Note that a transaction was committed: the messages that it claimed may be started."""
        self.outage.over()
        self.cursor.go_back(claim.place for claim, _ in step.verdicts)
        self.hand.let_go()
        self.cursor.claimed(taken.position, taken.restart_took, now)
        if taken.recovered_all:
            self.recover_at = now + self.leases.seconds / 4
        self.names.acknowledge(now, none_left=bool(taken.name) or step.gives_back)
        self.give_back_at = now + min(self.poll_interval, self.leases.seconds / 3)
        if not self.hand.claims:
            self.leases.begin(now)
        self.hand.take(taken.claims)
        if own := [claim for claim in taken.claims if not claim.lost_workers]:
            self.pace.started(own[-1])
            self.left -= len(own)
        if taken.name:
            self.is_idle = not taken.any
            self.sleep.claimed(now, any_=taken.any)  # Idle, a worker asks how long it may sleep.
            self.look_at = now + self.poll_interval if self.is_idle and self.until_empty else 0.0
        elif step.verdicts:
            # It claimed nothing, since there was no room, or no time yet: now there may be.
            self.is_idle, self.look_at = self.readiness.is_refused, 0.0

    def undone(self, error: Exception, now: float, *, will_mend: bool) -> None:
        """Note that a transaction failed, and that nothing of it happened."""
        self.names.undo()
        self._failed(error, now, will_mend=will_mend)

    def commit_unknown(self, error: Exception, now: float) -> None:
        """Note that a commit was not acknowledged. If it happened, its messages are to be adopted: none was started."""
        self.names.lose(now + self.leases.seconds)
        self.give_back_at = now + min(self.poll_interval, self.leases.seconds / 3)
        self._failed(error, now, will_mend=True)

    def extended(self, claims: Sequence[Claim], until: Mapping[Claim, float], now: float) -> None:
        """Note that leases were extended, and that this was committed."""
        self.leases.extended(claims, until, now)

    def not_extended(self, error: Exception, now: float, *, will_mend: bool) -> None:
        """Note that no lease was extended."""
        self.leases.not_extended(now)
        if not will_mend:
            self.failure = self.failure or error

    def _failed(self, error: Exception, now: float, *, will_mend: bool) -> None:
        waited_enough = not self.outage.database_was_reached or self.outage.lasts(now) > self.leases.seconds
        if will_mend and not (self.until_empty and waited_enough):
            self.outage.failed(now)
            return
        # The messages in hand are finished first: the error may concern the next claim only (a column that is missing).
        self.has_given_up = self.failure is not None
        self.failure = error
