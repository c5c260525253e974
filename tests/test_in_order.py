"""One send at a time to a destination, the oldest first, whichever workers send (`in_order`)."""

import os
import signal
import threading
from collections import Counter
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from multiprocessing import get_context
from queue import SimpleQueue

import pytest
from chaos.ledger import AppendOnlyFile
from conftest import PATIENCE, execute, in_thread, new_message, queue, row, until
from sqlalchemy import create_engine, event, text
from sqlalchemy.orm import Session

from engagement import EngagementMessageRepository, Worker, migrations, process_message_queue
from engagement._claim import START
from engagement._delivery import cursor, one_by_one
from engagement._delivery import database as at_once
from engagement._delivery.database import Holder

LEASE = timedelta(minutes=5)
PAST = datetime(2026, 1, 1, tzinfo=UTC)
LOCKED_TABLES = """
SELECT classid::regclass::text FROM pg_locks
WHERE locktype = 'advisory' AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
"""
SETTLE = """
UPDATE engagement_message_queue SET status = 'sent', sent_at = now(), lease_expires_at = NULL WHERE id = :id
"""


def aged(*ages: int, user: str = "ana", **fields):
    """Return messages to one destination that have been due for so many minutes."""
    return [
        new_message(user, idempotency_key=f"{user}{age}", scheduled_for=PAST - timedelta(minutes=age), **fields)
        for age in ages
    ]


def claim(connection, *, how=at_once, limit=9, lease=LEASE, in_order=True, many=False, name="by hand"):
    """Claim as a worker does, and return the ids."""
    claimed = how.claim(
        connection,
        Holder(name, lease),
        limit=limit,
        after=START,
        busy=[],
        broken=set(),
        one_per_destination=not many,
        in_order=in_order,
    )
    return [each.message.id for each in claimed.claims]


def sending(engine) -> list[int]:
    return [*execute(engine, "SELECT id FROM engagement_message_queue WHERE status = 'sending' ORDER BY id").scalars()]


NO_OLDER_ONE = """
UPDATE engagement_message_queue SET status = 'sending', lease_expires_at = now() + interval '1 hour'
WHERE id = ANY (ARRAY(
    SELECT id FROM engagement_message_queue AS mine
    WHERE status = 'pending' AND next_attempt_at <= now() AND NOT EXISTS (
        SELECT FROM engagement_message_queue AS other WHERE other.destination_jid = mine.destination_jid
        AND (other.status = 'sending' OR (other.status = 'pending'
            AND (other.next_attempt_at, other.id) < (mine.next_attempt_at, mine.id)))
    ) FOR UPDATE SKIP LOCKED
)) RETURNING id
"""


def test_a_condition_alone_loses_a_race(engine):
    """Two claims that do not see each other's commit: the first does not see the older message, the second sees it."""
    (younger,) = queue(engine, *aged(1))
    with engine.connect() as first, engine.connect() as second:
        assert [*first.execute(text(NO_OLDER_ONE)).scalars()] == [younger]
        (older,) = queue(engine, *aged(2))
        assert [*second.execute(text(NO_OLDER_ONE)).scalars()] == [older]
        first.commit()
        second.commit()

    assert sending(engine) == [younger, older]  # Two sends to one destination, at once and in the wrong order.


@pytest.mark.parametrize("how", [at_once, one_by_one])
def test_a_claim_that_is_not_committed_yet_holds_its_destination(engine, how):
    """The same race: nobody waits, the other destinations are claimed for, and the older message comes next."""
    (younger,) = queue(engine, *aged(1))
    with engine.connect() as first, engine.connect() as second:
        assert claim(first, how=how) == [younger]
        (older,) = queue(engine, *aged(2))
        (other,) = queue(engine, *aged(0, user="bia"))
        assert claim(second, how=how) == [other]
        first.commit()
        second.commit()
        assert claim(second, how=how) == []
        second.commit()
        execute(engine, SETTLE, id=younger)
        assert claim(second, how=how) == [older]


LOOK = "pg_try_advisory_xact_lock"


@contextmanager
def looks(connection):
    """Yield the moments at which somebody looked for a free destination."""
    moments = []

    def note(_connection, _cursor, statement, *_):
        if LOOK in statement:
            moments.append(datetime.now(UTC))

    event.listen(connection, "before_cursor_execute", note)
    yield moments
    event.remove(connection, "before_cursor_execute", note)


