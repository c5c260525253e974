"""Queues a batch of any size: its keys are taken in one order, or two batches would deadlock.

So nothing is stored before all messages are known. A batch of more than one chunk waits in a temporary file.
See
docs/decisions.md#2026-11-29--a-large-batch-is-sorted-on-our-side-and-asks-the-database-for-no-more-than-a-message-does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import closing
from itertools import chain, islice
from operator import itemgetter

from engagement._queueing.one import checked
from engagement._queueing.sorting import SortedTexts
from engagement._queueing.waking import note_queued
from engagement._sql import queueing
from engagement._sql.host_sessions import HostSession
from engagement.messages import NewMessage, QueuedMany

CHUNK = 5_000
"""Messages that are held in memory and sent to the server at once."""


def queue(host: HostSession, messages: Iterable[NewMessage], trace_context: str | None) -> QueuedMany:
    """Store the messages whose keys are new."""
    chunks = _chunks(messages)
    first, second = next(chunks, []), next(chunks, [])
    if not second:
        # As `SortedTexts` does it, and not the server, whose order depends on the encoding of the database.
        # docs/decisions.md#2026-11-29--more-of-each-kind
        rows = [row for _, row in sorted(first, key=itemgetter(0))]
        created = _insert(host, rows, trace_context) if rows else 0
        return QueuedMany(created, len(first) - created)
    given = created = 0
    with closing(SortedTexts()) as waiting:
        for chunk in chain((first, second), chunks):
            waiting.add(chunk)
            given += len(chunk)
            chunk.clear()  # Or the first two would be held to the end.
        most_are_there = False
        for rows in waiting.pieces(CHUNK):
            new = _insert(host, rows, trace_context, most_are_there=most_are_there)
            created += new
            most_are_there = 2 * new < len(rows)  # Mostly, the next piece is like this one.
    return QueuedMany(created, given - created)


def _chunks(messages: Iterable[NewMessage]) -> Iterator[list[tuple[str, str]]]:
    """Yield (key, row) of the messages, so many at a time."""
    remaining = iter(messages)
    while chunk := list(islice(remaining, CHUNK)):
        yield [(message.key, queueing.packed_row(message)) for message in map(checked, chunk)]


def _insert(host: HostSession, rows: list[str], trace_context: str | None, *, most_are_there: bool = False) -> int:
    """Insert rows whose keys are new, and return how many those were."""
    values = {**queueing.packed_rows(rows), "trace_context": trace_context}
    created: int = host.execute(queueing.insert_packed(most_are_there=most_are_there), values).rowcount
    if created:
        note_queued(host)
    return created
