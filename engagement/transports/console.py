"""A transport that prints: for trying things out, and for a look at the sends of a queue."""

from __future__ import annotations

import json
import sys
import threading
from typing import Protocol

from engagement.messages import OutgoingMessage
from engagement.messages.checks import checked_flag
from engagement.outcomes import Outcome, Sent
from engagement.transports.rendering import Render, words_of


class Stream(Protocol):
    """The target of the lines: a text file, or an object like one."""

    def write(self, text: str, /) -> object:
        """Take a line."""

    def flush(self) -> object:
        """Pass the lines on."""


class Console:
    """Prints one line for each message to `stream` (default: standard output), and calls it sent.

    The line is `message 7 to an individual: goodbye.day14`. With `reveal` it also holds personal data: user,
    destination and params, or with `render` the words that the person would read. A message without words is `Refused`.
    """

    def __init__(
        self, stream: Stream | None = None, *, reveal: bool = False, render: Render[str] | None = None
    ) -> None:
        self._stream = stream
        self._reveal = checked_flag("reveal", reveal)
        self._render = render
        self._lock = threading.Lock()

    def send(self, message: OutgoingMessage) -> Outcome:
        """Print the message."""
        words = "" if self._render is None else words_of(self._render, message)
        if not isinstance(words, str):
            return words
        stream = self._stream or sys.stdout
        encoding = getattr(stream, "encoding", None) or "utf-8"
        shown = [self._line(message), *(f"    {line}" for line in words.splitlines() if self._reveal and line)]
        with self._lock:
            for line in shown:
                # Controls must not reach a terminal (ESC), and a character that it lacks must not fail the send.
                printable = "".join(character if character.isprintable() else "?" for character in line)
                stream.write(printable.encode(encoding, "replace").decode(encoding) + "\n")
            stream.flush()
        return Sent(f"console:{message.delivery_id}")

    def _line(self, message: OutgoingMessage) -> str:
        attempt = f", attempt {message.attempt}," if message.attempt > 1 else ""
        if not self._reveal:
            receiver = "a group" if message.destination == "group" else "an individual"
            return f"message {message.id}{attempt} to {receiver}: {message.message_key}"
        receiver = f"{message.user_id} ({message.destination_jid})"
        if self._render is not None:
            return f"message {message.id}{attempt} to {receiver}: {message.message_key}"
        params = json.dumps(message.message_params, ensure_ascii=False)
        return f"message {message.id}{attempt} to {receiver}: {message.message_key} {params}"
