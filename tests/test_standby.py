"""A synchronous standby: what was committed on the primary alone is not acted on, since a promotion would undo it."""

import os
import subprocess
import threading
from contextlib import contextmanager
from datetime import timedelta

import psycopg
import pytest
from conftest import execute, in_thread, new_message, queue, row, until
from sqlalchemy import create_engine, text
from sqlalchemy.exc import SQLAlchemyError

from engagement import NotSent, Sent, Worker, migrations, process_message_queue
from engagement._operating.temporary_postgres import find_binaries, temporary_postgres

PATIENCE_SECONDS = 30.0

pytestmark = [
    pytest.mark.direct("it has servers of its own"),
    pytest.mark.skipif(not (find_binaries() / "pg_basebackup").exists(), reason="there is no pg_basebackup"),
]


class Pair:
    """A primary, and a standby without which no commit of the primary is acknowledged."""

    def __init__(self, primary) -> None:
        self.primary = primary
        self._binaries = find_binaries()
        self._directory = primary.data_directory.parent / "standby"
        self._sockets = primary.socket_directory
        owner = primary.data_directory.stat()
        self._user = {"user": owner.st_uid, "group": owner.st_gid, "extra_groups": []} if os.geteuid() == 0 else {}
        self._process = None
        self._directory.mkdir()
        os.chown(self._directory, owner.st_uid, owner.st_gid)
        self._directory.chmod(0o700)
        conninfo = f"host={self._sockets} port=5432 user=engagement application_name=standby"
        self._run("pg_basebackup", "-d", conninfo, "-D", self._directory, "--write-recovery-conf", "--checkpoint=fast")

    def _run(self, program, *arguments) -> None:
        command = [self._binaries / program, *arguments]
        subprocess.run(command, check=True, cwd=self._directory.parent, stdin=subprocess.DEVNULL, **self._user)

    def start_standby(self) -> None:
        """Start it, and return when it takes connections."""
        command = [self._binaries / "postgres", "-D", self._directory, "-c", "port=5433", "-c", "listen_addresses="]
        command += ["-c", f"unix_socket_directories={self._sockets}", "-c", "fsync=off"]
        self._process = subprocess.Popen(command, cwd=self._directory, stdin=subprocess.DEVNULL, **self._user)
        until(self._answers)

    def _answers(self) -> bool:
        try:
            psycopg.connect(self.conninfo("5433")).close()
        except psycopg.OperationalError:
            return False
        return True

    def stop_standby(self) -> None:
        """Stop it: from now on, commits of the primary wait."""
        if self._process is not None:
            self._process.terminate()
            self._process.send_signal(2)
            self._process.wait(PATIENCE_SECONDS)
            self._process = None

    def promote(self) -> None:
        """Lose the primary, and let the standby take its place."""
        self.primary.stop("immediate")
        self.start_standby()
        with psycopg.connect(self.conninfo("5433"), autocommit=True) as connection:
            connection.execute("SELECT pg_promote()")

    def conninfo(self, ports="5432,5433", **more) -> str:
        """Return how to reach whoever of the two takes writes."""
        hosts = ",".join([str(self._sockets)] * len(ports.split(",")))
        given = {"host": hosts, "port": ports, "user": "engagement", "dbname": "postgres"} | more
        return " ".join(f"{name}={value}" for name, value in given.items())

    @contextmanager
    def engine(self):
        """Hand out an engine on whoever takes writes."""
        conninfo = self.conninfo(target_session_attrs="read-write", application_name="worker")
        engine = create_engine("postgresql+psycopg://", creator=lambda: psycopg.connect(conninfo))
        try:
            yield engine
        finally:
            engine.dispose()


@pytest.fixture(name="pair")
def _pair():
    with temporary_postgres() as primary:
        with temporary_engine(primary.url) as engine:
            migrations.upgrade(engine)
            pair = Pair(primary)
            pair.start_standby()
            with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                connection.execute(text("ALTER SYSTEM SET synchronous_standby_names = 'standby'"))
                connection.execute(text("SELECT pg_reload_conf()"))
        try:
            yield pair
        finally:
            pair.stop_standby()


@contextmanager
def temporary_engine(url):
    engine = create_engine(url)
    try:
        yield engine
    finally:
        engine.dispose()


WAITS_FOR_STANDBY = "SELECT pid FROM pg_stat_activity WHERE wait_event = 'SyncRep' AND application_name = 'worker'"


def waiting_commit(pair) -> int:
    """Return the backend of the worker when its commit waits for the standby."""
    with psycopg.connect(pair.conninfo("5432"), autocommit=True) as connection:
        (pid,) = until(lambda: connection.execute(WAITS_FOR_STANDBY).fetchone())
        return pid


