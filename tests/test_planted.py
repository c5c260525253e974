"""Functions and operators that a stranger has planted on the search path are called by none of our own transactions.

PostgreSQL calls what fits the types best, wherever on the path it is: CVE-2018-1058.
"""

import re
from pathlib import Path

import pytest
from admin_page import admin_of, press
from conftest import database_of_its_own, new_message
from main_calls import host_calls, worker_calls
from sqlalchemy import create_engine, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

import engagement
from engagement import migrations
from engagement.verification import verify

pytestmark = pytest.mark.direct("the pooler's connections to the server are its own")

PACKAGE = Path(engagement.__file__).parent
DOCUMENT = PACKAGE.parent / "docs" / "roles.md"
TYPES = [
    "text",
    "varchar",
    "name",
    "bool",
    "int2",
    "int4",
    "int8",
    "numeric",
    "float8",
    "oid",
    "regclass",
    "regtype",
    "jsonb",
    "interval",
    "timestamptz",
    "text[]",
    "int8[]",
]
OPERATORS = ["=", "<>", "<", "<=", ">", ">=", "+", "-", "*", "/", "||", "->", "->>", "~", "!~", "@>"]
COMPARISONS = ["=", "<>", "<", "<=", ">", ">=", "~", "!~", "@>"]
LONGER = [
    *(", ".join(["text", "timestamptz", "text", "int4", *["text"] * 2 * more]) for more in range(1, 6)),
    *(
        ", ".join(["text", "timestamptz", "text", "int4", *["text"] * 4, "text", "bool", *["text"] * 2 * m])
        for m in (0, 1)
    ),
    "text, text, int4",
    "varchar, text, int4",
    "varchar, varchar, varchar",
    "varchar, text, text",
    "jsonb, text, jsonb",
    "text, varchar, text",
]


def called_names() -> set[str]:
    """Return the names of the functions in our statements, and of some that SQLAlchemy and Alembic use."""
    source = "\n".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    names = set(re.findall(r"\bfunc\.([a-z_]+)\(", source)) | set(re.findall(r"\b(jsonb_\w+|pg_\w+|to_\w+)\(", source))
    return (names - {"array", "count", "pg_catalog"}) | {
        "pg_table_is_visible",
        "format_type",
        "set_config",
        "current_setting",
    }


def plant(engine, schema: str) -> None:
    """Plant a trap for every function name and operator of ours, on all pairs of types."""
    body = "LANGUAGE plpgsql AS $$BEGIN RAISE EXCEPTION 'sprung'; END$$"
    signatures = [*TYPES, *(f"{left}, {right}" for left in TYPES for right in TYPES), *LONGER]
    with engine.begin() as connection:
        connection.exec_driver_sql(f"CREATE SCHEMA IF NOT EXISTS {schema}")
        for name in sorted(called_names()):
            connection.exec_driver_sql(
                ";".join(f'CREATE FUNCTION {schema}."{name}"({types}) RETURNS text {body}' for types in signatures)
            )
        for left in TYPES:
            for right in TYPES:
                connection.exec_driver_sql(
                    f"CREATE FUNCTION {schema}.compared({left}, {right}) RETURNS bool {body};"
                    f"CREATE FUNCTION {schema}.computed({left}, {right}) RETURNS {left} {body};"
                    + ";".join(
                        f"CREATE OPERATOR {schema}.{operator} (LEFTARG = {left}, RIGHTARG = {right}, "
                        f"FUNCTION = {schema}.{'compared' if operator in COMPARISONS else 'computed'})"
                        for operator in OPERATORS
                    )
                )


@pytest.fixture(scope="module", params=["public", "like_the_role"], name="planted")
def _planted(request, migrated_template):
    """A migrated database, and a stranger's functions and operators on the search path of who uses it."""
    with database_of_its_own(migrated_template, request.param) as url:
        engine = create_engine(url)
        engine.connect().close()  # SQLAlchemy asks for its types when it first connects: see docs/roles.md
        migrations.upgrade(engine, schema="app")
        plant(engine, "public" if request.param == "public" else f'"{url.username}"')
        yield engine
        engine.dispose()


