"""What a worker does next, played against histories without a database: thousands of steps a second."""
# ruff: noqa: C901, D102  # a world of its own, whose methods say what happens there

from collections import Counter
from copy import copy
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from random import Random
from types import SimpleNamespace
from unittest.mock import patch

from conftest import outgoing
from hypothesis import event, given, settings
from hypothesis import strategies as st

from engagement._claim import START, Claim
from engagement._delivery import transaction
from engagement._delivery.cursor import LONGEST_RESTART_SECONDS
from engagement._delivery.database import Claimed, Holder, Settled
from engagement._delivery.options import Options
from engagement._delivery.schedule import next_step
from engagement._delivery.state import State
from engagement._delivery.steps import Ask, Beat, Collect, Extend, GiveUp, Nap, Over, Peek, Tell, Transact
from engagement._delivery.transaction import Transactions
from engagement._delivery.verdicts import Verdicts
from engagement.models import MessageStatus
from engagement.outcomes import InDoubt, NotSent, Postpone, Sent

EPOCH = datetime(2026, 1, 1, tzinfo=UTC)
MOST_STEPS_AT_ONCE = 40
CALM_STEPS = 500
"""So long nothing more happens to a worker, before it is stopped."""
MOST_STEPS_TO_THE_END = 1_500


class DatabaseError(Exception):
    """What a database may answer."""


@dataclass
class Row:
    """A message of the pretended table."""

    id: int
    due_at: float
    destination: str
    status: str = "pending"
    attempt: int = 0
    name: str = ""
    lease_until: float = 0.0

    @property
    def place(self):
        return (EPOCH + timedelta(seconds=self.due_at), self.id)


@dataclass
class Call:
    """A call that was handed to the pretended sender. It may be taken back until it has begun."""

    claims: list
    has_begun: bool = False
    is_taken_back: bool = False
    hangs: bool = False

    @property
    def is_send(self):
        return not self.claims[0].lost_workers

    def cancel(self):
        self.is_taken_back = not self.has_begun
        return self.is_taken_back


class Table:
    """The pretended table, as `_delivery.database` speaks to it."""

    def __init__(self, world):
        self.world = world
        self.rows = {}

    def settle(self, _connection, verdicts):
        settled = Settled()
        for claim, verdict in verdicts:
            self.world.let_commits_happen(claim.message.id)  # It waits for the lock.
            row = self.rows[claim.message.id]
            if row.status == "sending" and row.name == claim.claimed_by:
                row.status = str(verdict.status)
                if row.status == "pending":
                    row.due_at = self.world.now + (verdict.delay.total_seconds() if verdict.delay else 1.0)
                settled.now.append((claim, verdict.status))
        if self.world.choose(40) == 1:
            self.world.is_stopped = True  # While the worker waits for this.
        return settled

    def adopt(self, _connection, holder, *, names):
        return [self._hold(row, holder) for row in self.unlocked() if row.status == "sending" and row.name in names]

    def take_over(self, _connection, holder, *, limit, held, broken, **_):
        lost = [row for row in self.expired() if row.id not in held]
        recovery = Holder(f"{holder.name}/recovery/1", holder.lease)
        return [self._hold(row, recovery, lost_workers=1) for row in lost[:limit]]

    def claim(self, _connection, holder, *, limit, after, busy, one_per_destination, **_):
        assert not self.world.is_stopped, "it claims after a stop"
        taken, destinations = [], {*busy}
        for row in self.due():
            if row.place > after and row.destination not in destinations and len(taken) < limit:
                assert not one_per_destination or row.destination not in self.world.destinations_in_use()
                row.attempt += 1
                taken.append((row.place, self._hold(row, holder)))
                if one_per_destination:
                    destinations.add(row.destination)
        return Claimed([claim for _, claim in taken], {}, taken[-1][0] if taken else None)

    def pauses(self, *_):
        return []

    def due(self):
        due = [row for row in self.unlocked() if row.status == "pending" and row.due_at <= self.world.now]
        return sorted(due, key=lambda row: row.place)

    def expired(self):
        return [row for row in self.unlocked() if row.status == "sending" and row.lease_until <= self.world.now]

    def unlocked(self):
        """Return the rows that no transaction has changed whose commit is still under way."""
        locked = {row.id for _, rows in self.world.late_commits for row in rows}
        return [row for row in self.rows.values() if row.id not in locked]

    def add(self, due_at, destination, **more):
        number = len(self.rows) + 1
        self.rows[number] = Row(number, due_at, destination, **more)

    def as_it_is(self):
        return {row.id: copy(row) for row in self.rows.values()}

    def _hold(self, row, holder, *, lost_workers=0):
        until = self.world.now + self.world.lease
        row.status, row.name, row.lease_until = "sending", holder.name, until
        message = outgoing(id=row.id, attempt=row.attempt, destination_jid=row.destination)
        return Claim(message, row.place, holder.name, until, lost_workers=lost_workers)


