"""One message whose data break a statement: it is told, and no other message is lost, in doubt, or held up."""

import threading
from contextlib import contextmanager
from datetime import timedelta

import pytest
from conftest import PATIENCE, execute, in_thread, new_message, queue, row, until
from sqlalchemy import create_engine, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.pool import NullPool

from engagement import InDoubt, NotSent, Refused, Sent, Worker, migrations, process_message_queue
from engagement._delivery import transaction

LATER = timedelta(hours=1)


@pytest.fixture(name="unguarded")
def _unguarded(empty_engine):
    """An engine on a table without constraints, as somebody may have left it who was in a hurry."""
    migrations.upgrade(empty_engine)
    execute(
        empty_engine,
        "DO $$ DECLARE name text; BEGIN FOR name IN SELECT conname FROM pg_constraint"
        " WHERE conrelid = 'engagement_message_queue'::regclass AND contype = 'c' LOOP"
        " EXECUTE format('ALTER TABLE engagement_message_queue DROP CONSTRAINT %I', name); END LOOP; END $$",
    )
    return empty_engine


BROKEN = {
    "no attempt more": "attempt = 2147483647",
    "no status": "attempt = 2147483647, expires_at = now(), has_doubt = true, history = '{}'",
    "no such destination": "destination = 'both'",
    "no moment": "scheduled_for = '-infinity'",
    "no year": "scheduled_for = '12000-01-01'",
}


@pytest.mark.parametrize("concurrency", [1, 4])
@pytest.mark.parametrize("change", BROKEN.values(), ids=BROKEN)
def test_what_cannot_be_claimed_holds_up_no_other(unguarded, caplog, change, concurrency):
    """It comes first, and is told; all behind it are sent."""
    broken, *others = queue(unguarded, *(new_message(f"user{number}") for number in range(5)))
    execute(unguarded, f"UPDATE engagement_message_queue SET {change} WHERE id = {broken}")
    before = row(unguarded, broken) if "scheduled" not in change else None

    result = process_message_queue(unguarded, lambda _: None, concurrency=concurrency)

    assert result.succeeded == 4
    assert f"engagement.message_broken message_id={broken}" in caplog.text
    assert before is None or row(unguarded, broken) == before
    assert {row(unguarded, message_id).status for message_id in others} == {"sent"}


TRIGGERS = {
    "many": "SELECT (SELECT 1 FROM generate_series(1, 2)) INTO one",  # 21000
    "no case": "CASE 1 WHEN 2 THEN one := 1; END CASE",  # 20000
    "own words": "RAISE EXCEPTION USING ERRCODE = '38001', MESSAGE = 'no'",
}


@pytest.mark.parametrize("does", TRIGGERS.values(), ids=TRIGGERS)
@pytest.mark.parametrize("status", ["sending", "sent"])
def test_a_trigger_that_fails_for_one_message_harms_no_other(engine, caplog, does, status):
    """Whatever it does wrong, when the message is claimed or when it is settled."""
    bad, *others = queue(engine, *(new_message(f"user{number}") for number in range(4)))
    with _triggered(engine, f"IF NEW.id = {bad} AND NEW.status = '{status}' THEN {does}; END IF; RETURN NEW"):
        process_message_queue(engine, lambda _: None, concurrency=4)

    assert {row(engine, message_id).status for message_id in others} == {"sent"}
    assert f"engagement.message_broken message_id={bad}" in caplog.text


def test_a_trigger_that_lets_nothing_be_done_stops_no_round(engine, caplog):
    """A claim that changes no row is not tried again and again beside one that fails."""
    void, bad, other = queue(engine, *(new_message(f"user{number}") for number in range(3)))
    does = (
        f"IF NEW.id = {void} THEN RETURN NULL; END IF; IF NEW.id = {bad} THEN RAISE EXCEPTION 'no'; END IF; RETURN NEW"
    )
    with _triggered(engine, does):
        in_thread(process_message_queue, engine, lambda _: None, concurrency=3).result(PATIENCE)

    assert (row(engine, void).status, row(engine, other).status) == ("pending", "sent")


@contextmanager
def _triggered(engine, does):
    execute(
        engine,
        "CREATE FUNCTION public.hosts_own() RETURNS trigger LANGUAGE plpgsql AS $$ DECLARE one int; BEGIN "
        f"{does}; END $$; CREATE TRIGGER hosts_own BEFORE UPDATE ON engagement_message_queue FOR EACH ROW "
        "EXECUTE FUNCTION public.hosts_own()",
    )
    try:
        yield
    finally:
        execute(engine, "DROP FUNCTION public.hosts_own() CASCADE")


