"""The timeline of one message: every attempt and decision in order, and nobody named unasked."""

import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta

import pytest
from by_hand import update
from conftest import new_message, queue
from shell import ROOT
from sqlalchemy import text
from sqlalchemy.orm import Session

from engagement import (
    EngagementMessageRepository,
    InDoubt,
    NotSent,
    Postpone,
    Receipt,
    Refused,
    Sent,
    Withdraw,
    exponential_backoff,
    process_message_queue,
)
from engagement._operating.lists import list_messages
from engagement._operating.masking import mask_address, masked, pseudonym
from engagement._operating.timeline import timeline

AT_ONCE = exponential_backoff(timedelta(microseconds=1), jitter=0)
NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
A_DAY = timedelta(days=1)


def told(engine, message_id=1, **options):
    """Return what the timeline of a message says, without the times."""
    with Session(engine) as session:
        message = EngagementMessageRepository(session).get_message(message_id)
        return [(moment.what, moment.attempt, moment.detail) for moment in timeline(message, **options)]


def act(engine, method, *arguments, **options):
    with Session(engine) as session, session.begin():
        return getattr(EngagementMessageRepository(session), method)(*arguments, **options)


def deliver(engine, *outcomes, **options):
    remaining = iter(outcomes)
    process_message_queue(
        engine, lambda _: next(remaining), limit=len(outcomes), backoff=AT_ONCE, worker_name="w", **options
    )


@pytest.mark.parametrize("isolation", ["AUTOCOMMIT", "READ COMMITTED"])
def test_moments_are_read_in_any_style_also_without_a_transaction(engine, isolation):
    """And the style of the host's connection is as before."""
    queue(engine, new_message())
    with engine.connect().execution_options(isolation_level=isolation) as connection, Session(connection) as session:
        connection.exec_driver_sql("SET datestyle = 'German, DMY'")
        assert EngagementMessageRepository(session).get_message(1).created_at.tzinfo is not None
        assert len(list_messages(session)) == 1
        assert connection.exec_driver_sql("SHOW datestyle").scalar() == "German, DMY"
        connection.exec_driver_sql("SET datestyle = 'ISO'")


def test_a_message_that_waits_says_when_it_is_due(engine):
    """Until it is claimed, a message is queued, due when it was asked for, and over when it expires."""
    queue(engine, new_message(scheduled_for=NOON + 999 * A_DAY, expires_at=NOON + 1000 * A_DAY))

    with Session(engine) as session:
        moments = timeline(EngagementMessageRepository(session).get_message(1))

    assert [(moment.what, moment.attempt) for moment in moments] == [("queued", None), ("due", 1), ("expires", None)]
    assert [moment.at for moment in moments[1:]] == [NOON + 999 * A_DAY, NOON + 1000 * A_DAY]


def test_every_attempt_that_went_wrong_is_told_in_order(engine):
    """Failures, a wait, a person's retry and the success stand in the order in which they happened."""
    queue(engine, new_message())
    deliver(engine, NotSent("busy"), NotSent("down"), Refused("no account"))
    act(engine, "retry_message", 1)
    deliver(engine, Sent("wamid.1"))

    assert told(engine) == [
        ("queued", None, None),
        ("scheduled", None, None),
        ("not_sent", 1, "busy"),
        ("not_sent", 2, "down"),
        ("refused", 3, "no account"),
        ("retried", 3, None),
        ("sent", 4, f"by {claimed_by(engine)}"),
    ]


def claimed_by(engine) -> str:
    with engine.connect() as connection:
        return connection.scalar(text("SELECT claimed_by FROM engagement_message_queue"))


@pytest.mark.parametrize(
    ("outcome", "what", "more"),
    [
        (InDoubt("no answer"), ("in_doubt", 1, "no answer"), []),
        (Withdraw("opted out"), ("withdrawn", 1, "opted out"), []),
        (Postpone(NOON + 999 * A_DAY, "quiet"), ("postponed", 1, "quiet"), [("due", 2, None)]),
    ],
)
def test_each_outcome_is_told(engine, outcome, what, more):
    """What an attempt came to is the last that is told, or what comes next is."""
    queue(engine, new_message())
    deliver(engine, outcome)

    assert told(engine) == [("queued", None, None), ("scheduled", None, None), what, *more]


