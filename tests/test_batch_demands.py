"""A batch of any size asks for no more than one message does: grants, two-phase commit, AUTOCOMMIT, and no luck."""

import asyncio
import os
import subprocess
import sys
import textwrap
from contextlib import contextmanager

import pytest
from conftest import PATIENCE, execute, in_thread, new_message, wait_until_blocked
from sqlalchemy import create_engine, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from engagement import AsyncEngagementMessageRepository, EngagementMessageRepository, QueuedMany, migrations
from engagement._operating.temporary_postgres import temporary_postgres

SIZES = pytest.mark.parametrize("size", [1, 5, 6, 23])
# What one message needs, and nothing else.
GRANTS = """
    REVOKE TEMPORARY ON DATABASE {database} FROM PUBLIC;
    CREATE ROLE {role} LOGIN;
    GRANT INSERT (user_id, message_type, message_key, message_params, destination, destination_jid, scheduled_for,
                  expires_at, next_attempt_at, idempotency_key, trace_context),
          SELECT (id, status, idempotency_key) ON engagement_message_queue TO {role};
    GRANT USAGE ON SEQUENCE engagement_message_queue_id_seq TO {role};
"""


@pytest.fixture(autouse=True)
def _chunks_of_five(monkeypatch):
    monkeypatch.setattr("engagement._queueing.batch.CHUNK", 5)


def messages(count, **given):
    return (new_message(idempotency_key=f"k{number:06}", **given) for number in range(count))


def stored(engine) -> int:
    return execute(engine, "SELECT count(*) FROM engagement_message_queue").scalar_one()


@contextmanager
def role_with_column_grants(engine):
    """Make a role that may do what queueing needs, and yield its name."""
    name = f"guest_{os.getpid()}"
    execute(engine, GRANTS.format(database=engine.url.database, role=name))
    yield name
    execute(
        engine, f"DROP OWNED BY {name}; DROP ROLE {name}; GRANT TEMPORARY ON DATABASE {engine.url.database} TO PUBLIC"
    )


@SIZES
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_no_grant_more_than_for_one_message(empty_engine, size, kind):
    """A role with column grants, and without TEMPORARY on the database, queues any number."""
    migrations.upgrade(empty_engine)

    async def queue_async(role):
        engine = create_async_engine(empty_engine.url, poolclass=NullPool)
        async with AsyncSession(engine) as session, session.begin():
            await session.execute(text(f"SET LOCAL ROLE {role}"))
            return await AsyncEngagementMessageRepository(session).queue_messages(messages(size))

    with role_with_column_grants(empty_engine) as role:
        if kind == "async":
            queued = asyncio.run(queue_async(role))
        else:
            with Session(empty_engine) as session, session.begin():
                session.execute(text(f"SET LOCAL ROLE {role}"))
                queued = EngagementMessageRepository(session).queue_messages(messages(size))

    assert queued == QueuedMany(size, 0)
    assert stored(empty_engine) == size


@pytest.fixture(scope="module", name="two_phase_engine")
def _two_phase_engine():
    with temporary_postgres(settings={"max_prepared_transactions": "10"}) as server:
        engine = create_engine(server.url, poolclass=NullPool)
        migrations.upgrade(engine)
        yield engine


@pytest.mark.direct("a prepared transaction is the server's own")
@SIZES
@pytest.mark.parametrize("ends", ["commit", "rollback"])
def test_a_two_phase_commit_takes_any_size(two_phase_engine, size, ends):
    """The host's transaction is prepared, and then committed or rolled back, with all of the batch in it."""
    execute(two_phase_engine, "TRUNCATE engagement_message_queue")
    with Session(two_phase_engine, twophase=True) as session:
        queued = EngagementMessageRepository(session).queue_messages(messages(size))
        session.prepare()
        assert stored(two_phase_engine) == 0
        getattr(session, ends)()

    assert queued == QueuedMany(size, 0)
    assert stored(two_phase_engine) == (size if ends == "commit" else 0)


