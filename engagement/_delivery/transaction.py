"""One transaction of a worker: settle, adopt, take over, claim; or settle and give back. Then the host's hook."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import ModuleType

from sqlalchemy import Connection

from engagement._claim import START, Claim, Position, clock
from engagement._delivery import database
from engagement._delivery.database import Holder, Settled
from engagement._delivery.hook import SHARE_OF_A_LEASE, Hook
from engagement._delivery.options import Options
from engagement._delivery.pauses import HeardPauses
from engagement._delivery.state import State
from engagement._delivery.steps import Taken, Transact
from engagement.models import EARLIEST
from engagement.outcomes import InDoubt, Outcome, Postpone, Verdict

MEND_SECONDS = 60.0
"""How soon a message that could not be claimed is tried again: somebody may have mended it."""


class Transactions:
    """Does steps on connections that are passed in. A step that failed can be done again."""

    def __init__(
        self,
        options: Options,
        state: State,
        stop: threading.Event,
        *,
        idempotent: bool,
        verdict: Callable[[Claim, Outcome], Verdict],
    ) -> None:
        self._lease = options.lease
        self._types, self._in_order = options.types, options.in_order
        self._sender = options.sender
        self._max_retries = options.max_retries
        self._hand = state.hand
        self._names = state.names
        self._sends_many = state.sends_many
        self._until_empty = state.until_empty
        self._stop = stop
        self._idempotent = idempotent
        self._verdict = verdict
        self._hook = (
            None
            if options.on_settled is None
            else Hook(options.on_settled, options.lease.total_seconds() * SHARE_OF_A_LEASE)
        )
        self._pauses = HeardPauses()
        self._broken: set[int] = set()
        self._mend_at = 0.0

    def do(self, connection: Connection, step: Transact, how: ModuleType) -> Taken:
        """Do `step`; `how` is `database` for all messages at once, or `one_by_one`."""
        taken, settled = Taken(), Settled()
        if step.verdicts:
            settled = how.settle(connection, step.verdicts)
            taken.recorded = settled.recorded
        if step.gives_back:
            self.give_back(connection)
        if self._hook is not None and settled.now:
            # The next one claims: claims would be locked here while the host's function waits for its own locks.
            self._hook.call(connection, [(claim.message, status) for claim, status in settled.now])
            return taken
        if step.wanted and not self._stop.is_set():
            self._take(connection, step, how, taken)
        if self._hook is not None:
            self._hook.call(connection, taken.ended.items())
        return taken

    def seconds_to_work(self, connection: Connection, after: Position) -> float:
        """Return in how many seconds there is work, and log the pauses that hold this worker back."""
        waits, paused = database.look_ahead(connection, after, self._types, self._sender)
        self._pauses.hear(paused)
        return waits

    def _take(self, connection: Connection, step: Transact, how: ModuleType, taken: Taken) -> None:
        """Adopt, take over and claim, until there are as many as `step` wants."""
        earlier = [*self._names.unacknowledged]
        taken.name = self._names.begin()
        holder = Holder(taken.name, self._lease)
        if earlier:
            taken.claims += self._startable(step, connection, database.adopt(connection, holder, names=earlier))
        if clock() >= self._mend_at:
            self._mend_at = clock() + MEND_SECONDS
            self._broken.clear()
        if step.takes_over:
            lost = how.take_over(
                connection,
                holder,
                limit=step.wanted - len(taken.claims),
                held=self._hand.claims,
                broken=self._broken,
                types=self._types,
            )
            taken.recovered_all = len(lost) + len(taken.claims) < step.wanted
            taken.claims += map(self._unless_it_kills, lost)
        if step.wanted > len(taken.claims) and not self._stop.is_set():  # A stop may have come meanwhile.
            self._claim(step, holder, taken, how, connection)

    def give_back(self, connection: Connection) -> None:
        """Give back the claims of commits that were not acknowledged: nobody will start them now."""
        if not (names := self._names.unacknowledged):
            return
        holder = Holder(self._names.next(), self._lease)
        self._return(connection, database.adopt(connection, holder, names=names))

    def _return(self, connection: Connection, claims: list[Claim]) -> None:
        unstarted = Postpone(EARLIEST, "its worker was told of the claim too late to send it")
        if claims:
            database.settle(connection, [(claim, self._verdict(claim, unstarted)) for claim in claims])

    def _startable(self, step: Transact, connection: Connection, adopted: list[Claim]) -> list[Claim]:
        """Return the claims that can be started, and give the others back.

        Two commits that came late may bring more than there is room for, or two messages to one destination.
        """
        chosen: list[Claim] = []
        busy = {*step.busy}
        for claim in sorted(adopted, key=lambda claim: claim.place):
            if len(chosen) < step.wanted and claim.message.destination_jid not in busy:
                chosen.append(claim)
                if not self._sends_many:
                    busy.add(claim.message.destination_jid)
        self._return(connection, [claim for claim in adopted if claim not in chosen])
        return chosen

    def _claim(self, step: Transact, holder: Holder, taken: Taken, how: ModuleType, connection: Connection) -> None:
        busy = set() if self._sends_many else {*step.busy, *(claim.message.destination_jid for claim in taken.claims)}
        for start in step.starts:
            asked_at = clock()
            claimed = how.claim(
                connection,
                holder,
                limit=step.wanted - len(taken.claims),
                after=start,
                busy=busy,
                broken=self._broken,
                one_per_destination=not self._sends_many,
                idempotent=self._idempotent,
                types=self._types,
                in_order=self._in_order,
                sender=self._sender,
            )
            if start == START:
                taken.restart_took = clock() - asked_at
            taken.position = claimed.go_on_after
            if claimed.go_on_after is not None:
                break
        taken.claims += claimed.claims
        taken.ended = claimed.ended
        if self._until_empty and taken.position is None:  # The run may end here. A worker asks while it sleeps.
            self._pauses.hear(database.pauses(connection, self._types, self._sender))

    def _unless_it_kills(self, claim: Claim) -> Claim:
        """Park a message that kills its workers. A look-up is not repeated for ever (three workers lost: in doubt)."""
        if claim.lost_workers > 1 and claim.message.retry_count + claim.lost_workers >= self._max_retries:
            claim.known = InDoubt(f"{claim.lost_workers} workers were lost with it")
        return claim
