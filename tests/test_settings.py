"""What a database or a role may have set changes nothing of what the main calls do."""

import json
from contextlib import contextmanager

import pytest
from conftest import database_of_its_own, execute
from main_calls import host_calls, worker_calls
from sqlalchemy import create_engine
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from engagement import migrations
from engagement._operating import housekeeping
from engagement._sql.host_sessions import readable

pytestmark = pytest.mark.direct("the pooler's connections to the server are its own")

SETTINGS = [
    *(("IntervalStyle", style) for style in ("postgres_verbose", "sql_standard", "iso_8601")),
    *(("DateStyle", style) for style in ("German", "SQL, DMY", "Postgres, MDY", "ISO, DMY", "Postgres, YMD")),
    *(("TimeZone", zone) for zone in ("Asia/Kathmandu", "America/St_Johns", "<-05:30>+5:30", "EST5EDT", "posixrules")),
    ("timezone_abbreviations", "India"),
    ("standard_conforming_strings", "off"),
    ("backslash_quote", "off"),
    ("escape_string_warning", "off"),
    ("bytea_output", "escape"),
    *(("extra_float_digits", digits) for digits in ("-15", "0", "3")),
    *(("default_transaction_isolation", f"'{level}'") for level in ("repeatable read", "serializable")),
    ("default_transaction_deferrable", "on"),
    *((timeout, "5s") for timeout in ("statement_timeout", "lock_timeout")),
    *((timeout, "200ms") for timeout in ("idle_in_transaction_session_timeout", "idle_session_timeout")),
    *(("plan_cache_mode", mode) for mode in ("force_custom_plan", "force_generic_plan")),
    *((f"enable_{way}", "off") for way in ("seqscan", "indexscan", "sort", "nestloop", "hashjoin", "hashagg")),
    ("enable_bitmapscan", "off"),
    ("enable_material", "off"),
    ("force_parallel_mode", "on"),
    ("jit_above_cost", "0"),
    ("from_collapse_limit", "1"),
    ("work_mem", "64kB"),
    ("array_nulls", "off"),
    *(("client_encoding", encoding) for encoding in ("LATIN1", "WIN1252", "EUC_JP")),
    *(("xmlbinary", "hex"), ("xmloption", "document")),
    ("row_security", "off"),
    ("transform_null_equals", "on"),
    ("session_replication_role", "replica"),
    ("synchronous_commit", "off"),
    ("quote_all_identifiers", "on"),
    ("default_text_search_config", "simple"),
    ("exit_on_error", "on"),
    *((f"lc_{what}", "C") for what in ("messages", "monetary", "numeric", "time")),
    ("temp_buffers", "100"),
    ("check_function_bodies", "off"),
    ("search_path", "''"),
    ("search_path", "pg_catalog, public"),
    ("search_path", "public, pg_catalog"),
]


@pytest.fixture(scope="module", name="database")
def _database(migrated_template):
    with database_of_its_own(migrated_template, "settings") as url:
        yield create_engine(url, poolclass=NullPool)


@contextmanager
def set_to(database, setting: str, value: str):
    """Let each connection that is made meanwhile begin with it."""
    execute(database, f"ALTER DATABASE {database.url.database} SET {setting} = {value}")
    try:
        yield
    finally:
        execute(database, f"ALTER DATABASE {database.url.database} RESET {setting}")
        execute(database, "TRUNCATE engagement_message_queue")


@pytest.fixture(name="grace", autouse=True)
def _grace(monkeypatch):
    """Let a verification hold its lock for longer than an idle transaction may last, and not for longer."""
    monkeypatch.setattr(housekeeping, "GRACE_SECONDS", 0.3)


def hosts_own(database):
    """Return the engine of a host that says its encoding: it has texts of its own, which psycopg could not send."""
    return create_engine(database.url, poolclass=NullPool, connect_args={"client_encoding": "utf8"})


@pytest.mark.parametrize(("setting", "value"), SETTINGS)
def test_main_calls_do_the_same_whatever_is_set(database, run, setting, value):
    """What the host does in its sessions, and workers, the command and migrations in theirs."""
    quoted = value if "'" in value or setting in {"DateStyle", "search_path"} else f"'{value}'"
    schema = "public" if setting == "search_path" and "public" not in value else None
    with set_to(database, setting, quoted):
        host = hosts_own(database) if setting == "client_encoding" else database
        with Session(host) as session, session.begin() as transaction:
            host_calls(session, schema)
            transaction.rollback()
        worker_calls(database, host, schema)
        options = () if schema is None else ("--schema", schema)
        status = run("status", "--json", *options, on=database)
        facts = json.loads(status.out)
        assert (facts["sent"], facts["pending"], facts["due"]) == (6, 2, 0), status
        listed = json.loads(run("list", "--json", *options, on=database).out)
        assert len(listed["messages"]) == 8
        assert run("verify", *options, on=database).out == "no broken promise found\n"
        migrations.upgrade(database, schema="elsewhere")
        assert migrations.current(database, schema="elsewhere") == migrations.head()
        migrations.downgrade(database, schema="elsewhere")


@pytest.mark.parametrize("isolation", ["READ COMMITTED", "AUTOCOMMIT"])
def test_an_error_that_cost_the_connection_is_the_one_that_is_told(database, isolation):
    """The setting cannot be set back on a connection that is lost, and needs not be."""
    host = create_engine(database.url, poolclass=NullPool, isolation_level=isolation)

    def interrupted(session):
        with readable(session):
            session.connection().invalidate()
            raise SystemExit

    with set_to(database, "DateStyle", "German"), Session(host) as session, pytest.raises(SystemExit):
        interrupted(session)
