"""Pauses: what is paused is claimed by nobody until that is lifted, and whoever looks is told."""

import asyncio
import logging
import subprocess
import sys
import threading
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

import pytest
from conftest import execute, in_thread, new_message, queue, row, until
from sqlalchemy import event, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from engagement import (
    AsyncPauses,
    EngagementMessageRepository,
    InvalidMessage,
    Pauses,
    PauseScope,
    Sent,
    Worker,
    migrations,
    process_message_queue,
    verify,
)
from engagement._claim import START
from engagement._delivery import database as claims
from engagement._delivery.taking import ALL_TYPES

LATER = datetime(2100, 1, 1, tzinfo=UTC)
WORKER = """
import sys
from sqlalchemy import create_engine
from engagement import Worker
Worker(create_engine(sys.argv[1]), lambda message: None, worker_name=sys.argv[2], sender=sys.argv[3]).run()
"""
LOG_OF_CLAIMS = """
CREATE TABLE claims (message_id bigint, message_type text, worker text, at timestamptz);
CREATE FUNCTION note_claim() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    INSERT INTO public.claims VALUES (NEW.id, NEW.message_type, NEW.claimed_by, statement_timestamp());
    RETURN NEW; END $$;
CREATE TRIGGER note_claim BEFORE UPDATE ON engagement_message_queue FOR EACH ROW
    WHEN (OLD.status = 'pending' AND NEW.status = 'sending') EXECUTE FUNCTION note_claim();
"""


def pause(engine, reason: str = "wrong wording", **scope):
    with Session(engine) as session, session.begin():
        return Pauses(session).pause(reason, **scope)


def resume(engine, **scope) -> bool:
    with Session(engine) as session, session.begin():
        return Pauses(session).resume(**scope)


def in_force(engine) -> list:
    with Session(engine) as session:
        return Pauses(session).in_force()


def sent_by(engine, **options) -> list[str]:
    """Return the types that a cron job's run sends, in order."""
    sent = []
    process_message_queue(engine, lambda message: sent.append(message.message_type), **options)
    return sent


@contextmanager
def working(engine, **options):
    """Run a worker in a thread; hands out the types that it has sent."""
    sent, stop = [], threading.Event()
    options = {"poll_interval": timedelta(milliseconds=200)} | options
    worker = Worker(engine, lambda message: sent.append(message.message_type), **options)
    running = in_thread(worker.run, stop)
    try:
        yield sent
    finally:
        stop.set()
        running.result(60)


# What a pause holds back


def test_a_pause_holds_back_its_scope_and_nothing_else(engine):
    """A type, whoever would send it; a sender, whatever it would send; everything."""
    queue(engine, *(new_message(str(n), message_type=of) for n, of in enumerate(["campaign", "otp"])))
    pause(engine, message_type="campaign")
    assert sent_by(engine, sender="main") == ["otp"]

    queue(engine, new_message("2", message_type="otp"))
    pause(engine, sender="main")
    assert sent_by(engine, sender="main") == []
    assert sent_by(engine, sender="other") == ["otp"]

    queue(engine, new_message("3", message_type="otp"))
    pause(engine)
    assert sent_by(engine, sender="other") == sent_by(engine) == []

    assert (resume(engine), resume(engine)) == (True, False)
    assert sent_by(engine) == ["otp"]
    assert resume(engine, message_type="campaign")
    assert sent_by(engine) == ["campaign"]


