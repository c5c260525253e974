"""Queueing: what the caller's transaction decides, what a duplicate is, and batches of any size."""

import gc
import tracemalloc
from datetime import UTC, datetime, timedelta

import pytest
from batches import chunks_of, keys, messages
from conftest import PATIENCE, execute, in_thread, new_message, queue, row
from host_code import Host
from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError, ProgrammingError
from sqlalchemy.orm import Session

from engagement import (
    EngagementMessageRepository,
    InvalidMessage,
    MessageStatus,
    NewMessage,
    Queued,
    QueuedMany,
    migrations,
    process_message_queue,
)

SERIALIZATION_FAILURE = "40001"


@pytest.fixture(name="host", params=["sync", "async"])
def _host(request, engine):
    return Host(engine, request.param)


# On the caller's transaction


@pytest.mark.parametrize("size", [1, 5, 7])
def test_nothing_is_left_after_the_callers_rollback(host, size):
    """Queueing commits nothing: others see nothing of it, and after a rollback there is nothing."""

    async def scenario(session, repository):
        await repository.queue_message(new_message())
        await repository.queue_messages(messages(size))
        assert keys(host.engine) == []
        await session.rollback()

    with chunks_of(5):
        host.play(scenario)

    assert keys(host.engine) == []


@pytest.mark.parametrize("size", [1, 5, 7])
def test_the_callers_commit_stores_everything(host, size):
    """After the caller's commit everything is there, once."""

    async def scenario(session, repository):
        one = await repository.queue_message(new_message(idempotency_key="one"))
        many = await repository.queue_messages(messages(size))
        await session.commit()
        return one, many

    with chunks_of(5):
        one, many = host.play(scenario)

    assert (one.created, one.idempotency_key, one.status) == (True, "one", MessageStatus.PENDING)
    assert many == QueuedMany(created=size, duplicates=0)
    assert row(host.engine, one.message_id).idempotency_key == "one"
    assert sorted(keys(host.engine)) == [*(f"k{number:06}" for number in range(size)), "one"]


def test_what_was_queued_is_what_was_given(host):
    """Every field is stored, the message is pending and due when the host asked for it, and its counters are zero."""
    later = datetime.now(UTC) + timedelta(days=2)

    async def scenario(session, repository):
        queued = await repository.queue_message(
            user_id="ana",
            message_type="weekly_review",
            message_key="review.week",
            message_params={"done": [1, 2], "name": "Ana"},
            destination="group",
            destination_jid="123456789012345678@g.us",
            scheduled_for=later,
            expires_at=later + timedelta(hours=1),
        )
        await session.commit()
        return queued

    queued = host.play(scenario)

    found = row(host.engine, queued.message_id)
    assert queued == Queued(True, found.id, f"ana:weekly_review:{later:%Y-%m-%d}", MessageStatus.PENDING)
    assert (found.user_id, found.message_type, found.message_key) == ("ana", "weekly_review", "review.week")
    assert found.message_params == {"done": [1, 2], "name": "Ana"}
    assert (found.destination, found.destination_jid) == ("group", "123456789012345678@g.us")
    assert (found.scheduled_for, found.next_attempt_at) == (later, later)
    assert found.expires_at == later + timedelta(hours=1)
    assert (found.status, found.attempt, found.retry_count, found.history) == ("pending", 0, 0, [])


def test_a_message_without_a_time_is_due_at_once(host):
    """`scheduled_for` None means now, by the database's clock, for one message and for a batch."""

    async def scenario(session, repository):
        await repository.queue_message(new_message("a"))
        await repository.queue_messages(
            [new_message("b"), new_message("c", scheduled_for=datetime(2020, 1, 1, tzinfo=UTC))]
        )
        query = (
            "SELECT user_id, scheduled_for = next_attempt_at, scheduled_for BETWEEN now() AND clock_timestamp()"
            " FROM engagement_message_queue ORDER BY user_id"
        )
        return (await session.execute(text(query))).all()

    assert host.play(scenario) == [("a", True, True), ("b", True, True), ("c", True, False)]


def test_a_message_that_expires_before_a_late_database_clock_is_stored(host):
    """A host whose clock lags may ask for what has just expired: it is stored, and expires instead of being sent."""
    now = datetime.now(UTC)
    one, many = (new_message(user, expires_at=now + timedelta(hours=1)) for user in ("a", "b"))
    for message in (one, many):
        object.__setattr__(message, "expires_at", now - timedelta(minutes=1))  # what the slow clock let pass

    async def scenario(session, repository):
        await repository.queue_message(one)
        await repository.queue_messages([many])
        await session.commit()

    host.play(scenario)

    assert process_message_queue(host.engine, lambda _: None).expired == 2


