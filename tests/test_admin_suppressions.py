"""The suppression list on the admin page: what is on it, whether an address is, and how that is changed."""

import logging
import re
from datetime import UTC, datetime, timedelta
from html import unescape

import pytest
from admin_page import admin_of, change, fields_of, put, said
from conftest import execute, new_message, queue
from sqlalchemy import create_engine, text
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from engagement import EngagementMessageRepository, SuppressionList
from engagement.admin import suppressions
from engagement.messages import address_hash

ANA, BOB = "5511999990001@s.whatsapp.net", "5511999990002@s.whatsapp.net"
MASKED, PHONE = "***01@s.whatsapp.net", "5511988887777"


@pytest.fixture(scope="module", name="served")
def _served(shared_engine):
    with admin_of(shared_engine, authentication=lambda _: "Ana Souza", secret_key="s") as client:
        yield client


@pytest.fixture(name="page")
def _page(served, engine):
    """A browser of its own, and an empty queue and list."""
    served.cookies.clear()
    return served


@pytest.fixture(name="message_id")
def _message_id(engine) -> int:
    """A message to Ana."""
    (message_id,) = queue(engine, new_message("ana", destination_jid=ANA))
    return message_id


def suppress(engine, address: str, reason: str = "answered STOP", until=None) -> None:
    with Session(engine) as session, session.begin():
        SuppressionList(session).suppress(address, reason, until=until)


def found(engine, address: str = ANA):
    with Session(engine) as session:
        return SuppressionList(session).find(address)


def ask(page, deed: str, **named) -> dict[str, str]:
    """Return the form of the question."""
    return fields_of(page.get(f"suppressed/{deed}", params=named).text)


def send(page, deed: str, fields: dict[str, str], **filled: str):
    return page.post(f"suppressed/{deed}", data=fields | filled, follow_redirects=True)


def offered(text_of_page: str) -> list[str]:
    return re.findall(r'href="/queue/suppressed/([a-z]+)\?', text_of_page)


# What is on it


def test_the_list_shows_pseudonyms_the_newest_first(page, engine):
    """With since, until and reason; no address, no hash, no number in a reason."""
    for day, address, reason in ((1, ANA, f"wrote from {PHONE}"), (2, BOB, "moved")):
        suppress(engine, address, reason)
        since = datetime(2026, 1, day, tzinfo=UTC)
        sql = "UPDATE engagement_suppression SET since = :since WHERE address_hash = :hash"
        execute(engine, sql, since=since, hash=address_hash(address))

    shown = page.get("suppressed").text

    assert re.findall(r'data-label="Reason">([^<]*)<', shown) == ["moved", "wrote from ***"]
    assert re.findall(r'data-label="Since"><time [^>]*>([^<]*)<', shown) == [
        "2026-01-02 00:00:00",
        "2026-01-01 00:00:00",
    ]
    assert re.findall(r'data-label="Until">([^<]*)<', shown) == ["for good"] * 2
    names = re.findall(r'data-label="Entry">([^<]*)<', shown)
    assert [len(name) for name in names] == [8, 8]
    assert [secret for secret in (PHONE, ANA, address_hash(ANA)[:8], address_hash(BOB)[:8]) if secret in shown] == []


def test_pages_of_the_list_hold_each_entry_once(page, engine, monkeypatch):
    """To the oldest and back, with their place and number; beyond the end it says so."""
    monkeypatch.setattr(suppressions, "PAGE", 2)
    for number in range(5):
        suppress(engine, f"551199999000{number}@s.whatsapp.net", f"r{number}")
    seen, address = [], "suppressed"
    while address:
        shown = page.get(address).text
        seen.append(re.findall(r'data-label="Reason">([^<]*)<', shown))
        older = re.search(r'rel="next" href="([^"]*)"', shown)
        address = older and f"suppressed{unescape(older[1])}"

    assert sorted(reason for each in seen for reason in each) == [f"r{number}" for number in range(5)]
    assert [len(each) for each in seen] == [2, 2, 1]
    assert "5 to 5 of 5" in shown
    newer = re.search(r'rel="prev" href="([^"]*)"', shown)[1]
    assert re.findall(r'data-label="Reason">([^<]*)<', page.get(f"suppressed{unescape(newer)}").text) == seen[1]
    assert "No entry is so old." in page.get("suppressed?skip=99").text


