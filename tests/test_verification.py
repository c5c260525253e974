"""`verify`: each broken promise is found and named, and a healthy queue has none."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import pytest
from conftest import new_message, queue
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError, ProgrammingError
from sqlalchemy.orm import Session

from engagement import (
    EngagementMessageRepository,
    InDoubt,
    NotSent,
    Postpone,
    Refused,
    Sent,
    Withdraw,
    Worker,
    exponential_backoff,
    migrations,
)
from engagement.models import TABLE_NAMES, EngagementBase
from engagement.verification import _promises, verify

TABLE = "engagement_message_queue"
GUARD = f"{TABLE}_status_known"


@dataclass(frozen=True)
class Plant:
    """What breaks a promise: an UPDATE that no guard but those in `guards` refuses."""

    promise: str
    update: str
    guards: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.promise}: {self.update}"


def guarded(promise: str, update: str, *more: str) -> Plant:
    return Plant(promise, update, (promise, *more))


ENTRY = '{"at": "2025-11-21T10:00:00+00:00", "attempt": 2, "event": "not_sent", "reason": null}'

PLANTS = [
    guarded("status_known", "status = 'lost'"),
    guarded("destination_known", "destination = 'both'"),
    guarded("message_type_format", "message_type = 'good bye', idempotency_key = 'mine'"),
    guarded("message_params_is_object", "message_params = '[]'"),
    guarded("history_is_array", "history = '{}'"),
    guarded("counters_not_negative", "retry_count = -1"),
    guarded("sent_iff_sent_at", "status = 'sent', attempt = 1"),
    guarded("sent_iff_sent_at", "sent_at = now()"),
    guarded("sending_iff_lease", "status = 'sending', attempt = 1"),
    guarded("sending_iff_lease", "lease_expires_at = now()"),
    guarded("counters_bounded", "attempt = 1000000001"),
    guarded("counters_bounded", "attempt = 2147483647, retry_count = 2147483647"),
    guarded("claimed_by_form", "claimed_by = 'w/recovery/99999999999999'"),
    guarded("claimed_by_form", "claimed_by = repeat('x', 3001)"),
    guarded("pending_has_destination", "destination_jid = NULL"),
    guarded("jid_fits_destination", "destination = 'group'"),
    guarded("jid_fits_destination", "destination_jid = '120363025246125486@g.us'"),
    guarded("expires_after_scheduled", "expires_at = scheduled_for"),
    guarded("ended_without_doubt", "has_doubt = true, status = 'cancelled'"),
    guarded("delivered_was_sent", "delivered_at = now()"),
    guarded("read_was_delivered", "read_at = now()"),
    guarded("receipts_readable", "undeliverable_at = 'infinity'"),
    guarded("times_readable", "next_attempt_at = 'infinity'"),
    Plant("moments_readable", "created_at = '-infinity'"),
    Plant("moments_readable", "status = 'sent', attempt = 1, sent_at = '-infinity'"),
    Plant("moments_readable", "status = 'sending', attempt = 1, lease_expires_at = 'infinity'"),
    Plant("jid_form", "destination_jid = '+55 11 99999-0000'"),
    Plant("jid_form", "destination_jid = 'br.1502576394655843'"),
    Plant("jid_form", "destination_jid = E'BR.1502576394655843\\n'"),
    Plant("jid_form", "destination_jid = 'US.' || repeat('1', 129)"),
    Plant("jid_form", "destination_jid = E'5511999990000@s.whatsapp.net\\n'"),
    Plant("key_fits", "user_id = 'user2'"),
    Plant("key_fits", "message_type = 'reminder'"),
    Plant("key_fits", "idempotency_key = 'user:with:colons:goodbye:2025-11-21'"),
    Plant("due_is_claimed", "next_attempt_at = now() - interval '61 minutes'"),
    Plant(
        "lease_is_recovered",
        "status = 'sending', attempt = 1, lease_expires_at = now() - interval '61 minutes'",
    ),
    Plant("sent_in_the_past", "status = 'sent', attempt = 1, sent_at = now() + interval '1 minute'"),
    Plant("claim_counts", "status = 'sending', lease_expires_at = now()"),
    Plant("claim_counts", "status = 'sent', sent_at = now()"),
    Plant("claim_counts", "status = 'failed'"),
    Plant("claim_counts", "status = 'in_doubt'"),
    Plant("failure_is_attempt", "attempt = 1, retry_count = 2"),
    Plant("attempt_only_grows", f"attempt = 1, history = '[{ENTRY}]'"),
    Plant("history_entries", "history = '[7]'"),
    *(
        Plant("history_entries", f"attempt = 2, history = jsonb_build_array('{ENTRY}'::jsonb - '{name}')")
        for name in ("at", "attempt", "event")
    ),
    Plant("history_entries", """attempt = 2, history = '[{"at": "today", "attempt": "2", "event": "not_sent"}]'"""),
]
HEALTHY = [
    "status = 'pending'",
    "next_attempt_at = now() - interval '59 minutes'",
    "status = 'sending', attempt = 1, lease_expires_at = now() - interval '59 minutes'",
    "status = 'sending', attempt = 1, lease_expires_at = now() + interval '5 minutes'",
    "status = 'sent', attempt = 1, sent_at = now()",
    "status = 'sent', attempt = 1, sent_at = now(), delivered_at = now(), read_at = now()",
    "status = 'failed', attempt = 1, undeliverable_at = now()",
    "status = 'cancelled', destination_jid = NULL",
    "status = 'expired'",
    "has_doubt = true, attempt = 1",
    "has_doubt = true, attempt = 1, status = 'in_doubt'",
    "status = 'failed', attempt = 1, retry_count = 1",
    f"status = 'in_doubt', attempt = 2, history = '[{ENTRY}]'",
    f"attempt = 3, history = '[{ENTRY}, {ENTRY}]'",
    "destination = 'group', destination_jid = '120363025246125486@g.us'",
    "destination_jid = '123456789@lid'",
    "destination_jid = 'BR.1502576394655843'",
    "destination_jid = 'US.ENT.11815799212886844830'",
    "destination_jid = 'US.' || repeat('aZ09', 32)",
    "expires_at = scheduled_for + interval '1 microsecond'",
    "user_id = 'a:b', idempotency_key = 'a:b:goodbye:2025-11-21'",
    "idempotency_key = 'campaign:summer:2025-11-21'",
    "idempotency_key = 'order 4711'",
    "idempotency_key = 'user1:goodbye'",
    "idempotency_key = 'user1:goodbye:2025-W47'",
    "idempotency_key = 'user1:goodbye:2024-11-21'",
]


def planted(session, update: str, guards: tuple[str, ...] = (), **fields) -> int:
    """Queue a message, drop the guards, and change it."""
    message_id = EngagementMessageRepository(session).queue_message(new_message(**fields)).message_id
    for guard in guards:
        session.execute(text(f"ALTER TABLE {TABLE} DROP CONSTRAINT {TABLE}_{guard}"))
    update = update.replace(":", r"\:")
    session.execute(text(f"UPDATE {TABLE} SET {update} WHERE id = :id"), {"id": message_id})
    return message_id


@pytest.mark.parametrize("plant", PLANTS, ids=str)
def test_a_broken_promise_is_found(session, plant):
    """Each planted violation is found, and nothing else; the guard that was dropped for it is missed too."""
    EngagementMessageRepository(session).queue_message(new_message("neighbour"))
    message_id = planted(session, plant.update, plant.guards)

    found = verify(session)

    assert [(each.promise, each.message_id) for each in found if each.message_id] == [(plant.promise, message_id)]
    missed = [(each.promise, each.problem) for each in found if not each.message_id]
    assert missed == [
        ("guards_in_force", f"the constraint {TABLE}_{guard} is missing or not valid") for guard in plant.guards
    ]


@pytest.mark.parametrize("plant", [plant for plant in PLANTS if plant.guards], ids=str)
def test_the_guards_refuse_what_is_planted(session, plant):
    """Unless it is dropped, a guard refuses what breaks its promise: no other guard is needed for it."""
    with pytest.raises(IntegrityError, match=f"{TABLE}_{plant.promise}"):
        planted(session, plant.update)


@pytest.mark.parametrize("update", HEALTHY)
def test_what_is_right_is_not_reported(session, update):
    """What lies just on this side of a promise is no violation."""
    planted(session, update)

    assert verify(session) == []


def test_every_promise_is_planted():
    """No promise is looked for without a test that sees it broken."""
    by_hand = {"key_unique", "values_given"}

    assert {plant.promise for plant in PLANTS} | by_hand == {promise.name for promise in _promises()}


def test_duplicate_keys_are_found(session):
    """With the unique constraint gone, each message that has the key of an earlier one is named, and no more come."""
    repository = EngagementMessageRepository(session)
    first, *others = (repository.queue_message(new_message(user_id)).message_id for user_id in ("ana", "bob", "cid"))
    session.execute(text(f"ALTER TABLE {TABLE} DROP CONSTRAINT {TABLE}_idempotency_key_key"))
    session.execute(text(f"UPDATE {TABLE} SET idempotency_key = 'mine'"))

    found = verify(session)

    assert first not in {each.message_id for each in found}
    assert sorted(each.message_id for each in found if each.promise == "key_unique") == sorted(others)
    assert [each.promise for each in found if not each.message_id] == ["guards_in_force"]
    with pytest.raises(ProgrammingError, match="no unique or exclusion constraint"):
        repository.queue_message(new_message("dan"))


def test_missing_values_are_found(session):
    """A message without a key blocks no duplicate: it is named, and so is the NOT NULL that was dropped."""
    session.execute(text(f"ALTER TABLE {TABLE} ALTER idempotency_key DROP NOT NULL"))
    message_id = planted(session, "idempotency_key = NULL")

    found = verify(session)

    assert [(each.promise, each.message_id) for each in found] == [
        ("guards_in_force", None),
        ("values_given", message_id),
    ]
    assert found[0].problem == "the NOT NULL of engagement_message_queue.idempotency_key is missing or not valid"


@pytest.mark.parametrize(
    ("statement", "missed"),
    [
        (f"DROP INDEX {TABLE}_due", f"the index {TABLE}_due"),
        (
            f"ALTER TABLE {TABLE} DROP CONSTRAINT {GUARD}, ADD CONSTRAINT {GUARD} CHECK (true) NOT VALID",
            f"the constraint {GUARD}",
        ),
        (
            f"UPDATE pg_index SET indisvalid = false WHERE indexrelid = '{TABLE}_lease'::regclass",
            f"the index {TABLE}_lease",
        ),
    ],
)
def test_a_dropped_guard_is_found(session, statement, missed):
    """A guard or index that is gone or not valid is named, although no message breaks its promise yet."""
    session.execute(text(statement))

    found = verify(session)

    assert [(each.promise, each.message_id, each.problem) for each in found] == [
        ("guards_in_force", None, f"{missed} is missing or not valid")
    ]


def guards_of_other_tables():
    for name in TABLE_NAMES[1:]:
        table = EngagementBase.metadata.tables[name]
        # In one order in every process that runs a part of the tests: a table has its constraints in a set.
        for guard in sorted(constraint.name for constraint in table.constraints):
            yield pytest.param(f"ALTER TABLE {name} DROP CONSTRAINT {guard}", f"constraint {guard}", id=guard)
        for name_of_index in sorted(index.name for index in table.indexes):
            yield pytest.param(f"DROP INDEX {name_of_index}", f"index {name_of_index}", id=name_of_index)
        for column in table.c:
            if not column.nullable and not column.primary_key:
                drop = f"ALTER TABLE {name} ALTER {column.name} DROP NOT NULL"
                yield pytest.param(drop, f"NOT NULL of {name}.{column.name}", id=f"{name} {column.name}")


@pytest.mark.parametrize(("statement", "missed"), list(guards_of_other_tables()))
def test_a_guard_of_any_table_is_missed(session, statement, missed):
    """Each CHECK, key, index and NOT NULL of the tables beside the queue is looked for as well."""
    session.execute(text(statement))

    found = {(each.promise, each.message_id, each.problem) for each in verify(session)}

    assert ("guards_in_force", None, f"the {missed} is missing or not valid") in found


def test_overdue_is_the_callers_choice(session):
    """What counts as due for too long is what the caller says."""
    message_id = planted(session, "next_attempt_at = now() - interval '5 minutes'")

    assert verify(session, overdue=timedelta(minutes=6)) == []
    assert [each.message_id for each in verify(session, overdue=timedelta(minutes=4))] == [message_id]


def test_at_most_limit_messages_are_named(session):
    """However many messages break a promise, `limit` of them are named."""
    ids = {planted(session, "attempt = 1, retry_count = 2", user_id=f"user{number}") for number in range(3)}

    assert len(verify(session, limit=2)) == 2
    assert {each.message_id for each in verify(session, limit=3)} == ids


@pytest.mark.parametrize(("limit", "more"), [(1, [True]), (2, [False, True]), (3, [False] * 3), (4, [False] * 3)])
def test_it_is_said_that_there_are_more(session, limit, more):
    """The last one that is named says whether more messages break its promise; another promise is another matter."""
    for number in range(3):
        planted(session, "attempt = 1, retry_count = 2", user_id=f"user{number}")
    planted(session, "next_attempt_at = now() - interval '5 hours'", user_id="late")
    found = verify(session, limit=limit)

    assert [each.more for each in found if each.promise == "failure_is_attempt"] == more
    assert [each.more for each in found if each.promise == "due_is_claimed"] == [False]


@pytest.mark.parametrize("wrong", [{"overdue": timedelta(seconds=-1)}, {"limit": 0}])
def test_impossible_options_are_refused(session, wrong):
    """Options that cannot be meant are refused."""
    with pytest.raises(ValueError, match=next(iter(wrong))):
        verify(session, **wrong)


def test_violations_hold_nothing_personal(session):
    """A violation names ids and rules: no user, no key, no JID."""
    planted(session, "user_id = 'maria', destination_jid = '+55 11', status = 'sent'", ("sent_iff_sent_at",))

    found = str(verify(session))

    assert len(found) > 100
    assert not any(private in found for private in ("maria", "user1", "+55", "Ana"))


def test_it_only_reads(engine):
    """It runs in a read-only transaction, and leaves the caller's transaction open."""
    queue(engine, new_message())
    with Session(engine) as session:
        session.execute(text("SET TRANSACTION READ ONLY"))

        assert verify(session) == []
        assert session.in_transaction()


def test_a_table_in_a_schema_is_verified(empty_engine):
    """With `schema`, the table there is looked at, guards and rows, whatever is on the search path."""
    migrations.upgrade(empty_engine)
    migrations.upgrade(empty_engine, schema='my "queue"')
    with Session(empty_engine) as session:
        repository = EngagementMessageRepository(session, schema='my "queue"')
        message_id = repository.queue_message(new_message()).message_id
        session.execute(text(f'UPDATE "my ""queue""".{TABLE} SET retry_count = 2'))
        session.execute(text(f'DROP INDEX "my ""queue""".{TABLE}_due'))

        assert verify(session) == []
        assert [each.message_id for each in verify(session, schema='my "queue"')] == [None, message_id]


OUTCOMES = [
    Sent("wamid"),
    NotSent("busy"),
    Refused("no such number"),
    InDoubt("no answer"),
    Postpone(datetime(2025, 11, 21, tzinfo=UTC), "quiet hours"),
    Withdraw("opted out"),
]


def send_variously(message):
    return OUTCOMES[message.id % len(OUTCOMES)] if message.attempt == 1 else Sent()


@contextmanager
def busy_workers(engine, count: int):
    stop = threading.Event()
    options = {"lease": timedelta(seconds=2), "backoff": exponential_backoff(timedelta(milliseconds=1))}

    def work() -> None:
        Worker(engine, send_variously, poll_interval=timedelta(milliseconds=20), **options).run(stop)

    with ThreadPoolExecutor(count) as pool:
        runs = [pool.submit(work) for _ in range(count)]
        try:
            yield
        finally:
            stop.set()
        for run in runs:
            run.result()


def test_a_busy_queue_is_healthy(engine):
    """While messages are queued, cancelled, forgotten, pruned and sent with every outcome, nothing is reported."""
    found = []
    with busy_workers(engine, count=2):
        for number in range(60):
            ids = queue(engine, *(new_message(f"user{number}_{place}") for place in range(8)))
            with Session(engine) as session, session.begin():
                repository = EngagementMessageRepository(session)
                repository.cancel_message(ids[-1])
                repository.forget_user(f"user{number}_1")
                repository.prune_messages(timedelta(0), limit=10)
            with Session(engine) as session:
                found += verify(session, overdue=timedelta(seconds=30))

    assert found == []
    with Session(engine) as session:
        counts = EngagementMessageRepository(session).count_by_status().by_status
    # It was as busy as it says: there is a message in each state that ends something.
    assert all(counts[status] for status in ("sent", "failed", "cancelled", "in_doubt"))
