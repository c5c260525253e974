"""What a host does with queued messages: each call is right under concurrency by itself, and reads by an index."""

import ast
import asyncio
import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import PATIENCE, database_url, execute, in_thread, new_message, outgoing, queue, row, wait_until_blocked
from pytest_postgresql.janitor import DatabaseJanitor
from sqlalchemy import CheckConstraint, Engine, create_engine, event, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

import engagement
from engagement import (
    AsyncEngagementMessageRepository,
    Cancellation,
    EngagementMessage,
    EngagementMessageRepository,
    Forgotten,
    InDoubt,
    InvalidMessage,
    MessageStatus,
    NotSent,
    Postpone,
    Refused,
    Sent,
    Withdraw,
    process_message_queue,
)
from engagement._claim import START, Claim
from engagement._delivery import database as claims
from engagement.outcomes import Verdict

STATUSES = list(MessageStatus)
FINISHED = ["sent", "failed", "cancelled", "expired"]
NOON = datetime(2030, 11, 21, 12, tzinfo=UTC)
SECRET = "Zx9secret"
HOLDER = claims.Holder("worker", timedelta(minutes=5))
HELD = Claim(outgoing(attempt=0), START, HOLDER.name, held_until=0.0)


def put(engine: Engine, message_id: int, status: str) -> None:
    """Bring a message into a status by hand, as the constraints want it."""
    execute(
        engine,
        "UPDATE engagement_message_queue SET status = :status, sent_at = CASE WHEN :status = 'sent' THEN now() END,"
        " lease_expires_at = CASE WHEN :status = 'sending' THEN now() + interval '1 hour' END,"
        " claimed_by = :worker WHERE id = :id",
        status=status,
        worker=HOLDER.name,
        id=message_id,
    )


def queued_as(engine: Engine, status: str, user_id: str = "user1", **fields) -> int:
    (message_id,) = queue(engine, new_message(user_id, **fields))
    put(engine, message_id, status)
    return message_id


def one_in_each_status(engine: Engine, user_id: str = "user1") -> dict[str, int]:
    return {
        str(status): queued_as(
            engine, status, user_id, message_type=f"was_{status}", idempotency_key=f"{user_id}{status}"
        )
        for status in STATUSES
    }


def call(engine: Engine, method: str, *args, **kwargs):
    """Call one method of a repository and commit."""
    with Session(engine) as session, session.begin():
        return getattr(EngagementMessageRepository(session), method)(*args, **kwargs)


def version(engine: Engine, message_id: int) -> int:
    """Return which transaction wrote the row last."""
    return execute(engine, "SELECT xmin::text FROM engagement_message_queue WHERE id = :id", id=message_id).scalar_one()


def everything_stored(engine: Engine) -> str:
    found = execute(engine, "SELECT string_agg(queue::text, ' ') FROM engagement_message_queue AS queue").scalar_one()
    return found or ""


# Looking


def test_a_message_is_found_by_id_and_by_key(session, repository):
    """Both ways lead to the same entity, and to None if there is nothing."""
    queued = repository.queue_message(new_message("ana"))

    found = repository.get_message(queued.message_id)

    assert isinstance(found, EngagementMessage)
    assert (found.user_id, found.status, found.message_params) == ("ana", MessageStatus.PENDING, {"name": "Ana"})
    assert repository.get_message_by_key(queued.idempotency_key) is found
    assert repository.get_message(queued.message_id + 1) is None
    assert repository.get_message_by_key("another") is None


def test_a_message_is_shown_as_it_is_now(engine):
    """What the session loaded earlier does not hide what a worker has done since."""
    (message_id,) = queue(engine, new_message())
    with Session(engine) as session:
        repository = EngagementMessageRepository(session)
        loaded = repository.get_message(message_id)
        assert loaded.status is MessageStatus.PENDING
        process_message_queue(engine, lambda _: None)

        assert repository.get_message(message_id) is loaded
        assert loaded.status is MessageStatus.SENT


def test_pending_messages_come_next_first(engine):
    """The user's pending messages, and only these, ordered by when they are due, then by age."""
    one_in_each_status(engine, "other")
    ids = one_in_each_status(engine, "ana")
    given = [new_message("ana", message_type=f"t{n}", scheduled_for=NOON + timedelta(days=n % 3)) for n in range(6)]
    queued = queue(engine, *given)

    with Session(engine) as session:
        found = EngagementMessageRepository(session).get_pending_messages("ana")
        nobody = EngagementMessageRepository(session).get_pending_messages("nobody")

    assert [message.id for message in found] == [ids["pending"], *(queued[n] for n in (0, 3, 1, 4, 2, 5))]
    assert nobody == []


