"""Work 6: drain while another session holds an old snapshot, and after it is gone.

Entries that an old snapshot may see cannot be removed. So the messages claimed meanwhile stay in the index of due
messages, and a claim that starts at the beginning has to step over all of them.
docs/decisions.md#2026-11-24--a-claim-starts-from-the-beginning-for-a-tenth-of-the-time-at-most
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial

from benchmarks.floors import Floor, claims
from benchmarks.given import given
from benchmarks.measuring import Fact, facts
from benchmarks.server import Database, database
from benchmarks.setup import Setup
from engagement import OutgoingMessage, Sent, Worker

BATCH = 100
PLAIN = f"plain claims of {BATCH}"
BATCHES = (BATCH, 1000)
POLL = timedelta(milliseconds=20)
AS_BEFORE = 0.9
"""The share of the speed before that counts as full speed again."""

Drain = Callable[[int], None]
"""Waits until so many messages, which were just queued, have been sent."""


@dataclass
class Played:
    """The rates of the bursts, and the times of the events, in seconds since the start."""

    bursts: list[tuple[float, float]] = field(default_factory=list)
    """(when it was done, messages per second)"""
    snapshot_at: float = 0.0
    gone_at: float = 0.0
    vacuumed_at: float = 0.0

    def rate(self, start: float, end: float) -> float:
        """Return the rate of a stretch of time: bursts are of one size, so it is their harmonic mean."""
        rates = [rate for at, rate in self.bursts if start < at <= end] or [self.bursts[-1][1]]
        return len(rates) / sum(1 / rate for rate in rates)

    def recovered_after(self) -> float:
        """Return how long after the vacuum the first burst was over that went as fast as before the snapshot."""
        wanted = AS_BEFORE * self.rate(0, self.snapshot_at)
        return next(
            (at - self.vacuumed_at for at, rate in self.bursts if at > self.vacuumed_at and rate >= wanted), 1e9
        )


def drain_under_an_old_snapshot(setup: Setup) -> Iterator[str]:
    """Queue and drain for 60 s under another session's old snapshot, then without it; draw both."""
    played = {}
    drains = {PLAIN: _plain} | {f"ours, send_many of {batch:,}": partial(_worker, batch=batch) for batch in BATCHES}
    for name, draining in drains.items():
        with database(setup.url) as db, draining(db) as drain:
            played[name] = _play(setup, db, drain)
    yield facts("under an old snapshot", _facts(played))
    yield _draw(setup, played)


def _play(setup: Setup, db: Database, drain: Drain) -> Played:
    """Play bursts one after the other, each queued and then drained; the snapshot comes, and goes."""
    played, queue, started = Played(), Floor(db), time.monotonic()
    size = setup.size(10_000, 500)

    def now() -> float:
        return time.monotonic() - started

    def play(seconds: float) -> None:
        until = now() + seconds
        while now() < until:
            queue.queue_many(given(size))()
            begun = now()
            drain(size)
            played.bursts.append((now(), size / (now() - begun)))

    play(setup.seconds(8, 0.2))
    played.snapshot_at = now()
    with db.connect(autocommit=True) as other:
        other.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        other.execute("SELECT count(*) FROM engagement_message_queue")
        play(setup.seconds(60, 0.4))
    played.gone_at = now()
    db.execute("VACUUM engagement_message_queue")
    played.vacuumed_at = now()
    play(setup.seconds(12, 0.2))
    return played


@contextmanager
def _plain(db: Database) -> Iterator[Drain]:
    """Drain by claims that start at the beginning."""
    with db.connect(autocommit=True) as connection:
        yield lambda size: _consume(claims(connection, BATCH), size)


def _consume(claimed: Iterator[int], size: int) -> None:
    while size > 0:
        size -= next(claimed)


@contextmanager
def _worker(db: Database, *, batch: int) -> Iterator[Drain]:
    """Drain by a worker that runs all the time, as in production."""
    transport, stop = _Counting(), threading.Event()
    worker = Worker(db.engine, transport, concurrency=batch, poll_interval=POLL)
    thread = threading.Thread(target=worker.run, args=[stop])
    thread.start()
    try:
        yield transport.wait_for
    finally:
        stop.set()
        thread.join()


class _Counting:
    """Sends nothing, and tells when so much of it was sent."""

    def __init__(self) -> None:
        self._sent = 0
        self._change = threading.Condition()

    def send_many(self, messages: Sequence[OutgoingMessage]) -> list[Sent]:
        with self._change:
            self._sent += len(messages)
            self._change.notify()
        return [Sent()] * len(messages)

    def wait_for(self, size: int) -> None:
        with self._change:
            self._change.wait_for(lambda: self._sent >= size)
            self._sent -= size


def _facts(played: dict[str, Played]) -> Iterator[Fact]:
    """Compare the last ten seconds under the snapshot."""
    last_of_plain = _last_rate(played[PLAIN])
    for name, each in played.items():
        before, last = each.rate(0, each.snapshot_at), _last_rate(each)
        yield Fact(f"{name}, before", before, "messages/s")
        yield Fact(f"{name}, at the end of the snapshot", last, "messages/s")
        if name != PLAIN:
            yield Fact("… share of its speed before", last / before, "of 1")
            at_least = 5 if name == list(played)[-1] else None
            yield Fact(f"… by {PLAIN}", last / last_of_plain, "times", at_least=at_least)
            yield Fact(f"… until {AS_BEFORE} of that, after the vacuum", each.recovered_after(), "s", at_most=10)


def _last_rate(played: Played) -> float:
    return played.rate(played.gone_at - 10, played.gone_at)


def _draw(setup: Setup, played: dict[str, Played]) -> str:
    """Draw the drain over time."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "No picture: matplotlib is not installed (it comes with the extra `bench`)."
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, each in played.items():
        axes.plot([at for at, _ in each.bursts], [rate for _, rate in each.bursts], marker=".", label=name)
    last = list(played.values())[-1]
    axes.axvspan(last.snapshot_at, last.gone_at, alpha=0.1, color="black", label="another session's snapshot is open")
    axes.axvline(last.vacuumed_at, color="gray", linestyle=":", label="vacuumed")
    axes.set(xlabel="seconds", ylabel="messages drained per second", ylim=(0, None))
    figure.legend(loc="outside lower center", ncols=3, fontsize="small")
    figure.savefig(setup.picture, dpi=110)
    return f"The drain over time: `{setup.picture}`"
