"""The messages in hand."""

from __future__ import annotations

from collections.abc import Iterable

from engagement._claim import Claim
from engagement.outcomes import Verdict


class Hand:
    """The claims of a worker: being sent, answered and not yet settled, or given up without an answer."""

    def __init__(self) -> None:
        self.claims: dict[int, Claim] = {}
        """By message id, from the claim until the settlement."""
        self.verdicts: list[tuple[Claim, Verdict]] = []
        """The verdicts that are not settled yet, in the order of the answers."""
        self.overdue: set[Claim] = set()
        """Calls that outlasted `send_timeout`. Each still occupies a thread and its destination.

        See docs/decisions.md#2026-11-24--send_timeout-is-an-option-of-the-worker."""

    @property
    def is_empty(self) -> bool:
        """Whether nothing is in hand that has to be settled. A call that was given up may still go on."""
        return not self.claims and not self.verdicts

    @property
    def unanswered(self) -> list[Claim]:
        """The claims that wait for an answer."""
        if not self.verdicts:
            return [*self.claims.values()]
        answered = {claim for claim, _ in self.verdicts}
        return [claim for claim in self.claims.values() if claim not in answered]

    @property
    def in_use(self) -> int:
        """How many calls go on once the verdicts are settled."""
        # A set: a claim that was given up and then answered has two verdicts.
        settling = {claim for claim, _ in self.verdicts if self.claims.get(claim.message.id) is claim}
        return len(self.claims) - len(settling) + len(self.overdue)

    @property
    def busy(self) -> set[str]:
        """The destinations of calls that go on: each gets its messages in order, one at a time."""
        return {claim.message.destination_jid for claim in (*self.unanswered, *self.overdue)}

    def handed_over_by(self, moment: float) -> list[Claim]:
        """Return the claims that were handed over by then, and wait for an answer."""
        return [claim for claim in self.unanswered if claim.started_at <= moment and claim.handle is not None]

    def take(self, claims: Iterable[Claim]) -> None:
        """Take new claims."""
        self.claims |= {claim.message.id: claim for claim in claims}

    def keep(self, claim: Claim, verdict: Verdict) -> None:
        """Keep a verdict until it is settled."""
        self.verdicts.append((claim, verdict))

    def let_go(self) -> None:
        """Let go of the claims with a verdict: it is committed."""
        for claim, _ in self.verdicts:
            if self.claims.get(claim.message.id) is claim:
                del self.claims[claim.message.id]
        self.verdicts.clear()