def test_counts_have_every_status(engine):
    """An empty queue counts zeros and has no oldest due message; others count what is there."""
    empty = call(engine, "count_by_status")
    for number, status in enumerate(STATUSES):
        for n in range(number):
            queued_as(engine, status, f"{status}{n}")
    counts = call(engine, "count_by_status")

    assert dict(empty.by_status) == dict.fromkeys(STATUSES, 0)
    assert empty.oldest_due is None
    assert [counts[status] for status in STATUSES] == list(range(len(STATUSES)))
    assert counts["in_doubt"] == counts[MessageStatus.IN_DOUBT]


def test_the_oldest_due_message_is_the_one_that_waits_longest(engine):
    """Its age counts from when it was due; what is due later, or not pending, has none."""
    hour = timedelta(hours=1)
    queue(engine, new_message("future", scheduled_for=datetime.now(UTC) + hour))
    queued_as(engine, "failed", "failed", scheduled_for=datetime.now(UTC) - 9 * hour)
    nothing_due = call(engine, "count_by_status").oldest_due
    queue(engine, *(new_message(f"u{n}", scheduled_for=datetime.now(UTC) - n * hour) for n in (1, 3, 2)))

    assert nothing_due is None
    assert 3 * hour <= call(engine, "count_by_status").oldest_due < 3 * hour + timedelta(minutes=1)


@pytest.mark.parametrize("bad", [0, -1, 2**63, True, "1", 1.0, None])
@pytest.mark.parametrize("method", ["get_message", "cancel_message", "retry_message"])
def test_an_id_is_a_positive_bigint(method, bad):
    """What cannot be an id is refused before the database is touched."""
    with pytest.raises(InvalidMessage, match="message_id"):
        getattr(EngagementMessageRepository(Session()), method)(bad)


# Cancelling


@pytest.mark.parametrize(
    ("status", "verdict", "status_after"),
    [
        ("pending", "cancelled", "cancelled"),
        ("cancelled", "already_cancelled", "cancelled"),
        ("sending", "too_late", "sending"),
        ("sent", "too_late", "sent"),
        ("failed", "too_late", "failed"),
        ("expired", "too_late", "expired"),
        ("in_doubt", "too_late", "in_doubt"),
    ],
)
def test_cancelling_tells_what_became_of_the_message(engine, status, verdict, status_after):
    """Only what is pending is cancelled; of anything else the answer tells the status, and nothing is written."""
    message_id = queued_as(engine, status)
    before = version(engine, message_id)

    answer = call(engine, "cancel_message", message_id, reason="changed my mind")

    assert answer == Cancellation(verdict, MessageStatus(status_after))
    assert answer.is_cancelled == (status_after == "cancelled")
    assert row(engine, message_id).status == status_after
    assert (version(engine, message_id) != before) == (verdict == "cancelled")


def test_cancelling_what_does_not_exist(engine):
    """An unknown id is not found, and is not called cancelled."""
    answer = call(engine, "cancel_message", 4711)

    assert answer == Cancellation("not_found", None)
    assert not answer.is_cancelled


def test_a_cancellation_keeps_its_reason(engine):
    """The reason goes into the history, cleaned of what PostgreSQL cannot store; a cancelled message is not sent."""
    (message_id,) = queue(engine, new_message())

    call(engine, "cancel_message", message_id, "no\x00 more\n\ud800please")

    (entry,) = row(engine, message_id).history
    assert (entry["event"], entry["attempt"], entry["reason"]) == ("cancelled", 0, "no more please")
    assert process_message_queue(engine, lambda _: None).processed == 0


def test_cancelling_what_is_pending_for_a_user(engine):
    """Only the user's pending messages are cancelled, and counted."""
    others, ids = one_in_each_status(engine, "bea"), one_in_each_status(engine, "ana")
    queue(engine, new_message("ana", message_type="weekly_review", scheduled_for=NOON))

    assert call(engine, "cancel_pending_messages", "ana", reason="left") == 2
    assert call(engine, "cancel_pending_messages", "ana") == 0

    assert row(engine, ids["pending"]).status == "cancelled"
    assert row(engine, ids["pending"]).history[0]["reason"] == "left"
    unchanged = [*((id_, status) for status, id_ in ids.items() if status != "pending"), (others["pending"], "pending")]
    assert [(id_, row(engine, id_).status) for id_, _ in unchanged] == unchanged


