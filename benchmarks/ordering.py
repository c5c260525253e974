"""Work 10: drain in the order of each destination across workers, and without that."""

from collections.abc import Iterator
from functools import partial

from benchmarks.given import given
from benchmarks.measuring import Contender, compare, timed
from benchmarks.ours import Ours
from benchmarks.server import Database, database
from benchmarks.setup import Setup

WITH, WITHOUT = "in_order", "without it"


def drain_in_order(setup: Setup) -> Iterator[str]:
    """Drain with a transport that does nothing: the whole price of `in_order` is in the claims."""
    size, few = setup.size(20_000, 400), setup.size(1_000, 40)
    with database(setup.url) as db:
        for how, many, concurrency, messages in (
            ("send_many", True, 1000, size),
            ("a function", False, 100, size),
            ("a function", False, 1, few),
        ):
            contenders = [
                Contender(
                    name,
                    partial(
                        _drained, db, Ours(db, many=many, concurrency=concurrency, in_order=name == WITH), messages
                    ),
                    WITHOUT if name == WITH else None,
                )
                for name in (WITHOUT, WITH)
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
