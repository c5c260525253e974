"""Lists, pages, overview and activity: found by an index, counted by the database's clock."""

import re
from datetime import UTC, datetime, timedelta

import pytest
from by_hand import update
from conftest import execute, new_message, queue
from sqlalchemy import event, text
from sqlalchemy.orm import Session

from engagement import EngagementMessageRepository, InvalidMessage, migrations
from engagement._operating.lists import count_messages, list_messages
from engagement._operating.overview import activity, overview
from engagement._operating.timeline import timeline

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
A_DAY = timedelta(days=1)


# Many messages


def ids(engine, **options):
    with Session(engine) as session:
        return [message.id for message in list_messages(session, **options)]


def test_pages_are_walked_both_ways_the_newest_first(engine):
    """Each page goes on where the last one ended, none is repeated or left out, and each is newest first."""
    queue(engine, *(new_message(f"user{number}") for number in range(5)))

    assert ids(engine, limit=2) == [5, 4]
    assert ids(engine, limit=2, before=4) == [3, 2]
    assert ids(engine, limit=2, before=2) == [1]
    assert ids(engine, limit=2, after=1) == [3, 2]
    assert ids(engine, limit=2, after=5) == []
    assert ids(engine, after=1, before=4) == [3, 2]


@pytest.fixture(name="three")
def _three(engine):
    """Three messages a day apart, of two users and types; the second failed, and was forgotten."""
    for number, (user_id, message_type) in enumerate([("a", "goodbye"), ("b", "review"), ("a", "review")]):
        at = NOON + number * A_DAY
        queue(engine, new_message(user_id, message_type=message_type, scheduled_for=at))
        update(engine, "created_at = :at", f"id = {number + 1}", at=at)
    update(engine, "status = 'failed', attempt = 1, destination_jid = NULL", "id = 2")
    return engine


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({}, [3, 2, 1]),
        ({"status": ["pending"]}, [3, 1]),
        ({"status": ["pending", "failed"]}, [3, 2, 1]),
        ({"status": ["sent"]}, []),
        ({"user_id": "a"}, [3, 1]),
        ({"message_type": "review"}, [3, 2]),
        ({"user_id": "a", "message_type": "review", "status": ["pending"]}, [3]),
        ({"blanked": False}, [3, 1]),
        ({"blanked": True}, [2]),
        *(
            filters
            for moment in ("created", "scheduled")
            for filters in (
                ({f"{moment}_since": NOON + A_DAY}, [3, 2]),
                ({f"{moment}_since": NOON + A_DAY + timedelta(microseconds=1)}, [3]),
                ({f"{moment}_until": NOON + A_DAY}, [1]),
                ({f"{moment}_until": NOON + A_DAY + timedelta(microseconds=1)}, [2, 1]),
            )
        ),
    ],
)
def test_filters_choose_what_fits_all_of_them(three, filters, expected):
    """A message is listed and counted if every filter fits; a time since is included, and until is not."""
    assert ids(three, **filters) == expected
    with Session(three) as session:
        assert count_messages(session, **filters) == len(expected)


@pytest.mark.parametrize(
    "filters",
    [
        {"status": ["lost"]},
        {"user_id": ""},
        {"message_type": "a\0b"},
        {"created_since": datetime(2026, 3, 1)},  # noqa: DTZ001 - naive on purpose
        {"before": 0},
        {"limit": 0},
    ],
)
def test_what_cannot_be_asked_is_refused_before_the_database_is(session, filters):
    """Bad input raises ValueError and poisons no transaction."""
    with pytest.raises(ValueError):
        list_messages(session, **filters)
    assert issubclass(InvalidMessage, ValueError)
    assert not session.in_transaction()


@pytest.mark.parametrize(
    ("filters", "index"),
    [
        ({"status": ["pending"]}, "due"),
        ({"status": ["sending"]}, "lease"),
        ({"status": ["failed"], "message_type": "goodbye"}, "attention"),
        ({"status": ["in_doubt"]}, "attention"),
        ({"status": ["failed", "in_doubt"]}, "attention"),
        ({"user_id": "user1"}, "user"),
        ({"undeliverable": True}, "attention"),
        ({"undeliverable": True, "status": ["failed"]}, "attention"),
    ],
)
def test_what_needs_a_look_is_found_by_an_index(engine, filters, index):
    """Messages of a user, and of what is not sent, are found by their index among many that are sent."""
    execute(
        engine,
        """INSERT INTO engagement_message_queue (user_id, message_type, message_key, destination, destination_jid,
               idempotency_key, status, attempt, sent_at)
           SELECT 'u' || n, 'goodbye', 'k', 'individual', '5511999990000@s.whatsapp.net', 'key' || n, 'sent', 1, now()
           FROM generate_series(1, 20000) n""",
    )
    ids_of_each = queue(engine, *(new_message(f"user{number}") for number in range(4)))
    for status, message_id in zip(("sending", "failed", "in_doubt"), ids_of_each[1:], strict=True):
        lease = "now()" if status == "sending" else "NULL"
        update(engine, f"status = '{status}', attempt = 1, lease_expires_at = {lease}", f"id = {message_id}")
    update(engine, "undeliverable_at = now()", "status = 'failed'")
    execute(engine, "ANALYZE engagement_message_queue")

    assert {f"engagement_message_queue_{index}"} == indexes_read(engine, list_messages, **filters)
    assert {f"engagement_message_queue_{index}"} == indexes_read(engine, count_messages, **filters)


