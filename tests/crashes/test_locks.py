"""Nobody waits for a lock without need, and what changed while somebody waited counts."""

from contextlib import contextmanager
from datetime import timedelta

import pytest
from conftest import execute, in_thread, new_message, queue, row, wait_until_blocked
from sqlalchemy import create_engine, event, text
from sqlalchemy.orm import Session

from crashes.accidents import LATER, PATIENCE_SECONDS, is_claim, lose
from engagement import EngagementMessageRepository, process_message_queue
from engagement._claim import START
from engagement._delivery import database as claims
from engagement._delivery.database import Holder
from engagement.models import MessageStatus
from engagement.outcomes import Verdict


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


@pytest.mark.parametrize(
    "take",
    [
        lambda connection, holder, held: claims.adopt(connection, holder, names=[held[0].claimed_by]),
        lambda connection, holder, _: claims.take_over(connection, holder, limit=2, held=[]),
    ],
    ids=["adopt", "take over"],
)
def test_who_takes_what_was_lost_waits_for_nobody(engine, take):
    """What is known is committed with it, and must not wait for a lock on another message."""
    first, second = queue(engine, new_message("first"), new_message("second"))
    held = lose(engine, first, second)
    with Session(engine) as host, engine.begin() as connection:
        assert not EngagementMessageRepository(host).cancel_message(first).is_cancelled
        connection.execute(text("SET LOCAL lock_timeout = '10s'"))  # Else a failure would hang.
        taken = take(connection, Holder("again", LATER), held)

    assert [claim.message.id for claim in taken] == [second]


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