@pytest.mark.parametrize("size", [1, 5, 7])
def test_a_savepoint_that_is_rolled_back_takes_its_messages_with_it(host, size):
    """Inside a savepoint everything works; what it holds goes with it, and what is outside of it stays."""

    async def scenario(session, repository):
        await repository.queue_message(new_message(idempotency_key="before"))
        savepoint = await session.begin_nested()
        await repository.queue_message(new_message(idempotency_key="inside"))
        await repository.queue_messages(messages(size))
        await savepoint.rollback()
        after = await repository.queue_messages([*messages(size), new_message(idempotency_key="before")])
        await session.commit()
        return after

    with chunks_of(5):
        after = host.play(scenario)

    assert after == QueuedMany(created=size, duplicates=1)
    assert sorted(keys(host.engine)) == ["before", *(f"k{number:06}" for number in range(size))]


def test_bad_input_leaves_the_transaction_usable(host):
    """`InvalidMessage` is raised before the database is touched: what the caller did before is still committed."""

    async def scenario(session, repository):
        await repository.queue_message(new_message(idempotency_key="before"))
        bad = {
            "user_id": "a\x00",
            "message_type": "t",
            "message_key": "k",
            "destination": "group",
            "destination_jid": "x",
        }
        with pytest.raises(InvalidMessage, match="user_id"):
            await repository.queue_message(**bad)
        with pytest.raises(InvalidMessage, match="message_params"):
            await repository.queue_messages(new_message(message_params={"n": value}) for value in (1, float("nan")))
        with pytest.raises(InvalidMessage, match="user_id"):
            await repository.get_pending_messages("\x00")
        with pytest.raises(InvalidMessage, match="message_id"):
            await repository.cancel_message(2**63)
        with pytest.raises(InvalidMessage, match="scheduled_for"):
            await repository.reschedule_message(1, datetime(2030, 1, 1))  # noqa: DTZ001 - that is the point
        with pytest.raises(InvalidMessage, match="idempotency_key"):
            await repository.get_message_by_key("k\ud800")
        await repository.queue_message(new_message(idempotency_key="after"))
        await session.commit()

    host.play(scenario)

    assert keys(host.engine) == ["before", "after"]


def test_nothing_is_left_behind_in_the_callers_transaction(host):
    """No setting, temporary table, advisory lock or other isolation level outlives a call."""
    state = text(
        "SELECT (SELECT jsonb_object_agg(name, setting) FROM pg_settings),"
        " (SELECT count(*) FROM pg_class WHERE relnamespace = pg_my_temp_schema()),"
        " (SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid())"
    )

    async def scenario(session, repository):
        before = (await session.execute(state)).one()
        await repository.queue_message(new_message())
        await repository.queue_messages(messages(3))
        await repository.queue_messages(messages(12))
        await repository.forget_user("user1")
        return before, (await session.execute(state)).one()

    with chunks_of(5):
        before, after = host.play(scenario)

    assert before == after


def test_the_transaction_is_never_ended(engine):
    """No call ends the caller's transaction, sets a savepoint, or begins another one."""
    ended = []
    with Session(engine) as session:
        repository = EngagementMessageRepository(session)
        session.begin()
        for name in ("commit", "rollback", "savepoint", "release_savepoint", "rollback_savepoint"):
            event.listen(session.connection(), name, lambda *_, name=name: ended.append(name))
        with chunks_of(2):
            queued = repository.queue_message(new_message())
            repository.queue_messages(messages(5))
            repository.cancel_message(queued.message_id)
            repository.retry_message(queued.message_id)
            repository.forget_user("user1")
            repository.prune_messages(timedelta(0))
        assert ended == []
        assert session.in_transaction()


# Duplicates


