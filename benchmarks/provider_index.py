"""Work 9: drain with and without the index by which a receipt finds its message."""

from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial

from benchmarks.given import given
from benchmarks.measuring import Contender, compare, timed
from benchmarks.ours import Ours
from benchmarks.server import Database, database
from benchmarks.setup import Setup

INDEX = "engagement_message_queue_provider"
WITH, WITHOUT = "with the index", "without it"
MOST_PRICE = 0.03


def drain_beside_the_index(setup: Setup) -> Iterator[str]:
    """Drain with a transport that returns ids, in two databases by turns: one has no index of them."""
    size, few = setup.size(20_000, 400), setup.size(1_000, 40)
    with ExitStack() as stack:
        databases = {name: stack.enter_context(database(setup.url)) for name in (WITHOUT, WITH)}
        databases[WITHOUT].execute(f"DROP INDEX {INDEX}")
        for how, many, concurrency, messages in (
            ("send_many", True, 1000, size),
            ("a function", False, 100, size),
            ("a function", False, 1, few),
        ):
            contenders = [
                Contender(
                    name,
                    partial(_drained, db, Ours(db, many=many, concurrency=concurrency, names=True), messages),
                    WITHOUT if name == WITH else None,
                    1 - MOST_PRICE if name == WITH else None,
                )
                for name, db in databases.items()
            ]
            title = f"drain {messages:,}, {how}, concurrency={concurrency:,}"
            yield compare(title, contenders, rounds=setup.rounds, warm_up=not setup.small).table()


def _drained(db: Database, queue: Ours, size: int) -> float:
    queue.empty()
    queue.fill(given(size))
    # A checkpoint of one round would fall into the next one's time.
    db.execute("CHECKPOINT")
    part = queue.drain()
    with timed() as timer:
        part()
    return size / timer.seconds
