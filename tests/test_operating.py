"""What holds for every command that operates the queue: its examples, its documentation, its schema."""

import re
import shlex
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import click
import pytest
from by_hand import update
from commands import SQL, messages
from conftest import new_message, queue, row
from shell import ROOT, url_of
from sqlalchemy import text

from engagement import MessageStatus, migrations
from engagement.cli import cli
from engagement.cli.connecting import Database
from engagement.models import TABLE_NAME


@pytest.mark.parametrize(
    "command",
    [
        ["status"],
        ["list"],
        ["show", "1"],
        ["cancel", "1"],
        ["cancel", "--all", "--yes"],
        ["reschedule", "1", "--to", "1h"],
        ["forget-user", "user1", "--yes"],
        ["prune", "--older-than", "1d", "--yes"],
        ["retry", "--all", "--yes"],
        ["resolve", "--all", "--sent", "--yes"],
        ["suppress", "447700900101@s.whatsapp.net", "--reason", "answered STOP"],
        ["suppressed"],
    ],
)
def test_every_command_honors_the_schema(run, empty_engine, command):
    """With `--schema` it finds the table that is off the search path; without, it says what to run."""
    migrations.upgrade(empty_engine, schema="messaging")
    with empty_engine.begin() as connection:
        connection.execute(
            text(
                f"INSERT INTO messaging.{TABLE_NAME} (user_id, message_type, message_key, destination, destination_jid,"
                " idempotency_key) VALUES ('user1', 'goodbye', 'k', 'individual', '447700900101@s.whatsapp.net', 'k')"
            )
        )

    assert run(*command, "--schema", "messaging", on=empty_engine).status == 0
    assert run(*command).status == 3


def commands():
    return [(name, cli.get_command(click.Context(cli), name)) for name in cli.list_commands(click.Context(cli))]


def help_examples():
    lines = [
        line.strip()
        for _, command in commands()
        for line in (command.epilog or "").splitlines()
        if "engagement " in line
    ]
    return [re.sub(r"^.*\| | > .*$", "", line) for line in lines if "myapp" not in line and "queue " not in line]


@pytest.mark.parametrize("example", help_examples())
def test_the_examples_of_the_help_are_understood(example, tmp_path, monkeypatch):
    """Each can be typed as it stands."""
    monkeypatch.chdir(tmp_path)
    Path("locales").mkdir()
    words = shlex.split(example)
    _, name, *arguments = words[words.index("engagement") :]

    context = cli.get_command(click.Context(cli), name).make_context(name, arguments)

    assert context.params is not None


def test_commands_that_act_on_messages_have_examples():
    """Whoever is called at night copies one."""
    acting_on_messages = {"list", "show", "cancel", "reschedule", "retry", "resolve", "forget-user", "prune", "status"}
    acting_on_messages |= {"suppress", "unsuppress", "suppressed"}

    assert acting_on_messages <= {name for name, command in commands() if "Examples:" in (command.epilog or "")}


def test_a_command_loads_only_what_it_needs():
    """What other commands need is not imported: start-up stays quick."""
    code = (
        "import sys; from engagement.cli import cli; cli.get_command(None, 'cancel');"
        "print([name for name in sys.modules if name.startswith(('alembic', 'engagement.cli.deliver', 'fluent'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)

    assert done.stdout == "[]\n"


def test_no_statement_is_prepared_on_the_server(engine):
    """A pooler in transaction mode gives each transaction another session."""
    with Database(url_of(engine), None).engine() as ours, ours.connect() as connection:
        assert connection.connection.driver_connection.prepare_threshold is None


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        (["re"], {"receive", "reschedule", "resume", "retry", "resolve"}),
        (["retry", "--st"], {"--status"}),
        (["retry", "--status", ""], {"failed", "expired"}),
        (["list", "--status", "s"], {"sending", "sent"}),
    ],
)
def test_the_shell_completes_commands_options_and_words(tmp_path, typed, offered):
    """Bash, having read what the documentation says to read, offers what fits."""
    script = tmp_path / "engagement"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -c "from engagement.cli import main; main()" "$@"\n')
    script.chmod(0o755)
    (line,) = re.findall(r"^eval .*$", (ROOT / "docs" / "cli.md").read_text(), re.MULTILINE)
    words = " ".join(shlex.quote(word) for word in ["engagement", *typed])
    bash = (
        f"{line}\nCOMP_WORDS=({words})\nCOMP_CWORD={len(typed)}\n_engagement_completion engagement\n"
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", bash], capture_output=True, text=True, check=True, env=environment)

    assert set(done.stdout.split()) == offered


def test_the_documentation_and_the_help_tell_the_same_exit_statuses(run):
    """One list, in both places, word for word."""
    documented = re.findall(r"^\| (\d+) \| (.*) \|$", (ROOT / "docs" / "cli.md").read_text(), re.MULTILINE)
    told = re.findall(r"^    (\d+)  +(.*(?:\n {9}.*)*)", run("--help").out, re.MULTILINE)

    assert [status for status, _ in documented] == [status for status, _ in told]
    assert " ".join(told[1][1].split()) == documented[1][1].replace("`", "")
    assert "failed messages or messages in doubt (process)" in documented[1][1].replace("`", "")


def test_the_documented_commands_run(run, engine):
    """Each can be typed as it stands, in its order, and does what it says."""
    queue(engine, *(new_message("user123", idempotency_key=key) for key in ("a", "b", "c", "d")))
    queue(engine, new_message("user123", idempotency_key="user123:goodbye:2026-11-21"))
    messages(engine, "failed", "in_doubt", "sent", message_type="weekly_review")
    update(engine, SQL["failed"], "id = 1")
    update(engine, SQL["in_doubt"], "id = 2")
    update(engine, "created_at = now() - interval '3 days', next_attempt_at = now() - interval '99 days'", "id > 5")
    typed = re.findall(r"^\$ engagement (.*)$", (ROOT / "docs" / "cli.md").read_text(), re.MULTILINE)

    for line in typed:
        ran = run(*shlex.split(line), on=engine)
        assert (line, ran.status, ran.err) == (line, 0, "")

    assert len(typed) == 24
    assert [row(engine, message_id).destination_jid for message_id in range(1, 6)] == [None] * 5
    assert [row(engine, message_id).status for message_id in range(1, 9)] == [
        *("cancelled", "sent", "cancelled", "cancelled", "cancelled", "pending", "sent", "sent")
    ]


def test_every_status_can_be_listed(run, engine):
    """The filter knows each status that a message can have."""
    for status in MessageStatus:
        assert run("list", "--status", status, on=engine).status == 0


def test_durations_ahead_and_ago():
    """`2h` is two hours from now, in the direction that the option means."""
    from engagement.cli.parameters import moment_ago, moment_ahead

    now = datetime.now(UTC)
    assert timedelta(hours=1, minutes=59) < moment_ahead("2h") - now < timedelta(hours=2, minutes=1)
    assert timedelta(hours=1, minutes=59) < now - moment_ago("2h") < timedelta(hours=2, minutes=1)
