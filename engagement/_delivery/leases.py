"""When the leases of the messages in hand are extended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from engagement._claim import Claim

LOST = 0.0
"""A lease that ran out long ago, by `clock`."""
EXTEND_AGAIN_SECONDS = 1.0
"""How soon leases that could not be extended are tried again."""


class Leases:
    """Leases of `seconds`, which are extended after a third of that."""

    def __init__(self, seconds: float, now: float) -> None:
        self.seconds = seconds
        self.begin(now)

    def begin(self, now: float) -> None:
        """Count from now: nothing else is in hand."""
        self.extend_at = now + self.seconds / 3

    def extended(self, claims: Sequence[Claim], until: Mapping[Claim, float], now: float) -> None:
        """Believe in the new leases: they are committed. A claim that `until` lacks is lost, or locked for now."""
        for claim in claims:
            claim.held_until = until.get(claim, LOST)
        self.begin(now)
        if len(until) < len(claims):
            self.not_extended(now)

    def not_extended(self, now: float) -> None:
        """Try again soon."""
        self.extend_at = now + min(self.seconds / 3, EXTEND_AGAIN_SECONDS)
