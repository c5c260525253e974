"""The commands that only look: lists, one message with its timeline, and the status of the queue."""

import json
import re
from datetime import UTC, datetime

import pytest
from by_hand import update
from commands import facts, messages, statuses
from conftest import new_message, queue
from shell import talk

from engagement._operating.masking import pseudonym
from engagement.messages import delivery_id, key_hash

PERSONAL = {
    "message_params": '{"name": "Ana Maria"}',
    "error_message": "no account for 447700900101",
    "provider_message_id": "wamid.HBgN447700900101",
}


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
        *(["suppress", "", "--reason", "x"], ["suppress", "1@lid", "--reason", ""], ["suppressed", "", "--reveal"]),
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
    assert (told["queued_in_1_min"], told["sent_in_5_min"], told["done_in_seconds"]) == (5, 1, 300)
    assert told["table_bytes"] > 0
    assert told["index_bytes"] > 0
    assert {"dead_rows", "last_vacuum"} <= told.keys()
