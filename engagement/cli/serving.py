"""`admin`: the admin page, for the one person at the terminal."""

from __future__ import annotations

import logging
from zoneinfo import ZoneInfo

import click

from engagement._operating.jsonl import zone_named
from engagement.cli.connecting import Database, on_database
from engagement.cli.group import command
from engagement.cli.listening import check_reach, listens, told_if_taken
from engagement.cli.problems import Problem
from engagement.cli.showing import examples, logging_to_stderr


def zone(name: str) -> ZoneInfo:
    """Read the name of a time zone."""
    found = zone_named(name)
    if found is None:
        raise click.BadParameter("must be a time zone such as UTC or America/Sao_Paulo.")
    return found


@command(
    context_settings={"show_default": True},
    epilog=examples(
        "engagement admin", "engagement admin --reveal --tz America/Sao_Paulo", "engagement admin --port 0"
    ),
)
@listens(8025)
@click.option("--reveal", is_flag=True, help="Let the page reveal personal data on demand.")
@click.option("--read-only", is_flag=True, help="Only to look: nothing can be changed.")
@click.option("--tz", default="UTC", type=zone, metavar="ZONE", help="Times are shown and read in this zone.")
@on_database
def admin(
    database: Database, host: str, port: int, tz: ZoneInfo, *, public: bool, reveal: bool, read_only: bool
) -> None:
    """Serve a page to look at the queue, and to act on it.

    It prints an address to open in a browser. The token in it lets you in for eight hours, and others on this machine
    out. Actions and revealed data are logged to standard error. SIGTERM or Ctrl-C ends it, and the exit status is 0.
    """
    try:
        from engagement.admin.serving import serve
    except ModuleNotFoundError as missing:
        raise Problem(f"{missing.name} is missing. Run: pip install 'engagement[admin]'") from None
    check_reach(host, public=public)
    with database.repository():
        pass  # A database that cannot work is told of before the page is served.
    with database.engine() as engine, logging_to_stderr(logging.INFO), told_if_taken(host, port):
        serve(
            engine,
            host,
            port,
            click.echo,
            may_reveal=reveal,
            may_act=not read_only,
            tz=tz,
            schema=database.schema,
        )
