"""What each outcome does to the row, and what is committed before a send."""

import threading
import time
from collections import Counter
from datetime import UTC, datetime, timedelta, timezone

import pytest
from conftest import execute, new_message, queue, row
from sqlalchemy import create_engine
from sqlalchemy.engine.default import DefaultDialect
from sqlalchemy.orm import Session

from engagement import (
    EngagementMessageRepository,
    InDoubt,
    NotSent,
    Postpone,
    Refused,
    Sent,
    Withdraw,
    process_message_queue,
)


def at_once(_failures):
    return timedelta(0)


# What each outcome does


@pytest.mark.parametrize("answer", [Sent("wamid.1"), "wamid.1"])
def test_a_due_message_is_sent(engine, answer):
    """What is due is sent once and recorded with the provider's id, whatever form the answer has."""
    (message_id,) = queue(engine, new_message())

    result = process_message_queue(engine, lambda _: answer)

    found = row(engine, message_id)
    assert (result.processed, result.succeeded, result.errors) == (1, 1, ())
    assert (found.status, found.provider_message_id, found.attempt, found.retry_count) == ("sent", "wamid.1", 1, 0)
    assert found.sent_at is not None
    assert found.history == []


def test_a_failed_send_is_retried_and_fails_for_good_after_three(engine):
    """Each failure increments retry_count, and the third one is the last; every one is in the history."""
    (message_id,) = queue(engine, new_message())
    counts = []

    for _ in range(3):
        process_message_queue(engine, lambda _: NotSent("gateway is down"), limit=1, backoff=at_once)
        found = row(engine, message_id)
        counts.append((found.status, found.retry_count, found.attempt))

    assert counts == [("pending", 1, 1), ("pending", 2, 2), ("failed", 3, 3)]
    assert found.error_message == "gateway is down"
    assert [(entry["event"], entry["attempt"], entry["reason"]) for entry in found.history] == [
        ("not_sent", attempt, "gateway is down") for attempt in (1, 2, 3)
    ]


def test_a_retry_waits_by_the_databases_clock(engine):
    """A failed message is due again after the backoff, and `scheduled_for` stays what the host asked for."""
    (message_id,) = queue(engine, new_message())
    before = row(engine, message_id)

    result = process_message_queue(engine, lambda _: NotSent("x"), backoff=lambda _: timedelta(hours=1))

    found = row(engine, message_id)
    assert (result.retried, result.errors) == (1, ((message_id, "x"),))
    assert timedelta(minutes=59) < found.next_attempt_at - before.created_at < timedelta(minutes=61)
    assert found.scheduled_for == before.scheduled_for


@pytest.mark.parametrize("show", [repr, str, "{}".format, "%s".__mod__])
def test_a_result_is_shown_without_what_a_provider_said(engine, show):
    """A cron job prints what was done: how much of it, not the number that a reason names."""
    queue(engine, new_message())

    result = process_message_queue(engine, lambda _: Refused("no account for 447700900101"))

    assert "failed=1" in show(result)
    assert "447700900101" not in show(result)
    assert result.errors == ((1, "no account for 447700900101"),)


def test_a_refused_message_is_not_tried_again(engine):
    """What will never be taken fails at once."""
    (message_id,) = queue(engine, new_message())

    result = process_message_queue(engine, lambda _: Refused("no such number"))

    assert (result.failed, row(engine, message_id).status) == (1, "failed")


def test_a_doubt_is_parked(engine):
    """What may have left is never sent again by itself."""
    (message_id,) = queue(engine, new_message())

    process_message_queue(engine, lambda _: InDoubt("no answer"))
    again = process_message_queue(engine, lambda _: Sent())

    assert again.processed == 0
    assert row(engine, message_id).status == "in_doubt"


def test_an_idempotent_transport_is_asked_again_with_the_same_delivery_id(engine):
    """A doubt of an idempotent transport is retried under one delivery id, and parked instead of failed at the end."""
    (message_id,) = queue(engine, new_message())
    seen = []

    class Idempotent:
        idempotent = True

        def send(self, message):
            seen.append((message.delivery_id, message.attempt))
            return InDoubt("no answer")

    result = process_message_queue(engine, Idempotent(), backoff=at_once)

    assert [attempt for _, attempt in seen] == [1, 2, 3]
    assert len({delivery_id for delivery_id, _ in seen}) == 1
    assert (result.retried, result.in_doubt, row(engine, message_id).status) == (2, 1, "in_doubt")