def test_a_message_in_hand_says_by_whom_and_until_when_but_not_since_when(engine):
    """When a message was claimed is recorded nowhere: it is placed after it was due, and said to be unknown."""
    queue(engine, new_message())
    update(
        engine,
        "status = 'sending', attempt = 1, claimed_by = 'w:1', lease_expires_at = now() + interval '5 minutes'",
    )

    assert told(engine) == [
        ("queued", None, None),
        ("scheduled", None, None),
        ("claimed", 1, "by w:1, when is not recorded"),
        ("lease_ends", 1, None),
    ]
    with Session(engine) as session:
        claimed = timeline(EngagementMessageRepository(session).get_message(1))[2]
    assert claimed.at is None


def test_a_doubt_that_is_sent_again_is_told(engine):
    """A pending message that may have left says so where it says when it is due again."""
    queue(engine, new_message())
    update(engine, "has_doubt = true, attempt = 1, next_attempt_at = now() + interval '1 hour'")

    assert told(engine)[-1] == ("due", 2, "an earlier attempt may have left")


def test_a_doubt_that_somebody_resolved_names_no_worker_for_it(engine):
    """It was sent by the time of the doubt; who says so found out later, and is told after it."""
    queue(engine, new_message())
    deliver(engine, InDoubt("no answer"))
    act(engine, "resolve_message", 1, sent=True, reason="seen in the chat")

    assert told(engine)[2:] == [
        ("in_doubt", 1, "no answer"),
        ("sent", 1, "at the latest, as was found out later"),
        ("resolved", 1, "sent: seen in the chat"),
    ]


@pytest.mark.parametrize(
    ("sent", "by", "reason", "detail"),
    [
        (True, "ana", "seen in the chat", "sent, by ana: seen in the chat"),
        (False, "ana", None, "not sent, by ana"),
        (False, "+55 11 98765-4321", "asked ana@example.org", "not sent, by ***: asked ***"),
    ],
)
def test_what_was_decided_and_by_whom_is_told(engine, sent, by, reason, detail):
    """A decision is told with who took it, as far as that was said and is no address or number."""
    queue(engine, new_message())
    deliver(engine, InDoubt("no answer"))
    act(engine, "resolve_message", 1, sent=sent, reason=reason, by=by)

    assert ("resolved", 1, detail) in told(engine)


@pytest.mark.parametrize("entry", ["{}", '{"sent": "no", "by": ["ana"]}', '{"sent": null, "by": null}'])
def test_what_a_history_does_not_say_is_not_made_up(engine, entry):
    """An entry from before, or by another hand, says nothing of what was decided."""
    queue(engine, new_message())
    at = '{"at": "2026-01-01T00:00:00+00:00", "attempt": 1, "event": "resolved"}'
    update(engine, f"history = jsonb_build_array('{at}'::jsonb || '{entry}'::jsonb)")

    (detail,) = (detail for what, _, detail in told(engine) if what == "resolved")
    assert "sent" not in (detail or "")


@pytest.mark.parametrize(
    ("assignments", "lost"),
    [
        ("status = 'sent', sent_at = now(), attempt = 3", "what became of 2 attempts is not kept"),
        ("status = 'cancelled', attempt = 1", "what became of 1 attempt is not kept"),
    ],
)
def test_attempts_that_left_no_trace_are_counted(engine, assignments, lost):
    """A pruned history, or one that was cut, is no proof that nothing happened: what is lost is said."""
    queue(engine, new_message())
    update(engine, assignments)

    assert ("unknown", None, lost) in told(engine)


def test_a_pruned_message_says_that_its_end_is_not_kept(engine):
    """That it was cancelled is still known; when and why no longer is."""
    queue(engine, new_message())
    act(engine, "cancel_message", 1, reason="came back")
    assert told(engine)[-1] == ("cancelled", 0, "came back")

    act(engine, "prune_messages", timedelta(0))

    assert ("cancelled", None, "when and why is not kept") in told(engine)
    assert told(engine)[-1] == ("pruned", 0, None)


