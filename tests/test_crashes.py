"""Crashes, timeouts and lost databases: what was claimed is sent at most once, and what is known is never forgotten."""

import asyncio
import errno
import logging
import os
import signal
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from functools import partial

import pytest
from chaos.orders import Point
from chaos.proxy import proxied
from chaos.scene import Scene
from conftest import execute, in_thread, new_message, queue, row, until, wait_until_blocked
from sqlalchemy import create_engine, event, text
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

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
from engagement._claim import START, Claim, clock
from engagement._delivery import database as claims
from engagement._delivery import dispatch, one_by_one, outage, run, transaction
from engagement._delivery.database import Holder
from engagement._delivery.schedule import next_step
from engagement._operating.temporary_postgres import temporary_postgres
from engagement._sql.errors import is_undone
from engagement.messages import delivery_id
from engagement.models import EARLIEST, MessageStatus
from engagement.outcomes import Verdict, decide
from engagement.verification import verify

PATIENCE_SECONDS = 20.0
LATER = timedelta(hours=1)


def is_true(engine, sql) -> bool:
    with engine.connect() as connection:
        return bool(connection.scalar(text(sql)))


class Running:
    """A worker in a thread, as `with` has it; what it raises comes out at the end."""

    def __init__(self, engine, transport, **options) -> None:
        given = {"poll_interval": timedelta(milliseconds=20)} | options
        self.stop = threading.Event()
        self._run = partial(Worker(engine, transport, **given).run, self.stop)

    def __enter__(self):
        self.run = in_thread(self._run)
        return self

    def __exit__(self, kind, *_):
        self.stop.set()
        if kind is None:
            self.result = self.run.result(PATIENCE_SECONDS)


def lose(engine, *ids) -> list[Claim]:
    """Claim what is due as a worker that is never heard of again; return the claims when their lease has run out."""
    dead = Holder("dead worker", timedelta(milliseconds=1))
    with engine.begin() as connection:
        claimed = claims.claim(
            connection,
            dead,
            limit=len(ids),
            after=START,
            busy=[],
            one_per_destination=False,
            idempotent=True,
        )
    assert sorted(claim.message.id for claim in claimed.claims) == sorted(ids)
    until(lambda: is_true(engine, "SELECT max(lease_expires_at) < now() FROM engagement_message_queue"))
    return claimed.claims


def events_of(engine, message_id) -> list[str]:
    return [entry["event"] for entry in row(engine, message_id).history]


class Transport:
    """Sends by `send`, and notes every call."""

    def __init__(self, send=lambda _: Sent(), look_up=None, *, idempotent=False) -> None:
        self._send = send
        self._look_up = look_up
        self.idempotent = idempotent
        self.sends = []
        self.look_ups = []
        if look_up is not None:
            self.look_up = self._note_look_up

    def send(self, message):
        """Note it and send."""
        self.sends.append(message)
        return self._send(message)

    def _note_look_up(self, message):
        self.look_ups.append(message)
        return self._look_up(message)


# Leases and timeouts --------------------------------------------------------------------------------------------------


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


# Recovery -------------------------------------------------------------------------------------------------------------


def fails(_):
    raise ConnectionError


@pytest.mark.parametrize(
    ("options", "status", "retry_count", "sends"),
    [
        ({}, "in_doubt", 0, 0),
        ({"idempotent": True}, "sent", 1, 1),
        ({"look_up": lambda _: Sent("wamid")}, "sent", 0, 0),
        ({"look_up": lambda _: Sent("wamid"), "idempotent": True}, "sent", 0, 0),
        ({"look_up": lambda _: NotSent("unknown")}, "sent", 1, 1),
        ({"look_up": lambda _: None}, "in_doubt", 0, 0),
        ({"look_up": fails}, "in_doubt", 0, 0),
        ({"look_up": lambda _: "sent, I think"}, "in_doubt", 0, 0),
    ],
)
def test_what_a_dead_worker_held(engine, options, status, retry_count, sends):
    """It is looked up, or sent again by an idempotent transport, or parked; what is not known costs no retry."""
    (message_id,) = queue(engine, new_message())
    lose(engine, message_id)
    transport = Transport(**options)

    with Running(engine, transport, backoff=lambda _: timedelta(milliseconds=1)):
        until(lambda: row(engine, message_id).status == status)

    assert row(engine, message_id).retry_count == retry_count
    assert len(transport.sends) == sends
    assert len(transport.look_ups) == ("look_up" in options)


def test_a_lost_message_is_sent_again_under_its_delivery_id(engine):
    """An idempotent transport gets the delivery id of the attempt that was lost, so that it can tell a repeat."""
    (message_id,) = queue(engine, new_message())
    lose(engine, message_id)
    lost = row(engine, message_id)
    transport = Transport(idempotent=True)

    with Running(engine, transport, backoff=lambda _: timedelta(milliseconds=1)):
        until(lambda: row(engine, message_id).status == "sent")

    (sent,) = transport.sends
    assert (sent.attempt, lost.attempt) == (2, 1)
    assert sent.delivery_id == delivery_id(lost.idempotency_key)


@pytest.mark.parametrize(
    "transport",
    [Transport(idempotent=True), Transport(look_up=lambda _: NotSent("unknown")), Transport()],
    ids=["idempotent", "look_up", "plain"],
)
def test_what_kills_its_workers_is_parked(engine, transport):
    """A message whose workers died `max_retries` times ends in doubt, never in `failed`, whatever the transport."""
    (message_id,) = queue(engine, new_message())
    for death in range(1, 4):
        lose(engine, message_id)
        process_message_queue(engine, transport, max_retries=3, backoff=lambda _: LATER)
        if row(engine, message_id).status == "in_doubt":
            break
        assert (row(engine, message_id).status, row(engine, message_id).retry_count) == ("pending", death)
        execute(engine, "UPDATE engagement_message_queue SET next_attempt_at = now()")

    assert row(engine, message_id).status == "in_doubt"
    assert row(engine, message_id).attempt == (1 if not (transport.idempotent or transport.look_ups) else 3)
    assert transport.sends == []


def test_a_forgotten_message_in_hand_holds_back_nobody(engine):
    """While one asks what became of a lost message that was forgotten since, and sends another, it goes on claiming."""
    (lost,) = queue(engine, new_message("ana"))
    lose(engine, lost)
    with Session(engine) as session, session.begin():
        EngagementMessageRepository(session).forget_user("ana")
    go_on, sent = threading.Event(), []

    def send(message):
        sent.append(message.user_id)
        assert go_on.wait(PATIENCE_SECONDS)

    transport = Transport(send, look_up=lambda _: go_on.wait(PATIENCE_SECONDS) and None)
    with Running(engine, transport, concurrency=4) as running:
        for user_id in ("bob", "cid", "dan"):  # Each while those before it are in hand.
            queue(engine, new_message(user_id))
            until(lambda user_id=user_id: user_id in sent)
        go_on.set()
        until(lambda: row(engine, lost).status == "in_doubt")

    assert running.result.succeeded == 3


def test_two_processors_recover_a_message_once(engine):
    """Each lost message is looked up by one of the processors that find it."""
    ids = queue(engine, *(new_message(f"user{number}") for number in range(40)))
    lose(engine, *ids)
    transport = Transport(look_up=lambda _: Sent("found"))

    with ThreadPoolExecutor(4) as pool:
        runs = [pool.submit(process_message_queue, engine, transport, concurrency=2) for _ in range(4)]
        succeeded = sum(run.result().succeeded for run in runs)

    assert succeeded == 40
    assert sorted(message.id for message in transport.look_ups) == ids


def test_a_message_whose_look_up_kills_its_workers_is_parked(engine):
    """Who asks what became of it may die of that too: after as many deaths as a send may fail, nobody asks."""
    (message_id,) = queue(engine, new_message())
    lose(engine, message_id)
    for death in range(2):
        with engine.begin() as connection:
            claims.take_over(connection, Holder(f"{death}", timedelta(milliseconds=1)), limit=1, held=[])
        until(lambda: is_true(engine, "SELECT max(lease_expires_at) < now() FROM engagement_message_queue"))
        assert row(engine, message_id).claimed_by == f"{death}/recovery/{death + 1}"
    transport = Transport(look_up=lambda _: NotSent("it would have killed this one too"))

    process_message_queue(engine, transport, max_retries=3)

    assert transport.look_ups == []
    found = row(engine, message_id)
    assert (found.status, found.error_message) == ("in_doubt", "3 workers were lost with it")


