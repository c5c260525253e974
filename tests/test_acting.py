"""The commands that act on one message, on many, and on people: who is asked, what is told, and what is kept."""

import json
import os
import pwd
import re
from datetime import UTC, datetime

import pytest
from by_hand import update
from commands import facts, messages, statuses
from conftest import new_message, queue, row
from shell import talk
from sqlalchemy import text

from engagement.cli import acting
from engagement.models import TABLE_NAME

# Acting on one


@pytest.mark.parametrize(
    ("state", "command", "becomes"),
    [
        ("pending", ["cancel"], "cancelled"),
        ("cancelled", ["cancel"], "cancelled"),
        ("pending", ["reschedule", "--to", "2h"], "pending"),
        ("failed", ["retry"], "pending"),
        ("expired", ["retry"], "pending"),
        ("in_doubt", ["resolve", "--sent"], "sent"),
        ("in_doubt", ["resolve", "--not-sent"], "pending"),
    ],
)
def test_one_message_is_acted_on_unasked(run, engine, state, command, becomes):
    """Who names one message by id or key means it."""
    (message_id,) = messages(engine, state)

    ran = run(*command, message_id, on=engine)

    assert (ran.status, ran.err) == (0, "")
    assert facts(ran.out)["unchanged"] == "0"
    assert statuses(engine) == [becomes]


@pytest.mark.parametrize(
    ("state", "command", "reason"),
    [
        ("sent", ["cancel"], "it is sent"),
        ("sending", ["cancel"], "it is sending"),
        ("sent", ["reschedule", "--to", "2h"], "it is sent"),
        ("expires soon", ["reschedule", "--to", "2h"], "it expires before then"),
        ("pending", ["retry"], "it is pending"),
        ("pruned", ["retry"], "it was forgotten or pruned"),
        ("failed", ["resolve", "--sent"], "it is failed"),
        ("pruned in doubt", ["resolve", "--not-sent"], "it was forgotten or pruned"),
    ],
)
def test_a_verdict_of_the_queue_is_told_and_is_status_1(run, engine, state, command, reason):
    """What cannot be done is not called done, and why is said."""
    (message_id,) = messages(engine, state)
    before = row(engine, message_id)

    ran = run(*command, message_id, on=engine)
    as_json = run(*command, message_id, "--json")

    assert (ran.status, as_json.status) == (1, 1)
    assert facts(ran.out)["unchanged"] == "1"
    assert ran.err.startswith(f"message {message_id}: not ")
    assert ran.err.endswith(f": {reason}\n")
    assert json.loads(as_json.out)["reasons"] == [{"message": message_id, "reason": reason}]
    assert row(engine, message_id) == before


def test_a_doubt_is_never_called_cancelled(run, engine):
    """A pending message that may have left becomes in doubt: it will not be sent, but nobody says cancelled."""
    (message_id,) = messages(engine, "pending")
    update(engine, "has_doubt = true, attempt = 1")

    ran = run("cancel", message_id, on=engine)

    assert (ran.status, statuses(engine)) == (1, ["in_doubt"])
    assert facts(ran.out)["cancelled"] == "0"
    assert ran.err.endswith("it is in_doubt\n")


def test_reasons_and_times_reach_the_message(run, engine):
    """What a person says is kept in the history, and the time is the one that was given."""
    messages(engine, "pending", "in_doubt", "pending")

    run("cancel", 1, "--reason", "came back", on=engine)
    run("resolve", 2, "--sent", "--reason", "seen in the log")
    run("reschedule", 3, "--to", "2031-01-01T09:00-03:00")

    assert row(engine, 1).history[-1]["reason"] == "came back"
    assert row(engine, 2).history[-1]["reason"] == "seen in the log"
    assert row(engine, 3).scheduled_for == datetime(2031, 1, 1, 12, tzinfo=UTC)


# Acting on many


