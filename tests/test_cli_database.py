"""The table and the database of a command: made, found, told when they cannot be reached, and no password shown."""

import json
import traceback
from pathlib import Path

import pytest
from commands import CONSOLE, line, scalar, statuses
from conftest import new_message, queue
from shell import url_of
from sqlalchemy import text

from engagement import migrations
from engagement.cli.connecting import Database
from engagement.cli.problems import Problem

# The table


def test_the_table_is_made_kept_and_taken_away(run, empty_engine):
    """Upgrade makes the table, twice is as good as once, `current` tells, and downgrade takes it away."""
    assert run("current", on=empty_engine)[:2] == (3, "revision=\nnewest=eng_0011\n")
    assert run("upgrade")[:2] == (0, "upgraded to eng_0011\n")
    assert run("upgrade")[:2] == (0, "already at eng_0011\n")
    assert json.loads(run("current", "--json").out) == {"revision": "eng_0011", "newest": "eng_0011"}
    assert run("downgrade")[:2] == (0, "downgraded to base: the table is gone\n")
    assert scalar(empty_engine, "SELECT to_regclass('engagement_message_queue')") is None


def test_nobody_loses_messages_to_a_downgrade_unasked(run, empty_engine):
    """A downgrade that would drop messages is refused where nobody can be asked, until it is told --yes."""
    migrations.upgrade(empty_engine)
    queue(empty_engine, new_message())

    refused = run("downgrade", on=empty_engine)
    assert (refused.status, refused.err) == (
        2,
        "engagement: there is no terminal to ask on. To downgrade to base with 1 message, add --yes\n",
    )
    assert statuses(empty_engine) == ["pending"]
    assert run("downgrade", "--yes").status == 0


def test_every_command_finds_the_table_in_its_schema(run, empty_engine):
    """A schema that is named is created by upgrade and used by all the others."""
    run("upgrade", "--schema", "messaging", on=empty_engine)
    Path("messages.jsonl").write_text(line())

    assert run("queue", "messages.jsonl", "--schema", "messaging").status == 0
    assert run("process", "--transport", CONSOLE, "--schema", "messaging").status == 0
    assert json.loads(run("status", "--json", "--schema", "messaging").out)["sent"] == 1
    assert run("current", "--schema", "messaging").status == 0
    assert run("current", "--schema", "other").err.endswith("Run: engagement upgrade --schema other\n")
    assert scalar(empty_engine, "SELECT status FROM messaging.engagement_message_queue") == "sent"
    assert "upgrade --schema other" in run("status", "--schema", "other").err


def test_the_sql_of_an_upgrade_can_be_run_by_a_person(run, empty_engine):
    """`upgrade --sql` needs no database, and what it prints makes the same table."""
    printed = run("upgrade", "--sql")
    with empty_engine.begin() as connection:
        connection.exec_driver_sql(printed.out.replace("BEGIN;", "").replace("COMMIT;", "").replace("%", "%%"))

    assert printed.status == 0
    assert run("current", on=empty_engine).status == 0


def test_an_unknown_revision_is_told(run, engine):
    """A revision that is not there is one clear line."""
    assert run("upgrade", "eng_9999", on=engine)[::2] == (
        2,
        "engagement: Can't locate revision identified by 'eng_9999'\n",
    )


# Where the database is


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg", "postgresql+asyncpg"])
def test_any_spelling_of_a_postgresql_url_will_do(run, engine, scheme):
    """Hosts spell their URLs for other drivers; ours is used."""
    url = url_of(engine).replace("postgresql+psycopg", scheme)

    assert run("status", "--database-url", url).status == 0


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        (None, "no database given. Set ENGAGEMENT_DATABASE_URL="),
        ("host=localhost password=hunter2", "the database URL cannot be read. It looks like postgresql://"),
        ("postgresql://me:hunter2@localhost:port/x", "the database URL cannot be read. It looks like postgresql://"),
        ("mysql://me:hunter2@localhost/x", "the database URL is none of PostgreSQL."),
        ("postgresql://me:hunter@2hunter2@localhost/x", "the database URL has an @ too many."),
        ("postgresql://me:hunter2@/x?host=a:hunter2&host=b:2", "the database URL cannot be read."),
        ("postgresql://me:hunter2@/x?host=a&host=b&port=1", "the database URL cannot be read."),
        ("postgresql://me:hunter2@/x?host=a,b&port=1,2,3", "the database URL cannot be read."),
        ("postgresql://me:hunter2@localhost/x?port=hunter2", "the database URL cannot be read."),
        ("postgresql://me:hunter2@localhost/x?port=1&port=2", "the database URL cannot be read."),
        ("postgresql://me:hunter2@localhost/x?plugin=hunter2", "the database URL cannot be read."),
        ("postgresql://me:hunter2\udcff@localhost/x", "the database URL cannot be read."),
        ("postgresql://me:hunter2@localhost/x?password=hunter2&password=hunter2", "the database URL cannot be read."),
        ("postgresql://me:hunter2@localhost/x?connect_timeout=1&connect_timeout=2", "the database URL cannot be read."),
    ],
)
def test_a_url_that_cannot_be_used_is_told_on_one_line_without_the_password(run, url, problem):
    """What is wrong with the URL is said in one line with status 2, and its password is not."""
    ran = run("status", *(() if url is None else ("--database-url", url)))

    assert ran.status == 2
    assert ran.err.startswith(f"engagement: {problem}")
    assert ran.err.count("\n") == 1
    assert "hunter" not in ran.out + ran.err