def test_a_message_is_not_recovered_while_it_is_settled(engine):
    """A worker that settles when its lease has just run out is not overtaken by a recovery."""
    (message_id,) = queue(engine, new_message())
    lose(engine, message_id)
    late = Verdict(status="sent", event="sent")
    with engine.begin() as connection:
        (claim,) = claims.take_over(connection, Holder("late", timedelta(milliseconds=1)), limit=1, held=[])
    until(lambda: is_true(engine, "SELECT max(lease_expires_at) < now() FROM engagement_message_queue"))
    with engine.begin() as connection:
        claims.settle(connection, [(claim, late)])
        recovered = in_thread(process_message_queue, engine, Transport()).result(PATIENCE_SECONDS)

    assert recovered.processed == 0
    assert row(engine, message_id).status == "sent"


def test_what_is_known_of_two_attempts_is_recorded_at_once(engine):
    """The late answer of one attempt hides nothing of the next, in whatever order they come."""
    (message_id,) = queue(engine, new_message())
    (late,) = lose(engine, message_id)
    process_message_queue(engine, Transport())
    with Session(engine) as session, session.begin():
        assert EngagementMessageRepository(session).resolve_message(message_id, sent=False)
    (latest,) = lose(engine, message_id)
    sent = Verdict(status="sent", event="sent", has_doubt=False)
    unsent = Verdict(status="failed", event="refused", reason="no such number")

    with engine.begin() as connection:
        recorded = claims.settle(connection, [(latest, sent), (late, unsent)])

    assert recorded == {latest: "sent"}
    assert row(engine, message_id).status == "sent"


def test_a_late_sent_corrects_who_said_that_nothing_was_sent(engine):
    """A person was mistaken, and cancelled what could be cancelled then: what was sent, was sent."""
    (message_id,) = queue(engine, new_message())
    may_end = threading.Event()

    with Running(engine, lambda _: may_end.wait(PATIENCE_SECONDS) and None, send_timeout=timedelta(seconds=0.1)):
        until(lambda: row(engine, message_id).status == "in_doubt")
        with Session(engine) as session, session.begin():
            repository = EngagementMessageRepository(session)
            assert repository.resolve_message(message_id, sent=False)
            assert repository.cancel_message(message_id).is_cancelled
        may_end.set()
        until(lambda: row(engine, message_id).status == "sent")

    assert events_of(engine, message_id) == ["in_doubt", "resolved", "cancelled", "resolved"]


@pytest.mark.parametrize("outcome", [Sent("late"), NotSent("busy")])
def test_a_late_answer_does_not_settle_the_next_attempt(engine, outcome):
    """While the next attempt is in hand, what became of the one before is no answer to it."""
    (message_id,) = queue(engine, new_message())
    with engine.begin() as connection:
        claimed = claims.claim(
            connection, Holder("late", timedelta(0)), limit=1, after=START, busy=[], one_per_destination=False
        )
    (late,) = claimed.claims
    process_message_queue(engine, Transport())
    with Session(engine) as session, session.begin():
        EngagementMessageRepository(session).resolve_message(message_id, sent=False)

    def send(message):
        verdict = decide(
            outcome, retry_count=0, max_retries=3, idempotent=False, worker_lost=False, backoff=lambda _: LATER
        )
        with engine.begin() as connection:
            assert claims.settle(connection, [(late, verdict)]) == {}
        return Sent(f"attempt {message.attempt}")

    process_message_queue(engine, send)

    assert row(engine, message_id).provider_message_id == "attempt 2"


# Lost commits -------------------------------------------------------------------------------------------------------


def forget_claim(engine, message_id) -> None:
    """Put a row back to what it was before its claim, as a promoted standby does that had not received it."""
    execute(
        engine,
        "UPDATE engagement_message_queue SET status = 'pending', attempt = 0, claimed_by = NULL,"
        " lease_expires_at = NULL WHERE id = :id",
        id=message_id,
    )


class Answers:
    """A transport whose sends wait until the test answers each of them."""

    def __init__(self) -> None:
        self.begun, self._futures = [], []

    def send(self, message):
        """Wait for the answer."""
        future = Future()
        self._futures.append(future)
        self.begun.append(message.attempt)
        return future.result(PATIENCE_SECONDS)

    def answer(self, which, outcome) -> None:
        """Let a send end."""
        self._futures[which].set_result(outcome)


@contextmanager
def two_claims_of_one_attempt(engine, message_id):
    """Let two workers send one attempt, since the claim of the first was forgotten, and a third one look for work."""
    answers, options = Answers(), {"backoff": lambda _: timedelta(0)}
    with Running(engine, answers, **options) as first:
        until(lambda: answers.begun == [1])
        forget_claim(engine, message_id)
        with Running(engine, answers, **options) as second:
            until(lambda: answers.begun == [1, 1])
            with Running(engine, answers, **options):
                yield answers, first, second


@pytest.mark.parametrize(
    "outcome", [NotSent("busy"), Refused("no such number"), Withdraw("opted out"), Postpone(EARLIEST, "not now")]
)
def test_a_claim_that_was_lost_with_a_commit_settles_no_other_of_its_attempt(engine, caplog, outcome):
    """What became of a claim says nothing of another one of the same number, which is being sent."""
    (message_id,) = queue(engine, new_message())

    with two_claims_of_one_attempt(engine, message_id) as (answers, _, _):
        held = row(engine, message_id)
        answers.answer(0, outcome)
        until(lambda: f"engagement.claim_lost message_id={message_id} attempt=1" in caplog.text)
        assert row(engine, message_id) == held
        answers.answer(1, Sent("second"))
        until(lambda: row(engine, message_id).status == "sent")

    assert answers.begun == [1, 1]
    assert row(engine, message_id).provider_message_id == "second"


def test_a_doubt_of_a_claim_that_was_lost_is_kept(engine):
    """It may have left, so that the message is not sent again, also if the other claim of it was not sent."""
    (message_id,) = queue(engine, new_message())

    with two_claims_of_one_attempt(engine, message_id) as (answers, _, _):
        answers.answer(0, InDoubt("no answer"))
        until(lambda: row(engine, message_id).has_doubt)
        assert (row(engine, message_id).status, row(engine, message_id).attempt) == ("sending", 1)
        answers.answer(1, NotSent("busy"))
        until(lambda: row(engine, message_id).status == "in_doubt")

    assert answers.begun == [1, 1]
    assert events_of(engine, message_id) == ["in_doubt", "not_sent", "in_doubt"]


@pytest.mark.parametrize("status", ["failed", "cancelled"])
def test_a_doubt_of_a_claim_that_was_lost_undoes_an_end(engine, status):
    """Nothing ends as unsent that may have left."""
    (message_id,) = queue(engine, new_message())
    outcome = Refused("no such number") if status == "failed" else Withdraw("opted out")

    with two_claims_of_one_attempt(engine, message_id) as (answers, _, _):
        answers.answer(1, outcome)
        until(lambda: row(engine, message_id).status == status)
        answers.answer(0, InDoubt("no answer"))
        until(lambda: row(engine, message_id).status == "in_doubt")


def test_sent_of_a_claim_that_was_lost_ends_the_message_and_a_second_one_is_told(engine, caplog):
    """A message that was sent is sent, whoever holds it; that it went out twice is an error in the log, and is kept."""
    (message_id,) = queue(engine, new_message())

    with two_claims_of_one_attempt(engine, message_id) as (answers, _, _):
        answers.answer(0, Sent("first"))
        until(lambda: row(engine, message_id).status == "sent")
        answers.answer(1, Sent("second"))
        until(lambda: f"engagement.sent_twice message_id={message_id} attempt=1" in caplog.text)

    found = row(engine, message_id)
    assert (answers.begun, found.provider_message_id) == ([1, 1], "first")
    assert events_of(engine, message_id) == ["resolved", "sent_twice"]


