"""What a command cannot do without is asked for, by whatever version of click: nothing is taken for an answer."""

import click
import pytest
from conftest import new_message, queue, row
from sqlalchemy import text

from engagement.cli import cli
from engagement.cli.group import Command

COMMANDS = {name: cli.get_command(None, name) for name in cli.list_commands(None)}
REQUIRED = [
    (name, option.opts[0])
    for name, command in COMMANDS.items()
    for option in command.params
    if isinstance(option, click.Option) and option.required
]


@pytest.mark.parametrize("which", [["1"], ["--all", "--yes"], ["--all", "--yes", "--json"], ["--all", "--dry-run"]])
@pytest.mark.parametrize("command", ["resolve", "reschedule"])
def test_no_answer_changes_nothing(run, engine, command, which):
    """Neither one message nor all of them are changed by a command that does not say into what."""
    queue(engine, new_message())
    with engine.begin() as connection:
        status = {"resolve": "status = 'in_doubt', attempt = 1", "reschedule": "status = 'pending'"}[command]
        connection.execute(text(f"UPDATE engagement_message_queue SET {status}"))
    before = row(engine, 1)

    ran = run(command, *which, on=engine)

    assert (ran.status, ran.out, ran.err.count("\n")) == (2, "", 1)
    assert f"See: engagement {command} --help" in ran.err
    assert row(engine, 1) == before


@pytest.mark.parametrize(("command", "option"), REQUIRED)
def test_what_is_required_is_asked_for(run, engine, command, option):
    """A command without what it requires is not understood, and says what is missing."""
    ran = run(command, *(["--all"] if command in {"resolve", "reschedule"} else []), on=engine)

    assert (ran.status, ran.out, ran.err.count("\n")) == (2, "", 1)
    assert f"{option}'" in ran.err or f"{option} " in ran.err


def test_every_command_asks_itself_for_what_it_requires():
    """None relies on click for it; the options that are required are these."""
    assert {type(command) for command in COMMANDS.values()} == {Command}
    assert dict(REQUIRED) == {
        "process": "--transport", "work": "--transport", "reschedule": "--to", "resolve": "--sent",
        "prune": "--older-than",
    }  # fmt: skip
