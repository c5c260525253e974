"""Leases and timeouts: a living worker keeps its claim, and a send that takes too long is in doubt until it answers."""

import asyncio
import threading
from datetime import timedelta

import pytest
from conftest import execute, in_thread, new_message, queue, row, until
from sqlalchemy import event, text
from sqlalchemy.orm import Session

from crashes.accidents import LATER, PATIENCE_SECONDS, Running, Transport, an_engine, events_of, is_extension, lose
from engagement import EngagementMessageRepository, InDoubt, NotSent, Refused, Sent, process_message_queue
from engagement._claim import START, clock
from engagement._delivery import database as claims
from engagement._delivery import dispatch, run, schedule, transaction
from engagement._delivery.database import Holder
from engagement._delivery.schedule import next_step
from engagement.models import MessageStatus
from engagement.outcomes import Verdict


def test_a_slow_living_worker_keeps_its_claim(engine):
    """The lease of a send in hand is extended for as long as it takes, and nobody else recovers it."""
    (message_id,) = queue(engine, new_message())
    is_sending, may_end = threading.Event(), threading.Event()

    def send(_):
        is_sending.set()
        assert may_end.wait(PATIENCE_SECONDS)
        return Sent()

    with Running(engine, send, lease=timedelta(seconds=0.6)):
        assert is_sending.wait(PATIENCE_SECONDS)
        first = row(engine, message_id).lease_expires_at
        # Twice the lease after it would have run out.
        until(lambda: row(engine, message_id).lease_expires_at > first + timedelta(seconds=1.2))
        others = process_message_queue(engine, lambda _: pytest.fail("it was sent twice"))
        may_end.set()
        until(lambda: row(engine, message_id).status == "sent")

    assert others.processed == 0
    assert row(engine, message_id).attempt == 1


def test_a_send_that_outlasts_its_timeout_is_in_doubt_until_it_answers(engine):
    """After `send_timeout` a message is in doubt, others go on, and a late `Sent` resolves the doubt."""
    slow, other = queue(engine, new_message("slow"), new_message("other"))
    may_end = threading.Event()

    def send(message):
        if message.id == slow:
            assert may_end.wait(PATIENCE_SECONDS)
        return Sent(f"wamid.{message.id}")

    with Running(engine, send, send_timeout=timedelta(seconds=0.1), concurrency=2):
        until(lambda: row(engine, slow).status == "in_doubt")
        until(lambda: row(engine, other).status == "sent")
        may_end.set()
        until(lambda: row(engine, slow).status == "sent")

    assert row(engine, slow).provider_message_id == f"wamid.{slow}"
    assert events_of(engine, slow) == ["in_doubt", "resolved"]


@pytest.mark.parametrize("answer", [NotSent("busy"), Refused("no such number"), InDoubt("hm")])
def test_a_late_answer_other_than_sent_changes_nothing(engine, answer):
    """Once a send was given up as in doubt, only `Sent` says more than was known."""
    (message_id,) = queue(engine, new_message())
    may_end = threading.Event()

    def send(_):
        assert may_end.wait(PATIENCE_SECONDS)
        return answer

    with Running(engine, send, send_timeout=timedelta(seconds=0.1)) as worker:
        until(lambda: row(engine, message_id).status == "in_doubt")
        before = row(engine, message_id)
        may_end.set()
        # The worker is free again: it has dealt with the late answer.
        (next_id,) = queue(engine, new_message("next"))
        until(lambda: row(engine, next_id).attempt == 1)
        assert not worker.run.done()

    assert row(engine, message_id) == before
    assert worker.result.processed == 2


def test_a_send_that_hangs_puts_nothing_else_in_doubt(engine, monkeypatch):
    """While its only thread hangs, a worker claims nothing that it could not start."""
    hung, waiting = queue(engine, new_message("hung"), new_message("waiting"))
    may_end = threading.Event()

    with Running(engine, lambda _: may_end.wait(PATIENCE_SECONDS) and None, send_timeout=timedelta(seconds=0.1)):
        until(lambda: row(engine, hung).status == "in_doubt")
        # It could have claimed several times.
        steps = []
        monkeypatch.setattr(run, "next_step", lambda *now: steps.append(1) or next_step(*now))
        until(lambda: len(steps) > 10)
        assert (row(engine, waiting).status, row(engine, waiting).attempt) == ("pending", 0)
        may_end.set()
        until(lambda: row(engine, waiting).status == "sent")


def test_a_cron_run_ends_though_its_only_place_hangs(engine, monkeypatch):
    """It leaves the rest to the next run, when the send that it gave up has had time to end."""
    monkeypatch.setattr(schedule, "PATIENCE_SECONDS", 0.1)
    hung, waiting = queue(engine, new_message("hung"), new_message("waiting"))
    may_end = threading.Event()

    def process():
        timeout = timedelta(seconds=0.1)
        return process_message_queue(engine, lambda _: may_end.wait(PATIENCE_SECONDS) and None, send_timeout=timeout)

    assert in_thread(process).result(PATIENCE_SECONDS / 2).in_doubt == 1
    assert (row(engine, hung).status, row(engine, waiting).status) == ("in_doubt", "pending")
    may_end.set()