def test_one_address_is_found_exactly(page, engine):
    """Masked, with its entry; another one is not on the list; what is no address is told."""
    suppress(engine, ANA, f"wrote from {PHONE}")

    on_it, not_on_it = (page.get("suppressed", params={"address": address}).text for address in (ANA, BOB))

    assert f"<strong>{MASKED}</strong>" in on_it
    assert "Nothing is sent to its address" in on_it
    assert "wrote from ***" in on_it
    assert offered(on_it) == ["unsuppress"]
    assert "Its address is not on the suppression list." in not_on_it
    assert offered(not_on_it) == ["suppress"]
    for asked, problem in (
        ({"address": "ana"}, "The address "),
        ({"skip": "x"}, "The number of newer entries must be"),
    ):
        told = page.get("suppressed", params=asked)
        assert (told.status_code, problem in told.text) == (200, True)


def test_what_is_personal_is_revealed_on_demand_only_and_that_is_logged(engine, caplog, message_id):
    """By the names that the list shows, since nobody else may know the addresses."""
    caplog.set_level(logging.INFO, "engagement")
    suppress(engine, ANA, f"wrote from {PHONE}")
    with admin_of(engine, may_reveal=True) as page:
        name = re.search(r'data-label="Entry">([^<]*)<', page.get("suppressed").text)[1]
        hidden = [page.get(path).text for path in (f"messages/{message_id}", "suppressed", f"people/{message_id}")]
        asked = page.get(f"suppressed/unsuppress?message={message_id}&reveal=1").text
        assert caplog.messages == []
        listed = page.get("suppressed?reveal=1").text
        one = page.get("suppressed", params={"address": ANA, "reveal": "1"}).text

    assert [PHONE in each for each in (*hidden, asked)] == [False] * 4
    assert PHONE in listed
    assert address_hash(ANA) in listed
    assert PHONE in one
    assert caplog.messages == [f"engagement.admin action=reveal entry={name} verdict=revealed by='anyone'"] * 2


@pytest.mark.parametrize("until", [None, datetime(2099, 1, 2, tzinfo=UTC)])
def test_a_message_says_whether_its_address_is_suppressed(page, engine, message_id, until):
    """Since when, until when and why, with the buttons that fit; and nothing of it once it was forgotten."""
    assert "Its address is not on the suppression list." in page.get(f"messages/{message_id}").text
    suppress(engine, ANA, f"wrote from {PHONE}", until)

    shown = page.get(f"messages/{message_id}").text

    told = " ".join(re.search(r'class="alert alert-warning suppressed">(.*?)</div>', shown, re.DOTALL)[1].split())
    since = f"{found(engine).since.astimezone(UTC):%Y-%m-%d %H:%M:%S}"
    end = "until 2099-01-02 00:00:00" if until else "for good"
    assert told == f"Nothing is sent to its address {end}, since {since}: wrote from ***"
    assert offered(shown) == (["unsuppress", "suppress"] if until else ["unsuppress"])
    with Session(engine) as session, session.begin():
        EngagementMessageRepository(session).forget_user("ana")
    forgotten = page.get(f"messages/{message_id}").text
    assert (offered(forgotten), "suppress" in forgotten.partition("<main")[2]) == ([], False)


# What is done


def test_a_message_s_address_is_suppressed_and_unsuppressed(page, engine, message_id, caplog):
    """After a question, which changes nothing; the reason says who, and so does the log."""
    caplog.set_level(logging.INFO, "engagement")
    fields = ask(page, "suppress", message=message_id)
    assert found(engine) is None
    told = send(page, "suppress", fields, reason="called us")
    assert (said(told), told.url.path) == (
        "Suppressed. Nothing is sent to the address any more.",
        f"/queue/messages/{message_id}",
    )
    assert (found(engine).reason, found(engine).until) == ("called us (by Ana Souza)", None)

    fields = ask(page, "unsuppress", message=message_id)
    assert found(engine) is not None
    assert said(send(page, "unsuppress", fields)) == "Unsuppressed. Messages may be sent to the address again."
    assert found(engine) is None
    assert caplog.messages == [
        f"engagement.admin action={deed} message_id={message_id} verdict={deed}ed by='Ana Souza'"
        for deed in ("suppress", "unsuppress")
    ]


