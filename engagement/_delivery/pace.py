"""The least time between the starts of two sends."""

from __future__ import annotations

from math import inf

from engagement._claim import Claim


class Pace:
    """The next send starts `interval` seconds after the last one began, which may be long after its claim."""

    def __init__(self, interval: float) -> None:
        self.interval = interval
        self._awaited: Claim | None = None
        self._begun_at = -inf

    @property
    def next_at(self) -> float:
        """When the next send may start: infinitely far away while the last one has not begun."""
        return inf if self._awaited else self._begun_at + self.interval

    def started(self, claim: Claim) -> None:
        """Note that a send was handed over."""
        if self.interval and claim.known is None:
            self._awaited = claim

    def begun(self, claim: Claim) -> None:
        """Note that a send has begun, at `claim.begun_at`."""
        self._begun_at = max(self._begun_at, claim.begun_at or -inf)
        self.answered(claim)

    def answered(self, claim: Claim) -> None:
        """Wait no longer for a send to begin: it has, or it never will."""
        if self._awaited is claim:
            self._awaited = None
