"""The trouble of each person, and the transport in which it happens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import NoReturn
from zoneinfo import ZoneInfo

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from engagement.messages import OutgoingMessage
from engagement.outcomes import NotSent, Outcome, Postpone, Refused, Withdraw
from engagement.transports import console
from engagement.words import FluentRenderer, speaking


def _busy_at_first(message: OutgoingMessage) -> Outcome | None:
    return NotSent("provider busy (429)") if message.attempt == 1 else None


def _always_down(_: OutgoingMessage) -> Outcome:
    return NotSent("provider down (503)")


def _is_asleep(_: OutgoingMessage) -> Outcome:
    tomorrow = datetime.now(ZoneInfo("Europe/Istanbul")) + timedelta(days=1)
    return Postpone(tomorrow.replace(hour=8, minute=0, second=0, microsecond=0), "quiet hours")


def _breaks_the_connection(_: OutgoingMessage) -> NoReturn:
    raise ConnectionResetError("no answer")


def _has_no_account(_: OutgoingMessage) -> Outcome:
    return Refused("not on WhatsApp")


def _has_opted_out(_: OutgoingMessage) -> Outcome:
    return Withdraw("has opted out")


TROUBLE: dict[str, Callable[[OutgoingMessage], Outcome | None]] = {
    "chidi": _busy_at_first,
    "dana": _busy_at_first,
    "emre": _is_asleep,
    "fiona": _breaks_the_connection,
    "gita": _always_down,
    "hugo": _has_no_account,
    "ines": _has_opted_out,
}
"""By user id, the trouble that takes the place of a send. None lets the send through."""


class DemoTransport:
    """Prints each send in the person's language, lets `TROUBLE` happen, and counts by key the messages that left."""

    def __init__(self, screen: Console) -> None:
        render = speaking(FluentRenderer(fallbacks={"pt": ["pt-BR"]}), lambda message: message.message_params["locale"])
        self._console = console.Console(_Lines(screen), reveal=True, render=render)
        self.left: Counter[str] = Counter()

    def send(self, message: OutgoingMessage) -> Outcome:
        """Send, unless there is trouble."""
        trouble = TROUBLE.get(message.user_id)
        try:
            outcome = trouble and trouble(message)
        except ConnectionResetError:
            self.left[message.idempotency_key] += 1  # It had left. Its answer was lost, and the provider tells later.
            raise
        if outcome:
            return outcome
        self.left[message.idempotency_key] += 1
        return self._console.send(message)


class _Lines:
    """A stream that shows each message on a line, and its words below. A terminal's line is cut at its end."""

    def __init__(self, screen: Console) -> None:
        self._screen = screen

    def write(self, line: str) -> None:
        if line.startswith(" "):
            self._screen.print(Padding(Text(line.strip(), "italic"), (0, 0, 0, 8)))
            return
        shown = Text(f"  > {line.rstrip()}", "green")
        if self._screen.is_terminal:
            shown.truncate(self._screen.width, overflow="ellipsis")
        self._screen.print(shown, soft_wrap=True)

    def flush(self) -> None:
        """Nothing is held back."""
