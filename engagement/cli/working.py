"""`workers`: those that send, and those that were lost."""

from __future__ import annotations

import sys
from dataclasses import asdict

import click

from engagement._operating.workers import seen_workers
from engagement.cli.connecting import Database, on_database
from engagement.cli.group import command
from engagement.cli.problems import DatabaseProblem
from engagement.cli.showing import examples, for_person, how_far, json_of, json_option, show_rows, show_table

COLUMNS = (
    *("name", "standing", "last_seen_at", "started_at", "host", "process_id", "version", "transport", "concurrency"),
    *("in_hand", "in_hand_since", "holds", "sent", "failed", "not_ready"),
)
FOR_PEOPLE = {
    "name": for_person,
    "standing": for_person,
    "last_seen_at": how_far,
    "started_at": how_far,
    "holds": for_person,
    "sent": for_person,
    "failed": for_person,
    "transport": for_person,
    "not_ready": for_person,
}


@command(epilog=examples("engagement workers", "engagement workers --json"))
@json_option
@on_database
def workers(database: Database, *, as_json: bool) -> None:
    """List the workers, those that are gone first.

    A worker says every 15 seconds that it is alive, also while a send takes long. Not seen for three times that, it is
    gone. It is slow if it is seen, and its oldest send has lasted for over a minute. It holds the messages that are
    being sent under its name; any worker recovers those of one that is gone, once their leases run out. A worker that
    ends cleanly is taken off the list, and one that is gone a day later.
    """
    with database.session() as session:
        found = seen_workers(session, schema=database.schema)
    if not found.may_see:
        raise DatabaseProblem("this role may not read engagement_worker. Grant it SELECT, or upgrade if it is missing")
    facts = [asdict(worker) for worker in found.seen]
    if as_json:
        click.echo(json_of({"workers": facts}))
    elif sys.stdout.isatty():
        show_table(facts, FOR_PEOPLE, shortened=("name", "transport", "not_ready"))
    else:
        show_rows(facts, COLUMNS)