def test_no_claim_after_the_commit_takes_what_is_paused(engine):
    """Two worker processes at full speed: each claim that began after the pause's commit left that type alone."""
    types = ["campaign"] * 4_000 + ["otp"] * 4_000
    with Session(engine) as session, session.begin():
        messages = (new_message(f"user{n}", message_type=of, scheduled_for=LATER) for n, of in enumerate(types))
        EngagementMessageRepository(session).queue_messages(messages)
    execute(engine, "UPDATE engagement_message_queue SET next_attempt_at = now() - random() * interval '1 hour'")
    execute(engine, LOG_OF_CLAIMS)
    url = engine.url.render_as_string(hide_password=False)
    workers = [subprocess.Popen([sys.executable, "-c", WORKER, url, name, "main"]) for name in ("a", "b")]
    try:
        until(lambda: len(by_worker(engine, "message_type = 'campaign'")) == 2)
        pause(engine, message_type="campaign")
        committed_at = execute(engine, "SELECT clock_timestamp()").scalar()

        until(lambda: left(engine, "otp") == 0)
        assert by_worker(engine, "at > :since", since=committed_at) == {"a", "b"}
        assert by_worker(engine, "at > :since AND message_type = 'campaign'", since=committed_at) == set()
        assert left(engine, "campaign") > 0

        resume(engine, message_type="campaign")
        until(lambda: left(engine, "campaign") == 0)
    finally:
        for worker in workers:
            worker.terminate()
            worker.wait(60)
        execute(engine, "DROP FUNCTION note_claim CASCADE; DROP TABLE claims")


def by_worker(engine, condition: str, **values) -> set[str]:
    found = execute(engine, f"SELECT DISTINCT split_part(worker, '#', 1) FROM claims WHERE {condition}", **values)
    return {*found.scalars()}


def left(engine, message_type: str) -> int:
    sql = "SELECT count(*) FROM engagement_message_queue WHERE status <> 'sent' AND message_type = :message_type"
    return execute(engine, sql, message_type=message_type).scalar()


def test_a_send_in_hand_finishes(engine):
    """It was claimed before the pause, and is settled during it; a claim that failed waits."""
    began, go_on, answers = threading.Event(), threading.Event(), ["sent", "not_sent"]
    ids = queue(engine, new_message("user1"), new_message("user2"))

    def send(_):
        began.set()
        assert go_on.wait(60)
        if answers.pop() == "not_sent":
            raise ValueError

    running = in_thread(process_message_queue, engine, send, concurrency=2, backoff=lambda _: timedelta(0))
    assert began.wait(60)
    until(lambda: execute(engine, "SELECT count(*) FROM engagement_message_queue WHERE attempt = 1").scalar() == 2)
    pause(engine)
    go_on.set()

    running.result(60)
    assert sorted(row(engine, each).status for each in ids) == ["pending", "sent"]
    assert [row(engine, each).attempt for each in ids] == [1, 1]


def test_a_lost_message_is_recovered_during_a_pause_and_not_sent(engine):
    """A look-up settles it. An idempotent transport may send it again, but only after the pause."""

    class Far:
        idempotent = True
        sent = 0

        def send(self, _):
            self.sent += 1

        def look_up(self, message):
            return Sent("id") if message.user_id == "known" else None

    known, unknown = queue(engine, new_message("known"), new_message("unknown"))
    execute(
        engine,
        "UPDATE engagement_message_queue SET status = 'sending', attempt = 1, claimed_by = 'x',"
        " lease_expires_at = now() - interval '1 second'",
    )
    pause(engine)
    far = Far()

    process_message_queue(engine, far, backoff=lambda _: timedelta(0))

    assert (far.sent, row(engine, known).status, row(engine, unknown).status) == (0, "sent", "pending")
    assert row(engine, unknown).has_doubt
    resume(engine)
    process_message_queue(engine, far)
    assert (far.sent, row(engine, unknown).status) == (1, "sent")


def test_what_expires_during_a_pause_is_not_sent_after_it(engine):
    """It ends at the first claim after the pause."""
    (message_id,) = queue(engine, new_message())
    execute(
        engine,
        "UPDATE engagement_message_queue SET scheduled_for = now() - interval '2 hours',"
        " expires_at = now() - interval '1 hour'",
    )
    pause(engine)
    assert (sent_by(engine), row(engine, message_id).status) == ([], "pending")
    resume(engine)
    assert (sent_by(engine), row(engine, message_id).status) == ([], "expired")


