"""OpenTelemetry: what the spans say and what they are linked to, what is counted, and that none of it can do harm."""

import asyncio
import logging
import re
import subprocess
import sys
import threading
import tomllib
from datetime import UTC, datetime, timedelta
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest
from conftest import execute, new_message, queue, row
from far import awaited
from opentelemetry import trace
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.semconv._incubating.attributes import messaging_attributes
from opentelemetry.trace import SpanKind, StatusCode
from sqlalchemy import create_engine, event
from sqlalchemy.exc import ProgrammingError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool
from watched import Watched

from engagement import (
    AsyncEngagementMessageRepository,
    EngagementMessageRepository,
    InDoubt,
    NotSent,
    Postpone,
    Refused,
    Sent,
    Withdraw,
    Worker,
    process_message_queue,
)
from engagement.models import TABLE_NAME
from engagement.outcomes import Outcome
from engagement.telemetry import EngagementInstrumentor

ROOT = Path(__file__).parent.parent
PATIENCE = 20
NOWHERE = "postgresql+psycopg://nobody@127.0.0.1:1/nothing"


def linked_to(span):
    return [link.context.span_id for link in span.links]


# Spans


def test_a_delivery_is_linked_to_what_queued_it(engine, watched):
    """The context of the queueing span is stored with the message; claim, send and settle link to it, as no child."""
    with watched.tracer.start_as_current_span("visit") as visit:
        (message_id,) = queue(engine, new_message())
    process_message_queue(engine, lambda _: Sent())

    queued = watched.one("queue")
    assert queued.parent.span_id == visit.get_span_context().span_id
    assert row(engine, message_id).trace_context == (
        f"00-{queued.context.trace_id:032x}-{queued.context.span_id:016x}-{queued.context.trace_flags:02x}"
    )
    for operation in ("claim", "send", "settle"):
        span = watched.one(operation)
        assert linked_to(span) == [queued.context.span_id]
        assert span.links[0].attributes == {"messaging.message.id": str(message_id)}
        assert span.parent is None
        assert span.context.trace_id != queued.context.trace_id


@pytest.mark.parametrize(
    "expected",
    [
        ("queue", "send", SpanKind.PRODUCER, {"engagement.created": 1, "engagement.duplicates": 0}),
        ("claim", "receive", SpanKind.CLIENT, {"messaging.batch.message_count": 1, "engagement.attempt": 1}),
        ("send", "process", SpanKind.CONSUMER, {"engagement.attempt": 1, "engagement.outcome": "sent"}),
        (
            "settle",
            "settle",
            SpanKind.CLIENT,
            {
                "messaging.batch.message_count": 1,
                "engagement.attempt": 1,
                "engagement.outcome": "sent",
                "engagement.status": "sent",
            },
        ),
    ],
)
def test_spans_follow_the_messaging_conventions(engine, watched, expected):
    """Each of the four has the conventions' name, kind and attributes, and but for these only ids and words of ours."""
    operation, type_, kind, more = expected
    (message_id,) = queue(engine, new_message())
    process_message_queue(engine, lambda _: Sent())

    span = watched.one(operation)

    assert span.kind is kind
    assert span.status.status_code is StatusCode.UNSET
    assert dict(span.attributes) == {
        "messaging.system": "engagement",
        "messaging.destination.name": TABLE_NAME,
        "messaging.operation.name": operation,
        "messaging.operation.type": type_,
        "messaging.message.id": str(message_id),
        "engagement.message_type": "goodbye",
        **more,
    }
    known = {value for name, value in vars(messaging_attributes).items() if name.isupper()}
    assert {name for name in span.attributes if name.startswith("messaging.")} <= known
    assert span.instrumentation_scope.name == "engagement"