def cancel(pair, pid) -> None:
    with psycopg.connect(pair.conninfo("5432"), autocommit=True) as connection:
        connection.execute("SELECT pg_cancel_backend(%s)", [pid])


@contextmanager
def running(engine, send, **options):
    stop = threading.Event()
    run = in_thread(Worker(engine, send, poll_interval=timedelta(milliseconds=50), **options).run, stop)
    try:
        yield run
    finally:
        stop.set()
    run.result(PATIENCE_SECONDS)


def test_a_claim_that_only_the_primary_has_is_not_sent(pair):
    """Its commit waits for the standby, and somebody cancels that: after a promotion it would be claimed again."""
    sends = []
    with pair.engine() as engine:
        ids = queue(engine, *(new_message(f"user{number}") for number in range(4)))
        pair.stop_standby()
        with running(engine, lambda message: sends.append(message.id), concurrency=4):
            for _ in range(2):
                cancel(pair, waiting_commit(pair))
            waiting_commit(pair)  # It has tried again.
            assert sends == []
            pair.promote()
            until(lambda: {row(engine, message_id).status for message_id in ids} == {"sent"})

    assert sorted(sends) == ids


def test_a_claim_is_sent_once_the_standby_has_it(pair):
    """Nothing is lost, and nothing in doubt, when the standby comes back."""
    sends = []
    with pair.engine() as engine:
        (message_id,) = queue(engine, new_message())
        pair.stop_standby()
        with running(engine, lambda message: sends.append(message.attempt)):
            cancel(pair, waiting_commit(pair))
            waiting_commit(pair)
            pair.start_standby()
            until(lambda: row(engine, message_id).status == "sent")

    assert sends == [1]


@pytest.mark.parametrize(("outcome", "status"), [(Sent("wamid"), "sent"), (NotSent("busy"), "pending")])
def test_a_settlement_that_only_the_primary_has_is_repeated(pair, outcome, status):
    """It is recorded once, and is not believed before the standby has it."""
    is_sending, may_end = threading.Event(), threading.Event()

    def send(_):
        is_sending.set()
        assert may_end.wait(PATIENCE_SECONDS)
        return outcome

    with pair.engine() as engine:
        (message_id,) = queue(engine, new_message())
        with running(engine, send, backoff=lambda _: timedelta(hours=1)) as run:
            assert is_sending.wait(PATIENCE_SECONDS)
            pair.stop_standby()
            may_end.set()
            for _ in range(2):
                cancel(pair, waiting_commit(pair))
            waiting_commit(pair)
            pair.start_standby()
        found = row(engine, message_id)

    assert (found.status, found.attempt, len(found.history)) == (status, 1, found.retry_count)
    assert run.result().processed == 1


def test_a_role_that_hears_no_warnings_hears_this_one(pair):
    """`client_min_messages` of a role or a database keeps the server from telling; a claim lets it tell."""
    sends = []
    with pair.engine() as engine:
        execute(engine, "ALTER ROLE engagement SET client_min_messages = 'error'")
        engine.dispose()
        queue(engine, new_message())
        pair.stop_standby()
        with running(engine, lambda message: sends.append(message.id)):
            cancel(pair, waiting_commit(pair))
            waiting_commit(pair)
            assert sends == []
            pair.start_standby()
            until(lambda: sends)


def test_a_run_whose_only_commit_was_warned_of_says_so(pair):
    """A cron job sends nothing, and gives back what it claimed."""
    sends = []
    with pair.engine() as engine:
        (message_id,) = queue(engine, new_message())
        pair.stop_standby()
        run = in_thread(process_message_queue, engine, lambda message: sends.append(message.id))
        cancel(pair, waiting_commit(pair))
        pair.start_standby()
        with pytest.raises(SQLAlchemyError):
            run.result(PATIENCE_SECONDS)
        assert (row(engine, message_id).status, sends) == ("pending", [])


def test_a_warning_of_the_hosts_own_at_a_commit_holds_nothing_up(engine):
    """A deferred trigger that warns says nothing of the commit."""
    execute(
        engine,
        "CREATE FUNCTION warns() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN RAISE WARNING 'mind'; RETURN NULL; END$$",
    )
    execute(
        engine,
        "CREATE CONSTRAINT TRIGGER warns AFTER UPDATE ON engagement_message_queue DEFERRABLE INITIALLY DEFERRED"
        " FOR EACH ROW EXECUTE FUNCTION warns()",
    )
    try:
        (message_id,) = queue(engine, new_message())
        assert process_message_queue(engine, lambda _: None).succeeded == 1
        assert row(engine, message_id).status == "sent"
    finally:
        execute(engine, "DROP TRIGGER warns ON engagement_message_queue")
        execute(engine, "DROP FUNCTION warns()")
