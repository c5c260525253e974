"""`demo` and `lint-catalogues`: commands that need no database of yours."""

from __future__ import annotations

import click

from engagement.cli.group import command
from engagement.cli.problems import Problem, needs_attention
from engagement.cli.showing import examples


def fallback(text: str) -> tuple[str, list[str]]:
    """Read `pt=pt-BR,es`."""
    locale, _, others = text.partition("=")
    if not locale or not all(others.split(",")):
        raise click.BadParameter("must be a locale, and others that are asked after it, such as pt=pt-BR.")
    return locale, others.split(",")


@command(
    "lint-catalogues",
    epilog=examples(
        "engagement lint-catalogues locales", "engagement lint-catalogues locales --default pt-BR --fallback pt=pt-BR"
    ),
)
@click.argument("folder", type=click.Path(exists=True, file_okay=False))
@click.option("--default", default="en", show_default=True, metavar="LOCALE", help="Asked for keys that others lack.")
@click.option(
    "--fallback", type=fallback, multiple=True, metavar="LOCALE=LOCALE,...", help="Are asked after that locale."
)
def lint_catalogues(folder: str, default: str, fallback: tuple[tuple[str, list[str]], ...]) -> None:
    """Check that each key can be said in each locale.

    It must exist in a catalogue that is asked for the locale, and have the same parameters in each.
    """
    try:
        from engagement._catalogues.lint import lint_catalogues as problems_of
    except ModuleNotFoundError as missing:
        raise Problem(f"{missing.name} is missing. Run: pip install 'engagement[words]'") from None
    problems = problems_of(folder, default=default, fallbacks=dict(fallback))
    for problem in problems:
        click.echo(str(problem))
    if problems:
        raise needs_attention()
    click.echo("no problem found")


@command(epilog=examples("engagement demo", "engagement demo --step --page"))
@click.option("--step", is_flag=True, help="Wait for Enter before each step.")
@click.option(
    "--page/--no-page", default=None, help="End in the admin page of the day, or not. A person at a terminal is asked."
)
def demo(*, step: bool, page: bool | None) -> None:
    """See the queue at work, on a database of its own.

    Messages are queued twice and sent once, fail and are retried, and a worker is killed in the middle of a send.
    At the end the day can be looked at on the admin page, until Ctrl-C. The demo starts a PostgreSQL for itself, and
    leaves nothing behind.
    """
    from engagement._operating.temporary_postgres import PostgresNotFound
    from engagement.demo import run_demo

    try:
        run_demo(waits=step, with_page=page)
    except ModuleNotFoundError as missing:
        raise Problem(f"{missing.name} is missing. Run: pip install 'engagement[demo]'") from None
    except (PostgresNotFound, RuntimeError) as error:
        raise Problem(str(error)) from None