def test_what_one_holds_oneself_is_not_lost(engine):
    """A worker that could not extend its leases in time does not take over, and park, what it is sending."""
    first, second = queue(engine, new_message("first"), new_message("second"))
    lose(engine, first, second)

    with engine.begin() as connection:
        taken = claims.take_over(connection, Holder("one", LATER), limit=2, held=[first])

    assert [claim.message.id for claim in taken] == [second]


def test_an_extension_of_what_was_settled_changes_nothing(engine):
    """Its late first worker may settle a message while who took it over still asks what became of it."""
    (message_id,) = queue(engine, new_message())
    (late,) = lose(engine, message_id)
    with engine.begin() as connection:
        (taken,) = claims.take_over(connection, Holder("another", LATER), limit=1, held=[])
        claims.settle(connection, [(late, Verdict(status=MessageStatus.SENT, event="sent"))])
    before = row(engine, message_id)

    with engine.begin() as connection:
        assert claims.extend(connection, LATER, [taken]) == {}
        assert claims.adopt(connection, Holder("another", LATER), names=[taken.claimed_by]) == []
    assert row(engine, message_id) == before


def test_an_extension_waits_for_nobody(engine):
    """A host that cancels one message, in a transaction that stays open, must not let the leases of all run out."""
    ids = queue(engine, *(new_message(user) for user in "abc"))
    with engine.begin() as connection:
        held = claims.claim(
            connection, Holder("one", LATER), limit=3, after=START, busy=[], one_per_destination=False
        ).claims
    with Session(engine) as host, engine.begin() as connection:
        assert not EngagementMessageRepository(host).cancel_message(ids[1]).is_cancelled
        connection.execute(text("SET LOCAL lock_timeout = '10s'"))  # Else a failure would hang.
        extended = claims.extend(connection, LATER, held)

    assert sorted(claim.message.id for claim in extended) == [ids[0], ids[2]]


@pytest.mark.parametrize("lock", ["SELECT FROM engagement_message_queue FOR UPDATE", "LOCK engagement_message_queue"])
def test_what_could_not_be_extended_is_extended_soon(engine, monkeypatch, lock):
    """And not a third of a lease later: two unlucky moments, and the lease of a healthy send would be over."""
    queue(engine, new_message())
    is_sending, may_end, failed, extended = (threading.Event() for _ in range(4))
    later = [0]
    for module in (run, dispatch, transaction):
        monkeypatch.setattr(module, "clock", lambda: clock() + later[0])

    def send(_):
        is_sending.set()
        assert may_end.wait(2 * PATIENCE_SECONDS)

    with an_engine(engine.url) as watched, Running(watched, send, lease=LATER, concurrency=2):

        @event.listens_for(watched, "begin")
        def hurry(connection):
            connection.exec_driver_sql("SET LOCAL lock_timeout = '100ms'")

        @event.listens_for(watched, "after_cursor_execute")
        def note(_conn, cursor, _statement, parameters, *_):
            if is_extension(parameters):
                (extended if cursor.rowcount else failed).set()

        @event.listens_for(watched, "handle_error")
        def note_error(context):
            if is_extension(context.parameters or {}):
                failed.set()

        assert is_sending.wait(PATIENCE_SECONDS)
        with engine.begin() as host:
            host.execute(text(lock))
            later[0] = LATER.total_seconds() / 3
            assert failed.wait(PATIENCE_SECONDS)
        assert extended.wait(PATIENCE_SECONDS)
        may_end.set()


def test_a_worker_does_not_extend_what_was_taken_over(engine):
    """Who comes back while another one asks what became of its message must not believe that it still holds it."""
    (message_id,) = queue(engine, new_message())
    (lost,) = lose(engine, message_id)
    with engine.begin() as connection:
        (taken,) = claims.take_over(connection, Holder("another", timedelta(hours=1)), limit=1, held=[])
    before = row(engine, message_id)

    with engine.begin() as connection:
        assert claims.extend(connection, timedelta(hours=2), [lost]) == {}
    assert row(engine, message_id) == before

    with engine.begin() as connection:
        assert claims.extend(connection, timedelta(hours=2), [lost, taken]).keys() == {taken}
    assert row(engine, message_id).lease_expires_at > before.lease_expires_at