@pytest.fixture(name="trapped")
def _trapped(planted):
    yield planted
    with planted.begin() as connection:
        connection.exec_driver_sql("TRUNCATE public.engagement_message_queue RESTART IDENTITY")


@pytest.fixture(name="host")
def _host(trapped):
    """A host that does as the document says."""
    [path] = re.findall(r"^ALTER ROLE host SET search_path = (.*)$", DOCUMENT.read_text(), re.MULTILINE)
    options = f"-c search_path={path.replace(' ', '')}"
    engine = create_engine(trapped.url, use_native_hstore=False, connect_args={"options": options})
    yield engine
    engine.dispose()


def test_the_traps_are_real(trapped):
    """A session that has them on its path springs one."""
    with Session(trapped) as session, pytest.raises(DBAPIError, match=r"sprung|not type text"):
        host_calls(session)
    with Session(trapped) as session, pytest.raises(DBAPIError, match=r"sprung|not type text"):
        verify(session)


def test_a_host_with_the_documented_line_is_safe(trapped, host):
    """Every call of a host."""
    with Session(host) as session:
        host_calls(session)


def test_workers_policies_housekeeping_and_metrics_are_safe(trapped, host):
    """By default, on the engine of a host whose own sessions are not."""
    worker_calls(trapped, host, host_schema="public")


def test_the_command_is_safe(trapped, host, run, tmp_path):
    """What looks, and what changes."""
    with Session(host) as session, session.begin():
        repository = engagement.EngagementMessageRepository(session, schema="public")
        for user in ("ana", "bea", "cid"):
            repository.queue_message(new_message(user))
    lines = tmp_path / "messages.jsonl"
    lines.write_text(
        '{"user_id": "dan", "message_type": "goodbye", "message_key": "k", "destination": "individual",'
        ' "destination_jid": "5511999999999@s.whatsapp.net"}\n'
    )
    for command in (
        ["status"],
        ["list"],
        ["list", "--user", "ana", "--type", "goodbye", "--created-since", "1d"],
        ["show", "1"],
        ["queue", lines],
        ["reschedule", "1", "--to", "12h"],
        ["cancel", "1", "--reason", "no"],
        ["cancel", "--type", "goodbye", "--created-since", "1h", "--yes"],
        ["process", "--transport", "engagement.transports.console:Console"],
        ["forget-user", "ana", "--yes"],
        ["prune", "--older-than", "90d", "--yes"],
        ["suppress", "447700900101@s.whatsapp.net", "--reason", "answered STOP"],
        ["suppressed"],
        ["unsuppress", "447700900101@s.whatsapp.net"],
        ["verify"],
        ["current"],
        ["upgrade"],
        ["upgrade", "--schema", "messaging", "--row-level-security"],
        ["downgrade", "--schema", "messaging", "--yes"],
        ["downgrade", "base", "--yes"],
        ["upgrade"],
    ):
        ran = run(*command, on=trapped)
        assert ran.status == 0, (command, ran)


def test_a_migration_puts_the_path_back(trapped):
    """In the caller's transaction it is as before, whatever came of the migration."""
    with trapped.begin() as connection:
        connection.execute(text("SET LOCAL search_path = public"))
        migrations.upgrade(connection, schema="messaging")
        migrations.downgrade(connection, "eng_0001")
        migrations.upgrade(connection)
        with pytest.raises(Exception, match="nowhere"):
            migrations.upgrade(connection, "nowhere")
        assert connection.exec_driver_sql("SHOW search_path").scalar_one() == "public"


def test_the_page_is_safe(trapped, host):
    """What it shows, and what it does."""
    with Session(host) as session, session.begin():
        engagement.EngagementMessageRepository(session, schema="public").queue_message(new_message())
    with admin_of(trapped) as client:
        for path in ("", "messages", "messages?status=pending&user=user1", "messages/1"):
            assert client.get(path).status_code == 200, path
        assert press(client, 1, "cancel", reason="no").status_code in {200, 303}