@pytest.mark.parametrize(
    ("later", "status"),
    [
        ([NotSent("x"), NotSent("x")], "in_doubt"),
        ([Refused("x")], "in_doubt"),
        ([Withdraw("x")], "in_doubt"),
        ([NotSent("x"), Sent("id")], "sent"),
    ],
    ids=["not_sent", "refused", "withdrawn", "sent"],
)
def test_a_doubt_is_not_forgotten_by_what_comes_later(engine, later, status):
    """What may have left once does not end as if it had not, though a later attempt provably did not leave."""
    (message_id,) = queue(engine, new_message())
    answers = iter([InDoubt("no answer"), *later])

    class Idempotent:
        idempotent = True

        def send(self, _message):
            return next(answers)

    process_message_queue(engine, Idempotent(), backoff=at_once)

    assert (row(engine, message_id).status, row(engine, message_id).has_doubt) == (status, status != "sent")


def test_a_doubt_that_expires_stays_a_doubt(engine):
    """A message that may have left, and expires before it is tried again, is told as in doubt."""
    (message_id,) = queue(engine, new_message(expires_at=datetime.now(UTC) + timedelta(hours=1)))

    class Idempotent:
        idempotent = True

        def send(self, _message):
            return InDoubt("no answer")

    process_message_queue(engine, Idempotent(), limit=1, backoff=at_once)
    execute(engine, "UPDATE engagement_message_queue SET scheduled_for = now() - interval '2 h', expires_at = now()")
    result = process_message_queue(engine, Idempotent())

    assert (result.expired, result.in_doubt, row(engine, message_id).status) == (0, 1, "in_doubt")


def test_what_an_idempotent_transport_may_have_sent_is_not_sent_by_another(engine):
    """A message that may have left is parked, and not sent, by a worker whose transport could send it twice."""
    doubtful, other = queue(engine, new_message("a"), new_message("b"))
    seen = []

    class Idempotent:
        idempotent = True

        def send(self, message):
            seen.append(message.id)
            return InDoubt("no answer")

    process_message_queue(engine, Idempotent(), limit=1, backoff=at_once)
    result = process_message_queue(engine, lambda message: seen.append(message.id))

    assert seen == [doubtful, other]
    assert (result.succeeded, result.in_doubt, result.processed) == (1, 1, 1)
    found = row(engine, doubtful)
    assert (found.status, found.attempt, found.history[-1]["event"]) == ("in_doubt", 1, "in_doubt")


def test_a_person_who_resolves_a_doubt_ends_it(engine):
    """Once a person has said that nothing left, the message may end as failed."""
    (message_id,) = queue(engine, new_message())
    process_message_queue(engine, lambda _: InDoubt("no answer"))
    with Session(engine) as session, session.begin():
        assert EngagementMessageRepository(session).resolve_message(message_id, sent=False)

    process_message_queue(engine, lambda _: Refused("x"))

    assert (row(engine, message_id).status, row(engine, message_id).has_doubt) == ("failed", False)


def test_a_postponed_message_waits_and_counts_as_no_failure(engine):
    """Quiet hours cost no retry."""
    (message_id,) = queue(engine, new_message())
    until = datetime.now(UTC) + timedelta(hours=8)

    result = process_message_queue(engine, lambda _: Postpone(until, "quiet hours"))

    found = row(engine, message_id)
    assert (result.postponed, found.status, found.retry_count, found.next_attempt_at) == (1, "pending", 0, until)
    assert found.history[0]["event"] == "postponed"


