"""A transport that prints: to try things out, and to see what a queue would do."""

from __future__ import annotations

import json
import sys
import threading
from typing import Protocol

from engagement.messages import OutgoingMessage
from engagement.outcomes import Sent


class Stream(Protocol):
    """Where lines go: a text file, or what acts like one."""

    def write(self, text: str, /) -> object:
        """Take a line."""

    def flush(self) -> object:
        """Pass on what was taken."""


class Console:
    """Prints one line for each message to `stream` (default: standard output), and calls it sent.

    With `reveal` the line also holds what is personal: user, destination and params.
    """

    def __init__(self, stream: Stream | None = None, *, reveal: bool = False) -> None:
        self._stream = stream
        self._reveal = reveal
        self._lock = threading.Lock()

    def send(self, message: OutgoingMessage) -> Sent:
        """Print the message."""
        stream = self._stream or sys.stdout
        encoding = getattr(stream, "encoding", None) or "utf-8"
        # What would steer a terminal must not reach it, and what it cannot show must not fail the send.
        line = "".join(character if character.isprintable() else "?" for character in self._line(message))
        with self._lock:
            stream.write(line.encode(encoding, "replace").decode(encoding) + "\n")
            stream.flush()
        return Sent(f"console:{message.delivery_id}")

    def _line(self, message: OutgoingMessage) -> str:
        attempt = f", attempt {message.attempt}," if message.attempt > 1 else ""
        if not self._reveal:
            receiver = "a group" if message.destination == "group" else "an individual"
            return f"message {message.id}{attempt} to {receiver}: {message.message_key}"
        receiver = f"{message.user_id} ({message.destination_jid})"
        params = json.dumps(message.message_params, ensure_ascii=False)
        return f"message {message.id}{attempt} to {receiver}: {message.message_key} {params}"
