"""What observers are told, in whose context, and that none of them can do harm."""

import asyncio
import sys
import threading
from contextvars import ContextVar
from datetime import UTC, datetime, timedelta
from functools import partial
from types import SimpleNamespace

import pytest
from conftest import PATIENCE, execute, in_thread, new_message, queue, row
from far import awaited
from sqlalchemy import create_engine, event
from sqlalchemy.exc import ProgrammingError
from sqlalchemy.orm import Session

from engagement import (
    EngagementMessageRepository,
    InvalidMessage,
    MessageStatus,
    NotSent,
    Queued,
    QueuedMany,
    Refused,
    Sent,
    Worker,
    process_message_queue,
)
from engagement._watching import observers as observing
from engagement.models import TABLE_NAME

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
STEP: ContextVar[str | None] = ContextVar("STEP", default=None)


class Recorder:
    """An observer that keeps what it was told, and says in which step the work is."""

    def __init__(self, trace_context: str | None = None) -> None:
        self.trace_context = trace_context
        self.queued: list = []
        self.sent: list = []
        self.rounds: list = []

    def queueing(self, message_type):
        """Keep the result of each."""
        STEP.set("queue")
        return self.trace_context, lambda result: self.queued.append((message_type, result))

    def sending(self, claims):
        """Keep the outcomes of each."""
        STEP.set(f"send {claims[0].message.id}")
        return lambda outcomes: self.sent.append((list(claims), list(outcomes)))

    def committed(self, round_):
        """Keep it."""
        self.rounds.append(round_)


@pytest.fixture
def observe():
    """Return a function that registers an observer until the end of the test."""
    observers = []

    def register(observer):
        observing.observe(observer)
        observers.append(observer)
        return observer

    yield register
    for observer in observers:
        observing.unobserve(observer)


def queue_many(engine, *messages) -> QueuedMany:
    with Session(engine) as session, session.begin():
        return EngagementMessageRepository(session).queue_messages(messages)


# What is told


def test_an_observer_is_told_what_was_queued(engine, observe):
    """Each call is told with its result: the message, the duplicate, the batch."""
    recorder = observe(Recorder())
    (message_id,) = queue(engine, new_message("a"))
    queue(engine, new_message("a"))
    queue_many(engine, new_message("a"), new_message("b"))

    (_, created), (_, duplicate), (_, many) = recorder.queued
    assert [message_type for message_type, _ in recorder.queued] == ["goodbye", "goodbye", None]
    assert isinstance(created, Queued)
    assert (created.created, created.message_id) == (True, message_id)
    assert (duplicate.created, duplicate.message_id) == (False, message_id)
    assert many == QueuedMany(created=1, duplicates=1)


def test_an_observer_is_told_what_could_not_be_queued(engine, empty_engine, observe):
    """An error of the database, or of what yields a batch, is told, and raised as without an observer."""
    recorder = observe(Recorder())
    with pytest.raises(ProgrammingError):
        queue(empty_engine, new_message())
    with pytest.raises(InvalidMessage):
        queue_many(engine, new_message(), "no message")

    assert [type(result) for _, result in recorder.queued] == [ProgrammingError, InvalidMessage]


def test_an_observer_is_told_what_was_delivered(engine, observe):
    """Claims, outcomes and settlements are told after their commit; so is what expired, with where it stands."""
    recorder = observe(Recorder())
    sent, refused, late = queue(
        engine,
        new_message("a"),
        new_message("b"),
        new_message("c", expires_at=datetime.now(UTC) + timedelta(hours=1)),
    )
    execute(
        engine,
        f"""UPDATE {TABLE_NAME} SET scheduled_for = now() - interval '2 hours', expires_at = now() - interval '1 hour'
        WHERE id = :id""",
        id=late,
    )
    process_message_queue(engine, lambda message: Sent() if message.id == sent else Refused("x"))

    assert [claim.message.id for round_ in recorder.rounds for claim in round_.claimed] == [sent, refused]
    assert [(claim.message.id, outcome) for (claim,), (outcome,) in recorder.sent] == [
        (sent, Sent()),
        (refused, Refused("x")),
    ]
    assert [
        (claim.message.id, verdict.event, status)
        for round_ in recorder.rounds
        for claim, verdict, status in round_.settled
    ] == [(sent, "sent", MessageStatus.SENT), (refused, "refused", MessageStatus.FAILED)]
    ended = {message.id: status for round_ in recorder.rounds for message, status in round_.ended.items()}
    assert ended == {late: MessageStatus.EXPIRED}


