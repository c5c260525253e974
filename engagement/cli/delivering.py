"""`process` and `work`: send due messages."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import asdict
from datetime import timedelta
from typing import Any, TypeVar

import click

from engagement._delivery.tally import ProcessResult
from engagement._operating.masking import masked
from engagement._sending.protocols import Transport
from engagement.cli.connecting import Database, on_database
from engagement.cli.group import command
from engagement.cli.parameters import (
    age_to_prune,
    duration,
    on_settled_named,
    positive_duration,
    sender_named,
    transport_named,
    type_named,
)
from engagement.cli.problems import needs_attention
from engagement.cli.showing import examples, json_option, logging_to_stderr, show
from engagement.cli.signals import stopped_by_signals
from engagement.worker import Worker, process_message_queue

F = TypeVar("F", bound=Callable[..., Any])


def _of_types(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options as a worker takes them: no `--type` at all means every type."""
    return options | {"message_types": options["message_types"] or None}


def delivers(command: F) -> F:
    """Give a command the transport, and the options that both ways to deliver share."""
    options = (
        click.option(
            "--transport",
            required=True,
            type=transport_named,
            metavar="MODULE:NAME",
            help="The sender: a function, an object with send, or a class that makes one.",
        ),
        click.option(
            "--type",
            "message_types",
            multiple=True,
            type=type_named,
            metavar="TYPE",
            help="Send only messages of this type; may be repeated.",
        ),
        click.option(
            "--excluding",
            multiple=True,
            type=type_named,
            metavar="TYPE",
            help="Send no messages of this type; may be repeated.",
        ),
        click.option(
            "--in-order",
            is_flag=True,
            help="One send at a time to a destination, the oldest first, also of other workers with this option.",
        ),
        click.option(
            "--sender",
            type=sender_named,
            metavar="NAME",
            help="The number or account that it sends from: `engagement pause --sender` stops all that name it.",
        ),
        click.option("--concurrency", default=1, type=click.IntRange(1, 10_000), metavar="N", help="Sends at once."),
        click.option(
            "--lease",
            default="5m",
            type=positive_duration,
            metavar="TIME",
            help="How long a claim holds if its worker dies.",
        ),
        click.option(
            "--max-retries",
            default=3,
            type=click.IntRange(1, 1000),
            metavar="N",
            help="After so many failures it is failed.",
        ),
        click.option(
            "--min-interval", default="0s", type=duration, metavar="TIME", help="Between the starts of two sends."
        ),
        click.option(
            "--send-timeout",
            type=positive_duration,
            metavar="TIME",
            help="A send without an answer for so long is in doubt.",
        ),
        click.option(
            "--on-settled",
            type=on_settled_named,
            metavar="MODULE:NAME",
            help="A function, called in the transaction that settles a message: (connection, message, status).",
        ),
        click.option("--strict", is_flag=True, help="In doubt, unless an exception proves that nothing was sent."),
        click.option("--reveal", is_flag=True, help="Do not mask numbers and addresses in the reasons."),
        click.option("--verbose", is_flag=True, help="Log every event to standard error, not only warnings."),
        json_option,
    )
    for option in reversed(options):
        command = option(command)
    return command


@command(
    context_settings={"show_default": True},
    epilog=examples(
        "engagement process --transport engagement.transports.console:Console",
        "engagement process --transport myapp.whatsapp:send --limit 500 --min-interval 2s",
    ),
)
@delivers
@click.option("--limit", type=click.IntRange(min=0), metavar="N", help="Stop after so many messages.")
@on_database
def process(
    database: Database,
    transport: Transport,
    limit: int | None,
    *,
    as_json: bool,
    reveal: bool,
    verbose: bool,
    **options: Any,
) -> None:
    """Send the due messages until none is left: for a scheduled job.

    Any number of these, and of `engagement work`, may run at once. The first SIGTERM or Ctrl-C lets the sends in hand
    finish; the second leaves at once, and unfinished sends are recovered when their lease has run out.
    """
    with database.engine() as engine, _delivering(verbose=verbose, as_json=as_json) as stop:
        result = process_message_queue(
            engine, transport, limit=limit, stop=stop, schema=database.schema, **_of_types(options)
        )
    _show_result(result, as_json=as_json, reveal=reveal)
    if result.failed or result.in_doubt:
        raise needs_attention()


@command(
    context_settings={"show_default": True},
    epilog=examples(
        "engagement work --transport myapp.whatsapp:send",
        "engagement work --transport myapp.whatsapp:Gateway --concurrency 8 --send-timeout 30s --verbose",
        "engagement work --transport myapp.whatsapp:send --prune-older-than 90d --verify-every 1d",
    ),
)
@delivers
@click.option(
    "--poll-interval",
    default="5s",
    type=positive_duration,
    metavar="TIME",
    help="How soon a new message is noticed. One that becomes due later is sent at that moment.",
)
@click.option("--wake-up", is_flag=True, help="Be woken by hosts that call wake_workers; see docs/deploying.md.")
@click.option(
    "--listen-url",
    envvar="ENGAGEMENT_LISTEN_URL",
    show_envvar=True,
    metavar="URL",
    help="With --wake-up, behind a pooler: the database by a direct connection.",
)
@click.option(
    "--prune-older-than",
    type=age_to_prune,
    metavar="TIME",
    help="Every hour, blank finished messages that were last due longer ago (an hour at least); keys stay.",
)
@click.option(
    "--verify-every",
    type=positive_duration,
    metavar="TIME",
    help="How often to look for broken promises and log them.",
)
@on_database
def work(
    database: Database,
    transport: Transport,
    poll_interval: timedelta,
    listen_url: str | None,
    *,
    as_json: bool,
    reveal: bool,
    verbose: bool,
    **options: Any,
) -> None:
    """Send messages as they become due, until told to stop: for a service.

    A lost database is waited for. The first SIGTERM or Ctrl-C lets the sends in hand finish, and the exit status is 0;
    the second leaves at once, and unfinished sends are recovered when their lease has run out.
    """
    with ExitStack() as around:
        engine = around.enter_context(database.engine())
        if options["wake_up"] and listen_url:
            options["listen_on"] = around.enter_context(Database(listen_url, None).engine())
        stop = around.enter_context(_delivering(verbose=verbose, as_json=as_json))
        worker = Worker(engine, transport, poll_interval=poll_interval, schema=database.schema, **_of_types(options))
        result = worker.run(stop)
    _show_result(result, as_json=as_json, reveal=reveal)


@contextmanager
def _delivering(*, verbose: bool, as_json: bool) -> Iterator[threading.Event]:
    with ExitStack() as around:
        if as_json:
            # A transport may print; standard output is for the JSON alone.
            around.enter_context(redirect_stdout(sys.stderr))
        around.enter_context(logging_to_stderr(logging.INFO if verbose else logging.WARNING))
        yield around.enter_context(stopped_by_signals())


ERRORS_SHOWN = 20


def _show_result(result: ProcessResult, *, as_json: bool, reveal: bool) -> None:
    facts: dict[str, Any] = {name: value for name, value in asdict(result).items() if name != "errors"}
    errors = [(message_id, reason if reveal else masked(reason)) for message_id, reason in result.errors]
    if as_json:
        facts["errors"] = [{"message_id": message_id, "reason": reason} for message_id, reason in errors]
    show("delivery", facts, as_json=as_json)
    if as_json:
        return
    for message_id, reason in errors[:ERRORS_SHOWN]:
        click.echo(f"message {message_id}: {reason}", err=True)
    if len(errors) > ERRORS_SHOWN:
        click.echo(f"and {len(errors) - ERRORS_SHOWN} more", err=True)
