"""`upgrade`, `downgrade`, `current`: the table and its revision."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import click

from engagement import migrations
from engagement.cli.acting import ask, in_number
from engagement.cli.connecting import Database, on_database
from engagement.cli.group import command
from engagement.cli.problems import DatabaseProblem, Problem
from engagement.cli.showing import examples, json_option, logging_to_stderr, show


@command(
    epilog=examples(
        "engagement upgrade", "engagement upgrade --schema messaging", "engagement upgrade --sql > upgrade.sql"
    )
)
@click.argument("revision", default="head")
@click.option("--sql", is_flag=True, help="Print the SQL, and touch no database.")
@click.option(
    "--row-level-security", is_flag=True, help="Leave the table to its owner and to roles that bypass it (Supabase)."
)
@on_database
def upgrade(database: Database, revision: str, *, sql: bool, row_level_security: bool) -> None:
    """Create the queue's table, or bring it up to date.

    Twice is as good as once, and so is from two places at the same time. A --schema that is not there is created.
    """
    with _migration_problems():
        if sql:
            migrations.upgrade_sql(sys.stdout, revision, schema=database.schema, row_level_security=row_level_security)
            return
        with database.engine(to_migrate=True) as engine:
            before = migrations.current(engine, schema=database.schema)
            migrations.upgrade(engine, revision, schema=database.schema, row_level_security=row_level_security)
            now = migrations.current(engine, schema=database.schema)
    click.echo(f"already at {now}" if now == before else f"upgraded to {now}")


@command(epilog=examples("engagement adopt"))
@on_database
def adopt(database: Database) -> None:
    """Take over the messages of an earlier service, whose table has our name.

    Stop that service first. Its keys go on blocking, what it may have sent is in doubt, and its table is moved into the
    schema engagement_before.
    """
    # docs/decisions.md#2026-11-29--adopt-takes-over-an-earlier-services-table
    with _migration_problems(), database.engine(to_migrate=True) as engine:
        messages = migrations.adopt(engine, schema=database.schema)
    click.echo(f"adopted {in_number(messages)}; the earlier table is in the schema engagement_before")


@command(epilog=examples("engagement downgrade eng_0001", "engagement downgrade base --yes"))
@click.argument("revision", default="base")
@click.option("--yes", is_flag=True, help="Do not ask.")
@on_database
def downgrade(database: Database, revision: str, *, yes: bool) -> None:
    """Take the table back to REVISION.

    The default, base, drops it with all messages and their keys: all of them can then be queued, and sent, again.
    Asks first if there are any messages.
    """
    with _migration_problems(), database.engine(to_migrate=True) as engine:
        if migrations.current(engine, schema=database.schema) is not None:
            if not yes:
                _ask_to_downgrade(database, revision)
            migrations.downgrade(engine, revision, schema=database.schema)
        now = migrations.current(engine, schema=database.schema)
    click.echo(f"downgraded to {now or 'base: the table is gone'}")


def _ask_to_downgrade(database: Database, revision: str) -> None:
    with database.repository() as repository:
        messages = sum(repository.count_by_status().by_status.values())
    if messages:
        ask(f"downgrade to {revision} with {in_number(messages)}")


@command()
@json_option
@on_database
def current(database: Database, *, as_json: bool) -> None:
    """Show which revision the database is at. The exit status is 3 if an upgrade is due."""
    with _migration_problems(), database.engine(to_migrate=True) as engine:
        now = migrations.current(engine, schema=database.schema)
    newest = migrations.head()
    show("revision", {"revision": now, "newest": newest}, as_json=as_json)
    if now != newest:
        raise DatabaseProblem(f"the database is not at the newest revision. Run: {database.in_full('upgrade')}")


@contextmanager
def _migration_problems() -> Iterator[None]:
    from alembic.util import CommandError

    try:
        with logging_to_stderr(logging.WARNING):
            yield
    except CommandError as error:
        raise Problem(str(error)) from None
