"""`cancel`, `reschedule`, `retry`, `resolve`: a person's decisions about messages."""

from __future__ import annotations

import getpass
import os
from datetime import datetime

import click

from engagement.cli.acting import Act, Request, act_on, on_messages
from engagement.cli.connecting import Database, on_database
from engagement.cli.group import command
from engagement.cli.parameters import moment_ahead
from engagement.cli.showing import examples
from engagement.models import MessageStatus

PENDING, FAILED, EXPIRED = MessageStatus.PENDING, MessageStatus.FAILED, MessageStatus.EXPIRED
IN_DOUBT = MessageStatus.IN_DOUBT
BLANKED = "it was forgotten or pruned"


def operator() -> str:
    """Return the system's name of its user. A user without a name (in a container) is a number.

    docs/decisions.md#2026-11-29--a-decision-names-who-took-it
    """
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"user {os.getuid()}"


by_option = click.option(
    "--by", default=operator, show_default="the system's user", metavar="NAME", help="Who decides; kept in the history."
)
reason_option = click.option("--reason", metavar="TEXT", help="Kept in the message's history; nothing personal.")


@command(
    epilog=examples(
        "engagement cancel 4711 --reason 'came back'",
        "engagement cancel --user user123 --dry-run",
        "engagement cancel --type weekly_review --scheduled-since 2026-12-24T00:00Z",
    )
)
@on_messages(PENDING)
@reason_option
@by_option
@on_database
def cancel(database: Database, request: Request, reason: str | None, by: str) -> None:
    """Cancel pending messages.

    Those named, or all that fit the filters. A message that was sent, or may have been, is never called
    cancelled: it is named, and the exit status is 1.
    """
    act = Act(
        "cancel",
        "cancelled",
        (PENDING,),
        lambda queue, message_id: queue.cancel_message(message_id, reason, by=by).is_cancelled,
    )
    act_on(database, request, act)


@command(
    epilog=examples(
        "engagement reschedule 4711 --to 2026-11-24T09:00-03:00",
        "engagement reschedule --type weekly_review --scheduled-until 2026-11-24T00:00Z --to 12h",
    )
)
@on_messages(PENDING)
@click.option(
    "--to", required=True, type=moment_ahead, metavar="TIME", help="A moment with an offset, or 2h for in two hours."
)
@on_database
def reschedule(database: Database, request: Request, to: datetime) -> None:
    """Move pending messages to another time.

    Those named, or all that fit the filters. Their keys stay. A message that expires before then is not moved.
    """
    act = Act(
        "reschedule",
        "rescheduled",
        (PENDING,),
        lambda queue, message_id: queue.reschedule_message(message_id, to),
        how=f" to {to:%Y-%m-%d %H:%M%z}",
        unless="it expires before then",
    )
    act_on(database, request, act)


@command(
    epilog=examples(
        "engagement retry 4711",
        "engagement retry --status failed --type weekly_review --dry-run",
        "engagement retry --status failed --created-since 1d --yes",
    )
)
@on_messages(FAILED, EXPIRED)
@by_option
@on_database
def retry(database: Database, request: Request, by: str) -> None:
    """Make failed or expired messages due again.

    Those named, or all that fit the filters: with all their retries, under the same keys. An expiry that has passed is
    lifted.
    """
    act = Act(
        "retry",
        "retried",
        (FAILED, EXPIRED),
        lambda queue, message_id: queue.retry_message(message_id, by=by),
        unless=BLANKED,
        also={"blanked": False},
    )
    act_on(database, request, act)


@command(
    epilog=examples(
        'engagement resolve 4711 --sent --reason "seen in the provider\'s log"',
        "engagement resolve --all --created-until 2d --sent --dry-run",
        "engagement resolve 4711 --not-sent",
    )
)
@on_messages(IN_DOUBT)
@click.option("--sent", is_flag=True, help="They were sent.")
@click.option("--not-sent", is_flag=True, help="They were not, and are sent again.")
@reason_option
@by_option
@on_database
def resolve(database: Database, request: Request, reason: str | None, by: str, *, sent: bool, not_sent: bool) -> None:
    """Say what became of messages in doubt.

    They were sent; or they were not, and are due again. Look for the delivery id, which `engagement show` has, in the
    provider's log, or look into the chat. Say --not-sent only if you know it: it sends the message.
    """
    if sent == not_sent:
        raise click.UsageError("Say what became of them: --sent, or --not-sent.")
    act = Act(
        "resolve",
        "resolved",
        (IN_DOUBT,),
        lambda queue, message_id: queue.resolve_message(message_id, sent, reason, by=by),
        how=" as sent" if sent else " as not sent, and send again",
        unless=BLANKED,
        also={} if sent else {"blanked": False},
    )
    act_on(database, request, act)
