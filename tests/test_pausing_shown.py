"""Pauses are made, lifted and shown by the command, on the page and in the metrics."""

import json
from datetime import UTC, datetime

import pytest
from admin_page import admin_of, fields_of
from conftest import execute, new_message, queue
from sqlalchemy.orm import Session

from engagement import Pauses
from engagement._watching.metrics import QueueReader

LATER = datetime(2100, 1, 1, 9, tzinfo=UTC)


def pause(engine, reason: str = "wrong wording", **scope):
    with Session(engine) as session, session.begin():
        return Pauses(session).pause(reason, **scope)


def in_force(engine) -> list:
    with Session(engine) as session:
        return Pauses(session).in_force()


# The command


def test_the_command_pauses_and_resumes(run, engine):
    """It says what, why, by whom and until when; a pause that is not there is named by the exit status."""
    made = run(
        "pause", "--type", "campaign", "--until", "2100-01-01T09:00Z", "--reason", "wrong wording", "--by", "ana",
        on=engine,
    )  # fmt: skip
    assert made.status == 0
    assert made.out.startswith("paused: type campaign since 20")
    assert made.out.endswith("Z until 2100-01-01 09:00Z, by ana: wrong wording\n")
    written = json.loads(run("pause", "--reason", "all", "--json").out)
    assert (written["scope"], written["name"], written["reason"], written["until"]) == ("everything", None, "all", None)
    assert run("pause", "--sender", "main", "--reason", "x").status == 0

    assert run("resume")[:2] == (0, "resumed: everything\n")
    assert run("resume", "--json").status == 1
    assert run("resume", "--type", "campaign").err == "still paused: sender main\n"
    assert run("resume", "--type", "campaign")[:2] == (1, "was not paused: type campaign\n")
    assert json.loads(run("resume", "--sender", "main", "--json").out) == {"resumed": True, "still_paused": []}
    assert in_force(engine) == []


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["pause"], "Missing option '--reason'"),
        (["pause", "--reason", ""], "is empty"),
        (["pause", "--reason", "x", "--until", "2020-01-01T00:00Z"], "until: has passed"),
        (["pause", "--reason", "x", "--type", "Campaign"], "must be a-z"),
        (["pause", "--reason", "x", "--type", "otp", "--sender", "main"], "Say --type or --sender"),
        (["resume", "--type", "otp", "--sender", "main"], "Say --type or --sender"),
        (["pause", "--reason", "x", "--sender", "x" * 201], "more than 200"),
    ],
)
def test_the_command_refuses_half_a_request(run, engine, arguments, problem):
    """On one line, and nothing is paused."""
    said = run(*arguments, on=engine)
    assert (said.status, problem in said.err) == (2, True)
    assert in_force(engine) == []


def test_whoever_wonders_is_told(run, engine):
    """`status`, `show` and `list` say it; of a message only what may hold it back, and only while it is pending."""
    waiting, other, over = queue(
        engine,
        *(new_message(str(n), message_type=of) for n, of in enumerate(["campaign", "otp", "campaign"])),
    )
    execute(engine, "UPDATE engagement_message_queue SET status = 'cancelled' WHERE id = :id", id=over)
    assert json.loads(run("status", "--json", on=engine).out)["paused"] is None
    pause(engine, "call +55 11 98765-4321", message_type="campaign", by="ana")
    pause(engine, "banned", sender="main", until=LATER)

    shown = json.loads(run("status", "--json").out)["paused"]
    assert "by ana: call ***" in shown
    assert "; type campaign" in shown or shown.startswith("type campaign")
    paused = {each: json.loads(run("show", str(each), "--json").out)["paused"] for each in (waiting, other, over)}
    assert "type campaign since" in paused[waiting]
    assert "sender main since" in paused[waiting]
    assert paused[other].startswith("sender main since")
    assert paused[other].endswith("until 2100-01-01 09:00Z: banned")
    assert paused[over] is None
    listed = json.loads(run("list", "--json").out)["messages"]
    assert {each["id"]: each["paused"] for each in listed} == paused


# The page


def test_the_page_pauses_resumes_and_shows(engine):
    """The form's words are kept, with the visitor's name; every page that shows waiting messages says so."""
    (message_id,) = queue(engine, new_message(message_type="campaign"))
    with admin_of(engine) as client:
        assert "Nothing is paused." in client.get("pauses").text
        fields = fields_of(client.get("pauses").text)
        page = client.post(
            "pauses",
            data=fields | {"type": "campaign", "until": "2100-01-01T09:00", "reason": "<wrong> wording"},
            follow_redirects=True,
        )
        assert "Paused: type campaign." in page.text
        [made] = in_force(engine)
        assert (made.name, made.reason, made.by, made.until) == ("campaign", "<wrong> wording", "anyone", LATER)
        for path in ("", "messages", f"messages/{message_id}", "pauses"):
            assert "by anyone: &lt;wrong&gt; wording" in client.get(path).text, path

        token = {"csrftoken": fields["csrftoken"]}
        page = client.post("pauses/resume", data=token | {"type": "campaign"}, follow_redirects=True)
        assert "Resumed: what is due is sent." in page.text
        page = client.post("pauses/resume", data=token | {"type": "campaign"}, follow_redirects=True)
        assert "It was not paused any more." in page.text
    assert in_force(engine) == []


def test_the_page_refuses_bad_forms_and_keeps_the_rest(engine):
    """The field is named, and the person need not type the others again."""
    with admin_of(engine) as client:
        fields = fields_of(client.get("pauses").text)
        for given, problem in (
            ({"reason": ""}, "The reason is empty."),
            ({"reason": "x", "type": "No Type"}, "The type must be"),
            ({"reason": "x", "type": "otp", "sender": "main"}, "The sender is given beside"),
            ({"reason": "x", "until": "soon"}, "The time is no date and time."),
            ({"reason": "x", "until": "2020-01-01T00:00"}, "The time has passed."),
        ):
            page = client.post("pauses", data=fields | given)
            assert (page.status_code, problem in page.text) == (422, True), given
        assert 'value="2020-01-01T00:00"' in page.text
        assert client.post("pauses", data={"reason": "x"}).status_code == 403
        resume = {"csrftoken": fields["csrftoken"], "type": "otp", "sender": "main"}
        assert client.post("pauses/resume", data=resume).status_code == 422
    assert in_force(engine) == []


def test_who_may_only_look_pauses_nothing(engine):
    """They see the pauses, without form and button; a form of their own is refused."""
    pause(engine, "warned", sender="main")
    signed_alike = {"secret_key": "a" * 32}  # The token of the other page counts here: only `may_act` refuses.
    with admin_of(engine, may_act=False, **signed_alike) as client:
        page = client.get("pauses").text
        assert "sender main since" in page
        assert "Pause sending" not in page
        assert "Resume" not in page
        with admin_of(engine, **signed_alike) as other:
            token = fields_of(other.get("pauses").text)
            cookies = dict(other.cookies)
        client.cookies.update(cookies)
        assert client.post("pauses", data=token | {"reason": "x"}).status_code == 403
        assert client.post("pauses/resume", data=token | {"sender": "main"}).status_code == 403
    assert len(in_force(engine)) == 1


# The metrics


def test_the_pauses_in_force_are_a_metric(engine):
    """One that is over counts no more."""

    def value() -> float:
        return {metric.name: number for metric, _, number in QueueReader(engine).read()}["engagement.paused"]

    assert value() == 0
    pause(engine)
    pause(engine, message_type="otp")
    assert value() == 2
    execute(engine, "UPDATE engagement_pause SET until = now() - interval '1 second' WHERE scope = 'type'")
    assert value() == 1
