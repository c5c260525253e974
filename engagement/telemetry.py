"""OpenTelemetry: spans of queue, claim, send, settle and receipts by its conventions, and the metrics of `metrics`.

    EngagementInstrumentor().instrument()

Needs `engagement[otel]`. A message keeps the context of the span that queued it. Later spans are
linked to that one and are not its children: days may lie between. Spans hold ids, types and outcomes, but no person,
key, number or reason, and of an exception its type only.
See docs/decisions.md#2026-11-24--the-trace-context-is-a-column-and-delivery-is-linked-to-it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from threading import Lock
from typing import ClassVar, NamedTuple

from opentelemetry.context import Context, attach
from opentelemetry.metrics import Histogram, Meter, MeterProvider, Observation, get_meter
from opentelemetry.trace import (
    Link,
    Span,
    SpanKind,
    StatusCode,
    Tracer,
    TracerProvider,
    get_current_span,
    get_tracer,
    set_span_in_context,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue
from sqlalchemy import Engine

from engagement._claim import Claim
from engagement._watching import observers as observing
from engagement._watching.metrics import (
    COUNTERS,
    HISTOGRAMS,
    QUEUE,
    Counting,
    Metric,
    QueueReader,
    Sample,
)
from engagement._watching.observers import Heard, Observer, QueueEnd, Round, SendEnd
from engagement.messages import Queued, QueuedMany
from engagement.models import TABLE_NAME
from engagement.outcomes import InDoubt, NotSent, Outcome, Refused

SCHEMA_URL = "https://opentelemetry.io/schemas/1.44.0"
"""The version of the conventions whose names are used."""


class EngagementInstrumentor:
    """Switches telemetry on and off for this process. `opentelemetry-instrument` finds and calls it by itself."""

    _observers: ClassVar[list[Observer]] = []
    _gauges: ClassVar[list[_Gauges]] = []

    def instrument(
        self,
        *,
        engine: Engine | None = None,
        schema: str | None = None,
        tracer_provider: TracerProvider | None = None,
        meter_provider: MeterProvider | None = None,
        **_: object,
    ) -> None:
        """Switch it on, in place of an earlier call (after two calls, a message is still counted once).

        With an `engine`, also measure the queue, by one short query a collection: one process is enough.
        The providers are the global ones unless given.
        """
        reader = None if engine is None else QueueReader(engine, schema=schema)
        self.uninstrument()
        tracer = get_tracer("engagement", tracer_provider=tracer_provider, schema_url=SCHEMA_URL)
        meter = get_meter("engagement", meter_provider=meter_provider, schema_url=SCHEMA_URL)
        self._observers.extend([Tracing(tracer, meter), _counting(meter)])
        for observer in self._observers:
            observing.observe(observer)
        if reader is not None:
            self._gauges.append(_Gauges(meter, reader))

    def uninstrument(self, **_: object) -> None:
        """Switch it off."""
        while self._observers:
            observing.unobserve(self._observers.pop())
        while self._gauges:
            self._gauges.pop().close()


# Spans ---------------------------------------------------------------------------------------------------------------

Attributes = Mapping[str, AttributeValue]


class Operation(NamedTuple):
    """A word of ours, and the word of the conventions."""

    name: str
    type: str | None
    kind: SpanKind


QUEUEING = Operation("queue", "send", SpanKind.PRODUCER)
CLAIMING = Operation("claim", "receive", SpanKind.CLIENT)
SENDING = Operation("send", "process", SpanKind.CONSUMER)
LOOKING_UP = Operation("look_up", None, SpanKind.INTERNAL)
SETTLING = Operation("settle", "settle", SpanKind.CLIENT)
RECEIVING = Operation("record_receipts", None, SpanKind.INTERNAL)

_TROUBLE = (NotSent, Refused, InDoubt)
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)


class Tracing:
    """An observer that makes spans, and measures how long they were."""

    def __init__(self, tracer: Tracer, meter: Meter) -> None:
        self._tracer = tracer
        self._operation_duration = _durations(
            meter,
            "messaging.client.operation.duration",
            "Duration of queue, claim, settle, look_up and record_receipts.",
        )
        self._process_duration = _durations(meter, "messaging.process.duration", "Duration of send.")

    def queueing(self, message_type: str | None) -> tuple[str | None, QueueEnd]:
        """Start a span and make it current; its context is stored with the messages."""
        step = self._begin(QUEUEING, {} if message_type is None else {"engagement.message_type": message_type})
        attach(set_span_in_context(step.span))
        return _traceparent(step.span), partial(_queued, step)

    def sending(self, claims: Sequence[Claim]) -> SendEnd:
        """Start a span and make it current: spans of the transport are its children."""
        step = self._begin(LOOKING_UP if claims[0].lost_workers else SENDING, _about(claims), _links(claims))
        attach(set_span_in_context(step.span))
        return partial(_answered, step)

    def committed(self, round_: Round) -> None:
        """Make the spans of the settlements and claims: each is as long as their transaction."""
        if round_.settled:
            claims = [claim for claim, _, _ in round_.settled]
            step = self._begin(SETTLING, _about(claims, is_batch=True), _links(claims), round_.started_at)
            is_lost = any(status is None for _, _, status in round_.settled)
            step.end(_settlement(round_), error="claim_lost" if is_lost else None)
        if round_.claimed:
            about, links = _about(round_.claimed, is_batch=True), _links(round_.claimed)
            self._begin(CLAIMING, about, links, round_.started_at).end({})

    def heard(self, receipts: Sequence[Heard], started_at: int) -> None:
        """Make a span of the call that recorded them, with an event for each."""
        links = _links_to((each.message_id, each.trace_context) for each in receipts)
        step = self._begin(RECEIVING, {"messaging.batch.message_count": len(receipts)}, links, started_at)
        for each in receipts:
            step.span.add_event(f"engagement.{each.receipt.event}", _receipt(each))
        step.end(_receipt(receipts[0]) if len(receipts) == 1 else {})

    def dropped(self, receipts: int) -> None:
        """Make no span: the metrics count them."""

    def _begin(
        self, operation: Operation, about: Attributes, links: Sequence[Link] = (), started_at: int | None = None
    ) -> _Step:
        named: dict[str, AttributeValue] = {
            "messaging.system": "engagement",
            "messaging.destination.name": TABLE_NAME,
            "messaging.operation.name": operation.name,
        }
        if operation.type is not None:
            named["messaging.operation.type"] = operation.type
        started_at = started_at or time.time_ns()
        span = self._tracer.start_span(
            f"{operation.name} {TABLE_NAME}",
            kind=operation.kind,
            attributes={**named, **about},
            links=links,
            start_time=started_at,
        )
        durations = self._process_duration if operation is SENDING else self._operation_duration
        return _Step(span, started_at, durations, named)


class _Step(NamedTuple):
    """A span that has begun."""

    span: Span
    started_at: int
    durations: Histogram
    named: Attributes

    def end(self, attributes: Attributes, error: str | None = None) -> None:
        """End the span. `error` is one of few words: a text might be about a person."""
        self.span.set_attributes(attributes)
        named = self.named
        if error is not None:
            named = {**named, "error.type": error}
            self.span.set_attribute("error.type", error)
            self.span.set_status(StatusCode.ERROR)
        ended_at = time.time_ns()
        self.span.end(ended_at)
        self.durations.record((ended_at - self.started_at) / 1e9, named)


def _queued(step: _Step, result: Queued | QueuedMany | BaseException) -> None:
    match result:
        case Queued(created=created, message_id=message_id):
            known = {} if message_id is None else {"messaging.message.id": str(message_id)}
            step.end({"engagement.created": int(created), "engagement.duplicates": int(not created), **known})
        case QueuedMany(created=created, duplicates=duplicates):
            count = {"messaging.batch.message_count": created + duplicates}
            step.end({"engagement.created": created, "engagement.duplicates": duplicates, **count})
        case BaseException():
            step.end({}, error=_type_name(result))


def _answered(step: _Step, outcomes: Sequence[Outcome]) -> None:
    troubles = [outcome.event for outcome in outcomes if isinstance(outcome, _TROUBLE)]
    outcome = {"engagement.outcome": outcomes[0].event} if len(outcomes) == 1 else {}
    step.end(outcome, error=troubles[0] if troubles else None)


def _settlement(round_: Round) -> Attributes:
    if len(round_.settled) > 1:
        return {}
    _, verdict, status = round_.settled[0]
    return {"engagement.outcome": verdict.event, "engagement.status": str(status or "claim_lost")}


def _about(claims: Sequence[Claim], *, is_batch: bool = False) -> Attributes:
    """Return the attributes of messages: of several, their number."""
    about: dict[str, AttributeValue] = {}
    if is_batch or len(claims) > 1:
        about["messaging.batch.message_count"] = len(claims)
    if len(claims) == 1:
        message = claims[0].message
        about |= {
            "messaging.message.id": str(message.id),
            "engagement.message_type": message.message_type,
            "engagement.attempt": message.attempt,
        }
    return about


def _receipt(heard: Heard) -> Attributes:
    return {
        "messaging.message.id": str(heard.message_id),
        "engagement.message_type": heard.message_type,
        "engagement.receipt": heard.receipt.event,
        "engagement.status": str(heard.status),
    }


def _links(claims: Sequence[Claim]) -> list[Link]:
    return _links_to((claim.message.id, claim.trace_context) for claim in claims)


def _links_to(messages: Iterable[tuple[int, str | None]]) -> list[Link]:
    """Return links to the spans that queued the messages, which are given by id and trace context."""
    links = []
    for message_id, trace_context in dict(messages).items():
        if trace_context is not None:
            context = _PROPAGATOR.extract({"traceparent": trace_context}, Context())
            queued_by = get_current_span(context).get_span_context()
            if queued_by.is_valid:  # Somebody may have written anything there.
                links.append(Link(queued_by, {"messaging.message.id": str(message_id)}))
    return links


_PROPAGATOR = TraceContextTextMapPropagator()


def _traceparent(span: Span) -> str | None:
    """Return the context to store; None if the span is not sampled, since a link to it would lead nowhere."""
    if not span.get_span_context().trace_flags.sampled:
        return None
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier, set_span_in_context(span))
    return carrier.get("traceparent")


def _type_name(error: BaseException) -> str:
    kind = type(error)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


# Metrics -------------------------------------------------------------------------------------------------------------


def _durations(meter: Meter, name: str, description: str) -> Histogram:
    return meter.create_histogram(name, "s", description, explicit_bucket_boundaries_advisory=_SECONDS)


def _counting(meter: Meter) -> Counting:
    counters = {metric: meter.create_counter(metric.name, metric.unit, metric.help) for metric in COUNTERS}
    histograms = {
        metric: meter.create_histogram(
            metric.name, metric.unit, metric.help, explicit_bucket_boundaries_advisory=buckets
        )
        for metric, buckets in HISTOGRAMS.items()
    }
    return Counting(
        add=lambda metric, amount, labels: counters[metric].add(amount, labels),
        record=lambda metric, seconds, labels: histograms[metric].record(seconds, labels),
    )


class _Gauges:
    """The gauges of the queue: each is asked for alone, and all are answered by one reading."""

    FRESH_SECONDS = 1.0

    def __init__(self, meter: Meter, reader: QueueReader) -> None:
        self._reader: QueueReader | None = reader
        self._lock = Lock()
        self._samples: list[Sample] = []
        self._read_at = float("-inf")
        for metric in QUEUE:
            meter.create_observable_gauge(metric.name, [partial(self._observe, metric)], metric.unit, metric.help)

    def close(self) -> None:
        """Read no more: a meter does not let go of its instruments."""
        self._reader = None

    def _observe(self, metric: Metric, _: object) -> Iterator[Observation]:
        with self._lock:
            if self._reader is None:
                return
            if time.monotonic() - self._read_at > self.FRESH_SECONDS:
                self._samples = self._reader.read()
                self._read_at = time.monotonic()
            samples = self._samples
        for measured, labels, value in samples:
            if measured is metric:
                yield Observation(value, labels)
