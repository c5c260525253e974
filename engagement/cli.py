"""The command `engagement`: what operators and scheduled jobs call.

It parses, calls the package and shows what came of it, to a person or to a program. What is wrong is said on one
line, without a password, and with an exit status that tells.
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import stat
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import wraps
from typing import IO, Any, NoReturn, TypeVar

from sqlalchemy import URL, Engine, create_engine, make_url, select
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.orm import Session

from engagement import migrations
from engagement.jsonl import BadLine, read_messages
from engagement.messages import NewMessage
from engagement.models import EngagementMessage
from engagement.repository import EngagementMessageRepository
from engagement.sending import Transport
from engagement.tally import ProcessResult
from engagement.transports import TransportNotFound, load_transport
from engagement.worker import Worker, process_message_queue

try:
    import click
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
    from rich.table import Table
except ModuleNotFoundError as missing:
    # Nothing below can be defined without them.
    name = (missing.name or "").partition(".")[0]
    sys.stderr.write(f"engagement: {name} is missing. Run: pip install 'engagement[cli]'\n")
    raise SystemExit(2) from None

F = TypeVar("F", bound=Callable[..., Any])

NEEDS_ATTENTION, USAGE, NO_DATABASE = 1, 2, 3


def examples(*lines: str) -> str:
    """Return the part of a help page that shows `lines` as they are to be typed."""
    return "\n".join(("\b", "Examples:", *(f"  {line}" for line in lines)))


OVERVIEW = """\b
See it work, on a database that is gone afterwards:
  engagement demo

\b
On your own database:
  export ENGAGEMENT_DATABASE_URL=postgresql://user@host/name
  engagement upgrade
  engagement queue messages.jsonl
  engagement process --transport myapp.whatsapp:send
  engagement status

\b
Exit status:
  0    all is well; also after a first signal, once the sends in hand are settled
  1    something needs attention: bad lines, failed messages, messages in doubt
  2    the command was not understood, or something that it needs is missing
  3    the database cannot be reached, or is not migrated
  130  interrupted (SIGINT); where the first signal waits for sends, by the second
  143  likewise by SIGTERM"""


class Problem(click.ClickException):
    """What ends a command: one line for a person, a status for a program."""

    exit_code = USAGE

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class DatabaseProblem(Problem):
    """The database cannot be reached, or is not migrated."""

    exit_code = NO_DATABASE


class Commands(click.Group):
    """A group whose problems are said on one line."""

    def main(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Run a command, and leave with its status."""
        try:
            status = super().main(*args, **kwargs | {"standalone_mode": False})
        except click.Abort:
            click.echo("engagement: interrupted", err=True)
            status = 128 + signal.SIGINT
        except click.UsageError as error:
            command = error.ctx.command_path if error.ctx else "engagement"
            click.echo(f"{command}: {' '.join(error.format_message().split())} See: {command} --help", err=True)
            status = error.exit_code
        except click.ClickException as error:
            click.echo(f"engagement: {error.format_message()}", err=True)
            status = error.exit_code
        sys.exit(status or 0)


