"""`person`: all that was queued for somebody, how each message stands, and the next one."""

from __future__ import annotations

from typing import Any

import click

from engagement._operating.masking import mask_address, pseudonym
from engagement._operating.person import Person, find_people
from engagement._operating.timeline import timeline
from engagement.cli.cleaning import printable
from engagement.cli.connecting import Database, on_database
from engagement.cli.group import command
from engagement.cli.listing import stands_as
from engagement.cli.problems import needs_attention
from engagement.cli.showing import examples, json_of, json_option, reveal_option, show_rows
from engagement.models import EngagementMessage

COLUMNS = ("id", "message_type", "created_at", "standing")


@command(
    epilog=examples(
        "engagement person user123",
        "engagement person '+55 11 99999-9999'",
        "engagement person 4711 --json",
    ),
)
@click.argument("which", metavar="USER|ADDRESS|ID|KEY")
@click.option("--limit", default=50, show_default=True, type=click.IntRange(1, 1_000), metavar="N")
@reveal_option
@json_option
@on_database
def person(database: Database, which: str, limit: int, *, reveal: bool, as_json: bool) -> None:
    """Show why somebody got a message, or none: all of their messages, the newest first, and the next one.

    They are named by their user id, by the id or the key of a message (key:4711 for a key that is a number), or by an
    address or a telephone number, exactly. An address is looked for in the whole table, and several people may share
    it.
    """
    with database.session() as session:
        people = find_people(session, which, limit=limit, schema=database.schema)
        facts = [_facts_of(person, reveal=reveal) for person in people]
    if as_json:
        click.echo(json_of({"people": facts}))
    if not people:
        click.echo("engagement: nothing was ever queued for such a person", err=True)
        raise needs_attention()
    for each in [] if as_json else facts:
        _show(each)


def _facts_of(person: Person, *, reveal: bool) -> dict[str, Any]:
    def stands(message: EngagementMessage) -> str:
        return stands_as(message, timeline(message, reveal=reveal), person.now)

    return {
        "user": person.user_id if reveal else pseudonym(person.user_id),
        "counts": {str(status): count for status, count in person.counts.items()},
        "next": None if person.upcoming is None else stands(person.upcoming),
        "suppressed": [
            {
                "address": address if reveal else mask_address(address),
                "reason": entry.reason,
                "since": entry.since,
                "until": entry.until,
            }
            for address, entry in person.suppressed.items()
        ],
        "messages": [
            {
                "id": message.id,
                "message_type": message.message_type,
                "status": str(message.status),
                "created_at": message.created_at,
                "standing": stands(message),
            }
            for message in person.latest
        ],
    }


def _show(facts: dict[str, Any]) -> None:
    counts = ", ".join(f"{count:,} {status.replace('_', ' ')}" for status, count in facts["counts"].items())
    click.echo(f"user {printable(facts['user'])}: {counts}")
    for entry in facts["suppressed"]:
        until = "for good" if entry["until"] is None else f"until {entry['until']:%Y-%m-%d %H:%MZ}"
        reason = f": {printable(entry['reason'])}" if entry["reason"] else ""
        click.echo(f"Suppressed: nothing is sent to {entry['address']} {until}{reason}")
    click.echo(f"Next: {printable(facts['next'] or 'nothing is pending')}\n")
    show_rows(facts["messages"], COLUMNS)
