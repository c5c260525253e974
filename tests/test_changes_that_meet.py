"""Changes of one message that meet: whoever waited decides by what it finds then."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import pytest
from by_hand import HOLDER, NOON, call, claim, queued_as, repeat, too_late
from conftest import PATIENCE, in_thread, new_message, outgoing, queue, row, wait_until_blocked
from sqlalchemy.orm import Session

from engagement import Cancellation, EngagementMessageRepository, Forgotten, MessageStatus, process_message_queue
from engagement._claim import START, Claim
from engagement._delivery import database as claims
from engagement.outcomes import Verdict

HELD = Claim(outgoing(attempt=0), START, HOLDER.name, held_until=0.0)


def settle(outcome_status: str):
    """Return how a worker records that a send ended so."""

    def work(session: Session) -> None:
        verdict = Verdict(status=MessageStatus(outcome_status), event="settled", delay=timedelta(0))
        claims.settle(session.connection(), [(HELD, verdict)])

    return work


CANCELLED = Cancellation("cancelled", MessageStatus.CANCELLED)
ALREADY_CANCELLED = Cancellation("already_cancelled", MessageStatus.CANCELLED)
CANCEL, CANCEL_ALL = repeat("cancel_message", 1), repeat("cancel_pending_messages", "user1")
RESCHEDULE, FORGET, RETRY = (
    repeat("reschedule_message", 1, NOON),
    repeat("forget_user", "user1"),
    repeat("retry_message", 1),
)
SAY_SENT, SAY_NOT_SENT = (repeat("resolve_message", 1, sent=sent) for sent in (True, False))


@dataclass
class Race:
    """Two changes to one message, and what the second answers if the first one is committed, and if it is not."""

    status: str
    first: Callable[[Session], object]
    second: Callable[[Session], object]
    if_committed: object
    if_rolled_back: object


RACES = {
    "claim, cancel": Race("pending", claim, CANCEL, too_late("sending"), CANCELLED),
    "claim, cancel all": Race("pending", claim, CANCEL_ALL, 0, 1),
    "claim, reschedule": Race("pending", claim, RESCHEDULE, False, True),
    "claim, forget": Race("pending", claim, FORGET, Forgotten(0, 1), Forgotten(1, 1)),
    "settle as pending, cancel": Race("sending", settle("pending"), CANCEL, CANCELLED, too_late("sending")),
    "settle as failed, cancel": Race("sending", settle("failed"), CANCEL, too_late("failed"), too_late("sending")),
    "settle as pending, forget": Race("sending", settle("pending"), FORGET, Forgotten(1, 1), Forgotten(0, 1)),
    "settle as sent, forget": Race("sending", settle("sent"), FORGET, Forgotten(0, 1), Forgotten(0, 1)),
    "settle as sent, cancel": Race("pending", settle("sent"), CANCEL, too_late("sent"), CANCELLED),
    "settle as sent, resolve": Race("in_doubt", settle("sent"), SAY_NOT_SENT, False, True),
    "reschedule, cancel": Race("pending", RESCHEDULE, CANCEL, CANCELLED, CANCELLED),
    "reschedule, cancel all": Race("pending", RESCHEDULE, CANCEL_ALL, 1, 1),
    "reschedule, forget": Race("pending", RESCHEDULE, FORGET, Forgotten(1, 1), Forgotten(1, 1)),
    "cancel, cancel": Race("pending", CANCEL, CANCEL, ALREADY_CANCELLED, CANCELLED),
    "cancel, cancel all": Race("pending", CANCEL, CANCEL_ALL, 0, 1),
    "cancel, reschedule": Race("pending", CANCEL, RESCHEDULE, False, True),
    "cancel, forget": Race("pending", CANCEL, FORGET, Forgotten(0, 1), Forgotten(1, 1)),
    "forget, cancel": Race("pending", FORGET, CANCEL, ALREADY_CANCELLED, CANCELLED),
    "forget, forget": Race("pending", FORGET, FORGET, Forgotten(0, 0), Forgotten(1, 1)),
    "forget, retry": Race("failed", FORGET, RETRY, False, True),
    "forget, resolve": Race("in_doubt", FORGET, SAY_NOT_SENT, False, True),
    "retry, retry": Race("failed", RETRY, RETRY, False, True),
    "retry, cancel": Race("failed", RETRY, CANCEL, CANCELLED, too_late("failed")),
    "retry, forget": Race("failed", RETRY, FORGET, Forgotten(1, 1), Forgotten(0, 1)),
    "resolve, resolve": Race("in_doubt", SAY_SENT, SAY_NOT_SENT, False, True),
    "resolve, cancel": Race("in_doubt", SAY_NOT_SENT, CANCEL, CANCELLED, too_late("in_doubt")),
    "resolve, forget": Race("in_doubt", SAY_NOT_SENT, FORGET, Forgotten(1, 1), Forgotten(0, 1)),
    "resolve as sent, forget": Race("in_doubt", SAY_SENT, FORGET, Forgotten(0, 1), Forgotten(0, 1)),
}


@pytest.mark.parametrize("race", RACES.values(), ids=RACES.keys())
@pytest.mark.parametrize("commits", [True, False], ids=["commit", "rollback"])
def test_whoever_waited_decides_by_what_it_finds_then(engine, race, commits):
    """Of two changes to one message the second waits for the first, and answers as if it had been called after it."""
    assert queued_as(engine, race.status) == 1

    def change():
        with Session(engine) as session, session.begin():
            return race.second(session)

    with Session(engine) as session:
        race.first(session)
        waiting = in_thread(change)
        wait_until_blocked(engine, 1)
        assert not waiting.done()
        if commits:
            session.commit()
        else:
            session.rollback()

    assert waiting.result(PATIENCE) == (race.if_committed if commits else race.if_rolled_back)


def test_a_claim_passes_over_what_is_being_cancelled(engine):
    """A worker does not wait for a caller's open transaction, and takes the next message."""
    ids = queue(engine, new_message("a"), new_message("b"))
    sent = []
    with Session(engine) as session:
        assert EngagementMessageRepository(session).cancel_message(ids[0]).is_cancelled
        in_thread(process_message_queue, engine, lambda message: sent.append(message.id)).result(PATIENCE)
        session.commit()

    assert sent == [ids[1]]
    assert [row(engine, id_).status for id_ in ids] == ["cancelled", "sent"]


