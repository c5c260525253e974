import io
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import traceback
from contextlib import contextmanager
from datetime import timedelta
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import click
import pytest
from conftest import new_message, queue, row, wait_until_blocked
from shell import PATIENCE, ROOT, killed_at_the_end, program, terminal, url_of
from sqlalchemy import text
from sqlalchemy.orm import Session

from engagement import EngagementMessageRepository, migrations, process_message_queue
from engagement._operating.inspection import masked
from engagement.cli import cli
from engagement.cli.connecting import Database
from engagement.cli.parameters import duration, positive_duration
from engagement.cli.problems import Problem
from engagement.transports import TransportNotFound, load_transport
from engagement.transports.console import Console

CONSOLE = "engagement.transports.console:Console"


def scalar(engine, sql):
    with engine.connect() as connection:
        return connection.scalar(text(sql))


def statuses(engine):
    with engine.connect() as connection:
        return list(connection.scalars(text("SELECT status FROM engagement_message_queue ORDER BY id")))


def line(user_id="ana", **fields) -> str:
    given = {
        "user_id": user_id,
        "message_type": "goodbye",
        "message_key": "goodbye.14_days",
        "destination": "individual",
        "destination_jid": "447700900101@s.whatsapp.net",
    }
    return json.dumps(given | fields) + "\n"


# The table


def test_the_table_is_made_kept_and_taken_away(run, empty_engine):
    """Upgrade makes the table, twice is as good as once, `current` tells, and downgrade takes it away."""
    assert run("current", on=empty_engine)[:2] == (3, "revision=\nnewest=eng_0004\n")
    assert run("upgrade")[:2] == (0, "upgraded to eng_0004\n")
    assert run("upgrade")[:2] == (0, "already at eng_0004\n")
    assert json.loads(run("current", "--json").out) == {"revision": "eng_0004", "newest": "eng_0004"}
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


# Output


@pytest.mark.parametrize(
    ("redirected", "problem"), [(">&-", "standard output is closed"), (">/dev/full", "No space left on device")]
)
@pytest.mark.parametrize("command", ["list", "status --json", "upgrade --sql", "--help"])
def test_output_that_cannot_be_written_is_one_line(engine, redirected, problem, command):
    """No traceback, neither of ours nor of an interpreter that tries again at its end."""
    typed = f"exec {sys.executable} -m engagement.cli {command} {redirected}"
    given = os.environ | {"PYTHONPATH": str(ROOT), "ENGAGEMENT_DATABASE_URL": url_of(engine)}

    done = subprocess.run(["sh", "-c", typed], env=given, capture_output=True, text=True, check=False, timeout=PATIENCE)

    assert (done.returncode, done.stderr) == (2, f"engagement: {problem}\n")


def test_without_an_input_nobody_is_asked(engine):
    """A closed input is no terminal."""
    queue(engine, new_message())
    typed = f"exec {sys.executable} -m engagement.cli cancel --all <&-"
    given = os.environ | {"PYTHONPATH": str(ROOT), "ENGAGEMENT_DATABASE_URL": url_of(engine)}

    done = subprocess.run(["sh", "-c", typed], env=given, capture_output=True, text=True, check=False, timeout=PATIENCE)

    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert statuses(engine) == ["pending"]


# Queueing


def test_the_good_lines_are_queued_and_the_bad_ones_told(run, engine):
    """Good lines are queued, repeated ones counted, and each bad one is a line on standard error and makes status 1."""
    Path("messages.jsonl").write_text(line("a") + "{oops}\n" + line("b", tz="Nowhere/City") + line("c") + line("a"))
    first = run("queue", "messages.jsonl", on=engine)
    again = run("queue", "messages.jsonl", "--json")

    assert first[:2] == (1, "queued=2\nduplicates=1\nbad=2\n")
    assert [problem.partition(": ")[0] for problem in first.err.splitlines()] == ["line 2", "line 3"]
    assert "line 3: tz: is no time zone" in first.err
    assert (again.status, json.loads(again.out)) == (1, {"queued": 0, "duplicates": 3, "bad": 2})
    assert statuses(engine) == ["pending", "pending"]


