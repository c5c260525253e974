"""A claim whose commit a promoted standby never received: what is known of it still counts."""

from concurrent.futures import Future
from contextlib import contextmanager
from datetime import timedelta

import pytest
from conftest import execute, new_message, queue, row, until
from sqlalchemy.orm import Session

from crashes.accidents import LATER, PATIENCE_SECONDS, Running, Transport, events_of, lose
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
from engagement._claim import START
from engagement._delivery import database as claims
from engagement._delivery.database import Holder
from engagement.models import EARLIEST, MessageStatus
from engagement.outcomes import Verdict


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
        recorded = claims.settle(connection, [(second, unsent), (first, sent)]).recorded

    assert recorded == {second: "failed", first: "sent"}
    assert row(engine, message_id).status == "sent"


SENT = Verdict(status=MessageStatus.SENT, event=Sent.event, has_doubt=False)


def called_unsent(engine, message_id):
    """Return the claim of a worker that may have sent; a person has called it unsent since."""
    (first,) = lose(engine, message_id)
    process_message_queue(engine, Transport())
    with Session(engine) as session, session.begin():
        assert EngagementMessageRepository(session).resolve_message(message_id, sent=False)
    return first


def settle(engine, claim, verdict=SENT):
    with engine.begin() as connection:
        return claims.settle(connection, [(claim, verdict)]).recorded.get(claim)


@pytest.mark.parametrize(
    ("later", "status"), [(NotSent("no"), "pending"), (Refused("no"), "failed"), (InDoubt("?"), "in_doubt")]
)
def test_a_late_sent_counts_after_a_later_attempt(engine, later, status):
    """A fact is no less true since the message was claimed again: nobody sends it a third time."""
    (message_id,) = queue(engine, new_message())
    first = called_unsent(engine, message_id)
    process_message_queue(engine, lambda _: later, limit=1, backoff=lambda _: timedelta(0))
    assert (row(engine, message_id).status, row(engine, message_id).attempt) == (status, 2)

    assert [settle(engine, first) for _ in range(2)] == ["sent", "sent"]

    assert process_message_queue(engine, Transport()).processed == 0
    assert (row(engine, message_id).status, row(engine, message_id).attempt) == ("sent", 2)
    assert events_of(engine, message_id)[-1] == "resolved"
    assert "sent_twice" not in events_of(engine, message_id)


@pytest.mark.parametrize(("later", "events"), [(NotSent("no"), []), (Sent(), ["sent_twice"])])
def test_a_late_sent_stops_what_follows_a_later_attempt(engine, later, events):
    """The later attempt goes on, and its failure makes nothing due; its own `Sent` is told."""
    (message_id,) = queue(engine, new_message())
    first = called_unsent(engine, message_id)
    (second,) = lose(engine, message_id, name="another one")
    assert settle(engine, first) == "sent"
    before = events_of(engine, message_id)

    is_sent = isinstance(later, Sent)
    verdict = SENT if is_sent else Verdict(status=MessageStatus.PENDING, event=later.event, delay=timedelta(0))
    assert settle(engine, second, verdict) == ("sent" if is_sent else None)

    assert events_of(engine, message_id) == before + events
    assert process_message_queue(engine, Transport()).processed == 0


def test_a_late_sent_of_an_attempt_before_the_one_that_was_sent_is_told(engine, caplog):
    """Two attempts have left: a person was wrong, and should learn of it."""
    (message_id,) = queue(engine, new_message())
    first = called_unsent(engine, message_id)
    process_message_queue(engine, Transport())
    assert (row(engine, message_id).status, row(engine, message_id).attempt) == ("sent", 2)

    settle(engine, first)

    assert events_of(engine, message_id)[-1] == "sent_twice"
    assert f"engagement.sent_twice message_id={message_id} attempt=1" in caplog.messages


def test_a_late_sent_of_what_a_look_up_found_sent_is_one_send(engine, caplog):
    """Worker and look-up speak of the same attempt: nobody is told that the message went out twice."""
    (message_id,) = queue(engine, new_message())
    (first,) = lose(engine, message_id)

    process_message_queue(engine, Transport(look_up=lambda _: Sent("found")))
    assert row(engine, message_id).status == "sent"

    settle(engine, first)

    assert "sent_twice" not in caplog.text + str(events_of(engine, message_id))