def test_spans_take_as_long_as_what_they_are_of(engine, watched):
    """A send's span lasts from when the transport is called until it answers; claim and settle are no part of it."""
    queue(engine, new_message())
    called = []

    def send(_message):
        called.append(datetime.now(UTC).timestamp())

    process_message_queue(engine, send)

    send_, claim, settle = (watched.one(operation) for operation in ("send", "claim", "settle"))
    assert send_.start_time <= called[0] * 1e9 + 1e6 <= send_.end_time + 2e6
    assert claim.start_time <= claim.end_time <= send_.start_time
    assert send_.end_time <= settle.start_time <= settle.end_time


@pytest.mark.parametrize("chunk", [5_000, 2], ids=["one_statement", "temporary_table"])
def test_a_batch_is_queued_under_one_span(engine, watched, monkeypatch, chunk):
    """All messages of a batch carry the context of its one span, which counts them, and the duplicates."""
    monkeypatch.setattr("engagement._queueing.batch.CHUNK", chunk)
    with Session(engine) as session, session.begin():
        messages = [new_message(f"u{number}") for number in range(5)]
        EngagementMessageRepository(session).queue_messages([*messages, messages[0]])

    queued = watched.one("queue")
    stored = execute(engine, f"SELECT DISTINCT trace_context FROM {TABLE_NAME}").scalars().all()
    assert [context.split("-")[2] for context in stored] == [f"{queued.context.span_id:016x}"]
    assert queued.attributes["messaging.batch.message_count"] == 6
    assert (queued.attributes["engagement.created"], queued.attributes["engagement.duplicates"]) == (5, 1)
    assert "messaging.message.id" not in queued.attributes


def test_a_duplicate_is_told_and_changes_no_context(engine, watched):
    """A duplicate's span names the message that was there, which keeps the context of what created it."""
    (message_id,) = queue(engine, new_message())
    before = row(engine, message_id).trace_context
    queue(engine, new_message())

    _, duplicate = watched.named("queue")
    assert (duplicate.attributes["engagement.created"], duplicate.attributes["engagement.duplicates"]) == (0, 1)
    assert duplicate.attributes["messaging.message.id"] == str(message_id)
    assert duplicate.status.status_code is StatusCode.UNSET
    assert row(engine, message_id).trace_context == before


def test_the_async_repository_is_traced_too(engine, watched):
    """Concurrent tasks keep their own spans apart: each message has the context of a child of its task's span."""

    async def visit(async_engine, user_id):
        with watched.tracer.start_as_current_span(user_id) as span:
            async with AsyncSession(async_engine) as session, session.begin():
                queued = await AsyncEngagementMessageRepository(session).queue_message(new_message(user_id))
            assert trace.get_current_span() is span
        return queued.message_id, span.get_span_context()

    async def visits():
        async_engine = create_async_engine(engine.url, poolclass=NullPool)
        return await asyncio.gather(*(visit(async_engine, f"user{number}") for number in range(5)))

    for message_id, context in asyncio.run(visits()):
        assert f"-{context.trace_id:032x}-" in row(engine, message_id).trace_context
    assert len(watched.named("queue")) == 5


def test_what_the_driver_records_is_within_the_queueing_span(engine, watched):
    """A span that the host's SQLAlchemy instrumentation makes of the INSERT is a child of ours."""
    parents = []
    other = create_engine(engine.url)

    @event.listens_for(other, "before_cursor_execute")
    def _see(_connection, _cursor, statement, *_):
        if statement.startswith("INSERT"):
            parents.append(trace.get_current_span().get_span_context().span_id)

    queue(other, new_message())
    other.dispose()

    assert parents == [watched.one("queue").context.span_id]
    assert not trace.get_current_span().get_span_context().is_valid


def _plainly(transport):
    return transport


def _returning_a_coroutine(transport):
    send = awaited(transport)
    return lambda message: send(message)  # noqa: PLW0108 - a plain function, whose coroutine comes as a surprise


