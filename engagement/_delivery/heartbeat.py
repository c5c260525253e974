"""When a worker says that it is alive."""

from __future__ import annotations

ALONG_SECONDS = 10.0
"""So old a sign of life is renewed in the next transaction that the worker makes anyway."""
ALONE_SECONDS = 15.0
"""So old it is renewed in a transaction of its own: the worker is idle, or a send takes long."""
MISSED = 3
"""After so many that did not come, the worker counts as gone."""


class Heartbeat:
    """The sign of life of a run. It is due with the first transaction."""

    def __init__(self, now: float) -> None:
        self._along_at = 0.0
        self.alone_at = now + ALONE_SECONDS

    def goes_along(self, now: float) -> bool:
        """Whether the transaction that begins now takes it along."""
        return now >= self._along_at

    def is_to_go_alone(self, now: float) -> bool:
        """Whether nothing took it along in time."""
        return now >= self.alone_at

    def beat(self, now: float) -> None:
        """Note that it was committed, or that it failed: nothing depends on it, and the next one may do better."""
        self._along_at, self.alone_at = now + ALONG_SECONDS, now + ALONE_SECONDS