def test_cancelling_one_type_of_message(engine):
    """With a type, only messages of that type are cancelled."""
    goodbye, review = queue(engine, new_message(), new_message(message_type="weekly_review"))

    assert call(engine, "cancel_pending_messages", "user1", "weekly_review") == 1

    assert (row(engine, goodbye).status, row(engine, review).status) == ("pending", "cancelled")


# Rescheduling


@pytest.mark.parametrize("status", STATUSES)
def test_only_a_pending_message_is_rescheduled(engine, status):
    """It is due at the new time under its old key; anything else stays as it is."""
    message_id = queued_as(engine, status)
    before = row(engine, message_id)

    is_rescheduled = call(engine, "reschedule_message", message_id, NOON)

    found = row(engine, message_id)
    assert is_rescheduled == (status == "pending")
    if is_rescheduled:
        assert (found.scheduled_for, found.next_attempt_at) == (NOON, NOON)
        assert found.idempotency_key == before.idempotency_key
    else:
        assert found == before


def test_a_message_is_not_rescheduled_beyond_its_expiry(engine):
    """A time before the expiry is taken, and one at it is answered with False, not with an error."""
    (message_id,) = queue(engine, new_message(scheduled_for=NOON - timedelta(days=1), expires_at=NOON))

    assert not call(engine, "reschedule_message", message_id, NOON)
    assert call(engine, "reschedule_message", message_id, NOON - timedelta(microseconds=1))
    assert row(engine, message_id).next_attempt_at == NOON - timedelta(microseconds=1)
    assert not call(engine, "reschedule_message", message_id + 1, NOON)


# Retrying and resolving


@pytest.mark.parametrize("status", STATUSES)
def test_what_ended_badly_can_be_retried(engine, status):
    """A failed or expired message is due again with all its retries; nothing else is touched."""
    message_id = queued_as(engine, status)
    execute(
        engine,
        'UPDATE engagement_message_queue SET attempt = 3, retry_count = 3, history = \'[{"event": "refused"}]\','
        " next_attempt_at = '2020-01-01'",
    )
    before = row(engine, message_id)

    is_retried = call(engine, "retry_message", message_id)

    found = row(engine, message_id)
    assert is_retried == (status in ("failed", "expired"))
    if is_retried:
        assert (found.status, found.attempt, found.retry_count) == ("pending", 3, 0)
        assert [entry["event"] for entry in found.history] == ["refused", "retried"]
        assert found.idempotency_key == before.idempotency_key
        assert datetime.now(UTC) - found.next_attempt_at < timedelta(minutes=1)
        assert process_message_queue(engine, lambda _: None).succeeded == 1
    else:
        assert found == before


def test_a_retry_lifts_an_expiry_that_has_passed(engine):
    """What expired can be sent after all; an expiry still to come stays."""
    passed = queued_as(engine, "expired", "a", scheduled_for=NOON, expires_at=NOON + timedelta(days=1))
    to_come = queued_as(engine, "failed", "b", expires_at=NOON)
    execute(
        engine,
        "UPDATE engagement_message_queue SET scheduled_for = '2020-01-01', expires_at = '2020-01-02' WHERE id = :id",
        id=passed,
    )

    assert call(engine, "retry_message", passed)
    assert call(engine, "retry_message", to_come)

    assert row(engine, passed).expires_at is None
    assert row(engine, to_come).expires_at == NOON
    assert process_message_queue(engine, lambda _: None).succeeded == 2


@pytest.mark.parametrize("status", ["failed", "expired"])
def test_what_was_blanked_is_not_retried(engine, status):
    """A message that was forgotten or pruned has nobody to go to."""
    forgotten, pruned = queued_as(engine, status, "a"), queued_as(engine, status, "b")
    assert call(engine, "forget_user", "a") == Forgotten(cancelled=0, blanked=1)
    assert call(engine, "prune_messages", timedelta(0)) == 1

    assert not call(engine, "retry_message", forgotten)
    assert not call(engine, "retry_message", pruned)
    assert not call(engine, "retry_message", 4711)