def test_a_file_without_bad_lines_is_status_0_also_the_second_time(run, engine):
    """Duplicates are ordinary: queueing the same file again is well, and says that nothing was queued."""
    Path("messages.jsonl").write_text(line("a") + line("b"))

    assert run("queue", "messages.jsonl", on=engine)[:2] == (0, "queued=2\nduplicates=0\nbad=0\n")
    assert run("queue", "messages.jsonl")[:2] == (0, "queued=0\nduplicates=2\nbad=0\n")


def test_a_file_is_queued_whole_or_not_at_all(engine):
    """Interrupted half-way, with thousands of lines already at the server, nothing is queued, and the status is 130."""
    many = "".join(line(f"user{number}", idempotency_key=f"k{number:06}") for number in range(10_050)).encode()
    with Session(engine) as holder, killed_at_the_end(program("queue", "-", on=engine)) as process:
        EngagementMessageRepository(holder).queue_message(new_message(idempotency_key="k010049"))
        process.stdin.write(many)
        process.stdin.close()
        wait_until_blocked(engine, 1)
        process.send_signal(signal.SIGINT)
        process.stdin = None
        _, err = process.communicate(timeout=PATIENCE)

    assert (process.returncode, err.strip()) == (130, b"engagement: interrupted")
    assert statuses(engine) == []


def wait_until(happened):
    pause = threading.Event()
    for _ in range(PATIENCE * 50):
        if happened():
            return
        pause.wait(0.02)
    pytest.fail(f"waited for {PATIENCE} seconds")


def test_a_file_that_is_not_there_is_status_2(run, engine):
    """A file that cannot be opened is one line."""
    ran = run("queue", "nothing.jsonl", on=engine)

    assert (ran.status, ran.err.count("\n")) == (2, 1)
    assert "nothing.jsonl" in ran.err


@pytest.mark.parametrize("source", ["messages.jsonl", "-"])
def test_progress_is_shown_to_a_person_who_watches_a_file(engine, tmp_path, source):
    """A progress bar appears on a terminal while a file is read, and not for a pipe, whose length nobody knows."""
    many = "".join(line(f"user{number}") for number in range(1200)).encode()
    (tmp_path / "messages.jsonl").write_bytes(many)
    with terminal() as (screen, theirs):
        with killed_at_the_end(program("queue", source, on=engine, cwd=tmp_path, stderr=theirs)) as process:
            out, _ = process.communicate(many if source == "-" else None, PATIENCE)
        shown = screen()

    assert (process.returncode, out) == (0, b"queued=1200\nduplicates=0\nbad=0\n")
    assert ("messages read" in shown) is (source != "-")


# Delivery


def transport(source: str, name="transports") -> str:
    """Write a module with `send` into the current directory, and return the option that names it."""
    Path(f"{name}.py").write_text(textwrap.dedent(source))
    sys.modules.pop(name, None)
    return f"--transport={name}:send"


def test_what_is_due_is_sent_and_summed_up(run, engine):
    """A run without trouble prints what was sent, masked, then the counts, and is status 0."""
    queue(engine, new_message("ana"), new_message("ben"))
    ran = run("process", "--transport", CONSOLE, on=engine)

    assert ran.status == 0
    assert ran.out.startswith("message 1 to an individual: goodbye.14_days\nmessage 2 to an individual: ")
    assert "processed=2\nsucceeded=2\nfailed=0\n" in ran.out
    assert not re.search("ana|ben|Ana|@", ran.out + ran.err)
    assert statuses(engine) == ["sent", "sent"]


def test_json_is_all_that_standard_output_holds(run, engine):
    """With --json what a transport prints goes to standard error, so that the output can be parsed."""
    queue(engine, new_message())
    ran = run("process", "--transport", CONSOLE, "--json", on=engine)

    assert json.loads(ran.out)["succeeded"] == 1
    assert ran.err == "message 1 to an individual: goodbye.14_days\n"


