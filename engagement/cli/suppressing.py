"""`suppress`, `unsuppress`, `suppressed`: the addresses that nothing is sent to."""

from __future__ import annotations

import sys
from datetime import datetime
from typing import Any

import click

from engagement._operating.lists import LONGEST_PAGE
from engagement._operating.masking import mask_address, masked, pseudonym
from engagement._operating.suppressed import list_suppressed
from engagement.cli.connecting import Database, on_database
from engagement.cli.group import command
from engagement.cli.parameters import moment_ahead
from engagement.cli.problems import Problem, needs_attention
from engagement.cli.showing import (
    examples,
    for_person,
    json_of,
    json_option,
    reveal_option,
    show,
    show_rows,
    show_table,
)
from engagement.messages import Suppressed
from engagement.suppression import SuppressionList

NOT_ON_IT = "engagement: the address is not on the suppression list"
MOST_SKIPPED = 2**63 - 1

address_argument = click.argument("address", metavar="ADDRESS")


@command(
    epilog=examples(
        "engagement suppress 447700900101@s.whatsapp.net --reason 'answered STOP'",
        "engagement suppress 447700900101@s.whatsapp.net --reason 'on holiday' --until 14d",
    )
)
@address_argument
@click.option("--reason", required=True, metavar="TEXT", help="Kept on the list, and in the history of each message.")
@click.option(
    "--until", type=moment_ahead, metavar="TIME", help="A moment with an offset, or 14d for in 14 days. Else for good."
)
@json_option
@on_database
def suppress(database: Database, address: str, reason: str, until: datetime | None, *, as_json: bool) -> None:
    """Send nothing to an address any more.

    Workers ask for it before each send, if policies.Suppression is around their transport; a message to the address is
    then cancelled. An address that is on the list already gets the new reason, and the later end of both.
    """
    with database.session() as session:
        entries = SuppressionList(session, schema=database.schema)
        entries.suppress(address, reason, until=until)
        found = entries.find(address)
        if found is None:
            raise Problem("until: is over already")  # The transaction is rolled back.
    show("suppressed", _facts_of(address, found, reveal=False), as_json=as_json, justify="left")


@command(epilog=examples("engagement unsuppress 447700900101@s.whatsapp.net"))
@address_argument
@json_option
@on_database
def unsuppress(database: Database, address: str, *, as_json: bool) -> None:
    """Let messages be sent to an address again.

    Nothing is sent by it: messages that were cancelled stay so. The exit status is 1 if the address was not on the
    suppression list.
    """
    with database.session() as session:
        was_on_it = SuppressionList(session, schema=database.schema).unsuppress(address)
    show("unsuppressed", {"address": mask_address(address), "was_suppressed": was_on_it}, as_json=as_json)
    if not was_on_it:
        click.echo(NOT_ON_IT, err=True)
        raise needs_attention()


@command(
    epilog=examples(
        "engagement suppressed",
        "engagement suppressed 447700900101@s.whatsapp.net",
        "engagement suppressed --limit 10000 --json",
    )
)
@click.argument("address", required=False, metavar="[ADDRESS]")
@click.option(
    "--skip", default=0, type=click.IntRange(0, MOST_SKIPPED), metavar="N", help="The next older ones after so many."
)
@click.option("--limit", default=50, show_default=True, type=click.IntRange(1, LONGEST_PAGE), metavar="N")
@reveal_option
@json_option
@on_database
def suppressed(database: Database, address: str | None, skip: int, limit: int, *, reveal: bool, as_json: bool) -> None:
    """Show the addresses that nothing is sent to, the newest first, or the entry of one.

    Only hashes of addresses are kept: the list can tell whether an address is on it, and not which ones are. With
    --reveal it shows the hashes, and the reasons in full. With an address, the exit status is 1 if it is not on the
    list. Entries that are over are left out.
    """
    if address is not None:
        _show_one(database, address, reveal=reveal, as_json=as_json)
        return
    with database.session() as session:
        page = list_suppressed(session, skip=skip, limit=limit, schema=database.schema)
    rows = [
        {
            "entry": each.address_hash if reveal else pseudonym(each.address_hash),
            "since": each.since,
            "until": each.until,
            "reason": _reason(each.reason, reveal=reveal),
        }
        for each in page.entries
    ]
    if as_json:
        click.echo(json_of({"count": page.count, "suppressed": rows}))
        return
    columns = ("entry", "since", "until", "reason")
    if sys.stdout.isatty():
        show_table(rows, dict.fromkeys(columns, for_person), shortened=("entry",) if reveal else ())
    else:
        show_rows(rows, columns)
    if sys.stderr.isatty():
        click.echo(f"{len(rows):,} of {page.count:,}", err=True)
        if skip + len(rows) < page.count:
            click.echo(f"To see older ones, add: --skip {skip + len(rows)}", err=True)


def _show_one(database: Database, address: str, *, reveal: bool, as_json: bool) -> None:
    with database.session() as session:
        found = SuppressionList(session, schema=database.schema).find(address)
    if found is None:
        click.echo(NOT_ON_IT, err=True)
        raise needs_attention()
    show("suppressed", _facts_of(address, found, reveal=reveal), as_json=as_json, justify="left")


def _facts_of(address: str, found: Suppressed, *, reveal: bool) -> dict[str, Any]:
    return {
        "address": address if reveal else mask_address(address),
        "since": found.since,
        "until": found.until,
        "reason": _reason(found.reason, reveal=reveal),
    }


def _reason(reason: str | None, *, reveal: bool) -> str | None:
    return reason if reveal or reason is None else masked(reason)