@pytest.mark.parametrize("status", STATUSES)
@pytest.mark.parametrize("sent", [True, False])
def test_only_a_doubt_is_resolved(engine, status, sent):
    """A message in doubt becomes sent, or due again with all its retries; nothing else is touched."""
    message_id = queued_as(engine, status)
    execute(engine, "UPDATE engagement_message_queue SET attempt = 2, retry_count = 2, next_attempt_at = '2020-01-01'")
    before = row(engine, message_id)

    is_resolved = call(engine, "resolve_message", message_id, sent, "asked\x00 Ana")

    found = row(engine, message_id)
    assert is_resolved == (status == "in_doubt")
    if not is_resolved:
        assert found == before
        return
    (entry,) = found.history
    assert (entry["event"], entry["sent"], entry["reason"], entry["by"]) == ("resolved", sent, "asked Ana", None)
    if sent:
        assert (found.status, found.attempt) == ("sent", 2)
        assert datetime.now(UTC) - found.sent_at < timedelta(minutes=1)
    else:
        assert (found.status, found.attempt, found.retry_count) == ("pending", 2, 0)
        assert datetime.now(UTC) - found.next_attempt_at < timedelta(minutes=1)


@pytest.mark.parametrize("sent", [None, 0, 1, "sent", "no", ""])
def test_what_is_neither_yes_nor_no_resolves_nothing(engine, sent):
    """Only True and False say what became of a message: what was not said, or said otherwise, is not "not sent"."""
    message_id = queued_as(engine, "in_doubt")
    before = row(engine, message_id)

    with pytest.raises(InvalidMessage, match="sent: must be True or False"):
        call(engine, "resolve_message", message_id, sent)

    assert row(engine, message_id) == before


IDS = (None, True, "1", 1.0, 0, -1, 2**63)
TEXTS = (None, "", " ", 7, True, b"ana")
NO_ANSWERS = {
    "queue_message": [("message", 7), ("message", {"user_id": "ana"})],
    "get_message": [("message_id", given) for given in IDS],
    "get_message_by_key": [("idempotency_key", given) for given in TEXTS],
    "get_pending_messages": [("user_id", given) for given in TEXTS],
    "cancel_message": [("message_id", given) for given in IDS],
    "cancel_pending_messages": [
        *(("user_id", given) for given in TEXTS),
        *(("message_type", "user1", given) for given in TEXTS if given is not None),
    ],
    "reschedule_message": [
        *(("message_id", given, NOON) for given in IDS),
        *(("scheduled_for", 1, given) for given in (None, False, "", 0, NOON.date(), NOON.replace(tzinfo=None))),
    ],
    "retry_message": [("message_id", given) for given in IDS],
    "resolve_message": [
        *(("message_id", given, True) for given in IDS),
        *(("sent", 1, given) for given in (None, 0, 1, "sent", "no", "", [], SimpleNamespace())),
    ],
    "forget_user": [("user_id", given) for given in TEXTS],
    "prune_messages": [
        *(("older_than", given) for given in (None, 90, "90d", timedelta(-1), timedelta(days=36_526))),
        *(("limit", timedelta(0), given) for given in (None, True, 1.5, "9", 0, 1_000_001)),
    ],
}
"""For each method calls whose last argument, which is named first, says nothing, or nothing that it could mean."""


NOWHERE = "postgresql+psycopg://nobody@127.0.0.1:1/nowhere"


def ask_in_session(method, arguments) -> None:
    getattr(EngagementMessageRepository(Session(create_engine(NOWHERE))), method)(*arguments)


def ask_in_async_session(method, arguments) -> None:
    async def ask() -> None:
        async with AsyncSession(create_async_engine(NOWHERE)) as session:
            await getattr(AsyncEngagementMessageRepository(session), method)(*arguments)

    asyncio.run(ask())


@pytest.mark.parametrize("ask", [ask_in_session, ask_in_async_session])
@pytest.mark.parametrize(
    ("method", "name", "arguments"),
    [(method, name, rest) for method, calls in NO_ANSWERS.items() for name, *rest in calls],
)
def test_what_says_nothing_is_refused_before_the_database_is_touched(ask, method, name, arguments):
    """None is not "no", an empty text is nobody, and True is not the first message: each is named in a clear error."""
    with pytest.raises(InvalidMessage, match=f"^{name}: (must be|is empty|is naive)"):
        ask(method, arguments)