@pytest.mark.parametrize("entry", ["7", "{}", '{"at": "today", "attempt": 1, "event": "not_sent"}', "null", "[]"])
def test_a_history_that_somebody_wrote_by_hand_is_shown_all_the_same(engine, entry):
    """An entry that cannot be read is said to be so, and hides nothing else."""
    queue(engine, new_message())
    update(engine, "history = jsonb_build_array(CAST(:entry AS jsonb))", entry=entry)

    assert ("unknown", None, "an entry of its history cannot be read") in told(engine)
    assert told(engine)[-1][0] == "due"


def test_reasons_are_masked_unless_revealed(engine):
    """A provider's text may name a person; an operator sees the rest of it."""
    queue(engine, new_message())
    deliver(engine, Refused("no account for 447700900101"))

    assert told(engine)[-1] == ("refused", 1, "no account for ***")
    assert told(engine, reveal=True)[-1] == ("refused", 1, "no account for 447700900101")


@pytest.mark.parametrize(
    ("reason", "shown"),
    [
        ("HTTP 503 at 2026-01-31 09:00, code 131026", "HTTP 503 at 2026-01-31 09:00, code 131026"),
        ("no account for 447700900101", "no account for ***"),
        ("no account for +55 (11) 99999-0000", "no account for ***"),
        ("447700900101@s.whatsapp.net is gone", "*** is gone"),
        ("to:ana@example.org,447700900101", "***"),
        ("119 876 4321@s.whatsapp.net, @ana or ana@", "*** @ana or ana@"),
        ("no (11) 99999-9999 here", "no *** here"),
        ("11 99999-9999", "***"),
        ("55 11 99999 9999", "***"),
        ("5511-999-999", "***"),
        ("551199999-8888 is busy", "*** is busy"),
        ("call 11/9999/9999.", "call ***."),
        ("2026-01-31 551199998888", "2026-01-31 ***"),
        ("55 2011-12-31", "***"),
        ("no account for BR.1502576394655843.", "no account for ***."),
        ("US.ENT.a1b2c3d4 has left", "*** has left"),
        ("no 55\u00a011\u200b99999_9999 here", "no *** here"),
        ("no 5511,99999,9999 here", "no *** here"),
        ("It is UP.Then it is HTTP.Not here", None),
        ("until 2026-11-24T10:00:00.123456Z or 2026-11-24 10:00:00+00:00", None),
        ("delivery 01234567-1234-5123-8123-123456789012 is there, port 5432", None),
    ],
)
def test_only_what_looks_personal_is_masked(reason, shown):
    """Numbers and addresses of people are masked; codes, statuses and times are what an operator needs."""
    assert masked(reason) == (reason if shown is None else shown)


@pytest.mark.parametrize("user_id", ["01234567-1234-5123-8123-123456789012", "2026-03-01", "ana.maria", "447700900101"])
def test_a_user_is_hidden_whatever_it_looks_like(engine, user_id):
    """An id or a date is what an operator needs, unless it says who the person is."""
    queue(engine, new_message(user_id))
    deliver(engine, Refused(f"no {user_id} on 2026-03-02"))

    assert told(engine)[-1] == ("refused", 1, "no *** on 2026-03-02")


@pytest.mark.parametrize("form", [str.upper, lambda user: user.replace("-", ""), str.title])
def test_a_user_is_hidden_however_it_is_written(engine, form):
    """A provider may give an id back in capitals, or a UUID without its hyphens."""
    user_id = "abcdef67-1234-5123-8123-123456789abc"
    queue(engine, new_message(user_id))
    deliver(engine, Refused(f"no {form(user_id)} here"))

    assert told(engine)[-1] == ("refused", 1, "no *** here")


@pytest.mark.parametrize(
    "part",
    [
        "x",
        "_",
        "1,",
        "BR.",
        "BR.x",
        "BR.1",
        "US.ENT.",
        "1",
        "-",
        "(",
        "@",
        "a@",
        "1 ",
        "1 2 3 4 5 6 x",
        "2026-01-",
        "01234567-",
        "\u2010",
        " ",
    ],
)
def test_masking_takes_time_in_proportion(engine, part):
    """Twice as much of a provider's text takes twice as long, not four times, whatever it is made of."""
    queue(engine, new_message("x" * 199 + "y", destination_jid="1" * 20 + "@lid", idempotency_key="x" * 511 + "y"))
    with Session(engine) as session:
        message = EngagementMessageRepository(session).get_message(1)

    def seconds(length: int) -> float:
        text = (part * length)[:length]

        def once() -> float:
            began = time.thread_time()
            masked(text, message)
            return time.thread_time() - began

        return min(once() for _ in range(3))

    assert seconds(40_000) < 3 * seconds(20_000) + 0.05


