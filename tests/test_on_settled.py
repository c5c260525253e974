"""`on_settled`: a host writes beside a settlement, in its transaction, and can neither lose nor delay it."""

import logging
import re
import threading
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
from conftest import execute, new_message, queue, row, until
from crashes.accidents import LATER, PATIENCE_SECONDS, Running, Transport, an_engine, lose
from goodbyes import Hook, _host, fail, hide, note_if_sent, noted, run_sql  # noqa: F401 - the fixture
from psycopg import generators
from sqlalchemy import Connection, event, text
from sqlalchemy.exc import StatementError
from sqlalchemy.orm import Session

from engagement import (
    EngagementMessageRepository,
    InDoubt,
    MessageStatus,
    NotSent,
    OutgoingMessage,
    Postpone,
    Refused,
    Sent,
    Withdraw,
    process_message_queue,
)
from engagement._delivery import run as runs
from engagement._delivery.presence import Presence
from engagement._sql import own_transactions
from engagement.models import LATEST

# It is the settlement's own transaction


@pytest.mark.parametrize(
    ("outcome", "status"),
    [
        (Sent("id"), "sent"),
        (NotSent("no"), "pending"),
        (Refused("no"), "failed"),
        (InDoubt("?"), "in_doubt"),
        (Postpone(LATEST, "later"), "pending"),
        (Withdraw("opted out"), "cancelled"),
    ],
)
def test_it_is_called_once_for_a_settlement_with_the_status_as_recorded(host, outcome, status):
    """The host hears each end, writes exactly if the message is sent, and one transaction does both."""
    (message_id,) = queue(host, new_message())
    hook = Hook()

    process_message_queue(host, lambda _: outcome, on_settled=hook, backoff=lambda _: LATER)

    assert hook.heard == [("user1", status)]
    assert isinstance(hook.heard[0][1], MessageStatus)
    assert row(host, message_id).status == status
    query = (
        "SELECT count(*) FROM goodbyes JOIN engagement_message_queue USING (user_id)"
        " WHERE engagement_message_queue.xmin::text::bigint = wrote::text::bigint & 4294967295"
    )
    assert len(noted(host)) == execute(host, query).scalar_one() == (status == "sent")


def test_it_is_told_the_last_status_of_a_message_that_is_settled_twice_at_once(host):
    """An answer comes just after its time-out, and both wait for the database: one call says that it was sent."""
    (message_id,) = queue(host, new_message())
    is_claimed, may_end = threading.Event(), threading.Event()

    def send(_):
        is_claimed.set()
        assert may_end.wait(PATIENCE_SECONDS)

    hook = Hook()
    given_up = runs.Dispatch.give_up

    def give_up(self, claim):
        given_up(self, claim)
        may_end.set()
        until(lambda: not self._sender.news.empty())  # Both verdicts are there when the database is asked.

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs.Dispatch, "give_up", give_up)
        process_message_queue(host, send, on_settled=hook, send_timeout=timedelta(milliseconds=50))

    assert (hook.heard, noted(host)) == ([("user1", "sent")], ["user1"])
    assert row(host, message_id).status == "sent"


def test_a_late_sent_is_told_after_the_doubt(host):
    """Each settlement has its call: the doubt by the time-out, and the answer that resolves it."""
    queue(host, new_message())
    may_end, hook = threading.Event(), Hook()

    with Running(
        host, lambda _: may_end.wait(PATIENCE_SECONDS) and None, on_settled=hook, send_timeout=timedelta(seconds=0.05)
    ):
        until(lambda: hook.heard == [("user1", "in_doubt")])
        assert noted(host) == []
        may_end.set()
        until(lambda: noted(host) == ["user1"])

    assert hook.heard == [("user1", "in_doubt"), ("user1", "sent")]


