"""`pause` and `resume`: a person stops all sending, a message type or a sender, and lets it go on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime
from typing import Any, TypeVar

import click

from engagement._operating.pauses import in_words, named
from engagement.cli.changing import operator
from engagement.cli.connecting import Database, on_database
from engagement.cli.group import command
from engagement.cli.parameters import moment_ahead, sender_named, type_named
from engagement.cli.problems import needs_attention
from engagement.cli.showing import examples, json_of, json_option
from engagement.models import PauseScope
from engagement.pausing import Pauses

F = TypeVar("F", bound=Callable[..., Any])


def _of_scope(command: F) -> F:
    """Give a command --type and --sender."""
    of_type = click.option("--type", "message_type", type=type_named, metavar="TYPE", help="Only of this message type.")
    of_sender = click.option(
        "--sender", type=sender_named, metavar="NAME", help="Only of the workers that name this sender."
    )
    return of_type(of_sender(command))


def _check_scope(message_type: str | None, sender: str | None) -> None:
    if message_type is not None and sender is not None:
        raise click.UsageError("Say --type or --sender: a pause is of one of them.")


@command(
    epilog=examples(
        "engagement pause --reason 'the provider is down'",
        "engagement pause --type campaign --reason 'wrong wording'",
        "engagement pause --sender main --until 2h --reason 'the number was warned'",
    )
)
@_of_scope
@click.option(
    "--until", type=moment_ahead, metavar="TIME", help="A moment with an offset, or 2h for in two hours. Else: resume."
)
@click.option("--reason", required=True, metavar="TEXT", help="Shown to whoever wonders why nothing is sent.")
@click.option(
    "--by", default=operator, show_default="the system's user", metavar="NAME", help="Who decides; shown with it."
)
@json_option
@on_database
def pause(
    database: Database,
    *,
    message_type: str | None,
    sender: str | None,
    until: datetime | None,
    reason: str,
    by: str,
    as_json: bool,
) -> None:
    """Let no worker send: everything, one message type, or one sender.

    All workers obey from their next claim on; sends in hand finish. Due messages wait, and are sent after it.
    It stays until `engagement resume`, or --until, also through a deploy. `engagement status` shows it.
    """
    _check_scope(message_type, sender)
    with database.session() as session:
        paused = Pauses(session, schema=database.schema).pause(
            reason, message_type=message_type, sender=sender, until=until, by=by
        )
    click.echo(json_of(asdict(paused)) if as_json else f"paused: {in_words(paused)}")


@command(epilog=examples("engagement resume", "engagement resume --type campaign", "engagement resume --sender main"))
@_of_scope
@json_option
@on_database
def resume(database: Database, message_type: str | None, sender: str | None, *, as_json: bool) -> None:
    """Lift a pause: of everything, of one message type, or of one sender.

    Each pause is lifted by itself: one of everything leaves those of types and senders. If nothing was paused, the exit
    status is 1.
    """
    _check_scope(message_type, sender)
    with database.session() as session:
        pauses = Pauses(session, schema=database.schema)
        resumed = pauses.resume(message_type=message_type, sender=sender)
        left = pauses.in_force()
    scope, name = PauseScope.EVERYTHING, None
    if message_type is not None:
        scope, name = PauseScope.TYPE, message_type
    elif sender is not None:
        scope, name = PauseScope.SENDER, sender
    if as_json:
        click.echo(json_of({"resumed": resumed, "still_paused": [asdict(each) for each in left]}))
    else:
        click.echo(f"{'resumed' if resumed else 'was not paused'}: {scope}{'' if name is None else f' {name}'}")
        for each in left:
            click.echo(f"still paused: {named(each)}", err=True)
    if not resumed:
        raise needs_attention()