@pytest.mark.parametrize(
    ("outcome", "status", "expected"),
    [
        ("Sent()", 0, "sent"),
        ("NotSent('+44 7700 900101 is busy')", 0, "pending"),
        ("Refused('447700900101 is unknown')", 1, "failed"),
        ("InDoubt('a@b.example did not answer')", 1, "in_doubt"),
    ],
)
def test_failed_messages_and_doubts_are_status_1_with_their_reasons(run, engine, outcome, status, expected):
    """What needs a person makes status 1; reasons are shown without numbers and addresses, or with them on demand."""
    option = transport(f"from engagement import *\ndef send(message): return {outcome}\n")
    queue(engine, new_message("a"))
    ran = run("process", option, on=engine)
    queue(engine, new_message("b"))
    revealed = run("process", option, "--reveal", "--json")

    assert (ran.status, revealed.status) == (status, status)
    assert statuses(engine) == [expected, expected]
    assert not re.search(r"900101|@", ran.out + ran.err)
    for error in json.loads(revealed.out)["errors"]:
        assert re.search(r"900101|a@b\.example", error["reason"])
        assert f"message 1: {masked(error['reason'])}\n" in ran.err


@pytest.mark.parametrize("option", [[], ["--reveal"]])
def test_a_reason_cannot_command_the_terminal(run, engine, option):
    """A provider's text is on one line, without what a terminal would obey."""
    made = transport(
        "from engagement import *\ndef send(message): return Refused('gone\\x1b[2J\\r\\nmessage 2: fine')\n"
    )
    queue(engine, new_message("a"))

    ran = run("process", made, *option, on=engine)

    assert "message 1: gone [2J message 2: fine\n" in ran.err
    assert "\x1b" not in ran.err


def test_warnings_are_logged_and_all_events_on_demand(run, engine):
    """Standard error shows warnings only, and every event with --verbose."""
    queue(engine, new_message("a"), new_message("b"))
    quiet = run("process", "--transport", CONSOLE, "--limit=1", on=engine)
    verbose = run("process", "--transport", CONSOLE, "--verbose")

    assert quiet.err == ""
    assert re.fullmatch(r"[-\d]+ [:,\d]+ INFO engagement\.sent message_id=2 attempt=1 status=sent\n", verbose.err)


def test_the_limit_is_kept(run, engine):
    """No more than --limit messages are sent, and none with 0."""
    queue(engine, *(new_message(user) for user in "abc"))

    assert "processed=0\n" in run("process", "--transport", CONSOLE, "--limit=0", on=engine).out
    assert "processed=2\n" in run("process", "--transport", CONSOLE, "--limit=2").out
    assert statuses(engine) == ["sent", "sent", "pending"]


def test_the_other_options_reach_the_worker(run, engine):
    """Retries, strictness, time-out, lease, pace and concurrency are what the command line says."""
    ids = queue(engine, *(new_message(user) for user in "abcdef"))
    failing = transport("def send(message): raise RuntimeError('oops')", "failing")
    stuck = transport("import threading\ndef send(message): threading.Event().wait(10)", "stuck")
    together = transport(
        """
        import threading
        barrier = threading.Barrier(2, timeout=10)
        def send(message):
            barrier.wait()
        """,
        "together",
    )

    run("process", failing, "--limit=1", "--max-retries=1", on=engine)
    run("process", failing, "--limit=1", "--strict")
    run("process", stuck, "--limit=1", "--send-timeout=50ms")
    run("process", together, "--limit=2", "--concurrency=2")
    leased = run("process", reads_its_lease(), "--limit=1", "--lease=2h", "--reveal")

    assert statuses(engine)[:5] == ["failed", "in_doubt", "in_doubt", "sent", "sent"]
    assert row(engine, ids[2]).error_message == "no answer within 0.05 s"
    assert f"message {ids[5]}: 2:00\n" in leased.err


def reads_its_lease():
    return transport(
        """
        import os
        from sqlalchemy import create_engine, text
        from engagement import Refused
        HELD = "SELECT to_char(lease_expires_at - now() + interval '1 min', 'FMHH24:MI') FROM engagement_message_queue"
        def send(message):
            engine = create_engine(os.environ["ENGAGEMENT_DATABASE_URL"])
            with engine.connect() as connection:
                held = connection.scalar(text(HELD + f" WHERE id = {message.id}"))
            engine.dispose()
            return Refused(held)
        """,
        "leased",
    )