def test_a_pause_holds_in_order_too_and_locks_no_destination(engine):
    """A worker of `in_order` obeys, and leaves the destinations of paused messages to others."""
    queue(engine, *(new_message(str(n), message_type=of) for n, of in enumerate(["campaign", "campaign", "otp"])))
    pause(engine, message_type="campaign")
    with Session(engine) as session:
        due = claims.where_due(START, (), ()) | {"limit": 10}
        turns = claims.take_turns(session.connection(), due, ALL_TYPES)
        locks = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()"
        assert (turns["turns"], session.scalar(text(locks))) == (new_message("2").destination_jid, 1)
    assert sent_by(engine, in_order=True) == ["otp"]


def test_a_message_that_fails_by_its_data_is_looked_for_past_a_pause_too(engine):
    """The claim that goes message by message obeys as well."""
    queue(engine, new_message("user1", message_type="campaign"), new_message("user2", message_type="otp"))
    pause(engine, message_type="campaign")
    execute(
        engine,
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " IF NEW.user_id = 'bad' THEN RAISE data_exception; END IF; RETURN NEW; END $$;"
        " CREATE TRIGGER refuse BEFORE UPDATE ON engagement_message_queue FOR EACH ROW EXECUTE FUNCTION refuse()",
    )
    try:
        queue(engine, new_message("bad", message_type="otp"))
        assert sent_by(engine, concurrency=3) == ["otp"]
    finally:
        execute(engine, "DROP FUNCTION refuse CASCADE")


# Waiting


def test_a_worker_whose_messages_are_all_paused_sleeps_and_wakes_when_it_is_lifted(engine, caplog):
    """It asks once for each poll, logs the pause once, and sends within a poll of the end."""
    queue(engine, new_message(message_type="campaign"))
    pause(engine, message_type="campaign")
    with caplog.at_level(logging.WARNING), working(engine, poll_interval=timedelta(milliseconds=500)) as sent:
        until(lambda: "engagement.paused what='type campaign'" in caplog.text)
        begun: list[object] = []
        note = begun.append
        event.listen(engine, "begin", note)
        threading.Event().wait(3)  # Whatever the machine's speed: fewer is better.
        event.remove(engine, "begin", note)
        assert 0 < len(begun) < 10
        assert sent == []
        resume(engine, message_type="campaign")
        until(lambda: sent == ["campaign"])
        until(lambda: "engagement.resumed what='type campaign'" in caplog.text)
    assert caplog.text.count("engagement.paused") == 1


def test_a_worker_wakes_when_a_pause_ends_by_itself(engine):
    """At that moment, and not at its next poll, which would be in an hour."""
    queue(engine, new_message(message_type="campaign"))
    end = execute(engine, "SELECT now() + interval '3 seconds'").scalar()
    pause(engine, message_type="campaign", until=end)
    with working(engine, poll_interval=timedelta(hours=1)) as sent:
        until(lambda: sent == ["campaign"])
    assert row(engine, execute(engine, "SELECT max(id) FROM engagement_message_queue").scalar()).sent_at >= end
    assert in_force(engine) == []


def test_a_cron_job_says_why_it_sent_nothing(engine, caplog):
    """It ends, and names what is paused of that which it takes."""
    queue(engine, new_message(message_type="campaign"))
    pause(engine, message_type="campaign")
    pause(engine, message_type="otp")
    assert sent_by(engine, excluding=["otp"]) == []
    assert "engagement.paused what='type campaign'" in caplog.text
    assert "otp" not in caplog.text


# The pauses