@pytest.mark.parametrize("outcome", [Sent("wamid"), InDoubt("no answer")])
def test_what_is_known_of_a_claim_that_was_forgotten_keeps_it_from_being_sent_again(engine, outcome):
    """Its worker is the only one that knows of the send, and tells the database that has forgotten it."""
    (message_id,) = queue(engine, new_message())
    sends = []

    def send(message):
        sends.append(message.id)
        forget_claim(engine, message_id)
        return outcome

    process_message_queue(engine, send)
    process_message_queue(engine, send)

    assert sends == [message_id]
    assert row(engine, message_id).status == ("sent" if isinstance(outcome, Sent) else "in_doubt")


def test_two_verdicts_of_one_message_are_recorded_one_after_the_other(engine):
    """A worker that knows of two claims of one attempt loses neither of what became of them."""
    (message_id,) = queue(engine, new_message())
    (first,) = lose(engine, message_id)
    forget_claim(engine, message_id)
    with engine.begin() as connection:
        (second,) = claims.claim(
            connection, Holder("second", LATER), limit=1, after=START, busy=[], one_per_destination=True
        ).claims
    unsent = Verdict(status="failed", event="refused", reason="no such number")
    sent = Verdict(status="sent", event="sent", has_doubt=False)

    with engine.begin() as connection:
        recorded = claims.settle(connection, [(second, unsent), (first, sent)])

    assert recorded == {second: "failed", first: "sent"}
    assert row(engine, message_id).status == "sent"


# Frozen workers -------------------------------------------------------------------------------------------------------


@pytest.fixture(name="scene")
def _scene(request, empty_engine, tmp_path):
    url, prepares = empty_engine.url.render_as_string(hide_password=False), not request.config.getoption("--pgbouncer")
    with Scene(url, tmp_path, prepares=prepares) as scene:
        yield scene


def frozen(scene, point: Point):
    """Start a worker that freezes at the point, and return it when it has, and its lease has run out."""
    worker = scene.start(lease_seconds=0.5, signal_at=point, signal="SIGSTOP")
    scene.wait_until_stopped(worker)
    until(lambda: is_true(scene.engine, "SELECT max(lease_expires_at) < now() FROM engagement_message_queue"))
    return worker


def thaw_and_stop(scene, worker) -> None:
    os.kill(worker.pid, signal.SIGCONT)
    scene.stop(worker)


def test_a_frozen_worker_that_has_sent_resolves_the_doubt(scene):
    """It comes back after it was recovered: its late `Sent` is the truth about the same attempt."""
    (message_id,) = scene.queue([new_message()])
    worker = frozen(scene, Point.AFTER_SEND)
    process_message_queue(scene.engine, Transport())
    assert scene.status(message_id) == "in_doubt"

    thaw_and_stop(scene, worker)

    assert scene.status(message_id) == "sent"
    assert events_of(scene.engine, message_id) == ["in_doubt", "resolved"]
    assert row(scene.engine, message_id).history[-1]["sent"] is True
    assert len(scene.ledger.entries()) == 1


def test_a_frozen_worker_overwrites_no_newer_attempt(scene):
    """It comes back with a failure after its message was sent by another one, and changes nothing."""
    (message_id,) = scene.queue([new_message(message_params={"act": "fail_first"})])
    worker = frozen(scene, Point.BEFORE_SEND)
    process_message_queue(scene.engine, Transport())
    with Session(scene.engine) as session, session.begin():
        assert EngagementMessageRepository(session).resolve_message(message_id, sent=False)
    process_message_queue(scene.engine, Transport())
    before = row(scene.engine, message_id)
    assert (before.status, before.attempt) == ("sent", 2)

    thaw_and_stop(scene, worker)

    assert row(scene.engine, message_id) == before
    assert "engagement.claim_lost message_id=1 attempt=1" in scene.log.read_text()


def test_a_worker_frozen_before_the_send_does_not_send_after_its_lease(scene):
    """What others have recovered meanwhile, it must not send."""
    (message_id,) = scene.queue([new_message()])
    worker = frozen(scene, Point.AFTER_CLAIM_COMMIT)
    process_message_queue(scene.engine, Transport())

    thaw_and_stop(scene, worker)

    assert scene.status(message_id) == "in_doubt"
    assert scene.ledger.entries() == []


def test_a_worker_frozen_before_the_send_gives_its_claim_back(scene):
    """If nobody has recovered the message, it is sent once, by this claim or by the next, and never in doubt."""
    (message_id,) = scene.queue([new_message()])
    worker = frozen(scene, Point.AFTER_CLAIM_COMMIT)
    os.kill(worker.pid, signal.SIGCONT)
    scene.wait_until(lambda: scene.status(message_id) == "sent", "the message")
    scene.stop(worker)

    (entry,) = scene.ledger.entries()
    # The lease is extended, or the send sees first that it ran out: either may come first.
    assert (entry.attempt, events_of(scene.engine, message_id)) in [(1, []), (2, ["postponed"])]


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


@contextmanager
def referred_to(engine):
    """A host may have a foreign key to the queue, and a transaction open that has inserted such rows."""
    execute(engine, "CREATE TABLE host_note (message_id bigint REFERENCES engagement_message_queue)")
    try:
        with engine.begin() as host:
            host.execute(text("INSERT INTO host_note SELECT id FROM engagement_message_queue"))
            yield
    finally:
        execute(engine, "DROP TABLE host_note")


def test_what_only_refers_to_a_message_is_in_no_workers_way(engine):
    """It would be left out by each claim and each recovery until the host's transaction ends."""
    (lost,) = queue(engine, new_message("lost"))
    (held,) = lose(engine, lost)
    (due,) = queue(engine, new_message("due"))
    another = Holder("another", LATER)
    with referred_to(engine), engine.begin() as connection:
        assert claims.extend(connection, timedelta(0), [held]).keys() == {held}
        (taken,) = claims.take_over(connection, another, limit=1, held=[])
        (adopted,) = claims.adopt(connection, another, names=[taken.claimed_by])
        (claimed,) = claims.claim(connection, another, limit=1, after=START, busy=[], one_per_destination=True).claims

    assert (adopted.message.id, claimed.message.id) == (lost, due)


def test_what_only_refers_to_a_message_is_in_nobodys_way_who_changes_it(engine):
    """Who cancels, forgets or prunes would wait until the host's transaction ends, or leave the message out."""
    queue(engine, new_message("finished"))
    process_message_queue(engine, lambda _: None)
    one, _, _ = queue(engine, *(new_message(user) for user in ("one", "all", "forgotten")))
    with referred_to(engine), Session(engine) as session:
        session.execute(text("SET LOCAL lock_timeout = '10s'"))  # Else a failure would hang.
        repository = EngagementMessageRepository(session)
        assert repository.prune_messages(older_than=timedelta(0)) == 1
        assert repository.cancel_message(one).is_cancelled
        assert repository.cancel_pending_messages("all") == 1
        assert repository.forget_user("forgotten").cancelled == 1


def test_an_adoption_waits_for_nobody(engine):
    """What is known is committed with it, and must not wait for a lock on another message."""
    first, second = queue(engine, new_message("first"), new_message("second"))
    held = lose(engine, first, second)
    with Session(engine) as host, engine.begin() as connection:
        assert not EngagementMessageRepository(host).cancel_message(first).is_cancelled
        connection.execute(text("SET LOCAL lock_timeout = '10s'"))  # Else a failure would hang.
        adopted = claims.adopt(connection, Holder("again", LATER), names=[held[0].claimed_by])

    assert [claim.message.id for claim in adopted] == [second]


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


@pytest.mark.parametrize("outcome", [NotSent("busy"), Refused("no such number"), Withdraw("opted out")])
def test_who_comes_after_a_doubt_was_recorded_has_lost_the_claim(engine, caplog, outcome):
    """What another one parked stays parked, and is neither counted nor logged as recorded by who claimed it."""
    (message_id,) = queue(engine, new_message())
    parked = []

    def send(_):
        execute(engine, "UPDATE engagement_message_queue SET lease_expires_at = now()")
        parked.append(process_message_queue(engine, Transport()).in_doubt)
        return outcome

    result = process_message_queue(engine, send)

    assert (parked, result.processed, result.in_doubt) == ([1], 1, 0)
    assert f"engagement.claim_lost message_id={message_id} attempt=1" in caplog.text
    assert (row(engine, message_id).status, events_of(engine, message_id)) == ("in_doubt", ["in_doubt"])