def test_sends_are_paced(run, engine):
    """Between the starts of two sends lies at least --min-interval."""
    queue(engine, *(new_message(user) for user in "abc"))
    option = transport(
        """
        import time
        from engagement import Refused
        def send(message): return Refused(f"{time.monotonic():.6f}")
        """,
        "paced",
    )
    ran = run("process", option, "--min-interval=150ms", "--concurrency=3", "--json", "--reveal", on=engine)

    times = [float(error["reason"]) for error in json.loads(ran.out)["errors"]]
    assert [later - earlier >= 0.14 for earlier, later in pairwise(times)] == [True, True]


@pytest.mark.parametrize(
    ("given", "length"),
    [
        ("500ms", timedelta(milliseconds=500)),
        ("30s", timedelta(seconds=30)),
        ("1.5m", timedelta(seconds=90)),
        ("2h", timedelta(hours=2)),
        ("366d", timedelta(days=366)),
        ("0s", timedelta(0)),
    ],
)
def test_durations_are_written_with_a_unit(given, length):
    """A number and a unit make a duration."""
    assert duration(given) == length


@pytest.mark.parametrize("given", ["", "5", "-5s", "5 s", "5min", "1e3s", "367d", "\u0665s", "5s\n", "nan"])
def test_other_durations_are_refused(given):
    """Without a unit it is anybody's guess, and over a year it is a mistake."""
    with pytest.raises(click.BadParameter):
        duration(given)


def test_what_is_young_is_not_pruned(run, engine):
    """A slip of the finger does not blank what was sent a moment ago."""
    for command in (["prune", "--older-than"], ["work", "--transport", CONSOLE, "--prune-older-than"]):
        for young in ("0s", "59m"):
            ran = run(*command, young, on=engine)
            assert (ran.status, ran.err.count("\n")) == (2, 1)
            assert "must be 1h or more" in ran.err
    assert run("prune", "--older-than", "1h", "--yes").status == 0


def test_a_lease_of_nothing_is_refused(run, engine):
    """Where nothing makes no sense it is a usage error on one line."""
    ran = run("process", "--transport", CONSOLE, "--lease=0s", on=engine)

    assert (ran.status, ran.err.count("\n")) == (2, 1)
    assert "'--lease'" in ran.err
    assert positive_duration("1ms") == timedelta(milliseconds=1)


# How a transport is found

FORMS = """
from engagement import Sent
made = []
def function(message): return None
def with_default(message=None): return None
def factory():
    made.append("factory")
    return function
class Class:
    def __init__(self): made.append("class")
    def send(self, message): return Sent()
class Batches:
    def send_many(self, messages): return Sent()
class Callable:
    def __call__(self, message): return None
object_ = Class()
callable_object = Callable()
class Space:
    inner = Class()
number = 3
def broken(): raise RuntimeError("no token\\nis set")
class Needs:
    def __init__(self, token): ...
"""


@pytest.fixture(name="forms")
def _forms(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    (tmp_path / "forms.py").write_text(FORMS)
    (tmp_path / "needs.py").write_text("import a_package_that_is_not_there")
    (tmp_path / "oops.py").write_text("def (:")
    yield
    for name in ("forms", "needs", "oops"):
        sys.modules.pop(name, None)


@pytest.mark.usefixtures("forms")
@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("function", []),
        ("with_default", []),
        ("object_", ["class"]),
        ("callable_object", []),
        ("Space.inner", ["class"]),
        ("factory", ["factory"]),
        ("Class", ["class"]),
        ("Batches", []),
        ("Callable", []),
    ],
)
def test_a_transport_may_have_any_of_these_forms(name, made):
    """Functions and objects are taken as they are; classes and callables without arguments make one."""
    found = load_transport(f"forms:{name}")
    module = sys.modules["forms"]

    assert not isinstance(found, type)
    assert found is not module.factory
    assert module.made[2:] == made if name in {"Class", "factory"} else module.made[:2] == ["class", "class"]