@pytest.mark.parametrize("status", ["pending", "sent", "failed", "cancelled", "expired", "in_doubt", "sending"])
def test_a_duplicate_names_the_row_that_was_there_and_leaves_it_untouched(host, status):
    """A key that exists is no error: the answer names its row, in whatever status, and not a bit of that changes."""
    (message_id,) = queue(host.engine, new_message(idempotency_key="k"))
    update = (
        "UPDATE engagement_message_queue SET status = :status, sent_at = CASE WHEN :status = 'sent' THEN now() END,"
        " lease_expires_at = CASE WHEN :status = 'sending' THEN now() END"
    )
    with host.engine.begin() as connection:
        connection.execute(text(update), {"status": status})
    whole = text("SELECT xmin, ctid, * FROM engagement_message_queue")

    async def scenario(session, repository):
        before = (await session.execute(whole)).all()
        other = new_message("other", idempotency_key="k", message_params={"name": "Bea"})
        one = await repository.queue_message(other)
        many = await repository.queue_messages([other])
        await session.commit()
        assert (await session.execute(whole)).all() == before
        return one, many

    one, many = host.play(scenario)

    assert one == Queued(False, message_id, "k", MessageStatus(status))
    assert many == QueuedMany(created=0, duplicates=1)


def test_a_duplicate_does_not_wait_for_a_worker(engine):
    """Queueing a key whose row a worker has locked answers at once."""
    (message_id,) = queue(engine, new_message(idempotency_key="k"))

    with engine.begin() as connection:
        connection.execute(text("SELECT FROM engagement_message_queue FOR UPDATE"))
        queued = in_thread(queue, engine, new_message(idempotency_key="k")).result(PATIENCE)

    assert queued == [message_id]


def test_a_duplicate_within_one_transaction(host):
    """The second call in one transaction finds what the first one queued."""

    async def scenario(_session, repository):
        return [await repository.queue_message(new_message()) for _ in range(2)]

    first, second = host.play(scenario)

    assert (first.created, second.created) == (True, False)
    assert first.message_id == second.message_id


@pytest.mark.parametrize("isolation", ["REPEATABLE READ", "SERIALIZABLE"])
@pytest.mark.parametrize("call", ["one", "a chunk", "chunks"])
def test_a_stricter_isolation_answers_truly_or_fails_to_serialize(host, isolation, call):
    """A duplicate older than the snapshot is answered; a newer one is the database's own error, and never a lie."""
    (old_id,) = queue(host.engine, new_message(idempotency_key="old"))

    async def answer(repository, key):
        message = new_message(idempotency_key=key)
        if call == "one":
            queued = await repository.queue_message(message)
            return queued.created, queued.message_id
        filling = [] if call == "a chunk" else messages(4)
        queued = await repository.queue_messages([message, *filling])
        return queued.created - len(filling) == 1, None

    async def scenario(session, repository):
        await session.execute(text("SELECT 1"))  # takes the snapshot
        queue(host.engine, new_message(idempotency_key="new"))
        savepoint = await session.begin_nested()
        old = await answer(repository, "old")
        await savepoint.rollback()
        savepoint = await session.begin_nested()
        fresh = await answer(repository, "fresh")
        await savepoint.rollback()
        with pytest.raises(DBAPIError) as caught:
            await answer(repository, "new")
        return old, fresh, caught.value.orig.sqlstate

    with chunks_of(3):
        old, fresh, sqlstate = host.play(scenario, isolation=isolation)

    assert old == (False, old_id if call == "one" else None)
    assert fresh[0] is True
    assert sqlstate == SERIALIZATION_FAILURE


@pytest.mark.parametrize("size", [None, 3, 12], ids=["one", "one chunk", "many chunks"])
def test_only_a_key_that_is_there_makes_a_duplicate(host, size):
    """An id that is there is an error: a sequence that a restore left behind must not make messages vanish."""
    (taken,) = queue(host.engine, new_message("ana"))
    execute(
        host.engine, "SELECT setval(pg_get_serial_sequence('engagement_message_queue', 'id'), :id, false)", id=taken
    )

    async def scenario(_session, repository):
        if size is None:
            await repository.queue_message(new_message("bob"))
        else:
            await repository.queue_messages(messages(size))

    with chunks_of(5), pytest.raises(IntegrityError, match="engagement_message_queue_pkey"):
        host.play(scenario)


# Batches


def test_an_empty_batch_is_no_batch(host):
    """Nothing given is nothing done."""

    async def scenario(_session, repository):
        return await repository.queue_messages([]), await repository.queue_messages(iter(()))

    assert host.play(scenario) == (QueuedMany(0, 0), QueuedMany(0, 0))