@pytest.mark.parametrize(
    ("change", "sends"),
    [
        ("status = 'cancelled'", 0),
        ("next_attempt_at = next_attempt_at + interval '1 hour'", 0),
        ("next_attempt_at = next_attempt_at - interval '1 minute'", 1),
        ("message_key = 'goodbye.other'", 1),
    ],
    ids=["cancelled", "later", "earlier", "no matter"],
)
def test_what_is_changed_between_the_snapshot_of_a_claim_and_its_lock(engine, change, sends):
    """It is claimed by what it is now: not if it is no longer due, and once if it still is, be it by the next claim."""
    first, second = queue(engine, new_message("ana"), new_message("bob"))
    claiming = create_engine(engine.url)
    execute(
        engine,
        "CREATE OR REPLACE FUNCTION pause_at(id bigint, number bigint) RETURNS boolean LANGUAGE sql VOLATILE AS"
        " $$ SELECT CASE WHEN id = number THEN pg_advisory_xact_lock_shared(4711) IS NOT NULL ELSE true END $$",
    )

    @event.listens_for(claiming, "before_cursor_execute", retval=True)
    def pause(_conn, _cursor, statement, parameters, *_):
        """The claim has its snapshot, and looks at the first message: here it waits."""
        due = "FROM public.engagement_message_queue \nWHERE public.engagement_message_queue.status = 'pending'"
        if is_claim(parameters):
            assert due in statement
            paused = f"{due} AND public.pause_at(public.engagement_message_queue.id, {first})"
            statement = statement.replace(due, paused)
        return statement, parameters

    sent = []
    with engine.connect() as holding, holding.begin():
        holding.execute(text("SELECT pg_advisory_xact_lock(4711)"))
        run = in_thread(process_message_queue, claiming, lambda message: sent.append(message.id), concurrency=5)
        wait_until_blocked(engine, 1)
        execute(engine, f"UPDATE engagement_message_queue SET {change} WHERE id = :id", id=second)
    result = run.result(PATIENCE_SECONDS)
    claiming.dispose()
    execute(engine, "DROP FUNCTION pause_at")

    assert sorted(sent) == [first] + [second] * sends
    assert result.succeeded == 1 + sends
    assert row(engine, second).attempt == sends


def test_settlements_lock_in_one_order(engine):
    """Two that meet on the same rows, a late worker's and a recoverer's, wait for each other and cannot deadlock."""
    first, middle, last = queue(engine, *(new_message(user) for user in "abc"))
    with engine.begin() as connection:
        taken = claims.claim(
            connection, Holder("w", LATER), limit=3, after=START, busy=[], one_per_destination=False
        ).claims
    verdict = Verdict(status=MessageStatus.SENT, event="sent", has_doubt=False)

    def settle_backwards() -> None:
        with engine.begin() as connection:
            # The plan of a large table, which follows what is given.
            for method in ("hashjoin", "mergejoin", "seqscan"):
                connection.execute(text(f"SET LOCAL enable_{method} = off"))
            claims.settle(connection, [(claim, verdict) for claim in reversed(taken)])

    with engine.connect() as other:
        other.execute(text("SELECT FROM engagement_message_queue WHERE id = :id FOR UPDATE"), {"id": middle})
        settling = in_thread(settle_backwards)
        wait_until_blocked(engine, 1)
        with engine.connect() as third:
            free = third.execute(text("SELECT id FROM engagement_message_queue FOR UPDATE SKIP LOCKED")).scalars().all()
    settling.result(PATIENCE_SECONDS)

    assert free == [last]
    assert row(engine, first).status == "sent"


# Stopping -------------------------------------------------------------------------------------------------------------


def is_released(pipe) -> bool:
    """Open and close the pipe that a send waits at, if it does."""
    try:
        os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return False  # Nobody reads it yet.
    return True


def test_a_stop_signal_lets_the_send_in_hand_finish(scene, tmp_path):
    """After SIGTERM nothing is claimed, the send in hand is finished and settled, and the exit status is 0."""
    release = tmp_path / "release"
    os.mkfifo(release)
    params = {"act": "wait", "release": str(release)}
    in_hand, waiting = scene.queue([new_message(message_params=params), new_message("waiting")])
    worker = scene.start()
    scene.wait_until(lambda: "waiting" in scene.notes_of(worker.pid), "a send in hand")

    worker.send_signal(signal.SIGTERM)
    until(lambda: is_released(release))
    assert worker.wait(PATIENCE_SECONDS) == 0

    assert (scene.status(in_hand), scene.status(waiting)) == ("sent", "pending")
    assert len(scene.ledger.entries()) == 1


# Lost connections -----------------------------------------------------------------------------------------------------


def is_claim(parameters) -> bool:
    return "busy" in parameters


def is_settlement(parameters) -> bool:
    return "given_id" in parameters


def is_take_over(parameters) -> bool:
    return "recoverer" in parameters and "worker" not in parameters


def is_extension(parameters) -> bool:
    return "names" in parameters and "held" in parameters


def at_first_commit(engine, kind, act) -> None:
    """Call `act(connection)` just before the first commit of a transaction with a statement of the kind."""
    pending = [act]

    @event.listens_for(engine, "after_cursor_execute")
    def note(conn, cursor, _statement, parameters, *_):
        if kind(parameters) and cursor.rowcount > 0:
            conn.info["is_it"] = True

    @event.listens_for(engine, "commit")
    def commits(conn):
        if conn.info.pop("is_it", False) and pending:
            pending.pop()(conn)


@contextmanager
def an_engine(url, **options):
    engine = create_engine(url, **options)
    try:
        yield engine
    finally:
        engine.dispose()


@pytest.fixture(name="proxy")
def _proxy(engine):
    with proxied(engine.url) as proxy:
        yield proxy


@pytest.fixture(name="through_proxy")
def _through_proxy(proxy):
    with an_engine(proxy.url) as engine:
        yield engine


def terminate(engine, connection) -> None:
    """End the backend of a connection, and return when it is gone."""
    # Asked, since what a pooler tells its client is a number of its own.
    (pid,) = connection.connection.dbapi_connection.execute("SELECT pg_backend_pid()").fetchone()
    assert execute(engine, "SELECT pg_terminate_backend(:pid)", pid=pid).scalar_one()
    until(lambda: not is_true(engine, f"SELECT exists(SELECT FROM pg_stat_activity WHERE pid = {pid})"))


def test_a_claim_whose_commit_was_not_acknowledged_is_adopted(engine, proxy, through_proxy):
    """The claim was committed and the worker was not told: it finds its own claim, and sends it once."""
    (message_id,) = queue(engine, new_message())
    at_first_commit(through_proxy, is_claim, lambda _: proxy.lose_next_commit())
    transport = Transport()

    with Running(through_proxy, transport):
        until(lambda: row(engine, message_id).status == "sent")

    assert len(transport.sends) == 1
    assert row(engine, message_id).attempt == 1


def test_what_is_adopted_has_its_destination_to_itself(engine, proxy, through_proxy):
    """Nothing else is sent to it beside what was claimed before, and not acknowledged."""
    ids = queue(engine, *(new_message("a", idempotency_key=str(number)) for number in range(3)))
    at_first_commit(through_proxy, is_claim, lambda _: proxy.lose_next_commit())
    under_way, most = [], []

    def send(message):
        under_way.append(message.id)
        most.append(len(under_way))
        time.sleep(0.05)  # So that another one could begin.
        under_way.remove(message.id)

    with Running(through_proxy, send, concurrency=4):
        until(lambda: row(engine, ids[-1]).status == "sent")

    assert most == [1, 1, 1]