@pytest.mark.parametrize(
    ("status", "command", "event"),
    [
        ("pending", ["cancel"], "cancelled"),
        ("failed", ["retry"], "retried"),
        ("in_doubt", ["resolve", "--sent"], "resolved"),
        ("in_doubt", ["resolve", "--not-sent"], "resolved"),
    ],
)
def test_the_history_names_the_operator(run, engine, monkeypatch, status, command, event):  # noqa: PLR0917 - fixtures
    """Who typed it is kept: the system's user, or the name that is given."""
    for variable in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.setenv(variable, "root")
    monkeypatch.setenv("LOGNAME", "ana\x1b")

    names = []
    ids = messages(engine, status, status)
    for message_id, given in zip(ids, ([], ["--by", "Bia Souza"]), strict=True):
        assert run(*command, message_id, *given, on=engine).status == 0
        (entry,) = row(engine, message_id).history
        names.append((entry["event"], entry["by"]))

    assert names == [(event, "ana"), (event, "Bia Souza")]


def test_an_operator_without_a_name_is_known_by_number(run, engine, monkeypatch):
    """In a container a user may have no name; nobody is kept from deciding for that."""
    for variable in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
    (message_id,) = messages(engine, "failed")

    assert run("retry", message_id, on=engine).status == 0
    assert row(engine, message_id).history[0]["by"] == f"user {os.getuid()}"


DONE = {"cancel": "cancelled", "reschedule": "rescheduled", "retry": "retried", "resolve": "resolved"}
MANY = [
    (["cancel", "--all"], "pending", "cancelled"),
    (["reschedule", "--all", "--to", "2h"], "pending", "pending"),
    (["retry", "--status", "failed"], "failed", "pending"),
    (["resolve", "--all", "--sent"], "in_doubt", "sent"),
    (["resolve", "--all", "--not-sent"], "in_doubt", "pending"),
]


@pytest.mark.parametrize(("command", "state", "becomes"), MANY)
def test_many_are_not_acted_on_without_a_yes(run, engine, command, state, becomes):
    """Without a terminal it says how many and refuses; a dry run counts; with --yes it is done, to those alone."""
    messages(engine, *[state] * 3, "cancelled")
    before = [row(engine, message_id) for message_id in (1, 2, 3, 4)]

    refused = run(*command, on=engine)
    tried = run(*command, "--dry-run")
    assert [row(engine, message_id) for message_id in (1, 2, 3, 4)] == before
    acted = run(*command, "--yes")

    assert (refused.status, refused.out) == (2, "")
    assert "3 messages" in refused.err
    assert (tried.status, tried.out) == (0, "found=3\n")
    assert (acted.status, acted.out) == (0, f"found=3\n{DONE[command[0]]}=3\nunchanged=0\n")
    assert statuses(engine) == [becomes] * 3 + ["cancelled"]
    assert all(row(engine, message_id) != before[message_id - 1] for message_id in (1, 2, 3))


def test_several_that_are_named_need_a_yes_too(run, engine):
    """Each that could not be changed is told, and so is a name that nobody has."""
    messages(engine, "pending", "sent")
    command = ("cancel", "1", "2", "nobody:goodbye:2026-01-01", "1")

    assert run(*command, on=engine).status == 2
    tried = run(*command, "--dry-run")
    ran = run(*command, "--yes")

    assert (tried.status, tried.out, sorted(tried.err.splitlines())) == (1, "found=1\n", sorted(ran.err.splitlines()))

    assert (ran.status, ran.out) == (1, "found=1\ncancelled=1\nunchanged=2\n")
    assert "message nobody:goodbye:2026-01-01: not cancelled: there is no such message\n" in ran.err
    assert "message 2: not cancelled: it is sent\n" in ran.err


@pytest.mark.parametrize("which", [[], ["1", "--user", "user0"], ["1", "--all"]])
def test_which_messages_must_be_said_in_one_way(run, engine, which):
    """No command acts on everything by accident."""
    messages(engine, "pending")

    ran = run("cancel", *which, "--yes", on=engine)

    assert (ran.status, ran.out, ran.err.count("\n")) == (2, "", 1)
    assert statuses(engine) == ["pending"]


