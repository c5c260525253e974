"""A worker that is frozen, and comes back after others have recovered its message."""

import os
import signal

from chaos.orders import Point
from conftest import execute, new_message, row, until
from sqlalchemy.orm import Session

from crashes.accidents import Transport, events_of, is_true
from engagement import EngagementMessageRepository, process_message_queue


def frozen(scene, point: Point):
    """Start a worker that freezes at the point, and return it when it has, and its lease has run out.

    While a transport sends, leases are extended: a worker that is frozen at it keeps the row locked. So a worker that
    freezes in its transport has a lease that need not be extended, which we end by hand.
    """
    in_the_transport = point in {Point.BEFORE_SEND, Point.AFTER_SEND}
    worker = scene.start(lease_seconds=300 if in_the_transport else 0.5, signal_at=point, signal="SIGSTOP")
    scene.wait_until_stopped(worker)
    if in_the_transport:
        execute(scene.engine, "UPDATE engagement_message_queue SET lease_expires_at = now() - interval '1 second'")
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
