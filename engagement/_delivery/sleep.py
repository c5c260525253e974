"""How long a worker sleeps that finds nothing to send."""

from __future__ import annotations

VAIN_SECONDS = 0.01
"""How soon to claim again if a message is due and none could be claimed: another session has it locked, or its
destination is busy. Each further claim in vain doubles it, up to the poll interval."""


class Sleep:
    """The sleep until something is due, and the wait after claims in vain."""

    def __init__(self, poll_interval: float) -> None:
        self._poll_interval = poll_interval
        self._heed_at = 0.0
        self._was_woken = False
        self.after_vain = 0.0
        """How long to wait with the next claim if something is due: the last one claimed nothing."""

    def claimed(self, now: float, *, any_: bool) -> None:
        """Note whether a claim found anything."""
        doubled = min(max(2 * self.after_vain, VAIN_SECONDS), self._poll_interval)
        self.after_vain = 0.0 if any_ else doubled
        self._heed_at = 0.0 if any_ else now + VAIN_SECONDS

    def woken(self, now: float) -> float:
        """Return when to look after a wake-up: at once, but after a claim in vain a moment later.

        So a flood of forged wake-ups costs a hundred looks a second at most.
        """
        self._was_woken = True
        return max(now, self._heed_at)

    def peeked(self, waits: float, restarts_in: float | None) -> float:
        """Return how long to sleep if something is due in so many seconds.

        That is a timer: it is claimed at the moment at which it is due, and not at a poll. `restarts_in` says
        how soon a look from the beginning may follow; None if this was one. It is owed to a wake-up: the message of a
        transaction that took long lies before the cursor.
        """
        self.after_vain = 0.0
        if restarts_in is None:
            self._was_woken = False
        elif self._was_woken:
            waits = min(waits, max(restarts_in, VAIN_SECONDS))
        return min(self._poll_interval, waits)
