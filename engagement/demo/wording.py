"""The wording of the demo."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta, tzinfo
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from engagement.messages import NewMessage, Queued
from engagement.models import EngagementMessage, MessageStatus

COLOURS = {
    MessageStatus.PENDING: "yellow",
    MessageStatus.SENDING: "yellow",
    MessageStatus.SENT: "green",
    MessageStatus.FAILED: "red",
    MessageStatus.CANCELLED: "dim",
    MessageStatus.EXPIRED: "dim",
    MessageStatus.IN_DOUBT: "magenta",
}
_WORDS = {"expired": "its time was over"}


def reason_of(entry: Mapping[str, Any]) -> str:
    """Return the reason in an entry of the history."""
    return str(entry["reason"] or _WORDS.get(entry["event"], entry["event"]))


def name_of(message: NewMessage) -> str:
    """Return the first name of the person that a message is for."""
    return str(message.message_params["name"])


def local(moment: datetime | None, zone: tzinfo) -> str:
    """Return a moment as the person's clock shows it."""
    return f"{moment.astimezone(zone):%a %d %b %H:%M}" if moment else "now"


def when(moment: datetime, zone: tzinfo) -> str:
    """Return a moment in words: the wait (`in 0.8 s`), or after an hour the person's day (`Tue 08:00 in Istanbul`)."""
    wait = moment - datetime.now(UTC)
    if wait > timedelta(hours=1):
        return f"{moment.astimezone(zone):%a %H:%M} in {str(zone).rpartition('/')[2]}"
    return f"at {moment.astimezone(UTC):%H:%M:%S} (in {max(wait.total_seconds(), 0):.1f} s)"


def summary(all_queued: list[Queued]) -> str:
    """Return the number of messages queued, and of duplicates."""
    created = sum(queued.created for queued in all_queued)
    duplicates = len(all_queued) - created
    return f"{created} queued, {duplicates} duplicate{'s' if duplicates != 1 else ''}"


def table_of(*columns: str) -> Table:
    """Return an empty table."""
    table = Table(box=box.SIMPLE_HEAD, header_style="dim", pad_edge=False)
    for name in columns:
        table.add_column(name, no_wrap=name not in {"what happened", "why"})
    return table


def state_of(message: EngagementMessage, zone: tzinfo) -> Text:
    """Return where a message stands, in its colour."""
    match message.status:
        case MessageStatus.PENDING:
            words = f"again {when(message.next_attempt_at, zone)}"
        case MessageStatus.IN_DOUBT:
            words = "in doubt"
        case MessageStatus.FAILED:
            words = "failed" if message.retry_count else "failed at once"
        case status:
            words = str(status)
    return Text(words, COLOURS[message.status])
