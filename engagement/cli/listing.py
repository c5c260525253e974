"""`list` and `show`: messages, and one message with its timeline."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import click

from engagement._operating.lists import LONGEST_PAGE, Filters, list_messages
from engagement._operating.masking import HIDDEN, mask_address, masked, pseudonym
from engagement._operating.pauses import holding, in_words
from engagement._operating.person import time_in
from engagement._operating.standing import standing
from engagement._operating.timeline import Moment, timeline
from engagement._operating.workers import whose
from engagement._receiving.weighing import latest_receipt
from engagement.cli.choosing import filtered, find_message
from engagement.cli.cleaning import printable
from engagement.cli.connecting import Database, on_database
from engagement.cli.group import command
from engagement.cli.problems import needs_attention
from engagement.cli.showing import (
    examples,
    for_person,
    how_far,
    json_of,
    json_option,
    reveal_option,
    show,
    show_rows,
    show_table,
)
from engagement.messages import Pause, delivery_id, key_hash
from engagement.models import EngagementMessage, MessageStatus
from engagement.pausing import Pauses

GREATEST_ID = 2**63 - 1
COLUMNS = (
    *("id", "status", "message_type", "user", "destination", "destination_jid", "created_at", "scheduled_for"),
    *("next_attempt_at", "sent_at", "attempt", "retry_count", "error_message"),
    *("delivered_at", "read_at", "undeliverable_at", "paused"),
)
FOR_PEOPLE = {
    "id": for_person,
    "status": for_person,
    "receipt": for_person,
    "message_type": for_person,
    "user": for_person,
    "due": how_far,
    "attempt": for_person,
    "error": for_person,
}
"""`due` is the time when a message is due, or last was if it is no longer pending.

