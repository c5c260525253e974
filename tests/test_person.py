"""Why somebody got a message, or none: how each stands in a sentence, and all of a person from one field."""

import json
from datetime import UTC, timedelta

import pytest
from admin_page import admin_of, change
from by_hand import NOON, update
from conftest import new_message, queue
from sqlalchemy.orm import Session
from test_timeline import act, deliver

from engagement import (
    EngagementMessageRepository,
    InDoubt,
    InvalidMessage,
    NotSent,
    Postpone,
    Receipt,
    Refused,
    Sent,
    Withdraw,
    process_message_queue,
)
from engagement._operating.person import find_people
from engagement._operating.standing import standing
from engagement._operating.timeline import timeline
from engagement.suppression import SuppressionList

A_DAY = timedelta(days=1)
LATER = NOON + 999 * A_DAY


def jid_of(user_id):
    return new_message(user_id).destination_jid


def stands(engine, message_id=1, now=NOON):
    """Return the sentence, with each moment as its time of day."""
    with Session(engine) as session:
        message = EngagementMessageRepository(session).get_message(message_id)
        return standing(message, timeline(message), now=now, at=lambda moment: f"{moment.astimezone(UTC):%H:%M}")


# How a message stands


def test_one_that_waits_says_until_when_and_after_what(engine):
    """So it does for its first try, and for a later one after the same trouble twice."""
    queue(engine, new_message(scheduled_for=NOON + A_DAY, expires_at=NOON + 2 * A_DAY))
    assert stands(engine) == "Waits until 12:00; it expires at 12:00."

    update(engine, "next_attempt_at = now(), expires_at = NULL")
    deliver(engine, NotSent("HTTP 503"), NotSent("HTTP 503"))
    update(engine, "next_attempt_at = :at", at=NOON + A_DAY)
    assert stands(engine) == "Waits until 12:00 for its third try, after “HTTP 503” twice."


def test_a_postponed_one_gives_the_reason(engine):
    """A postponement is no failure, and the latest reason counts."""
    queue(engine, new_message())
    deliver(engine, NotSent("HTTP 503"), Postpone(LATER, "quiet hours"))

    assert stands(engine) == "Waits until 12:00 for its third try, after “quiet hours”."


def test_a_due_one_says_that_nobody_takes_it_and_why(engine):
    """The transport's reason is said as long as it is the latest word."""
    queue(engine, new_message(scheduled_for=NOON))
    assert stands(engine, now=NOON) == "Has been due since 12:00; no worker has taken it."

    update(engine, "next_attempt_at = now()")

    class Silent:
        why_not_ready = "not paired"

        def ready(self):
            return False

        def send(self, message):
            raise AssertionError(message)

    process_message_queue(engine, Silent())
    update(engine, "next_attempt_at = :at", at=NOON)
    assert stands(engine) == (
        "Has been due since 12:00; no worker has taken it, since its transport is not ready: “not paired”."
    )

    update(engine, "next_attempt_at = now()")
    deliver(engine, NotSent("HTTP 503"))
    update(engine, "next_attempt_at = :at", at=NOON)
    assert stands(engine) == "Has been due since 12:00, after “HTTP 503”; no worker has taken it."


def test_one_in_hand_says_by_whom_and_until_when(engine):
    """After the end of its lease it says that its worker is lost, and who recovers it."""
    queue(engine, new_message())
    update(engine, "status = 'sending', attempt = 2, claimed_by = 'w/1', lease_expires_at = :at", at=NOON)

    before, after = stands(engine, now=NOON - A_DAY), stands(engine, now=NOON)

    assert before == "Is being sent, its second try, by w/1, which holds it until 12:00."
    assert after == "Lost its worker, w/1, which held it until 12:00; the next worker that looks recovers it."