def indexes_read(engine, function, **filters) -> set[str]:
    """Return the indexes in the plan of the statement that `function` executes."""
    executed = []
    with Session(engine) as session:
        event.listen(session, "do_orm_execute", lambda state: executed.append(state.statement))
        assert function(session, **filters)
        (statement,) = executed
        words = str(statement.compile(engine))
        # As a parameter it would match no partial index once the statement is prepared.
        assert all(f"'{status}'" in words for status in filters.get("status", ()))
        compiled = statement.compile(engine, compile_kwargs={"literal_binds": True})
        plan = session.scalars(text(f"EXPLAIN {compiled}")).all()
    return set(re.findall(r"engagement_message_queue_\w+", "\n".join(plan)))


# All of it


def test_the_overview_counts_and_ages_by_the_databases_clock(engine):
    """Counts, what is due, leases that ran out, doubts, rates, and the size of the table."""
    queue(engine, *(new_message(f"user{number}") for number in range(9)))
    update(engine, "next_attempt_at = now() - id * interval '1 minute'")
    update(engine, "next_attempt_at = now() + interval '1 day', has_doubt = true, attempt = 1", "id = 1")
    update(engine, "status = 'sending', attempt = 1, lease_expires_at = now() - interval '1 second'", "id = 2")
    update(engine, "status = 'sending', attempt = 1, lease_expires_at = now() + interval '1 hour'", "id = 3")
    update(engine, "status = 'in_doubt', attempt = 1", "id IN (4, 5)")
    update(engine, "status = 'sent', attempt = 1, sent_at = now() - interval '59 minutes'", "id = 6")
    update(engine, "status = 'sent', attempt = 1, sent_at = now() - interval '61 minutes'", "id = 7")
    update(engine, "created_at = now() - interval '61 minutes'", "id <= 3")

    with Session(engine) as session:
        found = overview(session)

    assert found.by_status == {
        "pending": 3, "sending": 2, "sent": 2, "failed": 0, "cancelled": 0, "expired": 0, "in_doubt": 2,
    }  # fmt: skip
    assert found.due == 2
    assert timedelta(minutes=9) <= found.oldest_due < timedelta(minutes=10)
    assert found.leases_expired == 1
    assert found.pending_in_doubt == 1
    assert timedelta(minutes=5) <= found.oldest_in_doubt < timedelta(minutes=6)
    assert [(flow.queued, flow.sent) for flow in found.flows.each] == [(6, 0), (6, 0), (6, 1)]
    assert found.done_in is None
    assert found.table_bytes > 0
    assert found.index_bytes > 0
    assert found.dead_rows >= 0


def test_a_backlog_that_is_being_sent_is_counted_by_when_it_was_sent(engine):
    """Old messages that go out now count in the minute they went out, beside newer ones, and say when all are done."""
    queue(engine, *(new_message(f"user{number}") for number in range(9)))
    update(engine, "next_attempt_at = now() - interval '1 day'", "id < 9")
    for message_id, seconds in enumerate((0, 59, 61, 299, 301, 3599, 3601), 1):
        ago = f"now() - interval '{seconds} seconds'"
        update(engine, f"status = 'sent', attempt = 1, sent_at = {ago}, created_at = {ago}", f"id = {message_id}")

    with Session(engine) as session:
        found = overview(session)

    assert [(flow.over, flow.queued, flow.sent) for flow in found.flows.each] == [
        (timedelta(minutes=1), 4, 2), (timedelta(minutes=5), 6, 4), (timedelta(minutes=60), 8, 6),
    ]  # fmt: skip
    assert found.done_in == timedelta(seconds=round(2 / (4 / 300)))


def test_a_speed_is_over_what_was_read(engine, monkeypatch):
    """Where the messages that were sent last reach back less than five minutes, the speed is theirs."""
    monkeypatch.setattr("engagement._operating.flow.MOST_READ", 2)
    queue(engine, *(new_message(f"user{number}") for number in range(6)))
    update(engine, "status = 'sent', attempt = 1, sent_at = now() - id * interval '10 seconds'", "id <= 4")

    with Session(engine) as session:
        found = overview(session)

    assert [flow.sent for flow in found.flows.each] == [2, 2, 2]
    assert found.done_in == pytest.approx(timedelta(seconds=20), abs=timedelta(seconds=1))