@pytest.mark.parametrize(
    "offset", [timedelta(hours=23), -timedelta(hours=20), timedelta(seconds=1), timedelta(microseconds=1)]
)
def test_a_postponement_may_be_in_any_zone(engine, offset):
    """Python knows offsets that PostgreSQL does not read."""
    (message_id,) = queue(engine, new_message())
    moment = datetime(2100, 1, 1, tzinfo=UTC)

    process_message_queue(engine, lambda _: Postpone(moment.astimezone(timezone(offset)), "later"))

    assert row(engine, message_id).next_attempt_at == moment


def test_a_postponement_into_the_past_does_not_spin(engine):
    """A transport that postpones to a moment that has passed is not asked again at once."""
    queue(engine, new_message())
    asked = []

    def send(message):
        asked.append(message.id)
        return Postpone(datetime(2020, 1, 1, tzinfo=UTC), "bug")

    process_message_queue(engine, send)

    assert len(asked) == 1


def test_a_history_keeps_its_first_entry_and_the_latest(engine):
    """It may be postponed for years: of a hundred entries, the second makes room for the next one."""
    (message_id,) = queue(engine, new_message())
    execute(
        engine,
        "UPDATE engagement_message_queue SET history = (SELECT jsonb_agg(jsonb_build_object("
        "'at', now(), 'attempt', 0, 'event', 'postponed', 'reason', CAST(n AS text)) ORDER BY n)"
        " FROM generate_series(1, 99) AS n)",
    )

    for number in (100, 101, 102):
        process_message_queue(engine, lambda _, reason=str(number): NotSent(reason), limit=1, backoff=at_once)

    reasons = [int(entry["reason"]) for entry in row(engine, message_id).history]
    assert reasons == [1, *range(4, 103)]


def test_a_withdrawn_message_is_cancelled(engine):
    """A person who opted out gets nothing, and the reason is kept."""
    (message_id,) = queue(engine, new_message())

    result = process_message_queue(engine, lambda _: Withdraw("opted out"))

    assert (result.cancelled, row(engine, message_id).status) == (1, "cancelled")
    assert row(engine, message_id).history[0]["reason"] == "opted out"


def test_an_expired_message_is_not_sent(engine):
    """What has expired is marked so, and not tried; what expires later is sent."""
    soon = datetime.now(UTC) + timedelta(hours=1)
    expired, alive = queue(engine, new_message("a", expires_at=soon), new_message("b", expires_at=soon))
    execute(
        engine,
        "UPDATE engagement_message_queue SET scheduled_for = now() - interval '2 h', expires_at = now() WHERE id = :id",
        id=expired,
    )
    sent = []

    result = process_message_queue(engine, lambda message: sent.append(message.id))

    assert (sent, result.expired, result.processed) == ([alive], 1, 1)
    found = row(engine, expired)
    assert (found.status, found.attempt, found.history[0]["event"]) == ("expired", 0, "expired")


def test_an_answer_that_is_no_outcome_is_a_doubt(engine):
    """`return True` says nothing about the message, and is not taken for a success."""
    (message_id,) = queue(engine, new_message())

    process_message_queue(engine, lambda _: True)

    assert row(engine, message_id).status == "in_doubt"
    assert "bool" in row(engine, message_id).error_message


@pytest.mark.parametrize(
    ("error", "options", "status"),
    [
        (TimeoutError("slow"), {}, "in_doubt"),
        (ConnectionResetError("cut"), {}, "in_doubt"),
        (ConnectionRefusedError("down"), {}, "pending"),
        (KeyError("template"), {}, "pending"),
        (KeyError("template"), {"strict": True}, "in_doubt"),
        (KeyError("template"), {"classify": lambda _: Refused("no template")}, "failed"),
        (KeyError("template"), {"classify": lambda _: None}, "in_doubt"),
        (KeyError("template"), {"classify": lambda error: 1 / 0}, "in_doubt"),
        (SystemExit(1), {}, "in_doubt"),
    ],
)
def test_an_exception_becomes_an_outcome(engine, error, options, status):
    """No exception of a transport ends the worker, and a broken rule of the host's does not lose what happened."""
    (message_id,) = queue(engine, new_message())

    def send(_message):
        raise error

    process_message_queue(engine, send, **options)

    assert row(engine, message_id).status == status