def test_every_method_that_takes_an_argument_is_asked_about_it():
    """None of what a method cannot do without is left out above."""
    of_class = inspect.getmembers(EngagementMessageRepository, inspect.isfunction)
    wanted = {
        (name, parameter.name)
        for name, method in of_class
        if not name.startswith("_") and name != "queue_messages"  # takes what can be iterated over, of queue_message's
        for parameter in list(inspect.signature(method).parameters.values())[1:]
        if parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
    }
    assert wanted <= {(method, name) for method, calls in NO_ANSWERS.items() for name, *_ in calls}


@pytest.mark.parametrize(
    ("status", "method", "more", "event"),
    [
        ("in_doubt", "resolve_message", {"sent": True}, {"event": "resolved", "sent": True, "reason": None}),
        ("in_doubt", "resolve_message", {"sent": False}, {"event": "resolved", "sent": False, "reason": None}),
        ("pending", "cancel_message", {"reason": "came back"}, {"event": "cancelled", "reason": "came back"}),
        ("failed", "retry_message", {}, {"event": "retried", "reason": None}),
    ],
)
def test_a_decision_is_kept_with_who_took_it(engine, status, method, more, event):
    """The history says what was decided and by whom, on one line as it can be stored."""
    message_id = queued_as(engine, status)

    call(engine, method, message_id, by="Ana\x00\nSouza", **more)

    (entry,) = row(engine, message_id).history
    assert entry == {"at": entry["at"], "attempt": entry["attempt"], "by": "Ana Souza", **event}


def test_who_cancels_all_of_a_user_is_kept(engine):
    """Many messages are cancelled by somebody, too."""
    message_id = queued_as(engine, "pending", "a")

    assert call(engine, "cancel_pending_messages", "a", reason="left", by="ana") == 1

    (entry,) = row(engine, message_id).history
    assert (entry["event"], entry["reason"], entry["by"]) == ("cancelled", "left", "ana")


def test_a_forgotten_doubt_can_only_be_resolved_as_sent(engine):
    """There is nobody left to send it to."""
    message_id = queued_as(engine, "in_doubt")
    call(engine, "forget_user", "user1")

    assert not call(engine, "resolve_message", message_id, sent=False)
    assert call(engine, "resolve_message", message_id, sent=True)
    assert row(engine, message_id).status == "sent"


# What an idempotent transport may have sent


class Idempotent:
    idempotent = True

    def __init__(self, *outcomes):
        self.outcomes = iter(outcomes)

    def send(self, _message):
        """Return one outcome after the other."""
        return next(self.outcomes)


def deliver(*outcomes):
    def end(engine: Engine) -> None:
        for outcome in outcomes:
            process_message_queue(engine, Idempotent(outcome), limit=1, backoff=lambda _: timedelta(0))

    return end


def expire(engine: Engine) -> None:
    execute(engine, "UPDATE engagement_message_queue SET scheduled_for = now() - interval '1 hour', expires_at = now()")
    process_message_queue(engine, Idempotent())


@pytest.mark.parametrize(
    "end",
    [
        pytest.param(lambda engine: call(engine, "cancel_message", 1), id="cancel"),
        pytest.param(lambda engine: call(engine, "cancel_pending_messages", "user1"), id="cancel all"),
        pytest.param(lambda engine: call(engine, "forget_user", "user1"), id="forget"),
        pytest.param(deliver(Refused("no")), id="refused"),
        pytest.param(deliver(Withdraw("opted out")), id="withdrawn"),
        pytest.param(deliver(NotSent("down"), NotSent("down")), id="not sent at last"),
        pytest.param(deliver(Postpone(datetime(2020, 1, 1, tzinfo=UTC), "later")), id="postponed"),
        pytest.param(expire, id="expired"),
    ],
)
def test_what_may_have_been_sent_does_not_end_as_unsent(engine, end):
    """A doubt that waits to be sent again under its delivery id may have arrived: no end says that it did not."""
    queue(engine, new_message())
    deliver(InDoubt("no answer"))(engine)
    assert row(engine, 1).status == "pending"

    answer = end(engine)

    assert row(engine, 1).status in ("in_doubt", "pending")
    if answer is not None:
        assert answer in (0, Forgotten(cancelled=0, blanked=1), Cancellation("too_late", MessageStatus.IN_DOUBT))
        assert process_message_queue(engine, Idempotent()).processed == 0