def test_an_empty_queue_has_an_overview(session):
    """Nothing is queued, sent, due or in doubt, and no age is told."""
    found = overview(session)

    assert sum(found.by_status.values()) == found.due == 0
    assert {(flow.queued, flow.sent) for flow in found.flows.each} == {(0, 0)}
    assert found.oldest_due is found.oldest_in_doubt is found.done_in is None


def test_activity_counts_what_was_due_and_what_was_sent_in_each_bucket(engine):
    """Each message counts once where it was due and, if it was sent, once where that was; empty buckets are told."""
    since = datetime.now(UTC) - timedelta(hours=4)
    queue(engine, *(new_message(f"user{number}") for number in range(8)))
    place = {
        1: ("sent", 10, 130),  # due in the first hour, sent in the third
        2: ("sent", -30, 10),  # due before
        3: ("failed", 70, None),
        4: ("in_doubt", 70, None),
        5: ("cancelled", 70, None),
        6: ("pending", 185, None),
        7: ("sending", 130, None),
        8: ("pending", 60 * 24, None),  # not due yet
    }
    for message_id, (status, due, sent) in place.items():
        update(
            engine,
            "status = :status, attempt = 1, next_attempt_at = :due, sent_at = :sent, lease_expires_at = :lease",
            f"id = {message_id}",
            status=status,
            due=since + timedelta(minutes=due),
            sent=None if sent is None else since + timedelta(minutes=sent),
            lease=since if status == "sending" else None,
        )

    with Session(engine) as session:
        buckets = activity(session, since, timedelta(hours=1))

    assert [(bucket.due, bucket.sent) for bucket in buckets] == [(1, 1), (3, 0), (1, 1), (1, 0), (0, 0)]
    assert [bucket.at - since for bucket in buckets] == [timedelta(hours=hours) for hours in range(5)]


@pytest.mark.parametrize(
    ("since", "bucket"),
    [(timedelta(days=1), timedelta(0)), (timedelta(days=400), timedelta(minutes=1))],
)
def test_activity_has_a_sensible_number_of_buckets(session, since, bucket):
    """Nobody can look at a million of them."""
    with pytest.raises(ValueError, match="bucket: "):
        activity(session, datetime.now(UTC) - since, bucket)


def test_everything_only_reads_and_honors_the_schema(empty_engine):
    """In a transaction that may not write, with the table in a schema off the search path."""
    migrations.upgrade(empty_engine, schema="messaging")
    with Session(empty_engine) as session, session.begin():
        EngagementMessageRepository(session, schema="messaging").queue_message(new_message())
    with Session(empty_engine) as session:
        session.execute(text("SET TRANSACTION READ ONLY"))
        (message,) = list_messages(session, schema="messaging")
        assert timeline(message)
        assert count_messages(session, schema="messaging") == 1
        assert overview(session, schema="messaging").by_status["pending"] == 1
        assert overview(session, schema="messaging").table_bytes > 0
        buckets = activity(session, datetime.now(UTC) - A_DAY, A_DAY / 4, schema="messaging")
        assert sum(bucket.due for bucket in buckets) == 1


def test_an_overview_may_count_only_so_far(engine):
    """A large table is not counted whole: what is finished is estimated, the rest is counted as far as was asked."""
    for number in range(6):
        status, sent_at = ("sent", "now()") if number < 4 else ("failed", "NULL")
        (message_id,) = queue(engine, new_message(f"user{number}"))
        with engine.begin() as connection:
            connection.execute(
                text(f"UPDATE engagement_message_queue SET status = '{status}', sent_at = {sent_at} WHERE id = :id"),
                {"id": message_id},
            )
    queue(engine, *(new_message(f"pending{number}") for number in range(3)))
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("ANALYZE engagement_message_queue"))
    try:
        queue(engine, new_message("later"))
        with Session(engine) as session:
            small, large = overview(session, count_up_to=9), overview(session, count_up_to=2)
    finally:
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text("TRUNCATE engagement_message_queue"))
            connection.execute(text("VACUUM ANALYZE engagement_message_queue"))

    assert not small.is_rough
    assert (small.by_status["pending"], small.by_status["sent"], small.due) == (4, 4, 4)
    assert large.is_rough
    # Three were pending when the planner looked; two were counted, and then no more.
    assert (large.by_status["pending"], large.by_status["sent"], large.by_status["failed"]) == (3, 4, 2)
    assert (large.by_status["cancelled"], large.due) == (0, 2)
