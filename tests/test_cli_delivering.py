"""The commands that queue, deliver and stop."""

import json
import os
import re
import signal
import sys
import threading
from contextlib import contextmanager
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import click
import pytest
from commands import CONSOLE, line, scalar, statuses, transport
from conftest import execute, new_message, queue, row, wait_until_blocked
from shell import PATIENCE, killed_at_the_end, program, terminal
from sqlalchemy.orm import Session

from engagement import EngagementMessageRepository, migrations
from engagement._operating.masking import masked
from engagement.cli.parameters import duration, positive_duration

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


def test_in_order_reaches_the_worker(run, engine):
    """Nothing is sent to a person whom another worker is sending to, and without the option it is."""
    queue(engine, *(new_message("ana", idempotency_key=f"ana{n}") for n in range(2)), new_message("bia"))
    execute(
        engine,
        "UPDATE engagement_message_queue SET status = 'sending', lease_expires_at = now() + interval '1h' WHERE id = 1",
    )

    assert "processed=1\n" in run("process", "--transport", CONSOLE, "--in-order", on=engine).out
    assert statuses(engine) == ["sending", "pending", "sent"]
    assert "processed=1\n" in run("process", "--transport", CONSOLE).out


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


# Beside a settlement

HOOKS = """
import sys
from sqlalchemy import text
def note(connection, message, status):
    print("hook", message.id, status, connection.scalar(text("SHOW search_path")), file=sys.stderr)
def short(connection): ...
number = 5
"""


@pytest.fixture(name="hooks")
def _hooks(run):
    """A module beside which the command is run."""
    Path("hooks.py").write_text(HOOKS)
    yield
    sys.modules.pop("hooks", None)


@pytest.mark.usefixtures("hooks")
def test_a_function_is_called_in_the_transaction_that_settles(run, engine):
    """It is named as a transport is, and finds its tables where the role does."""
    (message_id,) = queue(engine, new_message())

    ran = run("process", transport("def send(message): return None"), "--on-settled=hooks:note", on=engine)

    assert (ran.status, ran.err) == (0, f'hook {message_id} sent "$user", public\n')


@pytest.mark.usefixtures("hooks")
@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("hooks", "write it as package.module:name."),
        ("hooks:no_such", "hooks has no no_such."),
        ("hooks:number", "hooks:number must be a function, not int."),
        ("hooks:short", "hooks:short must take a connection, a message and a status."),
    ],
)
def test_a_function_that_cannot_be_called_is_told_on_one_line(run, engine, name, problem):
    """Before anything is sent."""
    queue(engine, new_message())

    ran = run("process", transport("def send(message): return None"), "--on-settled", name, on=engine)

    assert (ran.status, statuses(engine)) == (2, ["pending"])
    assert f"Invalid value for '--on-settled': {problem}" in ran.err
    assert ran.err.count("\n") == 1
