"""In what order messages leave, how many at once, and how far apart."""

import logging
import threading
import time
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from queue import SimpleQueue

import pytest
from conftest import PATIENCE, execute, in_thread, new_message, queue, row, until
from sqlalchemy.orm import Session

from engagement import NotSent, Sent, Worker, process_message_queue
from engagement._claim import START, clock
from engagement._delivery import cursor, dispatch, readiness, run, transaction
from engagement._delivery import database as claims
from engagement._operating.overview import overview
from engagement._sending.sender import _Sending
from engagement.policies import Gate

PAST = datetime(2026, 1, 1, tzinfo=UTC)


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
        return overview(session).waiting_for


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


def test_a_run_ends_though_its_transport_does_not_say_whether_it_is_ready(engine, monkeypatch, caplog):
    """It says so, in the log and on the message, and leaves the queue to the next run."""
    monkeypatch.setattr(readiness, "TELL_SECONDS", 0.1)
    (message_id,) = queue(engine, new_message())
    may_answer, transport = threading.Event(), _Waiting()
    transport.ready = lambda: may_answer.wait(PATIENCE)

    done = in_thread(lambda: process_message_queue(engine, transport)).result(PATIENCE / 2)

    may_answer.set()
    assert done.processed == 0
    assert waits_for(engine) == readiness.SILENT
    assert f"engagement.not_ready reason={readiness.SILENT}" in caplog.messages
    assert (row(engine, message_id).status, row(engine, message_id).attempt) == ("pending", 0)


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


def test_what_becomes_due_is_sent_by_a_timer(engine):
    """No poll finds it, nor a notification: the worker has asked once when the next message is due."""
    soon = datetime.now(UTC) + timedelta(seconds=1)
    queue(engine, new_message("a", scheduled_for=soon), new_message("b", scheduled_for=soon + timedelta(seconds=0.5)))
    sent: SimpleQueue[int] = SimpleQueue()
    stop, thread = running(Worker(engine, lambda message: sent.put(message.id), poll_interval=timedelta(hours=1)))

    assert [sent.get(timeout=PATIENCE), sent.get(timeout=PATIENCE)] == [1, 2]

    stop.set()
    thread.join(PATIENCE)