def test_a_class_that_is_configured_by_the_environment_is_made_by_that(tmp_path, monkeypatch):
    """A class with `from_environment` needs no wrapper to be used from the command line."""
    (tmp_path / "configured.py").write_text(
        "class Gateway:\n"
        "    def __init__(self, url): self.url = url\n"
        "    @classmethod\n"
        "    def from_environment(cls): return cls('http://gateway')\n"
        "    def send(self, message): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)

    assert load_transport("configured:Gateway").url == "http://gateway"


@pytest.mark.usefixtures("forms")
@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("forms", "write it as package.module:name"),
        ("forms:", "write it as package.module:name"),
        (":send", "write it as package.module:name"),
        ("no_such.module:send", "there is no module no_such here or in this Python's packages"),
        ("engagement.no_such:send", "there is no module engagement.no_such here or in this Python's packages"),
        ("forms:no_such", "forms has no no_such"),
        ("forms:number", "forms:number is a int, not a function or an object with send or send_many"),
        ("forms:broken", "forms:broken() failed: RuntimeError: no token is set"),
        ("forms:Needs", "forms:Needs() failed: TypeError: "),
        ("needs:send", "needs cannot be imported: ModuleNotFoundError: No module named 'a_package_that_is_not_there'"),
        ("oops:send", "oops cannot be imported: SyntaxError: "),
    ],
)
def test_what_is_no_transport_is_told_on_one_line(run, engine, name, problem):
    """Whatever is wrong with --transport is one line with status 2, and no traceback."""
    ran = run("process", "--transport", name, on=engine)

    assert (ran.status, ran.out) == (2, "")
    assert f"Invalid value for '--transport': {problem}" in ran.err
    assert ran.err.count("\n") == 1
    with pytest.raises(TransportNotFound):
        load_transport(name)


# Stopping

SLOW = """
def send(message):
    with open("started", "w") as started:
        started.write(str(message.id))
    with open("go") as go:
        go.read()
"""


@pytest.fixture(name="stage")
def _stage(engine, tmp_path):
    """Prepare three messages, and a transport that says over a pipe when it sends, and waits at another to go on."""
    (tmp_path / "slow.py").write_text(SLOW)
    os.mkfifo(tmp_path / "started")
    os.mkfifo(tmp_path / "go")
    queue(engine, *(new_message(user) for user in "abc"))
    return tmp_path


@contextmanager
def in_a_send(engine, stage, command):
    """Hand out a real process in the middle of its first send."""
    with killed_at_the_end(program(command, "--transport=slow:send", "--lease=5m", on=engine, cwd=stage)) as process:
        assert (stage / "started").read_text() == "1"
        yield process


@pytest.mark.parametrize(("command", "number"), [("work", signal.SIGTERM), ("process", signal.SIGINT)])
def test_the_first_signal_lets_the_send_in_hand_finish(engine, stage, command, number):
    """After a first signal the send in hand is finished and settled, nothing else is claimed, and the status is 0."""
    with in_a_send(engine, stage, command) as process:
        process.send_signal(number)
        notice = process.stderr.readline().decode()
        assert statuses(engine) == ["sending", "pending", "pending"]
        (stage / "go").write_text("")
        out, err = process.communicate(timeout=PATIENCE)

    assert notice.startswith(f"engagement: {number.name}: stopping when the sends in hand are settled")
    assert (process.returncode, err) == (0, b"")
    assert b"succeeded=1\n" in out
    assert statuses(engine) == ["sent", "pending", "pending"]
    assert row(engine, 2).attempt == 0


@pytest.mark.parametrize(("first", "second", "status"), [("SIGTERM", "SIGTERM", 143), ("SIGTERM", "SIGINT", 130)])
def test_the_second_signal_leaves_at_once(engine, stage, first, second, status):
    """After a second signal, of whichever kind, the process is gone in the middle of its send."""
    with in_a_send(engine, stage, "work") as process:
        process.send_signal(signal.Signals[first])
        assert first in process.stderr.readline().decode()
        process.send_signal(signal.Signals[second])
        _, err = process.communicate(timeout=PATIENCE)

    assert process.returncode == status
    assert err.decode().startswith(f"engagement: {second} again: leaving at once")
    assert statuses(engine) == ["sending", "pending", "pending"]