@pytest.mark.parametrize("size", [1, 4, 5, 6, 9, 10, 11, 23])
def test_a_batch_of_any_size_is_counted_exactly(host, size):
    """On both sides of every chunk's end, the counts add up to what was given."""
    queue(host.engine, *messages(3))

    async def scenario(session, repository):
        queued = await repository.queue_messages(message for message in messages(size))
        await session.commit()
        return queued

    with chunks_of(5):
        queued = host.play(scenario)

    assert queued == QueuedMany(created=max(size - 3, 0), duplicates=min(size, 3))
    assert len(keys(host.engine)) == max(size, 3)


@pytest.mark.parametrize("chunk", [1000, 40, 3], ids=["in one chunk", "in two", "across many"])
def test_of_repeats_in_a_batch_the_first_wins(host, chunk):
    """A key that comes again in its batch is a duplicate, and the message that came first is stored."""
    repeats = [new_message("ana", message_key=f"number.{number}") for number in range(60)]
    others = messages(20)

    async def scenario(session, repository):
        queued = await repository.queue_messages([*others, *repeats])
        await session.commit()
        return queued, await repository.get_message_by_key(repeats[0].key)

    with chunks_of(chunk):
        queued, stored = host.play(scenario)

    assert queued == QueuedMany(created=21, duplicates=59)
    assert stored.message_key == "number.0"


def test_a_batch_is_known_before_the_database_is_asked(engine):
    """However many a generator makes, no statement is executed before the last one; then one for each chunk."""
    executed = []

    def produce():
        for message in messages(40):
            assert executed == []
            yield message

    with Session(engine) as session, chunks_of(5):
        event.listen(session.connection(), "before_cursor_execute", lambda *_: executed.append(1))
        assert EngagementMessageRepository(session).queue_messages(produce()).created == 40

    assert len(executed) == 8


def test_a_batch_takes_constant_memory(engine):
    """Four times as many messages take no more memory."""

    def produce(count):
        return (
            new_message(idempotency_key=f"{count}-{number}", message_params={"text": "x" * 200})
            for number in range(count)
        )

    def peak(count) -> int:
        with Session(engine) as session:
            tracemalloc.reset_peak()
            assert EngagementMessageRepository(session).queue_messages(produce(count)).created == count
            return tracemalloc.get_traced_memory()[1]

    with chunks_of(250):
        tracemalloc.start()
        try:
            peak(1_000)
            small, large = peak(3_000), peak(12_000)
        finally:
            tracemalloc.stop()

    assert large < small * 1.2


def test_a_batch_holds_two_chunks_at_most(engine):
    """One that is on its way, and one that is being made: what is in the file is let go, the first chunks too."""
    alive = []

    def produce():
        for number in range(50):
            if number % 10 == 0:
                gc.collect()
                alive.append(sum(isinstance(thing, NewMessage) for thing in gc.get_objects()))
            yield new_message(idempotency_key=f"{number}")

    with chunks_of(10), Session(engine) as session:
        EngagementMessageRepository(session).queue_messages(produce())

    assert max(alive) <= alive[0] + 21


@pytest.mark.parametrize("at", [0, 3, 5, 8, 13])
def test_an_error_of_the_generator_passes_through(host, at):
    """What the iterable raises reaches the caller, nothing of the batch is stored, and the transaction goes on."""

    class OutOfCoffee(Exception):
        pass

    def produce():
        for number, message in enumerate(messages(20)):
            if number == at:
                raise OutOfCoffee
            yield message

    async def scenario(session, repository):
        await repository.queue_message(new_message(idempotency_key="before"))
        with pytest.raises(OutOfCoffee):
            await repository.queue_messages(produce())
        stored = (await session.execute(text("SELECT count(*) FROM engagement_message_queue"))).scalar_one()
        again = await repository.queue_messages(messages(12))
        await session.commit()
        return stored, again

    with chunks_of(5):
        stored, again = host.play(scenario)

    assert stored == 1
    assert again == QueuedMany(created=12, duplicates=0)
    assert len(keys(host.engine)) == 13


def test_two_batches_in_one_transaction(host):
    """A second batch in a transaction does not meet what the first one left, and finds its keys."""

    async def scenario(session, repository):
        answers = [await repository.queue_messages(messages(size)) for size in (12, 14, 3)]
        await session.commit()
        return answers

    with chunks_of(5):
        answers = host.play(scenario)

    assert answers == [QueuedMany(12, 0), QueuedMany(2, 12), QueuedMany(0, 3)]
    assert len(keys(host.engine)) == 14


