"""What the repository tells, and how it cancels, reschedules, retries and resolves."""

import ast
import asyncio
import inspect
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
from by_hand import NOON, STATUSES, call, one_in_each_status, put, queued_as, version
from conftest import execute, new_message, queue, row
from sqlalchemy import Engine, create_engine
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


def test_a_message_is_due_from_its_statement_on(engine):
    """The begin of the host's transaction, which may be an hour ago, is no part of its waiting time."""
    with Session(engine) as session:
        begun = session.connection().exec_driver_sql("SELECT now()").scalar_one()
        repository = EngagementMessageRepository(session)
        found = repository.get_message(repository.queue_message(new_message()).message_id)

    assert found.scheduled_for == found.next_attempt_at > begun


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
    "record_receipts": [("receipts", given) for given in (None, 7, "read")]
    + [("receipt", [given]) for given in (None, {"event": "read"}, "read")],
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


# The package itself


PACKAGE = Path(engagement.__file__).parent


def test_the_repository_never_ends_a_transaction():
    """It has no word for it: neither commit nor rollback, nor a savepoint. Nor have those that it calls."""
    for name in ("repository.py", "_queueing/one.py", "_queueing/batch.py", "_sql/host_sessions.py"):
        tree = ast.parse((PACKAGE / name).read_text())
        called = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}

        assert called.isdisjoint({"commit", "rollback", "begin", "begin_nested", "close", "flush", "bind"}), name
        assert "connection" not in called or name == "_sql/host_sessions.py", "which reads the session's settings"


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


def public_methods(class_: type) -> dict:
    return {name: member for name, member in vars(class_).items() if not name.startswith("_")}


def test_the_async_repository_has_the_same_methods():
    """Same names, same signatures, each awaited, each with its promise."""
    ours, twins = public_methods(EngagementMessageRepository), public_methods(AsyncEngagementMessageRepository)

    assert ours.keys() == twins.keys()
    for name, method in ours.items():
        assert inspect.signature(method) == inspect.signature(twins[name]), name
        assert inspect.iscoroutinefunction(twins[name])
        assert not inspect.iscoroutinefunction(method)
        assert twins[name].__doc__
    constructors = (EngagementMessageRepository.__init__, AsyncEngagementMessageRepository.__init__)
    sync_names, async_names = (list(inspect.signature(constructor).parameters) for constructor in constructors)
    assert sync_names == async_names