def test_only_what_fits_all_filters_is_acted_on(run, engine):
    """A type, a user and a time narrow it down together."""
    messages(engine, *["pending"] * 3)
    messages(engine, *["pending"] * 3, message_type="review")

    ran = run("cancel", "--user", "user1", "--type", "review", "--created-since", "1h", "--yes", on=engine)

    assert ran.out == "found=1\ncancelled=1\nunchanged=0\n"
    assert statuses(engine) == ["pending"] * 4 + ["cancelled", "pending"]


@pytest.mark.parametrize(
    ("answer", "status", "expected"), [("y", 0, "cancelled"), ("n", 1, "pending"), ("", 1, "pending")]
)
def test_a_person_is_told_how_many_and_asked(engine, answer, status, expected):
    """Only a yes is one; and what was asked about is in the question."""
    messages(engine, "pending", "pending")

    ran = talk("cancel", "--type", "goodbye", "--scheduled-since", "1h", on=engine, answer=answer)

    assert ran.status == status
    assert re.search(
        r"Cancel 2 messages \(.*type goodbye, scheduled since 20[\d-]{8} [\d:\s]+Z\)\? \[y/N\]", ran.out, re.DOTALL
    )
    assert statuses(engine) == [expected] * 2
    assert ("nothing was changed" in ran.out) is (status == 1)


@pytest.mark.parametrize(
    ("command", "state", "question"),
    [
        (["reschedule", "--to", "2099-11-24T09:00Z"], "pending", "Reschedule 2 messages () to 2099-11-24 09:00+0000?"),
        (["resolve", "--sent"], "in_doubt", "Resolve 2 messages () as sent?"),
        (["resolve", "--not-sent"], "in_doubt", "Resolve 2 messages () as not sent, and send again?"),
    ],
)
def test_a_question_is_a_sentence(engine, command, state, question):
    """What is done comes first, to which messages then, and how at the end."""
    messages(engine, state, state)

    asked = " ".join(talk(*command, "--all", on=engine, answer="n").out.split())

    assert question in re.sub(r"\(.*?\)", "()", asked)


def test_what_is_queued_after_the_question_is_not_acted_on(engine):
    """A person said yes to the messages that there were."""
    messages(engine, "pending", "pending")

    ran = talk("cancel", "--all", on=engine, answer="y", meanwhile=lambda: queue(engine, new_message("later")))

    assert ran.status == 0
    assert statuses(engine) == ["cancelled", "cancelled", "pending"]


def test_long_work_shows_how_far_it_is(engine):
    """More than one batch has a progress bar."""
    messages(engine, *["pending"] * (acting.BATCH + 1))

    ran = talk("cancel", "--all", on=engine, answer="y")

    assert (ran.status, set(statuses(engine))) == (0, {"cancelled"})
    assert "100%" in ran.out


def test_each_batch_is_a_transaction_of_its_own(run, engine, monkeypatch):
    """What was done before the database refuses stays done, and how much that was is told."""
    monkeypatch.setattr(acting, "BATCH", 2)
    messages(engine, *["pending"] * 6)
    with engine.begin() as connection:
        connection.execute(
            text(f"ALTER TABLE {TABLE_NAME} ADD CONSTRAINT no_more CHECK (id <> 4 OR status = 'pending')")
        )
    try:
        ran = run("cancel", "--all", "--yes", on=engine)
    finally:
        with engine.begin() as connection:
            connection.execute(text(f"ALTER TABLE {TABLE_NAME} DROP CONSTRAINT no_more"))

    assert ran.status == 3
    assert "ended early, 2 messages cancelled\n" in ran.err
    assert statuses(engine) == ["cancelled"] * 2 + ["pending"] * 4