def test_provider_texts_that_postgresql_refuses_do_not_stop_the_settle(engine):
    """NUL, surrogates and length of a provider's words are cleaned before they are stored."""
    first, second = queue(engine, new_message("a"), new_message("b"))
    answers = iter([Sent("wamid\x00\ud800" + "x" * 5000), Refused("bad\x00\x1f\ud800" + "y" * 5000)])

    process_message_queue(engine, lambda _: next(answers))

    assert row(engine, first).status == "sent"
    assert row(engine, second).status == "failed"
    assert row(engine, second).error_message.startswith("bad yyy")


# What is committed, and when


@pytest.mark.parametrize("options", [{"stream_results": True}, {"yield_per": 10}])
def test_an_engine_whose_results_are_streamed_is_as_good(engine, options):
    """A cursor of the server's inserts nothing and locks nothing, so none is used, whatever the host reads with."""
    streaming = engine.execution_options(**options)
    with Session(streaming) as session, session.begin():
        repository = EngagementMessageRepository(session)
        assert repository.queue_message(new_message()).created
        assert not repository.queue_message(new_message()).created
        assert repository.queue_messages([new_message("b"), new_message("c")]).created == 2
        assert len(repository.get_pending_messages("user1")) == 1

    assert process_message_queue(streaming, lambda _: None).succeeded == 3


def _slowly(commit):
    def slow(*arguments):
        time.sleep(0.2)
        commit(*arguments)

    return slow


def test_the_claim_is_committed_and_nothing_is_open_during_the_send(engine, monkeypatch):
    """While a transport works, others see `sending` with a lease, and we hold no transaction."""
    (message_id,) = queue(engine, new_message())
    seen = []
    # A send that begins too soon would lose the race against a commit that takes a moment.
    monkeypatch.setattr(DefaultDialect, "do_commit", _slowly(DefaultDialect.do_commit))

    def send(_message):
        open_transactions = execute(
            engine,
            "SELECT count(*) FROM pg_stat_activity "
            "WHERE state LIKE 'idle in transaction%' AND datname = current_database()",
        ).scalar_one()
        found = row(engine, message_id)
        seen.append((found.status, found.attempt, found.lease_expires_at is not None, open_transactions))

    process_message_queue(engine, send, worker_name="w1")

    assert seen == [("sending", 1, True, 0)]
    assert row(engine, message_id).claimed_by.startswith("w1#")


def test_two_processors_never_send_one_message_twice(engine):
    """Four processors at once send each of 400 messages once."""
    queue(engine, *(new_message(f"u{n}") for n in range(400)))
    sent = Counter()
    lock = threading.Lock()
    start = threading.Barrier(4)

    def send(message):
        with lock:
            sent[message.id] += 1

    def process():
        start.wait()
        process_message_queue(engine, send, concurrency=3)

    threads = [threading.Thread(target=process) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(sent) == 400
    assert set(sent.values()) == {1}


@pytest.mark.parametrize("isolation", ["AUTOCOMMIT", "REPEATABLE READ", "SERIALIZABLE"])
def test_the_hosts_isolation_level_does_not_matter(engine, isolation):
    """A claim is a transaction of its own at READ COMMITTED, whatever the engine's default is."""
    ids = queue(engine, *(new_message(f"u{n}") for n in range(20)))
    other = create_engine(engine.url, isolation_level=isolation)
    sent = Counter()

    def process():
        process_message_queue(other, lambda message: sent.update([message.id]))

    threads = [threading.Thread(target=process) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    other.dispose()

    assert sent == Counter(ids)


def test_what_cannot_be_read_blocks_nobody(engine):
    """A row whose params Python cannot read, written by hand, fails alone."""
    first, second = queue(engine, new_message("a"), new_message("b"))
    execute(
        engine,
        "UPDATE engagement_message_queue "
        "SET message_params = ('{\"n\": 1' || repeat('0', 5000) || '}')::jsonb WHERE id = :id",
        id=first,
    )
    sent = []

    process_message_queue(engine, lambda message: sent.append(message.id), concurrency=5)

    assert sent == [second]
    status = execute(engine, "SELECT status FROM engagement_message_queue WHERE id = :id", id=first).scalar_one()
    assert status == "failed"
