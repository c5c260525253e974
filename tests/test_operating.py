"""Looking at messages and acting on them from a shell: honest, asked for, in batches, and without personal data."""

import json
import os
import pwd
import re
import shlex
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import click
import pytest
from conftest import new_message, queue, row
from shell import ROOT, talk, url_of
from sqlalchemy import text

from engagement import MessageStatus, migrations
from engagement._operating.inspection import pseudonym
from engagement.cli import acting, cli
from engagement.cli.connecting import Database
from engagement.messages import delivery_id, key_hash

TABLE = "engagement_message_queue"
PERSONAL = {
    "message_params": '{"name": "Ana Maria"}',
    "error_message": "no account for 447700900101",
    "provider_message_id": "wamid.HBgN447700900101",
}
SQL = {
    "pending": "status = 'pending'",
    "sending": "status = 'sending', attempt = 1, lease_expires_at = now() + interval '1 hour'",
    "sent": "status = 'sent', attempt = 1, sent_at = now()",
    "failed": "status = 'failed', attempt = 1, retry_count = 1",
    "expired": "status = 'expired'",
    "cancelled": "status = 'cancelled'",
    "in_doubt": "status = 'in_doubt', attempt = 1",
    "pruned": "status = 'failed', attempt = 1, destination_jid = NULL",
    "pruned in doubt": "status = 'in_doubt', attempt = 1, destination_jid = NULL",
    "expires soon": "expires_at = now() + interval '1 hour'",
}


def update(engine, assignments, where="true", **values):
    with engine.begin() as connection:
        connection.execute(text(f"UPDATE {TABLE} SET {assignments} WHERE {where}"), values)


def messages(engine, *states, **fields):
    """Queue a message in each state, and return their ids."""
    ids = queue(engine, *(new_message(f"user{number}", **fields) for number, _ in enumerate(states)))
    for message_id, state in zip(ids, states, strict=True):
        update(engine, SQL[state], f"id = {message_id}")
    return ids


def statuses(engine):
    with engine.connect() as connection:
        return list(connection.scalars(text(f"SELECT status FROM {TABLE} ORDER BY id")))


def facts(out):
    """Return what `name=value` lines say."""
    return dict(line.split("=", 1) for line in out.splitlines())


# Looking


def test_messages_are_listed_for_a_program_by_the_filters_given(run, engine):
    """The filters choose, the newest comes first, and lines have tabs between and say what the columns are."""
    messages(engine, "failed", "in_doubt", "pending")

    ran = run("list", "--status", "failed", "--status", "in_doubt", on=engine)

    header, *rows = [line.split("\t") for line in ran.out.splitlines()]
    assert (ran.status, header[:3]) == (0, ["id", "status", "message_type"])
    assert [each[:2] for each in rows] == [["2", "in_doubt"], ["1", "failed"]]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--user", "user1"], [2]),
        (["--type", "goodbye"], [3, 2, 1]),
        (["--type", "review"], []),
        (["--limit", "2"], [3, 2]),
        (["--limit", "2", "--before", "2"], [1]),
        (["--limit", "1", "--after", "1"], [2]),
        (["--created-since", "90m"], [3]),
        (["--created-until", "90m"], [2, 1]),
        (["--scheduled-since", "2026-03-01T12:00Z"], [3, 2]),
        (["--scheduled-until", "2026-03-01T09:00-03:00"], [1]),
    ],
)
def test_each_filter_of_a_list_reaches_the_queue(run, engine, options, expected):
    """Durations are counted back from now, and moments have an offset."""
    messages(engine, "pending", "pending", "pending")
    update(engine, "created_at = now() - interval '2 hours'", "id <= 2")
    update(engine, "scheduled_for = '2026-03-01 11:59:59Z'", "id = 1")

    listed = json.loads(run("list", "--json", *options, on=engine).out)["messages"]

    assert [message["id"] for message in listed] == expected


@pytest.mark.parametrize("moment", ["yesterday", "2026-03-01T12:00", "0001-01-01T00:00Z", "200000d"])
def test_a_moment_that_cannot_be_one_is_told(run, engine, moment):
    """A moment without an offset may mean any hour: it is refused."""
    ran = run("list", "--created-since", moment, on=engine)

    assert (ran.status, ran.out, ran.err.count("\n")) == (2, "", 1)
    assert "--created-since" in ran.err