@click.group(
    cls=Commands,
    epilog=OVERVIEW,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.pass_context
def cli(context: click.Context) -> None:
    """Queue proactive messages once, and never send one twice."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


def main() -> NoReturn:
    """Be the command `engagement`."""
    cli.main(prog_name="engagement")


# The database --------------------------------------------------------------------------------------------------------

EXAMPLE_URL = "postgresql://user:password@host:5432/name"
CONNECT_SECONDS = 10
_NOT_MIGRATED = frozenset({"42P01", "42703", "3F000"})  # no such table, column, schema


@dataclass(frozen=True, slots=True)
class Database:
    """What `--database-url` and `--schema` say. Nothing is connected before it is used."""

    given_url: str | None
    schema: str | None

    @contextmanager
    def engine(self) -> Iterator[Engine]:
        """Hand out an engine, and turn the database's errors into problems."""
        url = _checked_url(self.given_url)
        try:
            # Nothing prepared: the URL may be that of a pooler, whose connections of the server are shared.
            connect_args = {"prepare_threshold": None} | _patience(url)
            engine = create_engine(url, hide_parameters=True, connect_args=connect_args)
        except ImportError:
            raise Problem("psycopg cannot be loaded. Run: pip install 'psycopg[binary]'") from None
        # It would log, past our one line, how it cancels the query that Ctrl-C interrupts.
        logging.getLogger("psycopg").addHandler(logging.NullHandler())
        try:
            yield engine
        except SQLAlchemyError as error:
            raise self._problem(error, url) from None
        finally:
            engine.dispose()

    @contextmanager
    def repository(self) -> Iterator[EngagementMessageRepository]:
        """Hand out a repository in a transaction that is committed at the end."""
        with self.engine() as engine, Session(engine) as session, session.begin():
            options = {"schema_translate_map": {None: self.schema}} if self.schema else {}
            # What cannot work is said before anything is read.
            session.execute(select(EngagementMessage.id).limit(0), execution_options=options)
            yield EngagementMessageRepository(session, schema=self.schema)

    def _problem(self, error: SQLAlchemyError, url: URL) -> Problem:
        original = getattr(error, "orig", None)
        state = getattr(original, "sqlstate", None)
        if state in _NOT_MIGRATED:
            option = "" if self.schema is None else f" --schema {self.schema}"
            return DatabaseProblem(f"the queue's table is missing or old. Run: engagement upgrade{option}")
        if original is None or state is not None:
            # Not the server's text, which may show a row.
            return DatabaseProblem(f"the database refused: {type(original or error).__name__} {state or ''}")
        return DatabaseProblem(f"cannot reach the database: {_without_passwords(str(original), url)}")


def _checked_url(given: str | None) -> URL:
    """Return the URL with our driver. What is wrong with it is said without repeating it: it may hold a password."""
    if not given:
        problem = f"no database given. Set ENGAGEMENT_DATABASE_URL={EXAMPLE_URL} or use --database-url"
        raise Problem(problem)
    try:
        url = make_url(given)
    except (ArgumentError, ValueError):
        raise Problem(f"the database URL cannot be read. It looks like {EXAMPLE_URL}") from None
    if url.get_backend_name() not in {"postgres", "postgresql"}:
        raise Problem(f"the database URL is none of PostgreSQL. It looks like {EXAMPLE_URL}")
    if "@" in (url.host or ""):
        raise Problem("the database URL has an @ too many. In a password, write it as %40")
    return url.set(drivername="postgresql+psycopg")


def _patience(url: URL) -> dict[str, Any]:
    is_given = "connect_timeout" in url.query or "PGCONNECT_TIMEOUT" in os.environ
    return {} if is_given else {"connect_timeout": CONNECT_SECONDS}


def _without_passwords(text: str, url: URL) -> str:
    for secret in (url.password, url.query.get("password"), url.query.get("sslpassword")):
        if secret:
            text = text.replace(str(secret), "***")
    return text


def on_database(command: F) -> Callable[..., Any]:
    """Give a command the options that say where the queue is, as its argument `database`."""

    @click.option(
        "--database-url",
        envvar="ENGAGEMENT_DATABASE_URL",
        show_envvar=True,
        metavar="URL",
        help="The PostgreSQL database. Rather set the variable: options can be seen by others.",
    )
    @click.option("--schema", metavar="NAME", help="Where the table is, if not on the search path.")
    @wraps(command)
    def run(*, database_url: str | None, schema: str | None, **options: Any) -> Any:
        return command(database=Database(database_url, schema or None), **options)

    return run


# What is shown -------------------------------------------------------------------------------------------------------

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


def show(title: str, facts: Mapping[str, object], *, as_json: bool) -> None:
    """Print facts: a table for a person, `name=value` lines or JSON for a program."""
    if as_json:
        click.echo(json.dumps(facts, ensure_ascii=False))
    elif sys.stdout.isatty():
        _show_table(title, facts)
    else:
        for name, value in facts.items():
            click.echo(f"{name}={'' if value is None else value}")


def _show_table(title: str, facts: Mapping[str, object]) -> None:
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, value in facts.items():
        needs_attention = name in {"bad", "failed", "in_doubt"} and bool(value)
        style = "bold yellow" if needs_attention else None if value else "dim"
        table.add_row(name.replace("_", " "), "-" if value is None else str(value), style=style)
    Console().print(table)


# The table -----------------------------------------------------------------------------------------------------------


@cli.command(
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
        with database.engine() as engine:
            before = migrations.current(engine, schema=database.schema)
            migrations.upgrade(engine, revision, schema=database.schema, row_level_security=row_level_security)
            now = migrations.current(engine, schema=database.schema)
    click.echo(f"already at {now}" if now == before else f"upgraded to {now}")


@cli.command(epilog=examples("engagement downgrade eng_0001", "engagement downgrade base --yes"))
@click.argument("revision", default="base")
@click.option("--yes", is_flag=True, help="Do not ask.")
@on_database
def downgrade(database: Database, revision: str, *, yes: bool) -> None:
    """Take the table back to REVISION.

    The default, base, drops it with all messages and their keys; what was sent can then be queued, and sent, again.
    Asks first if there are any messages.
    """
    with _migration_problems(), database.engine() as engine:
        if migrations.current(engine, schema=database.schema) is not None:
            if not yes:
                _ask_to_downgrade(database, revision)
            migrations.downgrade(engine, revision, schema=database.schema)
        now = migrations.current(engine, schema=database.schema)
    click.echo(f"downgraded to {now or 'base: the table is gone'}")


def _ask_to_downgrade(database: Database, revision: str) -> None:
    with database.repository() as repository:
        messages = sum(repository.count_by_status().by_status.values())
    if not messages:
        return
    if not sys.stdin.isatty():
        raise Problem(f"there are {messages} messages. To downgrade all the same, add --yes")
    click.confirm(f"There are {messages} messages. Downgrade to {revision}?", abort=True, err=True)


@cli.command()
@json_option
@on_database
def current(database: Database, *, as_json: bool) -> None:
    """Show which revision the database is at. The exit status is 3 if an upgrade is due."""
    with _migration_problems(), database.engine() as engine:
        now = migrations.current(engine, schema=database.schema)
    newest = migrations.head()
    show("revision", {"revision": now, "newest": newest}, as_json=as_json)
    if now != newest:
        raise DatabaseProblem("the database is not at the newest revision. Run: engagement upgrade")


@contextmanager
def _migration_problems() -> Iterator[None]:
    from alembic.util import CommandError

    try:
        yield
    except CommandError as error:
        raise Problem(str(error)) from None


# Queueing ------------------------------------------------------------------------------------------------------------


@cli.command(epilog=examples("engagement queue messages.jsonl", "daily-job | engagement queue - --json"))
@click.argument("source", type=click.File("rb"), metavar="FILE.jsonl|-")
@json_option
@on_database
def queue(database: Database, source: IO[bytes], *, as_json: bool) -> None:
    """Queue the messages of a JSON Lines file, or of standard input.

    Each line is an object with user_id, message_type, message_key, destination (individual or group) and
    destination_jid, and optionally message_params, scheduled_for and expires_at (ISO 8601 with an offset), tz (such as
    America/Sao_Paulo: whose date the idempotency key has) and idempotency_key.

    All good lines are queued in one transaction. What was queued before is a duplicate, and is left alone; so the same
    file can be given again. Each bad line is told on standard error, and makes the exit status 1.
    """
    bad = 0
    screen = Console(stderr=True)

    def report(line: BadLine) -> None:
        nonlocal bad
        bad += 1
        screen.print(str(line), markup=False, highlight=False, soft_wrap=True)

    with database.repository() as repository:
        messages = read_messages(source, report)
        result = repository.queue_messages(_with_progress(messages, source, screen))
    show("queued", {"queued": result.created, "duplicates": result.duplicates, "bad": bad}, as_json=as_json)
    if bad:
        raise click.exceptions.Exit(NEEDS_ATTENTION)


def _with_progress(messages: Iterable[NewMessage], source: IO[bytes], screen: Console) -> Iterator[NewMessage]:
    """Yield the messages, and show how far the file is read if it is one, and a person is watching."""
    if not screen.is_terminal or not stat.S_ISREG(os.fstat(source.fileno()).st_mode):
        yield from messages
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=screen, transient=True) as progress:
        task = progress.add_task("reading", total=os.fstat(source.fileno()).st_size)
        for number, message in enumerate(messages):
            if number % 500 == 0:
                progress.update(task, completed=source.tell(), description=f"{number} messages read")
            yield message


# Delivery ------------------------------------------------------------------------------------------------------------

_DURATION = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,6})?)(ms|s|m|h|d)")
_UNITS = {"ms": "milliseconds", "s": "seconds", "m": "minutes", "h": "hours", "d": "days"}
_LONGEST = timedelta(days=366)


def duration(text: str) -> timedelta:
    """Read `500ms`, `30s`, `5m`, `2h` or `1d`."""
    found = _DURATION.fullmatch(text)
    length = None if found is None else timedelta(**{_UNITS[found[2]]: float(found[1])})
    if length is None or length > _LONGEST:
        raise click.BadParameter("must be a duration such as 500ms, 30s, 5m, 2h or 1d, of at most a year.")
    return length


def positive_duration(text: str) -> timedelta:
    """Read a duration that is not zero."""
    length = duration(text)
    if not length:
        raise click.BadParameter("must be more than nothing.")
    return length


def transport_named(name: str) -> Transport:
    """Load a transport."""
    try:
        return load_transport(name)
    except TransportNotFound as error:
        raise click.BadParameter(f"{error}.") from None


def delivers(command: F) -> F:
    """Give a command the transport, and the options that both ways to deliver share."""
    options = (
        click.option(
            "--transport",
            required=True,
            type=transport_named,
            metavar="MODULE:NAME",
            help="What sends: a function, an object with send, or a class that makes one.",
        ),
        click.option("--concurrency", default=1, type=click.IntRange(1, 10_000), metavar="N", help="Sends at once."),
        click.option(
            "--lease",
            default="5m",
            type=positive_duration,
            metavar="TIME",
            help="How long a claim holds if its worker dies.",
        ),
        click.option(
            "--max-retries",
            default=3,
            type=click.IntRange(1, 1000),
            metavar="N",
            help="After so many failures it is failed.",
        ),
        click.option(
            "--min-interval", default="0s", type=duration, metavar="TIME", help="Between the starts of two sends."
        ),
        click.option(
            "--send-timeout",
            type=positive_duration,
            metavar="TIME",
            help="A send without an answer for so long is in doubt.",
        ),
        click.option("--strict", is_flag=True, help="In doubt, unless an exception proves that nothing was sent."),
        click.option("--reveal", is_flag=True, help="Do not mask what looks personal in the reasons."),
        click.option("--verbose", is_flag=True, help="Log every event to standard error, not only warnings."),
        json_option,
    )
    for option in reversed(options):
        command = option(command)
    return command


@cli.command(
    context_settings={"show_default": True},
    epilog=examples(
        "engagement process --transport engagement.transports.console:Console",
        "engagement process --transport myapp.whatsapp:send --limit 500 --min-interval 2s",
    ),
)
@delivers
@click.option("--limit", type=click.IntRange(min=0), metavar="N", help="Stop after so many messages.")
@on_database
def process(
    database: Database,
    transport: Transport,
    limit: int | None,
    *,
    as_json: bool,
    reveal: bool,
    verbose: bool,
    **options: Any,
) -> None:
    """Send what is due, until nothing is: for a scheduled job.

    Any number of these, and of `engagement work`, may run at once. The first SIGTERM or Ctrl-C lets the sends in hand
    finish; the second leaves at once, and what was being sent is recovered when its lease has run out.
    """
    with database.engine() as engine, _delivering(verbose=verbose, as_json=as_json) as stop:
        result = process_message_queue(engine, transport, limit=limit, stop=stop, schema=database.schema, **options)
    _show_result(result, as_json=as_json, reveal=reveal)
    if result.failed or result.in_doubt:
        raise click.exceptions.Exit(NEEDS_ATTENTION)


@cli.command(
    context_settings={"show_default": True},
    epilog=examples(
        "engagement work --transport myapp.whatsapp:send",
        "engagement work --transport myapp.whatsapp:Gateway --concurrency 8 --send-timeout 30s --verbose",
    ),
)
@delivers
@click.option(
    "--poll-interval",
    default="5s",
    type=positive_duration,
    metavar="TIME",
    help="How soon a message that becomes due is noticed.",
)
@on_database
def work(
    database: Database,
    transport: Transport,
    poll_interval: timedelta,
    *,
    as_json: bool,
    reveal: bool,
    verbose: bool,
    **options: Any,
) -> None:
    """Send what is due, until told to stop: for a process of its own.

    A lost database is waited for. The first SIGTERM or Ctrl-C lets the sends in hand finish, and the exit status is 0;
    the second leaves at once, and what was being sent is recovered when its lease has run out.
    """
    with database.engine() as engine, _delivering(verbose=verbose, as_json=as_json) as stop:
        worker = Worker(engine, transport, poll_interval=poll_interval, schema=database.schema, **options)
        result = worker.run(stop)
    _show_result(result, as_json=as_json, reveal=reveal)


@contextmanager
def _delivering(*, verbose: bool, as_json: bool) -> Iterator[threading.Event]:
    with ExitStack() as around:
        if as_json:
            # A transport may print; standard output is for the JSON alone.
            around.enter_context(redirect_stdout(sys.stderr))
        around.enter_context(_logging_to_stderr(logging.INFO if verbose else logging.WARNING))
        yield around.enter_context(stopped_by_signals())


@contextmanager
def _logging_to_stderr(level: int) -> Iterator[None]:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("engagement")
    logger.addHandler(handler)
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.removeHandler(handler)