def test_a_claim_that_was_not_committed_is_made_again(engine, through_proxy):
    """The connection is cut before the commit: nothing was claimed, and the next try sends it once."""
    (message_id,) = queue(engine, new_message())
    at_first_commit(through_proxy, is_claim, lambda connection: terminate(engine, connection))
    transport = Transport()

    with Running(through_proxy, transport):
        until(lambda: row(engine, message_id).status == "sent")

    assert len(transport.sends) == 1
    assert row(engine, message_id).attempt == 1


@pytest.mark.parametrize("is_committed", [True, False])
def test_a_claim_of_one_run_that_was_not_acknowledged_is_not_left_behind(engine, proxy, through_proxy, is_committed):
    """A cron job whose very first commit goes unanswered sends what it claimed, or gives it back: no doubt."""
    (message_id,) = queue(engine, new_message())
    blow = (lambda _: proxy.lose_next_commit()) if is_committed else (lambda connection: terminate(engine, connection))
    at_first_commit(through_proxy, is_claim, blow)

    try:
        process_message_queue(through_proxy, Transport())
    except DBAPIError:
        assert row(engine, message_id).status == "pending"
    else:
        assert row(engine, message_id).status == "sent"


def test_a_stop_in_the_middle_of_an_unanswered_claim_gives_it_back(engine, proxy, through_proxy):
    """A worker that is stopped before it knows of its claim leaves the message pending, not in doubt."""
    (message_id,) = queue(engine, new_message())
    transport = Transport()
    worker = Running(through_proxy, transport)

    def lose_and_stop(_):
        proxy.lose_next_commit()
        worker.stop.set()

    at_first_commit(through_proxy, is_claim, lose_and_stop)
    with worker:
        worker.run.result(PATIENCE_SECONDS)

    assert (row(engine, message_id).status, transport.sends) == ("pending", [])


@pytest.mark.parametrize(("outcome", "failures"), [(Sent("wamid"), 0), (NotSent("busy"), 1)])
def test_a_settlement_whose_commit_was_not_acknowledged_counts_once(engine, proxy, through_proxy, outcome, failures):
    """The outcome was committed and the worker was not told: it is not recorded twice, and nothing is sent again."""
    (message_id,) = queue(engine, new_message())
    at_first_commit(through_proxy, is_settlement, lambda _: proxy.lose_next_commit())
    transport = Transport(lambda _: outcome)

    with Running(through_proxy, transport, backoff=lambda _: LATER) as worker:
        until(lambda: transport.sends)
        queue(engine, new_message("next"))
        until(lambda: len(transport.sends) == 2)

    assert len(transport.sends) == 2
    assert (row(engine, message_id).retry_count, len(row(engine, message_id).history)) == (failures, failures)
    assert worker.result.succeeded + worker.result.retried == 2


def test_a_claim_that_is_committed_late_is_sent(engine):
    """The server gets a COMMIT after the worker has gone on: nothing else is due, and it is adopted all the same."""
    (message_id,) = queue(engine, new_message())
    transport = Transport()
    with proxied(engine.url) as proxy, an_engine(proxy.url) as through:
        at_first_commit(through, is_claim, lambda _: proxy.delay_next_commit())
        with Running(through, transport):
            assert proxy.is_delayed.wait(PATIENCE_SECONDS)
            (another,) = queue(engine, new_message("another"))
            until(lambda: row(engine, another).status == "sent")
            assert row(engine, message_id).status == "pending"
            proxy.may_commit.set()
            until(lambda: row(engine, message_id).status == "sent")

    assert [(message.id, message.attempt) for message in transport.sends] == [(another, 1), (message_id, 1)]


@pytest.mark.parametrize("how", ["not ready", "stopped"])
def test_a_claim_that_was_not_acknowledged_is_given_back(engine, proxy, through_proxy, monkeypatch, how):
    """If it can no longer be sent, another worker gets it at once, and not when the lease has run out, as a doubt."""
    monkeypatch.setattr(outage, "WAIT_SECONDS", (2.0, 2.0))  # By then `ready` is asked again.
    slow, quick, late = queue(engine, *(new_message(name) for name in ("slow", "quick", "late")))
    may_end, is_lost, stop = threading.Event(), threading.Event(), threading.Event()
    transport = Transport(lambda message: may_end.wait(PATIENCE_SECONDS) and None if message.id == slow else None)
    transport.ready = lambda: how == "stopped" or not is_lost.is_set()

    def lose_it(_):
        proxy.lose_next_commit()
        is_lost.set()
        if how == "stopped":
            stop.set()

    at_first_commit(through_proxy, is_settlement, lose_it)
    run = in_thread(Worker(through_proxy, transport, concurrency=2).run, stop)
    until(lambda: events_of(engine, late) == ["postponed"])
    assert [row(engine, message_id).status for message_id in (slow, quick, late)] == ["sending", "sent", "pending"]
    stop.set()
    may_end.set()
    run.result(PATIENCE_SECONDS)

    assert [message.id for message in transport.sends] == [slow, quick]


def test_a_claim_that_was_not_acknowledged_is_given_back_though_nothing_is_known(engine, proxy, through_proxy):
    """A worker that was told to stop has a slow send in hand, and no outcome to record."""
    (slow,) = queue(engine, new_message("slow"))
    is_sending, may_end, stop = threading.Event(), threading.Event(), threading.Event()

    def send(_):
        is_sending.set()
        assert may_end.wait(PATIENCE_SECONDS)

    def lose_it(_):
        proxy.lose_next_commit()
        stop.set()

    poll = timedelta(milliseconds=20)
    run = in_thread(Worker(through_proxy, send, concurrency=2, poll_interval=poll).run, stop)
    assert is_sending.wait(PATIENCE_SECONDS)
    at_first_commit(through_proxy, is_claim, lose_it)
    (late,) = queue(engine, new_message("late"))
    until(lambda: events_of(engine, late) == ["postponed"])
    assert (row(engine, slow).status, row(engine, late).status) == ("sending", "pending")
    may_end.set()
    run.result(PATIENCE_SECONDS)


def test_a_settlement_that_was_not_committed_is_repeated(engine, through_proxy):
    """The connection is cut before the commit: the worker knows what was sent, and records it."""
    (message_id,) = queue(engine, new_message())
    at_first_commit(through_proxy, is_settlement, lambda connection: terminate(engine, connection))
    transport = Transport(lambda _: Sent("wamid"))

    with Running(through_proxy, transport):
        until(lambda: row(engine, message_id).status == "sent")

    assert len(transport.sends) == 1


@pytest.mark.parametrize("look_up", [None, lambda _: Sent("found")])
def test_a_take_over_whose_commit_was_not_acknowledged_is_not_adopted(engine, proxy, through_proxy, look_up):
    """What was taken over may have been sent by another worker: it is recovered again, never sent as one's own."""
    (message_id,) = queue(engine, new_message())
    lose(engine, message_id)
    at_first_commit(through_proxy, is_take_over, lambda _: proxy.lose_next_commit())
    transport = Transport(look_up=look_up)

    with Running(through_proxy, transport, lease=timedelta(seconds=1)):
        until(lambda: row(engine, message_id).status == ("sent" if look_up else "in_doubt"))

    assert transport.sends == []
    assert row(engine, message_id).attempt == 1


@pytest.mark.direct("it ends backends by the name of their client")
def test_a_cut_connection_leaves_no_doubt(engine):
    """All backends are terminated while a send is in hand: it is settled as sent, by the same attempt."""
    ids = queue(engine, *(new_message(f"user{number}") for number in range(5)))
    with an_engine(engine.url, connect_args={"application_name": "cut me"}) as worker_engine:

        def send(_):
            execute(
                engine,
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'cut me'",
            )
            return Sent()

        transport = Transport(send)
        with Running(worker_engine, transport):
            until(lambda: all(row(engine, message_id).status == "sent" for message_id in ids))

    assert [message.id for message in transport.sends] == ids
    assert {row(engine, message_id).attempt for message_id in ids} == {1}