def test_an_address_that_is_typed_is_unsuppressed(page, engine, caplog):
    """The log has the name of its entry, and not the address."""
    caplog.set_level(logging.INFO, "engagement")
    suppress(engine, ANA)
    name = re.search(r'data-label="Entry">([^<]*)<', page.get("suppressed").text)[1]

    told = send(page, "unsuppress", ask(page, "unsuppress", address=ANA))

    assert told.url.path == "/queue/suppressed"
    assert found(engine) is None
    assert caplog.messages == [f"engagement.admin action=unsuppress entry={name} verdict=unsuppressed by='Ana Souza'"]


def test_an_end_is_of_the_pages_time_zone_and_the_later_counts(page, engine):
    """An address that is suppressed for a while can be suppressed for longer, and not for less."""
    send(page, "suppress", ask(page, "suppress", address=ANA), reason="away", until="2099-01-02T03:04")
    assert found(engine).until == datetime(2099, 1, 2, 3, 4, tzinfo=UTC)

    send(page, "suppress", ask(page, "suppress", address=ANA), reason="again", until="2098-01-01T00:00")
    assert found(engine).until == datetime(2099, 1, 2, 3, 4, tzinfo=UTC)


@pytest.mark.parametrize(
    ("filled", "problem"),
    [
        ({"reason": " "}, "The reason is empty."),
        ({"reason": "x" * 500}, "The reason has 500 characters, more than 485."),
        ({"reason": "a\x00b"}, "The reason holds a control character"),
        ({"reason": "away", "until": "soon"}, "The end is no date and time."),
        ({"reason": "away", "until": "2020-01-01T00:00"}, "The end is over already."),
    ],
)
def test_what_cannot_be_is_asked_for_again(page, engine, filled, problem):
    """With what was typed; the list stays as it is."""
    told = send(page, "suppress", ask(page, "suppress", address=ANA), **filled)

    assert told.status_code == 422
    assert problem in told.text
    assert 'maxlength="485"' in told.text
    assert found(engine) is None


@pytest.mark.parametrize("deed", ["suppress", "unsuppress"])
def test_a_list_that_was_changed_meanwhile_is_left_alone(page, engine, deed, message_id):
    """A STOP that came since the person looked is not what they decided about."""
    suppress(engine, ANA, "away", datetime.now(UTC) + timedelta(days=1))
    fields = ask(page, deed, message=message_id)
    suppress(engine, ANA, "answered STOP")

    assert said(send(page, deed, fields, reason="x")) == "Nothing was done: the suppression list was changed meanwhile."
    assert (found(engine).reason, found(engine).until) == ("answered STOP", None)
    assert said(send(page, deed, fields | {"entry": ""}, reason="x")).startswith(
        "Nothing was done: the form did not say"
    )
    assert found(engine).reason == "answered STOP"


def test_a_deed_that_does_not_fit_is_not_offered_and_not_done(page, engine):
    """For good is for good, and what is not on the list cannot be taken off."""
    assert ask(page, "unsuppress", address=ANA) == {}
    none = ask(page, "suppress", address=ANA)
    assert said(send(page, "unsuppress", none)) == "Nothing was changed: it is not on the list."
    suppress(engine, ANA)
    assert ask(page, "suppress", address=ANA) == {}
    fields = ask(page, "unsuppress", address=ANA)
    assert said(send(page, "suppress", fields, reason="x")) == "Nothing was changed: it is already on the list."
    assert found(engine).reason == "answered STOP"


