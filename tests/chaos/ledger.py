"""What was really sent, outside the database: a file that lines are only ever added to.

Each line is one `write` to a file opened with O_APPEND, so that lines of many processes do not mix, and a process that
is killed leaves a whole line or none.
"""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


class AppendOnlyFile:
    """Lines of words, added by many processes at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)

    def add(self, *words: object) -> None:
        """Add one line in one system call."""
        line = "\t".join(str(word) for word in words).encode() + b"\n"
        written = os.write(self._file, line)
        assert written == len(line)

    def lines(self) -> Iterator[list[str]]:
        """Read the words of each line."""
        with self.path.open() as lines:
            for line in lines:
                yield line.rstrip("\n").split("\t")


@dataclass(frozen=True)
class Entry:
    """One send."""

    key: str
    delivery_id: str
    attempt: int
    pid: int
    at: float


class Ledger:
    """Every send, in the order in which they were made."""

    def __init__(self, path: Path) -> None:
        self._file = AppendOnlyFile(path)

    def record(self, key: str, delivery_id: object, attempt: int) -> None:
        """Send: from now on it has happened."""
        self._file.add(key, delivery_id, attempt, os.getpid(), time.time())

    def entries(self) -> list[Entry]:
        """Read what was sent."""
        return [
            Entry(key, delivery_id, int(attempt), int(pid), float(at))
            for key, delivery_id, attempt, pid, at in self._file.lines()
        ]