def test_a_stop_while_the_database_is_away_claims_nothing_more(engine, through_proxy):
    """A worker that is stopped while it repeats a settlement records it, and takes nothing new."""
    in_hand, waiting = queue(engine, new_message("in_hand"), new_message("waiting"))
    worker = Running(through_proxy, Transport())

    def terminate_and_stop(connection):
        terminate(engine, connection)
        worker.stop.set()

    at_first_commit(through_proxy, is_settlement, terminate_and_stop)
    with worker:
        worker.run.result(PATIENCE_SECONDS)

    assert row(engine, in_hand).status == "sent"
    assert (row(engine, waiting).status, row(engine, waiting).attempt) == ("pending", 0)


@pytest.mark.parametrize(("outcome", "event"), [(NotSent("busy"), "not_sent"), (Withdraw("opted out"), "withdrawn")])
def test_a_settlement_in_doubt_that_was_not_acknowledged_is_recognised(engine, proxy, through_proxy, outcome, event):
    """An earlier attempt may have left, so the message is parked; that the commit went unanswered changes nothing."""
    (message_id,) = queue(engine, new_message())
    execute(engine, "UPDATE engagement_message_queue SET has_doubt = true, attempt = 2, retry_count = 2")
    at_first_commit(through_proxy, is_settlement, lambda _: proxy.lose_next_commit())

    result = process_message_queue(through_proxy, Transport(lambda _: outcome, idempotent=True))

    assert (result.processed, result.in_doubt) == (1, 1)
    assert (row(engine, message_id).status, events_of(engine, message_id)) == ("in_doubt", [event])


# A lost database ------------------------------------------------------------------------------------------------------


@pytest.fixture(name="server", scope="module")
def _server():
    # What is not flushed is lost in a crash: the WAL writer comes by every ten seconds only.
    with temporary_postgres(settings={"wal_writer_delay": "10s"}) as server:
        with an_engine(server.url) as engine:
            migrations.upgrade(engine)
        yield server


@pytest.fixture(name="own_engine")
def _own_engine(server):
    with an_engine(server.url, pool_pre_ping=True) as engine:
        yield engine
        execute(engine, "TRUNCATE engagement_message_queue")


@contextmanager
def heard(event_name: str):
    """Hand out an event that is set when the worker logs it."""
    is_heard = threading.Event()
    handler = logging.Handler()
    handler.emit = lambda record: is_heard.set() if record.getMessage().startswith(event_name) else None
    logger = logging.getLogger("engagement")
    logger.addHandler(handler)
    try:
        yield is_heard
    finally:
        logger.removeHandler(handler)


@pytest.mark.parametrize("concurrency", [1, 3])
def test_a_send_that_is_accepted_while_the_database_is_away_is_recorded(server, own_engine, concurrency):
    """The database crashes during the send and comes back later: the message is sent, once, and not in doubt."""
    ids = queue(own_engine, *(new_message(f"user{number}") for number in range(6)))
    has_crashed = threading.Event()

    def send(message):
        if message.id == ids[2]:
            server.stop("immediate")
            has_crashed.set()
        return Sent(f"wamid.{message.id}")

    transport = Transport(send)
    with (
        heard("engagement.database_lost") as is_lost,
        an_engine(server.url) as engine,
        Running(engine, transport, concurrency=concurrency),
    ):
        assert has_crashed.wait(PATIENCE_SECONDS)
        assert is_lost.wait(PATIENCE_SECONDS)
        server.start()
        until(lambda: all(row(own_engine, message_id).status == "sent" for message_id in ids))

    assert sorted(message.id for message in transport.sends) == ids


@pytest.mark.direct("it gives the server options at its start")
def test_a_claim_is_durable_whatever_the_hosts_setting(engine):
    """A host may commit asynchronously; what gives a lease, or extends it, does not, and leaves no setting behind."""
    lost, due = queue(engine, new_message("lost"), new_message("due"))
    execute(engine, f"UPDATE engagement_message_queue SET next_attempt_at = now() + interval '1h' WHERE id = {due}")
    lose(engine, lost)
    execute(engine, "UPDATE engagement_message_queue SET next_attempt_at = now() WHERE status = 'pending'")
    seen = set()
    kinds = {"claim": is_claim, "take_over": is_take_over, "extension": is_extension}
    with an_engine(engine.url, connect_args={"options": "-c synchronous_commit=off"}) as careless:

        @event.listens_for(careless, "after_cursor_execute")
        def note(conn, cursor, _statement, parameters, *_):
            if cursor.rowcount > 0:
                conn.info.setdefault("kinds", set()).update(kind for kind, is_it in kinds.items() if is_it(parameters))

        @event.listens_for(careless, "commit")
        def commits(conn):
            setting = conn.exec_driver_sql("SHOW synchronous_commit").scalar()
            seen.update((kind, setting) for kind in conn.info.pop("kinds", set()))

        def send(_):
            until(lambda: ("extension", "on") in seen or ("extension", "off") in seen)

        with Running(careless, Transport(send, look_up=lambda _: Sent("found")), lease=timedelta(seconds=1)):
            until(lambda: {row(engine, lost).status, row(engine, due).status} == {"sent"})
        with careless.connect() as connection:
            assert connection.exec_driver_sql("SHOW synchronous_commit").scalar() == "off"

    assert seen == {(kind, "on") for kind in kinds}


def test_a_settlement_that_a_crash_undid_is_not_sent_again(server, own_engine):
    """With asynchronous commits a crash can lose that a message was sent. Its worker must not take it for unsent."""
    (message_id,) = queue(own_engine, new_message())
    transport = Transport()
    with (
        heard("engagement.database_lost") as is_lost,
        an_engine(server.url, connect_args={"options": "-c synchronous_commit=off"}) as careless,
        # The interval keeps the settlement in a transaction of its own.
        Running(careless, transport, min_interval=timedelta(seconds=0.5), lease=timedelta(seconds=2)),
    ):
        until(lambda: row(own_engine, message_id).status == "sent")
        server.restart("immediate")
        assert is_lost.wait(PATIENCE_SECONDS)
        until(lambda: row(own_engine, message_id).status in {"sent", "in_doubt"})

    assert len(transport.sends) == 1
    # Else the WAL writer came by just then, and nothing was undone.
    assert row(own_engine, message_id).status == "in_doubt"


# Transports, rules and tables that break ------------------------------------------------------------------------------


class WithoutText(Exception):
    def __str__(self):
        raise LookupError


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        (lambda: Sent(12345), "sent"),
        (lambda: Refused(ValueError("no such number")), "failed"),
        (lambda: Refused(WithoutText()), "failed"),
        (lambda: NotSent(None), "pending"),
        (lambda: InDoubt(7), "in_doubt"),
    ],
)
def test_an_outcome_that_does_not_hold_text_is_recorded_all_the_same(engine, answer, status):
    """A provider's id that is a number, or an exception for a reason, must not turn a known outcome into a doubt."""
    first, second = queue(engine, new_message("first"), new_message("second"))

    process_message_queue(engine, lambda _: answer(), backoff=lambda _: LATER)

    assert (row(engine, first).status, row(engine, second).status) == (status, status)


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


def test_a_stop_is_heard_while_a_send_that_was_given_up_goes_on(engine):
    """Nothing is in hand then, and the run ends long before the next poll."""
    (message_id,) = queue(engine, new_message())
    may_end = threading.Event()
    options = {"send_timeout": timedelta(seconds=0.1), "poll_interval": timedelta(minutes=5)}

    with Running(engine, lambda _: may_end.wait(60), **options):
        until(lambda: row(engine, message_id).status == "in_doubt")
    may_end.set()


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


@pytest.mark.usefixtures("one_send_thread")
def test_a_look_up_that_could_not_begin_in_time_leaves_its_message_in_doubt(engine):
    """That nobody could ask what became of it does not say that it was not sent."""
    ids = queue(engine, new_message("first"), new_message("second"))
    lose(engine, *ids)
    may_end = threading.Event()
    transport = Transport(look_up=lambda _: may_end.wait(PATIENCE_SECONDS) and None)

    with Running(engine, transport, concurrency=2, send_timeout=timedelta(seconds=0.2)):
        until(lambda: [row(engine, message_id).status for message_id in ids] == ["in_doubt", "in_doubt"])
        may_end.set()

    assert transport.sends == []


