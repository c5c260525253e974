"""Where in the queue the next claim starts."""

from __future__ import annotations

from collections.abc import Iterable

from engagement._claim import START, Position

RESTART_SECONDS = 1.0
"""A claim starts where the last one ended, past the dead index entries of earlier claims. A message that was
back-dated, or committed late, lies before that place. So one claim starts from the beginning this often."""
RESTART_SHARE = 0.1
"""The most of its time that a worker spends on that: while another session holds an old snapshot, no dead entry can be
removed, and to step over all of them takes ever longer.

See docs/decisions.md#2026-11-24--a-claim-starts-from-the-beginning-for-a-tenth-of-the-time-at-most."""
LONGEST_RESTART_SECONDS = 60.0
"""No start is put off for longer: the last one may have waited for a lock, or the machine may have slept."""


class Cursor:
    """A place in the queue behind the messages that were claimed, and when to start from the beginning.

    One that does not move stays at the beginning: a message that was passed over for another worker's send lies behind.
    """

    def __init__(self, *, moves: bool = True) -> None:
        self._moves = moves
        self.position = START
        self._restart_at = 0.0

    def start(self, now: float) -> Position:
        """Return where to look from."""
        return START if self._is_to_restart(now) else self.position

    def peeked(self, after: Position, took: float, now: float) -> float | None:
        """Note a look from a place. Return how soon one from the beginning may follow; None if this was one."""
        if after != START:
            return max(self._restart_at - now, 0.0)
        self.claimed(None, took, now)
        return None

    def starts(self, now: float, *, passed_over: Iterable[Position], is_last: bool) -> list[Position]:
        """Return where to claim from, and if `is_last` where else if nothing is there.

        An earlier claim skipped messages whose destination was busy. They are older than the cursor, so the next one
        goes back to the oldest message in hand: `passed_over` are the places of those.
        """
        if self._is_to_restart(now):
            return [START]
        start = min([self.position, *passed_over])
        return [start, START] if is_last else [start]

    def claimed(self, position: Position | None, restart_took: float | None, now: float) -> None:
        """Go on behind the last message that was claimed. A start from the beginning puts the next one off.

        The longer it took, the rarer it is: `RESTART_SHARE` of the time at most.
        """
        if position is not None:
            self.position = position
        if restart_took is not None:
            wait = min(max(RESTART_SECONDS, restart_took / RESTART_SHARE), LONGEST_RESTART_SECONDS)
            self._restart_at = now + wait

    def _is_to_restart(self, now: float) -> bool:
        return not self._moves or now >= self._restart_at

    def go_back(self, places: Iterable[Position]) -> None:
        """Start no later than the first of these places."""
        self.position = min([self.position, *places])
