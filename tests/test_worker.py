"""Delivery: what each outcome does to the row, in what order messages leave, and what is committed before a send."""

import asyncio
import logging
import threading
import time
from collections import Counter
from datetime import UTC, datetime, timedelta, timezone
from itertools import pairwise
from queue import SimpleQueue

import pytest
from conftest import execute, in_thread, new_message, queue, row, until
from sqlalchemy import create_engine, event, text
from sqlalchemy.engine.default import DefaultDialect
from sqlalchemy.exc import ProgrammingError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import Session

from engagement import (
    EngagementMessageRepository,
    InDoubt,
    NotSent,
    Postpone,
    Refused,
    Sent,
    Withdraw,
    Worker,
    migrations,
    process_message_queue,
)
from engagement._claim import START, clock
from engagement._delivery import cursor, dispatch, readiness, run, transaction
from engagement._delivery import database as claims
from engagement._operating import inspection
from engagement._sending.sender import _Sending
from engagement.policies import Gate

PATIENCE = 20
PAST = datetime(2026, 1, 1, tzinfo=UTC)


def at_once(_failures):
    return timedelta(0)


def make_due(engine):
    execute(
        engine, "UPDATE engagement_message_queue SET next_attempt_at = now() - interval '1 s' WHERE status = 'pending'"
    )


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


# Order, limits and pace


def test_the_oldest_due_message_goes_first(engine):
    """Messages leave in the order in which they became due, and none before its time."""
    now = datetime.now(UTC)
    given = [new_message(f"u{n}", scheduled_for=now - timedelta(minutes=n)) for n in (2, 5, 1, 4)]
    later = new_message("later", scheduled_for=now + timedelta(minutes=1))
    queue(engine, *given, later)
    sent = []

    process_message_queue(engine, lambda message: sent.append(message.user_id))

    assert sent == ["u5", "u4", "u2", "u1"]


def test_of_one_destination_what_is_due_first_goes_first(engine):
    """Also if it was queued last, and a worker could claim both at once."""
    later, earlier, _ = queue(
        engine,
        new_message("a", idempotency_key="later", scheduled_for=PAST + timedelta(seconds=2)),
        new_message("a", idempotency_key="earlier", scheduled_for=PAST),
        new_message("b"),
    )
    sent = []

    process_message_queue(engine, lambda message: sent.append(message.id), concurrency=3)

    assert [message_id for message_id in sent if message_id in {earlier, later}] == [earlier, later]


def test_limit_does_not_count_what_was_recovered(engine):
    """It bounds what is sent, and a message that a lost worker left behind is not sent."""
    (lost,) = queue(engine, new_message("lost"))
    with engine.begin() as connection:
        claims.claim(
            connection,
            claims.Holder("lost", timedelta(0)),
            limit=1,
            after=START,
            busy=[],
            one_per_destination=False,
        )
    queue(engine, new_message("a"), new_message("b"))

    result = process_message_queue(engine, lambda _: None, limit=2, concurrency=2)

    assert (result.in_doubt, result.succeeded, row(engine, lost).status) == (1, 2, "in_doubt")


def test_limit_bounds_the_claims(engine):
    """Never more than `limit` messages are claimed, with any concurrency; zero claims nothing."""
    queue(engine, *(new_message(f"u{n}") for n in range(10)))

    assert process_message_queue(engine, lambda _: None, limit=0).processed == 0
    assert process_message_queue(engine, lambda _: None, limit=3, concurrency=8).processed == 3
    assert process_message_queue(engine, lambda _: None).processed == 7


def test_only_what_starts_now_is_claimed(engine):
    """With concurrency n at most n messages are claimed and unsettled, so a crash leaves no more in doubt."""
    queue(engine, *(new_message(f"u{n}") for n in range(30)))
    most = []

    def send(_message):
        most.append(
            execute(engine, "SELECT count(*) FROM engagement_message_queue WHERE status = 'sending'").scalar_one()
        )

    process_message_queue(engine, send, concurrency=3)

    assert len(most) == 30
    assert max(most) <= 3


