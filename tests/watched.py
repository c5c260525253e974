"""A host's OpenTelemetry, and what has arrived there."""

from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from engagement.models import TABLE_NAME
from engagement.telemetry import EngagementInstrumentor


class Watched:
    """A host's OpenTelemetry, and what has arrived there."""

    def __init__(self, sampler=None) -> None:
        self._exporter = InMemorySpanExporter()
        self.tracer_provider = TracerProvider(sampler=sampler)
        self.tracer_provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self._reader = InMemoryMetricReader()
        self.meter_provider = MeterProvider(metric_readers=[self._reader])
        self.tracer = self.tracer_provider.get_tracer("host")

    def instrument(self, **options) -> None:
        """Switch telemetry on, for this host's providers."""
        EngagementInstrumentor().instrument(
            tracer_provider=self.tracer_provider, meter_provider=self.meter_provider, **options
        )

    @property
    def spans(self):
        """The spans that have ended, in that order."""
        return self._exporter.get_finished_spans()

    def named(self, operation: str):
        """Return the spans of one operation, by the convention's name for it."""
        return [span for span in self.spans if span.name == f"{operation} {TABLE_NAME}"]

    def one(self, operation: str):
        """Return the only span of an operation."""
        (span,) = self.named(operation)
        return span

    def metrics(self) -> dict:
        """Return {name: {labels: value}}; of a histogram, the value is (count, sum)."""
        data = self._reader.get_metrics_data()
        measured = {} if data is None else data.resource_metrics[0].scope_metrics[0].metrics
        return {metric.name: _points(metric) for metric in measured}

    def text(self) -> str:
        """Return all that was exported, as text."""
        data = self._reader.get_metrics_data()
        return "".join(span.to_json() for span in self.spans) + ("" if data is None else data.to_json())


def _points(metric) -> dict:
    return {tuple(sorted(point.attributes.items())): _value(point) for point in metric.data.data_points}


def _value(point):
    return (point.count, point.sum) if hasattr(point, "count") else point.value