@pytest.mark.parametrize("sent_first", [0, 1])
def test_a_batch_that_breaks_while_its_outcomes_are_read_keeps_those_that_were(engine, sent_first):
    """`send_many` may be a generator: what it raises on the way speaks of the messages that it had not come to."""
    ids = queue(engine, new_message("first"), new_message("second"))

    class Batch:
        def send_many(self, messages):
            for _ in messages[:sent_first]:
                yield Sent()
            raise TimeoutError

    with Running(engine, Batch(), concurrency=2):
        wanted = ["sent", "in_doubt"] if sent_first else ["in_doubt", "in_doubt"]
        until(lambda: [row(engine, message_id).status for message_id in ids] == wanted)


@pytest.mark.parametrize(
    "answer",
    [lambda messages: {str(message.delivery_id): Refused("no") for message in messages}, lambda _: "ok"],
    ids=["dict", "text"],
)
def test_a_batch_answer_that_is_no_sequence_of_outcomes_is_in_doubt(engine, answer):
    """Neither the keys of a dict nor the letters of a text are taken for provider ids, as if all had been sent."""
    ids = queue(engine, new_message("first"), new_message("second"))

    class Batch:
        def send_many(self, messages):
            return answer(messages)

    process_message_queue(engine, Batch(), concurrency=2)

    assert {row(engine, message_id).status for message_id in ids} == {"in_doubt"}


def test_a_batch_that_is_a_generator_is_timed_out_as_any_other(engine):
    """The sends of a generator are made beside the worker too, which sees that they take too long."""
    (message_id,) = queue(engine, new_message())
    may_end = threading.Event()

    class Batch:
        def send_many(self, messages):
            for _ in messages:
                assert may_end.wait(PATIENCE_SECONDS)
                yield Sent()

    with Running(engine, Batch(), send_timeout=timedelta(seconds=0.1)):
        try:
            until(lambda: row(engine, message_id).status == "in_doubt")
        finally:
            may_end.set()
        until(lambda: row(engine, message_id).status == "sent")


@pytest.mark.parametrize("error", [KeyError, SystemExit])
def test_a_backoff_that_breaks_loses_nothing(engine, error):
    """A host's rule that raises for the second failure neither ends the worker nor forgets what was not sent."""
    failing, other = queue(engine, new_message("failing"), new_message("other"))
    execute(engine, f"UPDATE engagement_message_queue SET retry_count = 1, attempt = 1 WHERE id = {failing}")

    def backoff(failures):
        if failures > 1:
            raise error(failures)
        return LATER

    with Running(engine, Transport(lambda _: NotSent("busy")), backoff=backoff, max_retries=5):
        until(lambda: row(engine, other).status == "pending" and row(engine, other).retry_count == 1)

    assert (row(engine, failing).status, row(engine, failing).retry_count) == ("pending", 2)


def test_a_slow_ready_is_heard(engine):
    """A transport that takes longer to say that it is ready than it is asked for still gets its messages."""
    (message_id,) = queue(engine, new_message())

    class Slow(Transport):
        def ready(self):
            time.sleep(1.2)
            return True

    with Running(engine, Slow()):
        until(lambda: row(engine, message_id).status == "sent")


BREAK = """
CREATE FUNCTION pg_temp_break() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'broken'; END $$;
CREATE TRIGGER chaos_break BEFORE UPDATE ON engagement_message_queue FOR EACH ROW
WHEN ({when}) EXECUTE FUNCTION pg_temp_break();
"""
BREAK_EXTENSIONS_AT_COMMIT = """
CREATE FUNCTION pg_temp_break() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'broken'; END $$;
CREATE CONSTRAINT TRIGGER chaos_break AFTER UPDATE ON engagement_message_queue DEFERRABLE INITIALLY DEFERRED
FOR EACH ROW WHEN (old.status = 'sending' AND new.claimed_by = old.claimed_by AND new.status = 'sending')
EXECUTE FUNCTION pg_temp_break();
"""
SLOW_CLAIM = """
CREATE FUNCTION pg_temp_break() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(5); RETURN new; END $$;
CREATE TRIGGER chaos_break BEFORE UPDATE ON engagement_message_queue FOR EACH ROW
WHEN (old.status = 'pending' AND new.status = 'sending') EXECUTE FUNCTION pg_temp_break();
"""
EXTENSION_FAILED = "engagement.leases_not_extended error=LookupError"
MEND = """
DROP TRIGGER IF EXISTS chaos_break ON engagement_message_queue;
DROP FUNCTION IF EXISTS pg_temp_break;
"""


@pytest.fixture(name="break_when")
def _break_when(engine):
    yield lambda when: execute(engine, BREAK.format(when=when))
    execute(engine, MEND)


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("SELECT 1 / 0", True),
        ("SET LOCAL statement_timeout = 1; SELECT pg_sleep(60)", True),
        # It may come after the commit, which then waited for a standby.
        ("SELECT pg_terminate_backend(pg_backend_pid())", False),
    ],
)
def test_only_a_server_that_goes_on_has_undone_a_transaction(engine, statement, expected):
    """A claim of which this is not known is looked for again, and adopted if it is there."""
    with pytest.raises(DBAPIError) as caught, engine.begin() as connection:
        connection.execute(text(statement))

    assert is_undone(caught.value) is expected


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


def test_an_error_of_the_claim_does_not_delay_what_is_known(engine, break_when, monkeypatch):
    """When claiming breaks for good, what was just sent is settled at once, and then the error is raised."""
    monkeypatch.setattr(one_by_one, "MOST_BROKEN", 1)
    sent, waiting = queue(engine, new_message("sent"), new_message("waiting"))

    def send(_):
        break_when("old.status = 'pending' AND new.status = 'sending'")
        return Sent()

    run = in_thread(process_message_queue, engine, send)
    until(lambda: row(engine, sent).status == "sent")
    with pytest.raises(DBAPIError, match="broken"):
        run.result(PATIENCE_SECONDS)

    assert row(engine, waiting).status == "pending"


@pytest.mark.direct("it gives the server options at its start")
@pytest.mark.usefixtures("break_when")
def test_a_claim_that_fails_again_and_again_does_not_delay_what_is_known(engine, monkeypatch):
    """While each claim outlasts the host's `statement_timeout`, what is known is settled, and leases are extended."""
    monkeypatch.setattr(outage, "WAIT_SECONDS", (10.0, 10.0))  # Longer than a lease, from the beginning.
    first, second = queue(engine, new_message("first"), new_message("second"))
    may_end = {first: threading.Event(), second: threading.Event()}
    are_sending, adoptions = threading.Semaphore(0), []

    def send(message):
        are_sending.release()
        assert may_end[message.id].wait(PATIENCE_SECONDS)

    with (
        an_engine(engine.url, connect_args={"options": "-c statement_timeout=200"}) as hasty,
        Running(hasty, send, lease=timedelta(seconds=1.5), concurrency=2),
    ):

        @event.listens_for(hasty, "before_cursor_execute")
        def note(_conn, _cursor, _statement, parameters, *_):
            if "names" in parameters and "held" not in parameters:
                adoptions.append(parameters["names"])

        for _ in may_end:
            assert are_sending.acquire(timeout=PATIENCE_SECONDS)
        execute(engine, SLOW_CLAIM)
        third = queue(engine, new_message("third"))
        may_end[first].set()
        until(lambda: row(engine, first).status == "sent")
        for _ in range(3):
            lease = row(engine, second).lease_expires_at
            until(lambda lease=lease: row(engine, second).lease_expires_at > lease)
        may_end[second].set()
        until(lambda: row(engine, second).status == "sent")
        assert row(engine, third[0]).status == "pending"
    assert adoptions == [], "the server has said that it undid those claims"