def test_what_was_sent_or_resolved_is_in_doubt_no_more(engine):
    """The second attempt's `Sent` ends the doubt, and so does a person's word; then a message can be cancelled."""
    first, second = queue(engine, new_message("a"), new_message("b"))
    process_message_queue(engine, Idempotent(InDoubt("?"), InDoubt("?")), limit=2, backoff=lambda _: timedelta(0))
    put(engine, second, "in_doubt")
    process_message_queue(engine, Idempotent(Sent()))

    assert row(engine, first).status == "sent"
    assert call(engine, "resolve_message", second, sent=False)
    assert call(engine, "cancel_message", second).is_cancelled


# Forgetting and pruning


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

    counts = [call(engine, "prune_messages", timedelta(0), limit=2)]
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


# Concurrency


def claim(session: Session) -> list:
    claimed = claims.claim(session.connection(), HOLDER, limit=10, after=START, busy=[], one_per_destination=True)
    return claimed.claims


def repeat(method: str, *args, **kwargs):
    return lambda session: getattr(EngagementMessageRepository(session), method)(*args, **kwargs)


def settle(outcome_status: str):
    """Return how a worker records that a send ended so."""

    def work(session: Session) -> None:
        verdict = Verdict(status=MessageStatus(outcome_status), event="settled", delay=timedelta(0))
        claims.settle(session.connection(), [(HELD, verdict)])

    return work


def too_late(status: str) -> Cancellation:
    return Cancellation("too_late", MessageStatus(status))


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


# What the database itself refuses

REFUSED = {
    "status_known": "status = 'lost'",
    "destination_known": "destination = 'everybody'",
    "message_type_format": "message_type = 'Good:bye'",
    "message_params_is_object": "message_params = '[]'",
    "history_is_array": "history = '{}'",
    "counters_not_negative": "attempt = -1",
    "counters_bounded": "attempt = 1000000001",
    "claimed_by_form": "claimed_by = 'w/recovery/1000000'",
    "sent_iff_sent_at": "status = 'sent'",
    "sending_iff_lease": "status = 'sending'",
    "ended_without_doubt": "status = 'failed', has_doubt = true",
    "pending_has_destination": "destination_jid = NULL",
    "jid_fits_destination": "destination = 'group'",
    "expires_after_scheduled": "expires_at = scheduled_for",
    "times_readable": "next_attempt_at = 'infinity'",
}
ALSO_REFUSED = [
    ("status_known", "status = 'Pending'"),
    ("message_type_format", "message_type = ''"),
    ("message_type_format", "message_type = E'goodbye\\n'"),
    ("message_params_is_object", "message_params = 'null'"),
    ("history_is_array", "history = 'null'"),
    ("counters_not_negative", "retry_count = -1"),
    ("counters_bounded", "retry_count = 2147483647"),
    ("claimed_by_form", "claimed_by = repeat('x', 3001)"),
    ("sent_iff_sent_at", "sent_at = now()"),
    ("sending_iff_lease", "lease_expires_at = now()"),
    ("ended_without_doubt", "status = 'cancelled', has_doubt = true"),
    ("ended_without_doubt", "status = 'sent', sent_at = now(), has_doubt = true"),
    ("jid_fits_destination", "destination_jid = '123456789012345678@g.us'"),
    ("times_readable", "scheduled_for = '-infinity'"),
    ("times_readable", "expires_at = 'infinity'"),
    ("times_readable", "next_attempt_at = '0001-01-01 00:00:00+00'"),
    ("times_readable", "next_attempt_at = '10000-01-01 00:00:00+00'"),
]


@pytest.mark.parametrize(("constraint", "change"), [*REFUSED.items(), *ALSO_REFUSED])
def test_a_hand_written_update_cannot_break_a_promise(engine, constraint, change):
    """Each promise of the table is a named constraint, which an UPDATE by hand runs into."""
    queue(engine, new_message())

    with pytest.raises(IntegrityError) as caught:
        execute(engine, f"UPDATE engagement_message_queue SET {change}")

    assert caught.value.orig.diag.constraint_name == f"engagement_message_queue_{constraint}"


