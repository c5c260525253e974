"""How long a worker sleeps that finds nothing to send."""

from __future__ import annotations

from engagement._claim import START, Position
from engagement._delivery.cursor import RESTART_SECONDS

VAIN_SECONDS = 0.01
"""How soon to claim again if a message is due and none could be claimed: another session has it locked, or its
destination is busy. Each further claim in vain doubles it, up to the poll interval."""
HEARING_SECONDS = 60.0
"""How long a worker sleeps at most that is woken for each new message: one wake-up may be lost."""


class Sleep:
    """The longest sleep, and the wait after claims in vain."""

    def __init__(self, poll_interval: float) -> None:
        self.poll_interval = poll_interval
        self.hears = False
        """Whether a wake-up would be heard."""
        self.after_vain = 0.0
        """How long to wait with the next claim if something is due: the last one claimed nothing."""

    @property
    def longest(self) -> float:
        """For how long to sleep if nothing becomes due."""
        return max(self.poll_interval, HEARING_SECONDS) if self.hears else self.poll_interval

    def claimed(self, *, any_: bool) -> None:
        """Note whether a claim found anything."""
        doubled = min(max(2 * self.after_vain, VAIN_SECONDS), self.poll_interval)
        self.after_vain = 0.0 if any_ else doubled

    def peeked(self, waits: float, after: Position) -> float:
        """Return how long to sleep if something is due in so many seconds.

        That is a timer: it is claimed at the moment at which it is due, and not at a poll. A look that began at a place
        in the queue is soon followed by one from the beginning: a message that was committed late lies before it.
        """
        self.after_vain = 0.0
        longest = self.longest if after == START else min(self.longest, max(self.poll_interval, RESTART_SECONDS))
        return min(longest, waits)

    def woken(self, *, hears: bool) -> None:
        """Note that there may be something new, and whether the next time would be heard."""
        self.hears = hears
        self.after_vain = 0.0