@pytest.mark.direct("it gives the server options at its start")
@pytest.mark.usefixtures("break_when")
def test_a_run_that_gives_up_finishes_what_it_has_in_hand(engine):
    """A cron job whose claims fail for longer than a lease ends with the error, and records its send before."""
    (in_hand,) = queue(engine, new_message())
    is_sending, may_end = threading.Event(), threading.Event()

    def send(_):
        is_sending.set()
        assert may_end.wait(PATIENCE_SECONDS)

    with an_engine(engine.url, connect_args={"options": "-c statement_timeout=200"}) as hasty:
        run = in_thread(process_message_queue, hasty, send, lease=timedelta(seconds=1), concurrency=2)
        assert is_sending.wait(PATIENCE_SECONDS)
        execute(engine, SLOW_CLAIM)
        (waiting,) = queue(engine, new_message("waiting"))
        with heard("engagement.database_lost") as is_lost:
            assert is_lost.wait(PATIENCE_SECONDS)
        for _ in range(6):  # Two seconds: a third of a lease each.
            lease = row(engine, in_hand).lease_expires_at
            until(lambda lease=lease: row(engine, in_hand).lease_expires_at > lease)
        may_end.set()
        with pytest.raises(DBAPIError, match="statement timeout"):
            run.result(PATIENCE_SECONDS)

    assert (row(engine, in_hand).status, row(engine, waiting).status) == ("sent", "pending")


def test_a_run_that_gives_up_waits_for_its_send_though_a_commit_was_not_acknowledged(engine):
    """A cron job whose database is away for longer than two leases still records what it sent meanwhile."""
    (message_id,) = queue(engine, new_message())
    is_sending, may_end, is_away, tries = threading.Event(), threading.Event(), threading.Event(), []

    def send(_):
        is_sending.set()
        assert may_end.wait(PATIENCE_SECONDS)

    with an_engine(engine.url, poolclass=NullPool) as hooked, heard(EXTENSION_FAILED) as cannot_extend:

        @event.listens_for(hooked, "do_connect")
        def token(*_):
            if is_away.is_set():
                tries.append(time.monotonic())
                raise LookupError("no token")

        @event.listens_for(hooked, "commit")
        def cut_off(conn):
            if is_sending.is_set() and not tries:
                is_away.set()
                terminate(engine, conn)

        run = in_thread(process_message_queue, hooked, send, lease=timedelta(seconds=1), concurrency=2)
        assert cannot_extend.wait(PATIENCE_SECONDS)
        until(lambda: run.done() or tries[-1] > tries[0] + 4)  # More than two leases, and their waits.
        assert not run.done()
        is_away.clear()
        may_end.set()
        with pytest.raises(SQLAlchemyError):
            run.result(PATIENCE_SECONDS)

    assert row(engine, message_id).status == "sent"


def test_a_hook_of_the_host_that_fails_is_no_end(engine):
    """Who makes the connections may fail for a while, as one that gets a token does: what was sent is not forgotten."""
    slow, quick = queue(engine, new_message("slow"), new_message("quick"))
    is_broken, may_end, tries = threading.Event(), threading.Event(), []

    def send(message):
        is_broken.set()
        if message.id == slow:
            assert may_end.wait(PATIENCE_SECONDS)

    with an_engine(engine.url, poolclass=NullPool) as hooked:

        @event.listens_for(hooked, "do_connect")
        def token(*_):
            if is_broken.is_set():
                tries.append(1)
                raise LookupError("no token")

        with Running(hooked, send, lease=timedelta(seconds=1.5), concurrency=2), heard(EXTENSION_FAILED) as is_heard:
            assert is_heard.wait(PATIENCE_SECONDS)
            until(lambda: len(tries) > 3)
            is_broken.clear()
            until(lambda: row(engine, quick).status == "sent")
            may_end.set()
            until(lambda: row(engine, slow).status == "sent")


def test_a_hook_that_never_worked_ends_the_run(engine):
    """Who starts a worker that can never connect sees why."""
    with an_engine(engine.url, poolclass=NullPool) as hooked:

        @event.listens_for(hooked, "do_connect")
        def token(*_):
            raise LookupError("no token")

        with pytest.raises(LookupError, match="no token"):
            Worker(hooked, Transport()).run(threading.Event())


def test_what_was_claimed_and_not_begun_is_given_back_whatever_ends_the_run(engine):
    """An error between the commit of a claim and the send, in a filter of the host's logging here."""
    first, second = queue(engine, new_message("first"), new_message("second"))

    def break_off(record):
        raise LookupError(record.name)

    logger = logging.getLogger("engagement")
    logger.addFilter(break_off)
    try:
        with pytest.raises(LookupError):
            process_message_queue(engine, lambda _: NotSent("it is told to the log"), backoff=lambda _: LATER)
    finally:
        logger.removeFilter(break_off)

    # The second was claimed as the first was settled.
    assert (row(engine, first).retry_count, row(engine, second).attempt) == (1, 1)
    assert (row(engine, first).status, row(engine, second).status) == ("pending", "pending")


def test_an_error_of_the_extension_does_not_lose_the_send_in_hand(engine, break_when):
    """When leases cannot be extended for good, the send in hand is still settled before the error is raised."""
    (message_id,) = queue(engine, new_message())
    is_sending, may_end = threading.Event(), threading.Event()

    def send(_):
        break_when("old.status = 'sending' AND new.status = 'sending'")
        is_sending.set()
        assert may_end.wait(PATIENCE_SECONDS)
        return Sent()

    run = in_thread(process_message_queue, engine, send, lease=timedelta(seconds=0.3))
    assert is_sending.wait(PATIENCE_SECONDS)
    until(lambda: run.done() or is_true(engine, "SELECT max(lease_expires_at) < now() FROM engagement_message_queue"))
    may_end.set()
    with pytest.raises(DBAPIError, match="broken"):
        run.result(PATIENCE_SECONDS)

    assert row(engine, message_id).status == "sent"


def test_an_extension_that_was_not_committed_is_not_believed(engine, break_when):
    """While the commit of an extension fails, the lease runs out, and what was not begun by then is not sent."""
    first, second = queue(engine, new_message("first"), new_message("second"))
    execute(engine, BREAK_EXTENSIONS_AT_COMMIT)
    is_sending, may_end, sent = threading.Event(), threading.Event(), []

    async def send(message):
        sent.append(message.id)
        is_sending.set()
        assert may_end.wait(PATIENCE_SECONDS)  # In the event loop: the second send cannot begin.

    run = in_thread(process_message_queue, engine, send, lease=timedelta(seconds=0.5), concurrency=2)
    assert is_sending.wait(PATIENCE_SECONDS)
    until(lambda: is_true(engine, "SELECT max(lease_expires_at) < now() FROM engagement_message_queue"))
    may_end.set()
    with pytest.raises(DBAPIError, match="broken"):
        run.result(PATIENCE_SECONDS)

    assert sent == [first]
    assert (row(engine, first).status, row(engine, second).status) == ("sent", "pending")


def test_a_look_up_that_comes_late_is_not_taken_for_a_send_that_was_not_begun(engine, break_when):
    """What a lost worker may have sent stays in question, also when the lease of who asks has run out meanwhile."""
    ids = queue(engine, new_message("first"), new_message("second"))
    lose(engine, *ids)
    execute(engine, BREAK_EXTENSIONS_AT_COMMIT)
    is_asking, may_go_on, sent = threading.Event(), threading.Event(), []

    class Slow:
        def send(self, message):
            sent.append(message.id)

        async def look_up(self, _):
            is_asking.set()
            assert may_go_on.wait(PATIENCE_SECONDS)  # In the event loop: the second one cannot begin.

    run = in_thread(process_message_queue, engine, Slow(), lease=timedelta(seconds=0.5), concurrency=2)
    assert is_asking.wait(PATIENCE_SECONDS)
    until(lambda: is_true(engine, "SELECT max(lease_expires_at) < now() FROM engagement_message_queue"))
    may_go_on.set()
    with pytest.raises(DBAPIError, match="broken"):
        run.result(PATIENCE_SECONDS)

    assert [row(engine, message_id).status for message_id in ids] == ["in_doubt", "in_doubt"]
    assert sent == []


@pytest.fixture(autouse=True)
def _no_promise_is_broken(request):
    """Whatever a test does to a delivery, the table keeps its promises."""
    engine = request.getfixturevalue("engine") if "engine" in request.fixturenames else None
    yield
    if engine is not None:
        with Session(engine) as session:
            assert verify(session) == []