@dataclass
class World:
    """A worker among everything that it does not decide. The tape says what happens; zero is the ordinary."""

    tape: list
    options: Options
    sends_many: bool
    can_be_asked: bool
    until_empty: bool
    limit: int | None
    is_ready_in_the_end: bool = True
    ready_hangs: bool = False
    now: float = 1_000_000.0

    def __post_init__(self):
        self.table = Table(self)
        self.state = State(
            self.options,
            self.now,
            sends_many=self.sends_many,
            can_be_asked=self.can_be_asked,
            until_empty=self.until_empty,
            limit=self.limit,
        )
        self.verdicts = Verdicts(self.options, idempotent=True)
        stop = SimpleNamespace(is_set=lambda: self.is_stopped)
        self.transactions = Transactions(self.options, self.state, stop, idempotent=True, verdict=self.verdicts.of)
        self.lease = self.options.lease.total_seconds()
        self.min_interval = self.options.min_interval.total_seconds()
        self.is_stopped = self.is_asked = False
        self.is_ready = not self.can_be_asked
        self.calls, self.late_commits, self.lost_names = [], [], set()
        self.claimed = self.fatal_errors = self.calm = 0
        self.restarted_at = self.extended_at = self.failed_at = self.begun_at = self.unknown_at = -1.0
        self.settled = Counter()
        for _ in range(self.choose(6)):
            self.table.add(self.now - 1.0, "abc"[self.choose(3)])

    def choose(self, ways):
        """Return a number below `ways`; 0, the ordinary, once the tape is over."""
        return self.tape.pop() % ways if self.tape else 0

    def do(self, step):
        match step:
            case Transact():
                self._check(step)
                self._transact(step)
            case Peek():
                self._check(step)
                self._peek(step)
            case Extend(claims):
                assert self.now > self.extended_at, "it extends again at once"
                self._extend(claims)
            case GiveUp(claims):
                for claim in claims:
                    goes_on = not claim.handle.cancel()
                    outcome = InDoubt("late") if goes_on or claim.lost_workers else Postpone(EPOCH, "never began")
                    self.state.given_up(claim, outcome, self.verdicts.of(claim, outcome), goes_on=goes_on)
            case Ask():
                assert self.can_be_asked
                assert not self.is_asked
                self.is_asked = True
                self.state.asked(self.now)
            case Tell():
                self.state.readiness.told(self.now)
            case Beat():
                assert self.state.heartbeat.is_to_go_alone(self.now), "it beats before it is time"
                self.state.heartbeat.beat(self.now)
            case Collect(until) | Nap(until):
                assert until > self.now
                if self.state.hand.claims:
                    assert until <= self.now + self.lease / 3 + 0.001, "it sleeps while a lease runs out"
                elif isinstance(step, Collect):
                    assert until <= self.now + 1, "a stop is not heard"
                part = self.choose(4)
                self.now = until if part == 0 else self.now + (until - self.now) * part / 4

    def _check(self, step):
        """Hold a step against what is really there."""
        has_failed = self.failed_at >= 0.0
        if has_failed and not self.state.hand.verdicts:
            assert self.now > self.failed_at, "it does not wait for the database"
        if isinstance(step, Peek):
            return
        going_on = sum(len(call.claims) for call in self.calls if not call.is_taken_back)
        assert step.wanted <= max(self.options.concurrency - going_on, 0)
        for claim, verdict in step.verdicts:
            self.settled[claim] += 1
            assert has_failed or self.settled[claim] == 1 or verdict.status is MessageStatus.SENT
        if not step.wanted:
            return
        assert not self.is_stopped
        assert not self.state.failure
        assert self.is_ready
        assert not self.is_asked
        assert not (self.sends_many and going_on)
        assert self.limit is None or step.wanted <= self.limit - self.claimed
        assert not (has_failed and step.verdicts), "it risks a verdict for a claim"
        if self.min_interval:
            assert step.wanted == 1
            assert not [call for call in self.calls if not call.has_begun and not call.is_taken_back and call.is_send]
            assert self.now >= self.begun_at + self.min_interval

    def _transact(self, step):
        before = self.table.as_it_is()
        taken = self.transactions.do(None, step, self.table)
        own = sum(not claim.lost_workers for claim in taken.claims)
        self._note_start(step.starts[:1])
        match self.choose(10):
            case 1:
                self.table.rows = before
                self._fails(self.state.undone, DatabaseError(), will_mend=True)
            case 2 if self.choose(6) == 1:
                self.table.rows = before
                self.fatal_errors += 1
                self._fails(self.state.undone, DatabaseError(), will_mend=False)
            case 3 | 4 | 5 as how:
                # The commit happened, or it never will, or it is still under way.
                after = self.table.as_it_is()
                if how != 3:
                    self.table.rows = before
                if how == 5:
                    changed = [row for row in after.values() if row != before[row.id]]
                    self.late_commits.append((self.now + self.lease * self.choose(3) / 3, changed))
                self.unknown_at = self.now
                if taken.name:
                    self.lost_names.add(taken.name)
                self._fails(self.state.commit_unknown, DatabaseError())
                assert not taken.name or taken.name in self.state.names.unacknowledged
            case _:
                self.failed_at = -1.0
                self.claimed += own
                assert len(taken.claims) <= step.wanted, "it starts more than it may"
                self.state.committed(step, taken, self.now)
                self._start(taken.claims)

    def _fails(self, tell, *error, **more):
        tell(*error, self.now, **more)
        self.failed_at = self.now

    def _peek(self, step):
        self._note_start([step.after])
        if self.choose(10) == 1:
            self._fails(self.state.undone, DatabaseError(), will_mend=True)
            return
        self.failed_at = -1.0
        rows = self.table.unlocked()
        moments = [row.due_at for row in rows if row.status == "pending" and row.place > step.after]
        moments += [row.lease_until for row in rows if row.status == "sending"]
        waits = min([3600.0, *(max(0.0, moment - self.now) for moment in moments)])
        self.state.peeked(step, waits, took=self.choose(3) * 0.1, now=self.now)

    def _note_start(self, starts):
        if START in starts:
            self.restarted_at = self.now
        if starts and not self.state.outage.is_on:
            assert self.restarted_at >= self.now - LONGEST_RESTART_SECONDS, "what was back-dated is not found"

    def _start(self, claims):
        if not self.sends_many:
            going_to = [claim.message.destination_jid for claim in claims if not claim.lost_workers]
            assert len(going_to) == len({*going_to}), "two go to one destination"
            assert not {*going_to} & self.destinations_in_use()
        for group in [claims] if self.sends_many and claims else [[claim] for claim in claims]:
            call = Call(group)
            self.calls.append(call)
            for claim in group:
                claim.started_at, claim.handle = self.now, call

    def _extend(self, claims):
        self.extended_at = self.now
        if self.choose(6) == 1:
            is_fatal = self.choose(12) == 1
            self.fatal_errors += is_fatal
            self.state.not_extended(DatabaseError(), self.now, will_mend=not is_fatal)
            return
        until = {}
        for claim in claims:
            row = self.table.rows[claim.message.id]
            if row.status == "sending" and row.name == claim.claimed_by and self.choose(9) != 1:
                row.lease_until = until[claim] = self.now + self.lease
        self.state.extended(claims, until, self.now)

    # Time, and what comes with it

    def hear(self):
        """Let calls begin and end, as the tape says; in the end all of them do."""
        if self.is_asked and not self.ready_hangs and self.choose(2) == 0:
            self.is_asked = False
            self.is_ready = self.choose(4) != 1 and (bool(self.tape) or self.is_ready_in_the_end)
            self.state.ready_said(None if self.is_ready else "busy", self.now)
        for call in [*self.calls]:
            if call.is_taken_back:
                self.calls.remove(call)
            elif not call.has_begun and self.choose(2) == 0:
                self._begin(call)
            elif call.has_begun and not call.hangs and self.choose(3) == 0:
                self._end(call, [Sent(), NotSent("no"), InDoubt("?")][self.choose(3)])

    def _begin(self, call):
        call.has_begun = True
        call.hangs = self.options.send_timeout is not None and self.choose(20) == 1
        if any(claim.is_overdue or (self.now >= claim.held_until and not claim.lost_workers) for claim in call.claims):
            self._end(call, Postpone(EPOCH, "the lease ran out before the send"))
            return
        self.begun_at = self.now
        for claim in call.claims:
            row = self.table.rows[claim.message.id]
            if not claim.lost_workers:
                # A worker believes in its lease for no longer than the table does.
                assert (row.status, row.name, row.attempt) == ("sending", claim.claimed_by, claim.message.attempt)
                assert self.now <= row.lease_until
            claim.begun_at = self.now
            if self.min_interval:
                self.state.begun(claim)

    def _end(self, call, outcome):
        self.calls.remove(call)
        for claim in call.claims:
            self.state.answered(claim, outcome, self.verdicts.of(claim, outcome))

    def destinations_in_use(self):
        return {claim.message.destination_jid for call in self.calls if not call.is_taken_back for claim in call.claims}

    def let_commits_happen(self, changing=None):
        """Let those happen whose time has come, or that changed the row that is being changed."""
        for late in [*self.late_commits]:
            happens_at, rows = late
            if self.now >= happens_at or changing in {row.id for row in rows}:
                self.late_commits.remove(late)
                self.table.rows |= {row.id: row for row in rows}

    def _disturb(self):
        match self.choose(14):
            case 1 | 2:
                self.table.add(self.now + (-100.0, 0.0, 5.0, -5_000.0)[self.choose(4)], "abc"[self.choose(3)])
            case 3:
                self.now += (0.1, 1.0, 20.0)[self.choose(3)]
            case 4 if self.choose(8) == 1:
                self.is_stopped = True
            case 5:  # Another worker was lost.
                lost = {"status": "sending", "attempt": 1, "name": "other", "lease_until": self.now}
                self.table.add(self.now, "abc"[self.choose(3)], **lost)
            case 6:  # Another worker takes over.
                for row in self.table.expired():
                    row.name, row.lease_until = "other", self.now + 3 * self.lease
        self.let_commits_happen()
        if self.is_stopped:
            self.state.stopped()

    def run(self):
        """Play to the end."""
        at_once = 0
        while True:
            self._disturb()
            before, step = self.now, self._ask_what_is_next()
            if isinstance(step, Over):
                self._check_end(step)
                return
            self.do(step)
            self.hear()
            at_once = at_once + 1 if self.now == before else 0
            assert at_once < MOST_STEPS_AT_ONCE, f"it spins: {step}"
            if not self.tape:
                self.calm += 1
                if self.calm == CALM_STEPS and not self.until_empty:
                    self._check_calm()
                    self.is_stopped = True
                assert self.calm < MOST_STEPS_TO_THE_END, f"it never ends: {step}"

    def _ask_what_is_next(self):
        step = next_step(self.state, self.now)
        assert next_step(self.state, self.now) == step, "the question changed something"
        return step

    def _check_calm(self):
        """After a while without trouble everything is where it belongs."""
        assert not [row for row in self.table.rows.values() if row.name in self.lost_names and row.status == "sending"]
        if self.now > self.unknown_at + self.lease + 2 * self.options.poll_interval.total_seconds():
            assert not self.state.names.unacknowledged
        is_ready = self.is_ready and not (self.can_be_asked and self.ready_hangs)
        if is_ready and not self.state.failure and self.limit is None and not any(c.hangs for c in self.calls):
            assert not self.table.due()
            assert not self.table.expired()

    def _check_end(self, step):
        event("with an error" if step.error else "stopped" if self.is_stopped else "nothing was left")
        hand = self.state.hand
        if self.state.has_given_up:
            assert self.fatal_errors > 1 or self.until_empty or hand.is_empty
        else:
            assert hand.is_empty, "it is over with something in hand"
            is_answered = not self.is_asked or self.state.readiness.is_silent(self.now)
            assert is_answered or self.is_stopped or step.error or self.limit is not None
        if not step.error and not self.is_stopped and self.limit is None:
            assert self.until_empty
            has_hung = any(call.hangs for call in self.calls) or self.ready_hangs
            assert self.calm < 3 or has_hung or not self.is_ready or not self.table.due(), "something due was left"
        for _, rows in self.late_commits:
            self.table.rows |= {row.id: row for row in rows}
        self.late_commits.clear()
        self.transactions.give_back(None)
        begun = {claim for call in self.calls for claim in call.claims}
        held = {row.id for row in self.table.rows.values() if row.status == "sending" and row.name in self.lost_names}
        assert held <= {claim.message.id for claim in begun}


SECONDS = st.sampled_from([timedelta(seconds=1), timedelta(seconds=5), timedelta(seconds=30)])


@settings(max_examples=800, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    length=st.integers(0, 600),
    options=st.fixed_dictionaries(
        {
            "concurrency": st.integers(1, 3),
            "lease": SECONDS,
            "min_interval": st.sampled_from([timedelta(0), timedelta(0), timedelta(seconds=2)]),
            "send_timeout": st.none() | SECONDS,
            "poll_interval": SECONDS,
        }
    ),
    sends_many=st.booleans(),
    can_be_asked=st.booleans(),
    is_ready_in_the_end=st.booleans(),
    ready_hangs=st.sampled_from([False, False, False, True]),
    until_empty=st.booleans(),
    limit=st.none() | st.none() | st.integers(0, 9),
)
def test_every_history_keeps_the_promises(seed, length, options, **world):
    """No run ends with anything in hand, claims after a stop or more than is free, or begins a send that it lost."""
    tape = Random(seed).choices(range(5_040), k=length)
    played = World(tape, Options(**options, worker_name="w", backoff=lambda _: timedelta(seconds=1)), **world)
    with patch.object(transaction, "database", played.table), patch.object(transaction, "clock", lambda: played.now):
        played.run()
