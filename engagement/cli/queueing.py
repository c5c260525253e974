"""`queue`: from JSON Lines to messages."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from typing import IO

import click
from rich.console import Console

from engagement._operating.jsonl import BadLine, read_messages
from engagement.cli.connecting import Database, on_database
from engagement.cli.group import command
from engagement.cli.problems import needs_attention
from engagement.cli.showing import examples, json_option, progress, show
from engagement.messages import NewMessage


@command(epilog=examples("engagement queue messages.jsonl", "daily-job | engagement queue - --json"))
@click.argument("source", type=click.File("rb"), metavar="FILE.jsonl|-")
@json_option
@on_database
def queue(database: Database, source: IO[bytes], *, as_json: bool) -> None:
    """Queue the messages of a JSON Lines file.

    A FILE of - is standard input. Each line is an object with user_id, message_type, message_key, destination
    (individual or group) and destination_jid, and optionally message_params, scheduled_for and expires_at (ISO 8601
    with an offset), tz (such as America/Sao_Paulo: whose date the idempotency key has) and idempotency_key.

    All good lines are queued in one transaction. A message that was queued before is a duplicate, and is left alone; so
    the same file can be given again. Each bad line is told on standard error, and makes the exit status 1.
    """
    bad = 0
    screen = Console(stderr=True)

    def report(line: BadLine) -> None:
        nonlocal bad
        bad += 1
        screen.print(str(line), markup=False, highlight=False, soft_wrap=True)

    with database.repository() as repository:
        messages = read_messages(source, report)
        result = repository.queue_messages(_with_progress(messages, source, screen))
    show("queued", {"queued": result.created, "duplicates": result.duplicates, "bad": bad}, as_json=as_json)
    if bad:
        raise needs_attention()


def _with_progress(messages: Iterable[NewMessage], source: IO[bytes], screen: Console) -> Iterator[NewMessage]:
    """Yield the messages. For a file, and a person at a terminal, show a bar for the part that is read."""
    if not stat.S_ISREG(os.fstat(source.fileno()).st_mode):
        yield from messages
        return
    with progress(os.fstat(source.fileno()).st_size, "reading", screen) as advance:
        for number, message in enumerate(messages):
            if number % 500 == 0:
                advance(source.tell(), f"{number} messages read")
            yield message
