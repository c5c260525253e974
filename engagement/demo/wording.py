"""The wording of the demo."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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


def outcome_of(message: EngagementMessage) -> str:
    """Return why a message ended as it did. One that was sent needs no reason, but may have been delivered."""
    if message.status == MessageStatus.SENT:
        return "delivered, says the provider" if message.delivered_at else ""
    return reason_of(message.history[-1]) if message.history else ""


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


Name = Callable[[EngagementMessage], str]
"""The first name of the person that a message is for."""


def changes(pairs: Iterable[tuple[EngagementMessage, EngagementMessage]], name: Name) -> Table:
    """Return a table of messages before and after a report of their provider."""
    table = table_of("who", "message", "before", "what happened", "and now")
    for before, after in pairs:
        was, now = (Text(str(each.status), COLOURS[each.status]) for each in (before, after))
        table.add_row(name(before), before.message_type, was, outcome_of(after), now)
    return table


def ends(messages: Iterable[EngagementMessage], name: Name) -> Table:
    """Return a table of how each message ended."""
    table = table_of("", "who", "message", "attempts", "status", "why")
    for message in messages:
        state = Text(str(message.status), COLOURS[message.status])
        row = (str(message.id), name(message), message.message_type, str(message.attempt))
        table.add_row(*row, state, outcome_of(message))
    return table


def advice(messages: Sequence[EngagementMessage], name: Name) -> Iterator[str | Text]:
    """Return the calls by which a person decides about doubts and failures, line by line."""
    in_doubt = [message for message in messages if message.status == MessageStatus.IN_DOUBT]
    failed = [message for message in messages if message.status == MessageStatus.FAILED and message.retry_count]
    yield "\nWhat is in doubt is not sent again by itself. Look at the phone, or ask; then say what became of it:"
    for message in in_doubt:
        yield _code(f"repository.resolve_message({message.id}, sent=True)", f"{name(message)} has it")
    for message in in_doubt[-1:]:
        yield _code(f"repository.resolve_message({message.id}, sent=False)", "it never came: send it")
    yield "What failed can be tried again, under the same key:"
    for message in failed[:1]:
        yield _code(f"repository.retry_message({message.id})", f"the provider is up: send {name(message)}'s")


def _code(code: str, comment: str) -> Text:
    return Text.assemble(f"  {code}".ljust(46), (f"# {comment}", "dim"))