def test_a_pause_tells_who_why_and_since_when(engine):
    """A second one of the same has the last word on all but when it began."""
    first = pause(engine, "the provider is down", message_type="otp", by="ana", until=LATER)
    assert (first.scope, first.name, first.reason, first.by, first.until) == (
        PauseScope.TYPE,
        "otp",
        "the provider is down",
        "ana",
        LATER,
    )
    again = pause(engine, "still down", message_type="otp")
    assert (again.since, again.reason, again.by, again.until) == (first.since, "still down", None, None)
    everything, sender = pause(engine), pause(engine, sender="main")
    assert in_force(engine) == [everything, again, sender]

    execute(engine, "UPDATE engagement_pause SET until = now() - interval '1 second', since = now() - interval '1 day'")
    assert (in_force(engine), resume(engine)) == ([], False)
    assert pause(engine, message_type="otp").since > first.since


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"reason": ""}, "reason: is empty"),
        ({"reason": "x" * 501}, "reason: has 501"),
        ({"reason": "x", "message_type": "Not A Type"}, "message_type: must be"),
        ({"reason": "x", "sender": ""}, "sender: is empty"),
        ({"reason": "x", "sender": "x" * 201}, "sender: has 201"),
        ({"reason": "x", "message_type": "otp", "sender": "main"}, "sender: is given beside"),
        ({"reason": "x", "until": datetime(2030, 1, 1)}, "until: is naive"),  # noqa: DTZ001
        ({"reason": "x", "until": datetime(2020, 1, 1, tzinfo=UTC)}, "until: has passed"),
        ({"reason": "x", "by": ""}, "by: is empty"),
    ],
)
def test_bad_input_is_refused_and_harms_no_transaction(session, given, problem):
    """It names the field, and the caller's transaction goes on."""
    with pytest.raises(InvalidMessage, match=problem):
        Pauses(session).pause(**given)
    assert Pauses(session).in_force() == []


@pytest.mark.parametrize("bad", [{"sender": ""}, {"sender": 7}, {"sender": "x" * 201}])
def test_a_worker_refuses_a_sender_that_is_no_name(engine, bad):
    """At its start, and it names the option."""
    with pytest.raises(ValueError, match="sender: "):
        Worker(engine, print, **bad)


@pytest.mark.parametrize(
    "values",
    [
        "('some', 'x', 'y')",
        "('everything', 'x', 'y')",
        "('type', '', 'y')",
        "('sender', repeat('x', 201), 'y')",
        "('sender', 'x', repeat('y', 501))",
    ],
)
def test_the_database_refuses_a_pause_that_no_claim_would_understand(engine, values):
    """Also one that is written by hand."""
    with pytest.raises(IntegrityError):
        execute(engine, f"INSERT INTO engagement_pause (scope, name, reason) VALUES {values}")


def test_it_is_the_hosts_transaction(engine):
    """A rollback leaves nothing, and nothing is committed behind the host's back."""
    with Session(engine) as session:
        Pauses(session).pause("x")
        session.rollback()
    assert in_force(engine) == []


def test_async_pauses(engine):
    """The same, awaited."""

    async def main():
        ours = create_async_engine(engine.url, poolclass=NullPool)
        async with AsyncSession(ours) as session, session.begin():
            pauses = AsyncPauses(session)
            made = await pauses.pause("x", sender="main", by="ana", until=LATER)
            assert await pauses.in_force() == [made]
            assert await pauses.resume(sender="main")
            await pauses.pause("y")
        await ours.dispose()

    asyncio.run(main())
    assert [each.reason for each in in_force(engine)] == ["y"]


def test_verify_calls_no_paused_message_overdue(engine):
    """Somebody decided that it waits. A sender's pause excuses none: nobody knows whose it is."""
    queue(engine, new_message(message_type="campaign"))
    execute(engine, "UPDATE engagement_message_queue SET next_attempt_at = now() - interval '2 hours'")

    def overdue() -> int:
        with Session(engine) as session:
            return len([each for each in verify(session) if each.promise == "due_is_claimed"])

    pause(engine, sender="main")
    assert overdue() == 1
    pause(engine, message_type="campaign")
    assert overdue() == 0


def test_pauses_of_another_schema_are_not_ours(empty_engine):
    """`schema=` chooses the pauses with the queue."""
    migrations.upgrade(empty_engine, schema="one")
    migrations.upgrade(empty_engine, schema="two")
    with Session(empty_engine) as session, session.begin():
        Pauses(session, schema="one").pause("x")
        assert (len(Pauses(session, schema="one").in_force()), Pauses(session, schema="two").in_force()) == (1, [])
