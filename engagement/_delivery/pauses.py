"""The pauses that a worker has met, for the log."""

from __future__ import annotations

from collections.abc import Collection

from engagement._logging import logger


class HeardPauses:
    """Logs a pause when it is first met, and when it is over: once each, and not at each poll."""

    def __init__(self) -> None:
        self._in_force: frozenset[str] = frozenset()

    def hear(self, paused: Collection[str]) -> None:
        """Note the pauses that hold this worker back now (`everything`, `type campaign`, `sender main`)."""
        now = frozenset(paused)
        for pause in sorted(now - self._in_force):
            logger.warning("engagement.paused what=%r", pause)
        for pause in sorted(self._in_force - now):
            logger.warning("engagement.resumed what=%r", pause)
        self._in_force = now