@pytest.mark.parametrize("url", ["postgresql://me:hunter2@localhost/x", "postgresql:///x?password=hunter2"])
def test_nothing_shows_the_password(url):
    """A log, a debugger or a traceback that prints what the options said does not print it."""
    database = Database(url, "messaging")

    assert repr(database) == str(database) == "Database(schema='messaging')"
    with database.engine() as engine:
        assert "hunter2" not in repr(engine) + str(engine)
    with pytest.raises(Problem) as raised, database.session() as session:
        session.connection()
    assert "hunter2" not in "".join(traceback.format_exception(raised.value))


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://me:hunter2@127.0.0.1:1/hunter2",
        "postgresql:///x?host=/nowhere&password=hunter2",
        "postgresql://me:hunter2@/x?host=127.0.0.1:1&host=127.0.0.1:1",
        "postgresql://me@127.0.0.1:1/hunter2?oauth_client_secret=hunter2",
        "postgresql://localhost/x?no_such_option=hunter2&password=hunter2",
    ],
)
@pytest.mark.parametrize("command", [["status"], ["upgrade"], ["process", "--transport", CONSOLE]])
def test_a_database_that_cannot_be_reached_is_status_3(run, url, command):
    """An unreachable database is one line and status 3."""
    ran = run(*command, "--database-url", url)

    assert (ran.status, ran.out) == (3, "")
    assert ran.err.startswith("engagement: cannot reach the database: ")
    assert ran.err.count("\n") == 1
    assert "hunter2" not in ran.err


@pytest.mark.direct("it logs in as a user of its own")
def test_a_password_is_masked_where_the_server_repeats_it(run, engine):
    """A person whose name is the password is refused by name: even so it is not shown."""
    url = engine.url.set(username="hunter2", password="hunter2").render_as_string(hide_password=False)
    ran = run("status", "--database-url", url)

    assert ran.status == 3
    assert '"***"' in ran.err
    assert "hunter2" not in ran.err


@pytest.mark.parametrize(
    "command",
    [["queue", "messages.jsonl"], ["status"], ["process", "--transport", CONSOLE], ["work", "--transport", CONSOLE]],
)
def test_a_database_without_the_table_is_status_3(run, empty_engine, command):
    """A table that is missing is one line that says what to run, before anything else is said."""
    Path("messages.jsonl").write_text("{oops}\n")
    ran = run(*command, on=empty_engine)

    assert ran == (3, "", "engagement: the queue's table is missing or old. Run: engagement upgrade\n")


@pytest.mark.direct("it logs in as a user of its own")
def test_what_the_database_refuses_is_told_without_its_text(run, engine):
    """An error of the server is named by its class and SQLSTATE: its text may show a row."""
    with engine.begin() as connection:
        connection.execute(text("CREATE ROLE engagement_nobody LOGIN"))
    try:
        url = engine.url.set(username="engagement_nobody").render_as_string(hide_password=False)
        ran = run("status", "--database-url", url)
    finally:
        with engine.begin() as connection:
            connection.execute(text("DROP ROLE engagement_nobody"))

    assert ran == (3, "", "engagement: the database refused: InsufficientPrivilege 42501\n")


@pytest.mark.parametrize("command", [["list"], ["show", "1"]])
def test_a_row_that_cannot_be_read_is_not_a_database_that_cannot_be_reached(run, engine, command):
    """PostgreSQL has moments that Python has not; what to run next is said."""
    queue(engine, new_message())
    with engine.begin() as connection:
        connection.execute(text("UPDATE engagement_message_queue SET created_at = 'infinity'"))

    ran = run(*command, on=engine)

    assert ran == (3, "", "engagement: a row of the table cannot be read. Run: engagement verify\n")