@pytest.mark.parametrize(("look_up", "status"), [(lambda _: Sent("found"), "sent"), (None, "in_doubt")])
def test_the_message_of_a_lost_worker_has_its_call(host, look_up, status):
    """A recovered message is settled like any other."""
    (message_id,) = queue(host, new_message())
    lose(host, message_id)
    hook = Hook()

    process_message_queue(host, Transport(look_up=look_up), on_settled=hook)

    assert hook.heard == [("user1", status)]
    assert noted(host) == ["user1"] * (status == "sent")


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ("scheduled_for = '2020-01-01', expires_at = '2020-01-02'", "expired"),
        ("has_doubt = true, attempt = 1", "in_doubt"),
    ],
)
def test_a_message_that_ends_instead_of_being_claimed_has_its_call(host, change, status):
    """Too late to be tried, or parked since an earlier attempt may have left: that is an end as well."""
    (message_id, other) = queue(host, new_message(), new_message("user2"))
    execute(host, f"UPDATE engagement_message_queue SET {change} WHERE id = {message_id}")
    hook = Hook()

    process_message_queue(host, lambda _: None, on_settled=hook)

    assert hook.heard == [("user1", status), ("user2", "sent")]
    assert (row(host, message_id).status, row(host, other).status) == (status, "sent")


def test_a_batch_has_a_call_for_each_message_in_the_order_of_users(host):
    """Two workers that write to the same users never wait for each other in a circle; one error harms one message."""
    ids = queue(host, *(new_message(f"user{number}") for number in (3, 1, 4, 2)))

    class Batches:
        def send_many(self, messages):
            return [Refused("no") if message.user_id == "user4" else Sent() for message in messages]

    def fail(*_):
        raise LookupError

    hook = Hook(fail, of="user2")
    process_message_queue(host, Batches(), on_settled=hook, concurrency=10)

    assert hook.heard == [("user1", "sent"), ("user2", "sent"), ("user3", "sent"), ("user4", "failed")]
    assert noted(host) == ["user1", "user3"]
    assert [row(host, message_id).status for message_id in ids] == ["sent", "sent", "failed", "sent"]


def test_it_is_called_message_by_message_too(host, caplog):
    """The data of one message break the batch: the others are settled one by one, each with its call."""
    ids = queue(host, *(new_message(f"user{number}") for number in (1, 2, 3)))
    execute(
        host,
        "CREATE FUNCTION no_user2() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " IF new.user_id = 'user2' AND new.status = 'sent' THEN RAISE EXCEPTION 'no'; END IF; RETURN new; END $$;"
        "CREATE TRIGGER t BEFORE UPDATE ON engagement_message_queue FOR EACH ROW EXECUTE FUNCTION no_user2()",
    )
    hook = Hook()
    try:
        process_message_queue(host, lambda _: None, on_settled=hook, concurrency=3)
    finally:
        execute(host, "DROP FUNCTION no_user2 CASCADE")

    assert f"engagement.message_broken message_id={ids[1]}" in caplog.text
    assert hook.heard == [("user1", "sent"), ("user3", "sent")]
    assert noted(host) == ["user1", "user3"]


# Its error is its own


def in_its_own_block(connection, *_):
    with connection:
        run_sql("SELECT 1", connection)


def later(*_):
    yield


def unawaited(*_):
    async def never():
        raise AssertionError

    return never()


FAILING = {
    "raises": (partial(fail, LookupError()), "LookupError"),
    "exits": (partial(fail, SystemExit()), "SystemExit"),
    "sql": (partial(run_sql, "INSERT INTO goodbyes VALUES ('user1')"), "IntegrityError 23505"),
    "sql without a table": (partial(run_sql, "SELECT FROM nowhere"), "ProgrammingError 42P01"),
    "hidden sql": (partial(hide, partial(run_sql, "SELECT 1 / 0")), "InFailedSqlTransaction"),
    "deferred": (partial(run_sql, "INSERT INTO letters VALUES ('nobody')"), "ForeignKeyViolation"),
    "deadlock": (
        partial(run_sql, "DO $$ BEGIN RAISE EXCEPTION USING ERRCODE = '40P01'; END $$"),
        "OperationalError 40P01",
    ),
    "serialization": (
        partial(run_sql, "DO $$ BEGIN RAISE EXCEPTION USING ERRCODE = '40001'; END $$"),
        "OperationalError 40001",
    ),
    "commits": (lambda connection, *_: connection.commit(), "LentOnly"),
    "commits and hides it": (partial(hide, lambda connection, *_: connection.commit()), "LentOnly"),
    "commits its transaction": (lambda connection, *_: connection.get_transaction().commit(), "LentOnly"),
    "closes": (lambda connection, *_: connection.close(), "LentOnly"),
    "closes by a block": (in_its_own_block, "LentOnly"),
    "ends": (lambda connection, *_: connection.invalidate(), "LentOnly"),
    "keeps": (lambda connection, *_: connection.detach(), "LentOnly"),
    "returns a generator": (later, "TypeError"),
    "returns a coroutine": (unawaited, "TypeError"),
}