@contextmanager
def first_look_with_an_old_snapshot(connection, meanwhile):
    """Let the statement that takes the locks have its snapshot, then do something, then let it go on."""
    left = [meanwhile]

    def hold(_connection, cursor_, statement, parameters, *_):
        if LOOK not in statement or not left:
            return statement, parameters
        cursor_.execute(f"DECLARE looking NO SCROLL CURSOR FOR {statement}", parameters)
        left.pop()()
        return "FETCH ALL FROM looking", {}

    event.listen(connection, "before_cursor_execute", hold, retval=True)
    yield
    event.remove(connection, "before_cursor_execute", hold)
    assert not left


@pytest.mark.parametrize("how", [at_once, one_by_one])
def test_a_claim_that_is_committed_before_the_lock_was_free_is_seen(engine, how):
    """The lock is taken by a statement with an old snapshot; the claim's own is younger than the lock."""
    first, second = queue(engine, *aged(2, 1))

    def another_claims():
        with engine.begin() as another:
            assert claim(another, limit=1) == [first]

    with engine.connect() as connection:
        with first_look_with_an_old_snapshot(connection, another_claims):
            assert claim(connection, how=how) == []
        connection.commit()

    assert sending(engine) == [first]
    assert row(engine, second).status == "pending"


def test_an_older_message_that_is_committed_meanwhile_goes_first(engine):
    """The claim decides by its own snapshot which message is the oldest."""
    queue(engine, *aged(1))
    older = []

    def an_older_one_comes():
        older.extend(queue(engine, *aged(2)))

    with engine.connect() as connection, first_look_with_an_old_snapshot(connection, an_older_one_comes):
        assert claim(connection) == older


def test_a_claim_reads_no_further_than_it_has_looked(engine):
    """Else one that came too late would search all that is due for more to destinations that were taken."""
    ids = queue(engine, *aged(3, 2))

    def a_younger_one_comes():
        queue(engine, *aged(1))

    with engine.connect() as connection, first_look_with_an_old_snapshot(connection, a_younger_one_comes):
        assert claim(connection, many=True) == ids


def test_a_claim_that_comes_too_late_for_one_goes_on_to_the_next(engine):
    """Or a cron job would end, since nothing seems to be due."""
    first, _, other = queue(engine, *aged(3, 2), *aged(1, user="bia"))

    def another_claims():
        with engine.begin() as another:
            assert claim(another, limit=1) == [first]

    with engine.connect() as connection, first_look_with_an_old_snapshot(connection, another_claims):
        assert claim(connection, limit=1) == [other]


def test_what_the_host_has_locked_is_in_no_other_destinations_way(engine):
    """A long transaction delays the destinations that it touches, and the claim does not try each of them in vain."""
    queue(engine, *(message for n in range(20) for message in aged(9, user=f"u{n}")))
    (other,) = queue(engine, *aged(1))
    with engine.begin() as host, engine.connect() as connection:
        host.execute(text("SELECT FROM engagement_message_queue WHERE id <> :id FOR UPDATE"), {"id": other})
        with looks(connection) as seen:
            assert claim(connection, limit=1) == [other]

    assert len(seen) == 1


def test_many_messages_for_one_do_not_starve_the_others(engine):
    """A worker with one place finds the destination that is free behind a thousand messages to a busy one."""
    queue(engine, *aged(*range(1000, 0, -1)))
    (other,) = queue(engine, *aged(0, user="bia"))
    with engine.connect() as connection:
        assert claim(connection, limit=1, lease=timedelta(hours=1)) != [other]
        connection.commit()
        assert claim(connection, limit=1) == [other]


def test_a_lease_holds_its_destination_until_it_runs_out(engine):
    """What a lost worker had in hand delays its destination for a lease at most, also if nobody recovers it."""
    first, second, third = queue(engine, *aged(3, 2, 1))
    with engine.connect() as connection:
        assert claim(connection) == [first]
        connection.commit()
        assert claim(connection) == []
        execute(engine, "UPDATE engagement_message_queue SET lease_expires_at = now() WHERE id = :id", id=first)
        assert claim(connection) == [second]
        connection.commit()
        assert claim(connection) == []
    assert row(engine, third).status == "pending"


def test_a_message_that_was_forgotten_while_it_was_sent_holds_nothing(engine):
    """It has no destination any more; a NULL among those that are busy would be equal to all of them."""
    queue(engine, *aged(2))
    with engine.begin() as connection:
        assert len(claim(connection)) == 1
    with Session(engine) as session, session.begin():
        EngagementMessageRepository(session).forget_user("ana")
    again, other = queue(engine, *aged(1), *aged(1, user="bia"))

    with engine.connect() as connection:
        assert claim(connection) == [again, other]