@SIZES
def test_autocommit_stores_any_size(engine, size):
    """Where each statement is a transaction of its own, all are stored, and the answer counts them."""
    with Session(engine.execution_options(isolation_level="AUTOCOMMIT")) as session:
        first = EngagementMessageRepository(session).queue_messages(messages(size))
        again = EngagementMessageRepository(session).queue_messages(messages(size + 2))

    assert (first, again) == (QueuedMany(size, 0), QueuedMany(2, size))
    assert stored(engine) == size + 2


def test_autocommit_stores_nothing_of_a_batch_whose_iterable_raises(engine):
    """All messages are known before the first is stored: bad input stores nothing there either."""
    with Session(engine.execution_options(isolation_level="AUTOCOMMIT")) as session, pytest.raises(ZeroDivisionError):
        EngagementMessageRepository(session).queue_messages(
            new_message(idempotency_key=f"{1 / (12 - number)}") for number in range(20)
        )

    assert stored(engine) == 0


def test_keys_are_taken_in_the_databases_order(engine):
    """The order in which a batch is sorted here is the order of the database, also beyond ASCII.

    One batch of many pieces and one of a single piece, with the same keys: both wait for a key in the middle, and were
    their orders different, each would by then hold what the other one needs next.
    """
    texts = ["Z", "a", "é", "\uffee", "\U0001d4b6", "ж", "~", "0", "Ω", "z"]
    given = [new_message(idempotency_key=key) for key in texts]

    def queue_all(batch):
        with Session(engine) as session, session.begin():
            return EngagementMessageRepository(session).queue_messages(batch)

    with Session(engine) as session:
        EngagementMessageRepository(session).queue_message(new_message(idempotency_key="é"))
        many = in_thread(queue_all, given)
        wait_until_blocked(engine, 1)
        few = in_thread(queue_all, [message for message in given[::-1] if message.key in "Zé\uffee\U0001d4b6"])
        wait_until_blocked(engine, 2)
        session.rollback()
        answers = many.result(PATIENCE), few.result(PATIENCE)

    in_order = execute(engine, "SELECT idempotency_key FROM engagement_message_queue ORDER BY id").scalars().all()
    assert answers == (QueuedMany(10, 0), QueuedMany(0, 4))
    assert in_order == sorted(texts)


def test_a_key_of_the_hosts_constraint_is_an_error_of_any_piece(empty_engine):
    """An error in a later piece passes through, and the caller's rollback takes the earlier ones too."""
    migrations.upgrade(empty_engine)
    execute(
        empty_engine,
        "ALTER TABLE engagement_message_queue ADD CONSTRAINT not_this CHECK (idempotency_key <> 'k000011')",
    )
    with Session(empty_engine) as session, pytest.raises(IntegrityError, match="not_this"), session.begin():
        EngagementMessageRepository(session).queue_messages(messages(20))

    assert stored(empty_engine) == 0


def test_without_room_for_a_temporary_file_nothing_is_touched(engine):
    """A batch that has no place to be sorted says so in one line, before the database is asked for anything."""
    program = f"""
        import resource, signal
        from conftest import new_message
        from sqlalchemy import create_engine
        from sqlalchemy.orm import Session
        from engagement import EngagementMessageRepository

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        with Session(create_engine({engine.url.render_as_string(hide_password=False)!r})) as session:
            many = (new_message(str(n), message_params={{"text": "x" * 999}}) for n in range(20_000))
            try:
                EngagementMessageRepository(session).queue_messages(many)
            except OSError as error:
                print(error, session.in_transaction())
    """
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )

    assert ran.stdout.startswith("cannot sort in a temporary file, whose directory TMPDIR names: "), ran.stderr
    assert ran.stdout.endswith("False\n")
    assert stored(engine) == 0


@pytest.mark.direct("nothing is prepared there")
def test_a_batch_is_planned_for_the_table_as_it_is(engine):
    """A plan that was made for an empty table is not kept for one that has grown: no repeat reads the whole table."""
    with engine.connect() as connection, Session(connection) as session:
        for _ in range(30):
            EngagementMessageRepository(session).queue_messages(messages(12))
        plans = "SELECT generic_plans, custom_plans FROM pg_prepared_statements WHERE statement ~ 'generate_series'"
        generic, custom = connection.execute(text(plans)).one()

    assert (generic, custom > 50) == (0, True)