@pytest.mark.parametrize(("besides", "error"), FAILING.values(), ids=FAILING)
def test_its_error_undoes_its_own_part_and_is_told(host, caplog, besides, error):
    """The message is settled all the same, the next call goes well, and nobody else meets the connection half done."""
    ids = queue(host, new_message("user1"), new_message("user2"), new_message("user3"))
    hook = Hook(besides, of="user2")

    result = process_message_queue(host, lambda _: None, on_settled=hook, concurrency=3)

    assert result.succeeded == 3
    assert [row(host, message_id).status for message_id in ids] == ["sent"] * 3
    assert hook.heard == [("user1", "sent"), ("user2", "sent"), ("user3", "sent")]
    assert noted(host) == ["user1", "user3"]
    assert f"engagement.on_settled_failed message_id={ids[1]} error={error}" in caplog.messages
    assert [record.levelno for record in caplog.records if "on_settled" in record.message] == [logging.ERROR]


def test_what_is_deferred_stays_deferred_for_the_next_call(host, caplog):
    """Each call may write a letter before the person whom it is for."""
    queue(host, new_message("user1"), new_message("user2"))

    def write(connection, message, _):
        connection.execute(text("INSERT INTO letters VALUES (:id)"), {"id": message.user_id})
        connection.execute(text("INSERT INTO people VALUES (:id)"), {"id": message.user_id})

    process_message_queue(host, lambda _: None, on_settled=write, concurrency=2)

    assert "on_settled" not in caplog.text
    assert execute(host, "SELECT count(*) FROM letters JOIN people ON id = user_id").scalar_one() == 2


def test_it_may_undo_its_own_part(host, caplog):
    """`rollback` is the way back to the beginning of the call, and a `Session` on it has savepoints of its own."""
    (message_id,) = queue(host, new_message())

    def change_of_mind(connection, message, _):
        connection.rollback()
        connection.begin()
        with Session(connection, join_transaction_mode="create_savepoint") as session:
            session.execute(text("INSERT INTO people VALUES ('ana')"))
            session.rollback()
            session.execute(text("INSERT INTO people VALUES ('bob')"))
            session.commit()

    process_message_queue(host, lambda _: None, on_settled=Hook(change_of_mind))

    assert "on_settled" not in caplog.text
    assert (row(host, message_id).status, noted(host)) == ("sent", [])
    assert execute(host, "SELECT string_agg(id, ' ') FROM people").scalar_one() == "bob"


def test_it_may_queue_the_next_message(host):
    """A follow-up exists if and only if the first message is recorded as sent."""
    queue(host, new_message())

    def follow(connection, message, _):
        if message.message_type == "goodbye":
            with Session(connection) as session:
                next_one = new_message("user2", message_type="follow_up")
                EngagementMessageRepository(session).queue_message(next_one)
                session.commit()

    result = process_message_queue(host, lambda _: None, on_settled=follow)

    assert result.succeeded == 2


def test_an_interrupt_is_nobodys_error(host):
    """Ctrl-C ends the run: nothing of that transaction happened, and its message is recovered like any other."""
    (message_id,) = queue(host, new_message())

    with pytest.raises(KeyboardInterrupt):
        process_message_queue(host, lambda _: None, on_settled=Hook(partial(fail, KeyboardInterrupt())))

    assert (row(host, message_id).status, noted(host)) == ("sending", [])