def test_an_observer_is_told_of_a_lost_claim(engine, observe):
    """An outcome that came too late to be recorded has no status."""
    recorder = observe(Recorder())
    queue(engine, new_message())

    def send(_message):
        execute(engine, f"UPDATE {TABLE_NAME} SET attempt = attempt + 1")
        return Refused("no such number")

    process_message_queue(engine, send)

    assert [status for round_ in recorder.rounds for _, _, status in round_.settled] == [None]


def test_who_observes_no_more_is_told_nothing(engine, observe):
    """`unobserve` takes off the one that it is given, and leaves the others."""
    gone, stays = observe(Recorder()), observe(Recorder())
    observing.unobserve(gone)
    queue(engine, new_message())
    process_message_queue(engine, lambda _: Sent())

    assert (gone.queued, gone.sent, gone.rounds) == ([], [], [])
    assert len(stays.queued) == len(stays.sent) == 1


# In whose context


def test_the_work_runs_in_the_context_that_an_observer_leaves(engine, observe):
    """What the driver does while queueing is within the step, and nothing of it stays with the caller."""
    observe(Recorder())
    steps = []
    other = create_engine(engine.url)

    @event.listens_for(other, "before_cursor_execute")
    def _see(_connection, _cursor, statement, *_):
        if statement.startswith("INSERT"):
            steps.append(STEP.get())

    queue(other, new_message())
    other.dispose()

    assert steps == ["queue"]
    assert STEP.get() is None


@pytest.mark.parametrize("kind", [lambda transport: transport, awaited], ids=["function", "async_function"])
def test_each_send_runs_in_its_own_context(engine, observe, kind):
    """Two sends at once, in threads or in the event loop, are each within a step of their own."""
    observe(Recorder())
    ids = queue(engine, new_message("a"), new_message("b"))
    steps = {}

    def send(message):
        steps[message.id] = STEP.get()

    process_message_queue(engine, kind(send), concurrency=2)

    assert steps == {message_id: f"send {message_id}" for message_id in ids}
    assert STEP.get() is None


def test_sends_see_the_context_of_who_asked_for_them(engine):
    """A context variable that is set around the run is seen by the transport, with no observer too."""
    queue(engine, new_message())
    seen = []

    class Transport:
        def ready(self):
            seen.append(("ready", STEP.get()))
            return True

        def send(self, _):
            seen.append(("send", STEP.get()))

    token = STEP.set("nightly")
    try:
        process_message_queue(engine, Transport())
    finally:
        STEP.reset(token)

    assert set(seen) == {("ready", "nightly"), ("send", "nightly")}


# What is stored


@pytest.mark.parametrize("chunk", [5_000, 2], ids=["one_statement", "temporary_table"])
def test_the_trace_context_is_stored_with_the_message(engine, observe, monkeypatch, chunk):
    """What an observer returns is stored with one message and with each of a batch, and handed on with the claim."""
    monkeypatch.setattr("engagement._queueing.batch.CHUNK", chunk)
    recorder = observe(Recorder(TRACEPARENT))
    queue(engine, new_message("one"))
    queue_many(engine, *(new_message(f"u{number}") for number in range(5)))
    process_message_queue(engine, lambda _: NotSent("x"), backoff=lambda _: timedelta(hours=1))

    assert execute(engine, f"SELECT trace_context FROM {TABLE_NAME}").scalars().all() == [TRACEPARENT] * 6
    assert [claim.trace_context for claims, _ in recorder.sent for claim in claims] == [TRACEPARENT] * 6


