"""The command line: what it prints, how it explains itself, and what it looks at."""

import io
import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from types import SimpleNamespace

import pytest
from commands import statuses
from conftest import new_message, queue, row
from shell import PATIENCE, ROOT, killed_at_the_end, program, terminal, url_of
from sqlalchemy import text

from engagement import process_message_queue
from engagement.cli import cli
from engagement.transports.console import Console

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