@pytest.mark.parametrize(("late", "attempts"), [(Sent(), 1), (NotSent("busy"), 2)])
def test_a_late_answer_does_not_drop_the_next_attempt(engine, monkeypatch, late, attempts):
    """A send that was given up ends right before its message is claimed again: `Sent` makes that needless."""
    (message_id,) = queue(engine, new_message())
    may_end = {1: threading.Event(), 2: threading.Event()}
    is_sending = threading.Event()

    def send(message):
        if message.attempt == 2:
            is_sending.set()
        assert may_end[message.attempt].wait(PATIENCE_SECONDS)
        return late if message.attempt == 1 else Sent()

    hear = dispatch.Dispatch.hear

    def hear_too_early(self, seconds=0.0):
        hear(self, seconds)
        found = row(engine, message_id)
        if not may_end[1].is_set() and (found.status, found.attempt) == ("pending", 1):
            may_end[1].set()
            until(lambda: not self._sender.news.empty())

    monkeypatch.setattr(dispatch.Dispatch, "hear", hear_too_early)
    transport = Transport(send, idempotent=True)
    options = {"send_timeout": timedelta(seconds=1), "lease": timedelta(seconds=1.5), "concurrency": 2}
    with Running(engine, transport, backoff=lambda _: timedelta(0), **options) as worker:
        if attempts == 2:
            assert is_sending.wait(PATIENCE_SECONDS)
            worker.stop.set()
            lease = row(engine, message_id).lease_expires_at
            until(lambda: row(engine, message_id).lease_expires_at != lease)  # It is still in hand.
            may_end[2].set()
        until(lambda: row(engine, message_id).status == "sent")

    assert row(engine, message_id).attempt == len(transport.sends) == attempts


def test_a_late_answer_makes_no_room_for_two(engine):
    """The place of a send that was given up is free once when it ends."""
    first, _, third = queue(engine, *(new_message(user) for user in "abc"))
    may_end, in_hand = threading.Event(), []

    def send(message):
        if message.id == first:
            assert may_end.wait(PATIENCE_SECONDS)
        in_hand.append(
            execute(engine, "SELECT count(*) FROM engagement_message_queue WHERE status = 'sending'").scalar_one()
        )

    with Running(engine, send, send_timeout=timedelta(seconds=0.5)):
        until(lambda: row(engine, first).status == "in_doubt")
        may_end.set()
        until(lambda: row(engine, third).status == "sent")

    assert in_hand == [0, 1, 1]


def test_a_send_in_the_loop_that_was_given_up_ends_no_run(engine):
    """Its place is free as soon as its coroutine has ended, and what else is due is sent."""
    ids = queue(engine, *(new_message(f"user{number}") for number in range(3)))

    async def send(message):
        if message.id == ids[0]:
            await asyncio.Event().wait()

    result = process_message_queue(engine, send, send_timeout=timedelta(seconds=0.2))

    assert (result.in_doubt, result.succeeded) == (1, 2)


def test_a_worker_does_not_sleep_while_a_send_that_was_given_up_ends(engine):
    """It would sleep for a poll interval, though its place is free in a moment."""
    ids = queue(engine, *(new_message(f"user{number}") for number in range(3)))

    async def send(message):
        if message.id == ids[0]:
            await asyncio.Event().wait()

    a_minute = timedelta(minutes=1)
    with Running(engine, send, send_timeout=timedelta(seconds=0.2), poll_interval=a_minute):
        until(lambda: [row(engine, message_id).status for message_id in ids] == ["in_doubt", "sent", "sent"])


@pytest.mark.usefixtures("one_send_thread")
def test_what_could_not_begin_in_time_is_not_in_doubt(engine):
    """There are fewer threads than were asked for: what waits for one has provably not left."""
    hanging, waiting = queue(engine, new_message("hanging"), new_message("waiting"))
    may_end = threading.Event()
    transport = Transport(lambda _: may_end.wait(PATIENCE_SECONDS) and None)

    with Running(engine, transport, concurrency=2, send_timeout=timedelta(seconds=0.2)):
        until(lambda: events_of(engine, waiting)[:1] == ["postponed"])
        until(lambda: row(engine, hanging).status == "in_doubt")
        may_end.set()
        until(lambda: row(engine, waiting).status == "sent")

    assert row(engine, waiting).retry_count == 0


def test_an_extension_that_says_that_a_claim_was_lost_is_believed(engine):
    """By the database's clock it may have been lost sooner than by ours: what was not begun by then is not sent."""
    first, second = queue(engine, new_message("first"), new_message("second"))
    is_sending, may_end, sent = threading.Event(), threading.Event(), []

    async def send(message):
        sent.append(message.id)
        is_sending.set()
        assert may_end.wait(PATIENCE_SECONDS)  # In the event loop: the second send cannot begin.

    with Running(engine, send, lease=timedelta(seconds=1.5), concurrency=2) as worker:
        assert is_sending.wait(PATIENCE_SECONDS)
        execute(engine, "UPDATE engagement_message_queue SET lease_expires_at = now() WHERE id = :id", id=second)
        assert process_message_queue(engine, Transport()).in_doubt == 1
        worker.stop.set()
        for _ in range(2):  # When the next extension is there, what the one before said is known.
            lease = row(engine, first).lease_expires_at
            until(lambda lease=lease: row(engine, first).lease_expires_at > lease)
        may_end.set()

    assert sent == [first]
    assert (row(engine, first).status, row(engine, second).status) == ("sent", "in_doubt")