def test_each_end_is_told(engine):
    """With the reason of the last try, the person who decided, and whether it may be tried again."""
    ids = queue(engine, *(new_message(f"u{number}") for number in range(7)))
    deliver(engine, Sent(), Refused("no such number"), InDoubt("time-out"), Withdraw("opted out"), NotSent("down"))
    update(engine, "sent_at = :at", "status = 'sent'", at=NOON)
    update(engine, "status = 'failed', retry_count = 3", "id = 5")
    act(engine, "cancel_message", 6, "moved away", by="ana")
    update(engine, "status = 'expired'", "id = 7")

    said = [stands(engine, message_id) for message_id in ids]

    assert said[:3] == [
        "Was sent at 12:00.",
        "Was refused: “no such number”; it is not tried again by itself.",
        "May have left, after “time-out”; it is not sent again before somebody, or a receipt, resolves it.",
    ]
    assert said[3].startswith("Was withdrawn when its time came at ")
    assert said[3].endswith(": “opted out”.")
    assert said[4] == "Failed after 3 tries: “down”; it is not tried again by itself."
    assert said[5].endswith(": “by ana: moved away”.")
    assert said[6] == "Expired, before it was sent."


def test_what_a_provider_said_later_is_told(engine):
    """Delivered and read of one that was sent, and undeliverable of another."""
    queue(engine, new_message("a"), new_message("b"))
    deliver(engine, Sent("x-1"), Sent("x-2"))
    update(engine, "sent_at = :at", at=NOON)
    read = Receipt(event="read", at=NOON + timedelta(minutes=5), provider_message_id="x-1", provider="test")
    given_up = Receipt(
        event="undeliverable", at=NOON + timedelta(minutes=7), provider_message_id="x-2", reason="left", provider="test"
    )
    with Session(engine) as session, session.begin():
        EngagementMessageRepository(session).record_receipts([read, given_up])

    assert stands(engine) == "Was sent at 12:00, delivered at 12:05, read at 12:05."
    assert stands(engine, 2).startswith("Was sent, and its provider gave it up at 12:07: “")
    assert "left" in stands(engine, 2)


def test_a_doubt_and_a_blanking_are_not_passed_over(engine):
    """An idempotent transport tries a doubt again, and a forgotten message has ended without its reasons."""
    queue(engine, new_message("a", scheduled_for=LATER), new_message("b"))
    update(engine, "has_doubt = true, attempt = 1", "id = 1")
    act(engine, "forget_user", "b")

    assert stands(engine) == "Waits until 12:00 for its second try; an earlier try may have left."
    assert stands(engine, 2).endswith("; what was personal of it is gone.")


def test_what_is_personal_is_masked_in_it(engine):
    """A provider's text names the number: the sentence does not, unless the timeline reveals it."""
    queue(engine, new_message("ana"))
    deliver(engine, Refused(f"no account for {jid_of('ana')}"))

    assert jid_of("ana") not in stands(engine)


# A person


def people(engine, sought, **options):
    with Session(engine) as session:
        return find_people(session, sought, **options)


@pytest.fixture(name="ana")
def _ana(engine):
    """Three messages of ana's, one of which failed, and one of bia's."""
    queue(
        engine,
        new_message("ana", message_type="welcome", scheduled_for=NOON),
        new_message("ana", message_type="review", scheduled_for=LATER - A_DAY, idempotency_key="a:key"),
        new_message("ana", message_type="goodbye", scheduled_for=LATER),
        new_message("bia", scheduled_for=NOON),
    )
    change(engine, 1, status="failed", attempt=1, retry_count=1)
    return engine


@pytest.mark.parametrize("sought", ["ana", " ana ", "2", "a:key", jid_of("ana"), "+" + jid_of("ana").split("@")[0]])
def test_a_person_is_found_by_any_of_their_names(ana, sought):
    """A user id, a message's number or key, an address, a telephone number: each exactly."""
    (found,) = people(ana, sought)

    assert found.user_id == "ana"
    assert found.counts == {"failed": 1, "pending": 2}
    assert [message.id for message in found.latest] == [3, 2, 1]
    assert found.upcoming.id == 2


@pytest.mark.parametrize("sought", ["an", "anab", "99", "key", "5511999999998", "x@y", "9" * 30])
def test_nobody_is_found_by_a_part_of_a_name(ana, sought):
    """Nor by what nobody can have."""
    assert people(ana, sought) == []


@pytest.mark.parametrize("sought", ["", " ", "9" * 5000, "a\x00b"])
def test_no_name_at_all_is_told_before_the_database_is_asked(ana, sought):
    """It names the field."""
    with pytest.raises(InvalidMessage, match=r"^sought: "):
        people(ana, sought)


