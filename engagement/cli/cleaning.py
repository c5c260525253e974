"""The two streams of the command, cleaned: a terminal obeys no text of others (`ESC`, OSC 52).

Such texts are a database's refusal, a row, a provider's answer, an exception, a library's log, a traceback of Python.
Too many ways lead to the streams to clean each text where it is shown.
docs/decisions.md#2026-11-29--the-commands-two-streams-are-cleaned-and-not-each-text
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
    """Return text on one line, without the characters that a terminal would obey."""
    return _NOT_ASCII.sub(_if_printable, text)


def _if_printable(character: re.Match[str]) -> str:
    # The marks that turn the direction of a text are not printable either.
    return character[0] if character[0].isprintable() else " "


class _Cleaned:
    """A text stream in which a character that cannot be printed becomes a space. Ends of lines and tabs stay."""

    def __init__(self, beneath: TextIO) -> None:
        self.rich_proxied_file = beneath
        """The stream for rich, whose colours and bars are ours. The texts in them are made `printable`."""

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
    """Clean every text that is written to standard output and standard error inside the block."""
    streams = sys.stdout, sys.stderr
    # A stream that was closed is None.
    sys.stdout, sys.stderr = (stream and _Cleaned(stream) for stream in streams)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams
