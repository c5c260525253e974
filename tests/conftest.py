"""A real PostgreSQL for every test: the one of ENGAGEMENT_TEST_DATABASE_URL, else a temporary one of our own.

With `--pgbouncer` the tests reach it through a PgBouncer in transaction mode, but for making databases and migrating.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from pgbouncer import NO_PGBOUNCER, pgbouncer, pgbouncer_program
from pytest_postgresql import factories
from pytest_postgresql.janitor import DatabaseJanitor
from shell import Ran, url_of
from sqlalchemy import URL, Engine, Result, create_engine, event, make_url, text
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool
from xdist.scheduler import WorkStealingScheduling

from engagement import Destination, EngagementMessageRepository, NewMessage, OutgoingMessage, migrations
from engagement._operating.temporary_postgres import temporary_postgres
from engagement.cli import cli
from engagement.models import TABLE_NAMES

# How long an example takes says more of the machine than of us.
settings.register_profile("any_machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any_machine")

# A job in the background of a script ignores Ctrl-C, and what the tests start and interrupt would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

PATIENCE = 60


def pytest_addoption(parser) -> None:
    parser.addoption("--pgbouncer", action="store_true", help="run the tests through a PgBouncer in transaction mode")


def pytest_configure(config) -> None:
    config.addinivalue_line("markers", "direct(reason): with --pgbouncer this test is skipped, for the reason")
    if config.getoption("--pgbouncer") and pgbouncer_program() is None:
        raise pytest.UsageError(f"--pgbouncer: {NO_PGBOUNCER}")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log) -> WorkStealingScheduling:
    """Give each worker half of the files: what a file sets up for all its tests is then set up once, but for few."""
    return WorkStealingScheduling(config, log)


def pytest_runtest_setup(item) -> None:
    if item.config.getoption("--pgbouncer") and (direct := item.get_closest_marker("direct")):
        pytest.skip(f"not through a pooler: {direct.args[0]}")


@dataclass
class Server:
    """A running server, in the words of pytest-postgresql."""

    host: str
    port: str
    user: str
    password: str | None
    maintenance_dbname: str
    options: str = ""
    template_dbname: str | None = None


def database_url(server, dbname: str) -> URL:
    return URL.create(
        "postgresql+psycopg",
        username=server.user,
        password=server.password,
        database=dbname,
        query={"host": str(server.host), "port": str(server.port)},
    )


@pytest.fixture(scope="session", name="postgres_server")
def _postgres_server() -> Iterator[Server]:
    given = os.environ.get("ENGAGEMENT_TEST_DATABASE_URL")
    if given:
        yield _server(make_url(given))
        return
    with temporary_postgres() as temporary:
        yield _server(make_url(temporary.url))


def _server(url: URL) -> Server:
    return Server(
        host=str(url.host or url.query.get("host") or "localhost"),
        port=str(url.port or url.query.get("port") or 5432),
        user=url.username or "postgres",
        password=url.password,
        maintenance_dbname=url.database or "postgres",
    )


def migrate(*, host, port, user, dbname, password, **_) -> None:
    server = Server(host, port, user, password, dbname)
    engine = create_engine(database_url(server, dbname), poolclass=NullPool)
    migrations.upgrade(engine)
    engine.dispose()


migrated_template = factories.postgresql_noproc(depends_on="postgres_server", dbname="engagement_test", load=[migrate])
empty_template = factories.postgresql_noproc(depends_on="postgres_server", dbname="engagement_empty")
migrated_database = factories.postgresql("migrated_template", dbname=None)
empty_database = factories.postgresql("empty_template", dbname=None)


@pytest.fixture(scope="session", name="url_of")
def _url_of(request, migrated_template) -> Iterator[Callable[[str], URL]]:
    """How tests reach a database: directly, or through a pooler and with the one argument that it takes."""
    if not request.config.getoption("--pgbouncer"):
        yield partial(database_url, migrated_template)
        return
    with pgbouncer(migrated_template, pool_size=40) as pooler:

        def prepare_nothing(_dialect, _record, _arguments, options) -> None:
            options.setdefault("prepare_threshold", None)

        event.listen(Engine, "do_connect", prepare_nothing)
        yield pooler.url
        event.remove(Engine, "do_connect", prepare_nothing)


@pytest.fixture(name="empty_engine")
def _empty_engine(url_of, empty_template, empty_database) -> Iterator[Engine]:
    """An engine on a new database without our table."""
    engine = create_engine(url_of(empty_template.dbname))
    yield engine
    engine.dispose()


@contextmanager
def database_of_its_own(migrated_template, name: str) -> Iterator[URL]:
    """Make a migrated database, for as long as the block runs, and hand out its URL."""
    janitor = DatabaseJanitor(
        user=migrated_template.user,
        host=migrated_template.host,
        port=migrated_template.port,
        password=migrated_template.password,
        dbname=f"{migrated_template.dbname}_{name}",
        template_dbname=migrated_template.template_dbname,
        maintenance_dbname=migrated_template.maintenance_dbname,
    )
    janitor.drop()
    with janitor:
        yield database_url(migrated_template, janitor.dbname)


@pytest.fixture(scope="session", name="shared_engine")
def _shared_engine(url_of, migrated_template) -> Iterator[Engine]:
    with database_of_its_own(migrated_template, "shared") as url:
        engine = create_engine(url_of(url.database), pool_size=30, max_overflow=10)
        yield engine
        engine.dispose()


@pytest.fixture(name="engine")
def _engine(shared_engine: Engine) -> Iterator[Engine]:
    """An engine on a migrated database with an empty queue: for tests that commit."""
    _begin_with_message_1(shared_engine)
    yield shared_engine
    with shared_engine.begin() as connection:
        connection.execute(text(f"TRUNCATE {', '.join(TABLE_NAMES)} RESTART IDENTITY"))


@pytest.fixture(name="session")
def _session(shared_engine: Engine) -> Iterator[Session]:
    """A session on an empty queue, whose commits are savepoints of a transaction that is rolled back at the end."""
    _begin_with_message_1(shared_engine)
    with shared_engine.connect() as connection:
        transaction = connection.begin()
        with Session(connection, join_transaction_mode="create_savepoint") as session:
            yield session
        transaction.rollback()


def _begin_with_message_1(engine: Engine) -> None:
    # A sequence does not roll back with the messages of the test before.
    with engine.begin() as connection:
        connection.execute(text("SELECT setval('engagement_message_queue_id_seq', 1, false)"))


@pytest.fixture(name="repository")
def _repository(session: Session) -> EngagementMessageRepository:
    return EngagementMessageRepository(session)


@pytest.fixture(name="run")
def _run(monkeypatch, capfd, tmp_path):
    """Run a command in this process, in a directory of its own, and return its status and what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ENGAGEMENT_DATABASE_URL", raising=False)
    monkeypatch.setattr(sys, "path", sys.path.copy())

    def run(*arguments, on=None):
        if on is not None:
            monkeypatch.setenv("ENGAGEMENT_DATABASE_URL", url_of(on))
        with pytest.raises(SystemExit) as leaving:
            cli.main(args=[str(argument) for argument in arguments], prog_name="engagement")
        printed = capfd.readouterr()
        return Ran(leaving.value.code, printed.out, printed.err)

    return run


def new_message(user_id: str = "user1", **fields) -> NewMessage:
    """Return a message that is due now, with a number of its own for each user."""
    number = 5_500_000_000_000 + sum(ord(character) * 257**place for place, character in enumerate(user_id)) % 10**9
    given = {
        "user_id": user_id,
        "message_type": "goodbye",
        "message_key": "goodbye.14_days",
        "message_params": {"name": "Ana"},
        "destination": "individual",
        "destination_jid": f"{number}@s.whatsapp.net",
    }
    return NewMessage(**given | fields)


@pytest.fixture
def one_send_thread(monkeypatch):
    """Let the system have one thread for sends, and no other one."""
    start, started = threading.Thread.start, []

    def start_one(thread):
        if thread.name.startswith("engagement-send"):
            if started:
                raise RuntimeError("can't start new thread")
            started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_one)


def outgoing(**fields) -> OutgoingMessage:
    """Return a message as a worker hands it to a transport."""
    given = {
        "id": 1,
        "idempotency_key": "user1:goodbye:2026-01-01",
        "user_id": "user1",
        "message_type": "goodbye",
        "message_key": "goodbye.14_days",
        "message_params": {"name": "Ana"},
        "destination": Destination.INDIVIDUAL,
        "destination_jid": "5511999999999@s.whatsapp.net",
        "scheduled_for": datetime(2026, 1, 1, tzinfo=UTC),
        "attempt": 1,
        "retry_count": 0,
    }
    return OutgoingMessage(**given | fields)


def queue(engine: Engine, *messages: NewMessage) -> list[int]:
    """Queue and commit, and return the ids."""
    with Session(engine) as session, session.begin():
        repository = EngagementMessageRepository(session)
        return [repository.queue_message(message).message_id for message in messages]


def execute(engine: Engine, sql: str, **values: Any) -> Result:
    """Execute and commit; what it returned can still be read."""
    with engine.begin() as connection:
        return connection.execute(text(sql), values)


def until(condition: Callable[[], Any]) -> Any:
    """Ask again until it is so, and return the answer."""
    deadline = time.monotonic() + PATIENCE
    while not (answer := condition()):
        assert time.monotonic() < deadline, "never came"
        time.sleep(0.01)
    return answer


def row(engine: Engine, message_id: int):
    """Return a message's row as it is now."""
    with engine.connect() as connection:
        return connection.execute(
            text("SELECT * FROM engagement_message_queue WHERE id = :id"), {"id": message_id}
        ).one()


def in_thread(function, *arguments, **keywords) -> Future:
    """Call in a daemon thread: a call that hangs fails its test, and not the end of all of them."""
    future: Future = Future()

    def call() -> None:
        try:
            future.set_result(function(*arguments, **keywords))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    return future


def wait_until_blocked(engine: Engine, count: int) -> None:
    """Return when so many sessions wait for a lock that another one holds."""
    query = text(
        "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
        " AND backend_type = 'client backend'"
    )

    def are_blocked() -> bool:
        with engine.connect() as connection:
            return connection.execute(query).scalar_one() == count

    until(are_blocked)


@pytest.fixture(name="watched")
def _watched():
    """OpenTelemetry, which keeps in memory what it was told of this process."""
    from watched import Watched

    from engagement.telemetry import EngagementInstrumentor

    watched = Watched()
    watched.instrument()
    yield watched
    EngagementInstrumentor().uninstrument()
