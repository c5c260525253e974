"""`demo` and `lint-catalogues`: what needs no database of yours."""

from __future__ import annotations

import click

from engagement.cli.group import command
from engagement.cli.problems import Problem, needs_attention
from engagement.cli.showing import examples


@command("lint-catalogues", epilog=examples("engagement lint-catalogues locales"))
@click.argument("folder", type=click.Path(exists=True, file_okay=False))
def lint_catalogues(folder: str) -> None:
    """Check that each key can be said in each locale.

    It must exist in each, with the same parameters.
    """
    try:
        from engagement.lint_catalogues import lint_catalogues as problems_of
    except ModuleNotFoundError as missing:
        raise Problem(f"{missing.name} is missing. Run: pip install 'engagement[words]'") from None
    problems = problems_of(folder)
    for problem in problems:
        click.echo(str(problem))
    if problems:
        raise needs_attention()
    click.echo("no problem found")


@command()
def demo() -> None:
    """See the queue at work, on a database of its own.

    Messages are queued twice and sent once, fail and are retried, and a worker is killed in the middle of a send.
    It starts a PostgreSQL for itself, and leaves nothing behind.
    """
    from engagement.demo import run_demo
    from engagement.temporary_postgres import PostgresNotFound

    try:
        run_demo()
    except ModuleNotFoundError as missing:
        raise Problem(f"{missing.name} is missing. Run: pip install 'engagement[demo]'") from None
    except (PostgresNotFound, RuntimeError) as error:
        raise Problem(str(error)) from None