@pytest.mark.parametrize(
    "use",
    [partial(run_sql, "SELECT 1"), lambda connection: connection.rollback(), lambda connection: connection.commit()],
)
def test_the_connection_is_lent_for_the_call_only(host, caplog, use):
    """A host that keeps it has neither the next call in its reach, nor the worker's later transactions."""
    queue(host, *(new_message(f"user{number}") for number in range(4)))
    kept = []

    def use_the_last(connection, message, status):
        note_if_sent(connection, message, status)
        if kept:
            with pytest.raises((RuntimeError, StatementError), match="which is over"):
                use(kept.pop())
        kept.append(connection)

    class AtOnce:
        """All four are settled in one transaction: a rollback after the end of another one does nothing."""

        def send_many(self, messages):
            return [None] * len(messages)

    process_message_queue(host, AtOnce(), on_settled=use_the_last, concurrency=4)
    kept.pop().close()

    assert "on_settled" not in caplog.text
    assert len(noted(host)) == 4


# The host's tables and settings


@pytest.mark.direct("the pooler's connections to the server are its own")
@pytest.mark.parametrize("how", ["at connect", "later"])
def test_a_name_without_its_schema_is_found_on_the_hosts_path(host, how):
    """The worker searches pg_catalog alone. The host's path is back for the calls, whoever set it."""
    execute(host, "CREATE SCHEMA app; CREATE TABLE app.goodbyes (user_id text)")
    given = {"options": "-csearch_path=app,public"} if how == "at connect" else {}
    queue(host, new_message("user1"), new_message("user2"))
    with an_engine(host.url, connect_args=given) as other:
        if how == "later":

            @event.listens_for(other, "connect")
            def set_path(connection, _):
                connection.execute("SET search_path = app, public")
                connection.commit()

        process_message_queue(other, lambda _: None, on_settled=note_if_sent)
        with other.connect() as connection:
            assert connection.scalar(text("SHOW search_path")).replace(" ", "") == "app,public"

    assert noted(host) == []
    assert execute(host, "SELECT string_agg(user_id, ' ' ORDER BY user_id) FROM app.goodbyes").scalar() == "user1 user2"


def test_a_setting_that_it_leaves_behind_meets_no_statement_of_ours(host, caplog):
    """It ends with the transaction, and nothing of ours follows in it."""
    queue(host, *(new_message(f"user{number}") for number in range(6)))
    trap = "LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'sprung'; END $$"
    execute(host, f"CREATE SCHEMA app; CREATE FUNCTION app.now() RETURNS timestamptz {trap}")

    def leave(connection, *_):
        run_sql("SET LOCAL search_path = app, pg_catalog", connection)
        run_sql("SET LOCAL statement_timeout = 1", connection)
        run_sql("SET LOCAL datestyle = German", connection)

    result = process_message_queue(host, lambda _: None, on_settled=leave, concurrency=2)

    assert result.succeeded == 6
    assert "on_settled" not in caplog.text


def test_a_statement_that_waits_too_long_is_cancelled(host, caplog):
    """A lock of somebody else's holds up neither the worker nor the leases of its sends."""
    ids = queue(host, new_message("user1"), new_message("user2"))
    hook = Hook()
    with host.begin() as other:
        other.execute(text("INSERT INTO goodbyes VALUES ('user1')"))
        result = process_message_queue(host, lambda _: None, on_settled=hook, concurrency=2, lease=timedelta(seconds=3))
        assert result.succeeded == 2
        other.rollback()

    assert f"engagement.on_settled_failed message_id={ids[0]} error=OperationalError 57014" in caplog.messages
    assert noted(host) == ["user2"]


@pytest.mark.direct("the pooler's connections to the server are its own")
@pytest.mark.parametrize(("theirs", "most"), [("0", 10_000), ("50", 50), ("9h", 10_000)])
def test_a_stricter_time_out_of_the_host_holds(host, theirs, most):
    """All calls have a third of the lease, and a role that allows less is not overruled."""
    queue(host, new_message("user1"), new_message("user2"))
    seen = []

    def look(connection, *_):
        seen.append(connection.scalar(text("SELECT setting FROM pg_settings WHERE name = 'statement_timeout'")))

    with an_engine(host.url, connect_args={"options": f"-cstatement_timeout={theirs}"}) as other:
        process_message_queue(other, lambda _: None, on_settled=look, concurrency=2, lease=timedelta(seconds=30))

    assert len(seen) == 2
    assert all(0.5 * most < int(each) <= most for each in seen)


