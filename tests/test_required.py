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
    others = {"reschedule": ["--all"], "suppress": ["5511999990001@s.whatsapp.net"]}
    ran = run(command, *others.get(command, []), on=engine)

    assert (ran.status, ran.out, ran.err.count("\n")) == (2, "", 1)
    assert f"{option}'" in ran.err or f"{option} " in ran.err


@pytest.mark.parametrize("answers", [["--sent", "--not-sent"], ["--not-sent", "--sent"]])
def test_two_answers_are_none(run, engine, answers):
    """Of two answers that exclude each other none counts: the last one could send a message again."""
    queue(engine, new_message())
    with engine.begin() as connection:
        connection.execute(text("UPDATE engagement_message_queue SET status = 'in_doubt', attempt = 1"))
    before = row(engine, 1)

    ran = run("resolve", "1", *answers, on=engine)

    assert (ran.status, ran.out, ran.err.count("\n")) == (2, "", 1)
    assert row(engine, 1) == before


TAKE_TEXT = [
    (name, parameter.opts[0])
    for name, command in COMMANDS.items()
    for parameter in command.params
    if not (isinstance(parameter, click.Option) and parameter.is_flag) and parameter.nargs == 1
]


@pytest.mark.parametrize(("command", "parameter"), TAKE_TEXT)
def test_an_empty_text_is_no_answer(run, engine, command, parameter):
    """A variable of a script that is not set is no schema, revision, filter or reason: nothing else is taken for it."""
    queue(engine, new_message())
    before = row(engine, 1)
    enough = {
        "process": ["--transport", "json:dumps"],
        "reschedule": ["--to", "1h"],
        "prune": ["--older-than", "1h"],
        "receive": ["--provider", "waha"],
    }
    enough |= {"work": enough["process"], "resolve": ["--sent"]}
    given = [parameter, ""] if parameter.startswith("-") else [""]
    others = [] if parameter in enough.get(command, []) else enough.get(command, [])
    all_of_them = ["--all", "--yes"] if command in {"cancel", "reschedule", "retry", "resolve"} else []

    ran = run(command, *given, *others, *all_of_them, on=engine)

    assert (ran.status, ran.out, ran.err.count("\n")) == (2, "", 1)
    assert row(engine, 1) == before


def test_every_command_asks_itself_for_what_it_requires():
    """None relies on click for it; the options that are required are these."""
    assert {type(command) for command in COMMANDS.values()} == {Command}
    assert dict(REQUIRED) == {
        "process": "--transport", "work": "--transport", "reschedule": "--to", "prune": "--older-than",
        "receive": "--provider", "suppress": "--reason", "pause": "--reason",
    }  # fmt: skip