def test_every_check_was_tried():
    """No CHECK is without a row in the test above."""
    checks = [item for item in EngagementMessage.__table__.constraints if isinstance(item, CheckConstraint)]

    assert {check.name for check in checks} == {f"engagement_message_queue_{name}" for name in REFUSED}


@pytest.mark.parametrize(
    "change",
    [
        "status = 'sent', sent_at = now()",
        "status = 'sending', lease_expires_at = now()",
        "status = 'cancelled', destination_jid = NULL",
        "status = 'in_doubt', has_doubt = true",
        "has_doubt = true",
        "destination = 'group', destination_jid = '123456789012345678@g.us'",
        "expires_at = scheduled_for + interval '1 microsecond'",
        "next_attempt_at = '0001-01-02 00:00:00+00'",
        "next_attempt_at = '9999-12-30 00:00:00+00'",
        "message_type = 'a_9'",
    ],
)
def test_a_hand_written_update_that_keeps_the_promises_is_taken(engine, change):
    """The constraints refuse no more than what they are for."""
    queue(engine, new_message())

    assert execute(engine, f"UPDATE engagement_message_queue SET {change}").rowcount == 1


def test_a_key_is_unique_for_everybody(engine):
    """Neither an INSERT nor an UPDATE by hand gets a key twice."""
    queue(engine, new_message(idempotency_key="a"), new_message(idempotency_key="b"))

    with pytest.raises(IntegrityError) as caught:
        execute(engine, "UPDATE engagement_message_queue SET idempotency_key = 'a'")

    assert caught.value.orig.diag.constraint_name == "engagement_message_queue_idempotency_key_key"


# Plans

FINISHED_ROWS = 100_000
"""They stand for five million: the plans that are chosen for these are chosen for more all the more."""
FILL = """
INSERT INTO engagement_message_queue (user_id, message_type, message_key, message_params, destination, destination_jid,
    scheduled_for, next_attempt_at, status, attempt, sent_at, idempotency_key)
SELECT 'user' || n % 5000, 'goodbye', 'goodbye.14_days', jsonb_build_object('text', repeat('x', 200)), 'individual',
    5500000000000 + n || '@s.whatsapp.net', moment, moment, status, 1, CASE WHEN status = 'sent' THEN moment END, n
FROM (
    SELECT n, now() - CASE WHEN n % 50 = 0 THEN -n ELSE n END * interval '1 minute' AS moment,
        CASE WHEN n % 25 = 0 THEN 'pending' WHEN n % 100 = 1 THEN 'in_doubt'
            ELSE (ARRAY['sent', 'sent', 'cancelled', 'failed'])[1 + n % 4] END AS status
    FROM generate_series(1, :count) AS n
) AS given
"""


@pytest.fixture(scope="module", name="full_engine")
def _full_engine(migrated_template):
    """An engine on a database with many finished messages, and some that are pending."""
    name = f"{migrated_template.dbname}_full"
    janitor = DatabaseJanitor(
        user=migrated_template.user,
        host=migrated_template.host,
        port=migrated_template.port,
        password=migrated_template.password,
        dbname=name,
        template_dbname=migrated_template.template_dbname,
        maintenance_dbname=migrated_template.maintenance_dbname,
    )
    janitor.drop()
    with janitor:
        engine = create_engine(database_url(migrated_template, name))
        with engine.begin() as connection:
            connection.execute(text(FILL), {"count": FINISHED_ROWS})
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text("VACUUM ANALYZE engagement_message_queue"))
        yield engine
        engine.dispose()


def generic_plan(session: Session, work) -> list[tuple[str, str]]:
    """Return (node, index) of the plan that serves any values, of the last statement that `work(session)` executes."""
    executed = []
    connection = session.connection()
    event.listen(
        connection,
        "before_cursor_execute",
        lambda _c, _cursor, statement, parameters, *_: executed.append((statement, parameters)),
    )
    work(session)
    statement, parameters = executed[-1]
    names = list(dict.fromkeys(re.findall(r"%\((\w+)\)s", statement)))
    numbered = re.sub(r"%\((\w+)\)s", lambda match: f"${names.index(match[1]) + 1}", statement).replace("%%", "%")
    types = ["interval" if isinstance(parameters[name], timedelta) else "unknown" for name in names]
    arguments, nulls = (f"({', '.join(words)})" if names else "" for words in (types, ["NULL"] * len(names)))
    connection.exec_driver_sql("SET LOCAL plan_cache_mode = force_generic_plan")
    connection.exec_driver_sql(f"PREPARE explained{arguments} AS {numbered}")
    plan = connection.exec_driver_sql(f"EXPLAIN (FORMAT JSON) EXECUTE explained{nulls}").scalar_one()[0]["Plan"]
    connection.exec_driver_sql("DEALLOCATE explained")
    session.rollback()
    return list(_reads(plan))


