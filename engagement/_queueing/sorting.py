"""Sorts the keys of a batch, also of one that memory cannot hold, since two batches in two orders would deadlock.

By SQLite, which comes with Python, in a temporary file.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain


class SortedTexts:
    """Texts that are given with a key each, in any order and number, and read in the order of their keys.

    Keys are compared as UTF-8; of equal ones, the first given comes first. A few megabytes are held in memory. The
    rest lies in a file that has no name and is gone when this is closed; OSError says that it could not be written.
    """

    def __init__(self) -> None:
        self._database = sqlite3.connect("")  # No name is a file of our own.
        self._database.execute("PRAGMA journal_mode = OFF")  # Nothing is ever undone.
        self._database.execute("CREATE TABLE given (key TEXT, content TEXT)")

    def add(self, given: Iterable[tuple[str, str]]) -> None:
        """Take (key, text) pairs."""
        with _told_as_os_error():
            self._database.executemany("INSERT INTO given VALUES (?, ?)", given)

    def pieces(self, size: int) -> Iterator[list[str]]:
        """Yield all texts in their order, in lists of `size` at most."""
        with _told_as_os_error():
            found = self._database.execute("SELECT content FROM given ORDER BY key, rowid")
        while True:
            with _told_as_os_error():
                piece = found.fetchmany(size)
            if not piece:
                return
            yield list(chain.from_iterable(piece))

    def close(self) -> None:
        """Let go of the memory and the file."""
        self._database.close()


@contextmanager
def _told_as_os_error() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise OSError(f"cannot sort in a temporary file, whose directory TMPDIR names: {error}") from error