def test_a_form_without_its_token_changes_nothing(page, engine):
    """Nor one of another site."""
    suppress(engine, ANA)
    fields = ask(page, "unsuppress", address=ANA)
    foreign = page.post("suppressed/unsuppress", data=fields, headers={"Sec-Fetch-Site": "cross-site"})
    del fields["csrftoken"]

    assert (foreign.status_code, send(page, "unsuppress", fields).status_code) == (403, 403)
    assert found(engine) is not None


def test_who_may_only_look_changes_nothing(page, engine, message_id):
    """No button, no question, and a form that was right elsewhere is refused."""
    suppress(engine, ANA)
    with admin_of(engine, may_act=False) as looking:
        shown = looking.get(f"messages/{message_id}").text + looking.get("suppressed", params={"address": ANA}).text
        assert (offered(shown), shown.count("Nothing is sent to its address")) == ([], 2)
        assert looking.get("suppressed/unsuppress", params={"address": ANA}).status_code == 403
        assert send(looking, "unsuppress", ask(page, "unsuppress", address=ANA)).status_code == 403
    assert found(engine) is not None


@pytest.mark.parametrize(
    "asked",
    [
        "suppress",
        "suppress?message=99",
        "suppress?message=x",
        "suppress?address=x",
        "burn?message=1",
        "suppress?message=" + "9" * 5000,
    ],
)
def test_what_does_not_exist_is_said_to_be_so(page, asked):
    """As on all other pages."""
    assert page.get(f"suppressed/{asked}").status_code == 404


def test_an_address_that_was_written_by_hand_breaks_no_page(page, engine, message_id):
    """The message is shown, and its address cannot be suppressed."""
    change(engine, message_id, destination_jid="by hand")

    shown = page.get(f"messages/{message_id}")

    assert (shown.status_code, offered(shown.text)) == (200, [])
    assert "Whether its address is suppressed cannot be told." in shown.text
    assert page.get(f"suppressed/suppress?message={message_id}").status_code == 404


def test_a_list_that_is_hidden_is_not_shown_as_empty(engine):
    """503 with the reason; a message is shown without it, and nothing is changed."""
    message_id = put(engine, "pending")
    role = f"{engine.url.database}_hidden"
    execute(engine, f"CREATE ROLE {role} NOLOGIN")
    try:
        execute(engine, f"GRANT USAGE ON SCHEMA public TO {role}")
        execute(engine, f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO {role}")
        execute(engine, "ALTER TABLE engagement_suppression ENABLE ROW LEVEL SECURITY")
        restricted = create_engine(engine.url, poolclass=NullPool, connect_args={"options": f"-c role={role}"})
        with admin_of(restricted) as page:
            whole, one = page.get("suppressed"), page.get("suppressed", params={"address": ANA})
            message, question = (
                page.get(f"messages/{message_id}"),
                page.get(f"suppressed/suppress?message={message_id}"),
            )
    finally:
        execute(engine, "ALTER TABLE engagement_suppression DISABLE ROW LEVEL SECURITY")
        execute(engine, f"DROP OWNED BY {role}")
        execute(engine, f"DROP ROLE {role}")

    why = "Row-level security hides the suppression list from this role: it needs a policy, see docs/roles.md."
    assert [(each.status_code, why in each.text) for each in (whole, one, question)] == [(503, True)] * 3
    assert (message.status_code, f"Whether its address is suppressed cannot be told. {why}" in message.text) == (
        200,
        True,
    )


def test_a_deed_that_takes_too_long_says_that_nothing_was_done(engine, message_id, caplog):
    """Somebody holds the entry: that somebody tried is logged."""
    caplog.set_level(logging.INFO, "engagement")
    suppress(engine, ANA)
    with admin_of(engine, patience=timedelta(milliseconds=300)) as page:
        fields = ask(page, "unsuppress", message=message_id)
        with engine.begin() as connection:
            connection.execute(text("SELECT FROM engagement_suppression FOR UPDATE"))
            told = send(page, "unsuppress", fields)

    assert (told.status_code, "Nothing was done. Try again." in told.text) == (503, True)
    assert caplog.messages[-1].startswith(f"engagement.admin action=unsuppress message_id={message_id} verdict=failed")
    assert found(engine) is not None