def _reads(plan: dict):
    if "Index Name" in plan or (plan["Node Type"] != "ModifyTable" and "Relation Name" in plan):
        yield plan["Node Type"], plan.get("Index Name", "").removeprefix("engagement_message_queue_")
    for inner in plan.get("Plans", ()):
        yield from _reads(inner)


@pytest.mark.parametrize(
    ("work", "indexes"),
    [
        pytest.param(claim, {"due"}, id="claim"),
        pytest.param(
            lambda session: claims.take_over(session.connection(), HOLDER, limit=9, held=[]),
            {"lease", "pkey"},
            id="take over",
        ),
        pytest.param(
            lambda session: claims.adopt(session.connection(), HOLDER, names=["x"]), {"lease", "pkey"}, id="adopt"
        ),
        pytest.param(
            lambda session: claims.is_work_waiting(session.connection(), (NOON, 7)), {"due", "lease"}, id="peek"
        ),
        pytest.param(repeat("get_message", 1), {"pkey"}, id="get"),
        pytest.param(repeat("get_message_by_key", "1"), {"idempotency_key_key"}, id="get by key"),
        pytest.param(repeat("get_pending_messages", "user7"), {"user"}, id="get pending"),
        pytest.param(repeat("cancel_message", 1), {"pkey"}, id="cancel"),
        pytest.param(repeat("cancel_pending_messages", "user7"), {"user", "pkey"}, id="cancel pending"),
        pytest.param(repeat("cancel_pending_messages", "user7", "goodbye"), {"user", "pkey"}, id="cancel one type"),
        pytest.param(repeat("reschedule_message", 1, NOON), {"pkey"}, id="reschedule"),
        pytest.param(repeat("retry_message", 1), {"pkey"}, id="retry"),
        pytest.param(repeat("resolve_message", 1, sent=False), {"pkey"}, id="resolve"),
        pytest.param(repeat("forget_user", "user7"), {"user", "pkey"}, id="forget"),
        pytest.param(repeat("prune_messages", timedelta(days=30)), {"prunable", "pkey"}, id="prune"),
        pytest.param(repeat("count_by_status"), {"user", "due"}, id="count"),
    ],
)
def test_no_statement_reads_the_whole_table(full_engine, work, indexes):
    """Each statement, planned for any values, finds its rows by an index however many messages are finished."""
    with Session(full_engine) as session:
        reads = generic_plan(session, work)

    assert {index for node, index in reads if index} == indexes
    assert not [node for node, _ in reads if node == "Seq Scan"]


def test_counting_reads_an_index_instead_of_the_table(full_engine):
    """The counts come from the index of users and statuses alone."""
    with Session(full_engine) as session:
        reads = generic_plan(session, repeat("count_by_status"))

    assert ("Index Only Scan", "user") in reads


# The package itself

PACKAGE = Path(engagement.__file__).parent


def test_the_repository_never_ends_a_transaction():
    """It has no word for it: neither commit nor rollback, nor a savepoint or a setting."""
    tree = ast.parse((PACKAGE / "repository.py").read_text())
    called = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}

    assert called.isdisjoint({"commit", "rollback", "begin", "begin_nested", "close", "flush", "connection", "bind"})


def test_importing_is_silent_and_cheap():
    """`import engagement` warns of nothing, and loads neither Alembic, a driver, asyncio support nor a terminal's."""
    # Alone, SQLAlchemy 2.0 loads greenlet where it is installed.
    program = (
        "import sys, sqlalchemy.orm; before = set(sys.modules); import engagement; print(*set(sys.modules) - before)"
    )

    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], cwd=PACKAGE.parent, capture_output=True, text=True, check=True
    )

    assert done.stderr == ""
    loaded = set(done.stdout.split())
    assert "engagement.worker" in loaded
    assert loaded.isdisjoint({"alembic", "sqlalchemy.ext.asyncio", "click", "rich", "psycopg", "greenlet"})
