"""The trouble of a client: how long it pauses, and whether the provider is asked before a message is risked."""

from __future__ import annotations

import threading
from datetime import timedelta
from time import monotonic, sleep

FIRST_PAUSE, LONGEST_PAUSE = timedelta(seconds=1), timedelta(minutes=15)
PATIENCE_SECONDS = 4.0
"""`ready()` waits out a pause that is as short as this: a cron job's run ends at the first no."""


class Trouble:
    """The memory of trouble. Thread-safe.

    After trouble there is a pause, each time twice as long (1 s, 2 s, 4 s), until a message gets through. The provider
    is suspect (`is_suspect`) at the beginning and after trouble, until a question or a message is answered well.
    """

    def __init__(self) -> None:
        self.begin_anew()
        self._troubles = 0
        self._paused_until = 0.0
        self.reason: str | None = None
        """The last trouble, until a message gets through (`webhook: HTTP 503`)."""
        self._is_suspect = True  # A cron job's process may have been started into an outage.

    def begin_anew(self) -> None:
        """In a forked process, share no lock with the parent: one of its threads may have held it."""
        self._lock = threading.Lock()

    def may_try(self) -> bool:
        """Whether there is no pause. A short one is waited out here."""
        left = self.seconds_paused
        if 0 < left <= PATIENCE_SECONDS:
            sleep(left)
        return left <= PATIENCE_SECONDS

    @property
    def seconds_paused(self) -> float:
        """The seconds that are left of the pause."""
        with self._lock:
            return max(self._paused_until - monotonic(), 0.0)

    @property
    def is_suspect(self) -> bool:
        """Whether to ask the provider first (for its health, with HEAD), before a message is risked."""
        with self._lock:
            return self._is_suspect

    def note_trouble(self, wait: timedelta | None = None, *, reason: str | None = None) -> None:
        """Pause for `wait`, or longer: 1 s at the first trouble, twice as long at each further one, at most 15 min."""
        now = monotonic()
        with self._lock:
            if now >= self._paused_until:  # Twenty threads may fail in one pause: that is one trouble.
                self._troubles += 1
            pause = max(FIRST_PAUSE * 2 ** min(self._troubles - 1, 10), wait or timedelta(0))
            self._paused_until = max(self._paused_until, now + min(pause, LONGEST_PAUSE).total_seconds())
            self._is_suspect = True
            self.reason = reason or self.reason

    def note_answer(self) -> None:
        """Believe that the provider works: it answered a question. The trouble stays until a message gets through."""
        with self._lock:
            self._is_suspect = False

    def note_success(self) -> None:
        """Forget all trouble."""
        with self._lock:
            self._troubles, self._paused_until, self._is_suspect = 0, 0.0, False
            self.reason = None
