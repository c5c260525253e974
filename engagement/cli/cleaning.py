"""What the command writes, it writes through here: a terminal obeys none of it, whoever it is from.

A database's refusal, a row, a provider's answer, an exception's text, a library's log: too many ways lead to the two
streams, Python's own tracebacks among them, to clean each text where it is shown.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

_NOT_ASCII = re.compile(r"[^\x20-\x7e]")
_NOT_ASCII_TEXT = re.compile(r"[^\n\t\x20-\x7e]")


def printable(text: str) -> str:
    """Return text, on one line, without what a terminal would obey."""
    return _NOT_ASCII.sub(_if_printable, text)


def _if_printable(character: re.Match[str]) -> str:
    # What turns the direction of a text is not printable either.
    return character[0] if character[0].isprintable() else " "


class _Cleaned:
    """A text stream in which what cannot be printed becomes a space, but for the ends of lines and tabs."""

    def __init__(self, beneath: TextIO) -> None:
        self.rich_proxied_file = beneath
        """Where rich writes: the colours and bars are ours. What is in them is `printable`."""

    def write(self, text: str) -> int:
        """Write the text."""
        self.rich_proxied_file.write(_NOT_ASCII_TEXT.sub(_if_printable, text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write the texts."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rich_proxied_file, name)


@contextmanager
def cleaned_streams() -> Iterator[None]:
    """Clean whatever is written to standard output and standard error meanwhile."""
    streams = sys.stdout, sys.stderr
    # A stream that was closed is None.
    sys.stdout, sys.stderr = (stream and _Cleaned(stream) for stream in streams)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams
