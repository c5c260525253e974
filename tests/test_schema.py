"""`schema=` is the name of a schema wherever it is taken: an empty one is a variable that was not set."""

import importlib
import inspect
import io
import pkgutil
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import create_engine
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

import engagement
from engagement import AsyncEngagementMessageRepository, process_message_queue
from engagement.cli import cli
from engagement.receipts.signed import SignedReceipts
from engagement.telemetry import EngagementInstrumentor

# Nobody listens there: what would connect fails otherwise.
ENGINE = create_engine("postgresql+psycopg://127.0.0.1:1/nothing")
GIVEN = {
    "sought": "ana",
    "engine": ENGINE, "bind": ENGINE, "session": Session(ENGINE), "output": io.StringIO(), "transport": print,
    "tz_of": print, "limit": 1, "per": "day", "after": 0, "up_to": 1, "since": datetime(2026, 1, 1, tzinfo=UTC),
    "bucket": timedelta(hours=1), "older_than": timedelta(days=1), "authentication": print,
    "source": SignedReceipts(f"whsec_{'A' * 32}"), "patience": timedelta(seconds=1),
}  # fmt: skip
INNER = {
    "act", "copy", "in_session", "is_anothers", "serve", "set_aside", "wait_for_turn", "with_schema",
    "whose", "Database", "Queue", "find_asked", "perform",
}  # fmt: skip


def takers():
    """Return whatever of the package takes a schema."""
    for module in pkgutil.walk_packages(engagement.__path__, "engagement."):
        if module.name.endswith("__main__"):
            continue
        for name, value in vars(importlib.import_module(module.name)).items():
            if name in INNER or name.startswith("_") or getattr(value, "__module__", None) != module.name:
                continue
            is_class = inspect.isclass(value) and not issubclass(value, dict | BaseException)
            if (is_class or inspect.isroutine(value)) and "schema" in inspect.signature(value).parameters:
                yield value


@pytest.mark.parametrize("taker", list(takers()), ids=lambda taker: taker.__name__)
@pytest.mark.parametrize("schema", ["", 0])
def test_what_is_no_name_is_refused(taker, schema):
    """At once, and by name: not a table on the search path, nor an error of the database in the host's transaction."""
    parameters = inspect.signature(taker).parameters
    needed = [name for name in parameters if parameters[name].default is inspect.Parameter.empty or name == "engine"]
    given = GIVEN | {"session": AsyncSession()} if taker is AsyncEngagementMessageRepository else GIVEN

    with pytest.raises(ValueError, match=r"^schema: "):
        taker(**{name: given[name] for name in needed if name in given}, schema=schema)


def test_runs_and_instruments_refuse_it_too():
    """Those that take it among their keywords."""
    with pytest.raises(ValueError, match=r"^schema: "):
        process_message_queue(ENGINE, print, schema="")
    with pytest.raises(ValueError, match=r"^schema: "):
        EngagementInstrumentor().instrument(engine=ENGINE, schema="")


@pytest.mark.parametrize(
    "command",
    [
        name
        for name in cli.list_commands(None)
        if "schema" in {each.name for each in cli.get_command(None, name).params}
    ],
)
def test_every_command_refuses_an_empty_schema(run, command):
    """`--schema "$UNSET"` is a usage error, and not the table of the search path."""
    ran = run(command, "--schema", "")

    assert (ran.status, ran.out) == (2, "")
    assert "--schema" in ran.err


def test_alembics_command_refuses_an_empty_schema():
    """`-x schema=` says nothing."""
    done = subprocess.run(
        [sys.executable, "-m", "alembic", "-x", "schema=", "upgrade", "head", "--sql"],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode != 0
    assert "schema: must be" in done.stderr