@pytest.mark.parametrize("kind", [_plainly, awaited, _returning_a_coroutine])
def test_what_the_transport_records_is_within_the_send(engine, watched, kind):
    """A span that the transport's HTTP client makes is a child of the send, in a thread as in the event loop."""
    queue(engine, new_message("a"), new_message("b"))

    def transport(message):
        with watched.tracer.start_as_current_span(f"POST {message.id}"):
            return Sent()

    process_message_queue(engine, kind(transport), concurrency=2)

    sends = {span.attributes["messaging.message.id"]: span.context.span_id for span in watched.named("send")}
    posts = {span.name.removeprefix("POST "): span.parent.span_id for span in watched.spans if "POST" in span.name}
    assert len(sends) == 2
    assert posts == sends


def test_sends_are_children_of_the_job_that_runs_them(engine, watched):
    """Within a span of the host's own, such as a cron job's, a delivery is its child, and is still only linked."""
    queue(engine, new_message())
    with watched.tracer.start_as_current_span("nightly") as nightly:
        process_message_queue(engine, lambda _: Sent())

    queued = watched.one("queue")
    for operation in ("claim", "send", "settle"):
        assert watched.one(operation).parent.span_id == nightly.get_span_context().span_id
        assert linked_to(watched.one(operation)) == [queued.context.span_id]


def test_a_batch_is_sent_under_one_span(engine, watched):
    """One call of `send_many` is one span, linked to each message, with an error if one of them is in trouble."""
    ids = queue(engine, new_message("a"), new_message("b"), new_message("c"))
    batch = SimpleNamespace(send_many=lambda _: [Sent(), Refused("x"), Sent()])
    process_message_queue(engine, batch, concurrency=3)

    send = watched.one("send")
    assert [link.attributes["messaging.message.id"] for link in send.links] == [str(message_id) for message_id in ids]
    assert send.attributes["messaging.batch.message_count"] == 3
    assert send.attributes["error.type"] == "refused"
    assert "messaging.message.id" not in send.attributes
    assert watched.one("settle").attributes["messaging.batch.message_count"] == 3


TROUBLE = {"not_sent": NotSent("x"), "refused": Refused("x"), "in_doubt": InDoubt("x"), "raises": TimeoutError("x")}
NO_TROUBLE = {"postponed": Postpone(datetime.now(UTC) + timedelta(hours=1), "x"), "withdrawn": Withdraw("x")}


@pytest.mark.parametrize(("name", "answer"), [*TROUBLE.items(), *NO_TROUBLE.items()])
def test_a_send_in_trouble_is_an_error(engine, watched, name, answer):
    """What did not leave, or may not have, is an error, said in one word; what is put off or withdrawn is none."""
    queue(engine, new_message())

    def send(_message):
        if isinstance(answer, Exception):
            raise answer
        return answer

    process_message_queue(engine, send, backoff=lambda _: timedelta(hours=1))

    outcome = "in_doubt" if name == "raises" else name
    send_ = watched.one("send")
    assert send_.attributes["engagement.outcome"] == outcome
    assert watched.one("settle").attributes["engagement.outcome"] == outcome
    assert send_.attributes.get("error.type") == (outcome if name in TROUBLE else None)
    assert send_.status.status_code is (StatusCode.ERROR if name in TROUBLE else StatusCode.UNSET)
    assert (send_.status.description, send_.events) == (None, ())
    assert watched.one("settle").status.status_code is StatusCode.UNSET


def test_a_failed_insert_is_an_error_and_still_raised(empty_engine, watched):
    """What the database refuses reaches the host as it would without us, and the span has its type, not its text."""
    with pytest.raises(ProgrammingError):
        queue(empty_engine, new_message("person-1"))

    span = watched.one("queue")
    assert span.attributes["error.type"] == "sqlalchemy.exc.ProgrammingError"
    assert (span.status.status_code, span.status.description, span.events) == (StatusCode.ERROR, None, ())
    assert "person-1" not in watched.text()