@pytest.mark.parametrize("command", [["list"], ["list", "--json"], ["show", "1"], ["show", "1", "--json"]])
def test_what_is_personal_is_shown_only_on_demand(run, engine, command):
    """User, key, address, params, errors and the provider's id are hidden, or stand as what cannot be read back."""
    messages(engine, "failed")
    update(
        engine,
        "message_params = CAST(:message_params AS jsonb), error_message = :error_message,"
        " provider_message_id = :provider_message_id, user_id = 'ana.maria', history = jsonb_build_array("
        "jsonb_build_object('at', now(), 'attempt', 1, 'event', 'refused', 'reason', CAST(:error_message AS text))),"
        " destination_jid = '447700900101@s.whatsapp.net', idempotency_key = 'ana.maria:goodbye:2026-03-01'",
        **PERSONAL,
    )

    hidden = run(*command, on=engine)
    revealed = run(*command, "--reveal")

    assert (hidden.status, revealed.status) == (0, 0)
    assert not re.search(r"ana|Ana|447700900101|2026-03-01", hidden.out + hidden.err)
    assert pseudonym("ana.maria") in hidden.out
    assert "***01@s.whatsapp.net" in hidden.out
    assert "ana.maria" in revealed.out
    assert "447700900101@s.whatsapp.net" in revealed.out
    assert "no account for 447700900101" in revealed.out


def test_one_message_is_shown_by_id_or_key_with_its_timeline(run, engine):
    """A number is an id, anything else a key, and `key:` makes a key of a number."""
    key = new_message("user0").key
    queue(engine, new_message("user0", idempotency_key="2"), new_message("user0"))

    shown = json.loads(run("show", "2", "--json", on=engine).out)

    assert shown["id"] == 2
    assert (shown["key_hash"], shown["delivery_id"]) == (key_hash(key), str(delivery_id(key)))
    assert [moment["what"] for moment in shown["timeline"]] == ["queued", "due"]
    assert datetime.fromisoformat(shown["created_at"]).tzinfo == UTC
    assert facts(run("show", key).out.partition("\n\n")[0])["id"] == "2"
    assert facts(run("show", "key:2").out.partition("\n\n")[0])["id"] == "1"
    assert run("show", "key:2").out.splitlines()[-2].split("\t")[1] == "queued"


@pytest.mark.parametrize(
    "command",
    [
        *(
            ["list", "--user", ""],
            ["list", "--type", " "],
            ["list", "--before", "9" * 20],
            ["list", "--after", "9" * 20],
        ),
        *(["cancel", "--user", "", "--yes"], ["forget-user", "", "--yes"], ["retry", "--type", "", "--dry-run"]),
        *(["cancel", "9" * 5000], ["list", "--before", "9" * 5000], ["show", ""]),
    ],
)
def test_what_no_message_can_have_is_told_on_one_line(run, engine, command):
    """It is no traceback, and nothing is done."""
    messages(engine, "pending")

    ran = run(*command, on=engine)

    assert (ran.status, ran.out, ran.err.count("\n")) == (2, "", 1)
    assert statuses(engine) == ["pending"]


@pytest.mark.parametrize("which", ["3", "user9:goodbye:2026-03-01", "0", "9" * 20, "9" * 5000])
def test_a_message_that_is_not_there_is_told(run, engine, which):
    """It is no traceback, and not status 0."""
    ran = run("show", which, on=engine)

    assert ran.status in {1, 2}
    assert (ran.out, ran.err.count("\n")) == ("", 1)


@pytest.mark.parametrize("command", [["list"], ["list", "--json"], ["show", "1"], ["show", "1", "--json"]])
@pytest.mark.parametrize("option", [[], ["--reveal"]])
def test_what_somebody_wrote_into_a_row_cannot_command_the_terminal(run, engine, command, option):
    """Escape sequences, tabs and line ends of a row are neither obeyed nor taken for those of the output."""
    messages(engine, "failed")
    plain = run(*command, *option, on=engine)
    update(
        engine,
        "error_message = :bad, message_key = :bad, claimed_by = :bad,"
        " message_params = jsonb_build_object('a', CAST(:bad AS text)), history = jsonb_build_array("
        "jsonb_build_object('at', now(), 'attempt', 1, 'event', CAST(:bad AS text), 'reason', CAST(:bad AS text)))",
        bad="a\x1b[2Jb\x9bc\u202ed\te",
    )

    ran = run(*command, *option)

    assert ran.status == 0
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", ran.out)
    if "--json" not in command:
        assert len(ran.out.splitlines()) == len(plain.out.splitlines())
        assert ran.out.count("\t") == plain.out.count("\t")
        assert "a [2Jb c d e" in ran.out
    elif option:
        told = json.loads(ran.out)
        assert (told.get("messages") or [told])[0]["error_message"] == "a\x1b[2Jb\x9bc\u202ed\te"


