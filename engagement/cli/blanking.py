"""`forget-user` and `prune`: blank personal data. Keys stay, and still block."""

from __future__ import annotations

from datetime import timedelta

import click
from rich.console import Console
from sqlalchemy.orm import Session

from engagement._operating.lists import count_messages, count_prunable
from engagement.cli.acting import ask, dry_run_option, in_number, show_dry_run, told_if_ended_early, yes_option
from engagement.cli.connecting import Database, on_database
from engagement.cli.group import command
from engagement.cli.parameters import age_to_prune
from engagement.cli.problems import needs_attention
from engagement.cli.showing import examples, in_words, json_option, progress, show

BATCH = 2_000


@command(
    "forget-user", epilog=examples("engagement forget-user user123 --dry-run", "engagement forget-user user123 --yes")
)
@click.argument("user_id", metavar="USER")
@dry_run_option
@yes_option
@json_option
@on_database
def forget_user(database: Database, user_id: str, *, dry_run: bool, yes: bool, as_json: bool) -> None:
    """Cancel and blank all messages of a user.

    Pending ones are cancelled; params, destination, errors and provider ids are blanked in all. It is one transaction,
    and cannot be undone. The user id and the keys stay, and a key still blocks.
    """
    with database.session() as session:
        found = count_messages(session, schema=database.schema, user_id=user_id)
    if dry_run:
        show_dry_run(found, "forgotten", as_json=as_json)
    else:
        if found and not yes:
            ask(f"forget {in_number(found)} of this user")
        with database.repository() as repository:
            forgotten = repository.forget_user(user_id)
        facts = {"found": found, "cancelled": forgotten.cancelled, "blanked": forgotten.blanked}
        show("forgotten", facts, as_json=as_json)
    if not found:
        click.echo("engagement: there is no message of a user of that name", err=True)
        raise needs_attention()


@command(
    epilog=examples("engagement prune --older-than 90d --dry-run", "engagement prune --older-than 90d --yes --json")
)
@click.option(
    "--older-than",
    required=True,
    type=age_to_prune,
    metavar="TIME",
    help="Finished, and last due longer ago than this: an hour at least.",
)
@dry_run_option
@yes_option
@json_option
@on_database
def prune(database: Database, older_than: timedelta, *, dry_run: bool, yes: bool, as_json: bool) -> None:
    """Blank the personal data of old finished messages.

    Params, destination, errors, provider ids and history. It cannot be undone, and a pruned message cannot be retried.
    Each batch is a transaction of its own: batches before an interruption stay pruned.
    """
    pruned = 0
    with database.engine() as engine:
        with Session(engine) as session:
            found = count_prunable(session, older_than, schema=database.schema)
        if dry_run:
            show_dry_run(found, "pruned", as_json=as_json)
            return
        if found and not yes:
            ask(f"prune {in_number(found)} older than {in_words(older_than)}")
        with (
            progress(found, "pruned", Console(stderr=True, quiet=found <= BATCH)) as advance,
            told_if_ended_early(lambda: f"{in_number(pruned)} pruned"),
        ):
            while True:
                with Session(engine) as session, session.begin():
                    batch = database.repository_on(session).prune_messages(older_than, BATCH)
                pruned += batch
                advance(pruned)
                if batch < BATCH:
                    break
    show("pruned", {"found": found, "pruned": pruned}, as_json=as_json)
