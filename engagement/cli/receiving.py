"""`receive`: the endpoint of a provider's receipts, for a host without a web server."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

import click

from engagement.cli.connecting import Database, on_database
from engagement.cli.group import command
from engagement.cli.listening import check_reach, listens, told_if_taken
from engagement.cli.parameters import on_settled_named
from engagement.cli.problems import Problem
from engagement.cli.showing import examples, logging_to_stderr
from engagement.transports.settings import Settings

if TYPE_CHECKING:
    from engagement._delivery.hook import OnSettled
    from engagement.receipts import ReceiptSource

PREFIX = "ENGAGEMENT_RECEIPTS_"
PROVIDERS: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "cloud": ("cloud:CloudReceipts", {"app_secret": "SECRET", "verify_token": "VERIFY_TOKEN"}),
    "webhook": ("signed:SignedReceipts", {"secret": "SECRET"}),
    "evolution": ("evolution:EvolutionReceipts", {"authorization": "AUTHORIZATION", "jwt_key": "JWT_KEY"}),
    "waha": ("waha:WahaReceipts", {"key": "SECRET"}),
    "wuzapi": ("wuzapi:WuzapiReceipts", {"key": "SECRET"}),
}
"""The source of each provider, and the variable of each of its arguments."""
MOST_CONNECTIONS = 100
"""Each may hold a body of `endpoint.MOST_BYTES`."""


@command(
    context_settings={"show_default": True},
    epilog=examples("engagement receive --provider cloud", "engagement receive --provider waha --port 9000 --verbose"),
)
@click.option("--provider", required=True, type=click.Choice(list(PROVIDERS)), help="Who sends the receipts.")
@listens(8026)
@click.option(
    "--on-settled",
    type=on_settled_named,
    metavar="MODULE:NAME",
    help="A function, called in the transaction that settles a message by a receipt: (connection, message, status).",
)
@click.option("--verbose", is_flag=True, help="Log every event to standard error, not only warnings.")
@on_database
def receive(
    database: Database,
    provider: str,
    host: str,
    port: int,
    on_settled: OnSettled | None,
    *,
    public: bool,
    verbose: bool,
) -> None:
    """Take the receipts of a provider over HTTP and record them: for a host without a web server.

    It prints the address. Secrets are variables, not options: ENGAGEMENT_RECEIPTS_SECRET (of Evolution API _JWT_KEY or
    _AUTHORIZATION) and, for the handshake of the Cloud API, ENGAGEMENT_RECEIPTS_VERIFY_TOKEN; with _FILE behind it, a
    variable names a file. SIGTERM or Ctrl-C ends it, and the exit status is 0.
    """
    try:
        from engagement._operating.serving import serve
    except ModuleNotFoundError as missing:
        raise Problem(f"{missing.name} is missing. Run: pip install 'engagement[receipts]'") from None
    from engagement.receipts import ReceiptsASGI

    check_reach(host, public=public)
    source = source_of(provider)
    with database.repository():
        pass  # A database that cannot work is told of before anything is received.
    level = logging.INFO if verbose else logging.WARNING
    with database.engine() as engine, logging_to_stderr(level), told_if_taken(host, port):
        app = ReceiptsASGI(engine, source, schema=database.schema, on_settled=on_settled)
        serve(app, host, port, lambda address: click.echo(f"{address}/"), connections=MOST_CONNECTIONS)


def source_of(provider: str, environ: Mapping[str, str] | None = None) -> ReceiptSource:
    """Return the source of a provider, with the secrets of the environment. A problem names the variable only."""
    place, variables = PROVIDERS[provider]
    module, _, name = place.partition(":")
    settings = Settings(PREFIX, environ)
    try:
        given = {argument: _values(settings, variable) for argument, variable in variables.items()}
        if all(given[argument] is None for argument, variable in variables.items() if variable != "VERIFY_TOKEN"):
            raise Problem(f"{_names(variables)} is not set: without it nobody can prove to be the provider")
        source: ReceiptSource = getattr(import_module(f"engagement.receipts.{module}"), name)(**given)
    except ValueError as error:
        argument, _, problem = str(error).partition(": ")
        raise Problem(f"{PREFIX}{variables[argument]}: {problem}" if argument in variables else str(error)) from None
    return source


def _values(settings: Settings, variable: str) -> Any:
    """Return a setting: all of several secrets are taken, so that one can be changed without a gap."""
    text = settings.secret(variable)
    if text is None or variable == "VERIFY_TOKEN":
        return text
    # The header of AUTHORIZATION has blanks of its own (`Bearer 5e6f…`).
    return text.splitlines() if variable == "AUTHORIZATION" else text.split()


def _names(variables: Mapping[str, str]) -> str:
    return " or ".join(f"{PREFIX}{variable}" for variable in variables.values() if variable != "VERIFY_TOKEN")