def test_one_destination_gets_its_messages_in_order_one_at_a_time(engine):
    """With any concurrency, a worker never sends two messages to one destination at once, nor out of order."""
    given = [new_message(user, message_type=f"type_{n}") for n in range(8) for user in ("ana", f"u{n}", f"v{n}")]
    ids = queue(engine, *given)[::3]
    under_way, overlaps, sent = set(), [], []
    lock = threading.Lock()

    def send(message):
        with lock:
            if message.destination_jid in under_way:
                overlaps.append(message.id)
            under_way.add(message.destination_jid)
        time.sleep(0.005)
        with lock:
            under_way.discard(message.destination_jid)
            sent.append(message.id)

    process_message_queue(engine, send, concurrency=5)

    assert overlaps == []
    assert [message_id for message_id in sent if message_id in ids] == ids
    assert len(sent) == 24


def test_a_destination_that_fails_delays_only_itself(engine):
    """While a send to one destination hangs, the others get theirs."""
    queue(
        engine,
        *(new_message("slow", message_type=f"type_{n}") for n in range(3)),
        *(new_message(f"u{n}") for n in range(6)),
    )
    others_are_done = threading.Event()
    sent = []

    def send(message):
        if message.user_id == "slow":
            assert others_are_done.wait(PATIENCE)
            return NotSent("down")
        sent.append(message.user_id)
        if len(sent) == 6:
            others_are_done.set()
        return Sent()

    process_message_queue(engine, send, concurrency=2)

    assert len(sent) == 6


def test_min_interval_spaces_the_starts(engine):
    """Two sends of one worker never start closer together than `min_interval`, with any concurrency."""
    queue(engine, *(new_message(f"u{n}") for n in range(4)))
    starts = []

    process_message_queue(
        engine, lambda _: starts.append(time.monotonic()), concurrency=4, min_interval=timedelta(seconds=0.15)
    )

    assert len(starts) == 4
    assert min(later - earlier for earlier, later in pairwise(starts)) >= 0.14


def test_min_interval_counts_from_when_a_send_really_began(engine, monkeypatch):
    """Also if the first send begins late, as on a busy machine, the second one keeps its distance."""
    queue(engine, *(new_message(f"u{n}") for n in range(3)))
    starts, check = [], _Sending.check

    def late(call):
        if not starts:
            time.sleep(0.12)
        check(call)

    monkeypatch.setattr(_Sending, "check", late)
    process_message_queue(
        engine, lambda _: starts.append(time.monotonic()), concurrency=3, min_interval=timedelta(seconds=0.15)
    )

    assert len(starts) == 3
    assert min(later - earlier for earlier, later in pairwise(starts)) >= 0.14


def test_pacing_does_not_wait_for_a_poll(engine):
    """While one send is slow, the next starts after `min_interval`, not after the poll interval."""
    queue(engine, *(new_message(f"u{n}") for n in range(3)))
    all_began, began = threading.Event(), []

    def send(message):
        began.append(message.id)
        if len(began) == 3:
            all_began.set()
        assert all_began.wait(PATIENCE)

    stop = threading.Event()
    threading.Thread(target=lambda: (all_began.wait(PATIENCE), stop.set()), daemon=True).start()
    worker = Worker(engine, send, concurrency=3, min_interval=timedelta(seconds=0.05), poll_interval=timedelta(hours=1))
    result = worker.run(stop)

    assert result.succeeded == 3


def test_a_message_that_became_due_behind_the_last_claim_is_found(engine):
    """A claim starts where the last one ended; what is back-dated behind that place is not forgotten."""
    queue(engine, *(new_message(f"u{n}") for n in range(3)))
    late = []

    def send(message):
        if not late:
            late.extend(queue(engine, new_message("late", scheduled_for=datetime.now(UTC) - timedelta(days=1))))
        return Sent()

    assert process_message_queue(engine, send).succeeded == 4


def running(worker: Worker) -> tuple[threading.Event, threading.Thread]:
    stop = threading.Event()
    thread = threading.Thread(target=worker.run, args=[stop], daemon=True)
    thread.start()
    return stop, thread


def test_a_running_worker_finds_what_was_back_dated(engine):
    """It starts from the beginning from time to time."""
    (first,) = queue(engine, new_message("first"))
    sent = SimpleQueue()
    worker = Worker(engine, lambda message: sent.put(message.id), poll_interval=timedelta(seconds=0.02))
    stop, thread = running(worker)
    assert sent.get(timeout=PATIENCE) == first

    (late,) = queue(engine, new_message("late", scheduled_for=datetime.now(UTC) - timedelta(days=1)))

    assert sent.get(timeout=PATIENCE) == late
    stop.set()
    thread.join(PATIENCE)


