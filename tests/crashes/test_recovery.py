"""What a lost worker held is looked up, sent again by an idempotent transport, or parked."""

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from conftest import execute, in_thread, new_message, queue, row, until
from sqlalchemy.orm import Session

from crashes.accidents import LATER, PATIENCE_SECONDS, Running, Transport, events_of, is_true, lose
from engagement import EngagementMessageRepository, InDoubt, NotSent, Refused, Sent, Withdraw, process_message_queue
from engagement._claim import START
from engagement._delivery import database as claims
from engagement._delivery.database import Holder
from engagement.messages import delivery_id
from engagement.outcomes import Verdict, decide


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
        recorded = claims.settle(connection, [(latest, sent), (late, unsent)]).recorded

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


@pytest.mark.parametrize("outcome", [NotSent("busy"), Refused("no"), Withdraw("opted out"), InDoubt("?")])
def test_a_late_answer_does_not_settle_the_next_attempt(engine, outcome):
    """While the next attempt is in hand, an answer to the one before is none to it; of `Sent` see forgotten claims."""
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
            assert claims.settle(connection, [(late, verdict)]).recorded == {}
        return Sent(f"attempt {message.attempt}")

    process_message_queue(engine, send)

    assert row(engine, message_id).provider_message_id == "attempt 2"


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