# Another schema


def test_the_table_may_be_in_another_schema(host):
    """With `schema=`, every call works on the table there and on none other, however large the batch."""
    engine = host.engine
    migrations.upgrade(engine, schema="guest")

    async def scenario(session, repository):
        queued = await repository.queue_message(new_message("ana"))
        many = [await repository.queue_messages(messages(size)) for size in (3, 12)]
        await session.commit()
        found = await repository.get_message(queued.message_id)
        assert found.user_id == "ana"
        assert (await repository.get_message_by_key(queued.idempotency_key)).id == queued.message_id
        assert len(await repository.get_pending_messages("ana")) == 1
        assert await repository.reschedule_message(queued.message_id, datetime(2030, 1, 1, tzinfo=UTC))
        assert (await repository.cancel_message(queued.message_id)).is_cancelled
        assert await repository.cancel_pending_messages("user1") == 12
        assert (await repository.count_by_status())[MessageStatus.CANCELLED] == 13
        assert (await repository.forget_user("ana")).blanked == 1
        assert await repository.prune_messages(timedelta(0)) == 12
        assert not await repository.retry_message(queued.message_id)
        assert not await repository.resolve_message(queued.message_id, sent=True)
        await session.commit()
        return many

    try:
        with chunks_of(5):
            many = host.play(scenario, schema="guest")
        with engine.connect() as connection:
            stored = connection.execute(text("SELECT count(*) FROM guest.engagement_message_queue")).scalar_one()
    finally:
        with engine.begin() as connection:
            connection.execute(text("DROP SCHEMA guest CASCADE"))

    assert many == [QueuedMany(3, 0), QueuedMany(9, 3)]
    assert stored == 13
    assert keys(engine) == []


# Errors of the database


def assert_shows_nothing_of(error: BaseException, *secrets: str) -> None:
    shown = [str(error), repr(error)]
    while (error := error.__cause__ or error.__context__) is not None:
        shown += [str(error), repr(error)]
    assert not [secret for secret in secrets for text_shown in shown if secret in text_shown]


@pytest.mark.parametrize("size", [1, 3, 7])
def test_a_database_error_shows_no_parameters(empty_engine, size):
    """Without the table, the error says so and nothing of the messages."""
    batch = messages(size, user_id="Zx9user", message_key="Zx9key", message_params={"name": "Zx9params"})
    with Session(empty_engine) as session, chunks_of(5):
        repository = EngagementMessageRepository(session)
        for call, argument in ((repository.queue_messages, batch), (repository.queue_message, batch[0])):
            with pytest.raises(ProgrammingError, match="engagement_message_queue") as caught:
                call(argument)
            session.rollback()

            assert_shows_nothing_of(caught.value, "Zx9user", "Zx9key", "Zx9params", batch[0].destination_jid)


def test_a_lock_timeout_shows_no_parameters(engine):
    """A host that gives up waiting gets the database's error, without the key that it waited for."""
    with Session(engine) as holder, Session(engine) as session:
        EngagementMessageRepository(holder).queue_message(new_message("Zx9user"))
        session.execute(text("SET LOCAL lock_timeout = '20ms'"))
        with pytest.raises(OperationalError) as caught:
            EngagementMessageRepository(session).queue_message(new_message("Zx9user"))

    assert caught.value.orig.sqlstate == "55P03"
    assert_shows_nothing_of(caught.value, "Zx9user")


def test_a_constraint_of_the_hosts_own_shows_no_row(empty_engine):
    """PostgreSQL's DETAIL prints the row that a constraint refuses; what we raise names the constraint, not the row."""
    migrations.upgrade(empty_engine)
    with empty_engine.begin() as connection:
        connection.execute(
            text("ALTER TABLE engagement_message_queue ADD CONSTRAINT no_goodbyes CHECK (message_type <> 'goodbye')")
        )
    message = new_message("Zx9user", message_key="Zx9key", message_params={"name": "Zx9params"})
    with Session(empty_engine) as session:
        repository = EngagementMessageRepository(session)
        for call, argument in ((repository.queue_messages, [message]), (repository.queue_message, message)):
            with pytest.raises(IntegrityError, match="no_goodbyes") as caught:
                call(argument)
            session.rollback()

            assert_shows_nothing_of(caught.value, "Zx9user", "Zx9key", "Zx9params", message.destination_jid)