def test_a_batch_may_have_several_for_one_destination_in_order(engine):
    """A transport with `send_many` sends them in its own order; no other worker has one of them."""
    ids = queue(engine, *aged(9, 8, 7), *aged(6, user="bia"))
    (late,) = queue(engine, *aged(1))
    with engine.connect() as first, engine.connect() as second:
        assert claim(first, many=True, limit=4) == ids
        assert claim(second, many=True, limit=4) == []
        first.commit()
        second.rollback()
        assert claim(second, many=True, limit=4) == []
    assert row(engine, late).status == "pending"


def test_two_queues_of_a_database_do_not_meet(empty_engine):
    """A destination that one of them claims for is free in the other, and the lock is named after the table."""
    engines = []
    for schema in ("one", "two"):
        migrations.upgrade(empty_engine, schema=schema)
        engines.append(empty_engine.execution_options(schema_translate_map={None: schema}))
        with Session(engines[-1]) as session, session.begin():
            EngagementMessageRepository(session).queue_message(new_message())
    with engines[0].connect() as first, engines[1].connect() as second:
        assert len(claim(first)) == len(claim(second)) == 1
        tables = sorted(first.execute(text(LOCKED_TABLES)).scalars())

    assert tables == [f"{schema}.engagement_message_queue" for schema in ("one", "two")]


def test_no_lock_is_held_during_a_send(engine):
    """Claims end with their transactions, which a pooler may give to others."""
    queue(engine, *aged(2, 1))
    locks = []

    def send(_message):
        locks.extend(execute(engine, LOCKED_TABLES).scalars())

    assert process_message_queue(engine, send, in_order=True).succeeded == 2
    assert locks == []


def test_the_servers_table_of_locks_has_room(engine):
    """However many destinations a claim has: all locks of a queue together are a sixth of it."""
    queue(engine, *(new_message(f"u{n}") for n in range(3000)))
    with engine.connect() as connection:
        assert len(claim(connection, limit=3000)) == 3000
        locks = len(connection.execute(text(LOCKED_TABLES)).all())

    assert 900 < locks <= 1024


@contextmanager
def working(engine, send, **options):
    """Run a worker in a thread."""
    stop = threading.Event()
    worker = Worker(engine, send, in_order=True, **{"poll_interval": timedelta(seconds=0.02)} | options)
    run = in_thread(worker.run, stop)
    try:
        yield
    finally:
        stop.set()
        run.result(PATIENCE)


def test_a_message_that_was_passed_over_goes_before_younger_ones(engine, monkeypatch):
    """It lies behind what its worker has claimed since, and comes first all the same once its destination is free."""
    monkeypatch.setattr(cursor, "RESTART_SECONDS", 3600)
    first, second = queue(engine, *aged(9, 8))
    sent = SimpleQueue()
    with engine.begin() as connection:
        assert claim(connection, limit=1) == [first]
    with working(engine, lambda message: sent.put(message.id)):
        (other,) = queue(engine, *aged(7, user="bia"))
        assert sent.get(timeout=PATIENCE) == other
        with engine.begin() as host:  # The younger one is queued in the very moment in which the destination is free.
            with Session(host) as session:
                EngagementMessageRepository(session).queue_messages(aged(1))
            host.execute(text(SETTLE), {"id": first})
        assert sent.get(timeout=PATIENCE) == second
        assert sent.get(timeout=PATIENCE) > other


def test_a_worker_whose_messages_are_all_busy_elsewhere_does_not_spin(engine):
    """It looks again after 10 ms, then 20, up to the poll interval."""
    queue(engine, *aged(2, 1))
    with engine.begin() as connection:
        assert len(claim(connection)) == 1
    with looks(engine) as moments, working(engine, lambda _: None, poll_interval=timedelta(hours=1)):
        until(lambda: len(moments) >= 7)

    assert moments[6] - moments[0] >= timedelta(seconds=0.01 * (1 + 2 + 4 + 8 + 16))


# Real processes -------------------------------------------------------------------------------------------------------

PEOPLE, EACH = 12, 10