def test_an_interruption_tells_what_was_done(engine):
    """Ctrl-C leaves with 130, between two batches or within one; what was done stays done, and is told."""
    messages(engine, *["pending"] * (acting.BATCH * 3))
    with engine.begin() as blocking:
        last = acting.BATCH * 3
        blocking.execute(text(f"SELECT 1 FROM {TABLE_NAME} WHERE id = {last} FOR UPDATE"))

        ran = talk("cancel", "--all", on=engine, answer="y", interrupted_at=b"67%")

    assert ran.status == 130
    assert f"ended early, {acting.BATCH * 2} messages cancelled" in ran.out
    assert statuses(engine).count("cancelled") == acting.BATCH * 2


def test_what_cannot_be_retried_any_more_is_not_counted(run, engine):
    """What was pruned is no reason to say each time that something was not changed."""
    messages(engine, "failed", "pruned", "in_doubt", "pruned in doubt")

    assert run("retry", "--all", "--yes", on=engine)[:2] == (0, "found=1\nretried=1\nunchanged=0\n")
    assert run("resolve", "--all", "--not-sent", "--yes")[:2] == (0, "found=1\nresolved=1\nunchanged=0\n")
    assert run("resolve", "--all", "--sent", "--yes")[:2] == (0, "found=1\nresolved=1\nunchanged=0\n")


def test_reasons_do_not_flood_the_screen(run, engine, monkeypatch):
    """Of many verdicts the first are told, and how many more there are."""
    monkeypatch.setattr(acting, "REASONS_SHOWN", 2)
    messages(engine, *["sent"] * 5)

    ran = run("cancel", *range(1, 6), "--yes", on=engine)

    assert (ran.status, facts(ran.out)["unchanged"]) == (1, "5")
    assert ran.err.count("it is sent") == 2
    assert ran.err.endswith("and 3 more\n")


# Blanking


def test_a_user_is_forgotten_after_a_question(run, engine):
    """How many it is about, then a yes, then nothing personal of the user is left, and others are untouched."""
    queue(engine, new_message("ana"), new_message("ana", message_type="review"), new_message("ben"))

    refused = run("forget-user", "ana", on=engine)
    tried = run("forget-user", "ana", "--dry-run")
    assert (refused.status, tried.out, statuses(engine)) == (2, "found=2\n", ["pending"] * 3)
    ran = run("forget-user", "ana", "--yes")

    assert (ran.status, ran.out) == (0, "found=2\ncancelled=2\nblanked=2\n")
    assert statuses(engine) == ["cancelled", "cancelled", "pending"]
    assert "ana" not in refused.err + ran.out + ran.err


@pytest.mark.parametrize("option", ["--yes", "--dry-run"])
def test_a_user_that_nobody_is_needs_attention(run, engine, option):
    """A name with a slip in it forgets nobody, and does not look like a success."""
    messages(engine, "pending")

    ran = run("forget-user", "nobody", option, on=engine)

    assert (ran.status, ran.err) == (1, "engagement: there is no message of a user of that name\n")
    assert statuses(engine) == ["pending"]


def test_old_finished_messages_are_pruned_in_batches(run, engine, monkeypatch):
    """Those older than asked for and finished, all of them, however many batches it takes."""
    monkeypatch.setattr("engagement.cli.blanking.BATCH", 2)
    messages(engine, *["sent"] * 5, "pending", "in_doubt", "sent")
    update(engine, "next_attempt_at = now() - interval '3 days'", "id < 8")

    refused = run("prune", "--older-than", "2d", on=engine)
    tried = run("prune", "--older-than", "2d", "--dry-run")
    assert (refused.status, tried.out, row(engine, 1).message_params) == (2, "found=5\n", {"name": "Ana"})
    ran = run("prune", "--older-than", "2d", "--yes")

    assert (ran.status, ran.out) == (0, "found=5\npruned=5\n")
    assert [row(engine, message_id).message_params for message_id in range(1, 9)] == [{}] * 5 + [{"name": "Ana"}] * 3