def test_what_was_passed_over_is_found_when_its_destination_is_free(engine, monkeypatch):
    """Also if nothing can be claimed at that moment, and without starting from the beginning."""
    monkeypatch.setattr(cursor, "RESTART_SECONDS", 3600)
    first, other, second = queue(
        engine, new_message("a", message_type="first"), new_message("b"), new_message("a", message_type="second")
    )
    other_began, sent = threading.Event(), SimpleQueue()

    def send(message):
        if message.id == other:
            other_began.set()
        assert other_began.wait(PATIENCE)
        sent.put(message.id)

    # The second to the same destination lies between the two that are in hand.
    execute(engine, "UPDATE engagement_message_queue SET next_attempt_at = now() WHERE id = :id", id=other)
    worker = Worker(
        engine, send, concurrency=3, min_interval=timedelta(seconds=0.3), poll_interval=timedelta(seconds=0.02)
    )
    stop, thread = running(worker)

    assert {sent.get(timeout=PATIENCE) for _ in range(3)} == {first, other, second}
    stop.set()
    thread.join(PATIENCE)


def test_starting_from_the_beginning_takes_a_tenth_of_the_time_at_most(engine, monkeypatch):
    """When it takes long, as under another session's old snapshot, it is done rarely."""
    queue(engine, *(new_message(f"u{n}") for n in range(60)))
    claim, later, from_the_start = claims.claim, [0], []

    def slow_from_the_start(connection, holder, *, after, **options):
        is_from_start = after == START
        from_the_start.append(is_from_start)
        later[0] += 10 if is_from_start else 2
        return claim(connection, holder, after=after, **options)

    monkeypatch.setattr(claims, "claim", slow_from_the_start)
    for module in (run, dispatch, transaction):
        monkeypatch.setattr(module, "clock", lambda: clock() + later[0])

    assert process_message_queue(engine, lambda _: None, lease=timedelta(days=1)).succeeded == 60
    # At first, after 100 seconds, and once more before it is over.
    assert sum(from_the_start) == 3


def test_starting_from_the_beginning_is_put_off_for_a_minute_at_most(engine, monkeypatch):
    """That one took long may also have been a lock that somebody held for an hour."""
    queue(engine, *(new_message(f"u{n}") for n in range(60)))
    claim, later, from_the_start = claims.claim, [0], []

    def once_slow(connection, holder, *, after, **options):
        from_the_start.append(after == START)
        later[0] += 2 if any(from_the_start[:-1]) else 3600
        return claim(connection, holder, after=after, **options)

    monkeypatch.setattr(claims, "claim", once_slow)
    for module in (run, dispatch, transaction):
        monkeypatch.setattr(module, "clock", lambda: clock() + later[0])

    assert process_message_queue(engine, lambda _: None, lease=timedelta(days=1)).succeeded == 60
    assert sum(from_the_start) >= 3


def test_an_idle_worker_recovers_what_was_lost_while_it_does_not_start_over(engine, monkeypatch):
    """Each poll asks for leases that ran out."""
    monkeypatch.setattr(cursor, "RESTART_SECONDS", 3600)
    first, lost = queue(engine, new_message("a"), new_message("b", scheduled_for=datetime.now(UTC) + timedelta(days=1)))
    sent = threading.Event()
    stop, thread = running(Worker(engine, lambda _: sent.set(), poll_interval=timedelta(seconds=0.02)))
    assert sent.wait(PATIENCE)
    until(lambda: row(engine, first).status == "sent")

    execute(
        engine,
        "UPDATE engagement_message_queue SET status = 'sending', attempt = 1, lease_expires_at = now() WHERE id = :id",
        id=lost,
    )

    until(lambda: row(engine, lost).status == "in_doubt")
    stop.set()
    thread.join(PATIENCE)


def test_what_lies_behind_an_expired_message_keeps_its_order(engine):
    """The first to a destination ends instead of being sent; the next one is not passed over for it."""
    past = datetime.now(UTC) - timedelta(hours=1)
    given = [("a", 1, past + timedelta(seconds=2)), ("a", 5, None), ("b", 10, None), ("a", 11, None), ("a", 12, None)]
    ids = queue(
        engine,
        *(
            new_message(
                user,
                scheduled_for=past + timedelta(seconds=after),
                expires_at=expires_at,
                idempotency_key=f"{user}{after}",
            )
            for user, after, expires_at in given
        ),
    )
    sent = []
    process_message_queue(engine, lambda message: sent.append(message.id), concurrency=3)

    assert [message_id for message_id in sent if message_id != ids[2]] == [ids[1], ids[3], ids[4]]