@pytest.mark.parametrize("where", ["the driver", "the engine"])
def test_an_engine_in_autocommit_has_a_transaction_for_it(host, caplog, where):
    """There is one for the settlement too, whatever the host has set for its own statements."""
    queue(host, new_message("user1"), new_message("user2"))
    hook = Hook(partial(fail, LookupError()), of="user2")
    with an_engine(host.url, **({"isolation_level": "AUTOCOMMIT"} if where == "the driver" else {})) as other:
        theirs = other if where == "the driver" else other.execution_options(isolation_level="AUTOCOMMIT")
        process_message_queue(theirs, lambda _: None, on_settled=hook, concurrency=2)

    assert [message for message in caplog.messages if "on_settled" in message] == [
        "engagement.on_settled_failed message_id=2 error=LookupError"
    ]
    assert noted(host) == ["user1"]


# Without it


def test_nothing_is_executed_for_a_hook_that_is_not_there(host, monkeypatch):
    """A run without one says to the server what it said before, in as few transactions."""
    said = []
    monkeypatch.setattr(Presence, "go_along", lambda *_: False)  # Its sign of life comes by the time.
    at_once = own_transactions.send_at_once
    monkeypatch.setattr(own_transactions, "send_at_once", lambda *given: said.append(given[1]) or at_once(*given))
    with an_engine(host.url) as other:
        event.listen(other, "before_cursor_execute", lambda *given: said.append(given[2]))
        event.listen(other, "savepoint", lambda *_: said.append("SAVEPOINT"))
        counts = []
        for hook in (None, note_if_sent):
            queue(host, *(new_message(f"user{number}-{hook is None}") for number in range(3)))
            said.clear()
            process_message_queue(other, lambda _: None, on_settled=hook)
            counts.append([sum(word in each for each in said) for word in ("BEGIN", "SAVEPOINT", "engagement.")])

    # To find nothing takes a transaction too, and two are for kept receipts, at the end. With a hook, a message has one
    # to be settled and one for the next claim.
    assert counts == [[6, 0, 0], [9, 3, 9]]


# The option


async def asynchronous(connection, message, status):
    note_if_sent(connection, message, status)


class Asynchronous:
    async def __call__(self, connection, message, status):
        """Be called."""


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (5, "must be a function, not int"),
        ("myapp:note", "must be a function, not str"),
        (lambda connection, message: None, "must take a connection, a message and a status"),
        (asynchronous, "must be a plain function, not async"),
        (partial(asynchronous), "must be a plain function, not async"),
        (Asynchronous(), "must be a plain function, not async"),
    ],
)
def test_what_cannot_be_called_is_refused_by_name(engine, given, problem):
    """Before anything is claimed."""
    queue(engine, new_message())
    with pytest.raises(ValueError, match=f"on_settled: {problem}"):
        process_message_queue(engine, lambda _: None, on_settled=given)
    assert row(engine, 1).attempt == 0


def test_the_example_of_the_page_does_what_it_says(host):
    """docs/settling.md has the few lines that a host adds."""
    page = Path(__file__).parent.parent / "docs" / "settling.md"
    (block,) = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    execute(host, "CREATE TABLE users (id text, goodbye_sent_at timestamptz); INSERT INTO users VALUES ('user1')")
    try:
        names = {"Connection": Connection, "OutgoingMessage": OutgoingMessage, "engine": host, "send": lambda _: None}
        exec(block, names)
        queue(host, new_message())
        process_message_queue(host, lambda _: None, on_settled=names["note"])
        assert execute(host, "SELECT goodbye_sent_at FROM users").scalar_one() is not None
    finally:
        execute(host, "DROP TABLE users")


def test_an_interrupt_after_a_call_is_told_as_itself(engine, caplog, monkeypatch):
    """The answer to the end of the savepoint is still to come: nothing more is asked on this connection."""
    queue(engine, new_message())

    def interrupted(_: object):
        monkeypatch.undo()
        raise KeyboardInterrupt

    def note(*_: object) -> None:
        monkeypatch.setattr(generators, "execute", interrupted)

    with caplog.at_level(logging.WARNING), pytest.raises(KeyboardInterrupt):
        process_message_queue(engine, lambda _: Sent(), on_settled=note)

    assert [record for record in caplog.records if record.name.startswith("sqlalchemy")] == []