def test_a_lost_claim_is_an_error_of_the_settle(engine, watched):
    """A worker that comes back too late tells that its outcome was not recorded."""
    queue(engine, new_message())

    def send(_message):
        execute(engine, f"UPDATE {TABLE_NAME} SET attempt = attempt + 1")
        return Refused("x")

    process_message_queue(engine, send)

    settle = watched.one("settle")
    assert (settle.attributes["error.type"], settle.attributes["engagement.status"]) == ("claim_lost", "claim_lost")
    assert settle.status.status_code is StatusCode.ERROR


def test_a_look_up_has_a_span_of_its_own(engine, watched):
    """What is asked about a lost worker's message is no send, and is linked to what queued it all the same."""
    queue(engine, new_message())
    execute(
        engine,
        f"UPDATE {TABLE_NAME} SET status = 'sending', attempt = 1, lease_expires_at = now() - interval '1 second'",
    )
    transport = SimpleNamespace(send=lambda _: pytest.fail("was sent"), look_up=lambda _: Sent("found"))
    process_message_queue(engine, transport)

    look_up = watched.one("look_up")
    assert (look_up.kind, look_up.attributes["engagement.outcome"]) == (SpanKind.INTERNAL, "sent")
    assert linked_to(look_up) == [watched.one("queue").context.span_id]
    assert watched.named("send") == []


# What is stored


def test_nothing_is_stored_of_a_span_that_is_not_kept(engine):
    """A span that is not sampled is not linked to: it would lead nowhere."""
    watched = Watched(sampler=ALWAYS_OFF)
    watched.instrument()
    (message_id,) = queue(engine, new_message())
    EngagementInstrumentor().uninstrument()

    assert row(engine, message_id).trace_context is None


def test_nothing_is_stored_or_told_once_it_is_switched_off(engine, watched):
    """Without telemetry messages are queued and sent as ever, with no context and no span; so are those from before."""
    (before,) = queue(engine, new_message("a"))
    EngagementInstrumentor().uninstrument()
    (after,) = queue(engine, new_message("b"))
    result = process_message_queue(engine, lambda _: Sent())

    assert result.succeeded == 2
    assert row(engine, before).trace_context is not None
    assert row(engine, after).trace_context is None
    assert [span.name for span in watched.spans] == [f"queue {TABLE_NAME}"]


@pytest.mark.parametrize("written", ["", "nonsense", "00-" + "0" * 32 + "-" + "0" * 16 + "-01", "x" * 100_000])
def test_a_context_that_is_none_stops_nothing(engine, watched, written):
    """Whatever a hand-written UPDATE puts there, the message is sent, and linked to nothing."""
    (message_id,) = queue(engine, new_message())
    execute(engine, f"UPDATE {TABLE_NAME} SET trace_context = :written", written=written)

    assert process_message_queue(engine, lambda _: Sent()).succeeded == 1
    assert row(engine, message_id).status == "sent"
    assert watched.one("send").links == ()


# No harm


def test_without_the_extras_nothing_is_missing_and_nothing_is_imported(engine):
    """Queueing and sending need neither library, and do not import them where they are installed."""
    code = f"""
import sys
class Refuse:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in ("opentelemetry", "prometheus_client"):
            raise AssertionError(name + " was imported")
sys.meta_path.insert(0, Refuse())
from sqlalchemy import create_engine
from sqlalchemy.orm import Session
from engagement import EngagementMessageRepository, process_message_queue
engine = create_engine({engine.url.render_as_string(hide_password=False)!r})
with Session(engine) as session, session.begin():
    queued = EngagementMessageRepository(session).queue_message(
        user_id="u", message_type="goodbye", message_key="k", destination="individual",
        destination_jid="5511999999999@s.whatsapp.net")
assert process_message_queue(engine, lambda _: None).succeeded == 1
engine.dispose()
"""
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False)

    assert (done.returncode, done.stderr) == (0, "")


