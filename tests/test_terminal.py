"""What reaches the terminal: nothing that it would obey, whoever wrote it."""

import gc
import re

import pytest
from conftest import execute, new_message, queue
from hostile_database import NO_VERSION, OBEYED, WAYS, hostile_database
from shell import ROOT, killed_at_the_end, program, terminal

from engagement.cli import cli

OF_A_TERMINAL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
OF_OUR_TABLES = re.compile(r"\x1b\[[0-9;]*m")
"""Colours and weights, which tables have on a terminal."""
COMMANDS = {
    "upgrade": [],
    "adopt": [],
    "downgrade": ["--yes"],
    "current": [],
    "queue": ["messages.jsonl"],
    "process": ["--transport", "engagement.transports.console:Console", "--verbose"],
    "status": [],
    "list": ["--reveal"],
    "show": ["1", "--reveal"],
    "person": ["ana", "--reveal"],
    "workers": [],
    "pause": ["--reason", "wrong words"],
    "resume": [],
    "verify": [],
    "admin": [],
    "cancel": ["1"],
    "reschedule": ["--all", "--yes", "--to", "1h"],
    "retry": ["--all", "--yes"],
    "resolve": ["--all", "--yes", "--sent"],
    "suppressed": [],
    "suppress": ["447700900101@s.whatsapp.net", "--reason", "answered STOP"],
    "unsuppress": ["447700900101@s.whatsapp.net"],
    "forget-user": ["ana", "--yes"],
    "prune": ["--older-than", "1h", "--yes"],
    "receive": ["--provider", "waha"],
}


@pytest.fixture(name="secret", autouse=True)
def _secret(monkeypatch):
    """What `receive` asks for before it asks a database."""
    monkeypatch.setenv("ENGAGEMENT_RECEIPTS_SECRET", "a-key-of-sixteen-characters")


@pytest.fixture(name="collect")
def _collect():
    """Hand out a collection of what the test leaves. To go through the modules of all tests takes 0.4 s."""
    gc.freeze()
    yield gc.collect
    gc.unfreeze()


# SQLAlchemy 2.0 leaves a connection to the collector if its first statement fails.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("command", COMMANDS)
def test_what_answers_at_the_database_s_address_does_not_steer_the_terminal(run, collect, tmp_path, command, way):
    """Whatever a far side says instead of being a database (refusals, notices, versions, states) is shown as text."""
    (tmp_path / "messages.jsonl").write_text("")
    with hostile_database(way) as url:
        ran = run(command, *COMMANDS[command], "--database-url", url)
        collect()

    assert ran.status in {1, 3}
    assert ran.err
    assert OF_A_TERMINAL.findall(ran.out + ran.err) == []
    assert "hunter2" not in ran.out + ran.err


def test_every_command_that_asks_a_database_is_tried():
    """But `work`, which waits for a lost database and has the options of `process`."""
    of_a_database = {
        name
        for name in cli.list_commands(None)
        if any(parameter.name == "database_url" for parameter in cli.get_command(None, name).params)
    }
    assert of_a_database - {"work"} == set(COMMANDS)


@pytest.mark.parametrize("way", WAYS)
def test_a_person_s_terminal_shows_it_as_text(way):
    """Likewise in a process of its own, on a terminal, with what the driver's library and Python itself may write."""
    with (
        hostile_database(way) as url,
        terminal() as (screen, theirs),
        killed_at_the_end(
            program("status", "--database-url", url, stdin=theirs, stdout=theirs, stderr=theirs)
        ) as process,
    ):
        assert process.wait(30) in {1, 3}
        shown = screen().replace("\r\n", "\n")

    assert shown
    assert OF_A_TERMINAL.findall(shown) == []
    assert "Traceback" in shown if way == NO_VERSION else shown.count("\n") == 1


@pytest.mark.parametrize("command", ["upgrade", "current", "downgrade"])
def test_a_revision_that_somebody_wrote_is_text(run, engine, command):
    """The version table's content is read from a database, too."""
    before = execute(engine, "SELECT version_num FROM engagement_alembic_version").scalar_one()
    execute(engine, "UPDATE engagement_alembic_version SET version_num = :text", text=OBEYED)
    try:
        ran = run(command, *(["--yes"] if command == "downgrade" else []), on=engine)
    finally:
        execute(engine, "UPDATE engagement_alembic_version SET version_num = :text", text=before)

    assert ran.status in {2, 3}
    assert OF_A_TERMINAL.findall(ran.out + ran.err) == []


TRANSPORTS = {
    "prints": "print(said)",
    "writes to standard error": "print(said, file=sys.stderr)",
    "logs": "logging.getLogger('engagement').warning(said)",
    "logs elsewhere": "logging.getLogger('elsewhere').error(said)",
    "warns": "warnings.warn(said)",
    "raises": "raise RuntimeError(said)",
    "exits": "raise SystemExit(said)",
    "dies in a thread": "thread = threading.Thread(target=lambda: 1 / 0, name=said); thread.start(); thread.join()",
}


def test_why_a_module_gives_up_is_text(engine, tmp_path):
    """Python prints the text of a SystemExit itself, when nothing of ours is in between any more."""
    (tmp_path / "exiting.py").write_text(f"raise SystemExit({OBEYED!r})")
    environment = {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    with killed_at_the_end(
        program("process", "--transport", "exiting:send", on=engine, environment=environment)
    ) as run:
        out, err = run.communicate(timeout=60)

    assert run.returncode == 1
    assert b"ZXZpbA" in err
    assert OF_A_TERMINAL.findall((out + err).decode()) == []


@pytest.mark.parametrize("how", TRANSPORTS)
@pytest.mark.parametrize("of_a_person", [True, False])
def test_what_a_transport_passes_on_is_text(engine, tmp_path, how, of_a_person):
    """What a provider said is shown by whatever way a transport, its libraries or Python takes: none has an effect."""
    queue(engine, new_message())
    (tmp_path / "telling.py").write_text(
        f"import logging, sys, threading, warnings\nsaid = {OBEYED!r}\ndef send(message):\n    {TRANSPORTS[how]}\n"
    )
    arguments = ("process", "--transport", "telling:send", "--verbose", "--reveal")
    with terminal() as (screen, theirs):
        streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs} if of_a_person else {}
        with killed_at_the_end(
            program(*arguments, on=engine, environment={"PYTHONPATH": f"{tmp_path}:{ROOT}"}, **streams)
        ) as process:
            out, err = process.communicate(timeout=60)
        shown = screen().replace("\r\n", "\n") if of_a_person else (out + err).decode()

    assert "message" in shown
    assert OF_A_TERMINAL.findall(OF_OUR_TABLES.sub("", shown)) == []


def test_a_table_keeps_its_colours(engine):
    """What we draw ourselves is not taken for somebody else's text."""
    queue(engine, new_message())
    with terminal() as (screen, theirs):
        streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
        with killed_at_the_end(program("list", on=engine, environment={"TERM": "xterm"}, **streams)) as process:
            process.wait(30)
        assert OF_OUR_TABLES.search(screen())
