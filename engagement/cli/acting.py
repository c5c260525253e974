"""Acting on messages, one or many: a person is told their number and asked. Each batch is a transaction of its own.

docs/decisions.md#2026-11-24--a-command-that-acts-on-many-asks-the-repository-about-each
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, TypeVar

import click
from rich.console import Console
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from engagement._operating.lists import Filters, count_messages, list_messages, message_ids
from engagement.cli.choosing import described, filtered, find_message
from engagement.cli.connecting import Database
from engagement.cli.problems import Problem, needs_attention
from engagement.cli.showing import json_option, progress, show
from engagement.models import MessageStatus
from engagement.repository import EngagementMessageRepository

F = TypeVar("F", bound=Callable[..., Any])

BATCH = 200
"""Few: a worker skips the messages that a batch has locked, and a settlement waits for them."""
REASONS_SHOWN = 20
NO_SUCH_MESSAGE = "there is no such message"

dry_run_option = click.option("--dry-run", is_flag=True, help="Only say how many messages it would be.")
yes_option = click.option("--yes", is_flag=True, help="Do not ask.")


@dataclass(frozen=True, slots=True)
class Act:
    """An act on each message."""

    command: str
    """Its verb: `cancel`."""
    done: str
    """Its participle: `cancelled`."""
    statuses: tuple[MessageStatus, ...]
    """The statuses of messages that it may change."""
    on: Callable[[EngagementMessageRepository, int], bool]
    """Acts on a message, and returns whether it did."""
    how: str = ""
    """The end of the question to a person: ` to 2026-11-24 09:00`."""
    unless: str = "it has changed"
    """The reason if a message has the right status and the act does nothing all the same."""
    also: Filters = field(default_factory=Filters)
    """Further filters, so that the act changes every message found (`retry` finds no message that was blanked)."""


@dataclass(frozen=True, slots=True)
class Request:
    """The request as typed: messages by id or key, or filters, and the flags."""

    named: tuple[str, ...]
    filters: Filters
    dry_run: bool
    yes: bool
    as_json: bool


@dataclass(slots=True)
class _Tally:
    found: int
    done: int = 0
    unchanged: int = 0
    reasons: list[dict[str, object]] = field(default_factory=list)

    def leave(self, message: int | str, reason: str) -> None:
        self.unchanged += 1
        if len(self.reasons) < REASONS_SHOWN:
            self.reasons.append({"message": message, "reason": reason})


def on_messages(*statuses: MessageStatus) -> Callable[[F], Callable[..., Any]]:
    """Give a command the argument `request`, from ids and keys, filters, --all, --dry-run and --yes."""

    def decorate(command: F) -> Callable[..., Any]:
        @click.argument("named", nargs=-1, metavar="[ID|KEY]...")
        @filtered(*statuses)
        @click.option("--all", "everything", is_flag=True, help=f"All that are {' or '.join(statuses)}.")
        @dry_run_option
        @yes_option
        @json_option
        @wraps(command)
        def run(
            *, named: tuple[str, ...], filters: Filters, everything: bool, dry_run: bool, yes: bool, as_json: bool,
            **options: Any,
        ) -> Any:  # fmt: skip
            if bool(named) + bool(filters or everything) != 1:
                raise click.UsageError("Say which messages: by id or key, or by filters, or --all.")
            wanted: Filters = {"status": statuses, **filters}
            return command(request=Request(named, wanted, dry_run, yes, as_json), **options)

        return run

    return decorate


def act_on(database: Database, request: Request, act: Act) -> None:
    """Act on the messages, and tell their number and those left out. Ask first, unless one message was named."""
    with database.engine() as engine:
        if request.named:
            tally, batches = _named(database, engine, request, act)
        else:
            tally, batches = _fitting(database, engine, {**request.filters, **act.also})
        if request.dry_run:
            show_dry_run(tally.found, act.done, as_json=request.as_json)
            _tell_left(request, act, tally)
            return
        if tally.found and not request.yes and len(request.named) != 1:
            ask(f"{act.command} {in_number(tally.found)}{_in_words(request)}{act.how}")
        screen = Console(stderr=True, quiet=tally.found <= BATCH)
        with (
            progress(tally.found, act.done, screen) as advance,
            told_if_ended_early(lambda: f"{in_number(tally.done)} {act.done}"),
        ):
            for ids in batches:
                _act_on_batch(database, engine, act, ids, tally)
                advance(tally.done + tally.unchanged)
    _tell(request, act, tally)


def show_dry_run(found: int, done: str, *, as_json: bool) -> None:
    """Print the number of messages that would be changed."""
    if sys.stdout.isatty() and not as_json:
        click.echo(f"{in_number(found)} would be {done}")
    else:
        show("", {"found": found}, as_json=as_json)


def in_number(count: int) -> str:
    """Return a number of messages in words (`1 message`, `2,000 messages`)."""
    return "1 message" if count == 1 else f"{count:,} messages"


def ask(action: str) -> None:
    """Ask a person whether to go on. Without a terminal it is a problem. A no ends the command with status 1."""
    if not sys.stdin.isatty():
        raise Problem(f"there is no terminal to ask on. To {action}, add --yes")
    if not click.confirm(f"{action[0].upper()}{action[1:]}?", err=True):
        click.echo("nothing was changed", err=True)
        raise needs_attention()


def _in_words(request: Request) -> str:
    return "" if request.named else f" ({described(request.filters)})"


def _named(database: Database, engine: Engine, request: Request, act: Act) -> tuple[_Tally, Iterator[list[int]]]:
    tally, ids = _Tally(0), []
    with Session(engine) as session:
        for name in dict.fromkeys(request.named):
            message = find_message(database.repository_on(session), name)
            if message is None:
                tally.leave(name, NO_SUCH_MESSAGE)
                continue
            ids.append(message.id)
            if message.status in act.statuses:
                tally.found += 1
            elif request.dry_run:
                tally.leave(name, f"it is {message.status}")
    return tally, (ids[start : start + BATCH] for start in range(0, len(ids), BATCH))


def _fitting(database: Database, engine: Engine, filters: Filters) -> tuple[_Tally, Iterator[list[int]]]:
    with Session(engine) as session:
        found = count_messages(session, schema=database.schema, **filters)
        newest = list_messages(session, limit=1, schema=database.schema)
    # The person's yes is about these messages, and not about those that are queued from now on.
    last = newest[0].id if newest else 0

    def batches() -> Iterator[list[int]]:
        after = 0
        while True:
            with Session(engine) as session:
                ids = message_ids(session, after=after, up_to=last, limit=BATCH, schema=database.schema, **filters)
            if not ids:
                return
            yield ids
            after = ids[-1]

    return _Tally(found), batches()


def _act_on_batch(database: Database, engine: Engine, act: Act, ids: list[int], tally: _Tally) -> None:
    left: dict[int, str] = {}
    with Session(engine) as session, session.begin():
        repository = database.repository_on(session)
        for message_id in ids:
            if not act.on(repository, message_id):
                left[message_id] = _why_not(repository, act, message_id)
    tally.done += len(ids) - len(left)
    for message_id, reason in left.items():
        tally.leave(message_id, reason)


def _why_not(repository: EngagementMessageRepository, act: Act, message_id: int) -> str:
    message = repository.get_message(message_id)
    if message is None:
        return NO_SUCH_MESSAGE
    return act.unless if message.status in act.statuses else f"it is {message.status}"


@contextmanager
def told_if_ended_early(done: Callable[[], str]) -> Iterator[None]:
    """If the work is interrupted, print the part that is done and stays done (`200 messages cancelled`)."""
    try:
        yield
    except BaseException:
        click.echo(f"engagement: ended early, {done()}", err=True)
        raise


def _tell(request: Request, act: Act, tally: _Tally) -> None:
    facts: dict[str, object] = {"found": tally.found, act.done: tally.done, "unchanged": tally.unchanged}
    if request.as_json:
        facts["reasons"] = tally.reasons
    if request.as_json or len(request.named) != 1 or not sys.stdout.isatty():
        show(act.done, facts, as_json=request.as_json)
    elif tally.done:
        click.echo(f"message {request.named[0]}: {act.done}")
    _tell_left(request, act, tally)


def _tell_left(request: Request, act: Act, tally: _Tally) -> None:
    """Print the messages left unchanged, with the reason. If there are any, the exit status is 1."""
    if not request.as_json:
        for left in tally.reasons:
            click.echo(f"message {left['message']}: not {act.done}: {left['reason']}", err=True)
        if tally.unchanged > len(tally.reasons):
            click.echo(f"and {tally.unchanged - len(tally.reasons)} more", err=True)
    if tally.unchanged:
        raise needs_attention()