def test_nothing_personal_is_exported_or_logged(engine, watched, caplog):
    """No user, number, key, param or reason is in a span, a metric or a log line, whatever the outcome."""
    caplog.set_level(logging.DEBUG, logger="engagement")
    names = ["Sent", "NotSent", "Refused", "InDoubt", "Withdraw", "raises"]
    messages = [
        new_message(f"person-{name}", message_params={"secret": f"param-{name}"}, message_key=f"words-{name}")
        for name in names
    ]
    queue(engine, *messages)
    with Session(engine) as session, session.begin():
        EngagementMessageRepository(session).queue_messages(messages)
    outcomes = {"NotSent": NotSent, "Refused": Refused, "InDoubt": InDoubt, "Withdraw": Withdraw}

    def send(message):
        name = message.user_id.removeprefix("person-")
        if name == "raises":
            raise RuntimeError(message.message_params["secret"], message.destination_jid)
        return outcomes[name](f"reason {message.destination_jid}") if name in outcomes else Sent("provider-id")

    process_message_queue(engine, send, backoff=lambda _: timedelta(hours=1))

    assert len(watched.named("send")) == 6
    assert len(caplog.records) >= 6
    shown = watched.text() + caplog.text
    for private in ("person-", "param-", "words-", "@s.whatsapp.net", "reason", "provider-id", "whatsapp"):
        assert private not in shown


# Metrics


def test_what_a_process_does_is_counted(engine, watched):
    """Queued, duplicates, and outcomes by type with where the message then stands."""
    queue(engine, new_message("a"), new_message("a"), new_message("b", message_type="review"))
    with Session(engine) as session, session.begin():
        more = [new_message("c"), new_message("d"), new_message("a")]
        EngagementMessageRepository(session).queue_messages(more)
    queue(engine, new_message("e", expires_at=datetime.now(UTC) + timedelta(hours=1)))
    execute(
        engine,
        f"""UPDATE {TABLE_NAME} SET scheduled_for = now() - interval '2 hours', expires_at = now() - interval '1 hour'
        WHERE user_id = 'e'""",
    )
    answers = {"a": Sent(), "b": Refused("x"), "c": NotSent("x"), "d": InDoubt("x")}
    process_message_queue(engine, lambda message: answers[message.user_id], backoff=lambda _: timedelta(hours=1))

    measured = watched.metrics()
    assert measured["engagement.queued"] == {(): 5}
    assert measured["engagement.duplicates"] == {(): 2}
    assert measured["engagement.outcomes"] == {
        (("message_type", type_), ("outcome", outcome), ("status", status)): 1
        for type_, outcome, status in [
            ("goodbye", "sent", "sent"),
            ("review", "refused", "failed"),
            ("goodbye", "not_sent", "pending"),
            ("goodbye", "in_doubt", "in_doubt"),
            ("goodbye", "expired", "expired"),
        ]
    }


def test_the_time_from_due_to_sent_is_measured(engine, watched):
    """It begins when the message was last due, and only what was sent counts."""
    queue(engine, new_message("a"), new_message("b"))
    execute(
        engine,
        f"""UPDATE {TABLE_NAME} SET next_attempt_at = now() - interval '1 hour',
        scheduled_for = now() - interval '1 day'""",
    )
    process_message_queue(engine, lambda message: Sent() if message.user_id == "a" else Refused("x"))

    ((labels, (count, seconds)),) = watched.metrics()["engagement.due_to_sent"].items()
    assert (labels, count) == ((("message_type", "goodbye"),), 1)
    assert 3_600 <= seconds < 3_600 + PATIENCE


def test_durations_are_measured_by_the_conventions(engine, watched):
    """Each operation's duration is measured, as long as its span; that of a send is its processing."""
    queue(engine, new_message())
    process_message_queue(engine, lambda _: Refused("x"))

    measured = watched.metrics()
    operations = {
        dict(labels)["messaging.operation.name"]: value
        for labels, value in measured["messaging.client.operation.duration"].items()
    }
    assert set(operations) == {"queue", "claim", "settle"}
    ((labels, (count, seconds)),) = measured["messaging.process.duration"].items()
    span = watched.one("send")
    assert (count, seconds) == (1, pytest.approx((span.end_time - span.start_time) / 1e9))
    assert dict(labels) == {
        "messaging.system": "engagement",
        "messaging.destination.name": TABLE_NAME,
        "messaging.operation.name": "send",
        "messaging.operation.type": "process",
        "error.type": "refused",
    }