@pytest.mark.parametrize("concurrency", [1, 4])
def test_what_cannot_be_settled_loses_no_other_outcome(unguarded, caplog, concurrency):
    """Its history is none that an entry can be added to: it stays, and its lease runs out; the others are recorded."""
    ids = queue(unguarded, *(new_message(f"user{number}") for number in range(4)))
    outcomes = dict(zip(ids, [NotSent("busy"), Sent("wamid"), Refused("no such number"), InDoubt("?")], strict=True))
    execute(unguarded, f"UPDATE engagement_message_queue SET history = '7' WHERE id = {ids[0]}")

    process_message_queue(
        unguarded, lambda message: outcomes[message.id], concurrency=concurrency, backoff=lambda _: LATER
    )

    assert f"engagement.message_broken message_id={ids[0]}" in caplog.text
    assert [row(unguarded, message_id).status for message_id in ids] == ["sending", "sent", "failed", "in_doubt"]


@pytest.mark.parametrize(
    ("change", "status"), [("retry_count = 2147483647", "failed"), ("retry_count = 999999999", "failed")]
)
def test_a_count_that_is_full_is_counted_no_further(unguarded, change, status):
    """What was sent beside it is recorded, and so is what became of it."""
    full, other = queue(unguarded, new_message("a"), new_message("b"))
    execute(unguarded, f"UPDATE engagement_message_queue SET {change} WHERE id = {full}")

    process_message_queue(unguarded, lambda message: NotSent("busy") if message.id == full else None, concurrency=2)

    assert (row(unguarded, full).status, row(unguarded, full).retry_count) == (status, 1_000_000_000)
    assert row(unguarded, other).status == "sent"


@pytest.mark.parametrize("name", ["w/recovery/99999999999999", "w/recovery/999999", "x" * 5000])
def test_what_a_lost_worker_left_is_taken_over_whatever_its_name(unguarded, name):
    """A number that is none of ours stops no recovery."""
    ids = queue(unguarded, new_message("a"), new_message("b"))
    execute(
        unguarded,
        "UPDATE engagement_message_queue SET status = 'sending', attempt = 1, lease_expires_at = now(),"
        " claimed_by = CASE WHEN id = :id THEN :name ELSE 'w' END",
        id=ids[0],
        name=name,
    )

    process_message_queue(unguarded, lambda _: None)

    assert [row(unguarded, message_id).status for message_id in ids] == ["in_doubt", "in_doubt"]


def test_lost_workers_are_counted_no_further_than_the_table_allows(engine):
    """A message that has lost as many workers as a name can tell is recovered like another."""
    ids = queue(engine, new_message("a"))
    execute(
        engine,
        "UPDATE engagement_message_queue SET status = 'sending', attempt = 1, lease_expires_at = now(),"
        " claimed_by = 'w/recovery/999999'",
    )

    process_message_queue(engine, lambda _: None)

    assert [row(engine, message_id).status for message_id in ids] == ["in_doubt"]


def test_what_cannot_be_taken_over_holds_up_no_other(unguarded, caplog):
    """A lost message that Python cannot read is told; the next one is recovered."""
    broken, other = queue(unguarded, new_message("a"), new_message("b"))
    execute(
        unguarded,
        "UPDATE engagement_message_queue SET status = 'sending', attempt = 1, claimed_by = 'w',"
        " lease_expires_at = now() - id * interval '-1 s' - interval '1 h',"
        f" scheduled_for = CASE WHEN id = {broken} THEN '-infinity' ELSE scheduled_for END",
    )

    process_message_queue(unguarded, lambda _: None)

    assert f"engagement.message_broken message_id={broken}" in caplog.text
    assert row(unguarded, other).status == "in_doubt"


def test_what_cannot_be_extended_costs_no_other_its_lease(engine, caplog):
    """A trigger of the host's refuses one message: the others in hand are extended, and all are sent once."""
    ids = queue(engine, *(new_message(f"user{number}") for number in range(3)))
    refuse(engine, f"new.id = {ids[1]} AND new.status = 'sending' AND old.status = 'sending'")
    sends, is_extended = [], threading.Event()

    def send(message):
        sends.append(message.id)
        if message.id == ids[0]:
            lease = row(engine, ids[0]).lease_expires_at
            until(lambda: row(engine, ids[0]).lease_expires_at != lease)
            is_extended.set()
        assert is_extended.wait(PATIENCE)

    try:
        process_message_queue(engine, send, concurrency=3, lease=timedelta(seconds=3))
    finally:
        execute(engine, "DROP TRIGGER refuses ON engagement_message_queue")
        execute(engine, "DROP FUNCTION refuses()")

    assert sorted(sends) == ids
    assert f"engagement.message_broken message_id={ids[1]}" in caplog.text
    assert {row(engine, message_id).status for message_id in ids} == {"sent"}