def test_pruning_passes_over_what_is_locked(engine):
    """Pruning, a job in the background, waits for nobody."""
    ids = [queued_as(engine, "failed", user) for user in ("a", "b")]
    with Session(engine) as session:
        assert EngagementMessageRepository(session).retry_message(ids[0])
        assert in_thread(call, engine, "prune_messages", timedelta(0)).result(PATIENCE) == 1
        session.commit()

    assert row(engine, ids[0]).status == "pending"


@pytest.mark.parametrize("method", ["forget_user", "cancel_pending_messages"])
def test_what_changes_many_rows_takes_them_in_one_order(engine, method):
    """Forgetting a user, or cancelling all that is pending, and cancelling one message after another never deadlock.

    The first message is rewritten, so that it lies behind the second one; were rows locked as they lie, each side would
    hold what the other one needs next.
    """
    first, second = queue(engine, new_message(message_type="a"), new_message(message_type="b"))
    call(engine, "reschedule_message", first, NOON)

    with Session(engine) as session:
        repository = EngagementMessageRepository(session)
        assert repository.cancel_message(first).is_cancelled
        waiting = in_thread(call, engine, method, "user1")
        wait_until_blocked(engine, 1)
        assert repository.cancel_message(second).is_cancelled
        session.commit()

    assert waiting.result(PATIENCE) in (0, Forgotten(cancelled=0, blanked=2))
