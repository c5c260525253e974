"""A frequency cap: how many messages a person gets in a day or a week, whoever sends them."""

import json
import threading
from collections import Counter
from datetime import UTC, datetime, time, timedelta, timezone
from time import sleep
from zoneinfo import ZoneInfo

import pytest
from conftest import execute, in_thread, new_message, queue, row
from far import JID, LONDON, NEW_YORK, at, fails
from sqlalchemy import create_engine, event
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from engagement import EngagementMessageRepository, migrations, process_message_queue
from engagement.policies import Consent, FrequencyCap, QuietHours, Route
from engagement.policies.frequency_cap import local_window

PATIENCE = 20


# Frequency cap


@pytest.mark.parametrize(
    ("tz", "now", "per", "starts", "resumes"),
    [
        (LONDON, (2026, 1, 5, 0), "day", (2026, 1, 5), (2026, 1, 6, 9)),
        (LONDON, (2026, 1, 4, 23, 59, 59), "day", (2026, 1, 4), (2026, 1, 5, 9)),
        (LONDON, (2026, 1, 5, 0), "week", (2026, 1, 5), (2026, 1, 12, 9)),
        (LONDON, (2026, 1, 4, 23, 59, 59), "week", (2025, 12, 29), (2026, 1, 5, 9)),
        (NEW_YORK, (2026, 3, 8, 12), "day", (2026, 3, 8), (2026, 3, 9, 9)),
        (NEW_YORK, (2026, 11, 1, 12), "week", (2026, 10, 26), (2026, 11, 2, 9)),
        # The day has no midnight: it begins at one o'clock, which is when midnight would have been.
        (ZoneInfo("Africa/Cairo"), (2025, 4, 25, 12), "day", (2025, 4, 24, 23), (2025, 4, 26, 9)),
        # It has two: it begins at the first.
        (ZoneInfo("America/Havana"), (2025, 11, 2, 12), "day", (2025, 11, 2), (2025, 11, 3, 9)),
    ],
)
def test_a_day_and_a_week_are_the_persons(tz, now, per, starts, resumes):
    """A day begins at local midnight and a week on Monday, rather earlier than later where the clock is changed."""
    assert local_window(at(tz, *now), tz, per, time(9)) == (at(tz, *starts), at(tz, *resumes))


