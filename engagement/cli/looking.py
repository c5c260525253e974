"""`status` and `verify`: the state of the queue, and its promises."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta

import click

from engagement._operating.flow import Flow
from engagement._operating.overview import overview
from engagement._operating.pauses import in_words
from engagement._operating.workers import Workers
from engagement.cli.connecting import Database, on_database
from engagement.cli.group import command
from engagement.cli.parameters import duration
from engagement.cli.problems import needs_attention
from engagement.cli.showing import examples, json_of, json_option, show


@command(epilog=examples("engagement status", "watch -n 5 engagement status", "engagement status --json"))
@json_option
@on_database
def status(database: Database, *, as_json: bool) -> None:
    """Show how the queue stands: counts, rates, leases, sizes.

    If the oldest due message has been waiting for more than a few minutes, nobody sends, too few do, or it is paused:
    each pause stands there, with its beginning, author and reason. Look at messages in doubt, failed ones and expired
    leases with `engagement list`. How many were queued and sent is told of the last 1, 5 and 60 minutes. When the due
    messages will be done (at the speed of the last five minutes) and the dead rows are estimates.

    A worker that is gone was not seen for three heartbeats; the messages that it holds are recovered when their leases
    run out. A slow one is seen, but its send takes long. `engagement workers` names them. A dash, or null in JSON,
    says that the role may not read the table of workers.
    """
    with database.session() as session:
        found = overview(session, schema=database.schema)
    facts: dict[str, object] = {str(status): count for status, count in found.by_status.items()}
    facts |= {
        "due": found.due,
        "oldest_due_seconds": _seconds(found.oldest_due),
        "waiting_for": found.waiting_for,
        "paused": "; ".join(map(in_words, found.pauses)) or None,
        "oldest_in_doubt_seconds": _seconds(found.oldest_in_doubt),
        "pending_in_doubt": found.pending_in_doubt,
        "leases_expired": found.leases_expired,
        **_workers(found.workers),
        **_flow(found.flows.each),
        "done_in_seconds": _seconds(found.done_in),
        "table_bytes": found.table_bytes,
        "index_bytes": found.index_bytes,
        "dead_rows": found.dead_rows,
        "last_vacuum": found.last_vacuum,
    }
    if as_json:
        facts["workers"] = [asdict(worker) for worker in found.workers.seen] if found.workers.may_see else None
    show("the queue", facts, as_json=as_json)


def _workers(workers: Workers) -> dict[str, int | None]:
    counts: dict[str, int | None] = {f"workers_{standing}": count for standing, count in workers.by_standing.items()}
    counts["held_by_gone_workers"] = workers.held_by_gone
    return counts if workers.may_see else dict.fromkeys(counts)


def _flow(flows: Sequence[Flow]) -> dict[str, int]:
    minutes = {flow.over // timedelta(minutes=1): flow for flow in flows}
    return {f"queued_in_{over}_min": flow.queued for over, flow in minutes.items()} | {
        f"sent_in_{over}_min": flow.sent for over, flow in minutes.items()
    }


def _seconds(length: timedelta | None) -> float | None:
    return None if length is None else round(length.total_seconds(), 1)


NAMED = 100


@command(epilog=examples("engagement verify", "engagement verify --overdue 15m --json"))
@click.option(
    "--overdue",
    default="1h",
    type=duration,
    metavar="TIME",
    show_default=True,
    help="A message due for longer than this is a broken promise.",
)
@json_option
@on_database
def verify(database: Database, overdue: timedelta, *, as_json: bool) -> None:
    """Look for broken promises in the queue, and name them. The exit status is 1 if there are any.

    Up to 100 messages are named for each promise; a line says if there are more. It only reads, but most of the table:
    for every night, not for every minute.
    """
    from engagement.verification import verify as broken_promises

    with database.session() as session:
        violations = broken_promises(session, schema=database.schema, overdue=overdue, limit=NAMED)
    if as_json:
        click.echo(json_of([asdict(violation) for violation in violations]))
    for violation in () if as_json else violations:
        where = "table" if violation.message_id is None else f"message {violation.message_id}"
        click.echo(f"{violation.promise}: {where}: {violation.problem}")
        if violation.more:  # docs/decisions.md#2026-11-29--more-of-the-last-violation-says-that-verify-stopped
            click.echo(f"{violation.promise}: and more messages: of each promise at most {NAMED} are named")
    if violations:
        raise needs_attention()
    if not as_json:
        click.echo("no broken promise found")