def test_an_idle_worker_stops_at_once(empty_engine, tmp_path):
    """A worker that waits for work, here on a table in a schema of its own, obeys without waiting for its poll."""
    (tmp_path / "ready.py").write_text("def send(message): print(message.id, flush=True)")
    migrations.upgrade(empty_engine, schema="messaging")
    queue(empty_engine.execution_options(schema_translate_map={None: "messaging"}), new_message())
    command = ("work", "--transport=ready:send", "--schema=messaging", "--poll-interval=1h")
    with killed_at_the_end(program(*command, on=empty_engine, cwd=tmp_path)) as process:
        assert process.stdout.readline() == b"1\n"
        wait_until(lambda: scalar(empty_engine, "SELECT status FROM messaging.engagement_message_queue") == "sent")
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=PATIENCE)

    assert process.returncode == 0


# Looking, and all the rest


def test_status_counts_and_tells_how_long_the_oldest_due_one_waits(run, engine):
    """Every status is counted, zeros included; the wait is in seconds, and nothing if nothing is due."""
    idle = run("status", on=engine)
    queue(engine, new_message("a"), new_message("b"))
    with engine.begin() as connection:
        connection.execute(
            text("UPDATE engagement_message_queue SET next_attempt_at = now() - interval '90 s' WHERE id = 1")
        )
    busy = json.loads(run("status", "--json").out)

    assert idle.status == 0
    assert idle.out.startswith("pending=0\nsending=0\nsent=0\nfailed=0\ncancelled=0\nexpired=0\nin_doubt=0\ndue=0\n")
    assert "\noldest_due_seconds=\n" in idle.out
    assert (busy["pending"], busy["sent"]) == (2, 0)
    assert 90 <= busy["oldest_due_seconds"] < 90 + PATIENCE


def test_status_tells_what_keeps_a_queue_waiting(run, engine):
    """A worker whose transport is not ready says why, and so does `status`, without what looks personal."""
    queue(engine, new_message())
    assert "\nwaiting_for=\n" in run("status", on=engine).out
    why = "webhook: HTTP 503, asked with HEAD for 447700900101"
    process_message_queue(engine, SimpleNamespace(send=print, ready=lambda: False, why_not_ready=why))

    assert json.loads(run("status", "--json").out)["waiting_for"] == "webhook: HTTP 503, asked with HEAD for ***"


def test_a_person_gets_a_table(engine):
    """On a terminal the same facts are a table."""
    queue(engine, new_message())
    with terminal() as (screen, theirs):
        with killed_at_the_end(program("status", on=engine, stdout=theirs)) as process:
            process.communicate(timeout=PATIENCE)
        shown = screen()

    assert process.returncode == 0
    assert re.search(r"pending\W+1\W", shown)
    assert "pending=" not in shown


@pytest.mark.parametrize("command", [[], *([name] for name in cli.list_commands(None))])
def test_every_command_explains_itself(run, command):
    """Help needs nothing and is status 0; the group's tells the exit statuses."""
    ran = run(*command, "--help")

    assert (ran.status, ran.err) == (0, "")
    assert ran.out.startswith("Usage: engagement")
    assert command or ("Exit status:" in ran.out and "engagement demo" in ran.out)


def test_the_version_is_told(run):
    """As a report of a defect should begin."""
    assert run("--version") == (0, f"engagement {version('engagement')}\n", "")


def test_a_command_that_is_not_understood_is_status_2(run):
    """A usage error is one line that says where help is."""
    ran = run("queue", "--no-such-option")

    assert (ran.status, ran.err.count("\n")) == (2, 1)
    assert ran.err.endswith("See: engagement queue --help\n")


@pytest.mark.parametrize("missing", ["click", "rich"])
def test_without_the_extra_one_line_says_what_to_install(missing):
    """Without click or rich the command prints one line and is status 2."""
    code = f"import sys; sys.modules['{missing}'] = None\nfrom engagement.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)

    expected = f"engagement: {missing} is missing. Run: pip install 'engagement[cli]'\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", expected)