@pytest.fixture(name="noon")
def _noon():
    """A zone where it is noon now, so that its day began twelve hours ago."""
    now = datetime.now(UTC)
    offset = datetime.combine(now.date(), time(12), UTC) - now
    return timezone(timedelta(minutes=offset // timedelta(minutes=1)))


def cap(transport, engine, noon, **options):
    return FrequencyCap(transport, engine, lambda _: noon, **{"limit": 1, "per": "day"} | options)


def put(engine, message_id, status, *, when=None, events="", has_doubt=False):
    """Put a message into `status`; `when` is when it was sent, or the entries of its history were made."""
    entries = [{"at": str(when), "attempt": 1, "event": event} for event in events.split()]
    execute(
        engine,
        """
        UPDATE engagement_message_queue
           SET status = :status,
               attempt = 1,
               sent_at = CASE :status WHEN 'sent' THEN CAST(:when AS timestamptz) END,
               lease_expires_at = CASE :status WHEN 'sending' THEN now() + interval '1 h' END,
               next_attempt_at = now() + interval '1 d',
               has_doubt = :has_doubt,
               history = CAST(:history AS jsonb)
         WHERE id = :id
        """,
        id=message_id,
        status=status,
        when=when,
        has_doubt=has_doubt,
        history=json.dumps(entries),
    )


def user_messages(*types, user_id="ana", **fields):
    return [new_message(user_id, message_type=message_type, **fields) for message_type in types]


def midnight(noon):
    return datetime.combine(datetime.now(noon).date(), time.min, noon)


A_SECOND = timedelta(seconds=1)


@pytest.mark.parametrize(
    ("state", "counts"),
    [
        (("sent", "", timedelta(0)), True),
        (("sent", "", -A_SECOND), False),
        (("in_doubt", "in_doubt", A_SECOND), True),
        (("in_doubt", "in_doubt", -A_SECOND), False),
        (("in_doubt", "forgotten", -A_SECOND), False),
        (("in_doubt", "", None), True),
        (("sending", "", None), True),
        # An idempotent transport is asked again after a doubt: until it has an answer, the message may have left.
        (("pending", "in_doubt not_sent", A_SECOND, True), True),
        (("pending", "in_doubt not_sent", -A_SECOND, True), False),
        (("pending", "in_doubt resolved", A_SECOND), False),
        (("pending", "not_sent", A_SECOND), False),
        (("pending", "", None), False),
        (("failed", "refused", A_SECOND), False),
        (("cancelled", "cancelled", A_SECOND), False),
        (("expired", "expired", A_SECOND), False),
    ],
)
def test_what_left_or_may_have_left_counts(engine, noon, state, counts):
    """What was sent today, may have been, or is being sent, uses up the limit; what provably did not leave does not."""
    status, events, after_midnight, has_doubt = (*state, False)[:4]
    other, message_id = queue(engine, *user_messages("other", "this"))
    when = None if after_midnight is None else midnight(noon) + after_midnight
    put(engine, other, status, when=when, events=events, has_doubt=has_doubt)
    sent = []

    process_message_queue(engine, cap(sent.append, engine, noon))

    assert [message.id for message in sent] == ([] if counts else [message_id])
    assert row(engine, message_id).status == ("pending" if counts else "sent")


def test_above_the_limit_a_message_waits_for_the_next_day(engine, noon):
    """The limit is reached, not passed; what is above it comes in the morning, as a postponement, with the reason."""
    ids = queue(engine, *user_messages("one", "two", "three"), *user_messages("one", user_id="bea"))
    sent = []

    process_message_queue(engine, cap(sent.append, engine, noon, limit=2, resume_at=time(10, 30)))

    found = row(engine, ids[2])
    assert [message.id for message in sent] == [ids[0], ids[1], ids[3]]
    assert (found.status, found.retry_count, found.history[-1]["reason"]) == ("pending", 0, "2 per day reached")
    assert found.next_attempt_at == midnight(noon) + timedelta(days=1, hours=10, minutes=30)


def test_a_week_counts_from_monday(engine, noon):
    """With `per="week"` the days before count too, back to Monday and no further."""
    monday = midnight(noon) - timedelta(days=datetime.now(noon).weekday())
    first, second, message_id = queue(engine, *user_messages("first", "second", "this"))
    put(engine, first, "sent", when=monday)
    put(engine, second, "sent", when=monday - A_SECOND)
    sent = []

    process_message_queue(engine, cap(sent.append, engine, noon, per="week", limit=2))
    assert [message.id for message in sent] == [message_id]

    put(engine, message_id, "pending")
    execute(engine, "UPDATE engagement_message_queue SET next_attempt_at = now() WHERE id = :id", id=message_id)
    process_message_queue(engine, cap(sent.append, engine, noon, per="week", limit=1))

    assert len(sent) == 1
    assert row(engine, message_id).next_attempt_at == monday + timedelta(days=7, hours=9)


def test_a_cap_for_some_types_neither_holds_nor_counts_the_others(engine, noon):
    """`message_types` limits these types only."""
    ids = queue(engine, *user_messages("receipt", "reminder", "receipt_too", "review", "reminder_too"))
    sent = []

    process_message_queue(engine, cap(sent.append, engine, noon, message_types={"reminder", "reminder_too"}))

    assert [message.id for message in sent] == ids[:4]
    with pytest.raises(TypeError, match="message_types"):
        cap(print, engine, noon, message_types="reminder")


def runs_at_once(engine, send, noon, *, runs, limit):
    """Start so many runs that each have a message in hand when the cap is first asked, and wait for their end."""
    all_have_claimed, asked = threading.Barrier(runs, timeout=PATIENCE), threading.local()

    def tz_of(_message):
        if not hasattr(asked, "once"):
            asked.once = all_have_claimed.wait()
        return noon

    capped = FrequencyCap(send, engine, tz_of, limit=limit, per="day")
    for run in [in_thread(process_message_queue, engine, capped) for _ in range(runs)]:
        run.result(PATIENCE)


@pytest.mark.parametrize("order", ["oldest first", "youngest first"])
@pytest.mark.parametrize(
    ("runs", "limit", "send_seconds"), [(2, 1, 0), (3, 1, 0.2), (3, 2, 0), (3, 2, 0.2), (3, 3, 0), (6, 3, 0.2)]
)
def test_runs_that_begin_at_once_reach_the_cap(engine, noon, order, runs, limit, send_seconds):  # noqa: PLR0917
    """Ten messages of one person are due: so many as may are sent in the first round, and not one more."""
    ids = queue(engine, *user_messages(*"abcdefghij"))
    if order == "youngest first":
        execute(engine, "UPDATE engagement_message_queue SET next_attempt_at = now() - id * interval '1 s'")
    sent = []

    def send(message):
        sleep(send_seconds)
        sent.append(message.id)

    runs_at_once(engine, send, noon, runs=runs, limit=limit)

    assert len(sent) == limit
    assert {row(engine, message_id).status for message_id in set(ids) - set(sent)} == {"pending"}


def test_of_two_that_meet_the_older_is_sent(engine, noon):
    """Two workers that are about to send to one person do not both send, and the second message waits for its turn."""
    older, younger = queue(engine, *user_messages("one", "two"))
    sent = []

    runs_at_once(engine, lambda message: sent.append(message.id), noon, runs=2, limit=1)

    assert sent == [older]
    waits = row(engine, younger)
    assert waits.history[-1]["reason"] == "other messages to this person are being sent"
    assert waits.next_attempt_at <= datetime.now(UTC) + timedelta(minutes=1, seconds=5)

    make_due(engine)
    process_message_queue(engine, cap(fails, engine, noon))

    assert row(engine, younger).next_attempt_at > datetime.now(UTC) + timedelta(hours=12)


def test_two_older_ones_do_not_wait_for_each_other_while_a_younger_one_is_being_sent(engine, noon):
    """Of two places the younger has one: of the two older ones the second steps back, and the first has the other."""
    first, second, younger = queue(engine, *user_messages("one", "two", "three"))
    put(engine, younger, "sending")
    sent = []

    runs_at_once(engine, lambda message: sent.append(message.id), noon, runs=2, limit=2)

    assert sent == [first]
    assert row(engine, second).status == "pending"


def test_an_older_message_does_not_pass_a_younger_one_that_is_being_sent(engine, noon):
    """The order of the ids is not the order of the claims: what passed before counts, whatever its id."""
    older, younger = queue(engine, *user_messages("one", "two"))
    put(engine, older, "pending")  # due tomorrow
    is_sending, go_on = threading.Event(), threading.Event()
    sent = []

    def send(message):
        sent.append(message.id)
        is_sending.set()
        assert go_on.wait(PATIENCE)

    worker = threading.Thread(target=process_message_queue, args=(engine, cap(send, engine, noon)))
    worker.start()
    assert is_sending.wait(PATIENCE)
    execute(engine, "UPDATE engagement_message_queue SET next_attempt_at = now() WHERE id = :id", id=older)
    process_message_queue(engine, cap(send, engine, noon), limit=1)
    stepped_back = row(engine, older)
    go_on.set()
    worker.join()

    assert sent == [younger]
    assert stepped_back.history[-1]["reason"] == "other messages to this person are being sent"
    # It is asked again after seconds: the one that is being sent may yet fail.
    assert stepped_back.next_attempt_at < datetime.now(UTC) + timedelta(seconds=10)


def make_due(engine):
    """Let time pass until the next message that waits for less than five minutes is due, and those of its second."""
    execute(
        engine,
        """
        UPDATE engagement_message_queue
           SET next_attempt_at = next_attempt_at - (next_one.at + interval '1 s' - statement_timestamp())
          FROM (SELECT min(next_attempt_at) AS at FROM engagement_message_queue WHERE status = 'pending') AS next_one
         WHERE status = 'pending' AND next_attempt_at < statement_timestamp() + interval '5 min'
        """,
    )


def test_many_workers_send_each_person_exactly_the_limit(engine, noon):
    """Whatever meets whatever: nobody gets more than the limit, and in the end everybody gets it."""
    people = [f"u{n}" for n in range(12)]
    queue(engine, *(message for user_id in people for message in user_messages(*"abcde", user_id=user_id)))
    sent = Counter()
    lock = threading.Lock()

    def send(message):
        with lock:
            sent[message.user_id] += 1

    for _ in range(20):
        make_due(engine)
        workers = [
            threading.Thread(
                target=process_message_queue,
                args=(engine, cap(send, engine, noon, limit=2)),
                kwargs={"concurrency": 2},
            )
            for _ in range(4)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert max(sent.values()) <= 2
        if sum(sent.values()) == 2 * len(people):
            break

    assert sent == dict.fromkeys(people, 2)


def test_a_doubt_counts_for_when_it_arose(engine, noon):
    """What was postponed today, after a doubt of yesterday, is no message of today."""
    other, message_id = queue(engine, *user_messages("other", "this"))
    put(engine, other, "pending", when=midnight(noon) - A_SECOND, events="in_doubt", has_doubt=True)
    execute(
        engine,
        "UPDATE engagement_message_queue SET history = history || jsonb_build_array("
        " jsonb_build_object('at', now(), 'event', 'postponed')) WHERE id = :id",
        id=other,
    )
    sent = []

    process_message_queue(engine, cap(sent.append, engine, noon))

    assert [message.id for message in sent] == [message_id]


@pytest.mark.parametrize(("before_midnight", "counts"), [(A_SECOND, False), (-A_SECOND, True)])
def test_a_resolved_doubt_counts_for_when_it_arose(engine, noon, before_midnight, counts):
    """Who says today that a message of yesterday was sent takes no room of today."""
    other, message_id = queue(engine, *user_messages("other", "this"))
    doubted_at = midnight(noon) - before_midnight
    put(engine, other, "in_doubt", when=doubted_at, events="in_doubt")
    with Session(engine) as session, session.begin():
        assert EngagementMessageRepository(session).resolve_message(other, sent=True)
    sent = []

    process_message_queue(engine, cap(sent.append, engine, noon))

    assert [message.id for message in sent] == ([] if counts else [message_id])
    assert row(engine, other).sent_at == doubted_at


def test_nothing_is_open_while_a_capped_message_is_sent(engine, noon):
    """The count holds no transaction and no lock during the send."""
    queue(engine, new_message())
    seen = []

    def send(_message):
        seen.append(
            execute(
                engine,
                "SELECT count(*) FROM pg_stat_activity"
                " WHERE state LIKE 'idle in transaction%' AND datname = current_database()",
            ).scalar_one()
        )
        seen.append(execute(engine, "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'").scalar_one())

    process_message_queue(engine, cap(send, engine, noon))

    assert seen == [0, 0]


@pytest.mark.parametrize("change", ["attempt = attempt + 1", "status = 'in_doubt', lease_expires_at = NULL"])
def test_a_message_whose_claim_was_lost_is_not_sent(engine, noon, change):
    """A worker that froze before the count finds its claim gone, and sends nothing: others no longer count it."""
    (message_id,) = queue(engine, new_message())
    sent = []

    def tz_of(_message):
        execute(engine, f"UPDATE engagement_message_queue SET {change} WHERE id = :id", id=message_id)
        return noon

    process_message_queue(engine, FrequencyCap(sent.append, engine, tz_of, limit=1, per="day"))

    assert sent == []
    assert row(engine, message_id).history == []


def test_a_lost_database_costs_no_retry(engine, noon):
    """A cap that cannot be counted lets nothing through, and is no failure of the message."""
    (message_id,) = queue(engine, new_message())
    unreachable = create_engine("postgresql+psycopg://nobody@127.0.0.1:1/nothing", connect_args={"connect_timeout": 2})
    sent = []

    process_message_queue(engine, cap(sent.append, unreachable, noon))
    unreachable.dispose()

    found = row(engine, message_id)
    assert (sent, found.status, found.retry_count, found.history[-1]["event"]) == ([], "pending", 0, "postponed")
    assert datetime.now(UTC) < found.next_attempt_at < datetime.now(UTC) + timedelta(minutes=2)


def test_a_hook_of_the_host_that_fails_costs_no_retry(engine, noon):
    """Nor does what the host does to get a connection: a token, say."""
    queue(engine, new_message())
    hooked = create_engine(engine.url, poolclass=NullPool)

    @event.listens_for(hooked, "do_connect")
    def token(*_):
        raise LookupError("no token")

    result = process_message_queue(engine, cap(fails, hooked, noon))

    assert (result.postponed, result.retried) == (1, 0)


def test_a_database_without_the_table_is_a_failure(engine, empty_engine, noon):
    """What waiting does not mend is told as a failure, which ends after the retries."""
    (message_id,) = queue(engine, new_message())
    sent = []

    process_message_queue(engine, cap(sent.append, empty_engine, noon))

    found = row(engine, message_id)
    assert (sent, found.retry_count, found.error_message) == ([], 1, "FrequencyCap raised ProgrammingError")


def test_a_cap_counts_in_the_schema_of_the_table(empty_engine, noon):
    """With `schema` the cap counts where the messages are."""
    migrations.upgrade(empty_engine, schema="guests")
    with Session(empty_engine) as session, session.begin():
        repository = EngagementMessageRepository(session, schema="guests")
        repository.queue_messages(user_messages("one", "two"))
    sent = []

    capped = cap(sent.append, empty_engine, noon, schema="guests")
    result = process_message_queue(empty_engine, capped, schema="guests")

    assert (len(sent), result.succeeded, result.postponed) == (1, 1, 1)


@pytest.mark.parametrize("options", [{"limit": 0}, {"per": "month"}, {"resume_at": time(9, tzinfo=UTC)}])
def test_a_cap_that_means_nothing_is_refused_at_once(engine, noon, options):
    """A limit below one, another period, or a time with a zone of its own, is a mistake."""
    with pytest.raises(ValueError, match=next(iter(options))):
        cap(print, engine, noon, **options)


# All together


def test_policies_compose(engine, noon):
    """Around one another they ask from the outside in, and the first that says no has the last word."""
    ids = queue(engine, *(new_message(user_id) for user_id in ("out", "asleep", "capped", "nowhere", "ok")))
    out, asleep, capped, nowhere, ok = ids
    (earlier,) = queue(engine, new_message("capped", message_type="earlier"))
    put(engine, earlier, "sent", when=midnight(noon))
    asked = []

    def asking(name, answer):
        def ask(message):
            asked.append((name, message.user_id))
            return answer(message)

        return ask

    night = timezone(datetime.now(noon).utcoffset() - timedelta(hours=11, minutes=59))
    sent = []
    routed = Route(sent.append, asking("where", lambda m: None if m.user_id == "nowhere" else ("individual", JID)))
    capped_transport = FrequencyCap(routed, engine, asking("cap", lambda _: noon), limit=1, per="day")
    quiet = QuietHours(
        capped_transport, lambda m: night if m.user_id == "asleep" else noon, start=time(22), end=time(7)
    )

    process_message_queue(engine, Consent(quiet, asking("wants", lambda m: m.user_id != "out")))

    events = {name: row(engine, name).history[-1]["event"] for name in (out, asleep, capped, nowhere)}
    assert events == {out: "withdrawn", asleep: "postponed", capped: "postponed", nowhere: "refused"}
    assert [(message.id, message.destination_jid) for message in sent] == [(ok, JID)]
    assert [name for name, user_id in asked if user_id == "ok"] == ["wants", "cap", "where"]
    assert [name for name, user_id in asked if user_id == "out"] == ["wants"]