def test_what_lies_behind_an_overdue_send_keeps_its_order(engine, monkeypatch):
    """When the send that took too long has ended, the oldest to its destination is next."""
    monkeypatch.setattr(cursor, "RESTART_SECONDS", 3600)
    slow, behind = queue(engine, *(new_message("a", idempotency_key=key) for key in ("slow", "behind")))
    other_is_sent, sent = threading.Event(), []

    def send(message):
        sent.append(message.id)
        if message.id == slow:
            assert other_is_sent.wait(PATIENCE)
            raise RuntimeError

    stop, thread = running(
        Worker(engine, send, concurrency=2, send_timeout=timedelta(seconds=0.1), poll_interval=timedelta(seconds=0.02))
    )
    until(lambda: row(engine, slow).status == "in_doubt")
    other, last = queue(engine, new_message("b"), new_message("a", idempotency_key="last"))
    until(lambda: row(engine, other).status == "sent")
    other_is_sent.set()
    until(lambda: row(engine, last).status == "sent")
    stop.set()
    thread.join(PATIENCE)

    assert sent == [slow, other, behind, last]


def test_a_send_as_long_as_the_pace_ends_no_run(engine, monkeypatch):
    """Pacing said "not yet" before the settlement, and the time is over after it: that is no empty queue."""
    queue(engine, *(new_message(f"u{n}") for n in range(3)))
    settle, later = claims.settle, [0.0]

    def slow_settle(*arguments):
        later[0] += 1
        return settle(*arguments)

    monkeypatch.setattr(claims, "settle", slow_settle)
    for module in (run, dispatch, transaction):
        monkeypatch.setattr(module, "clock", lambda: clock() + later[0])

    assert process_message_queue(engine, lambda _: None, min_interval=timedelta(seconds=0.9)).succeeded == 3


def test_a_transport_that_is_not_ready_is_logged_once(engine, caplog):
    """A job that sends nothing for that reason says so."""
    queue(engine, new_message())

    class Transport:
        def send(self, message):
            raise AssertionError

        def ready(self):
            return False

    with caplog.at_level(logging.WARNING, logger="engagement"):
        assert process_message_queue(engine, Transport()).processed == 0

    assert [record.getMessage() for record in caplog.records] == ["engagement.not_ready reason=unknown"]


class _Waiting:
    """Is not ready, and says why."""

    why_not_ready = "webhook: HTTP 503, asked with HEAD"

    def __init__(self, *answers):
        self.answers = iter(answers)

    def ready(self):
        return next(self.answers, False)

    def send(self, _message):
        return None


def waits_for(engine):
    with Session(engine) as session:
        return inspection.overview(session).waiting_for


def test_what_keeps_a_queue_waiting_is_told_in_log_and_status(engine, caplog):
    """A run that claims nothing leaves the reason where another process reads it, once, and costs no attempt."""
    (message_id,) = queue(engine, new_message())
    for _ in range(3):
        process_message_queue(engine, _Waiting())

    told = row(engine, message_id)
    assert [(entry["event"], entry["reason"]) for entry in told.history] == [("not_ready", _Waiting.why_not_ready)]
    assert (told.status, told.attempt, told.error_message) == ("pending", 0, None)
    assert waits_for(engine) == _Waiting.why_not_ready
    assert {record.getMessage() for record in caplog.records} == {
        f"engagement.not_ready reason={_Waiting.why_not_ready}"
    }

    assert process_message_queue(engine, _Waiting(True)).succeeded == 1
    assert waits_for(engine) is None


