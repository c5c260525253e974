"""The steps of a work on any queue, a floor, ours or a peer's: empty it, queue, drain."""

from collections.abc import Callable
from typing import Protocol

from benchmarks.given import Given

Timed = Callable[[], object]
"""The timed part of a round. Its preparation is done before it is returned."""


class Queue(Protocol):
    """A queue under test."""

    name: str

    def empty(self) -> None:
        """Remove everything."""

    def fill(self, rows: list[Given]) -> None:
        """Queue rows in the fastest way there is; nobody looks at the clock."""

    def queue_many(self, rows: list[Given]) -> Timed:
        """Queue all rows, and commit."""

    def queue_each(self, rows: list[Given]) -> Timed:
        """Queue each row in a transaction of its own. May be called from several threads."""

    def drain(self) -> Timed:
        """Send, with a transport that does nothing, and settle all that is due."""
