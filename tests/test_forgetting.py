"""A user who is forgotten leaves nothing but keys, and what is finished is pruned."""

from datetime import timedelta

import pytest
from by_hand import NOON, STATUSES, call, one_in_each_status, put, queued_as, version
from conftest import execute, new_message, queue, row
from sqlalchemy import Engine, text
from sqlalchemy.orm import Session

from engagement import (
    EngagementMessageRepository,
    Forgotten,
    InDoubt,
    NotSent,
    Postpone,
    Refused,
    Sent,
    Withdraw,
    process_message_queue,
)

FINISHED = ["sent", "failed", "cancelled", "expired"]
SECRET = "Zx9secret"


def everything_stored(engine: Engine) -> str:
    found = execute(engine, "SELECT string_agg(queue::text, ' ') FROM engagement_message_queue AS queue").scalar_one()
    return found or ""


def personal(user_id: str, **fields):
    """Return a message that says a secret."""
    return new_message(
        user_id, message_params={"name": SECRET}, destination_jid="5511987654321@s.whatsapp.net", **fields
    )


def make_all_personal(engine: Engine) -> None:
    execute(
        engine,
        "UPDATE engagement_message_queue SET error_message = :secret, provider_message_id = :secret,"
        " history = jsonb_build_array(jsonb_build_object('reason', CAST(:secret AS text)))",
        secret=SECRET,
    )


@pytest.mark.parametrize("status", STATUSES)
def test_a_forgotten_user_leaves_nothing_but_keys(engine, status):
    """Params, destination, errors and provider ids are blanked in every status; what is pending is cancelled."""
    (message_id,) = queue(engine, personal("ana", idempotency_key="k"))
    put(engine, message_id, status)
    make_all_personal(engine)

    answer = call(engine, "forget_user", "ana")

    is_pending = status == "pending"
    assert answer == Forgotten(cancelled=int(is_pending), blanked=1)
    assert row(engine, message_id).status == ("cancelled" if is_pending else status)
    assert SECRET not in everything_stored(engine)
    assert "5511987654321" not in everything_stored(engine)
    assert [entry["event"] for entry in row(engine, message_id).history] == ["forgotten"]
    assert call(engine, "queue_message", new_message("ana", idempotency_key="k")).created is False
    assert call(engine, "forget_user", "ana") == Forgotten(cancelled=0, blanked=0)


def test_forgetting_concerns_one_user(engine):
    """Other users keep their messages, and unknown ones have none."""
    ids = one_in_each_status(engine, "ana")
    others = one_in_each_status(engine, "ana2")
    before = {id_: version(engine, id_) for id_ in others.values()}

    assert call(engine, "forget_user", "ana") == Forgotten(cancelled=1, blanked=7)
    assert call(engine, "forget_user", "nobody") == Forgotten(cancelled=0, blanked=0)

    assert {id_: version(engine, id_) for id_ in others.values()} == before
    assert all(row(engine, id_).destination_jid is None for id_ in ids.values())


@pytest.mark.parametrize(
    ("outcome", "status"),
    [
        (NotSent(SECRET), "cancelled"),
        (Postpone(NOON, SECRET), "cancelled"),
        (Refused(SECRET), "failed"),
        (Withdraw(SECRET), "cancelled"),
        (InDoubt(SECRET), "in_doubt"),
        (Sent(SECRET), "sent"),
    ],
)
def test_a_user_who_is_forgotten_during_a_send_stays_forgotten(engine, outcome, status):
    """The send in hand is settled, but not tried again, and nothing personal comes back with its outcome."""
    (message_id,) = queue(engine, personal("ana"))

    def send(_message):
        assert call(engine, "forget_user", "ana") == Forgotten(cancelled=0, blanked=1)
        return outcome

    process_message_queue(engine, send, lease=timedelta(seconds=6))

    assert row(engine, message_id).status == status
    assert row(engine, message_id).destination_jid is None
    assert SECRET not in everything_stored(engine)
    assert process_message_queue(engine, lambda _: None).processed == 0


@pytest.mark.parametrize("status", STATUSES)
def test_what_is_finished_is_pruned(engine, status):
    """Finished messages are blanked and keep key and status; a doubt, and what goes on, keep what they need."""
    (message_id,) = queue(engine, personal("ana", idempotency_key="k"))
    put(engine, message_id, status)
    make_all_personal(engine)
    before = row(engine, message_id)

    pruned = call(engine, "prune_messages", timedelta(0))

    found = row(engine, message_id)
    assert pruned == int(status in FINISHED)
    assert (found.status, found.sent_at) == (status, before.sent_at)
    if pruned:
        assert SECRET not in everything_stored(engine)
        assert (found.message_params, found.destination_jid) == ({}, None)
        assert [entry["event"] for entry in found.history] == ["pruned"]
    else:
        assert found == before
    assert call(engine, "queue_message", new_message("ana", idempotency_key="k")).created is False
    assert call(engine, "prune_messages", timedelta(0)) == 0


def test_pruning_spares_what_is_young(engine):
    """A message is old enough when it was last due longer ago than `older_than`, and not yet a moment before."""
    old, young = queued_as(engine, "sent", "a"), queued_as(engine, "sent", "b")
    day = timedelta(days=1)
    with Session(engine) as session, session.begin():
        for message_id, margin in ((old, -timedelta(seconds=1)), (young, timedelta(minutes=1))):
            session.execute(
                text("UPDATE engagement_message_queue SET next_attempt_at = now() - :age WHERE id = :id"),
                {"age": day - margin, "id": message_id},
            )
        assert EngagementMessageRepository(session).prune_messages(day) == 1

    assert row(engine, old).destination_jid is None
    assert row(engine, young).destination_jid is not None


def test_pruning_takes_the_oldest_first_and_no_more_than_asked(engine):
    """`limit` bounds each call; calling until less comes back prunes everything."""
    ids = [queued_as(engine, "sent", f"u{n}", scheduled_for=NOON - timedelta(days=4000 + n)) for n in range(5)]

    with Session(engine) as session, session.begin():
        for scan in ("indexscan", "bitmapscan"):  # In the order of its index it would come by luck.
            session.execute(text(f"SET LOCAL enable_{scan} = off"))
        counts = [EngagementMessageRepository(session).prune_messages(timedelta(0), limit=2)]
    remaining = [id_ for id_ in ids if row(engine, id_).destination_jid is not None]
    counts += [call(engine, "prune_messages", timedelta(0), limit=2) for _ in range(3)]

    assert counts == [2, 2, 1, 0]
    assert remaining == ids[:3]


@pytest.mark.parametrize("ending", [Sent(), Refused("no"), InDoubt("?"), Withdraw("opted out"), NotSent("down")])
def test_a_key_is_never_free_again(engine, ending):
    """However a message ended, and also when it was pruned and forgotten, its key still blocks."""
    (message_id,) = queue(engine, new_message())
    process_message_queue(engine, lambda _: ending)

    for change in (("prune_messages", timedelta(0)), ("forget_user", "user1"), ("cancel_pending_messages", "user1")):
        call(engine, *change)
        answer = call(engine, "queue_message", new_message())

        assert (answer.created, answer.message_id) == (False, message_id)