def test_a_worker_tells_it_when_it_has_waited_for_a_while(engine, monkeypatch):
    """A moment is not told; a longer one is, also of a message that becomes due meanwhile, and then it is sent."""
    monkeypatch.setattr(readiness, "TELL_SECONDS", 0.05)
    monkeypatch.setattr(readiness, "READY_SECONDS", 0.02)
    may_send, stop = threading.Event(), threading.Event()
    transport = _Waiting()
    transport.ready = may_send.is_set
    worker = Worker(engine, transport, poll_interval=timedelta(milliseconds=10))
    thread = threading.Thread(target=worker.run, args=[stop])
    thread.start()
    (message_id,) = queue(engine, new_message())

    until(lambda: waits_for(engine) == _Waiting.why_not_ready)
    may_send.set()
    until(lambda: row(engine, message_id).status == "sent")
    stop.set()
    thread.join(PATIENCE)
    assert [entry["event"] for entry in row(engine, message_id).history] == ["not_ready"]


@pytest.mark.parametrize(
    ("why", "told"),
    [(None, "the transport is not ready"), ("a\nb\0", "a b"), ("", "the transport is not ready"), (7, "7")],
)
def test_whatever_a_transport_says_of_itself_can_be_told(engine, why, told):
    """Nothing, or what no row can hold: it ends no run."""
    queue(engine, new_message())
    transport = _Waiting()
    transport.why_not_ready = why
    process_message_queue(engine, transport)

    assert waits_for(engine) == told


def test_a_reason_that_breaks_ends_no_run(engine):
    """Neither does one that raises, nor a policy around it."""

    class Broken(_Waiting):
        @property
        def why_not_ready(self):
            raise RuntimeError

    (message_id,) = queue(engine, new_message())
    assert process_message_queue(engine, Gate(Broken())).processed == 0
    assert waits_for(engine) == "the transport is not ready"
    assert process_message_queue(engine, Gate(_Waiting())).processed == 0
    assert [entry["reason"] for entry in row(engine, message_id).history][1:] == [_Waiting.why_not_ready]


# Kinds of transports


def test_an_async_transport(engine):
    """`async def` runs in one event loop, many sends at once."""
    queue(engine, *(new_message(f"u{n}") for n in range(10)))
    under_way, most = set(), []

    class Transport:
        async def send(self, message):
            under_way.add(message.id)
            most.append(len(under_way))
            await asyncio.sleep(0.02)
            under_way.discard(message.id)
            return Sent(str(message.id))

    assert process_message_queue(engine, Transport(), concurrency=5).succeeded == 10
    assert 1 < max(most) <= 5


def test_a_function_that_returns_a_coroutine(engine):
    """A lambda around an `async def` works too."""
    queue(engine, new_message())

    async def send(_message):
        return Sent("x")

    assert process_message_queue(engine, lambda message: send(message)).succeeded == 1  # noqa: PLW0108 - the point


def test_an_async_send_that_is_cancelled_is_a_doubt(engine):
    """A send that was torn down in the middle proves nothing."""
    (message_id,) = queue(engine, new_message())

    async def send(_message):
        raise asyncio.CancelledError

    process_message_queue(engine, send)

    assert row(engine, message_id).status == "in_doubt"


def test_a_batch_transport_is_called_once_for_what_was_claimed(engine):
    """`send_many` gets up to `concurrency` messages, and each outcome goes to its message."""
    ids = queue(engine, *(new_message(f"u{n}") for n in range(5)))
    batches = []

    class Batch:
        def send_many(self, messages):
            batches.append(len(messages))
            return [Refused("no") if message.id == ids[1] else Sent(f"p{message.id}") for message in messages]

    result = process_message_queue(engine, Batch(), concurrency=3)

    assert batches == [3, 2]
    assert (result.succeeded, result.failed) == (4, 1)
    assert row(engine, ids[1]).status == "failed"
    assert row(engine, ids[4]).provider_message_id == f"p{ids[4]}"


def test_one_batch_at_a_time(engine):
    """While a batch is being sent, no other one begins beside it, though there is room."""
    queue(engine, new_message("first"))
    batches, is_waiting, may_end = [], threading.Event(), threading.Event()

    class Batch:
        def send_many(self, messages):
            batches.append([message.user_id for message in messages])
            is_waiting.set()
            assert may_end.wait(PATIENCE)
            return [Sent() for _ in messages]

    stop = threading.Event()
    run = in_thread(Worker(engine, Batch(), concurrency=4, poll_interval=timedelta(milliseconds=10)).run, stop)
    assert is_waiting.wait(PATIENCE)
    queue(engine, new_message("second"), new_message("third"))
    threading.Event().wait(0.3)  # Thirty polls: what is not claimed by then is not claimed.
    assert batches == [["first"]]
    may_end.set()
    until(lambda: len(batches) == 2)
    stop.set()
    run.result(PATIENCE)

    assert sorted(batches[1]) == ["second", "third"]