def work_in_a_process(url: str, ledger: str, options: dict, all_are_ready) -> None:
    """Send into the ledger until nothing is left to send."""
    lines = AppendOnlyFile(ledger)
    engine = create_engine(url)

    def send(message):
        lines.add("begin", message.destination_jid, message.id, os.getpid())
        threading.Event().wait(None if message.message_params["hangs"] else 0.002 * (message.id % 3))
        lines.add("end", message.destination_jid, message.id, os.getpid())

    with engine.connect():
        all_are_ready.wait(PATIENCE)
    process_message_queue(engine, send, in_order=True, **options)


class Workers:
    """Processes that send into one ledger."""

    def __init__(self, engine, path, **options) -> None:
        self._arguments = (engine.url.render_as_string(hide_password=False), path, options)
        self._context = get_context("spawn")
        self.ledger = AppendOnlyFile(path)

    @contextmanager
    def at_work(self, count: int):
        """Start so many, and leave none behind."""
        arguments = (*self._arguments, self._context.Barrier(count))
        processes = [self._context.Process(target=work_in_a_process, args=arguments) for _ in range(count)]
        try:
            for process in processes:
                process.start()
            yield processes
            for process in processes:
                process.join(PATIENCE)
        finally:
            for process in processes:
                process.kill()
                process.join()

    def sends(self):
        """Return (what, destination, message, process) of each line."""
        return [(what, jid, int(id_), int(pid)) for what, jid, id_, pid in self.ledger.lines()]


def overlaps(sends, killed=()):
    """Return the sends that began while another one to their destination went on, and those that were out of order."""
    going_on, last, wrong = {}, {}, []
    for what, jid, message_id, pid in sends:
        if what == "end":
            del going_on[jid]
        elif (going_on.get(jid, (0, 0))[1] not in {0, *killed}) or message_id <= last.get(jid, 0):
            wrong.append((jid, message_id, going_on.get(jid)))
        if what == "begin":
            going_on[jid], last[jid] = (message_id, pid), message_id
    return wrong


def given_to_many(engine, hangs_at=None) -> list[int]:
    """Queue messages to many people by turns; a send of one of them may hang until its process is killed."""
    turns = [(person, turn) for turn in range(EACH) for person in range(PEOPLE)]
    return queue(
        engine,
        *(
            message
            for person, turn in turns
            for message in aged(99 - turn, user=f"p{person}", message_params={"hangs": hangs_at == (person, turn)})
        ),
    )


@pytest.mark.parametrize("concurrency", [1, 5])
def test_many_processes_send_in_order_one_at_a_time(engine, tmp_path, concurrency):
    """Each message once, in order, alone to its destination; and the processes share the work."""
    ids = given_to_many(engine)
    workers = Workers(engine, tmp_path / "ledger", concurrency=concurrency)
    with workers.at_work(3):
        pass

    sends = workers.sends()
    assert overlaps(sends) == []
    assert Counter(what for what, *_ in sends) == {"begin": len(ids), "end": len(ids)}
    assert len({pid for *_, pid in sends}) > 1
    # Some sends did go on at once, or this would prove nothing.
    assert any(before[0] == after[0] == "begin" for before, after in pairwise(sends))


def test_a_process_that_hangs_and_is_killed_delays_only_its_destination(engine, tmp_path):
    """The others get all of theirs meanwhile; its destination goes on in order once the lease has run out."""
    ids = given_to_many(engine, hangs_at=(0, 3))
    mine, hanging = ids[::PEOPLE], ids[3 * PEOPLE]
    # Long enough that a busy machine extends it in time: a lease that runs out is taken for a worker that was lost.
    workers = Workers(engine, tmp_path / "ledger", lease=timedelta(seconds=8))
    with workers.at_work(3):
        until(lambda: len(workers.sends()) == 2 * (len(ids) - len(mine)) + 2 * 3 + 1)
        (victim,) = {pid for what, _, message_id, pid in workers.sends() if (what, message_id) == ("begin", hanging)}
        until(lambda: sending(engine) == [hanging])
        os.kill(victim, signal.SIGKILL)
        lease = "SELECT lease_expires_at < now() FROM engagement_message_queue WHERE status = 'sending'"
        until(lambda: execute(engine, lease).scalar())
    with workers.at_work(2):
        pass

    sends = workers.sends()
    assert overlaps(sends, killed=[victim]) == []
    assert {message_id for _, _, message_id, _ in sends} == {*ids}
    counts = Counter(execute(engine, "SELECT status FROM engagement_message_queue").scalars())
    assert counts == {"sent": len(ids) - 1, "in_doubt": 1}
