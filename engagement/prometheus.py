"""Metrics for Prometheus: the state of the queue, read once per scrape, and the counts of this process.

    REGISTRY.register(EngagementCollector(engine))

Needs `engagement[prometheus]`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import timedelta

from prometheus_client import Counter, Histogram
from prometheus_client.metrics_core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector
from sqlalchemy import Engine

from engagement._watching import observers as observing
from engagement._watching.metrics import (
    COUNTERS,
    HISTOGRAMS,
    QUEUE,
    Counting,
    Labels,
    Metric,
    QueueReader,
    Sample,
)


class EngagementCollector(Collector):
    """Counts the messages that this process queues and sends, and their receipts, from now on.

    With an `engine`, reads the queue as well.

    Each scrape is one round trip, which ends after `timeout`. A database that is away makes `engagement_up` 0, and the
    queue's other metrics absent: stale numbers would be worse than none.
    """

    def __init__(
        self, engine: Engine | None = None, *, schema: str | None = None, timeout: timedelta = timedelta(seconds=2)
    ) -> None:
        self._reader = None if engine is None else QueueReader(engine, schema=schema, timeout=timeout)
        self._counters = {metric: _counter(metric) for metric in COUNTERS}
        self._histograms = {metric: _histogram(metric, buckets) for metric, buckets in HISTOGRAMS.items()}
        self._counting = Counting(add=self._add, record=self._record)
        observing.observe(self._counting)

    def close(self) -> None:
        """Count nothing any more."""
        observing.unobserve(self._counting)

    def describe(self) -> Iterator[Family]:
        """Name the metrics. A registry asks for it, and would scrape otherwise."""
        for own in (*self._counters.values(), *self._histograms.values()):
            yield from own.describe()
        if self._reader is not None:
            yield from _families([])

    def collect(self) -> Iterator[Family]:
        """Return the metrics as they are now."""
        for own in (*self._counters.values(), *self._histograms.values()):
            yield from own.collect()
        if self._reader is not None:
            yield from _families(self._reader.read())

    def _add(self, metric: Metric, amount: float, labels: Labels) -> None:
        counter = self._counters[metric]
        (counter.labels(**labels) if labels else counter).inc(amount)

    def _record(self, metric: Metric, seconds: float, labels: Labels) -> None:
        self._histograms[metric].labels(**labels).observe(seconds)


def _counter(metric: Metric) -> Counter:
    return Counter(metric.prometheus_name, metric.help, metric.labels, registry=None)


def _histogram(metric: Metric, buckets: tuple[float, ...]) -> Histogram:
    return Histogram(metric.prometheus_name, metric.help, metric.labels, registry=None, buckets=buckets)


def _families(samples: Iterable[Sample]) -> Iterator[Family]:
    families = {of: GaugeMetricFamily(of.prometheus_name, of.help, labels=of.labels) for of in QUEUE}
    for metric, labels, value in samples:
        families[metric].add_metric(list(labels.values()), value)
    yield from families.values()