`receipt` is left out where no message has one."""


@command(
    "list",
    epilog=examples(
        "engagement list --status failed --status in_doubt",
        "engagement list --user user123 --created-since 7d",
        "engagement list --undeliverable",
        "engagement list --not-delivered --type goodbye --scheduled-since 7d",
        "engagement list --type weekly_review --scheduled-since 2026-11-24T00:00Z",
        "engagement list --status failed --limit 10000 --json",
    ),
)
@filtered(*MessageStatus, by_receipt=True)
@click.option(
    "--before", type=click.IntRange(1, GREATEST_ID), metavar="ID", help="The next older ones after this message."
)
@click.option(
    "--after", type=click.IntRange(1, GREATEST_ID), metavar="ID", help="The next newer ones after this message."
)
@click.option("--limit", default=50, show_default=True, type=click.IntRange(1, LONGEST_PAGE), metavar="N")
@reveal_option
@json_option
@on_database
def list_(
    database: Database,
    filters: Filters,
    before: int | None,
    after: int | None,
    limit: int,
    *,
    reveal: bool,
    as_json: bool,
) -> None:
    """List messages, the newest first, a page at a time.

    A TIME is a moment such as 2026-11-24T09:00Z, or 2h for two hours ago. Users are shown by a
    pseudonym, the same for each message of a user, unless --reveal. Messages of a user, and pending,
    sending, failed, doubtful and --undeliverable ones, are found by an index. Others are looked for from
    the newest on.
    """
    with database.session() as session:
        page = list_messages(session, before=before, after=after, limit=limit, schema=database.schema, **filters)
        pauses = Pauses(session, schema=database.schema).in_force()
        facts = [facts_of(message, pauses, reveal=reveal) for message in page]
    if as_json:
        click.echo(json_of({"messages": facts}))
        return
    if sys.stdout.isatty():
        has_receipts = any(each["receipt"] for each in facts)
        show_table(
            [each | {"due": each["next_attempt_at"], "error": each["error_message"]} for each in facts],
            {name: words for name, words in FOR_PEOPLE.items() if has_receipts or name != "receipt"},
            shortened=("message_type", "user", "error"),
        )
    else:
        show_rows(facts, COLUMNS)
    if sys.stderr.isatty():
        for pause in pauses:
            click.echo(f"paused: {in_words(pause)}", err=True)
    if sys.stderr.isatty() and len(facts) == limit:
        click.echo(f"There may be older ones. To see them, add: --before {facts[-1]['id']}", err=True)


@command(
    "show",
    epilog=examples(
        "engagement show 4711",
        "engagement show user123:goodbye:2026-11-21 --reveal",
        "engagement show 4711 --json",
    ),
)
@click.argument("which", metavar="ID|KEY")
@reveal_option
@json_option
@on_database
def show_one(database: Database, which: str, *, reveal: bool, as_json: bool) -> None:
    """Show how one message stands, in a sentence, and all that is known of it, with its history.

    A number is an id, anything else an idempotency key (key:4711 for a key that is a number). A fact that was not
    recorded is called unknown.
    """
    with database.session() as session:
        message = find_message(database.repository_on(session), which)
        if message is None:
            click.echo("engagement: there is no such message", err=True)
            raise needs_attention()
        facts = facts_of(message, Pauses(session, schema=database.schema).in_force(), reveal=reveal)
        if worker := whose(session, message, schema=database.schema):
            facts["worker"] = worker
        told = timeline(message, reveal=reveal)
        stands = stands_as(message, told, time_in(session, schema=database.schema))
        moments = [
            {"at": moment.at, "what": moment.what, "attempt": moment.attempt, "detail": moment.detail}
            for moment in told
        ]
    if as_json:
        show("", {"standing": stands} | facts | {"timeline": moments}, as_json=True)
        return
    if sys.stdout.isatty():
        click.echo(f"{printable(stands)}\n")
    else:
        facts = {"standing": stands} | facts
    show(f"message {facts['id']}", facts, as_json=False, justify="left")
    click.echo()
    show_rows(moments, ("at", "what", "attempt", "detail"))


def stands_as(message: EngagementMessage, moments: Sequence[Moment], now: datetime) -> str:
    """Return how a message stands, in a sentence with times in UTC."""
    return standing(message, moments, now=now, at=lambda moment: for_person("", moment))


def facts_of(message: EngagementMessage, pauses: Sequence[Pause], *, reveal: bool) -> dict[str, Any]:
    """Return the fields of a message, and the pauses that hold it back. Personal data is hidden unless `reveal`."""
    key, error, provider_id = message.idempotency_key, message.error_message, message.provider_message_id
    personal: dict[str, Any]
    if reveal:
        personal = {"user": message.user_id, "idempotency_key": key, "message_params": message.message_params}
        personal |= {"destination_jid": message.destination_jid, "provider_message_id": provider_id}
    else:
        # docs/decisions.md#2026-11-24--a-user-is-shown-as-a-pseudonym
        personal = {"user": pseudonym(message.user_id), "key_hash": key_hash(key), "message_params": HIDDEN}
        personal |= {"destination_jid": mask_address(message.destination_jid)}
        personal |= {"provider_message_id": provider_id and HIDDEN}
        error = error and masked(error, message)
    return {
        "id": message.id,
        "status": str(message.status),
        "message_type": message.message_type,
        "message_key": message.message_key,
        **personal,
        "delivery_id": str(delivery_id(key)),
        "destination": str(message.destination),
        "created_at": message.created_at,
        "scheduled_for": message.scheduled_for,
        "expires_at": message.expires_at,
        "next_attempt_at": message.next_attempt_at,
        "attempt": message.attempt,
        "retry_count": message.retry_count,
        "has_doubt": message.has_doubt,
        "claimed_by": message.claimed_by,
        "lease_expires_at": message.lease_expires_at,
        "sent_at": message.sent_at,
        "delivered_at": message.delivered_at,
        "read_at": message.read_at,
        "undeliverable_at": message.undeliverable_at,
        "receipt": latest_receipt(message),
        "error_message": error,
        "paused": "; ".join(map(in_words, holding(pauses, message))) or None,
    }