def refuse(engine, condition) -> None:
    execute(
        engine,
        "CREATE FUNCTION refuses() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN RAISE 'not this one'; END$$",
    )
    execute(
        engine,
        "CREATE TRIGGER refuses BEFORE UPDATE ON engagement_message_queue"
        f" FOR EACH ROW WHEN ({condition}) EXECUTE FUNCTION refuses()",
    )


def test_what_is_wrong_with_all_is_raised(engine):
    """A trigger that refuses every message speaks of none of them."""
    queue(engine, *(new_message(f"user{number}") for number in range(150)))
    refuse(engine, "new.status = 'sending'")
    try:
        with pytest.raises(DBAPIError, match="not this one"):
            process_message_queue(engine, lambda _: None, concurrency=10)
    finally:
        execute(engine, "DROP TRIGGER refuses ON engagement_message_queue")
        execute(engine, "DROP FUNCTION refuses()")


def test_a_message_that_was_mended_is_sent(unguarded, monkeypatch, caplog):
    """A running worker comes back to what it could not claim."""
    monkeypatch.setattr(transaction, "MEND_SECONDS", 0.2)
    (broken,) = queue(unguarded, new_message())
    execute(unguarded, "UPDATE engagement_message_queue SET attempt = 2147483647")
    stop = threading.Event()
    run = in_thread(Worker(unguarded, lambda _: None, poll_interval=timedelta(milliseconds=50)).run, stop)

    until(lambda: f"engagement.message_broken message_id={broken}" in caplog.text)
    execute(unguarded, "UPDATE engagement_message_queue SET attempt = 0")
    until(lambda: row(unguarded, broken).status == "sent")
    stop.set()

    assert run.result(PATIENCE).succeeded == 1


@pytest.mark.parametrize(
    "change", ["attempt = 2147483647", "retry_count = 2147483647", "claimed_by = 'w/recovery/99999999999999'"]
)
def test_the_table_refuses_what_nobody_can_reckon_with(engine, change):
    """The bounds are constraints."""
    queue(engine, new_message())

    with pytest.raises(IntegrityError):
        execute(engine, f"UPDATE engagement_message_queue SET {change}")


@pytest.fixture(name="latin1")
def _latin1(shared_engine):
    yield from database_in(shared_engine, "LATIN1")


def database_in(shared_engine, encoding):
    name = f"engagement_{encoding.lower()}"
    server = create_engine(shared_engine.url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    with server.connect() as connection:
        connection.execute(text(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)"))
        connection.execute(
            text(f"CREATE DATABASE {name} TEMPLATE template0 ENCODING '{encoding}' LC_COLLATE 'C' LC_CTYPE 'C'")
        )
    engine = create_engine(shared_engine.url.set(database=name))
    migrations.upgrade(engine)
    yield engine
    engine.dispose()
    with server.connect() as connection:
        connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))


@pytest.mark.parametrize("concurrency", [1, 4])
@pytest.mark.parametrize("client", ["latin1", "utf8"])
def test_a_reason_that_the_encoding_lacks_loses_nothing(latin1, concurrency, client):
    """The driver cannot write it, or the server not store it: it is written in ASCII, and the others are recorded."""
    engine = create_engine(latin1.url, connect_args={"client_encoding": client})
    ids = queue(engine, *(new_message(f"user{number}") for number in range(4)))

    def send(message):
        if message.id == ids[1]:
            raise RuntimeError("5 → 6")
        return Sent("wamid→") if message.id == ids[2] else Sent("wamid.é")

    result = process_message_queue(engine, send, concurrency=concurrency, backoff=lambda _: LATER)

    found = [row(engine, message_id) for message_id in ids]
    engine.dispose()
    assert (result.succeeded, result.retried) == (3, 1)
    assert [each.status for each in found] == ["sent", "pending", "sent", "sent"]
    assert found[1].error_message == "RuntimeError: 5 \\u2192 6"
    assert [each.provider_message_id for each in found] == ["wamid.é", None, "wamid\\u2192", "wamid.é"]


@pytest.mark.parametrize("client", ["latin1", "utf8"])
def test_a_worker_may_have_any_name(latin1, client):
    """What the encoding lacks of it is written in ASCII."""
    engine = create_engine(latin1.url, connect_args={"client_encoding": client})
    (message_id,) = queue(engine, new_message())

    assert process_message_queue(engine, lambda _: None, worker_name="→").succeeded == 1
    assert row(engine, message_id).claimed_by.startswith("\\u2192#")
    engine.dispose()