def test_a_batch_is_in_the_order_in_which_it_is_due(engine):
    """Messages to one person leave in their order also within one call of `send_many`."""
    now = datetime.now(UTC)
    ids = queue(
        engine,
        *(
            new_message(idempotency_key=str(hours), scheduled_for=now - timedelta(hours=hours))
            for hours in (2, 5, 1, 4, 3)
        ),
    )
    batches = []

    class Batch:
        def send_many(self, messages):
            batches.append([message.id for message in messages])
            return [Sent()] * len(messages)

    process_message_queue(engine, Batch(), concurrency=5)

    assert batches == [[ids[place] for place in (1, 3, 4, 0, 2)]]


@pytest.mark.direct("nothing is prepared behind a pooler")
def test_a_worker_plans_its_statements_once(engine):
    """Not anew for each message's values, which takes longer than running them: PostgreSQL tries that five times."""
    with Session(engine) as session, session.begin():  # In a table of two pages, no plan is cheaper than another.
        EngagementMessageRepository(session).queue_messages(new_message(f"u{n}") for n in range(4_000))
    execute(engine, "ANALYZE engagement_message_queue")
    own = create_engine(engine.url, pool_size=1, max_overflow=0)
    process_message_queue(own, lambda _: None, limit=40)

    with own.connect() as connection:
        plans = connection.execute(
            text(
                "SELECT generic_plans, custom_plans FROM pg_prepared_statements"
                " WHERE statement LIKE 'UPDATE public.engagement%'"
            )
        ).all()
    own.dispose()

    assert len(plans) == 2, "settle and claim"
    for generic, custom in plans:
        assert generic >= 15
        assert custom <= 5


@pytest.mark.parametrize(
    "answer", [[Sent()], None, InDoubt("x"), TimeoutError("slow")], ids=["too_few", "none", "one_outcome", "raises"]
)
def test_a_batch_without_an_outcome_for_each_is_a_doubt(engine, answer):
    """A batch call that does not say what became of each message proves nothing of any."""
    ids = queue(engine, new_message("a"), new_message("b"))

    class Batch:
        def send_many(self, _messages):
            if isinstance(answer, Exception):
                raise answer
            return answer

    process_message_queue(engine, Batch(), concurrency=2)

    assert [row(engine, message_id).status for message_id in ids] == ["in_doubt", "in_doubt"]


@pytest.mark.parametrize("answer", [False, RuntimeError("gateway")], ids=["false", "raises"])
def test_nothing_is_claimed_while_the_transport_is_not_ready(engine, answer):
    """A transport that cannot send costs no message an attempt."""
    (message_id,) = queue(engine, new_message())

    class NotReady:
        def ready(self):
            if isinstance(answer, Exception):
                raise answer
            return answer

        def send(self, _message):
            pytest.fail("was sent")

    assert process_message_queue(engine, NotReady()).processed == 0
    assert (row(engine, message_id).status, row(engine, message_id).attempt) == ("pending", 0)


def test_a_ready_that_is_cancelled_is_a_no(engine):
    """An `async def ready` that is torn down does not end the worker, and costs no message an attempt."""
    (message_id,) = queue(engine, new_message())

    class Cancelled:
        async def ready(self):
            raise asyncio.CancelledError

        def send(self, _message):
            pytest.fail("was sent")

    assert process_message_queue(engine, Cancelled()).processed == 0
    assert (row(engine, message_id).status, row(engine, message_id).attempt) == ("pending", 0)


def test_a_worker_goes_on_when_the_transport_is_ready_again(engine):
    """A worker whose transport is not ready waits, and sends when it is; `ready` may be async."""
    queue(engine, new_message())
    stop = threading.Event()
    answers = iter([False, False])

    class Recovering:
        async def ready(self):
            return next(answers, True)

        def send(self, _message):
            stop.set()

    result = Worker(engine, Recovering(), poll_interval=timedelta(milliseconds=50)).run(stop)

    assert result.succeeded == 1


# The worker as a process of its own