@contextmanager
def stopped_by_signals() -> Iterator[threading.Event]:
    """Hand out an event that the first SIGTERM or SIGINT sets; the second ends the process at once.

    A thread does both, fed by the interpreter's wake-up pipe: a handler in the main thread would have to wait until
    that is out of a C call, and might set the event while the same thread holds its lock.
    """
    stop = threading.Event()
    signals = (signal.SIGTERM, signal.SIGINT)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    old_writer = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    old_handlers = {number: signal.signal(number, lambda *_: None) for number in signals}
    watcher = threading.Thread(target=_watch_signals, args=(reader, frozenset(signals), stop), daemon=True)
    watcher.start()
    try:
        yield stop
    finally:
        for number, handler in old_handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(old_writer)
        os.close(writer)
        watcher.join()
        os.close(reader)


def _watch_signals(reader: int, signals: frozenset[int], stop: threading.Event) -> None:
    while received := os.read(reader, 1):
        number = received[0]
        if number not in signals:
            continue
        name = signal.Signals(number).name
        if stop.is_set():
            _tell(f"{name} again: leaving at once; what was being sent is recovered when its lease has run out")
            os._exit(128 + number)
        stop.set()
        _tell(f"{name}: stopping when the sends in hand are settled; once more to leave at once")


def _tell(line: str) -> None:
    # Past Python's buffers and their locks, and whether or not somebody still reads it.
    with suppress(OSError):
        os.write(2, f"engagement: {line}\n".encode())


ERRORS_SHOWN = 20


def _show_result(result: ProcessResult, *, as_json: bool, reveal: bool) -> None:
    facts: dict[str, Any] = {name: value for name, value in asdict(result).items() if name != "errors"}
    errors = [(message_id, reason if reveal else masked(reason)) for message_id, reason in result.errors]
    if as_json:
        facts["errors"] = [{"message_id": message_id, "reason": reason} for message_id, reason in errors]
    show("delivery", facts, as_json=as_json)
    if as_json:
        return
    for message_id, reason in errors[:ERRORS_SHOWN]:
        click.echo(f"message {message_id}: {reason}", err=True)
    if len(errors) > ERRORS_SHOWN:
        click.echo(f"and {len(errors) - ERRORS_SHOWN} more", err=True)


_PERSONAL = re.compile(r"\S+@\S+|\+\d[\d ().-]{5,}\d|\d{7,}")


def masked(reason: str) -> str:
    """Return a provider's text without what looks like an address or a number of a person."""
    return _PERSONAL.sub("***", reason)


# Looking -------------------------------------------------------------------------------------------------------------


@cli.command()
@json_option
@on_database
def status(database: Database, *, as_json: bool) -> None:
    """Show how many messages stand where.

    Also how long the oldest due message has been waiting: more than a few minutes, and nobody is sending.
    """
    with database.repository() as repository:
        counts = repository.count_by_status()
    waiting = None if counts.oldest_due is None else round(counts.oldest_due.total_seconds(), 1)
    facts: dict[str, object] = {str(status): count for status, count in counts.by_status.items()}
    show("messages", facts | {"oldest_due_seconds": waiting}, as_json=as_json)


@cli.command(epilog=examples("engagement verify", "engagement verify --overdue 15m --json"))
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

    It only reads, but most of the table: for every night, not for every minute.
    """
    from engagement.verification import verify as broken_promises

    with database.engine() as engine, Session(engine) as session:
        violations = broken_promises(session, schema=database.schema, overdue=overdue)
    if as_json:
        click.echo(json.dumps([asdict(violation) for violation in violations]))
    for violation in () if as_json else violations:
        where = "table" if violation.message_id is None else f"message {violation.message_id}"
        click.echo(f"{violation.promise}: {where}: {violation.problem}")
    if violations:
        raise click.exceptions.Exit(NEEDS_ATTENTION)
    if not as_json:
        click.echo("no broken promise found")


@cli.command("lint-catalogues", epilog=examples("engagement lint-catalogues locales"))
@click.argument("folder", type=click.Path(exists=True, file_okay=False))
def lint_catalogues(folder: str) -> None:
    """Check that each key exists in each locale, with the same parameters, and can always be said."""
    try:
        from engagement.lint_catalogues import lint_catalogues as problems_of
    except ModuleNotFoundError as missing:
        raise Problem(f"{missing.name} is missing. Run: pip install 'engagement[words]'") from None
    problems = problems_of(folder)
    for problem in problems:
        click.echo(str(problem))
    if problems:
        raise click.exceptions.Exit(NEEDS_ATTENTION)
    click.echo("no problem found")


@cli.command()
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


if __name__ == "__main__":
    main()