def test_opentelemetry_instrument_finds_it():
    """The entry point that `opentelemetry-instrument` looks for leads to the instrumentor."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    group = "opentelemetry_instrumentor"
    ((name, value),) = project["entry-points"][group].items()

    assert EntryPoint(name, value, group).load() is EngagementInstrumentor


def test_instrumented_twice_counts_once(engine, watched):
    """A host that calls it again, as after `opentelemetry-instrument`, is told everything once."""
    watched.instrument()
    queue(engine, new_message())

    assert watched.metrics()["engagement.queued"] == {(): 1}
    assert len(watched.named("queue")) == 1


def test_the_queue_is_measured_by_one_reading(engine, watched):
    """With an engine, how the queue stands is measured too, all of it by one statement a collection."""
    statements = []
    other = create_engine(engine.url)
    event.listen(other, "before_cursor_execute", lambda *args: statements.append(args[2]))
    queue(engine, new_message("a"), new_message("b"), new_message("c"))
    process_message_queue(engine, lambda _: Refused("x"), limit=1)
    process_message_queue(engine, lambda _: InDoubt("x"), limit=1)
    watched.instrument(engine=other)

    measured = watched.metrics()
    other.dispose()

    goodbye = (("message_type", "goodbye"),)
    assert (measured["engagement.up"], measured["engagement.due"]) == ({(): 1}, {(): 1})
    assert (measured["engagement.failed"], measured["engagement.in_doubt"]) == ({goodbye: 1}, {goodbye: 1})
    assert measured["engagement.oldest_due_age"][()] > 0
    assert len(statements) == 2, "where the table is, once, and the reading"


def test_switched_off_it_reads_the_queue_no_more(engine, watched, caplog):
    """A meter keeps its instruments; once telemetry is off, they ask the database nothing."""
    watched.instrument(engine=engine)
    EngagementInstrumentor().uninstrument()

    assert not {name for name in watched.metrics() if name.startswith("engagement.")}
    assert caplog.records == []


def test_a_lost_database_is_a_measurement(watched, caplog):
    """While the database is away that is what is measured, and nothing else of the queue."""
    watched.instrument(engine=create_engine(NOWHERE))

    measured = watched.metrics()

    assert measured["engagement.up"] == {(): 0}
    assert "engagement.due" not in measured
    assert [record.getMessage() for record in caplog.records] == ["engagement.queue_not_read error=OperationalError"]


# The documentation


def test_every_event_that_is_logged_is_explained():
    """docs/watching.md has a line for each event that the package can log, and for no other."""
    sources = "".join(path.read_text() for path in (ROOT / "engagement").rglob("*.py"))
    calls = "".join(re.findall(r"logger\.\w+\(.*?\)", sources, re.DOTALL))
    logged = set(re.findall(r'"engagement\.([a-z_]+)(?: |")', calls)) | {outcome.event for outcome in get_args(Outcome)}
    page = (ROOT / "docs/watching.md").read_text()
    explained = set(re.findall(r"^\| `engagement\.([a-z_]+)` \|", page, re.MULTILINE))

    assert len(logged) >= 15
    assert explained == logged


def test_an_idle_worker_makes_no_spans(engine, watched):
    """A worker that finds nothing to do has nothing to tell."""
    stop, polls = threading.Event(), []
    other = create_engine(engine.url)

    @event.listens_for(other, "after_cursor_execute")
    def _count(*_):
        polls.append(1)
        if len(polls) == 4:
            stop.set()

    Worker(other, lambda _: None, poll_interval=timedelta(milliseconds=10)).run(stop)
    other.dispose()

    assert watched.spans == ()