def test_all_who_share_an_address_are_found(ana):
    """A family has one telephone."""
    update(ana, "destination_jid = :jid", jid=jid_of("bia"))

    assert {person.user_id for person in people(ana, jid_of("bia"))} == {"ana", "bia"}


def test_a_number_may_be_a_user_and_a_message(engine):
    """Hosts number their users: both are returned, the user first."""
    queue(engine, new_message("ana"), new_message("1"))

    assert [person.user_id for person in people(engine, "1")] == ["1", "ana"]


def test_a_suppressed_address_is_told_with_the_person(ana):
    """Nothing is sent to it, which is why this person gets nothing."""
    with Session(ana) as session, session.begin():
        SuppressionList(session).suppress(jid_of("ana"), "answered STOP")

    (found,) = people(ana, "ana")

    assert found.suppressed[jid_of("ana")].reason == "answered STOP"
    assert people(ana, "bia")[0].suppressed == {}


# As it is shown


def test_the_command_shows_a_person_masked_unless_revealed(run, ana):
    """All of their messages in sentences, what is next, and nothing that names them."""
    shown = run("person", "ana", on=ana)
    found = json.loads(run("person", jid_of("ana"), "--reveal", "--json").out)["people"][0]

    assert shown.status == 0
    assert "ana" not in shown.out
    assert "1 failed" in shown.out
    assert "Next: Waits until 2033-08-15 12:00:00Z." in shown.out
    assert found["user"] == "ana"
    assert [message["id"] for message in found["messages"]] == [3, 2, 1]


def test_the_command_says_that_nobody_is_there(run, ana):
    """It is no empty table."""
    ran = run("person", "nobody", on=ana)

    assert (ran.status, ran.out) == (1, "")
    assert ran.err == "engagement: nothing was ever queued for such a person\n"


def test_show_begins_with_the_sentence(run, ana):
    """For a program it is the first fact."""
    assert run("show", "2", on=ana).out.startswith("standing=Waits until 2033-08-15 12:00:00Z.\n")


def test_the_page_leads_from_a_message_to_its_person_and_names_nobody(ana):
    """The address of the page holds a message's number, and no user id."""
    with Session(ana) as session, session.begin():
        SuppressionList(session).suppress(jid_of("ana"), "answered STOP")
    change(
        ana,
        1,
        history=f'[{{"at": "2026-03-01T12:00Z", "attempt": 1, "event": "refused", "reason": "{jid_of("ana")}"}}]',
    )
    with admin_of(ana) as admin:
        message = admin.get("messages/2").text
        person = admin.get("people/2").text
        nobody = admin.get("people/99")

    assert 'href="/queue/people/2"' in message
    assert "Waits until 2033-08-15 12:00:00." in message
    assert "Nothing is sent to ***" in person
    assert "Waits until 2033-08-15 12:00:00." in person
    assert "ana" not in person
    assert "Was refused: “***”" in person
    assert jid_of("ana").split("@")[0] not in person
    assert nobody.status_code == 404


def test_the_field_opens_a_message_or_a_person_or_offers_both(engine):
    """A number that is a message's and a user's shows the user, and leads to the message."""
    queue(engine, new_message("ana"), new_message("1"))
    with admin_of(engine) as admin:

        def find(sought):
            return admin.get("people", params={"q": sought}, follow_redirects=True)

        assert find("2").url.path == "/queue/messages/2"
        assert find("ana").url.path == "/queue/people"
        both = find("1")

    assert both.url.path == "/queue/people"
    assert 'href="/queue/messages/1"' in both.text


def test_a_person_is_revealed_on_demand_only_and_that_is_logged(ana, caplog):
    """As on every other page."""
    caplog.set_level("INFO", logger="engagement")
    with admin_of(ana, may_reveal=True) as admin:
        hidden, shown = admin.get("people/1").text, admin.get("people/1", params={"reveal": "1"}).text

    assert ">ana<" not in hidden
    assert ">ana<" in shown
    assert "action=reveal message_id=3,2,1" in caplog.text