def test_a_host_pays_for_no_command_line():
    """Importing the package imports neither the command line's libraries nor Alembic."""
    code = "import sys, engagement; print(sorted({'click', 'rich', 'alembic'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)

    assert done.stdout == "[]\n"


# Looking for what is wrong


def test_broken_promises_are_named(run, engine):
    """`verify` is silent about a healthy queue, names what is broken, and tells by its exit status."""
    queue(engine, new_message())
    assert run("verify", on=engine)[:2] == (0, "no broken promise found\n")

    with engine.begin() as connection:
        connection.execute(text("UPDATE engagement_message_queue SET next_attempt_at = now() - interval '2 h'"))
    told = run("verify", on=engine)
    assert told.status == 1
    assert told.out.count("message 1:") == 1
    assert [violation["message_id"] for violation in json.loads(run("verify", "--json").out)] == [1]
    assert run("verify", "--overdue", "1d").status == 0


def test_verify_says_that_it_stopped(run, engine):
    """Of more than a hundred messages that break a promise a hundred are named, and that there are more is said."""
    queue(engine, *(new_message(f"user{number}") for number in range(101)))
    with engine.begin() as connection:
        connection.execute(text("UPDATE engagement_message_queue SET next_attempt_at = now() - interval '2 h'"))

    told = run("verify", on=engine).out.splitlines()
    assert len(told) == 101
    assert told[-1] == "due_is_claimed: and more messages: of each promise at most 100 are named"
    assert [violation["more"] for violation in json.loads(run("verify", "--json").out)] == [False] * 99 + [True]

    with engine.begin() as connection:
        connection.execute(text("UPDATE engagement_message_queue SET next_attempt_at = now() WHERE id = 1"))
    assert "more" not in run("verify").out


def test_problems_of_catalogues_are_told(run, tmp_path):
    """The shipped catalogues have none; a key that nobody asked can say is told, with exit status 1."""
    assert run("lint-catalogues", ROOT / "engagement" / "catalogues")[:2] == (0, "no problem found\n")

    for locale, words in (("en", "hello = Hello\n"), ("pt-BR", "hello = Olá\nbye = Tchau\n")):
        (tmp_path / "locales" / locale).mkdir(parents=True)
        (tmp_path / "locales" / locale / "messages.ftl").write_text(words)
    told = run("lint-catalogues", tmp_path / "locales")
    assert told.status == 1
    assert told.out == "en: bye: is missing\n"


def test_the_linter_is_told_which_catalogues_are_asked(run, tmp_path):
    """A default and fallbacks as the renderer has them make what is missing; what is none is said."""
    for locale, words in {"en": "hi = Hi", "es": "hi = Ola\nyo = Yo", "gl": "hi = Ola"}.items():
        (tmp_path / locale).mkdir()
        (tmp_path / locale / "messages.ftl").write_text(words)

    assert run("lint-catalogues", tmp_path).out == "en: yo: is missing\ngl: yo: is missing\n"
    assert run("lint-catalogues", tmp_path, "--fallback", "gl=es").out == "en: yo: is missing\n"
    assert run("lint-catalogues", tmp_path, "--default", "es").out == "no problem found\n"
    for wrong in ("gl", "=es", "gl=", "gl=es,"):
        ran = run("lint-catalogues", tmp_path, "--fallback", wrong)
        assert (ran.status, ran.out, ran.err.count("\n")) == (2, "", 1)


def test_the_console_shows_the_words_or_says_that_there_are_none(engine):
    """With `render` and `reveal` the console shows what a person would read; what cannot be said is refused."""
    said, unsaid = queue(engine, new_message("ana"), new_message("bea", message_key="unknown.key"))
    words = {"goodbye.14_days": "Hello\x1b[2J\nthere"}
    shown = io.StringIO()
    console = Console(shown, reveal=True, render=lambda message: words[message.message_key])

    process_message_queue(engine, console)

    assert shown.getvalue().splitlines()[1:] == ["    Hello[2J", "    there"]
    assert (row(engine, said).status, row(engine, unsaid).status) == ("sent", "failed")
