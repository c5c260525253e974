"""How long a worker sleeps that finds nothing to send."""

from __future__ import annotations

VAIN_SECONDS = 0.01
"""How soon to claim again if a message is due and none could be claimed: another session has it locked, or its
destination is busy. Each further claim in vain doubles it, up to the poll interval."""


class Sleep:
    """The sleep until something is due, and the wait after claims in vain."""

    def __init__(self, poll_interval: float) -> None:
        self._poll_interval = poll_interval
        self.after_vain = 0.0
        """How long to wait with the next claim if something is due: the last one claimed nothing."""

    def claimed(self, *, any_: bool) -> None:
        """Note whether a claim found anything."""
        doubled = min(max(2 * self.after_vain, VAIN_SECONDS), self._poll_interval)
        self.after_vain = 0.0 if any_ else doubled

    def peeked(self, waits: float) -> float:
        """Return how long to sleep if something is due in so many seconds.

        That is a timer: it is claimed at the moment at which it is due, and not at a poll.
        """
        self.after_vain = 0.0
        return min(self._poll_interval, waits)