def test_reasons_never_name_the_user_address_or_key_of_their_message(engine):
    """What is known of a message is hidden as it stands, whatever it looks like."""
    queue(engine, new_message("ana", destination_jid="5544700900101@lid", idempotency_key="ana:goodbye:2026-03-01"))
    deliver(engine, Refused("ana of 5544700900101@lid (ana:goodbye:2026-03-01), since 2026-03-01"))

    assert told(engine)[-1] == ("refused", 1, "*** of *** (***), since 2026-03-01")


@pytest.mark.parametrize("jid", ["BR.1502576394655843", "BR.abcdefgh", "US.ENT.aBcDeFgHiJ"])
def test_a_person_without_a_number_is_hidden_too(engine, jid):
    """Meta's id of a person is masked where it stands, and without its country, whatever it is made of."""
    queue(engine, new_message("ana", destination_jid=jid))
    deliver(engine, Refused(f"no {jid}, {jid.rpartition('.')[2]}"))

    assert told(engine)[-1] == ("refused", 1, "no ***, ***")
    assert mask_address(jid) == f"***{jid[-2:]}"
    assert mask_address("BR.77") == "***"


@pytest.mark.parametrize("reveal", [False, True])
def test_an_event_that_is_none_of_ours_is_not_shown(engine, reveal):
    """Who writes a history by hand may write anything there."""
    queue(engine, new_message())
    entry = '{"at": "2026-03-01T12:00Z", "attempt": 1, "event": "told Ana", "reason": "busy"}'
    update(engine, "history = jsonb_build_array(CAST(:entry AS jsonb)), attempt = 1", entry=entry)

    assert ("unknown", 1, "busy") in told(engine, reveal=reveal)


def test_addresses_and_users_can_be_told_apart_but_not_known():
    """A masked address shows its kind; a pseudonym is the same for the same user."""
    assert mask_address("447700900101@s.whatsapp.net") == "***01@s.whatsapp.net"
    assert mask_address("120363025246125486@g.us") == "***86@g.us"
    assert mask_address("12345@lid") == "***45@lid"
    assert mask_address("1234@lid") == "***@lid"
    assert mask_address("447700900101") == "***01"
    assert mask_address("4477") == mask_address("") == "***"
    assert mask_address(None) is None
    assert pseudonym("ana") == pseudonym("ana") != pseudonym("ben")
    assert "ana" not in pseudonym("ana")


def test_a_pseudonym_is_made_with_a_secret():
    """Who knows how they are made, and tries all numbers, finds none: another process makes other ones."""
    assert pseudonym("447700900101", b"one") == pseudonym("447700900101", b"one")
    assert len({pseudonym("447700900101", key) for key in (b"one", b"another")} | {pseudonym("447700900101")}) == 3
    code = "from engagement._operating.masking import pseudonym; print(pseudonym('447700900101'))"
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, cwd=ROOT) for _ in range(2)]
    assert len({run.stdout for run in runs}) == 2


def test_receipts_are_told(engine):
    """Delivered and read after sent; and a message that was given up, with the provider's words and no gap."""
    ids = queue(engine, new_message("reader"), new_message("away"))
    deliver(engine, Sent("id-1"), Sent("id-2"))
    given = {"at": datetime.now(UTC) + A_DAY, "provider": "cloud"}
    read = Receipt(event="read", provider_message_id="id-1", **given)
    away = Receipt(event="undeliverable", provider_message_id="id-2", reason="blocked", **given)

    act(engine, "record_receipts", [read, away])

    assert [what for what, *_ in told(engine, ids[0])][-3:] == ["sent", "delivered", "read"]
    assert told(engine, ids[0])[-1] == ("read", 1, "as the provider says")
    assert told(engine, ids[1])[-1] == ("undeliverable", 1, "by cloud: blocked")
    assert {what for what, *_ in told(engine, ids[1])} == {"queued", "scheduled", "undeliverable"}
