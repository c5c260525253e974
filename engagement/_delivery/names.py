"""The names under which a worker claims."""

from __future__ import annotations

import secrets
from itertools import count

from engagement.outcomes import storable


class Names:
    """One name for each transaction that claims.

    A commit that is not acknowledged may have happened. The name tells then: a message that carries it was claimed and
    never started, so its worker adopts it (connection lost in COMMIT, three rows under `host:7#4fe1/12`: send them).
    See docs/decisions.md#2026-11-24--a-name-for-each-claim-what-may-be-adopted.
    """

    def __init__(self, worker_name: str) -> None:
        # Nobody else may take our claims for theirs, also if they are given the same name.
        self.run = secrets.token_hex(4)
        """The mark by which a claim's worker is found, also after `in_ascii`."""
        self._base = f"{worker_name}#{self.run}"
        self._made = count(1)
        self._open: str | None = None
        self._adopt_until = 0.0
        self.unacknowledged: list[str] = []
        """The names of transactions that may have happened, and of the one that goes on."""

    def next(self) -> str:
        """Return a new name."""
        return f"{self._base}/{next(self._made)}"

    def begin(self) -> str:
        """Return a new name, for the transaction that goes on."""
        self._open = self.next()
        self.unacknowledged.append(self._open)
        return self._open

    def undo(self) -> None:
        """Note that the transaction did not happen, and never will."""
        if self._open is not None:
            self.unacknowledged.remove(self._open)
            self._open = None

    def acknowledge(self, now: float, *, none_left: bool) -> None:
        """Note that the transaction was committed; `none_left` if it adopted or gave back all that it found."""
        self.undo()
        if none_left and now >= self._adopt_until:
            # A commit that was still under way on the server has happened by now, or never will.
            self.unacknowledged.clear()

    def lose(self, until: float) -> None:
        """Note that nobody knows whether the transaction was committed, and that it may be until then."""
        self._open = None
        self._adopt_until = until

    def in_ascii(self) -> None:
        """Write the names so that a database of any encoding can store them."""
        self._base = storable(self._base) or ""