def test_a_worker_sends_what_becomes_due_and_finishes_what_is_in_hand(engine):
    """An idle worker notices a new message within a poll, and `stop` lets the send in hand finish and settle."""
    stop, is_sending, may_finish = threading.Event(), threading.Event(), threading.Event()

    def send(_message):
        is_sending.set()
        assert may_finish.wait(PATIENCE)
        return Sent("late")

    results = []
    worker = Worker(engine, send, poll_interval=timedelta(milliseconds=20))
    thread = threading.Thread(target=lambda: results.append(worker.run(stop)))
    thread.start()
    first, second = queue(engine, new_message("a"), new_message("b"))
    assert is_sending.wait(PATIENCE)
    stop.set()
    may_finish.set()
    thread.join(PATIENCE)

    assert results[0].succeeded == 1
    assert (row(engine, first).status, row(engine, second).status) == ("sent", "pending")


def test_an_idle_worker_makes_one_small_query_a_poll(engine):
    """A worker without work asks one question a poll, and claims nothing."""
    other = create_engine(engine.url)
    statements, stop = [], threading.Event()

    @event.listens_for(other, "after_cursor_execute")
    def _count(_connection, _cursor, statement, *_):
        statements.append(statement)
        if len(statements) == 7:
            stop.set()

    Worker(other, lambda _: None, poll_interval=timedelta(milliseconds=10)).run(stop)
    other.dispose()

    polls = [statement for statement in statements if statement.startswith("SELECT (EXISTS")]
    assert len(polls) >= len(statements) - 3  # The first round sets, claims and recovers.


def test_a_missing_table_is_told_at_once(empty_engine):
    """What waiting does not mend is raised, and not waited for."""
    with pytest.raises(ProgrammingError, match="engagement_message_queue"):
        Worker(empty_engine, lambda _: None).run(threading.Event())


def test_the_table_may_be_in_a_schema(empty_engine):
    """`schema` is where the table is, for queueing and for sending."""
    migrations.upgrade(empty_engine, schema="crm")
    with Session(empty_engine) as session, session.begin():
        EngagementMessageRepository(session, schema="crm").queue_message(new_message())

    assert process_message_queue(empty_engine, lambda _: None, schema="crm").succeeded == 1


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"concurrency": 0}, "concurrency"),
        ({"lease": timedelta(0)}, "lease"),
        ({"worker_name": "a\nb"}, "worker_name"),
        ({"worker_name": "a" * 201}, "worker_name"),
        ({"max_retries": 0}, "max_retries"),
        ({"min_interval": timedelta(seconds=-1)}, "min_interval"),
        ({"send_timeout": timedelta(0)}, "send_timeout"),
        ({"backoff": lambda _: 5}, "backoff"),
        ({"limit": -1}, "limit"),
    ],
)
def test_options_are_checked_before_anything_is_claimed(engine, options, field):
    """A bad option is named at once."""
    with pytest.raises(ValueError, match=field):
        process_message_queue(engine, lambda _: None, **options)


def test_engine_and_transport_are_checked(engine):
    """An async engine, and a transport that cannot send, are refused with what to do instead."""
    async_engine = create_async_engine(engine.url)

    with pytest.raises(ValueError, match="engine: must be a sync Engine"):
        Worker(async_engine, lambda _: None)
    with pytest.raises(TypeError, match="transport"):
        process_message_queue(engine, object())


def test_logs_name_ids_and_never_people(engine, caplog):
    """No user, number, param, reason or key reaches the log, whatever the outcome."""
    caplog.set_level(logging.DEBUG, logger="engagement")
    names = ["Sent", "NotSent", "Refused", "InDoubt", "Withdraw", "raises"]
    messages = [new_message(f"person-{name}", message_params={"secret": f"param-{name}"}) for name in names]
    queue(engine, *messages)
    outcomes = {"NotSent": NotSent, "Refused": Refused, "InDoubt": InDoubt, "Withdraw": Withdraw}

    def send(message):
        name = message.user_id.removeprefix("person-")
        if name == "raises":
            raise RuntimeError(message.message_params["secret"], message.destination_jid)
        return outcomes[name](f"reason {message.destination_jid}") if name in outcomes else Sent(f"p-{name}")

    result = process_message_queue(engine, send, backoff=lambda _: timedelta(hours=1))

    assert result.processed == 6
    assert len(caplog.records) >= 6
    for private in ("person-", "param-", "@s.whatsapp.net", "reason"):
        assert private not in caplog.text