def test_a_list_fits_a_terminal(engine):
    """On 80 columns each message has one line, what is long ends in an ellipsis, and how to see more is said."""
    messages(engine, *["failed"] * 3, message_type="weekly_review")
    update(engine, "error_message = :long", long="the provider is down " * 9)

    shown = re.sub(r"\x1b\[[0-9;]*m", "", talk("list", "--limit", "2", on=engine, answer="").out)

    lines = shown.splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.split()[0] for line in lines if "weekly_review" in line] == ["3", "2"]
    assert "the provider" in shown
    assert lines[-1].endswith("--before 2")


def test_a_list_on_a_terminal_never_shortens_what_names_a_message(engine):
    """An id and a status are for the next command; types, users and errors give way."""
    messages(engine, "in_doubt", message_type="a_type_of_message_with_a_long_name_" + "x" * 20)
    update(engine, "id = 9223372036854775807, user_id = :long, error_message = :long", long="long " * 40)

    shown = re.sub(r"\x1b\[[0-9;]*m", "", talk("list", "--reveal", on=engine, answer="").out)

    assert max(map(len, shown.splitlines())) <= 80
    assert re.search(r"^9223372036854775807 +in_doubt +a_type\w*… +long[\w ]*… .* +long[\w ]*… *$", shown, re.MULTILINE)


def test_a_person_is_shown_a_message_as_a_table(engine):
    """What is long is wrapped, not lost; times say that they are UTC."""
    messages(engine, "failed")
    update(engine, "error_message = :long", long=" ".join(f"n{number}" for number in range(60)))

    shown = talk("show", "1", on=engine, answer="").out

    assert max(map(len, re.sub(r"\x1b\[[0-9;]*m", "", shown).splitlines())) <= 80
    assert re.search(r"\bn58\b.*\bn59\b", shown, re.DOTALL)
    assert re.search(r"\d\d:\d\d:\d\dZ\s+queued", shown)


def test_status_tells_what_a_watchman_asks(run, engine):
    """Due, doubts, leases, rates and sizes stand beside the counts."""
    messages(engine, "pending", "sent", "in_doubt", "sending", "sending")
    update(engine, "lease_expires_at = now() - interval '1 second'", "id = 4")
    update(engine, "next_attempt_at = now() - interval '1 hour'", "id = 3")

    told = json.loads(run("status", "--json", on=engine).out)

    assert (told["due"], told["leases_expired"], told["pending_in_doubt"]) == (1, 1, 0)
    assert 3600 <= told["oldest_in_doubt_seconds"] < 3700
    assert (told["queued_per_minute"], told["sent_per_minute"]) == (round(5 / 60, 2), round(1 / 60, 2))
    assert told["table_bytes"] > 0
    assert told["index_bytes"] > 0
    assert {"dead_rows", "last_vacuum"} <= told.keys()


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
        connection.execute(text(f"ALTER TABLE {TABLE} ADD CONSTRAINT no_more CHECK (id <> 4 OR status = 'pending')"))
    try:
        ran = run("cancel", "--all", "--yes", on=engine)
    finally:
        with engine.begin() as connection:
            connection.execute(text(f"ALTER TABLE {TABLE} DROP CONSTRAINT no_more"))

    assert ran.status == 3
    assert "ended early, 2 messages cancelled\n" in ran.err
    assert statuses(engine) == ["cancelled"] * 2 + ["pending"] * 4


def test_an_interruption_tells_what_was_done(engine):
    """Ctrl-C leaves with 130, between two batches or within one; what was done stays done, and is told."""
    messages(engine, *["pending"] * (acting.BATCH * 3))
    with engine.begin() as blocking:
        last = acting.BATCH * 3
        blocking.execute(text(f"SELECT 1 FROM {TABLE} WHERE id = {last} FOR UPDATE"))

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


# Everywhere


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
    ],
)
def test_every_command_honors_the_schema(run, empty_engine, command):
    """With `--schema` it finds the table that is off the search path; without, it says what to run."""
    migrations.upgrade(empty_engine, schema="messaging")
    with empty_engine.begin() as connection:
        connection.execute(
            text(
                f"INSERT INTO messaging.{TABLE} (user_id, message_type, message_key, destination, destination_jid,"
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
        (["re"], {"reschedule", "retry", "resolve"}),
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

    assert len(typed) == 15
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