def test_a_duplicate_changes_no_trace_context(engine, observe):
    """The message that was there stays untouched."""
    (message_id,) = queue(engine, new_message())
    observe(Recorder(TRACEPARENT))
    queue(engine, new_message())
    queue_many(engine, new_message())

    assert row(engine, message_id).trace_context is None


@pytest.mark.parametrize("blank", ["forget", "prune"])
def test_a_blanked_message_keeps_no_trace_context(engine, observe, blank):
    """A trace may tell who it was about: forgetting and pruning cut the tie."""
    observe(Recorder(TRACEPARENT))
    (message_id,) = queue(engine, new_message())
    process_message_queue(engine, lambda _: Sent())
    with Session(engine) as session, session.begin():
        repository_ = EngagementMessageRepository(session)
        if blank == "forget":
            repository_.forget_user("user1")
        else:
            repository_.prune_messages(timedelta(0))

    assert row(engine, message_id).trace_context is None


# No harm


KINDS = {
    "function": lambda send: send,
    "async_function": awaited,
    "batch": lambda send: SimpleNamespace(send_many=lambda messages: [send(message) for message in messages]),
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("at_the_end", [False, True], ids=["at_the_beginning", "at_the_end"])
@pytest.mark.parametrize("error", [RuntimeError, asyncio.CancelledError])
def test_a_broken_observer_changes_nothing(engine, caplog, observe, *, error, at_the_end, kind):
    """What an observer raises is no error of the queue, and above all no outcome: each is sent once, and recorded."""
    told, sends = [], []

    def hear(name, *_):
        told.append(name)
        raise error("secret")

    def begin(name):
        return partial(hear, name) if at_the_end else hear(name)

    observe(
        SimpleNamespace(
            queueing=lambda _: (None, begin("queue")),
            sending=lambda _: begin("send"),
            committed=partial(hear, "committed"),
        )
    )
    after = observe(Recorder())
    queue(engine, new_message("a"), new_message("b"))
    assert queue_many(engine, new_message("c")).created == 1
    result = process_message_queue(engine, kind(sends.append), backoff=lambda _: timedelta(0))

    assert (result.succeeded, len(sends)) == (3, 3)
    assert execute(engine, f"SELECT DISTINCT status FROM {TABLE_NAME}").scalars().all() == ["sent"]
    assert set(told) == {"queue", "send", "committed"}
    assert len(after.queued) == 3
    assert sum(len(claims) for claims, _ in after.sent) == 3
    assert f"engagement.observer_failed error={error.__name__}" in caplog.text
    assert "secret" not in caplog.text


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_an_observer_that_exits_ends_no_thread(engine, observe, kind):
    """In a thread of ours it would end that alone, and nobody would hear of the sends that were left to it."""
    queue(engine, new_message("a"), new_message("b"))
    observe(SimpleNamespace(sending=lambda _: lambda _: sys.exit(), committed=lambda _: None))
    stop = threading.Event()

    result = in_thread(process_message_queue, engine, kind(lambda _: None), stop=stop).result(PATIENCE)

    assert result.succeeded == 2


def test_a_broken_observer_does_not_end_a_worker(engine, observe):
    """A worker whose every step is watched by a broken observer goes on until it is told to stop."""

    def hear(*_):
        raise RuntimeError

    observe(SimpleNamespace(queueing=hear, sending=hear, committed=hear))
    ids = queue(engine, *(new_message(f"u{number}") for number in range(5)))
    stop, sends = threading.Event(), []

    def send(message):
        sends.append(message.id)
        if len(sends) == len(ids):
            stop.set()

    result = Worker(engine, send).run(stop)

    assert (sends, result.succeeded) == (ids, 5)
