"""How a lost database is waited for."""

from __future__ import annotations

import random

WAIT_SECONDS = (0.1, 10.0)
"""The first and the longest wait."""


class Outage:
    """The time since the database answered last. Each failure doubles the wait."""

    def __init__(self) -> None:
        self.is_on = False
        self.database_was_reached = False
        self.retry_at = 0.0
        """When to try again."""
        self._wait = 0.0
        self._since = 0.0

    def lasts(self, now: float) -> float:
        """Return for how long."""
        return now - self._since if self.is_on else 0.0

    def failed(self, now: float) -> None:
        """Note that the database did not answer."""
        first, longest = WAIT_SECONDS
        if not self.is_on:
            self._since = now
        self._wait = min(self._wait * 2, longest) if self.is_on else first
        self.is_on = True
        self.retry_at = now + self._wait * random.uniform(0.8, 1.2)  # noqa: S311 - no secret

    def retry(self) -> None:
        """Try at once: there is something more to settle."""
        self.retry_at = 0.0

    def over(self) -> None:
        """Note that the database has answered."""
        self.is_on = False
        self.database_was_reached = True
        self.retry_at = 0.0
